"""Phrases that an output must contain, and how far a hypothesis is with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

Progress = tuple[tuple[int, ...] | None, ...]
"""For each phrase, the tokens of it that have just been written; None once it is complete."""


@dataclass(frozen=True)
class Phrase:
    """One phrase in one or several tokenisations, any of which will do.

    Attributes:
        spellings: token ids of each tokenisation.
    """

    spellings: tuple[tuple[int, ...], ...]

    @cached_property
    def prefixes(self) -> frozenset[tuple[int, ...]]:
        """All beginnings of the spellings, the empty one too."""
        return frozenset(spelling[:end] for spelling in self.spellings for end in range(len(spelling)))

    @property
    def length(self) -> int:
        """Tokens of the longest spelling."""
        return max(map(len, self.spellings))

    def after(self, written: tuple[int, ...] | None, token: int) -> tuple[int, ...] | None:
        """Progress when `token` follows. A broken phrase restarts, from what of it was written last."""
        if written is None:
            return None
        now = (*written, token)
        ends = {now[start:] for start in range(len(now))}
        if any(spelling in ends for spelling in self.spellings):
            return None
        return next(now[start:] for start in range(len(now) + 1) if now[start:] in self.prefixes)

    def wanted(self, written: tuple[int, ...] | None) -> set[int]:
        """Tokens that bring the phrase further."""
        if written is None:
            return set()
        begun = len(written)
        return {spelling[begun] for spelling in self.spellings if spelling[:begun] == written}


class Requirements:
    """All phrases that one output must contain.

    Args:
        phrases: equal ones count once.
    """

    def __init__(self, phrases: Sequence[Phrase] = ()) -> None:
        self.phrases = tuple(dict.fromkeys(phrases))
        self.total = sum(phrase.length for phrase in self.phrases)

    def start(self) -> Progress:
        """Nothing written yet."""
        return tuple(() for _ in self.phrases)

    def after(self, progress: Progress, token: int) -> Progress:
        """Progress when `token` follows."""
        return tuple(phrase.after(one, token) for phrase, one in zip(self.phrases, progress, strict=True))

    def of(self, tokens: Sequence[int]) -> Progress:
        """Progress of a whole output."""
        progress = self.start()
        for token in tokens:
            progress = self.after(progress, token)
        return progress

    def wanted(self, progress: Progress) -> set[int]:
        """Tokens that bring any phrase further."""
        pairs = zip(self.phrases, progress, strict=True)
        return set().union(*(phrase.wanted(one) for phrase, one in pairs))

    def met(self, progress: Progress) -> int:
        """Tokens of the phrases that are written: the bank of a hypothesis (arXiv 1804.06609, section 4)."""
        pairs = zip(self.phrases, progress, strict=True)
        return sum(phrase.length if one is None else len(one) for phrase, one in pairs)


def allocate(available: Sequence[int], beams: int) -> list[int]:
    """Beams of each bank: equal shares, the rest to the last bank; what a bank cannot fill goes to the fullest ones.

    Args:
        available: candidates in each bank, by tokens met.
        beams: to be shared out (arXiv 1804.06609, section 4.2).
    """
    share = beams // len(available)
    wanted = [share] * (len(available) - 1) + [beams - share * (len(available) - 1)]
    given = [min(one, there) for one, there in zip(wanted, available, strict=True)]
    for bank in reversed(range(len(given))):
        given[bank] += min(available[bank] - given[bank], beams - sum(given))
    return given
