"""The output layer's loss by a kernel library, on NVIDIA GPUs where one is installed: cut-cross-entropy.

Its `cce_exact` sums gradients in float32 and leaves no small one out (arXiv 2411.09009, section 4), which large
vocabularies need; the library's default does neither. liger-kernel is not used: it reduces over one slice of the
vocabulary for a whole row and has been reported to lose precision above 250,000 pieces.
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _library() -> Any:
    """`cut_cross_entropy.linear_cross_entropy`, or `None` where it is missing or too old to add a bias."""
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return None
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy if "bias" in inspect.signature(linear_cross_entropy).parameters else None


def kernel_usable(states: Tensor, dtype: torch.dtype) -> bool:
    """Whether :func:`kernel_loss` computes this: on CUDA, in bfloat16, with the library installed."""
    return states.is_cuda and dtype == torch.bfloat16 and _library() is not None


def kernel_loss(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Summed loss and negative log-likelihood; differentiable by autograd.

    Smoothing needs no logits: with e the smoothing, the loss is nll + e (logit of the target - mean logit), and the
    mean logit is the product with the mean row.

    Shape:
        states: `[N, H]` bfloat16; weight: `[V, H]` bfloat16; bias: `[V]`; targets: `[N]`.
    """
    each = _library()(states, weight, targets, bias=bias, reduction="none", impl="cce_exact").float()
    nll = each.sum()
    if not label_smoothing:
        return nll, nll
    with torch.autocast(states.device.type, enabled=False):
        rows = states.float()
        chosen = (rows * weight[targets].float()).sum(1)
        mean = rows @ weight.mean(0, dtype=torch.float32)
        if bias is not None:
            chosen, mean = chosen + bias[targets].float(), mean + bias.float().mean()
    return nll + label_smoothing * (chosen - mean).sum(), nll
