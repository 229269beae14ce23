"""Greedy search and sampling over the engine's decoder.

Samples of one source are hypotheses that share its cache. The random numbers of a source depend on the seed and on the
source alone, so that batches and their order change no output in fp32; elsewhere the rounding of the products does.

Shapes: B sources that still write, K samples a source, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enc2gen.generation.engine.beam import LEAVE, Hypothesis
from enc2gen.generation.engine.cache import DecoderState
from enc2gen.generation.engine.candidates import Bans, Rule, bans, without_banned
from enc2gen.generation.engine.decoder import EngineDecoder
from enc2gen.generation.engine.head import OutputHead

_NUCLEUS = 1024
"""Candidates among which the nucleus is looked for first; sorting a whole vocabulary is slow."""


@dataclass(frozen=True)
class SamplingSettings:
    """How to write without search.

    Attributes:
        max_new_tokens: longest output, the end token counted.
        end: id of the token that ends an output.
        samples: K; 1 for greedy search.
        temperature: divides the logits; 0 is greedy search, the likeliest token at each step.
        top_p: sample from the smallest set of tokens with this probability (arXiv 1904.09751); 1: from all.
        epsilon: sample no token that is less probable than this (arXiv 2210.15191), but always the likeliest; 0: off.
        rules: what must not be written.
        own_rules: for each source, what must not be written in its outputs; empty: nothing.
        scored: whether greedy search computes its outputs' log-probabilities, which costs time.
    """

    max_new_tokens: int
    end: int
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    epsilon: float = 0.0
    rules: Sequence[Rule] = ()
    own_rules: Sequence[Sequence[Rule]] = ()
    scored: bool = False


class Sampler:
    """Writes token by token, the likeliest or a random one.

    Args:
        decoder, head: of one model, on one device.
        settings: how to choose.
    """

    def __init__(self, decoder: EngineDecoder, head: OutputHead, settings: SamplingSettings) -> None:
        self._decoder, self._head, self._settings = decoder, head, settings

    def run(self, state: DecoderState, starts: Tensor, seeds: Sequence[Sequence[int]]) -> list[list[Hypothesis]]:
        """K outputs for each source, in the order in which they were drawn; scores: log-probabilities,
        0 where greedy search is not `scored`.

        Args:
            state: of `EngineDecoder.start`; used up.
            starts: `[B]`, the token that each output starts from.
            seeds: for each source, the numbers that seed its samples.
        """
        settings = self._settings
        sources, device = len(starts), starts.device
        uniform = _uniform(seeds, settings).to(device)  # [B, K, L]
        rows = torch.arange(sources, device=device)
        sequences = starts[:, None, None].expand(-1, settings.samples, 1)
        scores = torch.zeros(sources, settings.samples, device=device)
        over = torch.zeros_like(scores, dtype=torch.bool)
        found: list[list[Hypothesis]] = [[] for _ in starts]
        for length in range(settings.max_new_tokens):
            states = self._states(state, sequences, first=length == 0)
            tokens, log_probabilities = self._choose(states, sequences, rows, uniform[rows, :, length])
            tokens = torch.where(over, settings.end, tokens)
            scores = scores + log_probabilities.masked_fill(over, 0.0)
            sequences = torch.cat([sequences, tokens[..., None]], dim=2)
            over = over | (tokens == settings.end)
            going = ~over.all(dim=1)
            count = 0 if length == settings.max_new_tokens - 1 else int(going.sum())
            if count == 0 or count <= LEAVE * len(going):
                kept = going.nonzero()[:, 0] if count else rows[:0]
                left = (~going).nonzero()[:, 0] if count else torch.arange(len(rows))
                for index in left.tolist():
                    found[int(rows[index])] = _hypotheses(sequences[index], scores[index], settings.end)
                if not count:
                    break
                state.select(kept)
                rows, sequences, scores, over = rows[kept], sequences[kept], scores[kept], over[kept]
        return found

    def _states(self, state: DecoderState, sequences: Tensor, *, first: bool) -> Tensor:
        """States that predict the next tokens, `[B, K, H]`; the first step is done once for all samples."""
        tokens = sequences[:, :1, -1:] if first else sequences[:, :, -1:]
        states = self._decoder.step(state, tokens)[0][:, :, 0]
        if first:
            state.expand(self._settings.samples)
            states = states.expand(-1, self._settings.samples, -1)
        return states

    def _choose(self, states: Tensor, sequences: Tensor, rows: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens and their log-probabilities, `[B, K]` each."""
        settings, shape = self._settings, states.shape[:2]
        flat = states.reshape(-1, states.shape[2])
        own = [settings.own_rules[row] for row in rows.tolist()] if settings.own_rules else ()
        banned = bans(settings.rules, sequences.flatten(0, 1), own)
        if settings.temperature == 0:
            tokens, scores = likeliest(self._head, flat, banned, scored=settings.scored)
            return tokens.view(shape), scores.view(shape)
        logits = self._head.logits(flat)
        columns = self._head.columns(banned) if banned else []
        for row, ids in enumerate(columns):
            logits[row, ids] = -torch.inf
        full = torch.log_softmax(logits, dim=1)
        drawn = draw(logits / settings.temperature, uniform.flatten(), settings.top_p, settings.epsilon)
        scores = full.gather(1, drawn[:, None])[:, 0]
        return self._head.ids(drawn).view(shape), scores.view(shape)


def likeliest(head: OutputHead, states: Tensor, banned: Bans | None, *, scored: bool) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row of `states` `[R, H]` that is not banned, and its log-probability.

    Log-probabilities are 0 where they are not asked for (`scored`): they cost a pass over the vocabulary.
    """
    most = max(map(len, banned)) if banned else 0
    if not most and not scored:
        return head.likeliest(states), torch.zeros(len(states), device=states.device)
    top = head.top(states, 1 + most)
    values, places = without_banned(top.log_probabilities, top.tokens, banned).max(dim=1, keepdim=True)
    return top.tokens.gather(1, places)[:, 0], values[:, 0] if scored else torch.zeros_like(values[:, 0])


def draw(logits: Tensor, uniform: Tensor, top_p: float, epsilon: float = 0.0) -> Tensor:
    """One column of each row, by inverting the distribution function at `uniform` `[rows]` in [0, 1).

    With `top_p` < 1, only the smallest set of columns whose probability reaches it can be drawn, the likeliest first.
    Columns whose probability is below `epsilon` cannot be drawn either, unless it is the largest.

    Args:
        logits: `[rows, V]`.
    """
    probabilities = torch.softmax(logits.double(), dim=1)
    if epsilon:
        least = probabilities.amax(dim=1, keepdim=True).clamp_max(epsilon)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if top_p < 1:
        count = min(_NUCLEUS, probabilities.shape[1])
        values, columns = probabilities.topk(count, dim=1)
        if bool((values.sum(dim=1) < top_p).any()):
            values, columns = probabilities.sort(dim=1, descending=True)
        before = values.cumsum(dim=1) - values
        probabilities = values.masked_fill(before >= top_p, 0.0)
    else:
        columns = torch.arange(probabilities.shape[1], device=logits.device).expand_as(probabilities)
    sums = probabilities.cumsum(dim=1)
    place = torch.searchsorted(sums, uniform.double()[:, None] * sums[:, -1:], right=True)
    last = (probabilities > 0).long().mul(torch.arange(1, sums.shape[1] + 1, device=sums.device)).amax(1, True) - 1
    return columns.gather(1, torch.minimum(place, last))[:, 0]


def _uniform(seeds: Sequence[Sequence[int]], settings: SamplingSettings) -> Tensor:
    """Random numbers in [0, 1) for every source, sample and step, `[B, K, L]`."""
    shape = (settings.samples, settings.max_new_tokens)
    if settings.temperature == 0:
        return torch.zeros(len(seeds), *shape)
    return torch.tensor(np.stack([np.random.default_rng(list(seed)).random(shape) for seed in seeds]))


def _hypotheses(sequences: Tensor, scores: Tensor, end: int) -> list[Hypothesis]:
    found = []
    for row, score in zip(sequences[:, 1:].tolist(), scores.tolist(), strict=True):
        length = row.index(end) if end in row else len(row)
        found.append(Hypothesis(tuple(row[:length]), score, ended=end in row))
    return found
