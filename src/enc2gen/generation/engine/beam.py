"""Beam search over the engine's decoder, with the results of transformers' beam search at equal settings.

What differs is the work: beams are reordered in a mask and not in memory, the vocabulary is never written out, a source
whose search is over leaves the batch, and the first step is done for one beam.

Shapes: B sources that are still searched, K beams, L longest hypothesis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from enc2gen.generation.engine.cache import DecoderState
from enc2gen.generation.engine.candidates import Rule, bans, without_banned
from enc2gen.generation.engine.decoder import EngineDecoder
from enc2gen.generation.engine.head import OutputHead

_NEVER = -1.0e9
LEAVE = 0.8
"""Finished sources leave the batch when at most this share of it is still searched."""


@dataclass(frozen=True)
class BeamSettings:
    """How to search; names as in transformers.

    Attributes:
        num_beams: K.
        max_new_tokens: longest output, the end token counted.
        end: id of the token that ends an output.
        length_penalty: a hypothesis of n tokens scores log p / n^length_penalty.
        coverage_penalty: beta of sum_i beta log(min(1, sum_j a_ij)), added to the score of a finished hypothesis,
            with a_ij the attention of target token j to source token i (arXiv 1609.08144, equation 14); 0: none.
        early_stopping: True: stop with K finished hypotheses; False: when the best unfinished one is behind the worst
            finished one; "never": when it could not overtake it at any length.
        rules: what must not be written.
        own_rules: for each source, what must not be written in its outputs; empty: nothing.
    """

    num_beams: int
    max_new_tokens: int
    end: int
    length_penalty: float = 1.0
    coverage_penalty: float = 0.0
    early_stopping: bool | Literal["never"] = True
    rules: Sequence[Rule] = ()
    own_rules: Sequence[Sequence[Rule]] = ()


@dataclass(frozen=True)
class Hypothesis:
    """One output.

    Attributes:
        tokens: what was written, without start and end.
        score: log-probability in nats, divided by n^length_penalty, with the coverage penalty.
        ended: whether it ends with the end token; False where it was cut at the longest length.
    """

    tokens: tuple[int, ...]
    score: float
    ended: bool


@dataclass
class Beams:
    """Beams and finished hypotheses: the search of the sources still in the batch.

    Attributes:
        rows: `[B]`, place of each source in the output.
        sequences: `[B, K, t]`, start included; scores: `[B, K]`, sums of log-probabilities.
        finished, finished_scores, done: `[B, K, L]`, `[B, K]`, `[B, K]`: the best finished hypotheses.
        open: `[B]`, whether an unfinished hypothesis may still become one of the best.
        coverage: `[B, K, S]`, attention that each source token has had; None without coverage penalty.
    """

    rows: Tensor
    sequences: Tensor
    scores: Tensor
    finished: Tensor
    finished_scores: Tensor
    done: Tensor
    open: Tensor
    coverage: Tensor | None = field(default=None)

    @classmethod
    def start(cls, starts: Tensor, settings: BeamSettings, fill: int) -> Beams:
        sources, beams, device = len(starts), settings.num_beams, starts.device
        scores = torch.full((sources, beams), _NEVER, device=device)
        scores[:, 0] = 0.0  # at first all beams are equal: only one of them may go on
        finished = torch.full((sources, beams, settings.max_new_tokens), fill, device=device)
        return cls(
            rows=torch.arange(sources, device=device),
            sequences=starts[:, None, None].expand(-1, beams, 1),
            scores=scores,
            finished=finished,
            finished_scores=torch.full((sources, beams), _NEVER, device=device),
            done=torch.zeros(sources, beams, dtype=torch.bool, device=device),
            open=torch.ones(sources, dtype=torch.bool, device=device),
        )

    def select(self, kept: Tensor) -> None:
        """Keep these sources only."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[kept])


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Beams `index` `[B, n]` of `[B, K, ...]`."""
    wide = index.view(*index.shape, *[1] * (tensor.dim() - 2)).expand(*index.shape, *tensor.shape[2:])
    return tensor.gather(1, wide)


class BeamSearch:
    """Searches the most probable outputs of a batch of sources.

    Args:
        decoder, head: of one model, on one device.
        settings: of the search.
    """

    def __init__(self, decoder: EngineDecoder, head: OutputHead, settings: BeamSettings) -> None:
        self._decoder, self._head, self._settings = decoder, head, settings
        self._spare = 0

    def run(self, state: DecoderState, starts: Tensor) -> list[list[Hypothesis]]:
        """K hypotheses for each source, the best first.

        Args:
            state: of `EngineDecoder.start`; used up.
            starts: `[B]`, the token that each output starts from.
        """
        settings = self._settings
        beams = Beams.start(starts, settings, settings.end)
        found: list[list[Hypothesis]] = [[] for _ in starts]
        tokens = starts[:, None, None]
        for length in range(1, settings.max_new_tokens + 1):
            values, candidates, seen = self._candidates(state, tokens, beams)
            if length == 1:
                state.expand(settings.num_beams)
                values = values.expand(-1, settings.num_beams, -1)
                candidates = candidates.expand_as(values)
            parents = self._advance(beams, values, candidates, seen, length)
            self._publish(beams, state, found, last=length == settings.max_new_tokens, parents=parents)
            if not len(beams.rows):
                break
            tokens = beams.sequences[:, :, -1:]
        return found

    def _candidates(self, state: DecoderState, tokens: Tensor, beams: Beams) -> tuple[Tensor, Tensor, Tensor | None]:
        """The likeliest tokens after each beam: log-probabilities and ids, `[B, K, 2K]`, and attention `[B, K, S]`."""
        settings = self._settings
        rows, width, _ = tokens.shape
        states, seen = self._decoder.step(state, tokens, watch=settings.coverage_penalty != 0)
        own = [settings.own_rules[row] for row in beams.rows.tolist()] if settings.own_rules else ()
        banned = bans(settings.rules, beams.sequences[:, :width].flatten(0, 1), own)
        spare = self._spare + (max(map(len, banned)) if banned else 0)
        top = self._head.top(states.reshape(rows * width, -1), 2 * settings.num_beams + spare)
        values = without_banned(top.log_probabilities, top.tokens, banned)
        if seen is not None:  # padding counts as covered
            seen = seen[:, :, 0].masked_fill(state.source_mask[:, 0] < 0, 1.0)
        return values.view(rows, width, -1), top.tokens.view(rows, width, -1), seen

    def _advance(
        self,
        beams: Beams,
        values: Tensor,
        candidates: Tensor,
        seen: Tensor | None,
        length: int,
        penalties: Tensor | None = None,
    ) -> Tensor:
        """Choose the next beams and note what has finished; returns the beams they continue, `[B, K]`.

        Candidates are ranked by their score less `penalties`, of the shape of `values`.
        """
        settings, width = self._settings, values.shape[2]
        if seen is not None:
            seen = seen.expand(-1, settings.num_beams, -1)
            before = 0.0 if beams.coverage is None else beams.coverage[..., : seen.shape[2]]
            beams.coverage = before + seen
        totals = values + beams.scores[:, :, None]
        ranked = totals if penalties is None else totals - penalties
        ranks, places = ranked.flatten(1).topk(2 * settings.num_beams, dim=1)
        sums = ranks if penalties is None else totals.flatten(1).gather(1, places)
        parents = places // width
        tokens = candidates.flatten(1).gather(1, places)
        ended = tokens == settings.end
        over = ended | (length == settings.max_new_tokens)
        sequences = torch.cat([take(beams.sequences, parents), tokens[..., None]], dim=2)
        self._finish(beams, sequences, sums, over, parents, length)
        chosen = (ranks + ended * _NEVER).topk(settings.num_beams, dim=1).indices
        beams.sequences, beams.scores = take(sequences, chosen), sums.gather(1, chosen)
        beams.scores = beams.scores + ended.gather(1, chosen) * _NEVER
        parents = parents.gather(1, chosen)
        if beams.coverage is not None:
            beams.coverage = take(beams.coverage, parents)
        self._close(beams, length)
        return parents

    def _finish(
        self, beams: Beams, sequences: Tensor, sums: Tensor, over: Tensor, parents: Tensor, length: int
    ) -> None:
        """Merge hypotheses that end now into the finished ones; only the K best candidates can."""
        settings = self._settings
        ends = over.clone()
        ends[:, settings.num_beams :] = False
        ends &= beams.open[:, None]
        scores = sums / length**settings.length_penalty
        if beams.coverage is not None:
            covered = take(beams.coverage, parents).clamp(min=1e-9, max=1.0).log().sum(dim=2)
            scores = scores + settings.coverage_penalty * covered
        if not bool(ends.any()):
            return
        scores = torch.where(ends, scores, scores + _NEVER)
        padded = beams.finished.new_full((*scores.shape, beams.finished.shape[2]), settings.end)
        padded[:, :, :length] = sequences[:, :, 1:]
        best, order = torch.cat([beams.finished_scores, scores], dim=1).topk(settings.num_beams, dim=1)
        beams.finished_scores = best
        beams.finished = take(torch.cat([beams.finished, padded], dim=1), order)
        beams.done = torch.cat([beams.done, ends], dim=1).gather(1, order)

    def _close(self, beams: Beams, length: int) -> None:
        """Find sources whose finished hypotheses cannot become better."""
        settings = self._settings
        full = beams.done.all(dim=1)
        if settings.early_stopping is True:
            beams.open &= ~full
        longest = settings.early_stopping == "never" and settings.length_penalty > 0
        reach = settings.max_new_tokens if longest else length
        possible = beams.scores[:, 0] / reach**settings.length_penalty
        beams.open &= ~(full & (possible <= beams.finished_scores.min(dim=1).values))

    def _publish(
        self, beams: Beams, state: DecoderState, found: list[list[Hypothesis]], *, last: bool, parents: Tensor
    ) -> None:
        """Hand out what is over, and let it leave the batch."""
        going = torch.zeros_like(beams.open) if last else beams.open
        count = int(going.sum())
        if count == 0 or count <= LEAVE * len(going):
            for index in (~going).nonzero()[:, 0].tolist():
                found[int(beams.rows[index])] = self._hypotheses(beams, index)
            kept = going.nonzero()[:, 0]
            beams.select(kept)
            if count:
                state.select(kept)
                parents = parents[kept]
        if count:
            state.reorder(parents)

    def _hypotheses(self, beams: Beams, index: int) -> list[Hypothesis]:
        end, hypotheses = self._settings.end, []
        rows = beams.finished[index].tolist()
        for row, score, done in zip(
            rows, beams.finished_scores[index].tolist(), beams.done[index].tolist(), strict=True
        ):
            if done:
                length = row.index(end) if end in row else len(row)
                hypotheses.append(Hypothesis(tuple(row[:length]), score, ended=end in row))
        return hypotheses
