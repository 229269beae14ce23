"""Decoder layers against the paper's equations, written out in plain NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conftest import tiny_encoder
from enc2gen import SwcmForConditionalGeneration

Weights = dict[str, np.ndarray]


def linear(weights: Weights, name: str, states: np.ndarray) -> np.ndarray:
    return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: Weights, name: str, states: np.ndarray, eps: float) -> np.ndarray:
    mean, variance = states.mean(-1, keepdims=True), states.var(-1, keepdims=True)
    return (states - mean) / np.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(
    weights: Weights, name: str, query: np.ndarray, memory: np.ndarray, allowed: np.ndarray, heads: int
) -> np.ndarray:
    """One sequence: query [T, H], memory [S, H], allowed [T, S]."""
    q, k, v = (
        linear(weights, f"{name}.{p}", s) for p, s in (("q_proj", query), ("k_proj", memory), ("v_proj", memory))
    )
    size = q.shape[-1] // heads
    output = np.zeros_like(q)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = np.where(allowed, q[:, part] @ k[:, part].T / math.sqrt(size), -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        output[:, part] = scores / scores.sum(-1, keepdims=True) @ v[:, part]
    return linear(weights, f"{name}.out_proj", output)


def feed_forward(weights: Weights, name: str, states: np.ndarray) -> np.ndarray:
    return linear(weights, f"{name}.fc2", gelu(linear(weights, f"{name}.fc1", states)))


def custom_layer(
    weights: Weights, x: np.ndarray, memory: np.ndarray, visible: np.ndarray, eps: float, heads: int, order: str
) -> np.ndarray:
    """Self-attention -> FFN1 -> cross-attention -> FFN2, arXiv 2502.10852 section 3; x [T, H], memory [S, H]."""
    causal = np.tril(np.ones((len(x), len(x)), dtype=bool))
    source = np.broadcast_to(visible, (len(x), len(memory)))
    steps = (
        ("self_attention", lambda s: attention(weights, "self_attention", s, s, causal, heads)),
        ("ffn1", lambda s: feed_forward(weights, "ffn1", s)),
        ("cross_attention", lambda s: attention(weights, "cross_attention", s, memory, source, heads)),
        ("ffn2", lambda s: feed_forward(weights, "ffn2", s)),
    )
    for name, function in steps:
        if order == "post":
            x = norm(weights, f"{name}_norm", x + function(x), eps)
        else:
            x = x + function(norm(weights, f"{name}_norm", x, eps))
    return x


@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("attention_implementation", ["sdpa", "eager"])
@pytest.mark.filterwarnings("ignore:weights copied")
def test_custom_layer_equals_the_equations(order: str, attention_implementation: str) -> None:
    model = SwcmForConditionalGeneration.from_encoder(tiny_encoder(), norm_order=order, verbose=False)
    model.set_attn_implementation(attention_implementation)
    layer = model.decoder.layers[0]
    with torch.no_grad():
        for parameter in layer.parameters():  # copies would hide a swap of the two attentions or FFNs
            parameter.add_(torch.randn_like(parameter) * 0.1)
    states, memory = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    source_mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    causal = torch.ones(5, 5).tril().bool()[None, None].expand(2, 1, 5, 5)
    visible = source_mask.bool()[:, None, None, :].expand(2, 1, 5, 7)
    if attention_implementation == "eager":
        causal, visible = (
            torch.zeros(m.shape).masked_fill(~m, torch.finfo(torch.float32).min) for m in (causal, visible)
        )
    with torch.no_grad():
        ours = layer(states, memory, causal, visible)[0].numpy()
    weights = {name: value.detach().double().numpy() for name, value in layer.named_parameters()}
    for row in range(2):
        expected = custom_layer(
            weights,
            states[row].double().numpy(),
            memory[row].double().numpy(),
            source_mask[row].bool().numpy(),
            1e-12,
            4,
            order,
        )
        np.testing.assert_allclose(ours[row], expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["xlm-roberta", "bert"])
def test_grown_layer_without_cross_attention_is_the_donor_layer(kind: str) -> None:
    """The copied self-attention + FFN1, fed without a causal mask, must be transformers' own encoder layer."""
    encoder = tiny_encoder(kind)
    model = SwcmForConditionalGeneration.from_encoder(encoder, insert_every=None, verbose=False)
    states = torch.randn(2, 6, 24)
    everything = torch.ones(2, 1, 6, 6).bool()
    for index, donor in enumerate(encoder.encoder.layer):
        layer = model.decoder.layers[index]
        with torch.no_grad():
            x = layer.self_attention_norm(states + layer.self_attention(states, None, everything, None)[0])
            ours = layer.ffn1_norm(x + layer.ffn1(x))
            output = donor(states)
            theirs = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
