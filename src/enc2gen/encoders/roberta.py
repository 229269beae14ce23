"""RoBERTa layout: BERT's layers, positions that count from `pad_token_id + 1` (XLM-R, CINO, RoBERTa)."""

from __future__ import annotations

from typing import ClassVar

from enc2gen.encoders.bert import BertDonor


class RobertaDonor(BertDonor):
    """Donor for `RobertaModel` and `XLMRobertaModel`."""

    family: ClassVar[str] = "roberta"
    model_types: ClassVar[tuple[str, ...]] = ("roberta", "xlm-roberta")

    def _position_offset(self) -> int:
        """The first token reads row `pad_token_id + 1`; row `pad_token_id` belongs to padding."""
        return int(self.config.pad_token_id) + 1
