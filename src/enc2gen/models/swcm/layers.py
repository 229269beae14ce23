"""Decoder layers of XLM-SWCM (arXiv 2502.10852, section 3).

Shapes: B batch, T target length, S source length, H hidden size, A heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from enc2gen.models.swcm.attention import Attention, Rotation
from enc2gen.models.swcm.configuration import LayerPlan, SwcmConfig
from enc2gen.models.swcm.ffn import build_ffn
from enc2gen.models.swcm.norms import build_norm


class DecoderLayer(GradientCheckpointingLayer):
    """A sequence of sub-layers, each with its own residual and norm in the encoder's norm order.

    post: x = norm(x + f(x)) (BERT, XLM-R); pre: x = x + f(norm(x)) (ModernBERT, EuroBERT, XLM-R XL).

    Args:
        layer_index: place in the decoder.
        plan: what this layer's self-attention sees and how it is rotated.
    """

    sublayers: ClassVar[tuple[str, ...]]

    def __init__(self, config: SwcmConfig, layer_index: int, plan: LayerPlan) -> None:
        super().__init__()
        self.pre_norm = config.norm_order == "pre"
        self.rope_theta = plan.rope_theta
        self.sliding_window = plan.sliding_window
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        for name in self.sublayers:
            self.add_module(name, self._build(name, config, layer_index))
            has_norm = plan.input_norm or name != "self_attention"
            self.add_module(f"{name}_norm", build_norm(config) if has_norm else nn.Identity())

    def _build(self, name: str, config: SwcmConfig, layer_index: int) -> nn.Module:
        if name == "self_attention":
            return Attention(config, layer_index, is_cross=False, sliding_window=self.sliding_window)
        if name == "cross_attention":
            return Attention(config, layer_index, is_cross=True)
        return build_ffn(config)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        self_mask: Tensor | None = None,
        cross_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        rotation: Rotation | None = None,
        attention_options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One layer.

        Args:
            hidden_states: `[B, T, H]`.
            encoder_hidden_states: `[B, S, H]`.
            self_mask: causal mask `[B, 1, T, past + T]` in the attention implementation's form.
            cross_mask: padding mask `[B, 1, T, S]`.
            cache: keys and values of earlier steps.
            rotation: of self-attention at the target's positions. Cross-attention is never rotated: a distance
                between a target and a source position means nothing.
            attention_options: by sub-layer, what else the attention implementation is told.

        Returns:
            States `[B, T, H]`, self- and cross-attention weights (eager implementation only).
        """
        weights: dict[str, Tensor | None] = {}
        for name in self.sublayers:
            sublayer, norm = self.get_submodule(name), self.get_submodule(f"{name}_norm")
            states = norm(hidden_states) if self.pre_norm else hidden_states
            options = attention_options.get(name, {})
            if name == "self_attention":
                states, weights[name] = sublayer(states, None, self_mask, cache, rotation, options)
            elif name == "cross_attention":
                states, weights[name] = sublayer(states, encoder_hidden_states, cross_mask, cache, None, options)
            else:
                states = sublayer(states)
            hidden_states = hidden_states + self.dropout(states)
            if not self.pre_norm:
                hidden_states = norm(hidden_states)
        return hidden_states, weights["self_attention"], weights["cross_attention"]


class CustomDecoderLayer(DecoderLayer):
    """Self-attention -> FFN1 -> cross-attention -> FFN2, all grown from encoder weights (arXiv 2502.10852, section 3).

    Both attentions start from the donor layer's self-attention, both FFNs from its FFN, each with its norm.
    """

    sublayers = ("self_attention", "ffn1", "cross_attention", "ffn2")


class NormalDecoderLayer(DecoderLayer):
    """Self-attention -> cross-attention -> FFN: the standard layer, random at first (arXiv 2502.10852, section 3)."""

    sublayers = ("self_attention", "cross_attention", "ffn")
