"""Embedding tables as coordinates times primitives, and rows with random coordinates (UNKs Everywhere)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from enc2gen.errors import ConfigError
from enc2gen.models.embedding_init.task import NewRows

UNKS_EVERYWHERE_RANK = 100
"""D' of arXiv 2012.15562."""

_CHUNK = 16384  # rows converted to float64 at once


@dataclass
class Factorisation:
    """The best approximation `F P` of a table by rank r.

    Attributes:
        primitives: P `[r, hidden]`, orthonormal rows: the table's leading right singular vectors.
        mean: of the coordinates F `[vocabulary, r]` over the vocabulary, `[r]`.
        std: of the coordinates, `[r]`.
    """

    primitives: Tensor
    mean: Tensor
    std: Tensor

    def coordinates(self, rows: Tensor) -> Tensor:
        """F of `rows` `[n, hidden]`: `[n, r]`."""
        return rows @ self.primitives.T

    def rows(self, coordinates: Tensor) -> Tensor:
        """F P of `coordinates` `[n, r]`: `[n, hidden]`."""
        return coordinates @ self.primitives


def factorise(table: Tensor, rank: int) -> Factorisation:
    """Truncated singular value decomposition E = U S V', F = U_r S_r, P = V_r', of `table` `[vocabulary, hidden]`.

    V comes from the small matrix E'E (float64); F, as large as the table, is never formed as a whole.

    Raises:
        ConfigError: the table has no such rank.
    """
    most = min(table.shape)
    if rank > most:
        raise ConfigError(
            f"rank {rank} is too high for a table of {table.shape[0]} rows and {table.shape[1]} dimensions",
            where="rank",
            remedy=f"use {most} or less",
        )
    products = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    for chunk in table.split(_CHUNK):
        products += chunk.double().T @ chunk.double()
    values, vectors = torch.linalg.eigh(products)  # ascending
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    mean = table.double().mean(dim=0) @ vectors
    variance = values.clamp(min=0) / len(table) - mean.square()  # sum of squares of column i of F = S_i²
    std = variance.clamp(min=0).sqrt()
    return Factorisation(vectors.T.to(table.dtype).contiguous(), mean.to(table.dtype), std.to(table.dtype))


def lexical_rows(task: NewRows) -> tuple[Tensor, list[str]]:
    """UNKs Everywhere (Pfeiffer et al. 2021, arXiv 2012.15562), variant MF^1 with lexical overlap (MF^1-lex).

        E ~ F G,   F [vocabulary, r] coordinates, G [r, hidden] shared up-projection
        e = F[o] G    if the new piece overlaps with the old piece o
        e = f G       otherwise, f ~ N(mean(F), diag(std(F)²))

    G carries what holds for all pieces, so that even a random f gives a row within the table's main directions.
    Differences from the paper: F and G come from a truncated singular value decomposition, the closest for its rank,
    and are multiplied out at once, so that the model keeps an ordinary table; random coordinates follow the
    distribution of F.

    Raises:
        ConfigError: the table has no such rank.
    """
    rank = task.config.rank or min(UNKS_EVERYWHERE_RANK, *task.old_table.shape)
    factors = factorise(task.old_table, rank)
    coordinates = task.gaussian(factors.mean, factors.std)
    how = ["low-rank random"] * len(task.new_ids)
    for position, index in enumerate(task.new_ids):
        if (old := task.overlap.get(index)) is not None:
            coordinates[position] = factors.coordinates(task.old_table[old : old + 1])[0]
            how[position] = "overlap"
    return factors.rows(coordinates), how
