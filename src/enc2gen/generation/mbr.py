"""Minimum Bayes risk decoding: of several samples, the one that is most like the others (arXiv 2111.04800).

The utility is chrF as sacrebleu computes it for a sentence (character n-grams up to 6, beta 2, no white space). All
pairs are compared at once, on counts of n-grams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_ORDER = 6
_BETA = 2.0


def pairwise_chrf(texts: Sequence[str]) -> Floats:
    """chrF of every text (rows) against every other as its reference (columns), 0 to 100: `[N, N]`."""
    count = len(texts)
    precisions, recalls, orders = np.zeros((3, count, count))
    letters = ["".join(text.split()) for text in texts]
    for size in range(1, _ORDER + 1):
        matches, totals = _matches(letters, size)
        both = (totals[:, None] > 0) & (totals[None] > 0)
        precisions += np.where(both, matches / np.maximum(totals[:, None], 1), 0.0)
        recalls += np.where(both, matches / np.maximum(totals[None], 1), 0.0)
        orders += both
    precision, recall = precisions / np.maximum(orders, 1), recalls / np.maximum(orders, 1)
    weight = _BETA**2
    below = weight * precision + recall
    return 100 * (1 + weight) * precision * recall / np.where(below > 0, below, 1.0)


def _matches(texts: Sequence[str], size: int) -> tuple[Floats, Floats]:
    """n-grams of `size` that each two texts share, `[N, N]`, and that each has, `[N]`."""
    counted = [Counter(text[start : start + size] for start in range(len(text) - size + 1)) for text in texts]
    places = {gram: place for place, gram in enumerate(dict.fromkeys(gram for counts in counted for gram in counts))}
    table = np.zeros((len(texts), len(places)))
    for row, counts in enumerate(counted):
        for gram, number in counts.items():
            table[row, places[gram]] = number
    shared = np.stack([np.minimum(table, row).sum(axis=1) for row in table])
    return shared, table.sum(axis=1)


def rank_by_utility(samples: Sequence[str]) -> list[tuple[int, float]]:
    """Places of the different texts among `samples`, the best first, with their mean chrF against all other samples.

    A text that was drawn several times counts as often as it was drawn. Of equally good texts, the first comes first.
    """
    places: dict[str, list[int]] = {}
    for place, text in enumerate(samples):
        places.setdefault(text, []).append(place)
    weights = np.array([len(found) for found in places.values()], dtype=np.float64)
    utilities = pairwise_chrf(list(places))
    means = (utilities @ weights - np.diag(utilities)) / max(len(samples) - 1, 1)
    firsts = [found[0] for found in places.values()]
    order = sorted(range(len(firsts)), key=lambda index: (-means[index], firsts[index]))
    return [(firsts[index], float(means[index])) for index in order]
