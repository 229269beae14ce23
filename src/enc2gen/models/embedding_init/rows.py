"""The embedding table of a changed vocabulary: old rows copied, new rows made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from enc2gen.errors import ModelError
from enc2gen.models.embedding_init.config import EMBEDDING_INITIALISATIONS, InitialisationConfig
from enc2gen.models.embedding_init.factorised import factorise
from enc2gen.models.embedding_init.task import NewRows
from enc2gen.models.static_vectors import Texts


@dataclass
class InitialisedRows:
    """An embedding table and where each row came from.

    Attributes:
        table: `[new vocabulary, hidden]`, of the old table's type.
        how: for each new id "copied", "projected", "overlap", "mean", "focus", "ofa", "low-rank random" or "random".
    """

    table: Tensor
    how: list[str]

    @property
    def summary(self) -> dict[str, int]:
        """Rows of each origin, most frequent first."""
        return dict(Counter(self.how).most_common())


@torch.no_grad()
def initialise_rows(
    old_table: Tensor,
    old_tokenizer: PreTrainedTokenizerBase,
    new_tokenizer: PreTrainedTokenizerBase,
    origins: Sequence[int | None],
    config: InitialisationConfig | None = None,
    *,
    texts: Texts = (),
    seed: int = 0,
) -> InitialisedRows:
    """Make the embedding table of `new_tokenizer`.

    Rows with an old id are copied bit by bit (unless `config.project_old_rows`); the others are made by
    `config.method`, an entry of `EMBEDDING_INITIALISATIONS`.

    Args:
        old_table: `[old vocabulary, hidden]`.
        old_tokenizer: the tokenizer of `old_table`.
        new_tokenizer: the tokenizer of the result.
        origins: for each new id the old id, or None for a new piece.
        config: defaults if None.
        texts: plain lines of the new language, or (source, target) pairs with a language that the model knows.
            Read by "focus" and "ofa" only, and only if they are not given word vectors.
        seed: of everything random. The same arguments give the same table.

    Raises:
        ModelError: the table holds NaN or infinity, `origins` do not fit, or a tokenizer is not a fast one.
        ConfigError: the rank is too high for the table.
        DataError: the method needs texts or vectors that are missing, damaged or of no help.
    """
    config = config or InitialisationConfig()
    _check(old_table, new_tokenizer, origins)
    new_ids = [index for index, old in enumerate(origins) if old is None]
    kept = [index for index, old in enumerate(origins) if old is not None]
    table = old_table.new_empty(len(origins), old_table.shape[1])
    table[kept] = old_table[[old for old in origins if old is not None]]
    how = ["copied"] * len(origins)
    work = old_table.detach().cpu()
    work = work if work.dtype == torch.float64 else work.float()
    if config.project_old_rows and config.rank is not None:
        factors = factorise(work, config.rank)
        table[kept] = factors.rows(factors.coordinates(table[kept].to(work))).to(table)
        how = ["projected"] * len(origins)
    if new_ids:
        task = NewRows(work, old_tokenizer, new_tokenizer, origins, new_ids, config, texts, seed)
        rows, sources = EMBEDDING_INITIALISATIONS.get(config.method)(task)
        table[new_ids] = rows.to(table)
        for index, source in zip(new_ids, sources, strict=True):
            how[index] = source
    return InitialisedRows(table, how)


def _check(old_table: Tensor, new_tokenizer: PreTrainedTokenizerBase, origins: Sequence[int | None]) -> None:
    where = "embedding initialisation"
    if old_table.ndim != 2 or not old_table.is_floating_point() or 0 in old_table.shape:
        raise ModelError(
            f"the old table must be [vocabulary, hidden] of floats, not {list(old_table.shape)} of {old_table.dtype}",
            where=where,
        )
    finite = old_table.isfinite().all(dim=1)
    if not finite.all():
        bad = int((~finite).sum())
        raise ModelError(
            f"{bad} rows of the old table hold NaN or infinity, the first is row {int((~finite).nonzero()[0])}",
            where=where,
            remedy="check the checkpoint: its training may have diverged, or the file may be damaged",
        )
    if len(origins) < len(new_tokenizer):
        raise ModelError(
            f"{len(origins)} origins for {len(new_tokenizer)} tokens", where=where, remedy="give one for each new id"
        )
    wrong = [old for old in origins if old is not None and not 0 <= old < len(old_table)]
    if wrong:
        raise ModelError(f"origin {wrong[0]} is not a row of the old table (0 to {len(old_table) - 1})", where=where)
