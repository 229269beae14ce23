"""Cross-entropy of a linear output layer without its `[tokens, vocabulary]` logits.

With 250,000 pieces the logits, their softmax and their gradient are by far the largest tensors of a training step.
Here a block of tokens is multiplied with one slice of the vocabulary after the other. A slice's logits become
exponentials while they are in the processor's cache, relative to the largest logit so far (online softmax, arXiv
1805.02867); the exponentials are kept until the block is through, and the gradients are products with them, so that
no logit is computed twice. What the row's final maximum and sum change is a factor per row and slice, which goes to
the small operands of the products instead of to the exponentials.

Shapes: N tokens, H hidden size, V vocabulary, R rows of a block, C columns of a slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from enc2gen.data.batching import IGNORED_LABEL
from enc2gen.models.loss_kernels import kernel_loss, kernel_usable
from enc2gen.models.token_loss import TokenLoss

# Rows of a block and columns of a slice. Of a CPU: a slice of a block stays in the cache, and a block is so high that
# the products, not reading the weights again for each block, take the time (measured).
_ROWS, _COLUMNS = 1024, 1024
_ROWS_GPU, _COLUMNS_GPU = 4096, 16384
_ROW_MULTIPLE = 32  # of rows in a block: few different shapes, whose kernels are prepared once


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORED_LABEL,
) -> TokenLoss:
    """Summed cross-entropy of the logits `hidden @ weight.T + bias`, equal to computing them.

    With smoothing e the target distribution is (1 - e) on the target plus e / V on every piece (arXiv 1512.00567,
    section 7). Rows without a target cost nothing. Products are in autocast's bfloat16 where that is on, everything
    else in float32 (float64 for float64 input). Gradients are computed in the forward pass, and only those that are
    needed; a frozen `weight` costs none.

    Shape:
        hidden: `[..., H]`; weight: `[V, H]`; bias: `[V]`; targets: `[...]`, `ignore_index` where there is none.
    """
    flat, goal = hidden.flatten(0, -2), targets.flatten().to(hidden.device)
    rows = (goal != ignore_index).nonzero().squeeze(1)
    dtype = product_dtype(hidden, weight)
    if kernel_usable(flat, dtype):
        goal = goal[rows]
        loss, nll = kernel_loss(flat[rows].to(dtype), weight.to(dtype), bias, goal, label_smoothing)
    else:
        learning = torch.is_grad_enabled()  # within `apply` it is off
        arguments = (goal[rows], rows, label_smoothing, dtype, learning)
        loss, nll = _LinearCrossEntropy.apply(flat, weight, bias, *arguments)
    return TokenLoss(loss, nll.detach(), rows.new_tensor(rows.numel()))


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Precision of an output layer's products: autocast's, if it is one with float32's range; else the operands'."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass
class _Block:
    """One block's operands and what its forward pass leaves for the gradients.

    Attributes:
        states: `[R, H]` in the products' precision; rows beyond the targets are zero.
        targets: `[R]`; 0 in those rows.
        live: `[R, 1]`, 1 for real rows.
        exponentials: `[slices, R, C]`, exp(logit - reference); `None` without gradients.
        references: per slice, the largest logit of the row so far, `[R, 1]`.
    """

    states: Tensor
    targets: Tensor
    live: Tensor
    exponentials: Tensor | None
    references: list[Tensor]


class _Layer:
    """The output layer in the products' precision, cut into slices of the vocabulary."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype)
        self.work_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.bias = None if bias is None else bias.detach().to(self.work_dtype)
        on_cpu = weight.device.type == "cpu"
        size, widest = weight.shape[0], _COLUMNS if on_cpu else _COLUMNS_GPU
        self.most_rows = _ROWS if on_cpu else _ROWS_GPU
        self.slices = [(start, min(size, start + widest)) for start in range(0, size, widest)]
        self.columns = min(size, widest)

    def rows_per_block(self, tokens: int) -> int:
        """Of equal blocks."""
        rows = math.ceil(tokens / math.ceil(tokens / self.most_rows))
        return math.ceil(rows / _ROW_MULTIPLE) * _ROW_MULTIPLE

    def target_logits(self, states: Tensor, targets: Tensor) -> Tensor:
        """`[R, 1]`, rounded as the products round."""
        rows = self.weight.index_select(0, targets).to(self.work_dtype)
        logits = (states.to(self.work_dtype) * rows).sum(1, keepdim=True).to(self.weight.dtype).to(self.work_dtype)
        return logits if self.bias is None else logits + self.bias[targets, None]

    def mean(self) -> tuple[Tensor, Tensor | float]:
        """Mean row `[H]` and mean bias."""
        return self.weight.mean(0, dtype=self.work_dtype), 0.0 if self.bias is None else self.bias.mean()


@dataclass
class _Gradients:
    """Sums of gradients over blocks; `None` where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor,
        smoothing: float,
        dtype: torch.dtype,
        learning: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            layer = _Layer(weight, bias, dtype)
            needed = ctx.needs_input_grad if learning else (False, False, False)
            grads = _empty_gradients(layer, hidden, rows, smoothing, needed)
            loss, nll = _over_blocks(layer, hidden, targets, rows, smoothing, grads)
        ctx.gradients = grads
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.gradients
        if grads is None:
            raise RuntimeError("the gradients of linear_cross_entropy were used up by an earlier backward pass")
        ctx.gradients = None  # scaled in place: there is no second copy of the weight's gradient
        tensors = (grads.hidden, grads.weight, grads.bias)
        scaled = [
            None if grad is None else grad.mul_(grad_loss).to(dtype)
            for grad, dtype in zip(tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def _empty_gradients(
    layer: _Layer, hidden: Tensor, rows: Tensor, smoothing: float, needed: tuple[bool, ...]
) -> _Gradients:
    """Gradients of the uniform part of the target distribution, which is the same for every piece; else zeros."""
    size, share = layer.weight.shape[0], smoothing / layer.weight.shape[0]
    weight = bias = None
    if needed[1]:
        weight = torch.zeros(layer.weight.shape, dtype=layer.work_dtype, device=hidden.device)
        if smoothing:
            states = hidden.detach().index_select(0, rows).to(layer.weight.dtype)
            weight += -share * states.sum(0, dtype=layer.work_dtype)
    if needed[2]:
        bias = torch.full((size,), -share * rows.numel(), dtype=layer.work_dtype, device=hidden.device)
    return _Gradients(torch.zeros_like(hidden, dtype=layer.work_dtype) if needed[0] else None, weight, bias)


def _over_blocks(
    layer: _Layer, hidden: Tensor, targets: Tensor, rows: Tensor, smoothing: float, grads: _Gradients
) -> tuple[Tensor, Tensor]:
    """Loss and negative log-likelihood; adds to `grads`."""
    loss, nll = torch.zeros((2,), dtype=layer.work_dtype, device=hidden.device)
    if not rows.numel():
        return loss.clone(), nll.clone()
    size, keep = (
        layer.rows_per_block(rows.numel()),
        any(g is not None for g in (grads.hidden, grads.weight, grads.bias)),
    )
    stored = layer.weight.new_empty((len(layer.slices), size, layer.columns)) if keep else None
    mean = layer.mean() if smoothing else None
    for start in range(0, rows.numel(), size):
        index = rows[start : start + size]
        block = _block(layer, hidden, targets[start : start + size], index, size, stored)
        target_logits = layer.target_logits(block.states, block.targets)
        top, total = _exponentials(layer, block, target_logits)
        log_sums = top + total.log()
        row_nll = (log_sums - target_logits) * block.live
        nll = nll + row_nll.sum()
        row_loss = row_nll
        if mean is not None:
            means = block.states.to(layer.work_dtype) @ mean[0][:, None] + mean[1]
            row_loss = (1.0 - smoothing) * row_nll + smoothing * (log_sums - means) * block.live
        loss = loss + row_loss.sum()
        if keep:
            excess = ((target_logits - log_sums).exp() - (1.0 - smoothing)) * block.live
            states_grad = _add_gradients(layer, block, top, total, excess, grads)
            if grads.hidden is not None:
                if mean is not None:
                    states_grad -= smoothing * mean[0]
                grads.hidden.index_copy_(0, index, states_grad[: index.numel()])
    return loss, nll


def _block(layer: _Layer, hidden: Tensor, targets: Tensor, index: Tensor, size: int, stored: Tensor | None) -> _Block:
    count = index.numel()
    states = layer.weight.new_zeros((size, layer.weight.shape[1]))
    states[:count] = hidden.detach().index_select(0, index)
    goal, live = index.new_zeros(size), torch.zeros((size, 1), dtype=layer.work_dtype, device=index.device)
    goal[:count], live[:count] = targets, 1.0
    return _Block(states, goal, live, stored, [])


def _exponentials(layer: _Layer, block: _Block, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest logit and the sum of its exponentials relative to that, `[R, 1]` each."""
    rows = block.states.shape[0]
    raw = layer.weight.new_empty(rows * layer.columns)
    work = torch.empty(rows * layer.columns, dtype=layer.work_dtype, device=raw.device)
    top, total = target_logits, torch.zeros_like(target_logits)
    for number, (start, stop) in enumerate(layer.slices):
        shape, width = (rows, stop - start), rows * (stop - start)
        product, logits = raw[:width].view(shape), work[:width].view(shape)
        torch.mm(block.states, layer.weight[start:stop].t(), out=product)
        logits.copy_(product)
        if layer.bias is not None:
            logits.add_(layer.bias[start:stop])
        before, top = top, torch.maximum(top, logits.amax(1, keepdim=True))
        logits.sub_(top).exp_()
        total = total * (before - top).exp() + logits.sum(1, keepdim=True)
        if block.exponentials is not None:
            block.exponentials[number, :, : stop - start].copy_(logits)
            block.references.append(top)
    return top, total


def _add_gradients(
    layer: _Layer, block: _Block, top: Tensor, total: Tensor, excess: Tensor, grads: _Gradients
) -> Tensor:
    """Add the block's gradients of weight and bias, and return that of its states, `[R, H]`.

    The target's own entry is left out of the products and added in full precision: p - 1 has few digits left in
    bfloat16 where p is near 1, which is where training ends.

    Args:
        excess: gradient of the target's logit without the uniform part, p - (1 - e), `[R, 1]`.
    """
    stored, states, work = cast(Tensor, block.exponentials), block.states, layer.work_dtype
    slices = torch.div(block.targets, layer.columns, rounding_mode="floor")
    stored[slices, torch.arange(states.shape[0], device=states.device), block.targets % layer.columns] = 0.0
    states_grad = excess * layer.weight.index_select(0, block.targets).to(work)
    for number, (start, stop) in enumerate(layer.slices):
        exponentials = stored[number, :, : stop - start]
        factor = (block.references[number] - top).exp() / total * block.live
        if grads.hidden is not None:
            states_grad.addcmul_(torch.mm(exponentials, layer.weight[start:stop]).to(work), factor)
        if grads.weight is not None:
            scaled = (states * factor).to(states.dtype)
            grads.weight[start:stop] += torch.mm(exponentials.t(), scaled)
        if grads.bias is not None:
            grads.bias[start:stop] += torch.mv(exponentials.t(), factor.squeeze(1).to(states.dtype))
    if grads.weight is not None:
        grads.weight.index_add_(0, block.targets, excess * states.to(work))
    if grads.bias is not None:
        grads.bias.index_add_(0, block.targets, excess.squeeze(1))
    return states_grad


@contextmanager
def without_projection(head: nn.Module) -> Iterator[None]:
    """Within this context `head` returns what it is given, so that a model's "logits" are the head's input."""
    own = head.__dict__.get("forward")  # set by wrappers such as Accelerate's hooks
    head.forward = _identity
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def _identity(states: Tensor) -> Tensor:
    return states
