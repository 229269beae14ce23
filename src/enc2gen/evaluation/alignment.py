"""How well an encoder aligns a language with English, layer by layer, before anything is trained.

MEXA (arXiv 2410.05873): let E and X be the vectors of the same n sentences in English and in another language at
layer l, and c_ij = cos(E_i, X_j). The score is the share of sentences that find each other in both directions,

    mexa(l) = 1/n * sum_i [ c_ii > max over j != i of max(c_ij, c_ji) ]

with strict inequality, as in the authors' code: of two equal sentences neither counts. The paper takes the first
100 sentences and pools the layers by their mean or their maximum. Chance is 1 / (2n - 1), and the score falls as n
grows, so scores are comparable at one n only. The paper weights the tokens of a decoder by their position; the
states of an encoder see both sides, so here their plain mean is the default.

What the score cannot see: whether the LLM already reads the language without any bridge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from enc2gen.errors import ConfigError, DataError
from enc2gen.evaluation.significance import CONFIDENCE, RESAMPLES, Floats, bootstrap_interval, mean_statistics
from enc2gen.tokenization.tokenizer import protect_special_tokens

Pooling = Literal["mean", "weighted"]
MAX_LENGTH = 256  # tokens of a sentence that are read (our choice)


def pool_tokens(states: Tensor, mask: Tensor, pooling: Pooling = "mean") -> Tensor:
    """One vector per sentence and layer.

    Args:
        states: `[layers, batch, length, hidden]`.
        mask: `[batch, length]`, 1 at real tokens; padding may be on either side.
        pooling: "mean", or "weighted": the t-th of T real tokens weighs t / (1 + ... + T) (2410.05873).

    Returns:
        `[layers, batch, hidden]` in float32.
    """
    weights = mask.to(torch.float32)
    if pooling == "weighted":
        weights = weights * weights.cumsum(dim=1)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1.0)
    return torch.einsum("lbth,bt->lbh", states.to(torch.float32), weights)


def mexa_hits(english: Tensor, other: Tensor, *, centre: bool = False) -> Tensor:
    """Which sentences find their translation, and are found by it; see the equation above.

    Args:
        english, other: `[layers, n, hidden]`; sentence i of one is the translation of sentence i of the other.
        centre: subtract from every layer the mean over its own language's sentences first (ours, not the paper's).
            Where this raises the score, a constant "language direction" hides an alignment that is there.

    Returns:
        `[layers, n]`, bool.

    Raises:
        DataError: different shapes, or fewer than two sentences.
    """
    if english.shape != other.shape or english.dim() != 3:
        raise DataError(
            f"states of shapes {list(english.shape)} and {list(other.shape)} are not those of parallel sentences",
            remedy="give [layers, sentences, hidden] of the same sentences in both languages",
        )
    n = english.shape[1]
    if n < 2:
        raise DataError(
            f"{n} parallel sentences: none to mistake it for", remedy="give at least 2; the paper takes 100"
        )
    first, second = (states.to(torch.float64) for states in (english, other))
    if centre:
        first, second = (states - states.mean(dim=1, keepdim=True) for states in (first, second))
    cosines = torch.nn.functional.normalize(first, dim=-1) @ torch.nn.functional.normalize(second, dim=-1).mT
    own = cosines.diagonal(dim1=1, dim2=2)
    rivals = cosines.masked_fill(torch.eye(n, dtype=torch.bool, device=cosines.device), -torch.inf)
    return (own > rivals.amax(dim=1)) & (own > rivals.amax(dim=2))


def mexa(english: Tensor, other: Tensor, *, centre: bool = False) -> Tensor:
    """MEXA of every layer, `[layers]` in 0 to 1: the share of :func:`mexa_hits`, which says more."""
    return mexa_hits(english, other, centre=centre).to(torch.float64).mean(dim=1)


@dataclass(frozen=True)
class Reading:
    """What an encoder makes of the sentences of one language.

    Attributes:
        states: `[layers + 1, n, hidden]`, pooled, the embedding output first.
        unknown: share in percent of the pieces that are the tokenizer's unknown piece.
        pieces: pieces per sentence, without special tokens.
        truncated: how many sentences were longer than the encoder was allowed to read.
    """

    states: Tensor
    unknown: float
    pieces: float
    truncated: int


@torch.inference_mode()
def read_sentences(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    template: str = "{text}",
    pooling: Pooling = "mean",
    max_length: int = MAX_LENGTH,
    batch_size: int = 32,
) -> Reading:
    """Read every sentence once, sorted by length so that little is padded; only pooled states are kept.

    Args:
        encoder: any transformers model that returns `hidden_states`, in evaluation mode.
        tokenizer: of the encoder, a fast one; from here on it reads special tokens in texts as text.
        texts: the sentences.
        template: what the encoder reads, with `{text}` in the place of the sentence ("query: {text}" for E5).
        pooling: see :func:`pool_tokens`. Special tokens and the template's count as tokens.
        max_length: sentences are cut after so many tokens.
        batch_size: sentences read at once.

    Raises:
        DataError: no sentence, or one without any token.
        ConfigError: the template has no `{text}`.
    """
    if "{text}" not in template:
        raise ConfigError(f"the template {template!r} has no place for the sentence", remedy="write {text} into it")
    rows, unknown, pieces, truncated = _tokenize(tokenizer, [template.replace("{text}", t) for t in texts], max_length)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked, so any id will do
    pooled: list[Tensor] = []
    for start in range(0, len(order), batch_size):
        batch = [torch.tensor(rows[index]) for index in order[start : start + batch_size]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad).to(encoder.device)
        lengths = torch.tensor([len(row) for row in batch], device=encoder.device)
        mask = (torch.arange(ids.shape[1], device=encoder.device) < lengths[:, None]).long()
        output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        pooled.append(pool_tokens(torch.stack(output.hidden_states), mask, pooling).cpu())
    states = torch.cat(pooled, dim=1)[:, torch.tensor(order).argsort()]
    return Reading(states, 100.0 * unknown / max(1, pieces), pieces / len(rows), truncated)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> tuple[list[list[int]], int, int, int]:
    """Ids of each text, then over all texts: unknown pieces, pieces, texts cut short."""
    if not texts:
        raise DataError("there is no sentence to read")
    longest = min(max_length, tokenizer.model_max_length)
    rows: list[list[int]] = []
    unknown = pieces = truncated = 0
    # Text that looks like a special token ("</s>") is text.
    for encoding in protect_special_tokens(tokenizer).encode_batch(list(texts)):
        row, special = encoding.ids, encoding.special_tokens_mask
        if not row:
            raise DataError(f"sentence {len(rows) + 1} has no token: {texts[len(rows)]!r}", remedy="leave it out")
        unknown += row.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
        pieces += special.count(0)
        truncated += len(row) > longest
        end = len(row) - [*reversed(special), 0].index(0)  # where the closing special tokens begin
        rows.append(row if len(row) <= longest else row[: longest - len(row) + end] + row[end:])
    return rows, unknown, pieces, truncated


@dataclass(frozen=True)
class LanguageAlignment:
    """Alignment of one language with English, in percent.

    Attributes:
        language: as the corpus names it.
        layers: MEXA of every layer, the embedding output first: `layers[k]` is that of layer k.
        low, high: bootstrap interval of the last layer's score. Sentences are resampled, their rivals are not (a
            sentence drawn twice would be its own rival), so it holds for this difficulty of the task.
        unknown: share of the pieces that are unknown to the tokenizer.
        pieces: pieces per sentence.
        truncated: sentences that were cut.
    """

    language: str
    layers: tuple[float, ...]
    low: float
    high: float
    unknown: float
    pieces: float
    truncated: int

    @property
    def last(self) -> float:
        """Score of the last layer, which LangBridge's kind of bridge reads."""
        return self.layers[-1]

    @property
    def best_layer(self) -> int:
        """The layer of the highest score, the upper one of equals; embeddings (layer 0) do not count."""
        return max(range(1, len(self.layers)), key=lambda layer: (self.layers[layer], layer))

    @property
    def best(self) -> float:
        """Highest score of any layer (the paper's max pooling)."""
        return self.layers[self.best_layer]

    @property
    def mean(self) -> float:
        """Mean over the layers without the embeddings (the paper's mean pooling)."""
        return float(np.mean(self.layers[1:]))

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "last": self.last, "best": self.best, "best_layer": self.best_layer, "mean": self.mean}


@dataclass(frozen=True)
class AlignmentTable:
    """Alignment of several languages with English, sorted by `mean`, the highest first.

    An encoder that was trained to align sentences scores near 100 in its last layers for most languages, where the
    mean still tells them apart.
    """

    languages: tuple[LanguageAlignment, ...]
    english: str
    sentences: int
    template: str
    pooling: Pooling
    centred: bool

    @property
    def num_layers(self) -> int:
        """Layers of the encoder, embeddings not counted."""
        return len(self.languages[0].layers) - 1

    @property
    def chance(self) -> float:
        """Score in percent of vectors that mean nothing."""
        return 100.0 / (2 * self.sentences - 1)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        rows = [row.to_dict() for row in self.languages]
        return {**asdict(self), "num_layers": self.num_layers, "chance": self.chance, "languages": rows}


def alignment_table(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    english: str,
    *,
    template: str = "{text}",
    pooling: Pooling = "mean",
    centre: bool = False,
    max_length: int = MAX_LENGTH,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> AlignmentTable:
    """MEXA of every language of `texts` but English, at every layer.

    Args:
        encoder, tokenizer, template, pooling, max_length, batch_size: as for :func:`read_sentences`.
        texts: language -> the same sentences in the same order.
        english: the language of `texts` that the others are aligned with.
        centre: as for :func:`mexa_hits`.
        seed: of the intervals.
        progress: called with each language before it is read.

    Raises:
        DataError: `english` is not there, or alone, or the numbers of sentences differ.
    """
    if english not in texts or len(texts) < 2:
        raise DataError(
            f"cannot align {', '.join(texts) or 'nothing'} with {english}",
            remedy="give the English sentences and those of at least one other language",
        )
    if len({len(sentences) for sentences in texts.values()}) > 1:
        raise DataError("the languages have different numbers of sentences", remedy="keep those that all of them have")

    def read(language: str) -> Reading:
        if progress is not None:
            progress(language)
        return read_sentences(
            encoder,
            tokenizer,
            texts[language],
            template=template,
            pooling=pooling,
            max_length=max_length,
            batch_size=batch_size,
        )

    pivot, rows = read(english).states, []
    for language in texts:
        if language != english:
            reading = read(language)
            hits = 100.0 * mexa_hits(pivot, reading.states, centre=centre).numpy().astype(np.float64)
            low, high = bootstrap_interval(mean_statistics(hits[-1]), seed=seed)
            scores = tuple(float(value) for value in hits.mean(axis=1))
            rows.append(
                LanguageAlignment(language, scores, low, high, reading.unknown, reading.pieces, reading.truncated)
            )
    rows.sort(key=lambda row: (-row.mean, -row.last, row.language))
    return AlignmentTable(tuple(rows), english, len(texts[english]), template, pooling, centre)


@dataclass(frozen=True)
class Correlation:
    """Correlation over languages of a score with an accuracy, with percentile bootstrap intervals.

    Languages are resampled as if they were independent; related languages are not, so the intervals are optimistic.
    """

    pearson: float
    pearson_low: float
    pearson_high: float
    spearman: float
    spearman_low: float
    spearman_high: float
    n: int

    def __str__(self) -> str:
        return (
            f"Pearson {self.pearson:.2f} [{self.pearson_low:.2f}, {self.pearson_high:.2f}], "
            f"Spearman {self.spearman:.2f} [{self.spearman_low:.2f}, {self.spearman_high:.2f}], {self.n} languages"
        )


def correlation(
    scores: Mapping[str, float],
    accuracies: Mapping[str, float],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Correlation:
    """Correlation of `scores` with `accuracies` over the languages that both have.

    Resamples in which either value is the same for all languages have no correlation and are left out.

    Raises:
        DataError: fewer than three common languages, or the same value for all of them.
    """
    common = [language for language in scores if language in accuracies]
    x = np.array([scores[language] for language in common], dtype=np.float64)
    y = np.array([accuracies[language] for language in common], dtype=np.float64)
    if len(common) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        raise DataError(
            f"no correlation over {len(common)} languages"
            + (" whose scores or accuracies are all the same" if len(common) >= 3 else ""),
            remedy="give at least three languages that differ, named alike in both",
        )
    draws = np.random.default_rng(seed).integers(0, len(common), size=(resamples, len(common)))
    pearson, spearman = _row_correlations(x[draws], y[draws]), _row_correlations(_ranks(x[draws]), _ranks(y[draws]))
    tail = (1.0 - confidence) / 2.0
    p_low, p_high = np.nanquantile(pearson, [tail, 1.0 - tail])
    s_low, s_high = np.nanquantile(spearman, [tail, 1.0 - tail])
    return Correlation(
        float(_row_correlations(x[None], y[None])[0]),
        float(p_low),
        float(p_high),
        float(_row_correlations(_ranks(x[None]), _ranks(y[None]))[0]),
        float(s_low),
        float(s_high),
        len(common),
    )


def _ranks(rows: Floats) -> Floats:
    from scipy.stats import rankdata

    ranks: Floats = rankdata(rows, axis=1)
    return ranks


def _row_correlations(x: Floats, y: Floats) -> Floats:
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    scale = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    found: Floats = np.where(scale > 1e-12, (x * y).sum(axis=1) / np.where(scale > 1e-12, scale, 1.0), np.nan)
    return found
