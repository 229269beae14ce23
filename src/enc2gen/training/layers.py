"""Names of parameters, and learning rates that fall from layer to layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from enc2gen.errors import ConfigError


def parameter_names(model: nn.Module) -> dict[str, list[str]]:
    """First name of every parameter -> all its names (more than one where parameters are tied)."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: group for group in names.values()}


class _Place(NamedTuple):
    """Where a parameter name lies.

    Attributes:
        side: `encoder` or `decoder`; empty: outside both.
        layer: index in the outermost list of layers; `None`: not in a layer.
    """

    side: str
    layer: int | None


def layer_factors(model: nn.Module, decay: float, new_parameters: Callable[[str], bool] | None) -> dict[str, float]:
    """First name of each parameter -> factor of its learning rate (ELECTRA, arXiv 2003.10555; BEiT, arXiv 2106.08254).

    In a stack of n layers, the k-th from the top has decay^k, and what the stack stands on (embeddings, positions,
    their norm) decay^(n + 1). Encoder and decoder are a stack each. New parameters have the factor 1, and layers of
    new parameters alone are not counted; so have those behind a stack (final norms) or outside both (an LM head). Where
    a parameter has several names, which is what tying means, the largest of their factors counts.

    Args:
        new_parameters: tells by name which parameters are randomly initialised; `None`: none is.

    Raises:
        ConfigError: the model has no layers under `encoder` or `decoder`.
    """
    groups = parameter_names(model)
    new = {name for name, group in groups.items() if new_parameters is not None and any(map(new_parameters, group))}
    grown: dict[str, set[int]] = {}
    for first, group in groups.items():
        for place in map(_place, group):
            if place.layer is not None and first not in new:
                grown.setdefault(place.side, set()).add(place.layer)
    if not any(grown.values()):
        raise ConfigError(
            "the model has no layers of pretrained weights under 'encoder' or 'decoder'",
            where="training.layer_decay",
            remedy="set it to 1",
        )

    def factor(name: str) -> float:
        side, layer = _place(name)
        layers = sorted(grown.get(side, ()))
        if not layers or (layer is None and _behind(name)):
            return 1.0
        below = len(layers) if layer is None else sum(own < layer for own in layers)
        return decay ** (len(layers) + 1 if layer is None else len(layers) - below)

    return {first: 1.0 if first in new else max(map(factor, group)) for first, group in groups.items()}


def _place(name: str) -> _Place:
    parts = name.split(".")
    side = next((part for part in parts if part in ("encoder", "decoder")), "")
    layer = next((int(part) for part in parts if part.isdigit()), None) if side else None
    return _Place(side, layer)


def _behind(name: str) -> bool:
    """Whether a parameter outside the layers is used after them rather than before."""
    return not any("embed" in part for part in name.split("."))
