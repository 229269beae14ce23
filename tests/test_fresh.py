"""Randomly initialised sub-layers that start silent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import tiny_encoder
from enc2gen import SwcmForConditionalGeneration
from enc2gen.errors import ConfigError
from test_donors import tiny

SOURCE = torch.tensor([[0, 9, 8, 7, 50, 2], [0, 30, 31, 32, 33, 2]])
TARGET = torch.tensor([[5, 6, 7, 8, 9], [9, 10, 11, 12, 13]])


def grow(encoder: PreTrainedModel, **options: Any) -> SwcmForConditionalGeneration:
    return SwcmForConditionalGeneration.from_encoder(encoder, verbose=False, **options)


@torch.no_grad()
def states(model: SwcmForConditionalGeneration) -> Tensor:
    return model(input_ids=SOURCE, decoder_input_ids=TARGET, output_hidden_states=True).decoder_hidden_states[-1]


@torch.no_grad()
def logits(model: SwcmForConditionalGeneration) -> Tensor:
    return model(input_ids=SOURCE, decoder_input_ids=TARGET).logits


@pytest.mark.parametrize("family", ["eurobert", "modernbert", "xlm-roberta-xl"])
def test_in_pre_norm_order_the_model_starts_as_the_one_without_normal_layers(family: str) -> None:
    without = logits(grow(tiny(family), insert_every=None))
    assert torch.equal(logits(grow(tiny(family), insert_every=2, fresh_output="zero")), without)
    assert not torch.allclose(logits(grow(tiny(family), insert_every=2)), without, atol=1e-3)


def skewed(kind: str = "xlm-roberta") -> PreTrainedModel:
    """An encoder whose norms scale and shift, as those of trained encoders do."""
    encoder = tiny_encoder(kind)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "LayerNorm" in name:
                parameter.mul_(0.4) if name.endswith("weight") else parameter.add_(0.3)
    return encoder


def test_in_post_norm_order_a_silent_layer_is_one_norm_of_average_scale_and_mean() -> None:
    model = grow(skewed(), insert_every=2, fresh_output="zero")
    with torch.no_grad():
        seen = model(input_ids=SOURCE, decoder_input_ids=TARGET, output_hidden_states=True).decoder_hidden_states
    below = model.decoder.layers[1].ffn2_norm
    gamma, beta = (p.detach().double().numpy() for p in (below.weight, below.bias))
    x = seen[2].double().numpy()  # what the normal layer, the third, reads
    scale, mean = np.sqrt((gamma**2).mean() + beta.var()), beta.mean()
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * scale + mean
    np.testing.assert_allclose(seen[3].numpy(), expected, atol=1e-5)


def test_in_post_norm_order_the_model_starts_near_the_one_without_normal_layers() -> None:
    without = states(grow(skewed(), insert_every=None))

    def distance(model: SwcmForConditionalGeneration) -> float:
        return float((states(model) - without).norm() / without.norm())

    plain_norms = grow(skewed(), insert_every=2, fresh_output="zero")
    with torch.no_grad():
        for layer in (plain_norms.decoder.layers[index] for index in (2, 5)):
            for name in layer.sublayers:
                layer.get_submodule(f"{name}_norm").reset_parameters()
    near = distance(grow(skewed(), insert_every=2, fresh_output="zero"))
    assert near < 0.5 * distance(plain_norms)
    assert near < 0.5 * distance(grow(skewed(), insert_every=2))


@pytest.mark.parametrize("sharing", ["copy", "tied"])
def test_everything_else_is_drawn_as_without_it(sharing: str) -> None:
    encoder = skewed()
    options: dict[str, Any] = {"insert_every": 3, "sharing": sharing, "languages": ["kk"], "seed": 4}
    silent, usual = (dict(grow(encoder, fresh_output=how, **options).named_parameters()) for how in ("zero", "random"))
    changed = {name for name, tensor in usual.items() if not torch.equal(tensor, silent[name])}
    normal = "decoder.layers.3"
    last = {f"{normal}.{part}.weight" for part in ("self_attention.out_proj", "cross_attention.out_proj", "ffn.fc2")}
    norms = {
        f"{normal}.{part}_norm.{kind}"
        for part in ("self_attention", "cross_attention", "ffn")
        for kind in ("weight", "bias")
    }
    assert changed == last | norms
    assert all(not silent[name].any() for name in last)


def test_parts_that_are_not_copied_are_fresh_too() -> None:
    model = grow(
        skewed(), copy=("embeddings", "self_attention", "ffn", "norms"), insert_every=None, fresh_output="zero"
    )
    for layer in model.decoder.layers:
        assert not layer.cross_attention.out_proj.weight.any() and layer.self_attention.out_proj.weight.any()
    assert "decoder.layers.0.cross_attention.out_proj.weight" in model.init_report.names("constant")
    assert "decoder.layers.0.cross_attention.q_proj.weight" in model.init_report.names("random")


def test_a_decoder_of_random_layers_alone_starts_as_its_embeddings() -> None:
    options: dict[str, Any] = {"growth": "standard", "copy": ("embeddings",), "norm_order": "pre"}
    model = grow(tiny_encoder(), fresh_output="zero", **options)
    with torch.no_grad():
        embedded = model.decoder.embed(TARGET, None, torch.arange(5).expand(2, -1) + 2)
    assert torch.equal(states(model), embedded)
    norms = [p for name, p in model.decoder.layers.named_parameters() if "_norm.weight" in name]
    assert norms and all((norm == 1).all() for norm in norms)  # only norms after the sub-layer have to be fitted


def test_silent_sublayers_learn() -> None:
    model = grow(tiny_encoder(), insert_every=2, fresh_output="zero").train()
    layer = model.decoder.layers[2]
    for step in range(2):
        model.zero_grad()
        model(input_ids=SOURCE, decoder_input_ids=TARGET, labels=TARGET).loss.backward()
        assert layer.self_attention.out_proj.weight.grad.abs().max() > 0
        if step == 0:
            assert layer.self_attention.v_proj.weight.grad.abs().max() == 0  # nothing passes through zeros yet
            torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert layer.self_attention.v_proj.weight.grad.abs().max() > 0


def test_other_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="fresh_output='ones'"):
        grow(tiny_encoder(), fresh_output="ones")


@pytest.mark.parametrize("family", ["xlm-roberta", "modernbert", "eurobert"])
def test_a_unit_top_norm_makes_logits_wider_by_one_factor_and_changes_nothing_else(family: str) -> None:
    def encoder() -> PreTrainedModel:
        made = skewed() if family == "xlm-roberta" else tiny(family)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if name.startswith(("final_norm", "norm.")):
                    parameter.mul_(torch.linspace(0.1, 0.5, len(parameter)))
        return made

    copied, unit = (grow(encoder(), insert_every=None, top_norm=kind) for kind in ("copied", "unit"))
    changed = {
        name: (old, new)
        for (name, old), new in zip(copied.named_parameters(), unit.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert {name.rpartition(".")[0] for name in changed} == {
        "decoder.layers.3.ffn2_norm" if family == "xlm-roberta" else "decoder.final_norm"
    }
    gains = next(new for name, (_, new) in changed.items() if name.endswith("weight")).detach().double().numpy()
    assert np.sqrt((gains**2).mean()) == pytest.approx(1, rel=1e-5)
    factor = 1 / np.sqrt(
        (next(old for name, (old, _) in changed.items() if name.endswith("weight")) ** 2).mean().item()
    )
    assert factor > 1.5
    torch.testing.assert_close(logits(unit), factor * logits(copied), rtol=1e-4, atol=1e-5)
    notes = {tensor.name: tensor.note for tensor in unit.init_report.tensors if tensor.name in changed}
    assert notes == {name: f"times {factor:.4g}" for name in changed}
    assert all(unit.init_report.names("copied").count(name) == 1 for name in changed)


def test_a_unit_top_norm_leaves_a_fresh_one_and_refuses_a_tied_one() -> None:
    options: dict[str, Any] = {"insert_every": 2, "seed": 4}
    plain, unit = grow(skewed(), **options), grow(skewed(), top_norm="unit", **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), unit.parameters(), strict=True))
    with pytest.raises(ConfigError, match="tied to the decoder's") as error:
        grow(skewed(), insert_every=None, sharing="tied", top_norm="unit")
    assert error.value.where == "top_norm"
    grow(skewed(), insert_every=2, sharing="tied", top_norm="unit")
