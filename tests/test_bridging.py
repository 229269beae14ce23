"""Training a bridge: what learns and what does not, what is written, and that interruptions change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from bridge_toys import tiny_bridge, tiny_llm
from enc2gen.data.batching import BatchingConfig, EncodedExample
from enc2gen.data.bridge import bridge_evaluation_batches
from enc2gen.errors import CheckpointError, ConfigError, DataError
from enc2gen.models.bridge import BridgeForConditionalGeneration
from enc2gen.models.bridge.state_cache import FrozenStateCache
from enc2gen.training import Callback, StepMetrics, TrainingConfig, TrainingResult
from enc2gen.training.bridging import TuningConfig, train_bridge

EOS = 2
BATCHES = BatchingConfig(max_tokens=None, max_examples=4)


def examples(count: int = 16) -> list[EncodedExample]:
    """The word after the first of the source, then EOS, which is this LLM's pad token as well."""
    found = []
    for index in range(count):
        word = 10 + index % 8
        source = (0, word, *range(30, 30 + index % 4), 2)
        found.append(EncodedExample(source, (0, word + 20), (word + 20, EOS)))
    return found


def train(
    model: BridgeForConditionalGeneration,
    folder: Path,
    *,
    data: list[EncodedExample] | None = None,
    steps: int = 4,
    dev: bool = True,
    **options: Any,
) -> TrainingResult:
    settings = {"learning_rate": 0.01, "warmup": 0, "eval_every": 2, "save_every": 2, "log_every": 1}
    config = TrainingConfig(max_steps=steps, progress=False, tensorboard=False, precision="fp32", **settings)
    validation = {"dev": examples(6)} if dev else {}
    return train_bridge(model, data or examples(), validation, config, BATCHES, folder, **options)


def weights(model: BridgeForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: BridgeForConditionalGeneration, before: dict[str, torch.Tensor]) -> set[str]:
    """Parts (encoder, llm, fusion, ...) of which a tensor differs from `before`."""
    return {n.partition(".")[0] for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}


@pytest.mark.parametrize(
    ("tuning", "learnt"),
    [
        ({}, {"fusion", "mapper", "end_vector"}),
        ({"encoder": "full"}, {"fusion", "mapper", "end_vector", "encoder"}),
        ({"encoder": "lora"}, {"fusion", "mapper", "end_vector", "encoder"}),
        ({"bridge": False, "llm": "lora"}, {"llm"}),
        ({"llm": "lora", "lora": {"dora": True, "rank": 2}}, {"fusion", "mapper", "end_vector", "llm"}),
    ],
)
def test_exactly_the_chosen_parts_learn(tmp_path: Path, tuning: dict[str, Any], learnt: set[str]) -> None:
    model = tiny_bridge(fusion="global", fusion_options={"temperature": "plain"})
    before = weights(model)
    train(model, tmp_path, tuning=TuningConfig(**tuning))
    assert set(before) == set(model.state_dict())  # low-rank updates are merged: no module is left over
    assert changed(model, before) == learnt


def test_frozen_parts_get_no_gradient_and_keep_their_precision(tmp_path: Path) -> None:
    model = tiny_bridge(llm=tiny_llm().to(torch.bfloat16))
    learning: set[str] = set()
    model.register_forward_pre_hook(
        lambda *_: learning.update(n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad)
    )
    train(model, tmp_path)
    assert learning == {"mapper", "end_vector"}
    assert {parameter.dtype for parameter in model.llm.parameters()} == {torch.bfloat16}
    assert all(p.grad is None for half in (model.encoder, model.llm) for p in half.parameters())
    assert model.mapper.map.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_checkpoints_hold_what_learns_and_nothing_else(tmp_path: Path) -> None:
    model = tiny_bridge(fusion="transformer")
    result = train(model, tmp_path)
    assert result.best_checkpoint is not None and result.last_checkpoint is not None
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning and not any(name.startswith(("encoder.", "llm.")) for name in learning)
    for checkpoint in (result.best_checkpoint, result.last_checkpoint):
        assert set(load_file(checkpoint / "model" / "model.safetensors")) == learning


def test_it_learns_to_write_and_to_end(tmp_path: Path) -> None:
    model = tiny_bridge()
    result = train(model, tmp_path, steps=120, tuning=TuningConfig(llm="full"))  # a random LLM has to learn, too
    assert result.best_loss is not None and result.best_loss < 0.1
    source = torch.tensor([examples()[3].input_ids])
    written = model.generate(source, max_new_tokens=6, do_sample=False)[0].tolist()
    assert written[1:3] == [10 + 3 + 20, EOS]
    assert len(written) == 3  # it stopped by itself


class Stop(Exception):
    """An interruption at an arbitrary step."""


class StopAt(Callback):
    """Interrupts behind the fifth update."""

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step == 5:
            raise Stop


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    options = {"fusion": "transformer", "mapper_options": {"feature_dropout": 0.3}}
    whole = tiny_bridge(**options)
    train(whole, tmp_path / "whole", steps=6)
    first = tiny_bridge(**options)

    with pytest.raises(Stop):
        train(first, tmp_path / "cut", steps=6, callbacks=[StopAt()])
    again = tiny_bridge(**options)
    train(again, tmp_path / "cut", steps=6)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_cached_states_change_nothing(tmp_path: Path) -> None:
    plain, cached = tiny_bridge(fusion="mean"), tiny_bridge(fusion="mean")
    first = train(plain, tmp_path / "plain")
    cache = FrozenStateCache(cached, pad_token_id=1)
    assert cache.add(example.input_ids for example in examples())
    calls: list[int] = []
    cached.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    second = train(cached, tmp_path / "cached", cache=cache)
    assert not calls  # the encoder did not run again
    assert second.best_loss == pytest.approx(first.best_loss, abs=1e-5)


def test_low_rank_updates_compute_what_the_merged_weights_compute(tmp_path: Path) -> None:
    model = tiny_bridge()
    result = train(model, tmp_path, tuning=TuningConfig(llm="lora"), steps=6)
    total = count = 0.0
    for batch in bridge_evaluation_batches(examples(6), 1, 2):
        inputs = batch.as_model_inputs()
        n = int((inputs["labels"] != -100).sum())
        total, count = total + model(**inputs).loss.item() * n, count + n
    assert total / count == pytest.approx(result.best_loss, rel=1e-4)


@pytest.mark.parametrize("tuning", [{}, {"llm": "lora", "lora": {"rank": 2}}])
def test_what_learns_is_counted(tmp_path: Path, tuning: dict[str, Any]) -> None:
    model = tiny_bridge()
    layers = [layer for layer in model.llm.modules() if isinstance(layer, torch.nn.Linear)]
    updates = sum(2 * (layer.in_features + layer.out_features) for layer in layers if layer.out_features != 120)
    bridge = 24 * 32 + 32 + 32  # a linear map and the end vector
    result = train(model, tmp_path, tuning=TuningConfig(**tuning))
    assert result.parameters == bridge + (updates if tuning else 0)


def test_other_examples_or_another_tuning_are_not_resumed(tmp_path: Path) -> None:
    train(tiny_bridge(), tmp_path)
    with pytest.raises(CheckpointError, match=r"data\.tuning"):
        train(tiny_bridge(), tmp_path, tuning=TuningConfig(encoder="full"))
    other = examples()
    other[0] = EncodedExample(other[0].input_ids, other[0].decoder_input_ids, (31, EOS))
    with pytest.raises(CheckpointError, match=r"data\.examples"):
        train(tiny_bridge(), tmp_path, data=other)


def test_impossible_wishes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="nothing learns"):
        TuningConfig(bridge=False)
    model = tiny_bridge()
    with pytest.raises(ConfigError, match="no fixed states"):
        train(model, tmp_path, tuning=TuningConfig(encoder="full"), cache=FrozenStateCache(model, pad_token_id=1))
    config = TrainingConfig(max_steps=1, warmup=0)
    with pytest.raises(DataError, match="no example"):
        train_bridge(model, [], {}, config, BATCHES, tmp_path)


def test_validation_batches_are_as_small_as_those_of_training(tmp_path: Path) -> None:
    model, sizes = tiny_bridge(), []
    model.register_forward_pre_hook(lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True)
    train(model, tmp_path)
    assert max(sizes) == 4 and len(sizes) > 4 + 2  # six development examples take two batches
