"""How many new pieces a language is worth, measured on held-out text."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from enc2gen.errors import ConfigError, DataError
from enc2gen.tokenization.growth import VocabularyGrowth
from enc2gen.tokenization.piece_training import sample_texts

CANDIDATE_SIZES = (500, 1000, 2000, 4000, 8000, 16000)
TOLERANCE = 0.005  # a smaller vocabulary may cost this share of bits more than the best; our choice
_DEV_SHARE = 0.05  # of the texts, if no dev texts are given; our choice
_DEV_CHARACTERS = 200_000  # longer dev texts are sampled; our choice
_UNICODE_BITS = math.log2(159_801)  # to write an unknown character: as many as Unicode 17 has


@dataclass(frozen=True)
class SizeTrial:
    """One size of an extension, measured on the dev texts.

    Attributes:
        size: new pieces asked for.
        bits_per_character: cost of the dev texts; see :func:`choose_size`.
        pieces: new pieces made (characters and what the data gave).
        unknown_rate: share (0 to 1) of the tokens that are unknown.
        fertility: tokens per whitespace-separated word.
    """

    size: int
    bits_per_character: float
    pieces: int
    unknown_rate: float
    fertility: float


def choose_size(
    tokenizer: PreTrainedTokenizerBase,
    train_texts: Sequence[str],
    dev_texts: Sequence[str] = (),
    sizes: Sequence[int] = CANDIDATE_SIZES,
    *,
    byte_fallback: bool = False,
    seed: int = 0,
    max_piece_length: int = 16,
    keep_characters: str = "",
) -> tuple[int, list[SizeTrial]]:
    """The smallest size whose dev bits per character are within 0.5 % (our choice) of the best size's.

    Pieces are learnt once, for the largest size. For each size, (a sample of) the training text is split and its
    tokens counted; the dev text then costs -log2 p(token | two tokens before) bits a token, where p is a
    Witten-Bell trigram model (Bell et al. 1990): p(x | h) = (c(h, x) + T(h) p(x | h')) / (c(h) + T(h)) for the
    T(h) kinds of tokens seen after the context h, h' being h without its first token; below the empty context
    every id is equally likely. So a piece that is too rare to be learnt costs more than it saves, and long pieces
    win nothing that their parts' context tells as well. (Without context, bits fall with every piece: on 2.7 MB of
    Tibetan the largest size always won.) An unknown token costs log2 of the size of Unicode for each of its
    characters besides. Sizes that the data cannot fill are left out.

    Returns:
        The size, and the trials in ascending order of size.

    Raises:
        ModelError: as :class:`~enc2gen.tokenization.growth.VocabularyGrowth`.
        ConfigError: no sizes, or one below 1.
        DataError: too little text to hold any out.
    """
    if not sizes or min(sizes) < 1:
        raise ConfigError("sizes must be 1 or more", where="sizes", remedy=f"for example {CANDIDATE_SIZES}")
    train, dev = _split(train_texts, dev_texts, seed)
    growth = VocabularyGrowth(
        tokenizer,
        train,
        sizes,
        byte_fallback=byte_fallback,
        seed=seed,
        max_piece_length=max_piece_length,
        keep_characters=keep_characters,
    )
    train, dev = sample_texts(train, seed), sample_texts(dev, seed, _DEV_CHARACTERS)
    trials: list[SizeTrial] = []
    for size in sorted(set(sizes)):
        pieces = len(growth.new_pieces(size))
        if trials and pieces == trials[-1].pieces:
            continue  # the data gives no more
        trials.append(_trial(growth.build(size), size, pieces, train, dev))
    return smallest_good(trials), trials


def smallest_good(trials: Sequence[SizeTrial]) -> int:
    """The smallest size within `TOLERANCE` of the fewest bits per character."""
    best = min(trial.bits_per_character for trial in trials)
    return min(trial.size for trial in trials if trial.bits_per_character <= best * (1 + TOLERANCE))


def _split(train: Sequence[str], dev: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    train, dev = list(train), [text for text in dev if text.strip()]
    if dev:
        return train, dev
    order = [i for i, text in enumerate(train) if text.strip()]
    if len(order) < 2:
        remedy = "give dev texts, more lines, or a size"
        raise DataError("too little text to hold some out and choose a size", remedy=remedy)
    random.Random(seed).shuffle(order)
    held = set(order[: math.ceil(_DEV_SHARE * len(order))])
    return [t for i, t in enumerate(train) if i not in held], [train[i] for i in sorted(held)]


def _trial(
    tokenizer: PreTrainedTokenizerFast, size: int, pieces: int, train: Sequence[str], dev: Sequence[str]
) -> SizeTrial:
    backend = tokenizer.backend_tokenizer
    model = _Trigrams(_ids(backend, train), len(tokenizer))
    bits, tokens, unknown = 0.0, 0, 0
    for text, encoding in zip(dev, backend.encode_batch(list(dev), add_special_tokens=False), strict=True):
        tokens += len(encoding.ids)
        bits += model.bits(encoding.ids)
        for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if i == tokenizer.unk_token_id:
                unknown += 1
                bits += _UNICODE_BITS * len(text[start:end])
    return SizeTrial(
        size=size,
        bits_per_character=bits / sum(map(len, dev)),
        pieces=pieces,
        unknown_rate=unknown / max(1, tokens),
        fertility=tokens / max(1, sum(len(text.split()) for text in dev)),
    )


class _Trigrams:
    """Interpolated Witten-Bell model of the next token after up to two others."""

    def __init__(self, rows: Iterable[Sequence[int]], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.followers: dict[tuple[int, ...], Counter[int]] = {}
        for row in rows:
            for place, token in enumerate(row):
                for context in _contexts(row, place):
                    self.followers.setdefault(context, Counter())[token] += 1
        self.totals = {context: counts.total() for context, counts in self.followers.items()}

    def bits(self, row: Sequence[int]) -> float:
        """-log2 p of a whole row."""
        return -sum(math.log2(self._probability(row, place)) for place in range(len(row)))

    def _probability(self, row: Sequence[int], place: int) -> float:
        probability = 1 / self.vocabulary
        for context in _contexts(row, place):
            counts = self.followers.get(context)
            if counts is None:
                break
            kinds = len(counts)
            probability = (counts[row[place]] + kinds * probability) / (self.totals[context] + kinds)
        return probability


def _contexts(row: Sequence[int], place: int) -> list[tuple[int, ...]]:
    """The none, one and two tokens before `place`, as far as there are any."""
    return [tuple(row[place - length : place]) for length in range(min(place, 2) + 1)]


def _ids(backend: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
