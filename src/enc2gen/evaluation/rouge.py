"""ROUGE-1, ROUGE-2 and ROUGE-L in every script (Lin 2004, W04-1013).

Units come from :func:`enc2gen.evaluation.segmentation.segment`; there is no stemming and no stop-word list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from enc2gen.errors import ConfigError, DataError
from enc2gen.evaluation.segmentation import segment

RougeVariant = Literal["rouge-1", "rouge-2", "rouge-l"]


@dataclass(frozen=True)
class RougeScore:
    """Precision, recall and their harmonic mean for one hypothesis and its best reference, each 0-100."""

    precision: float
    recall: float
    f1: float


def overlap(matches: int, hypothesis_total: int, reference_total: int) -> RougeScore:
    """Precision, recall and F1 of `matches` units; all are 0 where nothing matches or a side is empty."""
    if matches == 0:
        return RougeScore(0.0, 0.0, 0.0)
    return RougeScore(
        precision=100.0 * matches / hypothesis_total,
        recall=100.0 * matches / reference_total,
        f1=200.0 * matches / (hypothesis_total + reference_total),
    )


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel (Hyyrö 2004, "Bit-Parallel LCS-length Computation Revisited"): one column of the O(nm) table
    is one integer, so a pair of 200-unit texts takes 200 integer operations.
    """
    positions: dict[str, int] = {}
    for index, unit in enumerate(first):
        positions[unit] = positions.get(unit, 0) | (1 << index)
    column = full = (1 << len(first)) - 1  # a zero bit is a row where the LCS length grows by one
    for unit in second:
        matched = column & positions.get(unit, 0)
        column = ((column + matched) | (column - matched)) & full
    return len(first) - column.bit_count()


def _ngrams(units: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(units[start : start + order]) for start in range(len(units) - order + 1))


def rouge_units(hypothesis: Sequence[str], reference: Sequence[str], variant: RougeVariant) -> RougeScore:
    """ROUGE of two unit sequences. ROUGE-2 of a text of one unit is 0, for it has no bigram."""
    if variant == "rouge-l":
        return overlap(lcs_length(hypothesis, reference), len(hypothesis), len(reference))
    order = int(variant[-1])
    found, wanted = _ngrams(hypothesis, order), _ngrams(reference, order)
    return overlap((found & wanted).total(), found.total(), wanted.total())


def rouge(
    hypothesis: str,
    references: Sequence[str],
    variant: RougeVariant = "rouge-l",
    *,
    language: str | None = None,
) -> RougeScore:
    """ROUGE of one text against the reference with the best F1.

    Raises:
        ConfigError: unknown variant.
        DataError: no reference, or one string in place of a list of references.
    """
    if variant not in get_args(RougeVariant):
        raise ConfigError(
            f"unknown ROUGE variant {variant!r}", remedy=f"choose one of {', '.join(get_args(RougeVariant))}"
        )
    if isinstance(references, str) or not references:
        raise DataError("references must be a non-empty list of strings", remedy="wrap a single reference in a list")
    units = segment(hypothesis, language)
    scores = [rouge_units(units, segment(reference, language), variant) for reference in references]
    return max(scores, key=lambda score: score.f1)
