"""Mixing: frequencies follow the formula, epochs lose nothing, positions depend on nothing but themselves."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from enc2gen.data.mixture import BLOCK, MixtureConfig, MixtureSampler, mixture_probabilities
from enc2gen.errors import CheckpointError, ConfigError, DataError

# Samples per language in the paper (arXiv 2502.10852, table 6), and the shares that a = 0.3 gives.
PAPER = {"bo": 184_045, "ug": 90_441, "kk": 57_827, "mn": 171_847, "zh": 836_075}
PAPER_SHARES = {"bo": 0.197, "ug": 0.159, "kk": 0.139, "mn": 0.193, "zh": 0.311}
SIZES = {"translation:en-kk": 700, "translation:en-ug": 40, "denoising:kk": 9000, "denoising:bo": 150}
# 99.9 % quantile of chi-square with 3 degrees of freedom.
CHI_SQUARE_3 = 16.27


def chi_square(counts: Counter[str], probabilities: dict[str, float]) -> float:
    total = sum(counts.values())
    return sum((counts[name] - total * p) ** 2 / (total * p) for name, p in probabilities.items())


def test_probabilities_of_the_papers_corpora() -> None:
    probabilities = mixture_probabilities(PAPER)
    assert {name: round(p, 3) for name, p in probabilities.items()} == PAPER_SHARES


def test_alpha_one_keeps_shares_and_alpha_zero_levels_them() -> None:
    sizes = {"a": 1, "b": 3}
    assert mixture_probabilities(sizes, 1.0) == pytest.approx({"a": 0.25, "b": 0.75})
    assert mixture_probabilities(sizes, 0.0) == pytest.approx({"a": 0.5, "b": 0.5})
    assert mixture_probabilities(sizes, 0.5)["b"] == pytest.approx(3**0.5 / (1 + 3**0.5))


@given(st.dictionaries(st.text(min_size=1), st.integers(1, 10**9), min_size=1), st.floats(0, 50))
def test_probabilities_sum_to_one_and_never_reverse_sizes(sizes: dict[str, int], alpha: float) -> None:
    probabilities = mixture_probabilities(sizes, alpha)
    assert sum(probabilities.values()) == pytest.approx(1.0)
    by_size = sorted(sizes, key=sizes.__getitem__)
    ordered = [probabilities[name] for name in by_size]
    assert all(a <= b + 1e-12 for a, b in pairwise(ordered))


def test_objective_weights_share_the_mass_and_alpha_works_within() -> None:
    probabilities = mixture_probabilities(SIZES, 0.3, {"translation": 1, "denoising": 3})
    translation = probabilities["translation:en-kk"] + probabilities["translation:en-ug"]
    assert translation == pytest.approx(0.25)
    ratio = probabilities["translation:en-kk"] / probabilities["translation:en-ug"]
    assert ratio == pytest.approx((700 / 40) ** 0.3)


@pytest.mark.parametrize("weights", [None, {"translation": 1.0, "denoising": 3.0}])
def test_draws_follow_the_formula(weights: dict[str, float] | None) -> None:
    sampler = MixtureSampler(SIZES, 0.3, seed=7, objective_weights=weights)
    counts = Counter(sampler.sample(index)[0] for index in range(20_000))
    if weights is None:
        powers = {name: size**0.3 for name, size in SIZES.items()}
        expected = {name: power / sum(powers.values()) for name, power in powers.items()}
    else:
        expected = dict(sampler.probabilities)
    assert chi_square(counts, expected) < CHI_SQUARE_3


def test_successive_draws_are_independent() -> None:
    sampler = MixtureSampler({"a": 10, "b": 10}, seed=3)
    draws = [sampler.sample(index)[0] for index in range(20_000)]
    pairs = Counter(a + b for a, b in pairwise(draws))
    assert chi_square(pairs, dict.fromkeys(["aa", "ab", "ba", "bb"], 0.25)) < 25


def test_a_weight_of_zero_leaves_the_objective_out() -> None:
    sampler = MixtureSampler(SIZES, seed=1, objective_weights={"translation": 1, "denoising": 0})
    assert all(sampler.sample(index)[0].startswith("translation:") for index in range(5000))


def test_every_epoch_of_every_stream_has_each_item_once_in_a_new_order() -> None:
    sizes = {"a:x": 5, "b:y": 61, "c:z": 300}
    sampler = MixtureSampler(sizes, seed=5)
    items: dict[str, list[int]] = defaultdict(list)
    for index in range(3 * BLOCK):
        stream, item = sampler.sample(index)
        items[stream].append(item)
    for stream, size in sizes.items():
        drawn = items[stream]
        epochs = [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)]
        assert len(epochs) > 10
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        distinct = len({tuple(epoch) for epoch in epochs})
        assert distinct > 0.9 * min(len(epochs), math.factorial(size))


def test_sample_is_a_pure_function_of_its_index() -> None:
    indices = [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 17, 10 * BLOCK + 5]
    ascending = MixtureSampler(SIZES, seed=2)
    expected = {index: ascending.sample(index) for index in range(10 * BLOCK + 6)}
    for index in reversed(indices):
        assert MixtureSampler(SIZES, seed=2).sample(index) == expected[index]
        assert ascending.sample(index) == expected[index]


def test_the_order_of_the_streams_does_not_matter_but_the_seed_does() -> None:
    turned = dict(reversed(SIZES.items()))
    draws = [MixtureSampler(sizes, seed=2).sample(index) for index in range(50) for sizes in (SIZES, turned)]
    assert draws[::2] == draws[1::2]
    other = MixtureSampler(SIZES, seed=3)
    assert [other.sample(index) for index in range(50)] != draws[::2]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 6 * BLOCK), st.integers(0, 100))
def test_a_restored_sampler_continues_exactly(position: int, seed: int) -> None:
    before = MixtureSampler(SIZES, seed=seed)
    before.sample(position)
    state = json.loads(json.dumps(before.state_dict(position)))
    after = MixtureSampler(SIZES, seed=seed)
    after.load_state_dict(state)
    for index in (position, position + 1, position + BLOCK, max(0, position - BLOCK)):
        assert after.sample(index) == MixtureSampler(SIZES, seed=seed).sample(index)


def test_a_restored_sampler_does_not_count_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    position = 500 * BLOCK
    state = MixtureSampler(SIZES).state_dict(position)
    restored, counted = MixtureSampler(SIZES), []
    choose = restored._choose
    monkeypatch.setattr(restored, "_choose", lambda block: counted.append(block) or choose(block))
    restored.load_state_dict(state)
    restored.sample(position)
    assert set(counted) == {500}


def order_of(stream: str, sizes: dict[str, int]) -> list[int]:
    """The first epoch of a stream."""
    sampler = MixtureSampler(sizes, seed=4)
    draws = (sampler.sample(index) for index in range(BLOCK))
    return [item for name, item in draws if name == stream][: sizes[stream]]


def test_streams_of_one_size_have_their_own_order_which_other_streams_do_not_change() -> None:
    sizes = {"translation:en-kk": 50, "translation:en-ug": 50}
    kazakh = order_of("translation:en-kk", sizes)
    assert kazakh != order_of("translation:en-ug", sizes)
    assert kazakh == order_of("translation:en-kk", {**sizes, "denoising:bo": 80})


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"block": 1},
        {"block": 0, "drawn": {"other": 0}},
        {"block": 1, "drawn": dict.fromkeys(SIZES, 5)},
        {"block": -1, "drawn": dict.fromkeys(SIZES, -BLOCK // 4)},
        {"block": "x", "drawn": {}},
        {"block": 0, "drawn": 3},
    ],
)
def test_a_foreign_or_broken_state_is_refused(state: dict) -> None:
    with pytest.raises(CheckpointError):
        MixtureSampler(SIZES).load_state_dict(state)


def test_an_objective_without_a_stream_may_be_weighed_with_zero_only() -> None:
    weights = {"translation": 1.0, "denoising": 3.0}
    assert mixture_probabilities(SIZES, 0.3, {**weights, "ul2": 0.0}) == mixture_probabilities(SIZES, 0.3, weights)
    with pytest.raises(ConfigError, match="'ul2', which no stream has"):
        mixture_probabilities(SIZES, 0.3, {**weights, "ul2": 0.1})


def test_wrong_sizes_and_weights_are_refused_with_a_remedy() -> None:
    with pytest.raises(DataError, match="no stream"):
        mixture_probabilities({})
    with pytest.raises(DataError, match="'denoising:bo' has no items"):
        mixture_probabilities({"denoising:bo": 0})
    with pytest.raises(ConfigError, match="did you mean 'denoising'"):
        mixture_probabilities(SIZES, 0.3, {"translation": 1, "denoisng": 1})
    with pytest.raises(ConfigError, match="no weight for denoising"):
        mixture_probabilities(SIZES, 0.3, {"translation": 1})
    for weights in ({"translation": 0, "denoising": 0}, {"translation": -1, "denoising": 2}):
        with pytest.raises(ConfigError, match="0 or more"):
            mixture_probabilities(SIZES, 0.3, weights)
    for alpha in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="alpha"):
            mixture_probabilities(SIZES, alpha)
    with pytest.raises(ConfigError, match="seed"):
        MixtureSampler(SIZES, seed=-1)


def test_the_config_refuses_unknown_keys() -> None:
    assert MixtureConfig().alpha == 0.3
    with pytest.raises(ValidationError, match="temperature"):
        MixtureConfig(temperature=5)


def test_shuffling_is_uniform() -> None:
    # Where item 0 of a 4-item stream stands, over the epochs: each place equally often.
    sampler = MixtureSampler({"a": 4}, seed=11)
    items = np.array([sampler.sample(index)[1] for index in range(16_000)]).reshape(-1, 4)
    places = Counter(str(place) for place in np.argmax(items == 0, axis=1))
    assert chi_square(places, dict.fromkeys("0123", 0.25)) < CHI_SQUARE_3
