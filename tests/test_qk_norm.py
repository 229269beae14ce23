"""Normed queries and keys in the decoder, against the equations and against the decoding engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from conftest import tiny_encoder
from enc2gen import SwcmForConditionalGeneration
from enc2gen.generation.engine.decoder import EngineDecoder
from enc2gen.models.swcm.attention import Attention, rotate, rotation_at
from test_donors import tiny

SOURCE = torch.tensor([[0, 9, 8, 7, 50, 2], [0, 30, 31, 32, 33, 2]])
TARGET = torch.tensor([[5, 6, 7, 8, 9], [9, 10, 11, 12, 13]])
KINDS = ["xlm-roberta", "eurobert", "modernbert"]


def grown(kind: str = "xlm-roberta", **options: Any) -> SwcmForConditionalGeneration:
    """With gains that differ from dimension to dimension."""
    encoder = tiny_encoder(kind) if kind == "xlm-roberta" else tiny(kind)
    options = {"qk_norm": True, "insert_every": 2, "verbose": False, **options}
    model = SwcmForConditionalGeneration.from_encoder(encoder, **options)
    with torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.decoder.named_parameters():
            if ".q_norm." in name or ".k_norm." in name:
                parameter.uniform_(0.3, 2.0)
    return model


def by_hand(module: Attention, queries: Tensor, memory: Tensor, causal: bool, theta: float | None) -> Tensor:
    """Attention of one sequence, head by head: queries `[T, H]`, memory `[S, H]`."""
    size, groups = module.head_dim, module.num_key_value_groups
    eps = module.config.layer_norm_eps
    outputs = []
    for head in range(module.q_proj.out_features // size):
        own, shared = slice(head * size, (head + 1) * size), slice(head // groups * size, (head // groups + 1) * size)
        q, k, v = module.q_proj(queries)[:, own], module.k_proj(memory)[:, shared], module.v_proj(memory)[:, shared]
        q = q / (q.square().mean(-1, keepdim=True) + eps).sqrt() * module.q_norm.weight
        k = k / (k.square().mean(-1, keepdim=True) + eps).sqrt() * module.k_norm.weight
        if theta is not None:
            angles = rotation_at(torch.arange(len(queries))[None], theta, size)
            q, k = rotate(q[None, None], angles)[0, 0], rotate(k[None, None], angles)[0, 0]
        scores = q @ k.T / size**0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        outputs.append(scores.softmax(-1) @ v)
    return module.out_proj(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attention_equals_the_equations(kind: str) -> None:
    layer = grown(kind).decoder.layers[0]
    hidden = layer.self_attention.q_proj.in_features
    x, memory = torch.randn(2, 1, 5, hidden, generator=torch.Generator().manual_seed(0))
    theta = layer.rope_theta
    rotation = None if theta is None else rotation_at(torch.arange(5)[None], theta, layer.self_attention.head_dim)
    causal = torch.ones(1, 1, 5, 5).tril().bool()
    ours = layer.self_attention(x, None, causal, None, rotation)[0][0]
    torch.testing.assert_close(ours, by_hand(layer.self_attention, x[0], x[0], True, theta), atol=1e-5, rtol=1e-4)
    ours = layer.cross_attention(x, memory, None, None)[0][0]
    torch.testing.assert_close(ours, by_hand(layer.cross_attention, x[0], memory[0], False, None), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_scores_do_not_grow_with_the_weights() -> None:
    model = grown()
    before = model(input_ids=SOURCE, decoder_input_ids=TARGET).logits
    for layer in model.decoder.layers:
        for attention in (layer.self_attention, layer.cross_attention):
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight.mul_(100.0)
                projection.bias.mul_(100.0)
    torch.testing.assert_close(model(input_ids=SOURCE, decoder_input_ids=TARGET).logits, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_and_saved_models_agree(kind: str, tmp_path: Path) -> None:
    model = grown(kind)
    full = model(input_ids=SOURCE, decoder_input_ids=TARGET, use_cache=False).logits
    first = model(input_ids=SOURCE, decoder_input_ids=TARGET[:, :2], use_cache=True)
    rest = model(
        input_ids=SOURCE, decoder_input_ids=TARGET[:, 2:], past_key_values=first.past_key_values, use_cache=True
    )
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), full, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.config.qk_norm
    torch.testing.assert_close(loaded(input_ids=SOURCE, decoder_input_ids=TARGET).logits, full, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_engine_norms_them_too(kind: str) -> None:
    model = grown(kind)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    encoded = model.encoder(input_ids=SOURCE, attention_mask=mask).last_hidden_state
    engine = EngineDecoder(model.decoder, "fp32")
    state = engine.start(encoded, mask)
    pieces = [engine.step(state, TARGET[:, None, part])[0][:, 0] for part in (slice(0, 2), slice(2, 3), slice(3, 5))]
    whole = model.decoder(
        input_ids=TARGET, encoder_hidden_states=encoded, encoder_attention_mask=mask
    ).last_hidden_state
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_engine_sees_the_models_attention_to_the_source() -> None:
    model = grown()
    model.set_attn_implementation("eager")
    out = model(input_ids=SOURCE, decoder_input_ids=TARGET, output_attentions=True)
    engine = EngineDecoder(model.decoder, "fp32")
    state = engine.start(out.encoder_last_hidden_state, torch.ones_like(SOURCE))
    _, seen = engine.step(state, TARGET[:, None], watch=True)
    torch.testing.assert_close(seen[:, 0], out.cross_attentions[-1].mean(1), atol=1e-5, rtol=1e-4)


def test_it_trains_in_bfloat16_and_is_reported_as_new() -> None:
    model = grown().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=SOURCE, decoder_input_ids=TARGET, labels=TARGET, use_cache=False).loss
    loss.backward()
    gains = {name: p for name, p in model.named_parameters() if ".q_norm." in name or ".k_norm." in name}
    assert len(gains) == 4 * len(model.decoder.layers)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in gains.values())
    assert set(gains) <= set(model.init_report.names("constant"))


def test_without_it_nothing_is_there() -> None:
    plain = SwcmForConditionalGeneration.from_encoder(tiny_encoder(), verbose=False)
    assert not plain.config.qk_norm
    assert not [name for name in plain.state_dict() if name.split(".")[-2] in ("q_norm", "k_norm")]
