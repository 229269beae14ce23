"""Bridge batches: paddings of two vocabularies, and states that are known already."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from enc2gen.data.batching import BatchingConfig, BatchStream, EncodedExample
from enc2gen.data.bridge import bridge_evaluation_batches, collate_bridge
from enc2gen.data.mixture import MixtureSampler
from enc2gen.errors import DataError

ENCODER_PAD, LLM_PAD, EOS = 1, 9, 9  # the LLM pads with its end token, as SmolLM2 does


def example(source: Sequence[int], target: Sequence[int], prompt: Sequence[int] = ()) -> EncodedExample:
    labels = (*[-100] * len(prompt), *target, EOS)
    return EncodedExample(tuple(source), (0, *prompt, *target), labels)


SHORT, LONG = example([5, 6], [7]), example([5, 6, 7, 8], [3, 4, 5], prompt=[2, 2])


class Table:
    """Keeps one row of numbers a token: 10 x id."""

    def lookup(self, sources: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        batch = torch.zeros(len(sources), max(map(len, sources)), 1)
        for row, source in enumerate(sources):
            batch[row, : len(source), 0] = 10 * torch.tensor(source)
        return {"fused_states": batch}


def test_each_side_is_padded_with_its_own_id_and_masked_by_position() -> None:
    batch = collate_bridge([SHORT, LONG], ENCODER_PAD, LLM_PAD)
    assert batch.input_ids.tolist() == [[5, 6, 1, 1], [5, 6, 7, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.decoder_input_ids.tolist() == [[0, 7, 9, 9, 9, 9], [0, 2, 2, 3, 4, 5]]
    assert batch.decoder_attention_mask.tolist() == [[1, 1, 0, 0, 0, 0], [1] * 6]
    assert batch.labels.tolist() == [[7, 9, -100, -100, -100, -100], [-100, -100, 3, 4, 5, 9]]


def test_the_end_counts_as_a_target_and_padding_and_prompt_do_not() -> None:
    batch = collate_bridge([SHORT, LONG], ENCODER_PAD, LLM_PAD)
    assert batch.num_target_tokens == 2 + 4
    assert batch.num_tokens == 2 + 4 + 2 + 6


def test_a_real_token_with_the_id_of_the_encoders_padding_stays() -> None:
    inputs = collate_bridge([example([1, 5], [1]), LONG], ENCODER_PAD, LLM_PAD).as_model_inputs()
    assert inputs["attention_mask"][0].tolist() == [1, 1, 0, 0]
    assert inputs["decoder_input_ids"][0].tolist() == [0, 1, 9, 9, 9, 9]


def test_known_states_reach_the_model_and_survive_a_move() -> None:
    batch = collate_bridge([SHORT, LONG], ENCODER_PAD, LLM_PAD, Table()).to("cpu")
    inputs = batch.as_model_inputs()
    assert inputs["fused_states"][..., 0].tolist() == [[50, 60, 0, 0], [50, 60, 70, 80]]
    assert "fused_states" not in collate_bridge([SHORT], ENCODER_PAD, LLM_PAD).as_model_inputs()


def test_evaluation_batches_hold_each_example_once_and_lead_back() -> None:
    examples = [SHORT, LONG, SHORT, LONG, SHORT]
    batches = bridge_evaluation_batches(examples, ENCODER_PAD, LLM_PAD, Table(), max_tokens=None, max_examples=2)
    assert sorted(index for batch in batches for index in batch.order) == [0, 1, 2, 3, 4]
    for batch in batches:
        for row, index in enumerate(batch.order):
            assert batch.sources[row] == examples[index].input_ids
            labels = [
                label for label, read in zip(batch.labels[row], batch.decoder_attention_mask[row], strict=True) if read
            ]
            assert tuple(labels) == examples[index].labels
    with pytest.raises(DataError, match="10 source"):
        bridge_evaluation_batches([example(range(10), [3])], ENCODER_PAD, LLM_PAD, max_tokens=8)


def test_the_training_stream_takes_it_as_its_collate() -> None:
    collate = partial(collate_bridge, llm_pad_id=LLM_PAD, cache=Table())
    stream = BatchStream(
        lambda _, item, __: [SHORT, LONG][item],
        MixtureSampler({"task": 2}, 1.0, 0),
        ENCODER_PAD,
        BatchingConfig(max_tokens=None, max_examples=2, buffer_batches=2),
        0,
        {},
        collate,
    )
    inputs = next(stream).as_model_inputs()
    assert set(inputs["fused_states"].unique().tolist()) <= {0.0, 50.0, 60.0, 70.0, 80.0}
    assert inputs["decoder_input_ids"].shape == inputs["labels"].shape


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        collate_bridge([], ENCODER_PAD, LLM_PAD)
