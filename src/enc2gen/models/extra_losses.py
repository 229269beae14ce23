"""Losses beside the cross-entropy of the target: R-Drop and contrastive alignment of encoder states.

Both are sums that weigh as much as target tokens do, so that they can be divided by the targets of an update.

Shapes: N tokens, H hidden size, V vocabulary, R rows of a block, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from enc2gen.data.batching import IGNORED_LABEL
from enc2gen.models.linear_cross_entropy import product_dtype

_BLOCK = 2**24  # logits of one pass that exist at a time


class ContrastiveConfig(BaseModel):
    """Contrastive alignment of encoder states (mRASP2, arXiv 2105.09501)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(1.0, gt=0, description="Weight beside the cross-entropy (mRASP2, arXiv 2105.09501: 1).")
    temperature: float = Field(
        0.1, gt=0, description="Divides the cosines; smaller tells neighbours apart more sharply (mRASP2: 0.1)."
    )


@dataclass(frozen=True)
class ExtraLosses:
    """What a model adds to its label-smoothed cross-entropy.

    Attributes:
        r_drop: alpha; above 0, the batch is its first half twice, and the loss is half of equation (4) of arXiv
            2106.14448: the mean over both halves of the cross-entropy plus alpha / 2 times their divergence.
        contrastive: settings of the contrastive loss between the two sides of translation pairs.
    """

    r_drop: float = 0.0
    contrastive: ContrastiveConfig | None = None


def info_nce(left: Tensor, right: Tensor, temperature: float) -> Tensor:
    """Mean InfoNCE (arXiv 1807.03748) of pairs in nats, in both directions, with the batch's other pairs as negatives.

    With s(i, j) the cosine of left i and right j over the temperature: the mean over pairs i of
    -(log softmax_j s(i, j) + log softmax_j s(j, i)) / 2 at j = i. In float32 at least.

    Shape:
        left, right: `[P, H]`.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    with torch.autocast(left.device.type, enabled=False):
        cosines = F.normalize(left.to(dtype), dim=-1) @ F.normalize(right.to(dtype), dim=-1).T
        goal = torch.arange(len(left), device=left.device)
        scores = cosines / temperature
        return (F.cross_entropy(scores, goal) + F.cross_entropy(scores.T, goal)) / 2


def mean_pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each row, `[B, T, H]` and `[B, T]` (1 on tokens) to `[B, H]`, in float32 at least."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    weights = mask.to(wide.dtype)[..., None]
    return (wide * weights).sum(1) / weights.sum(1).clamp_min(1)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """(KL(P1 || P2) + KL(P2 || P1)) / 2 of softmax distributions, summed over rows (arXiv 2106.14448, equation 2).

    Shape:
        first, second: logits, `[N, V]`.
    """
    one, other = (F.log_softmax(logits, dim=-1, dtype=_wide(logits)) for logits in (first, second))
    return ((one.exp() - other.exp()) * (one - other)).sum() / 2


def linear_divergence(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """`divergence` of the logits `states @ weight.T + bias` of two passes, at real targets only.

    Logits exist for one block of tokens at a time; the gradients are computed with them, in the forward pass.

    Shape:
        first, second: `[..., H]`; weight: `[V, H]`; bias: `[V]`; targets: `[...]`, -100 where there is none.
    """
    rows = (targets.flatten() != IGNORED_LABEL).nonzero().squeeze(1)
    states = [passed.flatten(0, -2).index_select(0, rows) for passed in (first, second)]
    dtype = product_dtype(first, weight)
    loss: Tensor = _LinearDivergence.apply(*states, weight, bias, dtype, torch.is_grad_enabled())
    return loss


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        learning: bool,
    ) -> Tensor:
        work = torch.promote_types(dtype, torch.float32)
        passes = [first.detach().to(dtype), second.detach().to(dtype)]
        matrix, shift = weight.detach().to(dtype), None if bias is None else bias.detach().to(work)
        needed = ctx.needs_input_grad[:4] if learning else (False,) * 4
        inputs = (first, second, weight, bias)
        grads = [
            torch.zeros_like(tensor, dtype=work) if wanted and tensor is not None else None
            for tensor, wanted in zip(inputs, needed, strict=True)
        ]
        total, size = first.new_zeros((), dtype=work), max(1, _BLOCK // weight.shape[0])
        with torch.autocast(first.device.type, enabled=False):
            for start in range(0, len(first), size):
                block = [states[start : start + size] for states in passes]
                total += _one_block(block, matrix, shift, grads, start)
        ctx.gradients, ctx.dtypes = grads, [None if t is None else t.dtype for t in inputs]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.gradients = ctx.gradients, None  # scaled in place: there is no second copy of the weight's gradient
        if grads is None:
            raise RuntimeError("the gradients of linear_divergence were used up by an earlier backward pass")
        scaled = [
            None if grad is None else grad.mul_(grad_loss).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def _one_block(
    states: list[Tensor], weight: Tensor, bias: Tensor | None, grads: list[Tensor | None], start: int
) -> Tensor:
    """Divergence of the passes' `states`, `[R, H]` each; adds to `grads` of first, second, weight and bias.

    With d = log P1 - log P2, the gradient in the logits of P1 is (P1 (d - KL(P1 || P2)) + P1 - P2) / 2, and that in
    the logits of P2 the same with both exchanged.
    """
    logits = [(passed @ weight.T).to(torch.promote_types(weight.dtype, torch.float32)) for passed in states]
    if bias is not None:
        logits = [values + bias for values in logits]
    logs = [F.log_softmax(values, dim=-1) for values in logits]
    probabilities = [values.exp() for values in logs]
    total = logs[0].new_zeros(())
    for own, other in ((0, 1), (1, 0)):
        ratio = logs[own] - logs[other]
        kl = (probabilities[own] * ratio).sum(-1, keepdim=True)
        total = total + kl.sum() / 2
        if all(grad is None for grad in grads):
            continue
        slope = (probabilities[own] * (ratio - kl) + probabilities[own] - probabilities[other]) / 2
        rounded = slope.to(weight.dtype)
        if (grad := grads[own]) is not None:
            grad[start : start + len(slope)] = rounded @ weight
        if (grad := grads[2]) is not None:
            grad += rounded.T @ states[own]
        if (grad := grads[3]) is not None:
            grad += slope.sum(0)
    return total
