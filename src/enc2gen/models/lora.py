"""Low-rank adaptation of chosen encoder layers, through peft, merged into the weights afterwards.

LoRA (arXiv 2106.09685, equation 3) computes W x + (alpha / rank) B A x with W frozen, A `[rank, in]` random and
B `[out, rank]` zero at the start; merging adds (alpha / rank) B A to W.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import PreTrainedModel

from enc2gen.encoders.donor import donor_for
from enc2gen.errors import ConfigError


class LoraSettings(BaseModel):
    """Which layers get low-rank updates, and how large these are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=16, ge=1, description="rank of the updates (our choice; the paper uses 1 to 64)")
    alpha: int = Field(default=32, ge=1, description="updates are scaled by alpha / rank (our choice: twice rank)")
    layers: tuple[int, ...] | None = Field(
        default=None, description="encoder layers, counted from 0, whose linear maps are updated; null: all layers"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the input of the updates")


def add_lora(encoder: PreTrainedModel, settings: LoraSettings, seed: int = 0) -> None:
    """Put LoRA around every linear map of the chosen layers, in place; the encoder computes the same as before.

    Raises:
        ConfigError: peft is not installed, or there is no such layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("LoRA needs peft", where="lora", remedy='pip install "enc2gen[lora]"') from error
    stack = donor_for(encoder.config).layer_list(encoder)
    layers = range(len(stack)) if settings.layers is None else sorted(set(settings.layers))
    wrong = [layer for layer in layers if not 0 <= layer < len(stack)]
    if wrong or not layers:
        raise ConfigError(
            f"the encoder has no layer {wrong[0]}" if wrong else "no layer is chosen",
            where="lora.layers",
            remedy=f"use numbers from 0 to {len(stack) - 1}",
        )
    inside = {id(module) for layer in layers for module in stack[layer].modules() if isinstance(module, nn.Linear)}
    targets = [name for name, module in encoder.named_modules() if id(module) in inside]
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, encoder)


def is_lora(parameter_name: str) -> bool:
    """Whether a parameter of this name is part of a low-rank update."""
    return ".lora_" in parameter_name


def merge_lora(encoder: PreTrainedModel) -> None:
    """Add the updates to the weights and take peft's modules out again; nothing happens where there are none."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return
    for name, module in list(encoder.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(encoder.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(encoder, "peft_config"):
        del encoder.peft_config
