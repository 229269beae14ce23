"""Low-rank adaptation of chosen layers of an encoder or LLM, through peft, merged into the weights afterwards.

LoRA (arXiv 2106.09685, equation 3) computes W x + (alpha / rank) B A x with W frozen, A `[rank, in]` random and
B `[out, rank]` zero at the start; merging adds (alpha / rank) B A to W. DoRA (arXiv 2402.09353, equation 5) learns the
length of each row of W besides, and updates its direction only.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import PreTrainedModel

from enc2gen.errors import ConfigError, ModelError
from enc2gen.models.seeding import seeded


class LoraSettings(BaseModel):
    """Which layers get low-rank updates, and how large these are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=16, ge=1, description="rank of the updates (our choice; the paper uses 1 to 64)")
    alpha: int = Field(default=32, ge=1, description="updates are scaled by alpha / rank (our choice: twice rank)")
    layers: tuple[int, ...] | None = Field(
        default=None, description="layers, counted from 0, whose linear maps are updated; null: all layers"
    )
    dora: bool = Field(default=False, description="DoRA: learn the rows' lengths, too, and update directions only")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the input of the updates")


def add_lora(model: PreTrainedModel, settings: LoraSettings, seed: int = 0) -> None:
    """Put LoRA around every linear map of the chosen layers, in place; the model computes the same as before.

    Raises:
        ConfigError: peft is not installed, or there is no such layer.
        ModelError: the model's layers are not found.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("LoRA needs peft", where="lora", remedy='pip install "enc2gen[lora]"') from error
    stack = _layer_list(model)
    layers = range(len(stack)) if settings.layers is None else sorted(set(settings.layers))
    wrong = [layer for layer in layers if not 0 <= layer < len(stack)]
    if wrong or not layers:
        raise ConfigError(
            f"the model has no layer {wrong[0]}" if wrong else "no layer is chosen",
            where="lora.layers",
            remedy=f"use numbers from 0 to {len(stack) - 1}",
        )
    inside = {id(module) for layer in layers for module in stack[layer].modules() if isinstance(module, nn.Linear)}
    targets = [name for name, module in model.named_modules() if id(module) in inside]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.dora,
        target_modules=targets,
    )
    with seeded(seed):
        inject_adapter_in_model(config, model)


def _layer_list(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers: the first list of modules that is as long as its configuration says."""
    layers = model.config.get_text_config().num_hidden_layers
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    if not found:
        raise ModelError(f"no list of {layers} layers is found in {type(model).__name__}", where="lora")
    return found[0]  # the outermost one comes first


def is_lora(parameter_name: str) -> bool:
    """Whether a parameter of this name is part of a low-rank update."""
    return ".lora_" in parameter_name


def merge_lora(model: PreTrainedModel) -> None:
    """Add the updates to the weights and take peft's modules out again; nothing happens where there are none."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
