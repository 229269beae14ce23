"""Optimiser and schedule: AdamW, which parameters it trains, and the rate as a function of the step."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from enc2gen.errors import ConfigError
from enc2gen.training.config import Schedule, TrainingConfig
from enc2gen.training.layers import layer_factors, parameter_names


def learning_rate_factor(step: int, *, warmup_steps: int, max_steps: int, schedule: Schedule = "linear") -> float:
    """Share of the peak rate for update `step` (from 0): linear rise, then as `schedule` says.

    With w = `warmup_steps` and n = `max_steps`, the share of update t is (t + 1) / w for t < w: the first update
    already moves and the peak is reached at the last warm-up update. From t = w on, it is

    - linear: (n - t) / (n - w);
    - cosine: (1 + cos(pi (t - w) / (n - w))) / 2 (arXiv 1608.03983, equation 5, one period down to 0);
    - constant: 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    left = max(0.0, (max_steps - step) / (max_steps - warmup_steps))
    return left if schedule == "linear" else (1 + math.cos(math.pi * (1 - left))) / 2


def frozen_names(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    """First names of the parameters that any pattern matches (by any of their names).

    Raises:
        ConfigError: a pattern matches nothing.
    """
    names = parameter_names(model)
    frozen: set[str] = set()
    for pattern in patterns:
        matched = {first for first, group in names.items() if any(fnmatchcase(name, pattern) for name in group)}
        if not matched:
            close = difflib.get_close_matches(pattern.rstrip("*"), names, n=1, cutoff=0.0)
            raise ConfigError(
                f"freeze pattern {pattern!r} matches no parameter",
                where="training.freeze",
                remedy=f"use shell patterns on parameter names, for example {close[0]!r}" if close else None,
            )
        frozen |= matched
    return frozen


def encoder_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters that belong to the encoder alone, for `freeze_encoder_steps`.

    A parameter under any other name as well (tied to the decoder or the LM head) is not among them: DeltaLM's
    first stage (arXiv 2106.13736) trains the whole decoder.

    Raises:
        ConfigError: there is none.
    """
    names = {first for first, group in parameter_names(model).items() if all(map(_in_encoder, group))}
    parameters = [p for name, p in model.named_parameters() if name in names and p.requires_grad]
    if not parameters:
        raise ConfigError(
            "the model has no trainable parameter that belongs to an encoder alone",
            where="training.freeze_encoder_steps",
            remedy='set it to 0; encoder parameters are those with "encoder" in their name',
        )
    return parameters


def _in_encoder(name: str) -> bool:
    side = next((part for part in name.split(".") if part in ("encoder", "decoder")), None)
    return side == "encoder"


def _undecayed(model: nn.Module, kinds: Iterable[str]) -> set[int]:
    """Ids of the parameters that weight decay leaves alone."""
    kinds = set(kinds)
    chosen: set[int] = set()
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            kind = "norm" if is_norm else "bias" if name.endswith("bias") else ""
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                kind = "embedding"
            if kind in kinds:
                chosen.add(id(parameter))
    return chosen


def build_optimizer(
    model: nn.Module, config: TrainingConfig, new_parameters: Callable[[str], bool] | None = None
) -> torch.optim.AdamW:
    """AdamW over the parameters that are not frozen for good; fused where the device supports it.

    Sets `requires_grad` of the permanently frozen parameters to False. Every group carries `scale`, the
    multiplier of the scheduled rate; :func:`set_learning_rate` applies it.

    Args:
        new_parameters: tells by name which parameters are new (random); needed with `new_parameters_lr`.
    """
    if config.new_parameters_lr != 1.0 and new_parameters is None:
        raise ConfigError(
            "new_parameters_lr needs to know which parameters are new",
            where="training.new_parameters_lr",
            remedy="pass new_parameters=PREDICATE to Trainer, or leave new_parameters_lr at 1",
        )
    frozen = frozen_names(model, config.freeze)
    undecayed = _undecayed(model, config.no_decay)
    factors = {} if config.layer_decay == 1.0 else layer_factors(model, config.layer_decay, new_parameters)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        scale = config.new_parameters_lr if new_parameters is not None and new_parameters(name) else 1.0
        scale *= factors.get(name, 1.0)
        decay = 0.0 if id(parameter) in undecayed else config.weight_decay
        groups.setdefault((scale, decay), []).append(parameter)
    if not groups:
        raise ConfigError("every parameter is frozen", where="training.freeze", remedy="leave something to train")
    return torch.optim.AdamW(
        [{"params": params, "scale": scale, "weight_decay": decay} for (scale, decay), params in groups.items()],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=_fused_supported(model),
    )


def _fused_supported(model: nn.Module) -> bool:
    # PyTorch documents the fused kernels for these devices; elsewhere the constructor raises.
    return all(parameter.device.type in ("cpu", "cuda", "xpu", "mps") for parameter in model.parameters())


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: TrainingConfig) -> float:
    """Set every group's rate for update `step` (from 0) and return the unscaled one."""
    factor = learning_rate_factor(
        step, warmup_steps=config.warmup_steps, max_steps=config.max_steps, schedule=config.schedule
    )
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor * group["scale"]
    return config.learning_rate * factor


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Optimiser state by parameter name: `"<key>/<parameter name>"` -> tensor."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value)
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Inverse of :func:`optimizer_tensors`; raises `KeyError` on a name that the model does not have."""
    parameters = dict(model.named_parameters())
    state: dict[nn.Parameter, dict[str, Any]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        parameter = parameters[name]
        state.setdefault(parameter, {})[key] = tensor.to(parameter.device, copy=True)
    optimizer.state.clear()
    for parameter, values in state.items():
        optimizer.state[parameter] = values
