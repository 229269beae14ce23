"""Diverse beam search (arXiv 1610.02424): groups of beams, each pushed away from what earlier groups just wrote.

In a step, the groups choose one after the other; a candidate's rank is its score less lambda for every beam of an
earlier group that writes the same token in this step (Hamming diversity, equation 4 and section 4.1). A group that is
over writes nothing any more. The penalty ranks and is not added up, so that a score is a log-probability as in plain
beam search.

Shapes: B sources that are still searched, K beams in G groups, S source length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from enc2gen.generation.engine.beam import LEAVE, Beams, BeamSearch, BeamSettings, Hypothesis
from enc2gen.generation.engine.cache import DecoderState
from enc2gen.generation.engine.decoder import EngineDecoder
from enc2gen.generation.engine.head import OutputHead

_NOTHING = -1
"""Written by a group that is over, whose beams only go on because other groups of its source do."""


class DiverseBeamSearch(BeamSearch):
    """Searches probable outputs that differ from each other.

    Args:
        decoder, head: of one model, on one device.
        settings: of the search; `num_beams` are those of all groups together.
        groups: G, which divides `num_beams`.
        penalty: lambda, in nats.
    """

    def __init__(
        self, decoder: EngineDecoder, head: OutputHead, settings: BeamSettings, *, groups: int, penalty: float
    ) -> None:
        super().__init__(decoder, head, replace(settings, num_beams=settings.num_beams // groups))
        self._groups, self._penalty = groups, penalty
        self._spare = settings.num_beams  # the penalty may put back so many candidates

    def run(self, state: DecoderState, starts: Tensor) -> list[list[Hypothesis]]:
        """Hypotheses of each source, different ones: the best of each group, then the second ones, and so on.

        Args:
            state: of `EngineDecoder.start`; used up.
            starts: `[B]`, the token that each output starts from.
        """
        settings = self._settings
        each = [Beams.start(starts, settings, settings.end) for _ in range(self._groups)]
        found: list[list[Hypothesis]] = [[] for _ in starts]
        for length in range(1, settings.max_new_tokens + 1):
            together = replace(each[0], sequences=torch.cat([beams.sequences for beams in each], dim=1))
            width = 1 if length == 1 else len(each) * settings.num_beams
            values, candidates, seen = self._candidates(state, together.sequences[:, :width, -1:], together)
            if length == 1:
                state.expand(len(each) * settings.num_beams)
            parents = self._advance_groups(each, values, candidates, seen, length)
            if not self._hand_out(each, state, found, parents, last=length == settings.max_new_tokens):
                break
        return found

    def _advance_groups(
        self, each: list[Beams], values: Tensor, candidates: Tensor, seen: Tensor | None, length: int
    ) -> Tensor:
        """Let one group after the other choose; returns the beams that are continued, `[B, K]`."""
        size, parents = self._settings.num_beams, []
        written = candidates.new_empty(len(candidates), 0)
        for group, beams in enumerate(each):
            own = slice(0, 1) if length == 1 else slice(group * size, (group + 1) * size)
            offered = candidates[:, own].expand(-1, size, -1)
            same = (offered[..., None] == written[:, None, None]).sum(dim=3)
            chosen = self._advance(
                beams,
                values[:, own].expand(-1, size, -1),
                offered,
                None if seen is None else seen[:, own],
                length,
                same * self._penalty,
            )
            parents.append(chosen + group * size)
            ids = beams.sequences[:, :, -1].masked_fill(~beams.open[:, None], _NOTHING)
            written = torch.cat([written, ids], dim=1)
        return torch.cat(parents, dim=1)

    def _hand_out(
        self, each: list[Beams], state: DecoderState, found: list[list[Hypothesis]], parents: Tensor, *, last: bool
    ) -> bool:
        """Hand out the sources in which all groups are over, and let them leave; whether any are left."""
        going = torch.stack([beams.open for beams in each]).any(dim=0) & (not last)
        count = int(going.sum())
        if count and count > LEAVE * len(going):
            state.reorder(parents)
            return True
        for index in (~going).nonzero()[:, 0].tolist():
            ranked = [self._hypotheses(beams, index) for beams in each]
            found[int(each[0].rows[index])] = list(_in_turn(ranked))
        if not count:
            return False
        kept = going.nonzero()[:, 0]
        for beams in each:
            beams.select(kept)
        state.select(kept)
        state.reorder(parents[kept])
        return True


def _in_turn(groups: list[list[Hypothesis]]) -> Iterator[Hypothesis]:
    """The best of every group, the best of these first, then the second ones; each text once."""
    seen: set[tuple[int, ...]] = set()
    for place in range(max(map(len, groups))):
        for one in sorted((group[place] for group in groups if place < len(group)), key=lambda one: -one.score):
            if one.tokens not in seen:
                seen.add(one.tokens)
                yield one
