"""Decoder layers of XLM-SWCM (arXiv 2502.10852, section 3).

Shapes: B batch, T target length, S source length, H hidden size, A heads, D = H / A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from enc2gen.models.swcm.configuration import SwcmConfig


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T / sqrt(D) + mask) V, with the attention weights returned.

    Args:
        query: `[B, A, T, D]`; key, value: `[B, A, S, D]`; attention_mask: additive, `[B, 1, T, S]`.

    Returns:
        Output `[B, T, A, D]` and weights `[B, A, T, S]`.
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Multi-head attention, over the target itself (causal) or over the encoder's states (cross).

    Args:
        layer_index: place of the layer in the decoder, the key of its cache entry.
        is_cross: whether keys and values come from the encoder.
    """

    def __init__(self, config: SwcmConfig, layer_index: int, *, is_cross: bool) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.layer_index = layer_index
        self.is_cross = is_cross
        self.is_causal = not is_cross
        self.head_dim = hidden // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)

    def _split(self, states: Tensor) -> Tensor:
        # [B, T, H] -> [B, A, T, D]
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _keys_values(self, states: Tensor, cache: EncoderDecoderCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, A, S, D]`; cross-attention projects the encoder's states once per source."""
        if cache is None:
            return self._split(self.k_proj(states)), self._split(self.v_proj(states))
        side: Cache = cache.cross_attention_cache if self.is_cross else cache.self_attention_cache
        if self.is_cross and cache.is_updated.get(self.layer_index):
            layer = side.layers[self.layer_index]
            return cast(Any, layer).keys, cast(Any, layer).values
        keys, values = self._split(self.k_proj(states)), self._split(self.v_proj(states))
        keys, values = side.update(keys, values, self.layer_index)
        if self.is_cross:
            cache.is_updated[self.layer_index] = True
        return keys, values

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None,
        attention_mask: Tensor | None,
        cache: EncoderDecoderCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `hidden_states` `[B, T, H]` to `key_value_states` `[B, S, H]` (or to itself).

        Returns:
            Output `[B, T, H]`, and weights `[B, A, T, S]` where the implementation is eager.
        """
        query = self._split(self.q_proj(hidden_states))
        key, value = self._keys_values(hidden_states if key_value_states is None else key_value_states, cache)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling)
        return self.out_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class FeedForward(nn.Module):
    """W2 act(W1 x + b1) + b2, `[B, T, H]` -> `[B, T, H]`."""

    def __init__(self, config: SwcmConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply position-wise to `[B, T, H]`."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class DecoderLayer(GradientCheckpointingLayer):
    """A sequence of sub-layers, each with its own residual and LayerNorm in the encoder's norm order.

    post: x = LN(x + f(x)) (BERT, XLM-R); pre: x = x + f(LN(x)).
    """

    sublayers: ClassVar[tuple[str, ...]]

    def __init__(self, config: SwcmConfig, layer_index: int) -> None:
        super().__init__()
        self.pre_norm = config.norm_order == "pre"
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        for name in self.sublayers:
            if name.endswith("attention"):
                self.add_module(name, Attention(config, layer_index, is_cross=name.startswith("cross")))
            else:
                self.add_module(name, FeedForward(config))
            self.add_module(f"{name}_norm", nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        self_mask: Tensor | None = None,
        cross_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One layer.

        Args:
            hidden_states: `[B, T, H]`.
            encoder_hidden_states: `[B, S, H]`.
            self_mask: causal mask `[B, 1, T, past + T]` in the attention implementation's form.
            cross_mask: padding mask `[B, 1, T, S]`.
            cache: keys and values of earlier steps.

        Returns:
            States `[B, T, H]`, self- and cross-attention weights (eager implementation only).
        """
        weights: dict[str, Tensor | None] = {}
        for name in self.sublayers:
            sublayer, norm = self.get_submodule(name), self.get_submodule(f"{name}_norm")
            states = norm(hidden_states) if self.pre_norm else hidden_states
            if name == "self_attention":
                states, weights[name] = sublayer(states, None, self_mask, cache)
            elif name == "cross_attention":
                states, weights[name] = sublayer(states, encoder_hidden_states, cross_mask, cache)
            else:
                states = sublayer(states)
            hidden_states = hidden_states + self.dropout(states)
            if not self.pre_norm:
                hidden_states = norm(hidden_states)
        return hidden_states, weights["self_attention"], weights["cross_attention"]


class CustomDecoderLayer(DecoderLayer):
    """Self-attention -> FFN1 -> cross-attention -> FFN2, all grown from encoder weights (arXiv 2502.10852, section 3).

    Both attentions start from the donor layer's self-attention, both FFNs from its FFN, each with its LayerNorm.
    """

    sublayers = ("self_attention", "ffn1", "cross_attention", "ffn2")


class NormalDecoderLayer(DecoderLayer):
    """Self-attention -> cross-attention -> FFN: the standard layer, random at first (arXiv 2502.10852, section 3)."""

    sublayers = ("self_attention", "cross_attention", "ffn")
