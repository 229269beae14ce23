"""Continued masked-LM pretraining: it learns, frozen means frozen, LoRA is merged, resuming changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

from enc2gen.data.batching import BatchingConfig
from enc2gen.data.masking import MaskingConfig
from enc2gen.encoders.loading import load_encoder
from enc2gen.errors import CheckpointError, ConfigError, DataError, ModelError
from enc2gen.models.lora import LoraSettings, add_lora, merge_lora
from enc2gen.models.masked_lm import MaskedLanguageModel, load_masked_lm, masked_bits_per_byte, masked_score
from enc2gen.training import TrainingConfig
from enc2gen.training.adaptation import AdaptationConfig, AdaptationResult, adapt_encoder
from training_toys import SignalAt

WORDS = ["abc", "defg", "hijk", "lmno", "pqrs", "tuvw"]


def corpus(lines: int, seed: int = 0) -> list[tuple[str, str]]:
    """Words follow each other in a fixed order: a hidden word is certain from its neighbours."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(len(WORDS), size=lines)
    return [(" ".join(WORDS[(start + i) % len(WORDS)] for i in range(5)), "en") for start in starts.tolist()]


TEXTS, DEV = corpus(60), corpus(6, seed=1)


def stage(steps: int = 6, **changes: Any) -> TrainingConfig:
    settings = {
        "max_steps": steps, "learning_rate": 5e-3, "warmup": 2, "precision": "fp32", "eval_every": 3,
        "save_every": 3, "log_every": 1, "tensorboard": False, "progress": False,
    }  # fmt: skip
    return TrainingConfig(**{**settings, **changes})


def settings(**changes: Any) -> AdaptationConfig:
    batching = BatchingConfig(max_tokens=200, buffer_batches=4)
    return AdaptationConfig(**{"batching": batching, "max_length": 40, **changes})


@pytest.fixture
def adapt(
    make_encoder: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., AdaptationResult]:
    def run(config: AdaptationConfig, folder: str = "run", **options: Any) -> AdaptationResult:
        encoder = options.pop("encoder", None) or make_encoder("bert", layers=3, vocabulary=len(tokenizer))
        return adapt_encoder(encoder, tokenizer, TEXTS, DEV, config, tmp_path / folder, seed=1, **options)

    return run


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], after: torch.nn.Module) -> set[str]:
    now = after.state_dict()
    assert now.keys() == before.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, now[name])}


def test_it_learns_what_follows(
    adapt: Callable[..., AdaptationResult], make_encoder: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    encoder = make_encoder("bert", layers=1, vocabulary=len(tokenizer))
    config = settings(
        training=stage(200, eval_every=200, save_every=200, warmup=20, learning_rate=1e-2),
        masking=MaskingConfig(mask_ratio=0.25, mask_share=1.0, random_share=0.0),
    )
    result = adapt(config, encoder=encoder)
    assert result.encoder is encoder and result.fresh_head and not result.interrupted
    ids = [i for text, _ in TEXTS for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    shares = np.bincount(ids)[np.unique(ids)] / len(ids)
    entropy = -(shares * np.log(shares)).sum()  # nats per piece of a model that knows frequencies only
    loss = result.stages[0].training.best_loss
    assert loss is not None and loss < 0.3 * entropy
    assert result.bits_per_byte is not None and result.bits_per_byte_before is not None
    assert result.bits_per_byte < 0.3 * result.bits_per_byte_before
    texts = [text for text, _ in DEV]
    assert masked_bits_per_byte(result.model, tokenizer, texts, seed=1, max_length=40) == pytest.approx(
        result.bits_per_byte, rel=1e-4
    )


def test_the_first_stage_trains_word_embeddings_and_head_only(
    adapt: Callable[..., AdaptationResult], make_encoder: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    encoder = make_encoder("bert", vocabulary=len(tokenizer))
    before = tensors(encoder)
    result = adapt(settings(embeddings_only=stage()), encoder=encoder)
    assert changed(before, encoder) == {"embeddings.word_embeddings.weight"}
    assert not torch.equal(result.model.cls.predictions.transform.dense.weight, torch.eye(24))
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    before = tensors(encoder)
    adapt(settings(training=stage()), "second", encoder=encoder)
    assert changed(before, encoder) == set(before)


def test_old_rows_stay_bit_for_bit(
    adapt: Callable[..., AdaptationResult], make_encoder: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    encoder = make_encoder("xlm-roberta", vocabulary=len(tokenizer))
    before = encoder.get_input_embeddings().weight.detach().clone()
    new = [7, 8, 9]
    config = settings(embeddings_only=stage(weight_decay=0.1), new_rows_only=True)
    adapt(config, encoder=encoder, new_ids=new)
    moved = (encoder.get_input_embeddings().weight != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == new
    # The next stage trains all rows again.
    adapt(settings(training=stage()), "all", encoder=encoder)
    assert (encoder.get_input_embeddings().weight != before).any(dim=1).sum() > 20


def test_lora_changes_the_chosen_layers_and_leaves_no_trace(
    adapt: Callable[..., AdaptationResult], make_encoder: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    pytest.importorskip("peft")
    encoder = make_encoder("bert", layers=3, vocabulary=len(tokenizer))
    before = tensors(encoder)
    result = adapt(settings(training=stage(), lora=LoraSettings(rank=2, alpha=4, layers=(1,))), encoder=encoder)
    moved = changed(before, encoder)
    assert moved - {"embeddings.word_embeddings.weight"} == {
        f"encoder.layer.1.{name}.weight"
        for name in (
            "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
            "intermediate.dense", "output.dense",
        )
    }  # fmt: skip
    query = encoder.state_dict()["encoder.layer.1.attention.self.query.weight"]
    update = query - before["encoder.layer.1.attention.self.query.weight"]
    assert torch.linalg.matrix_rank(update, rtol=1e-3) == 2
    assert not any(type(module).__module__.startswith("peft") for module in result.model.modules())
    assert not hasattr(encoder, "peft_config")
    # What was trained is what the merged and saved weights compute: the best loss was measured before merging.
    assert result.folder is not None
    score = masked_score(load_masked_lm(result.folder), tokenizer, [t for t, _ in DEV], seed=1, max_length=40)
    assert score.bits * np.log(2) / score.pieces == pytest.approx(result.stages[0].training.best_loss, rel=1e-4)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_merged_lora_computes_the_same(make_encoder: Callable[..., PreTrainedModel], kind: str) -> None:
    peft = pytest.importorskip("peft")
    encoder = make_encoder(kind, layers=3)
    ids = torch.tensor([[0, 5, 9, 2]])
    with torch.no_grad():
        plain = encoder(ids).last_hidden_state
        add_lora(encoder, LoraSettings(rank=3, alpha=7, layers=(0, 2)))
        torch.testing.assert_close(encoder(ids).last_hidden_state, plain)  # B starts at zero
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        adapted = encoder(ids).last_hidden_state
        assert not torch.allclose(adapted, plain, atol=0.1)
        merge_lora(encoder)
        torch.testing.assert_close(encoder(ids).last_hidden_state, adapted, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, peft.tuners.lora.LoraLayer) for module in encoder.modules())


def test_lora_says_what_is_wrong(make_encoder: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no layer 3"):
        add_lora(make_encoder(layers=3), LoraSettings(layers=(1, 3)))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"enc2gen\[lora\]"):
        add_lora(make_encoder(), LoraSettings())


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, alpha=4, layers=(0,), dropout=0.1)])
def test_interrupted_and_resumed_equals_uninterrupted(
    adapt: Callable[..., AdaptationResult], lora: LoraSettings | None
) -> None:
    if lora is not None:
        pytest.importorskip("peft")
    config = settings(embeddings_only=stage(5), training=stage(6), lora=lora)
    whole = adapt(config, "whole")
    first = adapt(config, "parts", callbacks=[SignalAt(4)])
    assert first.interrupted and len(first.stages) == 1 and first.folder is None
    # In the second stage now; the first one is finished by then, and the encoder is a new object.
    reports: list[str] = []
    second = adapt(config, "parts", callbacks=[SignalAt(2)], log=reports.append)
    assert second.interrupted and len(second.stages) == 2
    assert second.stages[0].training.steps == 5 and second.stages[1].training.steps == 2
    assert not any("lora" in name for name in second.model.state_dict())
    third = adapt(config, "parts")
    assert not third.interrupted and third.steps == whole.steps == 11
    assert not changed(tensors(whole.model), third.model)
    assert third.bits_per_byte_before == whole.bits_per_byte_before
    assert [s.bits_per_byte for s in third.stages] == [s.bits_per_byte for s in whole.stages]
    assert any("interrupted after 2" in line for line in reports)


def test_another_configuration_is_not_resumed(adapt: Callable[..., AdaptationResult]) -> None:
    adapt(settings(embeddings_only=stage(3)))
    with pytest.raises(CheckpointError, match="masking"):
        adapt(settings(embeddings_only=stage(3), masking=MaskingConfig(mask_ratio=0.2)))
    with pytest.raises(CheckpointError, match="new rows"):
        adapt(settings(embeddings_only=stage(3), new_rows_only=True), new_ids=[5])


def test_what_is_saved_loads_with_and_without_its_head(
    adapt: Callable[..., AdaptationResult], tokenizer: PreTrainedTokenizerFast
) -> None:
    result = adapt(settings(training=stage(3)))
    assert result.folder is not None
    bare = load_encoder(result.folder)
    assert not changed(tensors(bare), result.encoder)
    again = adapt(settings(training=stage(3)), "more", encoder=load_masked_lm(result.folder))
    assert not again.fresh_head
    assert again.bits_per_byte_before == pytest.approx(result.bits_per_byte, rel=1e-5)


def test_bad_input_is_named(
    adapt: Callable[..., AdaptationResult], make_encoder: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match="embeddings_only, training or both"):
        settings()
    with pytest.raises(ValueError, match="weight decay would change"):
        settings(embeddings_only=stage(no_decay=("bias",)), new_rows_only=True)
    with pytest.raises(ConfigError, match="66 positions"):
        adapt(settings(training=stage(), max_length=100))
    with pytest.raises(ConfigError, match="new pieces"):
        adapt(settings(embeddings_only=stage(), new_rows_only=True))
    with pytest.raises(ModelError, match="50 rows"):
        adapt(settings(training=stage()), encoder=make_encoder("bert", vocabulary=50))
    encoder = make_encoder("bert", vocabulary=len(tokenizer))
    with pytest.raises(DataError, match="knows next to nothing"):
        adapt_encoder(encoder, tokenizer, ["བོད་ཡིག་གི་"], [], settings(training=stage()), tmp_path / "bo")
    with pytest.raises(DataError, match="no text to train on"):
        adapt_encoder(encoder, tokenizer, [], [], settings(training=stage()), tmp_path / "none")


def test_no_dev_texts_is_fine(
    make_encoder: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    encoder = make_encoder("bert", vocabulary=len(tokenizer))
    rows = [{"text": text, "language": language, "source": "x"} for text, language in TEXTS]
    result = adapt_encoder(encoder, tokenizer, rows, [], settings(training=stage(3)), tmp_path)
    assert result.bits_per_byte is None and result.bits_per_byte_before is None
    assert result.steps == 3
    assert MaskedLanguageModel(result.model).model is result.model


def test_rows_of_an_output_projection_of_its_own_are_not_decayed_by_accident(
    adapt: Callable[..., AdaptationResult], make_encoder: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    shape = make_encoder("bert", layers=3, vocabulary=len(tokenizer)).config
    shape.tie_word_embeddings = False
    encoder = AutoModelForMaskedLM.from_config(shape)
    old = encoder.get_output_embeddings().weight.detach().clone()
    config = settings(embeddings_only=stage(weight_decay=0.1), new_rows_only=True)
    with pytest.raises(ConfigError, match=r"(?s)embeddings_only.weight_decay.*not tied"):
        adapt(config, encoder=encoder, new_ids=[7])
    adapt(settings(embeddings_only=stage(weight_decay=0.0), new_rows_only=True), "second", encoder=encoder, new_ids=[7])
    moved = (encoder.get_output_embeddings().weight != old).any(dim=1).nonzero().flatten().tolist()
    assert moved == [7]
