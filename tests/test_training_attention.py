"""Attention for training on CPUs: equal to torch's without dropout, and dropout as the definition says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import tiny_encoder
from enc2gen import SwcmForConditionalGeneration
from enc2gen.models.training_attention import _CACHED, NAME, training_attention

BATCH, HEADS, TARGET, SOURCE, SIZE = 3, 4, 7, 9, 8
TRAINING: Any = SimpleNamespace(training=True, is_causal=False)


def operands(heads: int = HEADS, source: int = SOURCE) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (BATCH, HEADS, TARGET, SIZE), (BATCH, heads, source, SIZE), (BATCH, heads, source, SIZE)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def plain(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, keep: Tensor | None, rate: float) -> Tensor:
    """The definition; `seen` `[T, S]` or `[B, 1, T, S]`, `keep` `[B, A, T, S]`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3) / SIZE**0.5).masked_fill(~seen, -1e9)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    if keep is not None:
        weights = weights * keep / (1 - rate)
    return (weights @ value).transpose(1, 2)


def padding() -> Tensor:
    lengths = torch.tensor([9, 4, 1])
    return (torch.arange(SOURCE) < lengths[:, None])[:, None, None, :].expand(BATCH, 1, TARGET, SOURCE)


@pytest.mark.parametrize("kind", ["padded", "everything", "causal", "grouped"])
def test_without_dropout_it_is_the_definition(kind: str) -> None:
    given = operands(2 if kind == "grouped" else HEADS, TARGET if kind == "causal" else SOURCE)
    mask = padding() if kind in ("padded", "grouped") else None
    seen = torch.ones(TARGET, given[1].shape[2], dtype=torch.bool)
    seen = seen.tril() if kind == "causal" else seen if mask is None else mask
    module: Any = SimpleNamespace(training=True, is_causal=kind == "causal")
    output, weights = training_attention(module, *given, mask)
    expected = plain(*given, seen, None, 0.0)
    assert weights is None and output.grad_fn is not None
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(expected)
    for actual, wanted in zip(*(torch.autograd.grad(x, given, probe) for x in (output, expected)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_one_mask_may_serve_a_batch_of_any_size(heads: int) -> None:
    torch.manual_seed(0)
    size = 2 * _CACHED // (HEADS * TARGET * SOURCE) + 1  # texts that are not taken at once
    query = torch.randn(size, HEADS, TARGET, SIZE)
    key, value = torch.randn(2, size, HEADS, SOURCE, SIZE)
    seen = torch.ones(TARGET, SOURCE, dtype=torch.bool).tril(2).expand(1, heads, TARGET, SOURCE)
    output, _ = training_attention(TRAINING, query, key, value, seen)
    torch.testing.assert_close(output, plain(query, key, value, seen, None, 0.0))


def test_gradients_are_those_of_the_weights_that_were_kept() -> None:
    query, key, value = operands(source=SIZE)
    unit = torch.eye(SIZE, dtype=torch.float64).expand(BATCH, HEADS, SIZE, SIZE)
    seen = torch.ones(TARGET, SIZE, dtype=torch.bool)
    torch.manual_seed(5)
    kept = training_attention(TRAINING, query, key, unit, None, dropout=0.25)[0].transpose(1, 2) != 0
    assert 0 < kept.double().mean() < 1
    torch.manual_seed(5)
    output = training_attention(TRAINING, query, key, value, None, dropout=0.25)[0]
    expected = plain(query, key, value, seen, kept, 0.25)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    probe, given = torch.randn_like(expected), (query, key, value)
    for actual, wanted in zip(*(torch.autograd.grad(x, given, probe) for x in (output, expected)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_and_scale_of_dropout(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 16, 8, 64, 32, dtype=dtype)
    unit = torch.eye(64, dtype=dtype).expand(16, 8, 64, 64)  # the output is the weights
    found = training_attention(TRAINING, query, key, unit, None, dropout=0.1)[0].transpose(1, 2).double()
    weights = torch.softmax(query.double() @ key.double().transpose(2, 3) / 32**0.5, -1)
    kept = found != 0
    assert kept.double().mean().item() == pytest.approx(0.9, abs=2e-3)  # five standard errors
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(found[kept], weights[kept] / 0.9, rtol=tolerance, atol=1e-6)
    assert (found.sum() / weights.sum()).item() == pytest.approx(1.0, abs=3e-3)


def test_autocast_makes_products_bfloat16() -> None:
    given = [tensor.detach().float().requires_grad_() for tensor in operands()]
    with torch.autocast("cpu", torch.bfloat16):
        output = training_attention(TRAINING, *given, padding())[0]
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), plain(*given, padding(), None, 0.0), rtol=0.05, atol=0.03)
    output.float().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype is torch.float32 for tensor in given)


def _model(**options: Any) -> SwcmForConditionalGeneration:
    return SwcmForConditionalGeneration.from_encoder(tiny_encoder(), insert_every=1, verbose=False, **options)


def _inputs(model: SwcmForConditionalGeneration) -> dict[str, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(10, 60, (3, 11))
    mask = (torch.arange(11) < torch.tensor([11, 6, 3])[:, None]).long()
    ids = ids.masked_fill(mask == 0, 1)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "decoder_attention_mask": mask}


def _implementation(model: SwcmForConditionalGeneration, name: str) -> None:
    for config in (model.config, model.encoder.config, model.decoder.config):
        config._attn_implementation = name


def test_a_model_in_training_equals_one_with_torchs_attention() -> None:
    model = _model(dropout=0.0).train()
    inputs, found = _inputs(model), []
    assert {model.config._attn_implementation, model.encoder.config._attn_implementation} == {NAME}
    real = inputs["attention_mask"].bool()
    for name in (NAME, "sdpa"):
        _implementation(model, name)
        model.zero_grad()
        logits = model(**inputs).logits[real]
        logits.square().mean().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-6)


def test_nothing_changes_outside_training(tmp_path: Path) -> None:
    model = _model(dropout=0.1).eval()
    inputs = _inputs(model)
    logits = model(**inputs).logits
    _implementation(model, "sdpa")
    assert torch.equal(model(**inputs).logits, logits)
    _implementation(model, NAME)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    eager = SwcmForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    assert {eager.config._attn_implementation, eager.encoder.config._attn_implementation} == {"eager"}
