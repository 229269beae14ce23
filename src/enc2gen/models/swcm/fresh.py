"""Randomly initialised sub-layers that say nothing at first, so that a grown decoder starts as its copied part.

In pre-norm order, x = x + f(norm(x)): with the last projection of f at zero, the sub-layer is the identity.

In post-norm order, x = norm(x + f(x)), and what is left is the norm of states that a norm below has already made, which
is no identity: LayerNorm takes away each token's own mean and scale. A state z * gamma + beta of the norm below, z of
mean 0 and variance 1, has on average over z the mean m = mean(beta) and the variance s^2 = mean(gamma^2) + var(beta).
A fresh norm with the weight s and the bias m therefore changes a token only by how far its own mean and scale are from
the average ones, and applied again it changes nothing. (RMSNorm: s^2 = mean(gamma^2), no bias.)
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, cast

import torch
from torch import nn

from enc2gen.models.swcm.decoder import SwcmDecoder

_LAST = ("out_proj", "fc2", "down_proj")  # of attention, plain and gated FFNs


@torch.no_grad()
def silence_fresh_sublayers(decoder: SwcmDecoder, sources: Container[str]) -> None:
    """Set the last projections of all sub-layers that are not grown from the encoder to zero, in place.

    Where norms come after the sub-layers, theirs are fitted to the norm below, as the head of this file says.

    Args:
        decoder: with its weights at initialisation.
        sources: names of the model's parameters that are grown from the encoder, as `decoder.layers.0. ...`.
    """
    below = decoder.embed_norm
    post = decoder.config.norm_order == "post"
    for index, layer in enumerate(cast(Any, decoder.layers)):
        for name in layer.sublayers:
            sublayer, norm = layer.get_submodule(name), layer.get_submodule(f"{name}_norm")
            last = next(part for part in _LAST if hasattr(sublayer, part))
            if f"decoder.layers.{index}.{name}.{last}.weight" not in sources:
                for parameter in sublayer.get_submodule(last).parameters():
                    parameter.zero_()
                if post and below is not None:
                    _fit(norm, below)
            below = norm


def _fit(norm: nn.Module, below: nn.Module) -> None:
    """Give a fresh norm the average scale (and mean) of the states that the norm `below` makes."""
    scale, shift = cast(Any, below.weight), cast(Any, getattr(below, "bias", None))
    variance = scale.square().mean()
    if isinstance(norm, nn.LayerNorm) and shift is not None:
        variance = variance + shift.var(correction=0)
        cast(Any, norm.bias).fill_(shift.mean())
    cast(Any, norm.weight).fill_(variance.sqrt())
