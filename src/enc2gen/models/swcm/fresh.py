"""How a grown decoder starts: fresh sub-layers that say nothing, and a norm below the LM head that speaks up.

**Silent sub-layers.** A decoder whose randomly initialised sub-layers say nothing at first starts as its copied part.

In pre-norm order, x = x + f(norm(x)): with the last projection of f at zero, the sub-layer is the identity.

In post-norm order, x = norm(x + f(x)), and what is left is the norm of states that a norm below has already made, which
is no identity: LayerNorm takes away each token's own mean and scale. A state z * gamma + beta of the norm below, z of
mean 0 and variance 1, has on average over z the mean m = mean(beta) and the variance s^2 = mean(gamma^2) + var(beta).
A fresh norm with the weight s and the bias m therefore changes a token only by how far its own mean and scale are from
the average ones, and applied again it changes nothing. (RMSNorm: s^2 = mean(gamma^2), no bias.)

**The top norm.** The LM head reads words off what the topmost norm leaves, by products with the word embeddings. An
encoder never needed those products: the gains of its top norm may be small (0.23 in multilingual-e5-small, where those
of a fresh norm are 1), and then no word's logit stands out. An optimiser that moves a gain by at most the learning rate
per update takes thousands of updates to widen them, whatever else it learns; a fresh normal layer on top is quick for
its gains of 1 (docs/results/normal-layers.md). Scaling gains and biases by one factor changes lengths alone: states
keep their directions.
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


def top_norm(decoder: SwcmDecoder) -> nn.Module:
    """The norm whose states the LM head reads."""
    layer = cast(Any, decoder.layers[-1])
    return decoder.final_norm or cast(nn.Module, layer.get_submodule(f"{layer.sublayers[-1]}_norm"))


def typical_gain(norm: nn.Module) -> float:
    """Root mean square of a norm's gains."""
    return float(cast(Any, norm.weight).detach().float().square().mean().sqrt())


def _fit(norm: nn.Module, below: nn.Module) -> None:
    """Give a fresh norm the average scale (and mean) of the states that the norm `below` makes."""
    scale, shift = cast(Any, below.weight), cast(Any, getattr(below, "bias", None))
    variance = scale.square().mean()
    if isinstance(norm, nn.LayerNorm) and shift is not None:
        variance = variance + shift.var(correction=0)
        cast(Any, norm.bias).fill_(shift.mean())
    cast(Any, norm.weight).fill_(variance.sqrt())
