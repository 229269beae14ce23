"""Training on real tokens only: against every pair alone, for each family of encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conftest import tiny_encoder
from enc2gen import SwcmForConditionalGeneration
from enc2gen.data.batching import IGNORED_LABEL
from enc2gen.errors import CheckpointError, ConfigError, ModelError
from enc2gen.models.dropout import drawn_mask
from enc2gen.models.extra_losses import ContrastiveConfig, ExtraLosses
from enc2gen.models.padding_free import SequencePair, Sequences
from enc2gen.models.training_attention import separates_sequences
from enc2gen.training import Trainer
from enc2gen.training.runtime import gradient_checkpointing
from test_donors import grow, tiny
from training_toys import ToySeq2Seq, ToyStream, config, validation

FAMILIES = ["bert", "xlm-roberta", "modernbert", "eurobert", "xlm-roberta-xl"]
SOURCES, TARGETS = (11, 1, 7, 11, 4), (3, 12, 12, 1, 6)


def encoder(family: str) -> PreTrainedModel:
    return tiny_encoder(family) if family in ("bert", "xlm-roberta") else tiny(family)


def model_of(family: str, **options: Any) -> SwcmForConditionalGeneration:
    return grow(encoder(family), dropout=0.0, **options).train()


def padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def batch(pad: int, sources: tuple[int, ...] = SOURCES, targets: tuple[int, ...] = TARGETS) -> dict[str, Tensor]:
    """Pairs of these lengths, padded on the right."""
    draw = torch.Generator().manual_seed(1)
    read, written, labels = (
        [torch.randint(6, 110, (length,), generator=draw) for length in lengths]
        for lengths in (sources, targets, targets)
    )
    return {
        "input_ids": padded(read, pad),
        "attention_mask": padded([torch.ones_like(row) for row in read], 0),
        "decoder_input_ids": padded(written, pad),
        "decoder_attention_mask": padded([torch.ones_like(row) for row in written], 0),
        "labels": padded(labels, IGNORED_LABEL),
    }


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One pair without its padding."""
    source, target = (int(inputs[name][row].sum()) for name in ("attention_mask", "decoder_attention_mask"))
    return {
        name: tensor[row : row + 1, : source if name in ("input_ids", "attention_mask") else target]
        for name, tensor in inputs.items()
    }


def loss_and_gradients(model: Any, inputs: list[dict[str, Tensor]], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses = [model(**one, label_smoothing=0.1, **options).loss for one in inputs]
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_learns_as_if_it_were_alone(family: str) -> None:
    model = model_of(family)
    inputs = batch(model.config.pad_token_id)
    expected = loss_and_gradients(model, [alone(inputs, row) for row in range(len(SOURCES))])
    model.padding_free = True
    assert_equal(loss_and_gradients(model, [inputs]), expected)


def test_layers_see_real_tokens_only() -> None:
    model = model_of("xlm-roberta")
    model.padding_free = True
    seen: dict[str, set[tuple[int, ...]]] = {"encoder": set(), "decoder": set()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            side = name.split(".")[0]
            module.register_forward_hook(lambda _, given, __, side=side: seen[side].add(tuple(given[0].shape[:2])))
    model(**batch(1), label_smoothing=0.0)
    assert seen == {"encoder": {(1, sum(SOURCES))}, "decoder": {(1, sum(TARGETS)), (1, sum(SOURCES))}}


@pytest.mark.parametrize("sources, targets", [((5, 5, 5), (7, 7, 7)), ((6,), (2,)), ((3, 9), (4, 4))])
def test_batches_without_padding(sources: tuple[int, ...], targets: tuple[int, ...]) -> None:
    model = model_of("xlm-roberta")
    inputs = batch(1, sources, targets)
    expected = loss_and_gradients(model, [inputs])
    model.padding_free = True
    assert_equal(loss_and_gradients(model, [inputs]), expected)


def test_padding_may_be_on_the_left() -> None:
    model = model_of("modernbert")
    inputs = batch(model.config.pad_token_id)
    model.padding_free = True
    expected = loss_and_gradients(model, [inputs])
    turned = {name: tensor.clone() for name, tensor in inputs.items()}
    for mask, names in (
        ("attention_mask", ("input_ids",)),
        ("decoder_attention_mask", ("decoder_input_ids", "labels")),
    ):
        for row, length in enumerate(inputs[mask].sum(1).tolist()):
            for name in (*names, mask):
                turned[name][row] = inputs[name][row].roll(inputs[name].shape[1] - length)
    assert_equal(loss_and_gradients(model, [turned]), expected)


@pytest.mark.parametrize("family", ["xlm-roberta", "modernbert"])
def test_checkpointed_layers_have_the_same_gradients(family: str) -> None:
    model = model_of(family)
    inputs = batch(model.config.pad_token_id)
    model.padding_free = True
    expected = loss_and_gradients(model, [inputs])
    gradient_checkpointing(model, enable=True)
    assert_equal(loss_and_gradients(model, [inputs]), expected)


@pytest.mark.parametrize(
    "extra",
    [ExtraLosses(r_drop=1.0), ExtraLosses(contrastive=ContrastiveConfig()), ExtraLosses(2.0, ContrastiveConfig())],
)
def test_extra_losses_are_those_of_padded_batches(extra: ExtraLosses) -> None:
    model = model_of("xlm-roberta", languages=["kk", "ug"])
    inputs = batch(1, (11, 2, 7) * 2, (3, 12, 8) * 2)  # R-Drop compares halves, here of different sources
    languages = model.config.language_ids
    inputs["input_ids"][:, 1], inputs["decoder_input_ids"][:, 0] = languages["kk"], languages["ug"]
    expected = loss_and_gradients(model, [inputs], extra_losses=extra)
    assert not torch.allclose(expected[0], loss_and_gradients(model, [inputs])[0])
    model.padding_free = True
    assert_equal(loss_and_gradients(model, [inputs], extra_losses=extra), expected)


def test_dropout_is_drawn_for_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = grow(encoder("xlm-roberta"), dropout=0.3).train()
    model.padding_free = True
    drawn: list[tuple[int, ...]] = []

    def remembering(states: Tensor, rate: float) -> Any:
        drawn.append(tuple(states.shape))
        return drawn_mask(states, rate)

    monkeypatch.setattr("enc2gen.models.dropout.drawn_mask", remembering)
    model(**batch(1), label_smoothing=0.0)
    assert {shape[:2] for shape in drawn} == {(1, sum(SOURCES)), (1, sum(TARGETS))}


def test_masks_may_be_missing_and_labels_make_tokens() -> None:
    model = model_of("xlm-roberta")
    inputs = batch(1, (6, 6), (4, 4))
    expected = loss_and_gradients(model, [inputs])
    model.padding_free = True
    masks = ("attention_mask", "decoder_attention_mask")
    bare = {name: tensor for name, tensor in inputs.items() if name not in masks}
    assert_equal(loss_and_gradients(model, [bare]), expected)
    short = {**inputs, "decoder_attention_mask": inputs["decoder_attention_mask"].clone()}
    short["decoder_attention_mask"][:, -1] = 0  # a target stands there all the same
    assert_equal(loss_and_gradients(model, [short]), expected)


def test_other_inputs_are_not_lost() -> None:
    model = model_of("bert")
    inputs = batch(1)
    types = (torch.arange(inputs["input_ids"].shape[1]) % 2).expand_as(inputs["input_ids"])
    expected = loss_and_gradients(model, [inputs], token_type_ids=types)
    model.padding_free = True
    assert_equal(loss_and_gradients(model, [inputs], token_type_ids=types), expected)


def test_evaluation_is_untouched() -> None:
    model = model_of("xlm-roberta").eval()
    model.padding_free = True
    seen: list[tuple[int, ...]] = []
    model.decoder.layers[0].register_forward_hook(lambda _, given, __: seen.append(tuple(given[0].shape[:2])))
    model(**batch(1), label_smoothing=0.0)
    assert seen == [(len(TARGETS), max(TARGETS))]


def test_tokens_go_there_and_back() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]])
    sequences = Sequences(mask)
    states = torch.arange(9.0).view(3, 3, 1).requires_grad_()
    joined = sequences.join(states)
    assert joined.flatten().tolist() == [0.0, 1.0, 7.0, 8.0]
    assert sequences.positions.tolist() == [[0, 1, 0, 1]]
    back = sequences.split(joined * 2)
    assert torch.equal(back[mask.bool()], 2 * states[mask.bool()])
    (back * torch.arange(9.0).view(3, 3, 1)).sum().backward()
    assert states.grad is not None
    assert states.grad.flatten().tolist() == [0.0, 2.0, 0, 0, 0, 0, 0, 14.0, 16.0]


def test_masks_hide_padding_what_follows_and_what_is_far() -> None:
    sequences = Sequences(torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]))
    pair = SequencePair(sequences, sequences)
    causal, near = pair.mask(causal=True, window=2), pair.mask(causal=False, window=2)
    assert causal is not None and near is not None
    assert causal[0, 0, 1:, 1:].tolist() == [[True, False, False], [True, True, False], [False, True, True]]
    assert near[0, 0, 1:, 1:].tolist() == [[True, True, False], [True, True, True], [False, True, True]]
    assert causal[1, 0, :2].tolist() == [[True, False, False, False], [True, True, False, False]]


@pytest.mark.parametrize("family", ["xlm-roberta", "modernbert"])
def test_flash_attention_is_told_the_limits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, windows = [], set()

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        assert mask is None
        windows.add((module.is_causal, options.get("sliding_window")))
        calls.append((module.is_causal, {name: options[name] for name in options if "length" in name or "cu_" in name}))
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    model = model_of(family)
    model.padding_free = True
    for part in (model.config, model.encoder.config, model.decoder.config):
        part._attn_implementation_internal = "flash_attention_2"
    assert separates_sequences(model)
    model(**batch(model.config.pad_token_id), label_smoothing=0.0)
    read, written = [0, 11, 12, 19, 30, 34], [0, 3, 15, 27, 28, 34]
    plain = [(causal, o["cu_seq_lens_q"].tolist(), o["cu_seq_lens_k"].tolist()) for causal, o in calls]
    assert plain[:4] == [(False, read, read)] * 4
    assert (True, written, written) in plain and (False, written, read) in plain
    assert {(o["max_length_q"], o["max_length_k"]) for _, o in calls} == {(11, 11), (12, 12), (12, 11)}
    assert all(o["cu_seq_lens_q"].dtype is torch.int32 for _, o in calls)
    everywhere = {(False, None), (True, None)}
    assert windows == (everywhere | {(False, 3), (True, 3)} if family == "modernbert" else everywhere)


def test_other_attention_is_refused() -> None:
    model = model_of("xlm-roberta")
    model.padding_free = True
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match=r"eager.*\n.*padding_free off"):
        model(**batch(1), label_smoothing=0.0)


def trained(folder: Path, **settings: Any) -> tuple[SwcmForConditionalGeneration, float | None]:
    model = grow(tiny_encoder(), dropout=0.0)
    given = config(max_steps=4, warmup=0, eval_every=4, **settings)
    return model, Trainer(model, ToyStream(), validation(), given, folder).train().best_loss


def test_training_is_padding_free_by_itself_and_learns_the_same(tmp_path: Path) -> None:
    plain, automatic = (trained(tmp_path / str(on), padding_free=on) for on in (False, "auto"))
    assert (plain[0].padding_free, automatic[0].padding_free) == (False, True)
    assert automatic[1] == pytest.approx(plain[1], rel=1e-4)


def test_models_that_cannot_are_left_alone_or_refused(tmp_path: Path) -> None:
    eager = grow(tiny_encoder())
    eager.set_attn_implementation("eager")
    Trainer(eager, ToyStream(), {}, config(max_steps=1, warmup=0), tmp_path)
    assert not eager.padding_free
    for model in (eager, ToySeq2Seq()):
        with pytest.raises(ConfigError, match=r"padding_free: .*\n.*set it to auto"):
            Trainer(model, ToyStream(), {}, config(max_steps=1, warmup=0, padding_free=True), tmp_path)


def test_a_run_goes_on_as_it_began(tmp_path: Path) -> None:
    """Runs from before there was `padding_free` had padding, and a run without it cannot go on with it."""
    trained(tmp_path, padding_free=False)

    def again(**settings: Any) -> SwcmForConditionalGeneration:
        model = grow(tiny_encoder(), dropout=0.0)
        given = config(max_steps=4, warmup=0, eval_every=4, **settings)
        Trainer(model, ToyStream(), validation(), given, tmp_path).train()
        return model

    assert not again().padding_free
    with pytest.raises(CheckpointError, match="padding_free"):
        again(padding_free=True)


def test_attention_chosen_later_counts(tmp_path: Path) -> None:
    model = grow(tiny_encoder())
    model.set_attn_implementation("eager")
    model.set_attn_implementation("sdpa")
    Trainer(model, ToyStream(), {}, config(max_steps=1, warmup=0), tmp_path)
    assert model.padding_free
