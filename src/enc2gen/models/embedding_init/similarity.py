"""Rows as mixtures of the rows of similar old pieces (FOCUS, OFA)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from enc2gen.errors import DataError
from enc2gen.models.embedding_init.factorised import factorise
from enc2gen.models.embedding_init.task import NewRows
from enc2gen.models.static_vectors import StaticVectors, read_static_vectors, train_static_vectors

_CHUNK = 256  # new pieces compared with all old ones at once


def sparsemax(scores: Tensor) -> Tensor:
    """Projection of each row of `scores` `[..., n]` onto the probability simplex (Martins & Astudillo 2016, eq. 2).

    p_i = max(0, z_i - t) with the threshold t that makes p sum to 1; unlike softmax's, most p_i are exactly 0.
    """
    ordered = scores.sort(dim=-1, descending=True).values
    sums = ordered.cumsum(dim=-1)
    count = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    support = (1 + count * ordered > sums).sum(dim=-1, keepdim=True)
    threshold = (sums.gather(-1, support - 1) - 1) / support
    return (scores - threshold).clamp(min=0)


def focus_rows(task: NewRows) -> tuple[Tensor, list[str]]:
    """FOCUS (Dobler & de Melo 2023, arXiv 2305.14481, section 2).

        e_a = E[o]                                        if the new piece a overlaps with the old piece o
        e_a = sum_o w_ao E[o],   w_a = sparsemax_o(cos(x_a, x_o))   otherwise

    o runs over the overlapping pieces (the old pieces that the vocabulary keeps are among them) that have a static
    vector x. A piece without one gets a random row, as in the paper. The paper's x come from fastText.

    Raises:
        DataError: there are neither texts nor a file of vectors, or no old piece occurs in them.
    """
    vectors = _static_vectors(task)
    anchors, anchor_rows = _anchors(task, vectors)
    rows, how = _start(task)
    for positions, cosines in _cosines(task, vectors, anchors):
        rows[positions] = sparsemax(cosines) @ anchor_rows
        for position in positions:
            how[position] = "focus"
    return rows, how


def ofa_rows(task: NewRows) -> tuple[Tensor, list[str]]:
    """OFA (Liu et al. 2024, arXiv 2311.08849, section 3).

        E ~ F P,   F [vocabulary, r] coordinates, P [r, hidden] primitives (truncated singular value decomposition)
        f_a = F[o]                                                  if the new piece a overlaps with the old piece o
        f_a = sum_o w_ao F[o],  w_a = softmax_o(cos(x_a, x_o) / t)  otherwise, o in the k nearest old pieces
        f_a ~ N(mean(F), diag(std(F)²))                             if a has no static vector x
        e_a = f_a P

    The paper's x come from aligned multilingual word vectors; k and t are `neighbours` and `temperature`.

    Raises:
        ConfigError: the table has no such rank.
        DataError: there are neither texts nor a file of vectors, or no old piece occurs in them.
    """
    factors = factorise(task.old_table, task.config.rank or min(task.old_table.shape))
    vectors = _static_vectors(task)
    anchors, anchor_rows = _anchors(task, vectors)
    anchor_coordinates = factors.coordinates(anchor_rows)
    rows, how = _start(task)
    coordinates = factors.coordinates(rows)
    fresh = [position for position, name in enumerate(how) if name == "random"]
    coordinates[fresh] = task.gaussian(factors.mean, factors.std)[fresh]
    for positions, cosines in _cosines(task, vectors, anchors):
        best = cosines.topk(min(task.config.neighbours, len(anchors)), dim=-1)
        weights = torch.softmax(best.values / task.config.temperature, dim=-1)
        coordinates[positions] = torch.einsum("nk,nkr->nr", weights, anchor_coordinates[best.indices])
        for position in positions:
            how[position] = "ofa"
    return factors.rows(coordinates), how


def _static_vectors(task: NewRows) -> StaticVectors:
    if task.config.vectors is not None:
        return read_static_vectors(task.new_tokenizer, task.config.vectors)
    texts = iter(task.texts)
    first = next(texts, None)
    if first is None:
        raise DataError(
            f'"{task.config.method}" needs texts of the new language, and there are none',
            where="embedding initialisation",
            remedy='give texts (best: pairs with a language the model knows) or a file of word vectors, or use "mean"',
        )
    texts = itertools.chain([first], texts)
    return train_static_vectors(task.new_tokenizer, texts, task.config.static_vectors, seed=task.seed)


def _anchors(task: NewRows, vectors: StaticVectors) -> tuple[list[int], Tensor]:
    """New ids whose row and static vector are known, and the rows `[anchors, hidden]`."""
    sources = {index: old for index, old in enumerate(task.origins) if old is not None} | task.overlap
    known = vectors.known
    chosen = [i for i in sorted(sources) if i < len(known) and known[i] and task.new_forms[i] is not None]
    if not chosen:
        raise DataError(
            "no old piece has a static vector, so that new pieces cannot be compared with any",
            where="embedding initialisation",
            remedy='give (source, target) pairs with a language that the model knows, or use "mean" or "random"',
        )
    return chosen, task.old_table[[sources[index] for index in chosen]]


def _start(task: NewRows) -> tuple[Tensor, list[str]]:
    """Rows of overlapping pieces as they are, random ones elsewhere; and which is which."""
    rows, how = task.random.clone(), ["random"] * len(task.new_ids)
    for position, index in enumerate(task.new_ids):
        if (old := task.overlap.get(index)) is not None:
            rows[position] = task.old_table[old]
            how[position] = "overlap"
    return rows, how


def _cosines(task: NewRows, vectors: StaticVectors, anchors: list[int]) -> Iterator[tuple[list[int], Tensor]]:
    """Positions in `task.new_ids` of comparable pieces, chunk by chunk, with their cosines `[chunk, anchors]`."""
    table, dtype = torch.from_numpy(vectors.table), task.old_table.dtype
    anchor_vectors = table[anchors].to(dtype)
    comparable = [
        position
        for position, index in enumerate(task.new_ids)
        if index < len(vectors.known) and vectors.known[index] and index not in task.overlap
    ]
    for start in range(0, len(comparable), _CHUNK):
        positions = comparable[start : start + _CHUNK]
        ids = [task.new_ids[position] for position in positions]
        yield positions, table[ids].to(dtype) @ anchor_vectors.T
