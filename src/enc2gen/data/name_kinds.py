"""The task `name-kinds`: what kind of thing does a name stand for? Made of installed packages' catalogues alone.

CLDR (through Babel) has names of countries, languages, currencies, units and time zones in many languages, and Django
has messages. The catalogue that a text comes from is its label, so the task needs no download and no annotation; it
is easier than topics of news, and some kinds have tell-tale words ("time"), in every language its own.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from enc2gen.corpora.builtin import SOURCE_LANGUAGE, Pair, available_languages, localisation_pairs, split_of
from enc2gen.corpora.languages import normalise_language
from enc2gen.data.classification import CLASSIFICATION_TASKS, ClassificationTask, LabelledText
from enc2gen.errors import ConfigError

KINDS = {
    "babel/territories": "country",
    "babel/languages": "language",
    "babel/currency_names": "currency",
    "babel/meta_zones": "time zone",
    "babel/unit_display_names": "unit",
    "django/conf": "message",
    "django/admin": "message",
    "django/auth": "message",
}
"""Where a text comes from -> its label."""

MOST = {"train": 120, "dev": 25, "test": 40}
"""Most texts of each label in one split (our choice: no label outweighs another, and little is to be computed)."""
SHORTEST = 4
"""Least characters of an English text: shorter ones are abbreviations (our choice)."""
_ENGLISH_FROM = ("kk", "mn", "tr", "ug", "zh")  # the English sides of these pairs are the English texts


class NameKinds(ClassificationTask):
    """Texts of the localisation corpus with their kinds, split by a hash of the English side.

    A name is therefore in the same split in all languages: what is tested was never seen in another language.
    """

    def load(self, language: str, split: str, path: str | Path | None = None) -> list[LabelledText]:
        """The texts of one language and split; `id` is the English side.

        Raises:
            ConfigError: a `path`, or an unknown split.
            DataError: too few texts in this language, or a package is missing.
            LanguageError: unknown tag.
        """
        if path is not None:
            raise ConfigError("this task is built in and takes no path", where=self.name, remedy="leave task.path out")
        split = "dev" if split == "validation" else split
        if split not in MOST:
            raise ConfigError(f"unknown split {split!r}", where=self.name, remedy="train, dev or test")
        tag = normalise_language(language)
        rows: dict[str, dict[str, LabelledText]] = defaultdict(dict)
        for source, text, kind in sorted(_texts(tag), key=_shuffled):
            if split_of(source, dev_percent=10, test_percent=20) == split and len(rows[kind]) < MOST[split]:
                rows[kind].setdefault(source, LabelledText(text, kind, language, source))
        return [row for kind in self.labels for row in rows[kind].values()]

    def available_languages(self, path: str | Path | None = None) -> list[str]:
        """English and all languages of the localisation corpus."""
        return [SOURCE_LANGUAGE, *available_languages()]


def _shuffled(row: tuple[str, str, str]) -> bytes:
    """An order that is the same for all languages, so that their tests share as many names as possible."""
    return hashlib.sha256(row[0].encode()).digest()


@cache
def _pairs(language: str) -> tuple[Pair, ...]:
    return tuple(localisation_pairs([language]))


def _texts(language: str) -> Iterator[tuple[str, str, str]]:
    """(English side, text, kind) of texts that have one kind only."""
    origins = _ENGLISH_FROM if language == SOURCE_LANGUAGE else (language,)
    pairs = [pair for tag in origins for pair in _pairs(tag)]
    kinds: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        kinds[pair.source].add(KINDS.get(pair.origin, pair.origin))
    for pair in pairs:
        kind = KINDS.get(pair.origin)
        if kind is not None and len(kinds[pair.source]) == 1 and len(pair.source) >= SHORTEST:
            yield pair.source, pair.source if language == SOURCE_LANGUAGE else pair.target, kind


CLASSIFICATION_TASKS.add(
    "name-kinds", NameKinds(name="name-kinds", labels=tuple(dict.fromkeys(KINDS.values())), languages=())
)
