"""Scores with bootstrap intervals, and paired comparisons of two systems (Koehn 2004, W04-3250).

Every metric reduces a sentence to a row of additive sufficient statistics (n-gram counts for BLEU, a value
and a one for an average). A resample then is a weighting of rows, and a thousand resamples are one matrix
product: no text is touched again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from enc2gen.errors import ConfigError, DataError

RESAMPLES = 1000  # Koehn 2004, W04-3250
CONFIDENCE = 0.95
_CHUNK_ELEMENTS = 4_000_000  # resampling weights held at once (32 MB)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A corpus score on the scale 0-100 with its percentile bootstrap interval.

    Attributes:
        name: the metric ("chrf++").
        value: the score of the whole corpus.
        low, high: the ends of the interval.
        n: number of sentences.
        signature: `key:value|key:value` text with everything that changes the number.
        confidence: coverage of the interval, 0.95 for 95 %.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    signature: str
    confidence: float = CONFIDENCE

    def above(self, other: Score) -> bool:
        """Whether this interval lies wholly above the interval of `other` (both of the same metric)."""
        if self.name != other.name:
            raise ConfigError(f"cannot compare {self.name} with {other.name}", remedy="compare scores of one metric")
        return self.low > other.high

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Statistics:
    """Additive sufficient statistics of a metric on a corpus.

    Attributes:
        rows: `[sentences, statistics]`, one row per sentence.
        aggregate: maps sums of rows, `[m, statistics]`, to scores `[m]` on the scale 0-100.
        signature: what the statistics were computed with.
    """

    rows: Floats
    aggregate: Callable[[Floats], Floats]
    signature: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def value(self) -> float:
        """The corpus score."""
        return float(self.aggregate(self.rows.sum(axis=0, keepdims=True))[0])

    def per_sentence(self) -> Floats:
        """The score of every sentence on its own, `[sentences]`."""
        return self.aggregate(self.rows)


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two systems on the same sentences, first minus second.

    Attributes:
        value: difference of the corpus scores.
        low, high: percentile bootstrap interval of the difference.
        p_value: two-sided p-value of "no difference".
        n: number of sentences.
    """

    value: float
    low: float
    high: float
    p_value: float
    n: int


def mean_statistics(values: Floats, signature: str = "") -> Statistics:
    """Statistics of the plain mean of per-sentence `values`, `[sentences]`, on the scale 0-100."""
    rows = np.stack([values, np.ones_like(values)], axis=1)
    return Statistics(rows, lambda sums: sums[:, 0] / sums[:, 1], signature)


def resampling_weights(n: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each sentence was drawn, in chunks of `[resamples, n]`; the chunk size changes nothing."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ELEMENTS // n)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def seed_shares(seeds: int, resamples: int, seed: int) -> Floats:
    """What each training run weighs in a resampled mean over runs, `[resamples, seeds]`; every row sums to 1.

    k runs drawn with replacement from k show (k - 1) / k of their variance, and from few runs even that is known badly.
    So a draw's deviation from equal weights is stretched by sqrt(k / (k - 1)) and by Student's over the normal
    quantile, t(0.975, k - 1) / z(0.975): 2.69 for three runs, 1.58 for five, 1.22 for ten. Where runs differ more than
    sentences, intervals are then about as wide as Student's over runs; where they do not, a little wider than they need
    to be. A weight may be negative. One run is one run: its weight is always 1.
    """
    from scipy.stats import norm, t

    drawn = np.concatenate(list(resampling_weights(seeds, resamples, seed))) / seeds
    if seeds == 1:
        return drawn
    stretch = t.ppf(0.975, seeds - 1) / norm.ppf(0.975) * np.sqrt(seeds / (seeds - 1))
    shares: Floats = 1 / seeds + stretch * (drawn - 1 / seeds)
    return shares


def _check(n: int, resamples: int, confidence: float) -> None:
    if n == 0:
        raise DataError("cannot resample an empty test set", remedy="score at least one sentence")
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}", remedy=f"use at least 1; {RESAMPLES} is the default")
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence is {confidence}", remedy="give a share between 0 and 1, such as 0.95")


def interval(samples: Floats, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Percentile interval of resampled scores, `[resamples]`."""
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(samples, [tail, 1.0 - tail])
    return float(low), float(high)


def difference(observed: float, samples: Floats, *, n: int, confidence: float = CONFIDENCE) -> PairedDifference:
    """The observed difference of two systems with interval and p-value from resampled differences, `[resamples]`.

    The p-value is two-sided: the share of resamples whose difference, centred on its mean, is at least as
    large as the observed one (Riezler and Maxwell 2005, W05-0908), with one added to both counts.
    """
    # Exact zeros on both sides (identical systems) must count as "at least as large" despite rounding.
    extreme = np.abs(samples - samples.mean()) >= abs(observed) - 1e-9
    low, high = interval(samples, confidence)
    return PairedDifference(
        value=observed, low=low, high=high, p_value=float((extreme.sum() + 1) / (len(samples) + 1)), n=n
    )


def bootstrap_scores(statistics: Statistics, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Corpus scores of `resamples` test sets drawn with replacement from the sentences, `[resamples]`.

    The draw depends on `seed` and the number of sentences only, so two systems get the same test sets.
    """
    _check(len(statistics), resamples, CONFIDENCE)
    chunks = resampling_weights(len(statistics), resamples, seed)
    return np.concatenate([statistics.aggregate(weights @ statistics.rows) for weights in chunks])


def bootstrap_interval(
    statistics: Statistics, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the corpus score; one sentence gives an interval of width 0.

    Raises:
        DataError: there is no sentence.
        ConfigError: `resamples` below 1, or `confidence` outside (0, 1).
    """
    _check(len(statistics), resamples, confidence)
    return interval(bootstrap_scores(statistics, resamples=resamples, seed=seed), confidence)


def paired_bootstrap(
    first: Statistics,
    second: Statistics,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> PairedDifference:
    """Compare two systems on the same sentences, each resample scoring both on the same draw.

    Raises:
        DataError: different numbers of sentences, or none.
        ConfigError: different metrics or settings, `resamples` below 1, or `confidence` outside (0, 1).
    """
    if len(first) != len(second):
        raise DataError(
            f"the systems have {len(first)} and {len(second)} sentences",
            remedy="score both on the same test set",
        )
    if first.signature != second.signature:
        raise ConfigError(
            f"the scores were computed differently: {first.signature!r} and {second.signature!r}",
            remedy="use one metric with the same options and references for both systems",
        )
    _check(len(first), resamples, confidence)
    observed = first.value() - second.value()
    samples = bootstrap_scores(first, resamples=resamples, seed=seed) - bootstrap_scores(
        second, resamples=resamples, seed=seed
    )
    return difference(observed, samples, n=len(first), confidence=confidence)
