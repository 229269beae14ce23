"""The linear probe and the majority class."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from enc2gen.errors import ConfigError, DataError
from enc2gen.evaluation.probe import Labelled, fit_probe, linear_probe, majority_class

NAMES = np.array(["art", "sports", "travel"])


def layers(n: int, signal: int, seed: int, shift: float = 0.0) -> Labelled:
    """Four layers of noise, one of which (`signal`) also tells the label."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 3, n)
    states = rng.normal(size=(4, n, 12)) * 5 + 100
    states[signal, np.arange(n), gold] += 25 + shift
    return Labelled(states, NAMES[gold].tolist())


def test_probe_finds_the_layer_that_knows_and_predicts_other_sets() -> None:
    train, dev, test = layers(120, 2, 0), layers(60, 2, 1), layers(80, 2, 2, shift=3.0)
    probe, predictions = linear_probe(train, dev, {"kk": test.states})
    assert probe.layer == 2 and probe.dev_accuracy > 90
    assert np.mean(np.array(predictions["kk"]) == np.array(test.labels)) > 0.9
    assert fit_probe(train, dev, layers=[0]).dev_accuracy < 60
    assert fit_probe(train, dev, layers=[-2]).layer == 2


def test_predictions_are_scikit_learns_on_standardised_states() -> None:
    train, dev, test = layers(90, 1, 3), layers(30, 1, 4), layers(50, 1, 5)
    for part in (train, dev, test):
        np.asarray(part.states)[1] *= np.geomspace(0.01, 100, 12)  # scales that differ, as those of an encoder do
    probe = fit_probe(train, dev, layers=[1], penalties=[0.1])
    x, y = np.asarray(train.states)[1], np.asarray(test.states)[1]
    mean, deviation = x.mean(0), x.std(0)
    plain = LogisticRegression(C=0.1, max_iter=5000).fit((x - mean) / deviation, train.labels)
    assert probe.predict(test.states) == plain.predict((y - mean) / deviation).tolist()
    assert probe.predict(y) == probe.predict(test.states)


def test_penalty_is_chosen_on_the_development_set() -> None:
    rng = np.random.default_rng(6)
    gold = rng.integers(0, 2, 40)
    states = rng.normal(size=(40, 200))
    states[:, 0] += 2 * gold
    dev_gold = rng.integers(0, 2, 400)
    dev = rng.normal(size=(400, 200))
    dev[:, 0] += 2 * dev_gold
    train = Labelled(states, [str(g) for g in gold])
    scores = {
        c: fit_probe(train, Labelled(dev, [str(g) for g in dev_gold]), penalties=[c]).dev_accuracy
        for c in (1e-4, 1e-2, 1.0)
    }
    chosen = fit_probe(train, Labelled(dev, [str(g) for g in dev_gold]), penalties=[1.0, 1e-4, 1e-2])
    assert chosen.dev_accuracy == max(scores.values())
    assert chosen.penalty == min(c for c, score in scores.items() if score == max(scores.values()))


def test_layer_is_chosen_on_the_development_set() -> None:
    train, dev = layers(60, 1, 8), layers(60, 1, 9)
    states = np.array(train.states)
    states[3] = states[1]  # known by heart in the training set only
    assert fit_probe(Labelled(states, train.labels), dev).layer == 1


def test_of_equals_the_stronger_penalty_and_the_upper_layer_is_kept() -> None:
    states = np.tile(np.repeat([[-1.0], [1.0]], 10, axis=0), (3, 1, 2))
    known = Labelled(states, ["a"] * 10 + ["b"] * 10)
    probe = fit_probe(known, known, penalties=[1.0, 0.1])
    assert (probe.layer, probe.penalty, probe.dev_accuracy) == (2, 0.1, 100)


def test_majority_class() -> None:
    assert majority_class(["b", "a", "b", "a", "c"]) == "a"
    assert majority_class(["c", "b", "c"]) == "c"
    with pytest.raises(DataError, match="no training label"):
        majority_class([])


def test_what_does_not_fit_is_refused() -> None:
    good = layers(30, 0, 7)
    with pytest.raises(DataError, match="for 29 labels"):
        fit_probe(Labelled(good.states, good.labels[1:]), good)
    with pytest.raises(DataError, match="same label"):
        fit_probe(Labelled(good.states, ["a"] * 30), good)
    with pytest.raises(DataError, match="do not fit"):
        fit_probe(good, Labelled(np.asarray(good.states)[:2], good.labels))
    with pytest.raises(DataError, match="not finite"):
        fit_probe(Labelled(np.full((1, 2, 3), np.nan), ["a", "b"]), good)
    with pytest.raises(ConfigError, match="layers from 0 to 3"):
        fit_probe(good, good, layers=[9])
