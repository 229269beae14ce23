"""Dropout (arXiv 1207.0580) that is quick on CPUs.

torch draws one Bernoulli number of double precision an element there, which took more than a tenth of a training step.
Here 64 random bits make the decisions of four elements, and the mask that is kept for the backward pass has a byte an
element instead of the element's own size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LEVELS = 2**16  # a decision has 16 bits: the rate is rounded to a multiple of 1/65,536


class _MaskedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (states * keep).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (gradient * keep).mul_(ctx.scale), None, None


def drawn_mask(states: Tensor, rate: float) -> tuple[Tensor | None, float]:
    """Which elements of `states`, on a CPU, dropout keeps, of their shape, and the inverse of the share kept.

    `None` (all) where the rate, rounded to a multiple of 1/65,536 below 1, is 0, and of an empty tensor.
    """
    dropped = min(round(rate * _LEVELS), _LEVELS - 1)
    if not dropped or not states.numel():
        return None, 1.0
    words = torch.empty(-(-states.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: states.numel()].view(states.shape) >= dropped - _LEVELS // 2
    return keep, _LEVELS / (_LEVELS - dropped)


class Dropout(nn.Dropout):
    """`nn.Dropout`; in training on a CPU with quicker random numbers, elsewhere torch's own.

    Kept elements are scaled by the inverse of the share kept, exactly, so that the mean stays.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Zero elements of `states`, any shape, with probability `p`."""
        if not self.training or states.device.type != "cpu" or not 0 < self.p < 1:
            return super().forward(states)
        keep, scale = drawn_mask(states, self.p)
        out: Tensor = states if keep is None else _MaskedScale.apply(states, keep, scale)
        return out


def use_quick_dropout(model: nn.Module) -> None:
    """Replace every `nn.Dropout` inside `model`; it has no parameters, so nothing else changes."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))
