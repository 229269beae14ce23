"""EuroBERT layout (arXiv 2503.05500): pre-norm, RMSNorm, rotary positions, gated FFNs, grouped query heads."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import nn
from transformers import PreTrainedModel

from enc2gen.encoders.donor import DecoderStyle, Donor, LayerStyle, NormOrder, Source, whole

_ATTENTION = {part: f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")} | {"out_proj": "self_attn.o_proj"}
_FFN = {part: f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")}


class EuroBertDonor(Donor):
    """Donor for `EuroBertModel`."""

    family: ClassVar[str] = "eurobert"
    model_types: ClassVar[tuple[str, ...]] = ("eurobert",)
    norm_order: ClassVar[NormOrder] = "pre"
    dropout_fields: ClassVar[tuple[str, ...]] = ("attention_dropout",)

    def check(self) -> None:
        """Refuse rescaled rotary positions."""
        kind = self.config.rope_parameters["rope_type"]
        if kind != "default":
            self._refuse(f"rotary positions of type {kind!r} are not supported", "use an encoder with plain ones")

    def style(self) -> DecoderStyle:
        config = self.config
        return DecoderStyle(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            hidden_act=config.hidden_act,
            norm_type="rms",
            norm_bias=False,
            layer_norm_eps=config.rms_norm_eps,
            attention_bias=config.attention_bias,
            ffn_type="gated",
            ffn_bias=config.mlp_bias,
            embed_norm=False,
            learned_positions=False,
            max_position_embeddings=config.max_position_embeddings,
            initializer_range=config.initializer_range,
            hidden_dropout_prob=0.0,  # EuroBERT drops attention weights only
            attention_probs_dropout_prob=config.attention_dropout,
        )

    def layer_style(self, layer: int | None) -> LayerStyle:
        return LayerStyle(rope_theta=float(self.config.rope_parameters["rope_theta"]))

    def word_embeddings(self) -> str:
        return "embed_tokens.weight"

    def embeddings(self) -> dict[str, Source]:
        return {}

    def attention(self, layer: int) -> dict[str, Source]:
        return self._parts(layer, _ATTENTION, bias=self.config.attention_bias)

    def attention_norm(self, layer: int) -> dict[str, Source]:
        return whole({"weight": f"layers.{layer}.input_layernorm.weight"})

    def ffn(self, layer: int) -> dict[str, Source]:
        return self._parts(layer, _FFN, bias=self.config.mlp_bias)

    def ffn_norm(self, layer: int) -> dict[str, Source]:
        return whole({"weight": f"layers.{layer}.post_attention_layernorm.weight"})

    def final_norm(self) -> dict[str, Source]:
        return whole({"weight": "norm.weight"})

    def layer_list(self, encoder: PreTrainedModel) -> nn.ModuleList:
        return cast(nn.ModuleList, encoder.get_submodule("layers"))

    @staticmethod
    def _parts(layer: int, names: dict[str, str], *, bias: bool) -> dict[str, Source]:
        kinds = ("weight", "bias") if bias else ("weight",)
        return whole(
            {f"{ours}.{kind}": f"layers.{layer}.{theirs}.{kind}" for ours, theirs in names.items() for kind in kinds}
        )
