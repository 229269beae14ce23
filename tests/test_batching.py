"""Batches: padding, budgets, and a stream that loses nothing and resumes anywhere."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from enc2gen.data.batching import (
    Batch,
    BatchingConfig,
    BatchStream,
    EncodedExample,
    collate,
    evaluation_batches,
    source_fingerprint,
)
from enc2gen.data.mixture import BLOCK, MixtureSampler
from enc2gen.errors import CheckpointError, DataError

PAD = 1
SIZES = {"denoising:kk": 50, "translation:en-kk": 23}
CONFIG = BatchingConfig(max_tokens=120, buffer_batches=4)
LARGE = BatchingConfig(max_tokens=400, buffer_batches=32)


def example(source: int, target: int, first: int = 100) -> EncodedExample:
    """An example of the given lengths without the pad id in it."""
    labels = tuple(range(first, first + target))
    return EncodedExample(tuple(range(first, first + source)), (7, *labels[:-1]), labels)


def encode(stream: str, item: int, rng: np.random.Generator) -> EncodedExample:
    """A source that names its item, and a target; the item gives the source's length, `rng` the target's."""
    kind = 2 if stream.startswith("denoising") else 3
    noise = rng.integers(100, 10**6, size=1 + item % 9).tolist()
    labels = tuple(rng.integers(100, 10**6, size=int(rng.integers(1, 12))).tolist())
    return EncodedExample((kind, item + 1000, *noise), (7, *labels[:-1]), labels)


def make_stream(**changes: object) -> BatchStream:
    arguments: dict = {
        "encode": encode,
        "sampler": MixtureSampler(SIZES, seed=1),
        "pad_token_id": PAD,
        "config": CONFIG,
        "seed": 5,
        "fingerprint_parts": {"corpus": "abc", "noise": {"mask_ratio": 0.35}},
    }
    return BatchStream(**{**arguments, **changes})


def same(first: Batch, second: Batch) -> bool:
    a, b = first.as_model_inputs(), second.as_model_inputs()
    return all(torch.equal(a[name], b[name]) for name in a)


def rows(batch: Batch) -> list[tuple[int, ...]]:
    """The unpadded source rows."""
    pairs = zip(batch.input_ids.tolist(), batch.attention_mask.sum(dim=1).tolist(), strict=True)
    return [tuple(row[:length]) for row, length in pairs]


# Padding


def test_collate_by_hand() -> None:
    batch = collate([EncodedExample((5, 6, 7), (8,), (9,)), EncodedExample((5,), (8, 10), (10, 2))], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7], [5, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.decoder_input_ids.tolist() == [[8, PAD], [8, 10]]
    assert batch.decoder_attention_mask.tolist() == [[1, 0], [1, 1]]
    assert batch.labels.tolist() == [[9, -100], [10, 2]]
    assert (batch.num_target_tokens, batch.num_tokens) == (3, 7)
    assert all(tensor.dtype == torch.long for tensor in batch.as_model_inputs().values())


lengths = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=40)


@given(lengths)
def test_padding_never_leaks_into_labels_and_a_pad_id_in_the_text_stays(sizes: list[tuple[int, int]]) -> None:
    # Here every text is made of the pad id itself: masks must come from lengths, not from ids.
    examples = [EncodedExample((PAD,) * source, (PAD,) * target, (PAD,) * target) for source, target in sizes]
    batch = collate(examples, PAD)
    assert batch.num_target_tokens == sum(target for _, target in sizes)
    assert batch.num_tokens == sum(source + target for source, target in sizes)
    assert torch.equal(batch.labels != -100, batch.decoder_attention_mask.bool())
    assert batch.decoder_attention_mask.sum(dim=1).tolist() == [target for _, target in sizes]


def test_a_batch_moves_to_a_device_with_its_order() -> None:
    batch = collate([example(2, 3)], PAD, order=[4]).to("meta")
    assert batch.order == (4,)
    assert {tensor.device.type for tensor in batch.as_model_inputs().values()} == {"meta"}


def test_impossible_examples_are_refused() -> None:
    with pytest.raises(DataError, match="0 source"):
        EncodedExample((), (1,), (1,))
    with pytest.raises(DataError, match="2 decoder inputs for 1 labels"):
        EncodedExample((1,), (1, 2), (1,))
    with pytest.raises(DataError, match="at least one"):
        collate([], PAD)


# Evaluation batches


@settings(deadline=None)
@given(lengths, st.integers(40, 200), st.none() | st.integers(1, 5))
def test_evaluation_batches_hold_every_example_once_within_budget(
    sizes: list[tuple[int, int]], max_tokens: int, max_examples: int | None
) -> None:
    examples = [example(source, target, 100 * i + 100) for i, (source, target) in enumerate(sizes)]
    batches = evaluation_batches(examples, PAD, max_tokens, max_examples)
    assert sorted(index for batch in batches for index in batch.order) == list(range(len(sizes)))
    for batch in batches:
        assert batch.input_ids.numel() + batch.labels.numel() <= max_tokens
        assert max_examples is None or len(batch.input_ids) <= max_examples
        assert rows(batch) == [examples[index].input_ids for index in batch.order]
    again = evaluation_batches(examples, PAD, max_tokens, max_examples)
    assert all(same(a, b) and a.order == b.order for a, b in zip(batches, again, strict=True))


def test_evaluation_batches_start_with_the_longest_and_fill_the_budget() -> None:
    batches = evaluation_batches([example(2, 2), example(9, 9), example(2, 2), example(2, 2)], PAD, 18)
    assert [batch.order for batch in batches] == [(1,), (0, 2, 3)]
    assert evaluation_batches([], PAD, 18) == []


def test_an_example_over_the_budget_says_so() -> None:
    with pytest.raises(DataError, match=r"example 1: 30 source and 20 target .*\n.*max_tokens to 50 or more"):
        evaluation_batches([example(2, 2), example(30, 20)], PAD, 40)
    stream = make_stream(encode=lambda stream, item, rng: example(100, 100))
    with pytest.raises(DataError, match=r"item \d+ of '(denoising:kk|translation:en-kk)'.*\n.*200 or more"):
        next(stream)


# The training stream


@settings(max_examples=30, deadline=None)
@given(
    st.integers(40, 300),
    st.none() | st.integers(1, 9),
    st.integers(1, 20),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_budgets_hold(max_tokens: int, max_examples: int | None, buffer: int, noise: float, seed: int) -> None:
    config = BatchingConfig(max_tokens=max_tokens, max_examples=max_examples, buffer_batches=buffer, length_noise=noise)
    for batch in islice(make_stream(config=config, seed=seed), 30):
        count = len(batch.input_ids)
        assert count * (batch.input_ids.shape[1] + batch.labels.shape[1]) <= max_tokens
        assert max_examples is None or count <= max_examples


def test_examples_alone_can_be_the_budget() -> None:
    stream = make_stream(config=BatchingConfig(max_tokens=None, max_examples=4, buffer_batches=3))
    assert [len(batch.input_ids) for batch in islice(stream, 9)] == [4] * 9


def test_no_example_is_lost_or_repeated_within_an_epoch() -> None:
    config = BatchingConfig(max_tokens=None, max_examples=5, buffer_batches=5)
    stream = make_stream(sampler=MixtureSampler({"denoising:kk": 50}, seed=3), config=config)
    for _ in range(3):  # 50 examples are two buffers of 25
        items = [row[1] - 1000 for batch in islice(stream, 10) for row in rows(batch)]
        assert sorted(items) == list(range(50))


def test_every_position_is_in_exactly_one_batch_with_a_token_budget() -> None:
    sampler = MixtureSampler(SIZES, seed=1)
    stream = make_stream()
    seen: list[tuple[int, ...]] = []
    while True:
        seen += rows(next(stream))
        state = stream.state_dict()
        if len(seen) > 200 and state["batches_taken"] == len(stream._batches):
            break
    expected = [
        encode(*sampler.sample(position), np.random.default_rng([5, 3, position])).input_ids
        for position in range(len(seen))
    ]
    assert Counter(seen) == Counter(expected)


def test_the_state_at_every_step_leads_to_the_same_batches() -> None:
    reference = make_stream()
    states, batches = [], []
    for _ in range(40):
        states.append(json.dumps(reference.state_dict()))
        batches.append(next(reference))
    assert len({json.loads(state)["buffer_start"] for state in states}) > 3  # over several buffers
    for step, state in enumerate(states):
        resumed = make_stream()
        next(resumed)  # wherever it was before
        resumed.load_state_dict(json.loads(state))
        assert resumed.state_dict() == json.loads(state)
        for expected, found in zip(batches[step:], islice(resumed, 12), strict=False):
            assert same(expected, found)


def test_two_streams_agree_and_seeds_differ() -> None:
    first, again, other = (list(islice(make_stream(seed=seed), 12)) for seed in (5, 5, 6))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))


def test_an_item_gets_new_noise_in_every_epoch() -> None:
    config = BatchingConfig(max_tokens=None, max_examples=5, buffer_batches=1)
    stream = make_stream(sampler=MixtureSampler({"denoising:kk": 5}, seed=3), config=config)
    first, second = ({row[1]: row for row in rows(next(stream))} for _ in range(2))
    assert first.keys() == second.keys()
    assert all(first[item] != second[item] for item in first)


def test_buffering_saves_padding_and_batches_are_shuffled() -> None:
    def padded_share(buffer_batches: int) -> float:
        config = BatchingConfig(max_tokens=400, buffer_batches=buffer_batches)
        batches = list(islice(make_stream(config=config), 60))
        padded = sum(batch.input_ids.numel() + batch.labels.numel() for batch in batches)
        return 1 - sum(batch.num_tokens for batch in batches) / padded

    assert padded_share(32) < 0.6 * padded_share(1)  # though source and target lengths are independent
    widths = [batch.input_ids.shape[1] for batch in islice(make_stream(config=LARGE), 30)]
    assert sum(a > b for a, b in pairwise(widths)) > 8  # unshuffled, sources would get longer and longer


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 6}, "seed"),
        ({"sampler": MixtureSampler(SIZES, seed=2)}, "seed"),
        ({"sampler": MixtureSampler(SIZES, alpha=0.5, seed=1)}, "mixture"),
        ({"sampler": MixtureSampler({**SIZES, "denoising:kk": 51}, seed=1)}, "stream sizes"),
        ({"config": BatchingConfig(max_tokens=121, buffer_batches=4)}, "batching.max_tokens"),
        ({"pad_token_id": 0}, "pad_token_id"),
        ({"fingerprint_parts": {"corpus": "abd", "noise": {"mask_ratio": 0.35}}}, "data.corpus"),
        ({"fingerprint_parts": {"corpus": "abc"}}, "data.noise"),
    ],
)
def test_a_state_of_other_data_or_settings_is_refused_and_names_the_change(change: dict, named: str) -> None:
    saved, other = make_stream(), make_stream(**change)
    assert saved.fingerprint != other.fingerprint
    assert make_stream().fingerprint == saved.fingerprint
    with pytest.raises(CheckpointError, match=rf"different:.*{named}"):
        other.load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    "damage",
    [
        {"buffer_start": None},
        {"buffer_start": -1},
        {"batches_taken": 10**6},
        {"batches_taken": -1},
        {"sampler": {}},
    ],
)
def test_a_damaged_state_is_refused(damage: dict) -> None:
    stream = make_stream()
    with pytest.raises(CheckpointError):
        stream.load_state_dict({**stream.state_dict(), **damage})
    with pytest.raises(CheckpointError, match="malformed"):
        stream.load_state_dict({})


def test_the_config_needs_a_budget_and_refuses_unknown_keys() -> None:
    with pytest.raises(ValidationError, match="max_tokens or max_examples"):
        BatchingConfig(max_tokens=None)
    with pytest.raises(ValidationError, match="batch_size"):
        BatchingConfig(batch_size=8)


def test_a_far_position_is_reached_without_replaying_the_past() -> None:
    calls = 0

    def counting(stream: str, item: int, rng: np.random.Generator) -> EncodedExample:
        nonlocal calls
        calls += 1
        return encode(stream, item, rng)

    stream = make_stream(encode=counting)
    far = {**stream.state_dict(), "buffer_start": 5_000_000}
    started = time.perf_counter()
    stream.load_state_dict(far)
    next(stream)
    assert calls < 200
    assert time.perf_counter() - started < 5


def test_a_saved_position_spares_counting_the_past_of_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make_stream()
    stream.load_state_dict({**stream.state_dict(), "buffer_start": 100 * BLOCK - 5})
    list(islice(stream, 20))
    sampler, counted = MixtureSampler(SIZES, seed=1), []
    choose = sampler._choose
    monkeypatch.setattr(sampler, "_choose", lambda block: counted.append(block) or choose(block))
    make_stream(sampler=sampler).load_state_dict(stream.state_dict())
    assert set(counted) == {100}


def test_fingerprints_of_sources() -> None:
    class Mapped(list):
        _fingerprint = "from the cache"

    assert source_fingerprint(["a", "b"]) == source_fingerprint(("a", "b"))
    assert source_fingerprint(["a", "b"]) != source_fingerprint(["b", "a"])
    assert source_fingerprint(["ab"]) != source_fingerprint(["a", "b"])
    assert source_fingerprint(Mapped("x")) == "from the cache"


def test_a_datasets_dataset_is_a_source() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"ids": [5, 6, item + 10]} for item in range(20)])

    def from_table(stream: str, item: int, rng: np.random.Generator) -> EncodedExample:
        ids = tuple(table[item]["ids"])
        return EncodedExample(ids, ids, ids)

    stream = make_stream(
        encode=from_table,
        sampler=MixtureSampler({"denoising:kk": len(table)}),
        config=BatchingConfig(max_tokens=None, max_examples=5, buffer_batches=2),
        fingerprint_parts={"corpus": source_fingerprint(table)},
    )
    assert sorted(row[2] for batch in islice(stream, 4) for row in rows(batch)) == list(range(10, 30))
