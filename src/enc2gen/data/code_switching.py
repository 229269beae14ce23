"""Code-switched text: English in which some words are replaced by their translations.

LinguaLIFT (arXiv 2412.12499) trains its alignment layer to turn such text back into English: a signal from word
lists alone, for languages without parallel text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex

from enc2gen.corpora.builtin import SOURCE_LANGUAGE, localisation_pairs
from enc2gen.corpora.languages import normalise_language
from enc2gen.corpora.readers import read_records
from enc2gen.data.tasks import Example
from enc2gen.errors import ConfigError, DataError

_WORD = regex.compile(r"\p{L}\p{M}*(?:[\p{L}\p{M}]|['’](?=\p{L}))*")


@dataclass(frozen=True)
class Lexicon:
    """English words, in lower case, with their translations into one language.

    Raises:
        DataError: there is no word.
    """

    language: str
    translations: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if not self.translations:
            raise DataError(f"the lexicon of {self.language} holds no word", remedy="give a longer word list")

    def coverage(self, texts: Iterable[str]) -> float:
        """Share of the words of `texts`, 0 to 1, that the lexicon can translate."""
        words = [word.lower() for text in texts for word in _WORD.findall(text)]
        return sum(word in self.translations for word in words) / max(1, len(words))


def load_lexicon(path: str | Path, language: str) -> Lexicon:
    """Read a word list: one `english TAB translation` a line, or MUSE's `english translation`; also .gz.

    Raises:
        DataError: a line is not a pair, or there is none.
        LanguageError: unknown tag.
    """
    pairs = []
    for number, record in enumerate(read_records(path, format="text"), 1):
        line = record["text"]
        fields = [field.strip() for field in (line.split("\t") if "\t" in line else line.split())]
        if len(fields) != 2 or not all(fields):
            raise DataError(
                f"{line[:60]!r} is no pair of a word and its translation",
                where=f"{path}, entry {number}",
                remedy="write one pair a line, with a tab between its sides",
            )
        pairs.append((fields[0], fields[1]))
    return _lexicon(normalise_language(language), pairs)


def builtin_lexicon(language: str) -> Lexicon:
    """The single words among the built-in localisation texts: names of languages, countries, months, buttons, ...

    Raises:
        DataError: the language has too few texts, or none of a single word.
        LanguageError: unknown tag.
    """
    language = normalise_language(language)
    pairs = [(pair.source, pair.target) for pair in localisation_pairs([language])]
    # Shorter ones are mostly abbreviations of days and units.
    single = [(s, t) for s, t in pairs if len(s) > 2 and _WORD.fullmatch(s) and _WORD.fullmatch(t)]
    return _lexicon(language, single)


def _lexicon(language: str, pairs: Iterable[tuple[str, str]]) -> Lexicon:
    translations: dict[str, dict[str, None]] = {}
    for word, translation in pairs:
        translations.setdefault(word.lower(), {})[translation] = None
    return Lexicon(language, {word: tuple(found) for word, found in translations.items()})


def code_switch(text: str, lexicon: Lexicon, rate: float, rng: np.random.Generator) -> str:
    """Replace words that the lexicon knows by one of their translations, each with probability `rate`.

    Capitals at the start of a word are kept; everything between the words stays. With one seed, a higher rate
    replaces the same words and more.

    Raises:
        ConfigError: `rate` is not between 0 and 1.
    """
    if not 0.0 <= rate <= 1.0:
        raise ConfigError(f"{rate} is no share", where="rate", remedy="use a number from 0 to 1")

    def replaced(match: regex.Match[str]) -> str:
        word = match.group()
        known = lexicon.translations.get(word.lower())
        if known is None:
            return word
        chance, choice = rng.random(), int(rng.integers(len(known)))
        if chance >= rate:
            return word
        return known[choice][:1].upper() + known[choice][1:] if word[0].isupper() else known[choice]

    return _WORD.sub(replaced, text)


def code_switched_examples(
    texts: Iterable[str], lexicons: Sequence[Lexicon], rate: float, seed: int
) -> Iterator[Example]:
    """For each English text and lexicon, the code-switched text to read and the text to write.

    Texts without any replaced word are left out: they would teach nothing about the language.

    Args:
        texts: English.
        lexicons: of the languages to switch to.
        rate: see :func:`code_switch`; 0.5 is our choice, LinguaLIFT's is not known to us.
        seed: 0 or more.
    """
    for number, text in enumerate(texts):
        for index, lexicon in enumerate(lexicons):
            switched = code_switch(text, lexicon, rate, np.random.default_rng([seed, index, number]))
            if switched != text:
                yield Example(switched, text, lexicon.language, SOURCE_LANGUAGE, (text,), "code-switching", group=text)
