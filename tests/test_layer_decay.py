"""Learning rates that fall from layer to layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from conftest import tiny_encoder, tiny_tokenizer
from enc2gen import SwcmForConditionalGeneration
from enc2gen.errors import ConfigError
from enc2gen.models.baselines import build_system
from enc2gen.training import TrainingConfig
from enc2gen.training.layers import layer_factors
from enc2gen.training.optim import build_optimizer, set_learning_rate
from test_donors import tiny


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"max_steps": 10, "learning_rate": 1.0, "warmup": 4, **changes})


def grow(encoder: Any = None, **options: Any) -> SwcmForConditionalGeneration:
    return SwcmForConditionalGeneration.from_encoder(encoder or tiny_encoder(), verbose=False, **options)


def rates(model: nn.Module, settings: TrainingConfig, new: Any = None) -> dict[str, float]:
    optimizer = build_optimizer(model, settings, new)
    set_learning_rate(optimizer, 3, settings)  # at the peak
    by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def fresh(model: SwcmForConditionalGeneration) -> Any:
    return {*model.init_report.names("random"), *model.init_report.names("constant")}.__contains__


def test_every_layer_has_its_power_of_the_factor() -> None:
    """Four encoder layers; custom 0, custom 1, normal, custom 2, custom 3, normal."""
    model = grow(insert_every=2, tie_lm_head=False)
    found = rates(model, config(layer_decay=0.5), fresh(model))
    powers = {f"encoder.encoder.layer.{i}.": 4 - i for i in range(4)}
    powers |= {f"decoder.layers.{place}.": 4 - i for i, place in enumerate((0, 1, 3, 4))}
    powers |= {f"decoder.layers.{place}.": 0 for place in (2, 5)}
    powers |= {"encoder.embeddings.": 5, "decoder.embed_": 5, "lm_head.": 0}
    for name, rate in found.items():
        power = next(power for prefix, power in powers.items() if name.startswith(prefix))
        assert rate == 0.5**power, name


def test_a_table_that_is_the_head_too_keeps_the_whole_rate() -> None:
    found = rates(grow(), config(layer_decay=0.5))
    assert found["encoder.embeddings.word_embeddings.weight"] == found["lm_head.weight"] == 1.0
    assert found["encoder.embeddings.position_embeddings.weight"] == 0.5**5


def test_of_a_tied_layers_two_places_the_higher_counts() -> None:
    """Donor layers 0 and 1 of four are the decoder's second and first from the top."""
    found = rates(grow(sharing="tied", donor_layers=[0, 1], insert_every=None), config(layer_decay=0.5))
    mark = "attention.self.query.weight"
    queries = [found[name] for name in found if name.startswith("encoder.") and name.endswith(mark)]
    assert queries == [0.25, 0.5, 0.25, 0.5]


@pytest.mark.parametrize("family", ["eurobert", "modernbert", "xlm-roberta-xl"])
def test_final_norms_are_above_the_layers(family: str) -> None:
    found = rates(grow(tiny(family), insert_every=None), config(layer_decay=0.5))
    finals = {
        "eurobert": "encoder.norm",
        "modernbert": "encoder.final_norm",
        "xlm-roberta-xl": "encoder.encoder.LayerNorm",
    }
    assert found[f"{finals[family]}.weight"] == found["decoder.final_norm.weight"] == 1.0
    assert min(found.values()) < 0.5


def test_new_parameters_inside_a_copied_layer_keep_their_own_rate() -> None:
    model = grow(copy=("embeddings", "self_attention", "ffn", "norms"), insert_every=None)
    found = rates(model, config(layer_decay=0.5, new_parameters_lr=3.0), fresh(model))
    assert found["decoder.layers.0.cross_attention.q_proj.weight"] == 3.0
    assert found["decoder.layers.0.self_attention.q_proj.weight"] == 0.5**4


def test_transformers_own_encoder_decoder_has_layers_too() -> None:
    model = build_system(
        "warm-start", tiny_encoder(), tokenizer=tiny_tokenizer(), languages=["kk"], seed=0, verbose=False
    )
    factors = layer_factors(model, 0.5, None)
    for side in ("encoder", "decoder.roberta"):
        layers = [factors[f"{side}.encoder.layer.{i}.output.dense.weight"] for i in range(4)]
        assert layers == [0.0625, 0.125, 0.25, 0.5]
    assert factors["decoder.lm_head.dense.weight"] == 1.0


def test_one_changes_nothing() -> None:
    groups = [
        [(g["scale"], g["weight_decay"], len(g["params"])) for g in build_optimizer(grow(), settings).param_groups]
        for settings in (config(), config(layer_decay=1.0))
    ]
    assert groups[0] == groups[1] and {scale for scale, _, _ in groups[0]} == {1.0}


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.layer_decay"):
        build_optimizer(nn.Linear(2, 2), config(layer_decay=0.9))
    with pytest.raises(ValueError, match="layer_decay"):
        config(layer_decay=1.1)


def test_lower_layers_move_less() -> None:
    model = grow(insert_every=None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = config(layer_decay=0.1, weight_decay=0.0)
    optimizer = build_optimizer(model, settings)
    set_learning_rate(optimizer, 3, settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # Adam's first update is the rate itself
    moved = [
        float((model.get_parameter(n).detach() - before[n]).abs().mean())
        for n in before
        if n.endswith("ffn2.fc1.weight")
    ]
    assert moved == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1], rel=1e-3)
