"""Intervals over seeds and sentences: the resampling of plain loops, and coverage that a single level does not have."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from enc2gen.errors import ConfigError, DataError
from enc2gen.evaluation import significance
from enc2gen.evaluation.across_seeds import mean_over_seeds, paired_difference, resampled_means, score_over_seeds
from enc2gen.evaluation.metrics import METRICS
from enc2gen.evaluation.significance import Statistics, mean_statistics, paired_bootstrap

WORDS = [f"сөз{index}" for index in range(40)]


def texts(seed: int, noise: float, sentences: int = 30) -> tuple[list[str], list[list[str]]]:
    """Hypotheses that replace a share `noise` of the references' words; the references are always the same."""
    reference_rng, rng = random.Random(99), random.Random(seed)
    references = [reference_rng.choices(WORDS, k=reference_rng.randint(2, 8)) for _ in range(sentences)]
    written = [[rng.choice(WORDS) if rng.random() < noise else word for word in sentence] for sentence in references]
    return [" ".join(words) for words in written], [[" ".join(words)] for words in references]


def statistics(seed: int, noise: float, metric: str = "chrf++", sentences: int = 30) -> Statistics:
    found = METRICS.get(metric).statistics(*texts(seed, noise, sentences), language="kk")
    assert found is not None
    return found


def means(values: np.ndarray) -> dict[int, Statistics]:
    """Runs of a plain mean from `[seeds, sentences]`."""
    return {seed: mean_statistics(row) for seed, row in enumerate(values)}


def test_the_value_is_the_mean_over_seeds_of_sacrebleus_scores() -> None:
    runs = {seed: statistics(seed, 0.3) for seed in (3, 4, 5)}
    scores = []
    for seed in runs:
        hypotheses, references = texts(seed, 0.3)
        scores.append(CHRF(word_order=2).corpus_score(hypotheses, [[refs[0] for refs in references]]).score)
    found = score_over_seeds("chrf++", runs, resamples=200)
    assert found.value == pytest.approx(np.mean(scores))
    assert found.low < found.value < found.high and found.n == 30
    assert found.signature.startswith("nrefs:1|seeds:3|bs:200|seed:0|case:mixed")


def test_resamples_are_distributed_as_those_of_plain_loops() -> None:
    """Draw seeds and sentences, score the drawn runs' drawn sentences, average, stretch: written out."""
    stretch = 3.182446 / 1.959964 * (4 / 3) ** 0.5  # Student's and the normal quantile, from tables
    rng = np.random.default_rng(0)
    values = rng.normal(50, 12, size=(4, 60)) + rng.normal(0, 5, size=(4, 1)) + rng.normal(0, 9, size=60)
    loops = []
    for _ in range(4000):
        sentences = rng.integers(0, 60, size=60)
        by_seed = [np.mean([values[seed, i] for i in sentences]) for seed in range(4)]
        drawn = np.mean([by_seed[seed] for seed in rng.integers(0, 4, size=4)])
        loops.append(np.mean(by_seed) + stretch * (drawn - np.mean(by_seed)))
    found = resampled_means(means(values), resamples=4000)
    assert found.mean() == pytest.approx(np.mean(loops), abs=0.25)
    assert found.std() == pytest.approx(np.std(loops), rel=0.05)
    for share in (0.025, 0.25, 0.75, 0.975):
        assert np.quantile(found, share) == pytest.approx(np.quantile(loops, share), abs=0.6)


def test_a_corpus_metric_is_aggregated_within_each_drawn_seed() -> None:
    """chrF++ of a resample is no mean of sentence scores: the plain computation, with the draws taken apart."""
    runs = {seed: statistics(seed, 0.4, sentences=12) for seed in (0, 1)}
    only_first, only_second = ({seed: runs[seed]} for seed in (0, 1))
    both = resampled_means(runs, resamples=300, seed=7)
    first, second = (resampled_means(one, resamples=300, seed=7) for one in (only_first, only_second))
    # Two seeds drawn from two: twice the first, one of each, or twice the second; sentences as for one seed alone.
    middle, stretch = (first + second) / 2, 12.706205 / 1.959964 * 2**0.5
    kinds = [np.isclose(both, middle + stretch * (one - middle), rtol=1e-4) for one in (first, middle, second)]
    assert np.logical_or.reduce(kinds).all()
    assert [kind.mean() for kind in kinds] == pytest.approx([0.25, 0.5, 0.25], abs=0.09)


def test_one_seed_is_the_paired_bootstrap_over_sentences() -> None:
    first, second = statistics(1, 0.2, sentences=80), statistics(2, 0.3, sentences=80)
    ours = paired_difference({5: first}, {5: second}, resamples=4000)
    plain = paired_bootstrap(first, second, resamples=4000, seed=11)
    assert ours.value == pytest.approx(plain.value) and ours.n == plain.n
    assert (ours.low, ours.high) == pytest.approx((plain.low, plain.high), abs=0.5)
    assert ours.p_value == pytest.approx(plain.p_value, abs=0.01)


def test_differences_use_the_same_draws_for_both() -> None:
    """A system that is better by the same amount everywhere is better by that amount in every resample."""
    values = np.random.default_rng(3).normal(40, 15, size=(3, 50)) + np.array([[-8.0], [0.0], [8.0]])
    found = paired_difference(means(values + 1.5), means(values))
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    score = score_over_seeds("mean", means(values))
    assert score.high - score.low > 10, "on its own the score varies with seeds and sentences"
    mirrored = paired_difference(means(values), means(values + 1.5))
    assert mirrored.value == pytest.approx(-1.5)


def test_seeds_count_as_a_source_of_chance() -> None:
    """Runs that differ by seed, not by sentence: sentences alone would call a lucky seed a finding."""
    rng = np.random.default_rng(4)
    noise = rng.normal(0, 1, size=(1, 200))
    lucky = np.array([[9.0], [-1.0], [-2.0]])
    found = paired_difference(means(50 + lucky + noise), means(50 + 0 * lucky + noise))
    assert found.value == pytest.approx(2.0)
    assert found.low < 0 < found.high
    alone = paired_difference({0: means(50 + lucky + noise)[0]}, {0: means(50 + noise)[0]})
    assert alone.low > 0


def test_intervals_over_seeds_cover_what_intervals_over_sentences_miss() -> None:
    """250 experiments of eight seeds and 60 sentences, whose true mean is 50."""
    rng = np.random.default_rng(5)
    covered = {"both": 0, "sentences": 0}
    for number in range(250):
        values = 50 + rng.normal(0, 3, size=(8, 1)) + rng.normal(0, 8, size=(1, 60)) + rng.normal(0, 4, size=(8, 60))
        score = score_over_seeds("mean", means(values), resamples=300, seed=number)
        covered["both"] += score.low <= 50 <= score.high
        one = score_over_seeds("mean", {0: mean_statistics(values[0])}, resamples=300, seed=number)
        covered["sentences"] += one.low <= 50 <= one.high
    assert covered["both"] / 250 >= 0.88
    assert covered["sentences"] / 250 <= 0.6


@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_systems_differ_by_chance_in_one_interval_of_twenty(seeds: int) -> None:
    """Of two recipes that are the same but for luck, where runs differ more than sentences; drawn without the stretch,
    a quarter of the intervals over three seeds would exclude zero."""
    rng = np.random.default_rng(6)
    found = []
    for number in range(200):
        first, second = (
            means(50 + rng.normal(0, 4, size=(seeds, 1)) + rng.normal(0, 8, size=(1, 80))) for _ in range(2)
        )
        pair = paired_difference(first, second, resamples=400, seed=number)
        found.append(pair.low > 0 or pair.high < 0)
    assert np.mean(found) <= 0.09


def test_only_common_seeds_are_compared_and_order_does_not_matter() -> None:
    runs = {seed: statistics(seed, 0.1 + 0.1 * seed) for seed in range(4)}
    first = {seed: runs[seed] for seed in (0, 1, 2)}
    second = {seed: statistics(10 + seed, 0.5) for seed in (2, 1, 7)}
    found = paired_difference(first, second, resamples=100)
    expected = mean_over_seeds({1: runs[1], 2: runs[2]}) - mean_over_seeds({1: second[1], 2: second[2]})
    assert found.value == pytest.approx(expected)
    turned = paired_difference(first, dict(reversed(second.items())), resamples=100)
    assert (turned.low, turned.high) == (found.low, found.high)
    with pytest.raises(DataError, match=r"no seed in common: \[0, 1\] and \[7\]"):
        paired_difference({0: runs[0], 1: runs[1]}, {7: second[7]})


def test_resamples_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {seed: statistics(seed, 0.3, "token-f1") for seed in (0, 1, 2)}
    whole = resampled_means(runs, resamples=100, seed=1)
    monkeypatch.setattr(significance, "_CHUNK_ELEMENTS", 7 * 30)
    assert resampled_means(runs, resamples=100, seed=1).tolist() == whole.tolist()
    assert resampled_means(runs, resamples=100, seed=2).tolist() != whole.tolist()


def test_what_cannot_be_compared_is_refused() -> None:
    one, short, other = statistics(0, 0.2), statistics(0, 0.2, sentences=20), statistics(0, 0.2, "bleu")
    with pytest.raises(DataError, match="20 and 30 sentences"):
        score_over_seeds("chrf++", {0: one, 1: short})
    with pytest.raises(DataError, match="20 and 30 sentences"):
        paired_difference({0: one}, {0: short})
    with pytest.raises(ConfigError, match="computed differently"):
        paired_difference({0: one}, {0: other})
    with pytest.raises(DataError, match="no run or no sentence"):
        score_over_seeds("chrf++", {})
    with pytest.raises(ConfigError, match="resamples is 0"):
        score_over_seeds("chrf++", {0: one}, resamples=0)
    with pytest.raises(ConfigError, match="confidence is 95"):
        score_over_seeds("chrf++", {0: one}, confidence=95)


def test_two_seeds_far_apart_say_nothing_beyond_the_scale() -> None:
    found = score_over_seeds("mean", means(np.array([[2.0] * 40, [97.0] * 40])))
    assert (found.low, found.high) == (0.0, 100.0)


def test_an_interval_ends_at_the_highest_value_if_the_metric_has_one() -> None:
    runs = means(np.array([[90.0, 100.0, 400.0, 1000.0], [80.0, 120.0, 500.0, 900.0]]))
    bounded, open_ended = score_over_seeds("share", runs), score_over_seeds("perplexity", runs, highest=None)
    assert bounded.high == 100.0 and open_ended.high > open_ended.value > 100.0
