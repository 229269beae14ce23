"""Filters: why a cleaned line does not belong into a corpus.

Measures that need words count syllables in Tibetan, characters in scripts written without spaces, and words between
spaces elsewhere: a Chinese sentence is not one long word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import regex

from enc2gen.corpora.cleaning import CleaningConfig
from enc2gen.corpora.language_id import LANGUAGE_IDENTIFIERS, LanguageIdentifier, matches
from enc2gen.corpora.languages import default_script, dominant_script, letters_by_script, script_matches

_NGRAM = 5
_LEAST_NGRAMS = 15
_LEAST_TRIGRAMS = 10
"""Shorter lines say nothing about repetition (our choice)."""
_PIECE = 200  # our choice: characters of a long line that are identified on their own, about two sentences
_WEIGHTS = dict.fromkeys(("Hani", "Hira", "Kana", "Hang"), 3)
"""Letters of an alphabet that say as much as one character of Chinese, Japanese or Korean (our choice)."""

# The Tibetan tsheg (U+0F0B, U+0F0C) ends a syllable, and counts as part of its spelling.
_LETTERS = regex.compile(r"[\p{L}\p{M}\u0F0B\u0F0C]+")
_DAMAGED = re.compile("[\ufffd\ud800-\udfff]")
_UNITS = regex.compile(
    r"(?V1)[[\p{L}\p{M}\p{N}]&&\p{Tibetan}]+"
    r"|[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
    r"|[\p{L}\p{M}\p{N}\u200c\u200d\u180e\u202f]+"
)


class Refusal(NamedTuple):
    """Why a line is dropped.

    Attributes:
        reason: a key of `DROP_REASONS`.
        detail: what it rests on, for the report; may be empty.
        language: of the line where it was identified, else "und".
    """

    reason: str
    detail: str = ""
    language: str = "und"


def refuse_text(text: str, config: CleaningConfig) -> Refusal | None:
    """Return why a cleaned line is no usable text, None if it is: damaged, length, letters, repetition."""
    if _DAMAGED.search(text):
        return Refusal("encoding", "a replacement character or half a surrogate pair")
    if len(text) < config.min_length:
        return Refusal("too-short", f"{len(text)} characters")
    if len(text) > config.max_length:
        return Refusal("too-long", f"{len(text):,} characters")
    letters = letter_share(text)
    if letters < config.min_letters:
        return Refusal("few-letters", f"{letters:.0%} letters")
    repeated = ngram_share(text) if _may_repeat(text, config.max_ngram_share) else 0.0
    if repeated > config.max_ngram_share:
        return Refusal("repetition", f"one sequence of characters makes {repeated:.0%}")
    repeated = repeated_share(text)
    if repeated > config.max_repeated_share:
        return Refusal("repetition", f"{repeated:.0%} of the word sequences are repeated")
    return None


def letter_share(text: str) -> float:
    """Return the share of letters and marks among the characters that are not white space; 0 without any."""
    visible = sum(map(len, text.split()))
    return sum(map(len, _LETTERS.findall(text))) / visible if visible else 0.0


def ngram_share(text: str) -> float:
    """Return the share of the most frequent character 5-gram among all 5-grams; 0 for a line with fewer than 15."""
    total = len(text) - _NGRAM + 1
    if total < _LEAST_NGRAMS:
        return 0.0
    return max(Counter(text[start : start + _NGRAM] for start in range(total)).values()) / total


def _may_repeat(text: str, share: float) -> bool:
    """Whether a 5-gram may make more than `share` of all: a quick test that is sure when it says no.

    n-grams that always lie more than d places apart are at most 1 + (total - 1) // (d + 1) of them.
    """
    total = len(text) - _NGRAM + 1
    if total < _LEAST_NGRAMS or share >= 1:
        return False
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    run = b"\1" * _NGRAM
    for distance in range(1, total):
        if 1 + (total - 1) // distance <= share * total:
            return False
        if run in (codes[distance:] == codes[:-distance]).tobytes():
            return True
    return True


def repeated_share(text: str) -> float:
    """Return the share of trigrams of words that occurred before in the line; 0 for a line with fewer than 10.

    The measure is the fraction of duplicate n-grams of Rae et al. 2021 (arXiv 2112.11446, table A1), on
    :func:`word_units`.
    """
    units = word_units(text)
    total = len(units) - 2
    if total < _LEAST_TRIGRAMS:
        return 0.0
    return 1 - len(set(zip(units, units[1:], units[2:], strict=False))) / total


def word_units(text: str) -> list[str]:
    """Return words, or what stands for them: syllables of Tibetan, characters of scripts without spaces."""
    return _UNITS.findall(text)


class LanguageFilter:
    """Drops lines in other languages than the one asked for, on the evidence that :func:`matches` asks for.

    A line in several languages stays if half of it is in the right one: a Uyghur paragraph that quotes Arabic, a
    Chinese sentence with English names, which have more letters than the sentence has characters.

    For a language that the identifier does not know, only the script counts: its guesses would be wrong.
    """

    def __init__(self, language: str, identifier: str) -> None:
        self.language = language
        self._name = identifier

    @cached_property
    def _identifier(self) -> LanguageIdentifier:
        return LANGUAGE_IDENTIFIERS.get(self._name)()

    @cached_property
    def by_script_only(self) -> bool:
        """Whether the identifier does not know the language, so that only its script is looked at."""
        return not self._identifier.supports(self.language)

    def refuse(self, texts: Sequence[str]) -> list[Refusal | None]:
        """Return for each text why it is in another language, or None."""
        if self.by_script_only:
            return [self._wrong_script(text) for text in texts]
        return [
            None
            if matches(self.language, guess) or self._half_right(text)
            else Refusal("wrong-language", f"{guess.language} {guess.confidence:.2f}", guess.language)
            for text, guess in zip(texts, self._identifier.identify(texts), strict=True)
        ]

    def _half_right(self, text: str) -> bool:
        """Whether half of a line that is refused as a whole is in the right script, if mixed, and language, if long."""
        wanted = default_script(self.language)
        counts = letters_by_script(text)
        weights = {script: count * _WEIGHTS.get(script, 1) for script, count in counts.items()}
        right = sum(weight for script, weight in weights.items() if script_matches(script, wanted))
        if 2 * right <= sum(weights.values()):
            return False
        if not script_matches(max(counts, key=lambda script: counts[script]), wanted):
            return True  # by weight, not by number of letters: nothing tells the language
        pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
        matching = [matches(self.language, guess) for guess in self._identifier.identify(pieces)]
        return len(pieces) > 1 and 2 * sum(matching) >= len(matching)

    def _wrong_script(self, text: str) -> Refusal | None:
        script = dominant_script(text)
        if script_matches(script, default_script(self.language)):
            return None
        return Refusal("wrong-language", f"script {script}")
