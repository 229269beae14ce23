"""Schedule, parameter groups, freezing and the optimiser's state."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from enc2gen.errors import ConfigError
from enc2gen.training.config import Schedule, TrainingConfig
from enc2gen.training.optim import (
    build_optimizer,
    encoder_parameters,
    frozen_names,
    learning_rate_factor,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)


class Tied(nn.Module):
    """An embedding that is the encoder's, the decoder's and the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"embed": nn.Embedding(5, 4), "dense": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        # a decoder that holds a module called encoder, as BERT decoders in transformers do
        self.decoder = nn.ModuleDict({"encoder": nn.Linear(4, 4), "embed": self.encoder["embed"]})
        self.lm_head = nn.Linear(4, 5)
        self.lm_head.weight = self.encoder["embed"].weight


def _config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"max_steps": 10, "learning_rate": 1.0, "warmup": 4, **changes})


def test_schedule_table() -> None:
    factors = [learning_rate_factor(step, warmup_steps=4, max_steps=10) for step in range(11)]
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0]
    assert factors == pytest.approx(expected)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert [learning_rate_factor(step, warmup_steps=0, max_steps=4) for step in range(5)] == [
        1,
        0.75,
        0.5,
        0.25,
        0,
    ]


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("linear", get_linear_schedule_with_warmup),
        ("cosine", get_cosine_schedule_with_warmup),
        ("constant", lambda optimizer, warmup, _: get_constant_schedule_with_warmup(optimizer, warmup)),
    ],
)
def test_schedules_are_those_of_transformers(schedule: Any, theirs: Any, warmup: int) -> None:
    config = _config(learning_rate=3e-5, max_steps=24, warmup=warmup, schedule=schedule)
    ours = build_optimizer(nn.Linear(2, 2), config)
    other = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=3e-5)
    scheduler = theirs(other, warmup, 24)
    expected = []
    for _ in range(25):
        expected.append(other.param_groups[0]["lr"])
        other.step()
        scheduler.step()
    rates = [set_learning_rate(ours, step, config) for step in range(25)]
    # During warm-up ours is one update ahead: theirs starts with an update at rate 0.
    assert rates[:warmup] == pytest.approx(expected[1 : warmup + 1], rel=1e-12)
    assert rates[warmup:] == pytest.approx(expected[warmup:], rel=1e-12, abs=1e-20)


def test_schedules_stay_where_they_end() -> None:
    ends = {name: learning_rate_factor(99, warmup_steps=2, max_steps=10, schedule=name) for name in get_args(Schedule)}
    assert ends == {"linear": 0.0, "cosine": 0.0, "constant": 1.0}


def test_another_schedule_is_another_run() -> None:
    identities = [_config(schedule=schedule).identity() for schedule in get_args(Schedule)]
    assert [identity["schedule"] for identity in identities] == ["linear", "cosine", "constant"]


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (3, 3), (0.3, 60), (0.0, 0), (0.1, 20)])
def test_warmup_is_steps_or_a_share(warmup: float, steps: int) -> None:
    assert TrainingConfig(max_steps=200, warmup=warmup).warmup_steps == steps


@pytest.mark.parametrize(
    "changes",
    [
        {"warmup": 1.0},
        {"warmup": -1},
        {"warmup": 10},
        {"warmup": "3"},
        {"betas": (0.9, 1.0)},
        {"learning_rte": 1e-3},
        {"schedule": "cosinus"},
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        _config(**changes)


def test_biases_norms_and_embeddings_are_not_decayed() -> None:
    model = Tied()
    optimizer = build_optimizer(model, _config(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert named == {
        "encoder.embed.weight": 0.0,  # tied to lm_head, a Linear, and still an embedding
        "encoder.dense.weight": 0.1,
        "encoder.dense.bias": 0.0,
        "encoder.norm.weight": 0.0,
        "encoder.norm.bias": 0.0,
        "decoder.encoder.weight": 0.1,
        "decoder.encoder.bias": 0.0,
        "lm_head.bias": 0.0,
    }
    everything = build_optimizer(Tied(), _config(weight_decay=0.1, no_decay=()))
    assert {group["weight_decay"] for group in everything.param_groups} == {0.1}


def test_new_parameters_have_their_own_rate() -> None:
    model = Tied()
    config = _config(new_parameters_lr=3.0)
    optimizer = build_optimizer(model, config, lambda name: name.startswith("decoder."))
    assert set_learning_rate(optimizer, 1, config) == 0.5
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.decoder["encoder"].weight)] == 1.5
    assert rates[id(model.encoder["dense"].weight)] == 0.5


def test_new_parameters_lr_needs_a_predicate() -> None:
    with pytest.raises(ConfigError, match="new_parameters"):
        build_optimizer(Tied(), _config(new_parameters_lr=3.0))


def test_freeze_matches_any_name_of_a_tied_parameter() -> None:
    model = Tied()
    assert frozen_names(model, ["lm_head.weight"]) == {"encoder.embed.weight"}
    optimizer = build_optimizer(model, _config(freeze=("encoder.*",)))
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(p) for name, p in model.named_parameters() if not name.startswith("encoder.")}
    assert not model.encoder["dense"].weight.requires_grad


def test_freeze_pattern_without_match_is_an_error_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.dens\.\*.*matches no parameter[\s\S]*encoder\.dense"):
        build_optimizer(Tied(), _config(freeze=("encoder.dens.*",)))


def test_freezing_everything_is_an_error() -> None:
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        build_optimizer(Tied(), _config(freeze=("*",)))


def test_encoder_parameters_leave_out_what_the_decoder_shares() -> None:
    model = Tied()
    expected = {id(p) for module in ("dense", "norm") for p in model.encoder[module].parameters()}
    assert {id(parameter) for parameter in encoder_parameters(model)} == expected


def test_model_without_encoder_cannot_be_staged() -> None:
    with pytest.raises(ConfigError, match="freeze_encoder_steps"):
        encoder_parameters(nn.Linear(2, 2))


def test_optimizer_state_survives_its_tensors() -> None:
    def step(model: Tied, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    torch.manual_seed(0)
    first, second = Tied(), Tied()
    optimizer = build_optimizer(first, _config())
    step(first, optimizer, 0)
    second.load_state_dict(first.state_dict())
    restored = build_optimizer(second, _config())
    load_optimizer_tensors(restored, second, optimizer_tensors(optimizer, first))
    step(first, optimizer, 1)
    step(second, restored, 1)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
