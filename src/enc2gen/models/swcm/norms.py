"""Norms of the decoder: LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467), as the encoder has them."""

from __future__ import annotations

from torch import nn

from enc2gen.models.swcm.configuration import SwcmConfig


def build_norm(config: SwcmConfig) -> nn.Module:
    """A fresh norm of the last dimension, `[..., H]`."""
    if config.norm_type == "rms":
        return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.norm_bias)


def build_head_norm(config: SwcmConfig, head_dim: int) -> nn.RMSNorm:
    """A fresh RMSNorm of one head's queries or keys, `[..., D]`, the same for all heads."""
    return nn.RMSNorm(head_dim, eps=config.layer_norm_eps)
