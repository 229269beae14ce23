"""Greedy search with prompt-lookup drafts: several tokens a step where the output copies what is there already.

A draft is what follows, in the source or in the output so far, the longest passage that the output ends with. One call
of the decoder reads it whole, and it is accepted as far as it is what greedy search would have written; so outputs are
those of greedy search. Speculative decoding is arXiv 2211.17192; drafts by look-up, arXiv 2304.04487.

Shapes: B sources that still write, T tokens a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from enc2gen.generation.engine.beam import LEAVE, Hypothesis
from enc2gen.generation.engine.cache import DecoderState
from enc2gen.generation.engine.candidates import bans_after
from enc2gen.generation.engine.decoder import EngineDecoder
from enc2gen.generation.engine.head import OutputHead
from enc2gen.generation.engine.sampling import SamplingSettings, likeliest

_LONGEST = 4
"""Tokens at the end of the output that are looked for."""


def draft(output: Sequence[int], source: Sequence[int], count: int) -> list[int]:
    """At most `count` tokens that may follow `output`; none where nothing was found."""
    for size in range(min(_LONGEST, len(output)), 0, -1):
        tail = list(output[-size:])
        for text in (source, output):
            for start in range(len(text) - size):
                if list(text[start : start + size]) == tail:
                    return list(text[start + size : start + size + count])
    return []


class DraftedGreedySearch:
    """Writes the likeliest token at each step, several at once where a draft is right.

    Args:
        decoder, head: of one model, on one device.
        settings: of greedy search: no temperature, one sample.
        draft_tokens: most tokens of a draft.
    """

    def __init__(
        self, decoder: EngineDecoder, head: OutputHead, settings: SamplingSettings, *, draft_tokens: int
    ) -> None:
        self._decoder, self._head, self._settings, self._count = decoder, head, settings, draft_tokens

    def run(self, state: DecoderState, starts: Tensor, sources: Sequence[Sequence[int]]) -> list[list[Hypothesis]]:
        """One output for each source.

        Args:
            state: of `EngineDecoder.start`; used up.
            starts: `[B]`, the token that each output starts from.
            sources: token ids of each source.
        """
        settings = self._settings
        written = [_Written([int(start)], list(source)) for start, source in zip(starts, sources, strict=True)]
        active = list(range(len(written)))
        while going := [row for row in active if not written[row].over(settings)]:
            if len(going) <= LEAVE * len(active):
                state.select(torch.tensor([active.index(row) for row in going], device=starts.device))
                active = going
            self._step(state, active, [written[row] for row in active])
        return [[one.hypothesis(settings.end)] for one in written]

    def _step(self, state: DecoderState, rows: Sequence[int], texts: Sequence[_Written]) -> None:
        """Read the last token and a draft of each text, and append what greedy search writes behind them."""
        settings, device = self._settings, state.lengths.device
        room = min(self._count, self._decoder.longest - int(state.lengths.max()) - 1)
        over = [text.over(settings) for text in texts]
        drafts = [
            [] if done else draft(text.tokens[1:], text.source, room) for text, done in zip(texts, over, strict=True)
        ]
        width = 1 + max(map(len, drafts))
        read = [
            [text.tokens[-1], *guess, *[settings.end] * (width - 1 - len(guess))]
            for text, guess in zip(texts, drafts, strict=True)
        ]
        states = self._decoder.step(state, torch.tensor(read, device=device)[:, None])[0]
        tokens, values = self._likeliest(states.flatten(0, 2), rows, texts, read)
        taken = []
        for index, (text, guess, done) in enumerate(zip(texts, drafts, over, strict=True)):
            own = slice(index * width, index * width + len(guess) + 1)
            taken.append(0 if done else text.extend(tokens[own], values[own], guess, settings))
        state.forget(width - torch.tensor(taken, device=device))

    def _likeliest(
        self, states: Tensor, rows: Sequence[int], texts: Sequence[_Written], read: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[float]]:
        """The token that follows each token of `read`, and its log-probability (see :func:`likeliest`)."""
        settings, banned = self._settings, None
        if settings.rules or settings.own_rules:
            before = [
                text.tokens + list(tokens[1:end])
                for text, tokens in zip(texts, read, strict=True)
                for end in range(1, len(tokens) + 1)
            ]
            own = [settings.own_rules[row] for row in rows] if settings.own_rules else ()
            banned = bans_after(settings.rules, before, own)
        found, values = likeliest(self._head, states, banned, scored=settings.scored)
        return found.tolist(), values.tolist()


@dataclass
class _Written:
    """One output so far: its tokens, the start included, and their log-probability."""

    tokens: list[int]
    source: list[int]
    score: float = 0.0

    def over(self, settings: SamplingSettings) -> bool:
        ended = len(self.tokens) > 1 and self.tokens[-1] == settings.end
        return ended or len(self.tokens) > settings.max_new_tokens

    def extend(
        self, tokens: Sequence[int], values: Sequence[float], guess: Sequence[int], settings: SamplingSettings
    ) -> int:
        """Append what follows, up to the first token that the draft has wrong; how many tokens that is."""
        for count, (token, value) in enumerate(zip(tokens, values, strict=True), start=1):
            self.tokens.append(token)
            self.score += value
            if self.over(settings) or count > len(guess) or token != guess[count - 1]:
                break
        return count

    def hypothesis(self, end: int) -> Hypothesis:
        ended = len(self.tokens) > 1 and self.tokens[-1] == end
        return Hypothesis(tuple(self.tokens[1 : -1 if ended else None]), self.score, ended)
