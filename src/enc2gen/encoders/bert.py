"""BERT layout: post-norm, learned positions that count from 0 (multilingual BERT, LaBSE, multilingual-e5-small)."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import nn
from transformers import PreTrainedModel

from enc2gen.encoders.donor import DecoderStyle, Donor, NormOrder, Source, whole

_ATTENTION = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "out_proj": "attention.output.dense",
}
_FFN = {"fc1": "intermediate.dense", "fc2": "output.dense"}
_KINDS = ("weight", "bias")


class BertDonor(Donor):
    """Donor for `BertModel`."""

    family: ClassVar[str] = "bert"
    model_types: ClassVar[tuple[str, ...]] = ("bert",)
    norm_order: ClassVar[NormOrder] = "post"
    dropout_fields: ClassVar[tuple[str, ...]] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    attention_norm_name: ClassVar[str] = "attention.output.LayerNorm"
    ffn_norm_name: ClassVar[str] = "output.LayerNorm"

    def check(self) -> None:
        """Refuse relative position embeddings, which older checkpoints may ask for and nothing computes."""
        kind = getattr(self.config, "position_embedding_type", None) or "absolute"
        if kind != "absolute":
            self._refuse(
                f"position_embedding_type {kind!r} is not supported",
                "use an encoder with absolute position embeddings",
            )

    def style(self) -> DecoderStyle:
        config = self.config
        return DecoderStyle(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            hidden_act=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
            position_offset=self._position_offset(),
            type_vocab_size=int(config.type_vocab_size or 0),
            max_position_embeddings=config.max_position_embeddings,
            initializer_range=config.initializer_range,
            hidden_dropout_prob=config.hidden_dropout_prob,
            attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        )

    def _position_offset(self) -> int:
        """BERT's positions count from 0."""
        return 0

    def word_embeddings(self) -> str:
        return "embeddings.word_embeddings.weight"

    def embeddings(self) -> dict[str, Source]:
        return whole(
            {
                "embed_positions.weight": "embeddings.position_embeddings.weight",
                "embed_types.weight": "embeddings.token_type_embeddings.weight",
                "embed_norm.weight": "embeddings.LayerNorm.weight",
                "embed_norm.bias": "embeddings.LayerNorm.bias",
            }
        )

    def attention(self, layer: int) -> dict[str, Source]:
        return self._parts(layer, _ATTENTION)

    def attention_norm(self, layer: int) -> dict[str, Source]:
        return whole({kind: f"encoder.layer.{layer}.{self.attention_norm_name}.{kind}" for kind in _KINDS})

    def ffn(self, layer: int) -> dict[str, Source]:
        return self._parts(layer, _FFN)

    def ffn_norm(self, layer: int) -> dict[str, Source]:
        return whole({kind: f"encoder.layer.{layer}.{self.ffn_norm_name}.{kind}" for kind in _KINDS})

    def layer_list(self, encoder: PreTrainedModel) -> nn.ModuleList:
        return cast(nn.ModuleList, encoder.get_submodule("encoder.layer"))

    @staticmethod
    def _parts(layer: int, names: dict[str, str]) -> dict[str, Source]:
        return whole(
            {
                f"{ours}.{kind}": f"encoder.layer.{layer}.{theirs}.{kind}"
                for ours, theirs in names.items()
                for kind in _KINDS
            }
        )
