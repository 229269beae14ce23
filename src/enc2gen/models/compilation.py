"""torch.compile of layers: all layers of a kind share one compilation, so that depth costs no time to compile.

Where it pays is a question of the device. On a GPU small operations are launches that compilation joins. On CPUs it was
measured to gain nothing in training (docs/performance.md), so that it is off unless asked for.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch._dynamo  # torch does not load it by itself
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from enc2gen.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


_VARIANTS = 64
"""Most compilations of one function: kinds of layers x precisions x a few shapes, such as one beam and several."""


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, compiled when it is first called; sizes that turn out to vary are then left open."""
    _allow_variants()
    return cast("Callable[P, T]", torch.compile(function))


def _allow_variants() -> None:
    # torch gives up after 8, and goes on without compilation
    torch._dynamo.config.recompile_limit = max(_VARIANTS, torch._dynamo.config.recompile_limit)


@functools.cache
def _compiles_on(device: torch.device) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(torch.add)(torch.ones(2, device=device), 1.0)


def check_compiler(device: torch.device, *, where: str) -> None:
    """Compile one addition, unless that has worked before.

    Raises:
        ConfigError: torch.compile has no compiler for `device`; `where` names the setting that asked for it.
    """
    try:
        _compiles_on(device)
    except Exception as error:  # whatever a missing or broken compiler makes torch raise
        needs = "a C++ compiler (g++ or clang++)" if device.type == "cpu" else "Triton"
        raise ConfigError(
            f"torch.compile does not work on {device}: {str(error).strip().splitlines()[0] if str(error) else error!r}",
            where=where,
            remedy=f"install {needs}, or leave it off",
        ) from error


def compile_layers(model: nn.Module, device: torch.device, *, where: str) -> Callable[[], None]:
    """Compile every transformer layer of `model` in place; parameters and their names stay.

    Returns:
        What takes it back.

    Raises:
        ConfigError: there is no compiler, or `model` has no layer that is known as one.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no layers to compile", where=where, remedy="set it to false")
    check_compiler(device, where=where)
    _allow_variants()
    for layer in layers:
        layer.compile()

    def undo() -> None:
        for layer in layers:
            layer._compiled_call_impl = None

    return undo
