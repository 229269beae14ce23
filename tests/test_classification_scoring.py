"""Accuracy of classification with intervals over items and seeds."""

from __future__ import annotations

import numpy as np
import pytest

from enc2gen.errors import DataError
from enc2gen.evaluation.accuracy import (
    accuracy,
    accuracy_by_script,
    correctness,
    macro_accuracy,
    macro_difference,
    paired_over_seeds,
)


def bernoulli(share: float, *shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) < share).astype(float)


def test_interval_of_one_model_is_the_binomial_one() -> None:
    correct = bernoulli(0.7, 400)
    score = accuracy(correct, resamples=4000)
    spread = 100 * np.sqrt(correct.mean() * (1 - correct.mean()) / 400)
    assert score.value == pytest.approx(100 * correct.mean())
    assert (score.high - score.low) / (2 * 1.96) == pytest.approx(spread, rel=0.07)
    assert score.n == 400 and accuracy(correct[None]) == accuracy(correct)


def test_interval_covers_seeds_too() -> None:
    # Models of 60, 70 and 80 on the same items: copies of one model would hide the spread between seeds.
    models = np.stack([np.arange(500) < share for share in (300, 350, 400)]).astype(float)
    one, three = accuracy(models[1]), accuracy(models, resamples=4000)
    assert three.value == pytest.approx(70)
    # Student's interval of the mean of three models, 4.303 standard errors, beside the normal one of the items.
    items = 1.96 * 100 * np.sqrt(models.mean(0).var() / 500)
    seeds = 4.303 * 100 * models.mean(1).std(ddof=1) / np.sqrt(3)
    assert (three.high - three.low) / 2 == pytest.approx(np.hypot(items, seeds), rel=0.15)
    assert three.high - three.low > 1.3 * (one.high - one.low)


def test_paired_difference_of_seeds() -> None:
    item = np.random.default_rng(1).random(300)
    first = np.stack([(item < share).astype(float) for share in (0.70, 0.71, 0.72)])
    second = np.stack([(item < share).astype(float) for share in (0.60, 0.605, 0.61)])
    found = paired_over_seeds(first, second, resamples=2000)
    assert found.value == pytest.approx(100 * (first.mean() - second.mean()))
    assert found.low > 0 and found.p_value < 0.01 and found.n == 300
    # Paired items: much narrower than two independent intervals would allow.
    unpaired = np.hypot(*(np.diff([s.low, s.high])[0] for s in (accuracy(first), accuracy(second))))
    assert found.high - found.low < 0.8 * unpaired
    same = paired_over_seeds(first, first)
    assert same.value == 0 and same.p_value == 1


def test_lucky_seed_is_no_evidence() -> None:
    # One of three seeds is far better by luck; items alone would call the difference certain.
    item = np.random.default_rng(2).random(2000)
    good = np.stack([(item < share).astype(float) for share in (0.60, 0.61, 0.75)])
    bad = np.stack([(item < share).astype(float) for share in (0.60, 0.62, 0.61)])
    assert paired_over_seeds(good.mean(0), bad.mean(0)).low > 0
    assert paired_over_seeds(good, bad).low < 0


def test_macro_mean_weighs_languages_alike() -> None:
    correct = {"a": np.ones((2, 10)), "b": np.zeros((2, 1000))}
    score = macro_accuracy(correct)
    assert score.value == 50 and score.low == score.high == 50 and score.n == 1010


def test_parallel_languages_share_their_items() -> None:
    # The same items are hard in all languages: one hundred languages are no more evidence than one.
    items = bernoulli(0.5, 200)
    same = {str(i): items for i in range(20)}
    alone = accuracy(items)
    joint, separate = macro_accuracy(same, parallel=True), macro_accuracy(same)
    assert joint.high - joint.low == pytest.approx(alone.high - alone.low, rel=0.01)
    assert separate.high - separate.low < 0.5 * (joint.high - joint.low)
    other = {name: np.clip(values + bernoulli(0.1, 200, seed=3), 0, 1) for name, values in same.items()}
    better = macro_difference(other, same, parallel=True)
    assert better.low > 0 and better.value == pytest.approx(macro_accuracy(other).value - joint.value)


def test_scripts() -> None:
    correct = {"kaz_Cyrl": [1, 1], "khk_Cyrl": [0, 0], "swh_Latn": [1, 1]}
    found = accuracy_by_script(correct, lambda language: language.split("_")[1])
    assert {name: score.value for name, score in found.items()} == {"Cyrl": 50, "Latn": 100}


def test_exact_match_after_stripping() -> None:
    assert correctness([" sports\n", "Sports", "sport", ""], ["sports"] * 4).tolist() == [1, 0, 0, 0]
    with pytest.raises(DataError, match="2 predictions for 1"):
        correctness(["a", "b"], ["a"])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"\[seeds, items\]"):
        accuracy([])
    with pytest.raises(DataError, match="values from 0 to 1"):
        accuracy([0.0, 2.0])
    with pytest.raises(DataError, match="no language"):
        macro_accuracy({})
    with pytest.raises(DataError, match="numbers of seeds"):
        macro_accuracy({"a": np.ones((2, 3)), "b": np.ones((3, 3))})
    with pytest.raises(DataError, match="numbers of items"):
        macro_accuracy({"a": np.ones(2), "b": np.ones(3)}, parallel=True)
    with pytest.raises(DataError, match="2 and 3 items"):
        paired_over_seeds(np.ones(2), np.ones(3))
    with pytest.raises(DataError, match="only one system has b"):
        macro_difference({"a": [1]}, {"a": [1], "b": [1]})
