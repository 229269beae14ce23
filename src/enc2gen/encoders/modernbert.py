"""ModernBERT layout (arXiv 2412.13663; mmBERT, arXiv 2509.06888).

Pre-norm without a norm before the first attention, rotary positions with one base for global and one for local layers,
gated FFNs, one fused matrix for queries, keys and values and one for the two halves of the FFN.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import nn
from transformers import PreTrainedModel

from enc2gen.encoders.donor import DecoderStyle, Donor, LayerStyle, NormOrder, Source, whole
from enc2gen.errors import ConfigError

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


class ModernBertDonor(Donor):
    """Donor for `ModernBertModel`."""

    family: ClassVar[str] = "modernbert"
    model_types: ClassVar[tuple[str, ...]] = ("modernbert",)
    norm_order: ClassVar[NormOrder] = "pre"
    dropout_fields: ClassVar[tuple[str, ...]] = ("embedding_dropout", "mlp_dropout", "attention_dropout")

    def check(self) -> None:
        """Refuse rescaled rotary positions."""
        for kind in sorted({self.config.rope_parameters[name]["rope_type"] for name in set(self.config.layer_types)}):
            if kind != "default":
                self._refuse(f"rotary positions of type {kind!r} are not supported", "use an encoder with plain ones")

    def style(self) -> DecoderStyle:
        config = self.config
        return DecoderStyle(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            hidden_act=config.hidden_activation,
            norm_bias=config.norm_bias,
            layer_norm_eps=config.norm_eps,
            attention_bias=config.attention_bias,
            ffn_type="gated",
            ffn_bias=config.mlp_bias,
            learned_positions=False,
            max_position_embeddings=config.max_position_embeddings,
            initializer_range=config.initializer_range,
            hidden_dropout_prob=config.mlp_dropout,
            attention_probs_dropout_prob=config.attention_dropout,
        )

    def layer_style(self, layer: int | None) -> LayerStyle:
        """Local layers see `local_attention / 2` tokens to each side, so as many before the current one.

        Random layers are global (our choice): nothing says which of them should be short-sighted.
        """
        kind = _GLOBAL if layer is None else self.config.layer_types[layer]
        return LayerStyle(
            rope_theta=float(self.config.rope_parameters[kind]["rope_theta"]),
            sliding_window=self.config.local_attention // 2 + 1 if kind == _LOCAL else None,
            attention_norm=layer != 0,
        )

    def word_embeddings(self) -> str:
        return "embeddings.tok_embeddings.weight"

    def embeddings(self) -> dict[str, Source]:
        return {f"embed_norm.{ours}": source for ours, source in self._norm("embeddings.norm").items()}

    def attention(self, layer: int) -> dict[str, Source]:
        hidden, prefix = self.config.hidden_size, f"layers.{layer}.attn"
        kinds = ("weight", "bias") if self.config.attention_bias else ("weight",)
        sources = {f"out_proj.{kind}": Source(f"{prefix}.Wo.{kind}") for kind in kinds}
        for place, part in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = (place * hidden, (place + 1) * hidden)
            sources |= {f"{part}.{kind}": Source(f"{prefix}.Wqkv.{kind}", rows) for kind in kinds}
        return sources

    def attention_norm(self, layer: int) -> dict[str, Source]:
        """The first layer has none, because its input comes normed from the embeddings: theirs stands in for it."""
        return self._norm(f"layers.{layer}.attn_norm" if layer else "embeddings.norm")

    def ffn(self, layer: int) -> dict[str, Source]:
        size, prefix = self.config.intermediate_size, f"layers.{layer}.mlp"
        kinds = ("weight", "bias") if self.config.mlp_bias else ("weight",)
        sources = {f"down_proj.{kind}": Source(f"{prefix}.Wo.{kind}") for kind in kinds}
        for place, part in enumerate(("gate_proj", "up_proj")):
            rows = (place * size, (place + 1) * size)
            sources |= {f"{part}.{kind}": Source(f"{prefix}.Wi.{kind}", rows) for kind in kinds}
        return sources

    def ffn_norm(self, layer: int) -> dict[str, Source]:
        return self._norm(f"layers.{layer}.mlp_norm")

    def final_norm(self) -> dict[str, Source]:
        return self._norm("final_norm")

    def _norm(self, name: str) -> dict[str, Source]:
        kinds = ("weight", "bias") if self.config.norm_bias else ("weight",)
        return whole({kind: f"{name}.{kind}" for kind in kinds})

    def layer_list(self, encoder: PreTrainedModel) -> nn.ModuleList:
        return cast(nn.ModuleList, encoder.get_submodule("layers"))

    def keep_layers(self, encoder: PreTrainedModel, layers: list[int]) -> None:
        """As for every family; layer 0 has to stay, because transformers builds the bottom layer without a norm."""
        if layers and layers[0] > 0:
            raise ConfigError(
                f"encoder_layers={layers} leaves out layer 0, the only one without an attention norm",
                where="encoder_layers",
                remedy="keep layer 0 of ModernBERT encoders",
            )
        super().keep_layers(encoder, layers)

    def _cut(self, config: Any, layers: list[int]) -> None:
        config.layer_types = [config.layer_types[index] for index in layers]
        super()._cut(config, layers)
