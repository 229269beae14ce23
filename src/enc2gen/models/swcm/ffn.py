"""Feed-forward networks of the decoder, plain or gated, as the encoder has them. H is the hidden size."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from enc2gen.models.swcm.configuration import SwcmConfig


class FeedForward(nn.Module):
    """W2 act(W1 x + b1) + b2, `[B, T, H]` -> `[B, T, H]`."""

    def __init__(self, config: SwcmConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.ffn_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.ffn_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply position-wise to `[B, T, H]`."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class GatedFeedForward(nn.Module):
    """Wd (act(Wg x) * Wu x), `[B, T, H]` -> `[B, T, H]`: GeGLU or SwiGLU by activation (arXiv 2002.05202)."""

    def __init__(self, config: SwcmConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.ffn_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.ffn_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.ffn_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply position-wise to `[B, T, H]`."""
        return self.down_proj(self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def build_ffn(config: SwcmConfig) -> nn.Module:
    """A fresh feed-forward network of the configured kind."""
    return GatedFeedForward(config) if config.ffn_type == "gated" else FeedForward(config)
