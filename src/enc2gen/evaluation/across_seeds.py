"""Scores of a system that was trained with several seeds: means, two-level bootstrap intervals, paired differences.

An interval over test sentences alone answers what other sentences would have shown of *these* trained models; a claim
about a recipe is about other training runs, too. So a resample draws seeds and sentences, both with replacement
(two-level bootstrap; Davison and Hinkley 1997, section 3.8). The draw depends on `seed` and on the numbers of seeds and
sentences only: all systems of a comparison see the same draws, so differences are paired in both.

Few seeds drawn from few show less than their spread, so draws of seeds are stretched (`significance.seed_shares`): of
two equal systems, at most about one 95 % interval in twenty excludes zero, from two seeds on. That makes differences
between few seeds hard to prove, as they are; look at the single seeds, too, and settle what matters with more of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from enc2gen.errors import ConfigError, DataError
from enc2gen.evaluation.significance import (
    CONFIDENCE,
    RESAMPLES,
    Floats,
    PairedDifference,
    Score,
    Statistics,
    difference,
    interval,
    resampling_weights,
    seed_shares,
)

SeedStatistics = Mapping[int, Statistics]
"""Training seed -> statistics of one metric; sentence i is the same sentence for all of them."""

_SENTENCES, _SEEDS = 0, 1  # what a draw is about; parts of its state


def mean_over_seeds(runs: SeedStatistics) -> float:
    """Mean over seeds of the corpus score."""
    return float(np.mean([statistics.value() for statistics in runs.values()]))


def score_over_seeds(
    name: str,
    runs: SeedStatistics,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    highest: float | None = 100.0,
) -> Score:
    """Mean over seeds of the corpus score, with its two-level bootstrap interval.

    Args:
        name: of the metric.
        runs: what each training run scored; with one, only sentences are drawn.
        highest: value that the metric can have, at which the interval ends; None for losses and perplexities.

    Returns:
        The score; its signature is that of the runs, with `seeds:`, `bs:` and `seed:` added.

    Raises:
        DataError: no run, no sentence, or different numbers of sentences.
        ConfigError: runs with different signatures, `resamples` below 1, or `confidence` outside (0, 1).
    """
    statistics = _checked(runs, resamples, confidence)
    low, high = interval(resampled_means(runs, resamples=resamples, seed=seed), confidence)
    low = max(low, 0.0)
    high = high if highest is None else min(high, highest)
    first, _, rest = statistics[0].signature.partition("|")
    signature = "|".join(filter(None, (first, f"seeds:{len(runs)}", f"bs:{resamples}", f"seed:{seed}", rest)))
    return Score(name, mean_over_seeds(runs), low, high, len(statistics[0]), signature, confidence)


def paired_difference(
    first: SeedStatistics,
    second: SeedStatistics,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> PairedDifference:
    """First minus second, on the seeds that both have: each resample draws the same seeds and sentences for both.

    Raises:
        DataError: no seed in common, different numbers of sentences, or none.
        ConfigError: different metrics or settings, `resamples` below 1, or `confidence` outside (0, 1).
    """
    common = [number for number in first if number in second]
    if not common:
        raise DataError(
            f"no seed in common: {sorted(first)} and {sorted(second)}", remedy="train both systems with the same seeds"
        )
    mine, theirs = ({number: runs[number] for number in common} for runs in (first, second))
    statistics = _checked({(side, n): s for side, runs in enumerate((mine, theirs)) for n, s in runs.items()})
    _checked(mine, resamples, confidence)
    samples = resampled_means(mine, resamples=resamples, seed=seed) - resampled_means(
        theirs, resamples=resamples, seed=seed
    )
    observed = mean_over_seeds(mine) - mean_over_seeds(theirs)
    return difference(observed, samples, n=len(statistics[0]), confidence=confidence)


def resampled_means(runs: SeedStatistics, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Means over drawn seeds of corpus scores of drawn sentences, `[resamples]`.

    Within a resample the sentences drawn are the same for all seeds: they are one test set.
    """
    statistics = _checked(runs, resamples)
    # Each level has draws of its own, whatever the size of the other.
    shares = seed_shares(len(runs), resamples, _state(seed, _SEEDS))
    means = np.zeros(resamples)
    start = 0
    for weights in resampling_weights(len(statistics[0]), resamples, _state(seed, _SENTENCES)):
        chunk = slice(start, start + len(weights))
        for column, one in enumerate(statistics):
            means[chunk] += shares[chunk, column] * one.aggregate(weights @ one.rows)
        start += len(weights)
    return means


def _checked(
    runs: Mapping[Any, Statistics], resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> Sequence[Statistics]:
    """The statistics in order, if they can be compared."""
    statistics = list(runs.values())
    if not statistics or not all(map(len, statistics)):
        raise DataError("there is no run or no sentence to score", remedy="score at least one sentence of one run")
    if len(counts := {len(one) for one in statistics}) > 1:
        raise DataError(
            f"the runs have {' and '.join(map(str, sorted(counts)))} sentences", remedy="score all on the same test set"
        )
    if len(signatures := sorted({one.signature for one in statistics})) > 1:
        raise ConfigError(
            f"the scores were computed differently: {' and '.join(map(repr, signatures))}",
            remedy="use one metric with the same options and references for all runs",
        )
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}", remedy=f"use at least 1; {RESAMPLES} is the default")
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence is {confidence}", remedy="give a share between 0 and 1, such as 0.95")
    return statistics


def _state(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])
