"""XLM-R XL and XXL layout (arXiv 2105.00572): RoBERTa's tensors in pre-norm order, with a final norm instead of an
embedding norm."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from enc2gen.encoders.donor import DecoderStyle, NormOrder, Source, whole
from enc2gen.encoders.roberta import RobertaDonor


class XlmRobertaXlDonor(RobertaDonor):
    """Donor for `XLMRobertaXLModel`."""

    family: ClassVar[str] = "xlm-roberta-xl"
    model_types: ClassVar[tuple[str, ...]] = ("xlm-roberta-xl",)
    norm_order: ClassVar[NormOrder] = "pre"
    attention_norm_name: ClassVar[str] = "attention.self_attn_layer_norm"
    ffn_norm_name: ClassVar[str] = "LayerNorm"

    def style(self) -> DecoderStyle:
        return replace(super().style(), embed_norm=False)

    def embeddings(self) -> dict[str, Source]:
        return {name: source for name, source in super().embeddings().items() if not name.startswith("embed_norm.")}

    def final_norm(self) -> dict[str, Source]:
        return whole({kind: f"encoder.LayerNorm.{kind}" for kind in ("weight", "bias")})
