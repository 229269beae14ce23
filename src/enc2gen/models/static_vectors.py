"""Static vectors of pieces, learnt from little text or read from a file: which pieces mean similar things.

FOCUS and OFA (`enc2gen.models.embedding_init`) need to know which old pieces a new piece resembles. Plain lines tell
it by the pieces around it. Translated pairs tell more: all pieces of both sides share the pair as their context, so
that a script which has nothing in common with the old vocabulary still gets neighbours in it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sparse
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from enc2gen.errors import DataError
from enc2gen.tokenization.tokenizer import protect_special_tokens

Texts: TypeAlias = Iterable[str | tuple[str, str]]

_BATCH = 4096  # texts or words split at once


class StaticVectorsConfig(BaseModel):
    """How static vectors are learnt from text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dimension: int = Field(default=300, ge=1, description="Length of a vector; less for tiny texts.")
    window: int = Field(default=5, ge=1, description="Pieces to either side that are context in a line (our choice).")
    min_count: int = Field(default=3, ge=1, description="Pieces that occur more rarely get no vector (our choice).")
    smoothing: float = Field(
        default=0.75,
        gt=0,
        le=1,
        description="Exponent of context counts (Levy, Goldberg & Dagan 2015).",
    )
    max_texts: int = Field(default=200_000, ge=1, description="Learn from this many texts at most, a random sample.")


@dataclass
class StaticVectors:
    """A vector for each piece that has one.

    Attributes:
        table: `[vocabulary, dimension]`, float32, rows of length 1; zeros where a piece has no vector.
        known: `[vocabulary]`, bool: the pieces that have a vector.
    """

    table: np.ndarray
    known: np.ndarray

    def nearest(self, piece: int, candidates: Sequence[int], count: int = 10) -> list[tuple[int, float]]:
        """The `count` of `candidates` (ids) nearest to `piece`, nearest first, each with its cosine."""
        ids = np.asarray(candidates, dtype=np.int64)
        ids = ids[self.known[ids]]
        cosines = self.table[ids] @ self.table[piece]
        order = np.argsort(-cosines, kind="stable")[:count]
        return [(int(ids[i]), float(cosines[i])) for i in order]


def train_static_vectors(
    tokenizer: PreTrainedTokenizerBase, texts: Texts, config: StaticVectorsConfig | None = None, *, seed: int = 0
) -> StaticVectors:
    r"""Learn vectors of the pieces that `texts` are split into.

    A count matrix of pieces w and contexts c is turned into positive pointwise mutual information with smoothed
    context counts and factorised (Levy & Goldberg 2014; Levy, Goldberg & Dagan 2015, sections 2 and 3):

        M[w, c] = max(0, log p(w, c) - log p(w) - log p_a(c)),   p_a(c) = count(c)^a / sum_c' count(c')^a
        M = U S V' (truncated),   vectors = U S^(1/2), scaled to length 1

    Contexts of a (source, target) pair: the pair itself, in which a piece counts once (Levy, Søgaard & Goldberg
    2017, arXiv 1608.05426: sentence identity is a strong cross-lingual signal). Contexts of a plain line: the pieces
    at most `window` away. If there are both, the two matrices stand side by side, each weighted by its share of
    the pieces read (our choice).

    Args:
        tokenizer: a fast tokenizer; reads text that spells a special token as plain text from now on.
        texts: plain lines and (source, target) pairs, in any mixture.
        config: defaults if None.
        seed: of the sample of texts and of the random start of the factorisation. The same texts and seed give the
            same vectors.

    Raises:
        DataError: no text holds two known pieces, or a text is neither a str nor a pair of them.
        ModelError: the tokenizer is not a fast one.
    """
    config = config or StaticVectorsConfig()
    size = len(tokenizer)
    counter = _Counter(size, config.window)
    for batch in _batches(_sampled(texts, config.max_texts, seed)):
        counter.add(*_split(tokenizer, batch))
    occurrences = counter.occurrences.copy()
    occurrences[_unusable(tokenizer, size)] = 0
    used = np.flatnonzero(occurrences >= config.min_count)
    blocks = [_weigh(block[used], config.smoothing) * weight for block, weight in counter.blocks(used)]
    blocks = [block for block in blocks if block.nnz]
    if not blocks:
        raise DataError(
            f"the texts hold no two known pieces that occur {config.min_count} times or more and go together",
            where="texts for static vectors",
            remedy="give more text of the new language, or lower min_count",
        )
    left, values = _truncated_svd(sparse.hstack(blocks).tocsr(), config.dimension, seed)
    return _scatter(left * np.sqrt(values), used, size)


def read_static_vectors(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> StaticVectors:
    """Vectors of pieces out of a file of word vectors: the mean over the words whose splitting contains the piece.

    As in OFA (arXiv 2311.08849, section 3.2). A word counts once for a piece, split as at the start of a text and
    as after a space.

    Args:
        tokenizer: a fast tokenizer.
        path: word2vec text format, UTF-8: first line `words dimension`, then lines `word number ... number`. Vectors
            of several languages must lie in one aligned space.

    Raises:
        DataError: the file is missing, damaged or of another format, or no word of it holds a known piece.
        ModelError: the tokenizer is not a fast one.
    """
    backend = protect_special_tokens(tokenizer)
    backend.no_truncation()
    backend.no_padding()
    size, path = len(tokenizer), Path(path)
    sums: np.ndarray | None = None
    counts = np.zeros(size, dtype=np.int64)
    for batch in _batches(_word_vectors(path)):
        words, vectors = [word for word, _ in batch], np.stack([vector for _, vector in batch])
        sums = np.zeros((size, vectors.shape[1]), dtype=np.float32) if sums is None else sums
        first = backend.encode_batch_fast(words, add_special_tokens=False)
        later = backend.encode_batch_fast([f" {word}" for word in words], add_special_tokens=False)
        for one, two, vector in zip(first, later, vectors, strict=True):
            ids = np.array(sorted({*one.ids, *two.ids}), dtype=np.int64)
            sums[ids] += vector
            counts[ids] += 1
    unusable = _unusable(tokenizer, size)
    counts[unusable[unusable < size]] = 0
    used = np.flatnonzero(counts)
    if sums is None or not len(used):
        raise DataError("no word of the file holds a piece of the vocabulary", where=path.name)
    return _scatter(sums[used] / counts[used, None], used, size)


def _sampled(texts: Texts, limit: int, seed: int) -> list[str | tuple[str, str]]:
    """All texts, or `limit` of them drawn at random where there are more (Vitter 1985, algorithm R), in their order.

    The first ones alone would be those of the first file: a language in a later one would get no vectors.
    """
    kept: list[tuple[int, str | tuple[str, str]]] = []
    draw = random.Random(seed)
    for number, text in enumerate(_checked(texts)):
        if number < limit:
            kept.append((number, text))
        elif (place := draw.randrange(number + 1)) < limit:
            kept[place] = number, text
    return [text for _, text in sorted(kept, key=itemgetter(0))]


def _checked(texts: Texts) -> Iterator[str | tuple[str, str]]:
    for text in texts:
        if not isinstance(text, str) and not (len(text) == 2 and all(isinstance(side, str) for side in text)):
            raise DataError(
                f"a text must be a str or a (source, target) pair of them, not {text!r:.80}",
                where="texts for static vectors",
            )
        yield text


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, _BATCH)):
        yield batch


def _split(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | tuple[str, str]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of the plain lines, and ids of both sides of the pairs."""
    backend = protect_special_tokens(tokenizer)
    backend.no_truncation()
    backend.no_padding()

    def encode(strings: list[str]) -> list[list[int]]:
        try:
            return [e.ids for e in backend.encode_batch_fast(strings, add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError) as error:
            raise DataError(f"a text cannot be encoded: {error}", where="texts for static vectors") from error

    pairs = [text for text in texts if not isinstance(text, str)]
    sources, targets = encode([pair[0] for pair in pairs]), encode([pair[1] for pair in pairs])
    lines = encode([text for text in texts if isinstance(text, str)])
    return lines, [[*source, *target] for source, target in zip(sources, targets, strict=True)]


def _unusable(tokenizer: PreTrainedTokenizerBase, size: int) -> np.ndarray:
    """Ids of special tokens and the unknown piece, which stand for anything."""
    ids = {*tokenizer.all_special_ids, tokenizer.unk_token_id}
    return np.array(sorted(i for i in ids if i is not None and i < size), dtype=np.int64)


class _Counter:
    """Counts of pieces in the windows of lines and in pairs, batch by batch."""

    def __init__(self, size: int, window: int) -> None:
        self._size, self._window = size, window
        self.occurrences = np.zeros(size, dtype=np.int64)
        self._near: Any = sparse.csr_matrix((size, size), dtype=np.float32)
        self._pairs: list[Any] = []
        self._read = [0, 0]  # pieces in lines, in pairs

    def add(self, lines: list[list[int]], pairs: list[list[int]]) -> None:
        for kind, documents in enumerate((lines, pairs)):
            if not documents:
                continue
            ids = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])
            owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
            self.occurrences += np.bincount(ids, minlength=self._size)[: self._size]
            self._read[kind] += len(ids)
            if kind == 0:
                self._add_windows(ids, owner)
            else:
                inside = _count_matrix(ids, owner, (self._size, len(documents)))
                inside.data[:] = 1
                self._pairs.append(inside)

    def _add_windows(self, ids: np.ndarray, owner: np.ndarray) -> None:
        rows, columns = [], []
        for distance in range(1, min(self._window, len(ids) - 1) + 1):
            same = owner[:-distance] == owner[distance:]
            rows.append(ids[:-distance][same])
            columns.append(ids[distance:][same])
        if rows:
            one_way = _count_matrix(np.concatenate(rows), np.concatenate(columns), (self._size, self._size))
            self._near = self._near + one_way + one_way.T

    def blocks(self, used: np.ndarray) -> Iterator[tuple[Any, float]]:
        """Count matrices `[vocabulary, contexts]` with their weights; context pieces are `used` ones only."""
        total = max(1, sum(self._read))
        if self._near.nnz:
            yield self._near.tocsc()[:, used].tocsr(), float(np.sqrt(self._read[0] / total))
        if self._pairs:
            yield sparse.hstack(self._pairs).tocsr(), float(np.sqrt(self._read[1] / total))


def _count_matrix(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> Any:
    matrix = sparse.csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=shape)
    matrix.sum_duplicates()
    return matrix


def _weigh(counts: Any, smoothing: float) -> Any:
    """Positive pointwise mutual information of `counts` `[pieces, contexts]`, scaled to Frobenius norm 1."""
    counts = counts.tocsr().astype(np.float64)
    per_piece = np.asarray(counts.sum(axis=1)).ravel()
    contexts = np.asarray(counts.sum(axis=0)).ravel() ** smoothing
    contexts /= contexts.sum() or 1.0
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    # log p(w, c) - log p(w) = log count(w, c) - log count(w)
    counts.data = np.maximum(np.log(counts.data / (per_piece[rows] * contexts[counts.indices])), 0.0)
    counts.eliminate_zeros()
    return counts / (np.sqrt((counts.data**2).sum()) or 1.0)


def _truncated_svd(matrix: Any, rank: int, seed: int, iterations: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors `[rows, rank]` and singular values `[rank]` of a sparse matrix.

    Randomised subspace iteration (Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1).
    """
    rank = min(rank, *matrix.shape)
    sketch = min(rank + 10, *matrix.shape)
    transposed = matrix.T.tocsr()
    basis = matrix @ np.random.default_rng(seed).standard_normal((matrix.shape[1], sketch))
    for _ in range(iterations):
        basis, _ = np.linalg.qr(basis)
        basis, _ = np.linalg.qr(transposed @ basis)
        basis = matrix @ basis
    basis, _ = np.linalg.qr(basis)
    left, values, _ = np.linalg.svd((transposed @ basis).T, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank]


def _scatter(vectors: np.ndarray, used: np.ndarray, size: int) -> StaticVectors:
    """Vectors `[used, dimension]` scaled to length 1 and put at their ids; null vectors count as none."""
    lengths = np.linalg.norm(vectors, axis=1)
    real = lengths > 1e-9 * (lengths.max() or 1.0)
    table = np.zeros((size, vectors.shape[1]), dtype=np.float32)
    table[used[real]] = vectors[real] / lengths[real, None]
    known = np.zeros(size, dtype=bool)
    known[used[real]] = True
    return StaticVectors(table, known)


def _word_vectors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Words and their vectors in the file, checked line by line."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            words, dimension = _header(file.readline(), path)
            number = 0
            for number, line in enumerate(file, start=1):
                yield _word_vector(line, dimension, f"{path.name}, line {number + 1}")
    except OSError as error:
        raise DataError(f"the word vectors cannot be read: {error.strerror}", where=path.name) from error
    except UnicodeDecodeError as error:
        raise DataError("the word vectors are not UTF-8 text", where=path.name, remedy=_FORMAT) from error
    if number != words:
        raise DataError(f"the first line promises {words} words, the file has {number}", where=path.name)


_FORMAT = "use word2vec's text format: a line `words dimension`, then a line `word number ... number` for each word"


def _header(line: str, path: Path) -> tuple[int, int]:
    fields = line.split()
    if len(fields) != 2 or not all(field.isdecimal() and int(field) > 0 for field in fields):
        raise DataError("the first line is not `words dimension`", where=path.name, remedy=_FORMAT)
    return int(fields[0]), int(fields[1])


def _word_vector(line: str, dimension: int, where: str) -> tuple[str, np.ndarray]:
    # Words may hold exotic spaces, so the numbers are split off from the right.
    word, *numbers = line.rstrip("\r\n ").rsplit(" ", dimension)
    try:
        vector = np.array([float(number) for number in numbers], dtype=np.float32)
    except ValueError as error:
        raise DataError(f"expected a word and {dimension} numbers: {error}", where=where, remedy=_FORMAT) from error
    if not word or len(vector) != dimension or not np.isfinite(vector).all():
        raise DataError(f"expected a word and {dimension} finite numbers", where=where, remedy=_FORMAT)
    return word, vector
