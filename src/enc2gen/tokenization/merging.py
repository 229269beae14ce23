"""Byte-pair encoding continued: further merges on top of an existing segmentation.

Sennrich et al. 2016, arXiv 1508.07909, algorithm 1, with the counts kept up to date from merge to merge.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_DEAD = -1  # a position whose piece became part of the piece on its left
_END = -2  # between words
_NEVER = 1 << 62  # rank of a pair without a merge
_COMPACT_BELOW = 0.6  # share of live positions below which the arrays are rewritten


@dataclass(frozen=True)
class Merge:
    """Two neighbouring pieces that become one; `is_new` if the vocabulary did not have it before."""

    left: str
    right: str
    joined: str
    is_new: bool


class MergeLearner:
    """Learns merges on segmented words.

    Merges that the tokenizer has already (`ranks`) are applied, in their order, whenever a new merge makes
    one possible: so the learner splits its words exactly as the extended tokenizer will.

    Args:
        words: segmented word -> count.
        ranks: merges of the tokenizer, with their place in the order.
        known: pieces of the vocabulary.
        barred: pieces that take part in no merge: unknown, bytes.
        forbidden: texts that no merge may make: control tokens.
        join: the piece that two pieces make (drops "##" in WordPiece).
        length: length of a piece in characters.
        max_length: longest new piece in characters.
        duplicates: whether a merge may make a piece that exists, which BPE needs and WordPiece does not.
    """

    def __init__(
        self,
        words: Mapping[tuple[str, ...], int],
        *,
        ranks: Mapping[tuple[str, str], int],
        known: Collection[str],
        barred: Collection[str] = (),
        forbidden: Collection[str] = (),
        join: Callable[[str, str], str] = str.__add__,
        length: Callable[[str], int] = len,
        max_length: int,
        duplicates: bool = True,
    ) -> None:
        self._names: list[str] = []
        self._ids: dict[str, int] = {}
        self._barred, self._forbidden = set(barred), set(forbidden)
        self._known, self._ranks = set(known), dict(ranks)
        self._join, self._length, self._max_length = join, length, max_length
        self._duplicates = duplicates
        self._lay_out(words)
        self._pairs: Counter[tuple[int, int]] = Counter()
        self._heap: list[tuple[int, int, str, str]] = []
        live = np.arange(len(self._pieces) - 1)
        self._count(self._pieces[live], self._pieces[live + 1], self._weights[live])

    def _lay_out(self, words: Mapping[tuple[str, ...], int]) -> None:
        flat: list[int] = [_END]
        weights: list[int] = [0]
        for word, count in sorted(words.items()):
            if len(word) > 1:
                flat.extend(_END if piece in self._barred else self._id(piece) for piece in word)
                flat.append(_END)
                weights.extend([count] * len(word))
                weights.append(0)
        self._pieces: NDArray[np.int32] = np.array(flat, dtype=np.int32)
        self._weights: NDArray[np.int64] = np.array(weights, dtype=np.int64)
        self._link()

    def _link(self) -> None:
        self._left = np.arange(-1, len(self._pieces) - 1)
        self._right = np.arange(1, len(self._pieces) + 1)
        self._live = len(self._pieces)

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._names)
            self._names.append(piece)
        return self._ids[piece]

    def learn(self, new_pieces: int) -> list[Merge]:
        """Merges that make `new_pieces` new pieces, fewer if no pair that occurs twice is left."""
        merges: list[Merge] = []
        made = 0
        while made < new_pieces and self._heap:
            fresh, priority, left, right = heapq.heappop(self._heap)
            pair = self._ids[left], self._ids[right]
            existing = (left, right) in self._ranks
            count = self._pairs.get(pair, 0)
            if count <= 0 or (fresh and (existing or count != -priority)):
                continue  # counted again since
            joined = self._join(left, right)
            if not existing:
                is_new = joined not in self._known
                merges.append(Merge(left, right, joined, is_new))
                made += is_new
                self._known.add(joined)
                self._ranks[left, right] = len(self._ranks)
            self._apply(*pair, self._id(joined))
        return merges

    def _apply(self, left: int, right: int, joined: int) -> None:
        """Replace the pair everywhere, from left to right, and count the pairs that come and go."""
        first = np.flatnonzero(self._pieces == left)
        first = first[self._pieces[self._right[first]] == right]
        second = self._right[first]
        if left == right and len(first) > 1:
            first = _without_overlaps(first, second)
            second = self._right[first]
        before, after = self._left[first], self._right[second]
        weights = self._weights[first]
        old_left, old_right = self._pieces[before], self._pieces[after]
        self._pieces[first], self._pieces[second] = joined, _DEAD
        self._right[first], self._left[after] = after, first
        # Neighbours that were merged as well are seen as they are now; their old pairs ended here too.
        follows = np.isin(before, second)
        self._count(old_left[~follows], np.full((~follows).sum(), left), -weights[~follows])
        precedes = np.isin(after, first)
        self._count(np.full(len(first), right), old_right, -weights)
        self._count(self._pieces[self._left[first]], np.full(len(first), joined), weights)
        self._count(np.full((~precedes).sum(), joined), old_right[~precedes], weights[~precedes])
        self._pairs.pop((left, right), None)
        self._live -= len(first)
        if self._live < _COMPACT_BELOW * len(self._pieces):
            kept = self._pieces != _DEAD
            self._pieces, self._weights = self._pieces[kept], self._weights[kept]
            self._link()

    def _count(self, left: NDArray[np.int32], right: NDArray[np.int32], weights: NDArray[np.int64]) -> None:
        """Add `weights` to the counts of the pairs and queue those that may be merged."""
        real = (left >= 0) & (right >= 0) & (weights != 0)
        codes = (left[real].astype(np.int64) << 32) | right[real]
        unique, where = np.unique(codes, return_inverse=True)
        sums = np.bincount(where, weights=weights[real], minlength=len(unique))
        for code, change in zip(unique.tolist(), sums.tolist(), strict=True):
            if not change:
                continue
            pair = code >> 32, code & 0xFFFFFFFF
            count = self._pairs[pair] + int(change)
            self._pairs[pair] = count
            if count > 0:
                self._queue(pair, count)

    def _queue(self, pair: tuple[int, int], count: int) -> None:
        left, right = self._names[pair[0]], self._names[pair[1]]
        if (rank := self._ranks.get((left, right))) is not None:
            heapq.heappush(self._heap, (0, rank, left, right))
        elif count > 1:
            joined = self._join(left, right)
            allowed = joined not in self._forbidden and (self._duplicates or joined not in self._known)
            if allowed and self._length(joined) <= self._max_length:
                heapq.heappush(self._heap, (1, -count, left, right))


def _without_overlaps(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of the pairs "aa" at `first`, those that left-to-right merging takes: not those begun inside another."""
    taken: set[int] = set()
    chosen = []
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        if i not in taken:
            chosen.append(i)
            taken.add(j)
    return np.array(chosen, dtype=first.dtype)


class MergeParts:
    """What each piece of a byte-pair vocabulary is made of.

    The merges within a piece are the same wherever it occurs: a merge across its edge would have made another
    piece. So keeping the pieces of a text, all that they are made of, and any merges whose three pieces are
    kept leaves the text's segmentation as it is.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        self._vocabulary = vocabulary
        self._ranks: dict[tuple[str, str], int] = {}
        for rank, pair in enumerate(merges):
            self._ranks[pair] = rank

    def of(self, piece: str) -> set[int]:
        """Ids of `piece` and of every piece that is made on the way to it."""
        symbols = list(piece)
        found = {piece, *symbols}
        while len(symbols) > 1:
            pairs = pairwise(symbols)
            rank, at = min((self._ranks.get(pair, _NEVER), i) for i, pair in enumerate(pairs))
            if rank == _NEVER:
                break  # taken whole (`ignore_merges`), or never reached
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            found.add(symbols[at])
        return {self._vocabulary[part] for part in found if part in self._vocabulary}
