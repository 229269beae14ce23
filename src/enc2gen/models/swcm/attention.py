"""Attention of the decoder: over the target (causal, rotary where the encoder's is) or over the source.

Shapes: B batch, T target length, S source length, H hidden size, A heads, K heads of keys and values, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from enc2gen.models.swcm.configuration import SwcmConfig
from enc2gen.models.swcm.norms import build_head_norm

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, each `[B, 1, T, D]` in float32."""


def rotation_at(positions: Tensor, theta: float, head_dim: int) -> Rotation:
    """Rotary angles p * theta^(-2i / D) of positions p `[B, T]`, i = 0 .. D/2 - 1 (arXiv 2104.09864, equation 15).

    Both halves of a head hold the same angles: dimension i is rotated with dimension i + D/2.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None, :, None].float() * (1.0 / theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Rotate queries or keys `[B, A, T, D]` by their positions, in float32."""
    cosines, sines = rotation
    first, second = states.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (states.float() * cosines + turned * sines).to(states.dtype)


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
        query: `[B, A, T, D]`; key, value: `[B, K, S, D]`, each head serving A / K neighbouring query heads;
            attention_mask: additive, `[B, 1, T, S]`.

    Returns:
        Output `[B, T, A, D]` and weights `[B, A, T, S]`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Multi-head attention, over the target itself (causal) or over the encoder's states (cross).

    With `qk_norm`, each head's query and key vectors are divided by their root mean square and multiplied by a learnt
    gain of size D, which all heads share and which is 1 at first: after the projection, before the rotation
    (query-key normalisation, arXiv 2010.04245, in the form of arXiv 2302.05442, section 2, with RMSNorm). Scores then
    lie within sqrt(D) times the product of the largest gains, however large the weights grow.

    Args:
        layer_index: place of the layer in the decoder, the key of its cache entry.
        is_cross: whether keys and values come from the encoder.
        sliding_window: tokens seen, the current one included (the mask says so too; flash attention needs the number).
    """

    def __init__(
        self, config: SwcmConfig, layer_index: int, *, is_cross: bool, sliding_window: int | None = None
    ) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        key_value_heads = config.num_key_value_heads or heads
        self.config = config
        self.layer_index = layer_index
        self.is_cross = is_cross
        self.is_causal = not is_cross
        self.sliding_window = sliding_window
        self.head_dim = config.head_dim or hidden // heads
        self.num_key_value_groups = heads // key_value_heads  # transformers' implementations read this name
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(hidden, key_value_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(hidden, key_value_heads * self.head_dim, bias=config.attention_bias)
        self.out_proj = nn.Linear(heads * self.head_dim, hidden, bias=config.attention_bias)
        self.q_norm = build_head_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = build_head_norm(config, self.head_dim) if config.qk_norm else None

    def _split(self, states: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
        # [B, T, A * D] -> [B, A, T, D]
        heads = states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)
        # in the gain's precision: autocast leaves projections in bfloat16 and the gain in float32
        return heads if norm is None else norm(heads.to(norm.weight.dtype)).to(states.dtype)

    def _keys_values(
        self, states: Tensor, cache: EncoderDecoderCache | None, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, K, S, D]`; cross-attention projects the encoder's states once per source."""
        side: Cache | None = None
        if cache is not None:
            side = cache.cross_attention_cache if self.is_cross else cache.self_attention_cache
            if self.is_cross and cache.is_updated.get(self.layer_index):
                layer = cast(Any, side.layers[self.layer_index])
                return layer.keys, layer.values
        keys, values = self._split(self.k_proj(states), self.k_norm), self._split(self.v_proj(states))
        if rotation is not None:
            keys = rotate(keys, rotation)  # before caching: a key's position never changes
        if side is not None:
            keys, values = side.update(keys, values, self.layer_index)
        if self.is_cross and cache is not None:
            cache.is_updated[self.layer_index] = True
        return keys, values

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None,
        attention_mask: Tensor | None,
        cache: EncoderDecoderCache | None,
        rotation: Rotation | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `hidden_states` `[B, T, H]` to `key_value_states` `[B, S, H]` (or to itself).

        Args:
            rotation: of queries and keys, for self-attention with rotary positions.
            options: what else the attention implementation is told.

        Returns:
            Output `[B, T, H]`, and weights `[B, A, T, S]` where the implementation is eager.
        """
        query = self._split(self.q_proj(hidden_states), self.q_norm)
        if rotation is not None:
            query = rotate(query, rotation)
        source = hidden_states if key_value_states is None else key_value_states
        key, value = self._keys_values(source, cache, rotation)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **options,
        )
        return self.out_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights
