"""Dropout (arXiv 1207.0580) that is quick on CPUs.

torch draws one Bernoulli number of double precision an element there, which took more than a tenth of a training step.
Here 64 random bits make the decisions of four elements, and elements are zeroed by a bitwise "and" with the decision:
no number is converted. The mask that is kept for the backward pass has two bytes an element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LEVELS = 2**15  # a decision has 15 bits: the rate is rounded to a multiple of 1/32,768
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element: what it is read as, to be masked."""


def masked(states: Tensor, keep: Tensor) -> Tensor:
    """`states` with zeros where `keep`, of :func:`drawn_mask` and of their shape, is 0. Not differentiable."""
    integers = _INTEGERS[states.element_size()]
    return states.view(integers).bitwise_and(keep.to(integers)).view(states.dtype)


def drawn_mask(states: Tensor, rate: float) -> tuple[Tensor | None, float]:
    """Which elements of `states`, on a CPU, dropout keeps, and the inverse of the share kept.

    The mask has their shape, and all bits set where an element is kept. It is `None` (all) where the rate, rounded to a
    multiple of 1/32,768 below 1, is 0, and of an empty tensor.
    """
    dropped = min(round(rate * _LEVELS), _LEVELS - 1)
    if not dropped or not states.numel():
        return None, 1.0
    words = torch.empty(-(-states.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: states.numel()].view(states.shape).bitwise_and_(_LEVELS - 1)
    # n in 0 ... 32,767 is kept if n >= dropped, where dropped - 1 - n is negative: its sign, repeated, is the mask
    keep = numbers.neg_().add_(dropped - 1).bitwise_right_shift_(15)
    return keep, _LEVELS / (_LEVELS - dropped)


class _MaskedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return masked(states, keep).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return masked(gradient, keep).mul_(ctx.scale), None, None


class Dropout(nn.Dropout):
    """`nn.Dropout`; in training on a CPU with quicker random numbers, elsewhere torch's own.

    Kept elements are scaled by the inverse of the share kept, exactly, so that the mean stays.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Zero elements of `states`, any shape, with probability `p`."""
        if not self.training or states.device.type != "cpu" or not 0 < self.p < 1:
            return super().forward(states)
        return self._quick(states)

    @torch.compiler.disable  # compiled, it is slower, and torch 2.13 gets the views wrong
    def _quick(self, states: Tensor) -> Tensor:
        keep, scale = drawn_mask(states, self.p)
        out: Tensor = states if keep is None else _MaskedScale.apply(states, keep, scale)
        return out


def use_quick_dropout(model: nn.Module) -> None:
    """Replace every `nn.Dropout` inside `model`; it has no parameters, so nothing else changes."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))
