"""Vocabularies that learn a new language, without added tokens.

Tokens that are added to a tokenizer are looked for in every text before its model sees it: thousands of them
make loading and splitting slow, and they tear words apart. Here new pieces become part of the model itself,
with scores (Unigram), merges (BPE) or as words and word parts (WordPiece).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from enc2gen.errors import ConfigError, DataError
from enc2gen.tokenization.growth import VocabularyGrowth
from enc2gen.tokenization.vocabulary_size import CANDIDATE_SIZES, SizeTrial, choose_size


@dataclass
class ExtendedVocabulary:
    """A larger tokenizer and where its ids come from.

    Attributes:
        tokenizer: works, saves and loads like any fast tokenizer; none of the new pieces is an added token.
        origins: for each id, the same id if the old tokenizer had it, None if it is new.
        pieces: the new pieces in id order: the last `len(pieces)` ids.
        exempted: characters that the old normalizer rewrote and the new one leaves alone.
        still_altered: characters that were to be kept but that this kind of normalizer cannot leave alone.
        trials: what each size cost on the dev texts, if the size was chosen.
    """

    tokenizer: PreTrainedTokenizerFast
    origins: list[int | None]
    pieces: list[str]
    exempted: list[str] = field(default_factory=list)
    still_altered: list[str] = field(default_factory=list)
    trials: list[SizeTrial] = field(default_factory=list)


def extend_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    size: int | Literal["auto"],
    dev_texts: Sequence[str] = (),
    byte_fallback: bool = False,
    seed: int = 0,
    max_piece_length: int = 16,
    keep_characters: str = "",
) -> ExtendedVocabulary:
    """Add pieces learnt from `texts` to a Unigram, BPE or WordPiece vocabulary; old ids stay as they are.

    Every character of `texts` becomes a piece (with byte fallback, every one that occurs twice). Old text in
    which no new piece occurs is split exactly as before. The normalizer no longer rewrites characters of a script
    that the vocabulary mostly lacks, nor joiners (ZWJ, ZWNJ), Mongolian separators and variation selectors that 1 %
    of the texts have (our choice); see `ExtendedVocabulary.exempted`.

    Args:
        tokenizer: the fast tokenizer to extend; left as it is, but no longer reads text as special tokens.
        texts: text of the new languages.
        size: new pieces wanted, or "auto": see :func:`~enc2gen.tokenization.vocabulary_size.choose_size`.
            All characters are added even if they are more; fewer pieces are if the texts give no more.
            The 256 pieces of byte fallback come besides.
        dev_texts: held-out text to choose the size on; a twentieth of `texts` if there is none.
        byte_fallback: spell what has no piece as bytes, so that nothing is unknown. Unigram and BPE only;
            byte-level BPE does so anyway.
        seed: of the samples drawn from `texts`.
        max_piece_length: longest new piece in characters.
        keep_characters: further characters that the normalizer must not rewrite ("…（"), each of which gets a piece;
            "corpus" for all those of `texts`. Old languages' text that has them is split otherwise than before.
            Spaces and control characters cannot be kept.

    Raises:
        ModelError: the tokenizer is slow or of another kind, or WordPiece was asked for byte fallback.
        ConfigError: `size` or `max_piece_length` is too small.
        DataError: there is no text.
    """
    texts = list(texts)
    _check(texts, size, max_piece_length)
    trials: list[SizeTrial] = []
    options: Any = {
        "byte_fallback": byte_fallback,
        "seed": seed,
        "max_piece_length": max_piece_length,
        "keep_characters": keep_characters,
    }
    if size == "auto":
        size, trials = choose_size(tokenizer, texts, dev_texts, CANDIDATE_SIZES, **options)
    growth = VocabularyGrowth(tokenizer, texts, [size], **options)
    pieces = growth.new_pieces(size)
    origins = [*range(growth.old_size), *[None] * len(pieces)]
    return ExtendedVocabulary(growth.build(size), origins, pieces, growth.exempted, growth.still_altered, trials)


def _check(texts: Sequence[str], size: int | Literal["auto"], max_piece_length: int) -> None:
    if not any(text and not text.isspace() for text in texts):
        raise DataError("there is no text to learn pieces from", remedy="give lines of the new language")
    if size != "auto" and size < 1:
        raise ConfigError(f"an extension by {size} pieces is none", where="size", remedy='1 or more, or "auto"')
    if max_piece_length < 2:
        raise ConfigError(f"{max_piece_length} is too short", where="max_piece_length", remedy="use 2 or more")
