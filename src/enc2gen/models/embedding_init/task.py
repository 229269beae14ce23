"""What a method of initialisation is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from enc2gen.models.embedding_init.config import InitialisationConfig
from enc2gen.models.embedding_init.pieces import PieceForm, find_overlap, piece_forms
from enc2gen.models.static_vectors import Texts


@dataclass
class NewRows:
    """The new pieces and all that is known about them.

    Attributes:
        old_table: `[old vocabulary, hidden]`, float32 or float64, finite.
        old_tokenizer: splits text into rows of `old_table`.
        new_tokenizer: splits text into rows of the table to be made.
        origins: for each new id its old id, or None.
        new_ids: ids whose origin is None, ascending.
        config: the method's settings.
        texts: lines or pairs of the new language, possibly none.
        seed: of everything random.
    """

    old_table: Tensor
    old_tokenizer: PreTrainedTokenizerBase
    new_tokenizer: PreTrainedTokenizerBase
    origins: Sequence[int | None]
    new_ids: list[int]
    config: InitialisationConfig
    texts: Texts
    seed: int

    @cached_property
    def new_forms(self) -> list[PieceForm | None]:
        """Form of each new id (not only of `new_ids`); None for special tokens and bytes."""
        forms = piece_forms(self.new_tokenizer)
        return forms + [None] * (len(self.origins) - len(forms))

    @cached_property
    def overlap(self) -> dict[int, int]:
        """New ids of `new_ids` that are an old piece in another guise: new id -> old id."""
        old_forms = piece_forms(self.old_tokenizer)[: len(self.old_table)]
        wanted = {index: form for index in self.new_ids if (form := self.new_forms[index]) is not None}
        return find_overlap(wanted, old_forms, fuzzy=self.config.overlap == "fuzzy")

    @cached_property
    def random(self) -> Tensor:
        """A row for each of `new_ids` drawn from N(mean, std²) of the old table, each dimension by itself.

        The same for all methods, which fall back on it where nothing is known about a piece.
        """
        return self.gaussian(self.old_table.mean(dim=0), self.old_table.std(dim=0, correction=0))

    def gaussian(self, mean: Tensor, std: Tensor) -> Tensor:
        """`[new pieces, len(mean)]` drawn from N(mean, std²)."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(len(self.new_ids), len(mean), generator=generator, dtype=mean.dtype)
        return mean + std * noise
