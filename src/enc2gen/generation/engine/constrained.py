"""Lexically constrained beam search with dynamic beam allocation (arXiv 1804.06609).

Hypotheses are kept in banks by the number of constraint tokens they have met, and the beams are shared out over the
banks. Candidates are the likeliest tokens of all beams, the likeliest of each beam, and the tokens that bring a phrase
further. A hypothesis may end when it has met everything. Without constraints the result is that of plain beam search.

Shapes: B sources that are still searched, K beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest

import torch
from torch import Tensor

from enc2gen.generation.engine.beam import LEAVE, BeamSettings, Hypothesis
from enc2gen.generation.engine.cache import DecoderState
from enc2gen.generation.engine.candidates import bans_after
from enc2gen.generation.engine.constraints import Progress, Requirements, allocate
from enc2gen.generation.engine.decoder import EngineDecoder
from enc2gen.generation.engine.head import OutputHead

Offers = list[dict[int, float]]
"""For each beam, tokens that may follow it and their log-probabilities."""


@dataclass(frozen=True)
class _Beam:
    tokens: tuple[int, ...]  # the start included
    score: float
    progress: Progress


@dataclass(frozen=True)
class _Candidate:
    parent: int
    token: int
    score: float
    progress: Progress
    met: int


class _Source:
    """The search for one source."""

    def __init__(self, start: int, requirements: Requirements, settings: BeamSettings) -> None:
        self.requirements, self._settings = requirements, settings
        self.beams = [_Beam((start,), 0.0, requirements.start())]
        self.finished: list[tuple[int, Hypothesis]] = []
        self.open = True

    def advance(self, offers: Offers, length: int) -> list[int]:
        """Choose the next beams, note what has finished; returns the beams that are continued."""
        settings, total = self._settings, self.requirements.total
        last = length == settings.max_new_tokens
        candidates = self._candidates(offers)
        complete = [one for one in candidates if one.met == total]
        over = [one for one in complete[: settings.num_beams] if last or one.token == settings.end]
        if last and not over and not self.finished:  # nothing meets all
            over = sorted(candidates, key=lambda one: -one.met)[: settings.num_beams]
        if self.open:
            self._finish(over, length)
        going = [one for one in candidates if one.token != settings.end]
        banks: list[list[_Candidate]] = [[] for _ in range(total + 1)]
        for one in going:
            banks[one.met].append(one)
        shares = allocate([len(bank) for bank in banks], settings.num_beams)
        chosen = [one for bank, share in zip(banks, shares, strict=True) for one in bank[:share]]
        self.beams = [_Beam((*self.beams[o.parent].tokens, o.token), o.score, o.progress) for o in chosen]
        self._close(length)
        return [one.parent for one in chosen]

    def _candidates(self, offers: Offers) -> list[_Candidate]:
        """The likeliest of all beams, of each beam, and what brings phrases further; the likeliest first."""
        count = 2 * self._settings.num_beams
        scored = [
            (self.beams[parent].score + value, parent, token)
            for parent, offered in enumerate(offers)
            for token, value in offered.items()
        ]
        kept = set(nlargest(count, scored, key=lambda one: one[0]))
        for parent, offered in enumerate(offers):
            beam, wanted = self.beams[parent], self.requirements.wanted(self.beams[parent].progress)
            best = max(offered, key=lambda token: offered[token], default=None)
            for token in wanted & offered.keys() | ({best} if best is not None else set()):
                kept.add((beam.score + offered[token], parent, token))
        found = []
        for score, parent, token in sorted(kept, key=lambda one: -one[0]):
            progress = self.requirements.after(self.beams[parent].progress, token)
            found.append(_Candidate(parent, token, score, progress, self.requirements.met(progress)))
        return found

    def _finish(self, over: Sequence[_Candidate], length: int) -> None:
        settings = self._settings
        for one in over:
            tokens = (*self.beams[one.parent].tokens[1:], one.token)
            ended = one.token == settings.end
            score = one.score / length**settings.length_penalty
            self.finished.append((one.met, Hypothesis(tokens[:-1] if ended else tokens, score, ended)))
        self.finished.sort(key=lambda one: (-one[0], -one[1].score))
        del self.finished[settings.num_beams :]

    def _close(self, length: int) -> None:
        settings = self._settings
        complete = [one.score for met, one in self.finished if met == self.requirements.total]
        if not self.beams:
            self.open = False
        if len(complete) < settings.num_beams or not self.open:
            return
        longest = settings.early_stopping == "never" and settings.length_penalty > 0
        reach = settings.max_new_tokens if longest else length
        possible = max(beam.score for beam in self.beams) / reach**settings.length_penalty
        self.open = settings.early_stopping is not True and possible > min(complete)


class ConstrainedBeamSearch:
    """Searches probable outputs that contain given phrases.

    Args:
        decoder, head: of one model, on one device.
        settings: of the search, without coverage penalty.
    """

    def __init__(self, decoder: EngineDecoder, head: OutputHead, settings: BeamSettings) -> None:
        self._decoder, self._head, self._settings = decoder, head, settings

    def run(self, state: DecoderState, starts: Tensor, requirements: Sequence[Requirements]) -> list[list[Hypothesis]]:
        """At most K hypotheses for each source, the best first; where none meets all, those that meet most first.

        Args:
            state: of `EngineDecoder.start`; used up.
            starts: `[B]`, the token that each output starts from.
            requirements: of each source.
        """
        settings = self._settings
        pairs = zip(starts.tolist(), requirements, strict=True)
        sources = [_Source(start, wanted, settings) for start, wanted in pairs]
        active = list(range(len(sources)))
        for length in range(1, settings.max_new_tokens + 1):
            beams = 1 if length == 1 else settings.num_beams
            offers = self._offers(state, [sources[row] for row in active], active, beams, starts.device)
            if length == 1:
                state.expand(settings.num_beams)
            chosen = [sources[row].advance(offered, length) for row, offered in zip(active, offers, strict=True)]
            going = [place for place, row in enumerate(active) if sources[row].open]
            if not going or length == settings.max_new_tokens:
                break
            parents = [each + [0] * (settings.num_beams - len(each)) for each in chosen]
            if len(going) <= LEAVE * len(active):
                state.select(torch.tensor(going, device=starts.device))
                active, parents = [active[place] for place in going], [parents[place] for place in going]
            state.reorder(torch.tensor(parents, device=starts.device))
        return [[one for _, one in source.finished] for source in sources]

    def _offers(
        self, state: DecoderState, sources: Sequence[_Source], rows: Sequence[int], beams: int, device: torch.device
    ) -> list[Offers]:
        """What may follow each beam of each source; beams that are missing are filled up for the decoder."""
        settings = self._settings
        texts = [list(b.tokens) for s in sources for b in (s.beams + [s.beams[0]] * (beams - len(s.beams)))]
        tokens = torch.tensor([text[-1] for text in texts], device=device).view(len(sources), beams, 1)
        states = self._decoder.step(state, tokens)[0].flatten(0, 2)
        own = [settings.own_rules[row] for row in rows] if settings.own_rules else ()
        banned = bans_after(settings.rules, texts, own)
        wanted = [
            s.requirements.wanted(b.progress)
            for s in sources
            for b in (s.beams + [s.beams[0]] * (beams - len(s.beams)))
        ]
        top = self._head.top(states, 2 * settings.num_beams + max(map(len, banned)))
        offers: Offers = [
            dict(zip(ids, values, strict=True))
            for ids, values in zip(top.tokens.tolist(), top.log_probabilities.tolist(), strict=True)
        ]
        self._add(offers, states, wanted)
        found = []
        for place, source in enumerate(sources):
            own_offers = offers[place * beams : place * beams + len(source.beams)]
            for index, (beam, offered) in enumerate(zip(source.beams, own_offers, strict=True)):
                unmet = source.requirements.met(beam.progress) < source.requirements.total
                for token in banned[place * beams + index] | ({settings.end} if unmet else set()):
                    offered.pop(token, None)
            found.append(own_offers)
        return found

    def _add(self, offers: Offers, states: Tensor, wanted: Sequence[set[int]]) -> None:
        """Add the tokens that bring phrases further, with their log-probabilities."""
        width = max(map(len, wanted))
        if not width:
            return
        filled = [sorted(ids) + [self._settings.end] * (width - len(ids)) for ids in wanted]
        values = self._head.log_probabilities(states, torch.tensor(filled, device=states.device)).tolist()
        for offered, ids, own, row in zip(offers, filled, wanted, values, strict=True):
            for token, value in zip(ids, row, strict=True):
                if token in own and value > -torch.inf:
                    offered.setdefault(token, value)
