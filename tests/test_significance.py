"""Intervals that cover, and comparisons that find a planted difference and not an absent one."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from enc2gen.errors import ConfigError, DataError
from enc2gen.evaluation import significance
from enc2gen.evaluation.metrics import METRICS
from enc2gen.evaluation.significance import (
    Score,
    Statistics,
    bootstrap_interval,
    bootstrap_scores,
    mean_statistics,
    paired_bootstrap,
)


def noisy_copies(seed: int, noise: float, sentences: int = 120) -> tuple[list[str], list[list[str]]]:
    """Hypotheses that replace a share `noise` of the reference's words; references depend on nothing else."""
    reference_rng, rng = random.Random(99), random.Random(seed)
    words = [f"сөз{index}" for index in range(50)]
    references = [reference_rng.choices(words, k=reference_rng.randint(3, 9)) for _ in range(sentences)]
    hypotheses = [
        [rng.choice(words) if rng.random() < noise else word for word in reference] for reference in references
    ]
    return [" ".join(text) for text in hypotheses], [[" ".join(text)] for text in references]


def statistics_of(name: str, seed: int, noise: float) -> Statistics:
    statistics = METRICS.get(name).statistics(*noisy_copies(seed, noise), language="kk")
    assert statistics is not None
    return statistics


def test_resampled_scores_are_scores_of_resampled_texts() -> None:
    hypotheses, references = noisy_copies(0, 0.4, sentences=25)
    statistics = METRICS.get("chrf++").statistics(hypotheses, references)
    assert statistics is not None
    draws = np.random.default_rng(5).integers(0, 25, size=(20, 25))
    expected = [
        CHRF(word_order=2).corpus_score([hypotheses[i] for i in draw], [[references[i][0] for i in draw]]).score
        for draw in draws
    ]
    assert bootstrap_scores(statistics, resamples=20, seed=5).tolist() == expected


def test_resamples_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = statistics_of("token-f1", 0, 0.3)
    whole = bootstrap_scores(statistics, resamples=100, seed=1)
    monkeypatch.setattr(significance, "_CHUNK_ELEMENTS", 7 * len(statistics))
    assert bootstrap_scores(statistics, resamples=100, seed=1).tolist() == whole.tolist()
    assert bootstrap_scores(statistics, resamples=100, seed=2).tolist() != whole.tolist()


def test_interval_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(0).normal(50, 10, size=400)
    half = 1.96 * values.std() / 20
    low, high = bootstrap_interval(mean_statistics(values), resamples=4000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15)
    low90, high90 = bootstrap_interval(mean_statistics(values), resamples=4000, confidence=0.9)
    assert (high90 - low90) / (high - low) == pytest.approx(1.645 / 1.96, abs=0.04)


def test_intervals_cover_the_true_score() -> None:
    """400 samples of 80 sentences from a population whose mean is 30."""
    rng = np.random.default_rng(1)
    covered = 0
    for sample in range(400):
        values = 100.0 * rng.binomial(1, 0.3, size=80)
        low, high = bootstrap_interval(mean_statistics(values), resamples=400, seed=sample)
        covered += low <= 30.0 <= high
    assert 0.90 <= covered / 400 <= 0.98


@pytest.mark.parametrize("name", ["bleu", "chrf++", "rouge-l", "exact-match", "token-f1"])
def test_a_planted_difference_is_found_and_its_sign_is_first_minus_second(name: str) -> None:
    better, worse = statistics_of(name, 1, 0.15), statistics_of(name, 2, 0.35)
    found = paired_bootstrap(better, worse)
    assert found.value == pytest.approx(better.value() - worse.value())
    assert 0.0 < found.low < found.value < found.high
    assert found.p_value < 0.01
    mirrored = paired_bootstrap(worse, better)
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert mirrored.p_value == found.p_value


def test_an_absent_difference_is_rarely_found() -> None:
    """Under "no difference", p < 0.05 must happen in about 5 % of comparisons."""
    rng = np.random.default_rng(2)
    found = 0
    for sample in range(300):
        first, second = rng.normal(50, 20, size=(2, 60)) + rng.normal(0, 20, size=60)
        comparison = paired_bootstrap(mean_statistics(first), mean_statistics(second), resamples=300, seed=sample)
        found += comparison.p_value < 0.05
    assert 0.01 <= found / 300 <= 0.10


def test_pairing_removes_the_difficulty_of_the_sentences() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.normal(50, 20, size=200)
    first = mean_statistics(difficulty + 1 + rng.normal(0, 2, size=200))
    second = mean_statistics(difficulty + rng.normal(0, 2, size=200))
    assert bootstrap_interval(first)[0] < bootstrap_interval(second)[1]  # the intervals overlap
    assert paired_bootstrap(first, second).p_value < 0.01


def test_p_values_agree_with_sacrebleus_paired_bootstrap() -> None:
    from sacrebleu.significance import PairedTest

    (first, references), (second, _) = noisy_copies(1, 0.30), noisy_copies(2, 0.33)
    theirs = PairedTest(
        [("first", first), ("second", second)],
        {"chrF2++": CHRF(word_order=2)},
        references=[[texts[0] for texts in references]],
        test_type="bs",
        n_samples=2000,
    )()[1]
    expected = theirs["chrF2++"][1].p_value
    ours = paired_bootstrap(statistics_of("chrf++", 1, 0.30), statistics_of("chrf++", 2, 0.33), resamples=2000)
    assert 0.01 < expected < 0.99
    assert ours.p_value == pytest.approx(expected, abs=0.05)


def test_a_system_does_not_differ_from_itself() -> None:
    statistics = statistics_of("chrf++", 1, 0.3)
    same = paired_bootstrap(statistics, statistics)
    assert (same.value, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_one_sentence_has_an_interval_without_width() -> None:
    assert bootstrap_interval(mean_statistics(np.asarray([42.0]))) == (42.0, 42.0)


BAD = [
    ({"resamples": 0}, ConfigError, "resamples is 0"),
    ({"confidence": 1.0}, ConfigError, "confidence is 1.0"),
    ({"confidence": 95}, ConfigError, "confidence is 95"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options_are_refused(options, error, message) -> None:  # type: ignore[no-untyped-def]
    statistics = mean_statistics(np.asarray([1.0, 2.0]))
    with pytest.raises(error, match=message):
        bootstrap_interval(statistics, **options)
    with pytest.raises(error, match=message):
        paired_bootstrap(statistics, statistics, **options)


def test_bad_corpora_are_refused() -> None:
    two, three, none = (mean_statistics(np.ones(size)) for size in (2, 3, 0))
    with pytest.raises(DataError, match="empty test set"):
        bootstrap_interval(none)
    with pytest.raises(DataError, match="2 and 3 sentences"):
        paired_bootstrap(two, three)
    with pytest.raises(ConfigError, match="computed differently"):
        paired_bootstrap(statistics_of("chrf++", 1, 0.3), statistics_of("bleu", 1, 0.3))


def test_scores_compare_by_their_intervals() -> None:
    low, high = Score("chrf++", 10, 9, 11, 5, ""), Score("chrf++", 20, 18, 22, 5, "")
    overlapping = Score("chrf++", 12, 10.5, 18.5, 5, "")
    assert high.above(low)
    assert not low.above(high)
    assert not high.above(overlapping)
    assert str(high) == "chrf++ 20.00 [18.00, 22.00]"
    with pytest.raises(ConfigError, match="cannot compare chrf"):
        high.above(Score("bleu", 1, 1, 1, 5, ""))
