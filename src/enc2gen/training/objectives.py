"""Training objective: token-level cross-entropy as sums and counts, so that accumulation is exact.

Models of this package compute it without logits (`models.linear_cross_entropy`); `cross_entropy` is for all others.
"""

from __future__ import annotations

from enc2gen.models.token_loss import TokenLoss, cross_entropy

__all__ = ["TokenLoss", "cross_entropy"]
