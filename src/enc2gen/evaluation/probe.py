"""What a bridge is measured against: the majority class, and a linear probe on the encoder's own states.

The probe reads what the encoder knows without any LLM: a logistic regression on mean-pooled states of one layer,
trained on the same texts as the bridge. It is not a bound (a bridge sees every token, and more layers), but a bridge
below it leaves something unused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from enc2gen.errors import ConfigError, DataError
from enc2gen.evaluation.significance import Floats

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""scikit-learn's C, the inverse of the l2 penalty, of the probes that are tried (our choice)."""
_ITERATIONS = 2000  # of L-BFGS, more than standardised states need (our choice)


@dataclass(frozen=True)
class Labelled:
    """Texts as states, with their labels.

    Attributes:
        states: pooled states `[layers, n, hidden]`, or `[n, hidden]` of one layer; see
            `enc2gen.evaluation.alignment.read_sentences`.
        labels: n labels.
    """

    states: ArrayLike
    labels: Sequence[str]

    def layers(self, where: str) -> Floats:
        """`[layers, n, hidden]`; `DataError` if states and labels do not fit each other."""
        states = np.asarray(self.states, dtype=np.float64)
        states = states[None] if states.ndim == 2 else states
        if states.ndim != 3 or states.shape[1] != len(self.labels) or not len(self.labels):
            raise DataError(
                f"states of shape {states.shape} for {len(self.labels)} labels",
                where=where,
                remedy="give [layers, n, hidden] of at least one text",
            )
        if not np.isfinite(states).all():
            raise DataError("the states are not finite", where=where, remedy="run the encoder in float32")
        return states


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
        layer: index of the layer it reads, in the stack it was fitted on.
        penalty: its C, the inverse of the l2 penalty.
        dev_accuracy: its accuracy on the development set, 0-100: that by which layer and C were chosen.
        model: scikit-learn's pipeline: standardisation with the training set's means and deviations, then the map.
    """

    layer: int
    penalty: float
    dev_accuracy: float
    model: Pipeline

    def predict(self, states: ArrayLike) -> list[str]:
        """Labels of texts given as `[layers, n, hidden]`, the stack the probe was fitted on, or one layer's states."""
        array = np.asarray(states, dtype=np.float64)
        chosen = array[self.layer] if array.ndim == 3 else array
        return [str(label) for label in self.model.predict(chosen)]


def fit_probe(
    train: Labelled,
    dev: Labelled,
    *,
    layers: Sequence[int] | None = None,
    penalties: Sequence[float] = PENALTIES,
) -> Probe:
    """Fit a logistic regression for every layer and penalty, and keep the best on the development set.

    Both sets are the training language's, so the choice needs no text of another language. Of equals, the stronger
    penalty and then the upper layer is kept.

    Args:
        layers: of the stack to try; None: all. `[-1]` is the last.
        penalties: values of scikit-learn's C.

    Raises:
        DataError: states and labels do not fit each other, or the training set has one label only.
        ConfigError: no layer or penalty, or a layer that is not there.
    """
    stack, dev_stack = train.layers("train"), dev.layers("dev")
    if stack.shape[0] != dev_stack.shape[0] or stack.shape[2] != dev_stack.shape[2]:
        raise DataError(f"training states {stack.shape} and development states {dev_stack.shape} do not fit")
    if len(set(train.labels)) < 2:
        raise DataError("all training texts have the same label", where="train", remedy="give at least two labels")
    count = len(stack)
    tried = list(range(count)) if layers is None else [layer % count for layer in layers if -count <= layer < count]
    if not tried or not penalties or (layers is not None and len(tried) < len(layers)):
        raise ConfigError(
            f"cannot probe layers {layers} of {count} with C of {list(penalties)}",
            where="layers",
            remedy=f"name layers from 0 to {count - 1} and at least one C",
        )
    gold = np.asarray(list(dev.labels))
    best: Probe | None = None
    for layer in sorted(set(tried), reverse=True):
        for penalty in sorted(penalties):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=_ITERATIONS))
            model.fit(stack[layer], list(train.labels))
            score = 100.0 * float(np.mean(model.predict(dev_stack[layer]) == gold))
            if best is None or score > best.dev_accuracy:
                best = Probe(layer, penalty, score, model)
    assert best is not None
    return best


def linear_probe(
    train: Labelled,
    dev: Labelled,
    tests: Mapping[str, ArrayLike],
    *,
    layers: Sequence[int] | None = None,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[Probe, dict[str, list[str]]]:
    """:func:`fit_probe`, and its predictions for the states of every test set; raises likewise."""
    probe = fit_probe(train, dev, layers=layers, penalties=penalties)
    return probe, {name: probe.predict(states) for name, states in tests.items()}


def majority_class(train_labels: Sequence[str]) -> str:
    """The most frequent label, the first in the alphabet of equals; `DataError` if there is none."""
    if not train_labels:
        raise DataError("there is no training label", remedy="give the labels of the training texts")
    counts = Counter(train_labels)
    return min(counts, key=lambda label: (-counts[label], label))
