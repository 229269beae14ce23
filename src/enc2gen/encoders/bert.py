"""BERT layout: post-norm, learned positions that count from 0 (multilingual BERT, LaBSE, multilingual-e5-small)."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import nn
from transformers import PreTrainedModel

from enc2gen.encoders.donor import FFN_TENSORS, NORM_TENSORS, Donor, NormOrder
from enc2gen.errors import ModelError

_ATTENTION = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "out_proj": "attention.output.dense",
}
_FFN = {"fc1": "intermediate.dense", "fc2": "output.dense"}


class BertDonor(Donor):
    """Donor for `BertModel`."""

    family: ClassVar[str] = "bert"
    model_types: ClassVar[tuple[str, ...]] = ("bert",)
    norm_order: ClassVar[NormOrder] = "post"

    def check(self) -> None:
        """Refuse relative position embeddings, which older checkpoints may ask for and nothing computes."""
        kind = getattr(self.config, "position_embedding_type", None) or "absolute"
        if kind != "absolute":
            raise ModelError(
                f"position_embedding_type {kind!r} is not supported",
                where=str(self.config.name_or_path or "encoder"),
                remedy="use an encoder with absolute position embeddings",
            )

    @property
    def position_offset(self) -> int:
        """BERT's positions count from 0."""
        return 0

    def word_embeddings(self) -> str:
        return "embeddings.word_embeddings.weight"

    def embeddings(self) -> dict[str, str]:
        return {
            "embed_positions.weight": "embeddings.position_embeddings.weight",
            "embed_types.weight": "embeddings.token_type_embeddings.weight",
            "embed_norm.weight": "embeddings.LayerNorm.weight",
            "embed_norm.bias": "embeddings.LayerNorm.bias",
        }

    def attention(self, layer: int) -> dict[str, str]:
        return {
            f"{ours}.{kind}": f"encoder.layer.{layer}.{theirs}.{kind}"
            for ours, theirs in _ATTENTION.items()
            for kind in ("weight", "bias")
        }

    def attention_norm(self, layer: int) -> dict[str, str]:
        return {kind: f"encoder.layer.{layer}.attention.output.LayerNorm.{kind}" for kind in NORM_TENSORS}

    def ffn(self, layer: int) -> dict[str, str]:
        names = (name.split(".") for name in FFN_TENSORS)
        return {f"{part}.{kind}": f"encoder.layer.{layer}.{_FFN[part]}.{kind}" for part, kind in names}

    def ffn_norm(self, layer: int) -> dict[str, str]:
        return {kind: f"encoder.layer.{layer}.output.LayerNorm.{kind}" for kind in NORM_TENSORS}

    def layer_list(self, encoder: PreTrainedModel) -> nn.ModuleList:
        return cast(nn.ModuleList, encoder.get_submodule("encoder.layer"))
