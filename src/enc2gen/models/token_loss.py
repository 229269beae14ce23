"""A batch's loss as sums and counts, so that accumulation over batches is exact."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from enc2gen.data.batching import IGNORED_LABEL


class TokenLoss(NamedTuple):
    """Sums over the target tokens of a batch; divide by a token count of your choice.

    Attributes:
        loss: float32 scalar with gradient, label-smoothed, nats.
        negative_log_likelihood: float32 scalar without gradient or smoothing, nats.
        count: number of target tokens, an integer scalar on the same device (no host sync).
    """

    loss: Tensor
    negative_log_likelihood: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nothing needs here


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> TokenLoss:
    """Summed cross-entropy in float32, whatever the precision of the logits.

    With smoothing e the target distribution is (1 - e) on the label plus e / vocabulary on every
    token (arXiv 1512.00567, section 7).

    Shape:
        logits: `[..., vocab]`; labels: `[...]`, -100 where there is no target.
    """
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32).flatten(0, -2)  # [..., vocab] -> [tokens, vocab]
    targets = labels.flatten()
    nll = F.nll_loss(log_probs, targets, ignore_index=IGNORED_LABEL, reduction="sum")
    valid = targets != IGNORED_LABEL
    loss = nll
    if label_smoothing:
        uniform = -log_probs.mean(dim=-1).masked_fill(~valid, 0.0).sum()
        loss = (1.0 - label_smoothing) * nll + label_smoothing * uniform
    return TokenLoss(loss=loss, negative_log_likelihood=nll.detach(), count=valid.sum())


def mean_cross_entropy(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Summed cross-entropy over the number of targets, in float32: what transformers calls a model's loss.

    Args:
        logits: `[B, T, vocab]`; labels: `[B, T]`, -100 where there is no target.
        num_items_in_batch: targets of all batches of an update, which transformers' Trainer divides by when it
            accumulates gradients; by default those of this batch.
    """
    flat, targets = logits.float().flatten(0, 1), labels.flatten().to(logits.device)
    if num_items_in_batch is None:
        return F.cross_entropy(flat, targets, ignore_index=IGNORED_LABEL)
    return F.cross_entropy(flat, targets, ignore_index=IGNORED_LABEL, reduction="sum") / num_items_in_batch
