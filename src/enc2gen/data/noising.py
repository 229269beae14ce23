"""Denoising noise as in mBART: spans of text become one mask token each, and sentences change places.

mBART is arXiv 2001.08210 (section 2.2), BART arXiv 1910.13461 (section 2.2).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from enc2gen.corpora.languages import default_script
from enc2gen.errors import ConfigError, DataError


class NoiseConfig(BaseModel):
    """How much noise a denoising example gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mask_ratio: float = Field(
        default=0.35,
        ge=0.0,
        lt=1.0,
        description="share of the words that is masked (0.35: mBART, arXiv 2001.08210, section 2.2; "
        "BART masks 0.3, arXiv 1910.13461, section 5.1)",
    )
    poisson_lambda: float = Field(
        default=3.5,
        ge=0.1,
        description="mean length of a masked span in words, Poisson distributed (3.5: mBART, arXiv "
        "2001.08210, section 2.2; BART 3, arXiv 1910.13461, section 2.2)",
    )
    permute_sentences: bool = Field(
        default=True,
        description="put the sentences of an example in random order (mBART, arXiv 2001.08210, section 2.2)",
    )


class Denoiser:
    """Makes the noised source of a denoising example; the target is the text as it was.

    Ids are opaque: no tokenizer is needed.

    Args:
        config: rates.
        mask_token_id: what a masked span is replaced with; must not occur in the text.

    Raises:
        ConfigError: `mask_token_id` is negative.
    """

    def __init__(self, config: NoiseConfig, mask_token_id: int) -> None:
        if mask_token_id < 0:
            raise ConfigError(f"mask_token_id is {mask_token_id}", remedy="use a tokenizer that has a mask token")
        self.config = config
        self.mask_token_id = mask_token_id

    def noise(
        self,
        sentences: Sequence[Sequence[int]],
        rng: np.random.Generator,
        word_starts: Sequence[Sequence[bool]] | None = None,
    ) -> list[int]:
        """Noised ids of a text.

        Sentences are permuted, then spans are masked, each replaced by one mask token; spans may reach over
        sentence boundaries. A span of length 0 inserts a mask token and removes nothing (BART, section 2.2).
        Spans never touch each other, so every run of removed words is one span.

        With `n` words, `mask_ratio * n` of them are masked: rounded at random, so that the rate holds on
        average for short texts also, and at most `n - 1`, so that something stays visible. Hence a text of
        one word stays as it is, and of two words one is masked with probability `2 * mask_ratio` (if that is
        below 1).

        Args:
            sentences: piece ids of each sentence.
            rng: the only source of randomness.
            word_starts: for each piece, whether a word starts there (see :func:`word_starts`); a word is
                masked as a whole. Without it every piece is a word.

        Raises:
            DataError: `word_starts` does not have the shape of `sentences`.
        """
        if word_starts is not None and len(word_starts) != len(sentences):
            raise DataError(f"word_starts has {len(word_starts)} sentences instead of {len(sentences)}")
        order = list(range(len(sentences)))
        if self.config.permute_sentences:
            order = rng.permutation(len(sentences)).tolist()
        words: list[list[int]] = []
        for index in order:
            words += _words(sentences[index], None if word_starts is None else word_starts[index])
        return self._mask(words, rng)

    def _mask(self, words: list[list[int]], rng: np.random.Generator) -> list[int]:
        masked = min(int(self.config.mask_ratio * len(words) + rng.random()), len(words) - 1)
        if masked < 1:
            return [piece for word in words for piece in word]
        visible = len(words) - masked
        lengths = self._span_lengths(masked, gaps=visible + 1, rng=rng)
        # Spans stand in distinct gaps between visible words: gap g lies before the g-th of them.
        gaps = sorted(rng.choice(visible + 1, size=len(lengths), replace=False).tolist())
        spans = dict(zip(gaps, lengths, strict=True))
        noised: list[int] = []
        position = 0
        for gap in range(visible + 1):
            if gap in spans:
                noised.append(self.mask_token_id)
                position += spans[gap]
            if gap < visible:
                noised += words[position]
                position += 1
        return noised

    def _span_lengths(self, total: int, gaps: int, rng: np.random.Generator) -> list[int]:
        """Poisson lengths that sum to `total` (the last is cut), in random order, at most `gaps` of them."""
        lengths: list[int] = []
        left = total
        while left:
            length = min(int(rng.poisson(self.config.poisson_lambda)), left)
            lengths.append(length)
            left -= length
        while len(lengths) > gaps:  # only at high rates: there is no visible word to set two spans apart
            length = lengths.pop()
            lengths[-1] += length
        return rng.permutation(lengths).tolist()


def _words(pieces: Sequence[int], starts: Sequence[bool] | None) -> list[list[int]]:
    if starts is None:
        return [[piece] for piece in pieces]
    if len(starts) != len(pieces):
        raise DataError(f"word_starts has {len(starts)} entries for a sentence of {len(pieces)} pieces")
    words: list[list[int]] = []
    for piece, start in zip(pieces, starts, strict=True):
        if start or not words:
            words.append([])
        words[-1].append(piece)
    return words


# Letters of scripts that put no space between words (Thai, Lao, Burmese, Khmer, Kana, Han).
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_TIBETAN_SYLLABLE_ENDS = ("\u0f0b", "\u0f0c", "\u0f0d", "\u0f0e")  # tsheg, hard tsheg, shad, double shad
_SPACE_MARKS = ("\u2581", "\u0120")  # SentencePiece, byte-level BPE
_CONTINUATION = re.compile(r"##\w")  # WordPiece; a byte-level vocabulary never joins letters to punctuation


def word_starts(pieces: Sequence[str]) -> list[bool]:
    """For each piece of a sentence (its string in the vocabulary), whether a word starts there.

    A word starts after white space, as SentencePiece (U+2581 before), byte-level BPE (U+0120 before) and
    WordPiece ("##" on continuations) mark it. Scripts without spaces have no such mark: in Han, Kana, Thai,
    Lao, Khmer and Burmese each piece is a word; in Tibetan a syllable is, and it ends with a tsheg or shad.
    """
    wordpiece = _is_wordpiece(pieces)
    starts: list[bool] = []
    for index, piece in enumerate(pieces):
        marked = not piece.startswith("##") if wordpiece else piece.startswith(_SPACE_MARKS)
        after_syllable = index > 0 and pieces[index - 1].endswith(_TIBETAN_SYLLABLE_ENDS)
        starts.append(index == 0 or marked or after_syllable or _UNSPACED.search(piece) is not None)
    return starts


def _is_wordpiece(pieces: Sequence[str]) -> bool:
    """Whether pieces are WordPiece's. U+0120 does not tell by itself: it is a letter of Maltese, too."""
    if any(piece.startswith(_SPACE_MARKS[0]) for piece in pieces):
        return False
    if any(_CONTINUATION.match(piece) for piece in pieces):
        return True
    return not any(piece.startswith(_SPACE_MARKS[1]) for piece in pieces)


# What ends a sentence wherever it stands. Escapes, because many of these look like other marks or turn the
# line.
_ANYWHERE = "".join(
    (
        "\u3002\uff01\uff1f\uff61",  # Chinese, Japanese
        "\u061f\u06d4",  # Arabic script: question mark, Urdu full stop
        "\u1362\u1367\u1368",  # Ethiopic: full stop, question mark, paragraph separator
        "\u17d4\u17d5",  # Khmer
        "\u104b",  # Burmese
        "\u0964\u0965",  # danda and double danda: Devanagari, Bengali and other Indic scripts
        "\u1803\u1809",  # Mongolian, Manchu
        "\u0589",  # Armenian
        "\u0df4",  # Sinhala
        "\u1c7e\u1c7f",  # Santali
    )
)
_ETHIOPIC_TWO_WORDSPACES = "\u1361\u1361"  # typed in place of the full stop
# What ends a sentence before white space only: "3.5" and "example.org" go on.
_BEFORE_SPACE = ".!?\u2026"
_GREEK_QUESTION_MARKS = ";\u037e"
_TIBETAN_SHADS = "\u0f0d\u0f0e\u0f0f\u0f10\u0f11\u0f14"
_CLOSERS = "\"'\u201d\u2019\u00bb\u203a\u300d\u300f\uff09\u3011\u300b)\\]"
_SPACELESS_SCRIPTS = frozenset({"Hani", "Hans", "Hant", "Jpan", "Hira", "Kana", "Hrkt"})


@lru_cache(maxsize=256)
def _boundary(language: str) -> re.Pattern[str]:
    """What ends a sentence of `language`, closing quotes and white space included.

    The named group `dot` matches where the sentence may nevertheless go on.
    """
    script = default_script(language)
    anywhere, before_space = _ANYWHERE, _BEFORE_SPACE
    if script in _SPACELESS_SCRIPTS:
        anywhere += "!?"
    if script == "Grek":
        before_space += _GREEK_QUESTION_MARKS
    full_stop = rf"(?:[{anywhere}]|{_ETHIOPIC_TWO_WORDSPACES})"
    ends = [
        r"\s*\n\s*",
        rf"{full_stop}(?:{full_stop}|[{before_space}])*[{_CLOSERS}]*\s*",
        rf"(?P<dot>[{before_space}]+[{_CLOSERS}]*\s+)",
    ]
    if script == "Tibt":
        ends.append(rf"[{_TIBETAN_SHADS}](?:\s*[{_TIBETAN_SHADS}])*\s*")
        # After the letters ka, ga and sha the shad is not written; the space alone ends the clause.
        ends.append("(?<=[\u0f40\u0f42\u0f64])[ \u00a0]+")
    return re.compile("|".join(ends))


def split_sentences(text: str, language: str) -> list[str]:
    """Split a text into sentences by the marks of its language's script.

    Line ends always split, and nothing but white space is lost. In Tibetan the unit between two shads is
    often a clause. A full stop does not split before a small letter (as after an abbreviation), after an
    initial ("A. Qodiriy"), or after a number that starts a sentence ("1. Kirish"). Scripts without any mark,
    such as Thai, split at line ends only.

    Args:
        text: any text.
        language: its BCP 47 tag; decides the script.
    """
    return list(_sentences(text, _boundary(language)))


def _sentences(text: str, boundary: re.Pattern[str]) -> Iterator[str]:
    start = 0
    for match in boundary.finditer(text):
        if match.group("dot") and _goes_on(text[start : match.start()], match.group(), text[match.end() :]):
            continue
        if sentence := text[start : match.end()].strip():
            yield sentence
        start = match.end()
    if sentence := text[start:].strip():
        yield sentence


def _goes_on(before: str, mark: str, after: str) -> bool:
    """Whether the sentence goes on after `mark`, a full stop or the like with white space after it."""
    if "\n" in mark:
        return False
    if after and unicodedata.category(after[0]) == "Ll":
        return True
    if mark.strip() != ".":
        return False
    words = before.split()
    if not words:
        return False
    last = words[-1].lstrip("([\"'\u00ab\u201c")
    initial = len(last) == 1 and last.isupper()
    enumerator = len(words) == 1 and len(last) <= 3 and last.isdigit()
    return initial or enumerator
