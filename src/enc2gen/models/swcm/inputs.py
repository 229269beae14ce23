"""What the model refuses to read: sources longer than its encoder's positions, labels that fit no logits."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from enc2gen.encoders.donor import donor_for
from enc2gen.errors import ModelError


def check_source(encoder: PreTrainedModel, source: Tensor) -> None:
    """Raise `ModelError` unless `encoder` has a position for every token of `source`, `[B, S]` or `[B, S, H]`."""
    limit = donor_for(encoder.config).max_positions
    if source.shape[1] > limit:
        raise ModelError(
            f"the source is {source.shape[1]} tokens long, but the encoder has positions for {limit}",
            where="input_ids",
            remedy=f"truncate sources to {limit} tokens, or split them into sentences",
        )


def check_labels(labels: Tensor, target: Tensor, logits_to_keep: int | Tensor) -> None:
    """Raise `ModelError` unless there is a label and are logits for every position of `target`, `[B, T]` or more."""
    if labels.shape != target.shape[:2] or not isinstance(logits_to_keep, int) or logits_to_keep:
        raise ModelError(
            f"labels {tuple(labels.shape)} need the logits of all decoder positions {tuple(target.shape[:2])}",
            where="labels",
            remedy="give a label for every decoder position, -100 where none is predicted, and no logits_to_keep",
        )
