"""Masked-LM models: transformers' own logits, the checkpoint's head, a fresh one, bits per byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    EuroBertConfig,
    EuroBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaXLConfig,
    XLMRobertaXLForMaskedLM,
)

from enc2gen.encoders.loading import load_encoder
from enc2gen.errors import DataError, ModelError
from enc2gen.models.masked_lm import (
    MaskedLanguageModel,
    load_masked_lm,
    masked_bits_per_byte,
    masked_score,
    unigram_frequencies,
)
from enc2gen.models.surgery import load_for_surgery

COMMON: dict[str, Any] = {
    "vocab_size": 83, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 66, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForMaskedLM(BertForMaskedLM.config_class(**COMMON)),
    "xlm-roberta": lambda: XLMRobertaForMaskedLM(XLMRobertaConfig(**COMMON)),
    "xlm-roberta-xl": lambda: XLMRobertaXLForMaskedLM(XLMRobertaXLConfig(**COMMON)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**COMMON, cls_token_id=0, sep_token_id=2)),
    "eurobert": lambda: EuroBertForMaskedLM(EuroBertConfig(**COMMON, num_key_value_heads=2)),
}


def random_model(family: str) -> PreTrainedModel:
    """A random model, every tensor off its default value."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[0, 5, 9, 11, 2], [0, 7, 2, 1, 1]])
    predicted = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]]).bool()
    return {"input_ids": ids, "attention_mask": (ids != 1).long(), "predicted": predicted}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str) -> None:
    model = random_model(family)
    batch = inputs()
    with torch.inference_mode():
        full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        ours = MaskedLanguageModel(model)(**batch).logits
    assert ours.shape == (3, 83)
    torch.testing.assert_close(ours, full[batch["predicted"]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_without_logits_trains_as_the_loss_of_logits(family: str) -> None:
    model = MaskedLanguageModel(random_model(family))
    labels = torch.tensor([7, 80, 3])
    logits = model(**inputs()).logits
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    result = model(**inputs(), labels=labels, label_smoothing=0.1)
    torch.testing.assert_close(result.loss, expected)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (result.loss, expected))
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(model(**inputs()).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_encoder_gets_a_tied_head_that_starts_at_the_unigram(family: str) -> None:
    encoder = random_model(family).base_model
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    frequencies = torch.softmax(torch.randn(83, generator=torch.Generator().manual_seed(1)), 0)
    model = MaskedLanguageModel(encoder, frequencies)
    assert model.fresh_head and model.encoder is encoder
    assert model.model.get_output_embeddings().weight is encoder.get_input_embeddings().weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert not any(parameter.is_meta for parameter in model.parameters())
    with torch.inference_mode():
        logits = model(**inputs()).logits
        full = model.model(**{k: v for k, v in inputs().items() if k != "predicted"}).logits
    torch.testing.assert_close(logits, full[inputs()["predicted"]], rtol=1e-5, atol=1e-5)
    if family != "eurobert":  # whose head is a bias-free projection
        divergence = (frequencies * (frequencies.log() - logits.log_softmax(-1))).sum(-1)
        assert divergence.max() < 0.3
        assert (frequencies * (frequencies.log() + np.log(83))).sum() > 0.3  # far from uniform
    logits = model(**inputs()).logits
    logits.logsumexp(-1).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_fresh_head_passes_the_hidden_state_on(make_encoder: Callable[..., PreTrainedModel]) -> None:
    model = MaskedLanguageModel(make_encoder("bert", vocabulary=83))
    hidden = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)) * 0.5
    out = model.model.cls.predictions.transform(hidden)
    cosine = torch.cosine_similarity(out, hidden - hidden.mean(-1, keepdim=True))
    assert cosine.min() > 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_with_its_head(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    model.save_pretrained(tmp_path)
    loaded = load_masked_lm(tmp_path)
    assert type(loaded) is type(model)
    with torch.inference_mode():
        torch.testing.assert_close(
            MaskedLanguageModel(loaded)(**inputs()).logits, MaskedLanguageModel(model)(**inputs()).logits
        )
    bare = load_encoder(tmp_path)
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(bare.state_dict()[name], tensor), name


def test_the_head_of_a_pretraining_checkpoint_is_taken(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    whole = BertForPreTraining(BertConfig(**COMMON | {"vocab_size": len(tokenizer)})).eval()
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for model in (load_masked_lm(tmp_path), load_for_surgery(tmp_path)[0]):
        assert type(model) is BertForMaskedLM and not MaskedLanguageModel(model).fresh_head
        with torch.inference_mode():
            batch = {"input_ids": inputs()["input_ids"], "attention_mask": inputs()["attention_mask"]}
            torch.testing.assert_close(model(**batch).logits, whole(**batch).prediction_logits)


def test_a_checkpoint_without_head_gives_the_bare_encoder(tmp_path: Path) -> None:
    random_model("xlm-roberta").base_model.save_pretrained(tmp_path)
    model = load_masked_lm(tmp_path)
    assert type(model).__name__ == "XLMRobertaModel"
    assert MaskedLanguageModel(model).fresh_head


def test_unsupported_families_are_named() -> None:
    config = T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="t5"):
        MaskedLanguageModel(T5EncoderModel(config))


def test_bits_per_byte_are_what_numpy_says(tokenizer: PreTrainedTokenizerFast) -> None:
    # The whole computation again: words are set apart by spaces, one draw a word from the seed and the text's number.
    model = random_model("xlm-roberta")
    texts = ["ab cde fgh ij kl", "абв где жз ик лм", "a"]
    bits, size, pieces = 0.0, 0, 0
    for index, text in enumerate(texts):
        words = text.split(" ")
        draws = np.random.default_rng([7, index]).random(len(words))
        hidden = draws < 0.4 if (draws < 0.4).any() else draws == draws.min()
        ids, labels = [0], [-100]
        for word, hide in zip(words, hidden, strict=True):
            own = tokenizer(word, add_special_tokens=False)["input_ids"]
            ids += [tokenizer.mask_token_id] * len(own) if hide else own
            labels += own if hide else [-100] * len(own)
            size += len(word.encode()) if hide else 0
        assert len([*ids, 2]) == len(tokenizer(text)["input_ids"])
        with torch.inference_mode():
            logits = model(torch.tensor([[*ids, 2]])).logits[0].double().numpy()
        log2 = (logits - logits.max(-1, keepdims=True)) / np.log(2)
        log2 = log2 - np.log2(np.exp2(log2).sum(-1, keepdims=True))
        bits -= sum(log2[i, label] for i, label in enumerate(labels) if label >= 0)
        pieces += sum(label >= 0 for label in labels)
    score = masked_score(model, tokenizer, texts, seed=7, mask_ratio=0.4, max_length=40)
    assert (score.bytes, score.pieces, score.unknown_bytes) == (size, pieces, 0)
    assert score.bits_per_byte == pytest.approx(bits / size, rel=1e-5)
    again = masked_bits_per_byte(model, tokenizer, texts, seed=7, mask_ratio=0.4, max_length=40, max_tokens=40)
    assert again == pytest.approx(score.bits_per_byte, rel=1e-6)
    other = masked_bits_per_byte(model, tokenizer, texts, seed=8, mask_ratio=0.4, max_length=40)
    assert other != pytest.approx(again, rel=1e-3)


def test_bytes_under_unknown_pieces_cost_eight_bits(tokenizer: PreTrainedTokenizerFast) -> None:
    model = random_model("xlm-roberta")
    score = masked_score(model, tokenizer, ["ab བོད cd"], mask_ratio=0.999, max_length=40)
    assert score.unknown_bytes == len("བོད".encode())
    assert score.bytes == 4
    assert score.bits_per_byte == pytest.approx((score.bits + 8 * score.unknown_bytes) / (4 + score.unknown_bytes))
    with pytest.raises(DataError, match="nothing to mask"):
        masked_bits_per_byte(model, tokenizer, ["", " "], max_length=40)


def test_unigram_frequencies() -> None:
    assert unigram_frequencies([[1, 1, 2], [1]], 4).tolist() == pytest.approx([1 / 8, 4 / 8, 2 / 8, 1 / 8])
    assert unigram_frequencies([], 2).tolist() == [0.5, 0.5]
