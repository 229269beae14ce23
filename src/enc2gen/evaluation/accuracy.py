"""Accuracy with intervals over test items and over trained models, per language, per script and on average.

Correctness is an array `[seeds, items]` of 0 and 1 (or of shares), one row for each model that was trained with
another seed; `[items]` is one model. A resample draws items and, where there are several, seeds, both with
replacement, so an interval says what other test items and other training runs would give. Draws of seeds are
stretched, because few show less than their spread (`significance.seed_shares`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from enc2gen.errors import ConfigError, DataError
from enc2gen.evaluation.significance import (
    CONFIDENCE,
    RESAMPLES,
    Floats,
    PairedDifference,
    Score,
    difference,
    interval,
    resampling_weights,
    seed_shares,
)

_ITEMS, _SEEDS = 0, 1  # what a draw is about; parts of its seed


def accuracy(correct: ArrayLike, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0) -> Score:
    """Accuracy of one test set with its interval.

    Args:
        correct: `[seeds, items]` or `[items]`, 1 where the prediction was right.

    Raises:
        DataError: no item, values outside 0 to 1, or another number of dimensions.
    """
    return macro_accuracy({"": correct}, resamples=resamples, confidence=confidence, seed=seed)


def macro_accuracy(
    correct: Mapping[str, ArrayLike],
    *,
    parallel: bool = False,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Score:
    """Mean over languages of their accuracies; every language counts the same.

    Args:
        correct: language -> `[seeds, items]` or `[items]`; the rows of all languages are the same models.
        parallel: item i is a translation of the same sentence in all languages, so the same items are drawn for all.

    Raises:
        DataError: as for :func:`accuracy`; the languages have different numbers of seeds, or, if `parallel`, items.
    """
    groups = _groups(correct, parallel)
    samples = _samples(groups, parallel, resamples, seed, system=0)
    low, high = interval(samples.clip(0.0, 100.0), confidence)
    seeds, items = len(groups[0]), sum(group.shape[1] for group in groups)
    signature = f"metric:accuracy|languages:{len(groups)}|n:{items}|seeds:{seeds}|resamples:{resamples}"
    return Score("accuracy", _mean(groups), low, high, items, signature, confidence)


def paired_over_seeds(
    first: ArrayLike,
    second: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> PairedDifference:
    """Compare two systems on the same items: each resample draws the items once and each system's seeds on their own.

    Args:
        first, second: `[seeds, items]` or `[items]`; the numbers of seeds may differ.

    Raises:
        DataError: different numbers of items, or as for :func:`accuracy`.
    """
    return macro_difference({"": first}, {"": second}, resamples=resamples, confidence=confidence, seed=seed)


def macro_difference(
    first: Mapping[str, ArrayLike],
    second: Mapping[str, ArrayLike],
    *,
    parallel: bool = False,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> PairedDifference:
    """:func:`paired_over_seeds` for the mean over languages; `parallel` as in :func:`macro_accuracy`.

    Raises:
        DataError: the systems have different languages or items, or as for :func:`macro_accuracy`.
    """
    if set(first) != set(second):
        only = sorted(set(first) ^ set(second))
        raise DataError(
            f"only one system has {', '.join(only)}", where="languages", remedy="score both on the same languages"
        )
    names = sorted(first)
    groups = _groups({name: first[name] for name in names}, parallel)
    others = _groups({name: second[name] for name in names}, parallel)
    for name, mine, theirs in zip(names, groups, others, strict=True):
        if mine.shape[1] != theirs.shape[1]:
            raise DataError(
                f"the systems have {mine.shape[1]} and {theirs.shape[1]} items",
                where=name or None,
                remedy="score both on the same test set",
            )
    samples = _samples(groups, parallel, resamples, seed, system=0) - _samples(
        others, parallel, resamples, seed, system=1
    )
    items = sum(group.shape[1] for group in groups)
    return difference(_mean(groups) - _mean(others), samples, n=items, confidence=confidence)


def accuracy_by_script(
    correct: Mapping[str, ArrayLike],
    script: Callable[[str], str],
    *,
    parallel: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Score]:
    """:func:`macro_accuracy` of the languages of each script; `script` names the script of a language."""
    scripts: dict[str, dict[str, ArrayLike]] = {}
    for language, values in correct.items():
        scripts.setdefault(script(language), {})[language] = values
    return {
        name: macro_accuracy(values, parallel=parallel, resamples=resamples, seed=seed)
        for name, values in sorted(scripts.items())
    }


def correctness(predictions: Sequence[str], gold: Sequence[str]) -> Floats:
    """1 where a prediction equals its label after stripping white space, as 2508.09091's evaluation does; `[items]`.

    Raises:
        DataError: different numbers of predictions and labels.
    """
    if len(predictions) != len(gold):
        raise DataError(f"{len(predictions)} predictions for {len(gold)} labels", remedy="predict every item once")
    return np.array([mine.strip() == right.strip() for mine, right in zip(predictions, gold, strict=True)], float)


def _mean(groups: Sequence[Floats]) -> float:
    return float(100 * np.mean([group.mean() for group in groups]))


def _groups(correct: Mapping[str, ArrayLike], parallel: bool) -> list[Floats]:
    """Checked arrays `[seeds, items]`, one a language."""
    groups: list[Floats] = []
    for name, values in correct.items():
        group = np.atleast_2d(np.asarray(values, dtype=np.float64))
        if group.ndim != 2 or group.size == 0 or not ((group >= 0) & (group <= 1)).all():
            raise DataError(
                f"correctness of shape {group.shape} is not [seeds, items] of values from 0 to 1",
                where=name or None,
                remedy="give 1 for a right and 0 for a wrong prediction of at least one item",
            )
        groups.append(group)
    if not groups:
        raise DataError("there is no language to average over", remedy="score at least one language")
    if len({len(group) for group in groups}) > 1:
        raise DataError("the languages have different numbers of seeds", remedy="score every model on every language")
    if parallel and len({group.shape[1] for group in groups}) > 1:
        raise DataError("parallel test sets have different numbers of items", remedy="keep the items they share")
    return groups


def _samples(groups: Sequence[Floats], parallel: bool, resamples: int, seed: int, system: int) -> Floats:
    """Macro means of resampled items and seeds, `[resamples]`; items do not depend on `system`, seeds do."""
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}", remedy=f"use at least 1; {RESAMPLES} is the default")
    seeds = len(groups[0])
    drawn_seeds = seed_shares(seeds, resamples, _state(seed, _SEEDS, system))
    pooled: Sequence[Floats] = [np.mean(groups, axis=0)] if parallel else groups  # mean of means: same item weights
    totals = np.zeros(resamples)
    for index, group in enumerate(pooled):
        draws = resampling_weights(group.shape[1], resamples, _state(seed, _ITEMS, index))
        by_seed = np.concatenate([weights @ group.T for weights in draws]) / group.shape[1]  # [resamples, seeds]
        totals += (by_seed * drawn_seeds).sum(axis=1)
    return 100 * totals / len(pooled)


def _state(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])
