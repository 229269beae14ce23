"""Glossaries: terms that a translation must contain, or must not, where a term occurs in the source."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import regex

from enc2gen.corpora.languages import dominant_script
from enc2gen.errors import DataError

_UNSPACED = frozenset({"Hani", "Hira", "Kana", "Bopo", "Yiii", "Tang", "Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Java"})
"""Scripts that do not set words apart with spaces."""
_REMEDY = "write a term a line: source term, tab, target term, and for a forbidden one: tab, forbidden"


def words_are_spaced(term: str) -> bool:
    """Whether `term` is in a script whose words are set apart with spaces."""
    return dominant_script(term) not in _UNSPACED


@dataclass(frozen=True)
class Entry:
    """One line of a glossary.

    Attributes:
        source: term in the source that the entry is for; empty: every source.
        target: term of the output.
        forbidden: whether the output must not contain it; else it must.
    """

    source: str
    target: str
    forbidden: bool = False


@dataclass(frozen=True)
class Terms:
    """What a glossary says about one source: terms of the output, each once."""

    required: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()


class Glossary:
    """Terms and what they are to be called.

    A source term counts where it occurs as a whole word, in capitals or not; within a longer term of the glossary it
    does not count ("York" in "New York"). In scripts without spaces it counts wherever it occurs. Of source terms that
    differ in capitals only, those spelled as in the source count, and all of them where none is.

    Args:
        entries: in any order.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(dict.fromkeys(entries))
        variants: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for place, entry in enumerate(self.entries):
            source = _spelled(entry.source)
            variants[source.casefold()][source].append(place)
        self._everywhere = [place for places in variants.pop("", {}).values() for place in places]
        longest_first = sorted(variants, key=lambda term: (-len(term), term))
        self._groups = [_Group(variants[term]) for term in longest_first]
        self._by_word: dict[str | None, list[int]] = defaultdict(list)
        for number, group in enumerate(self._groups):
            for word in {_first_word(term) for term in group.variants}:
                self._by_word[word].append(number)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Glossary:
        """Read a UTF-8 file of tab-separated lines: source term, target term, and `forbidden` where it is.

        Raises:
            DataError: missing, not UTF-8, without any term, or a line that is not of this form.
        """
        where = os.fspath(path)
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"byte {error.start} is not UTF-8", where=where, remedy="convert it with iconv") from error
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", where=where, remedy="check the path") from error
        lines = enumerate(text.split("\n"), start=1)  # as elsewhere: U+2028, say, is within a line
        entries = [_entry(line, f"{where}, line {number}") for number, line in lines if line.strip()]
        if not entries:
            raise DataError("there is no term", where=where, remedy=_REMEDY)
        return cls(entries)

    def with_forbidden(self, terms: Iterable[str]) -> Glossary:
        """This glossary, and terms that no output may contain."""
        return Glossary([*self.entries, *(Entry("", " ".join(term.split()), forbidden=True) for term in terms)])

    def terms(self, source: str) -> Terms:
        """What this source's output must and must not contain."""
        rest = unicodedata.normalize("NFC", source)
        words = {_folded(word) for word in _WORD.findall(rest)}
        found = set(self._everywhere)
        for number in sorted({number for word in (None, *words) for number in self._by_word.get(word, ())}):
            group = self._groups[number]
            if matches := [match[0] for match in group.pattern.finditer(rest)]:
                found.update(place for match in matches for place in group.meant(match))
                # Neither a letter nor a space, so that no other term ends, begins or goes on here.
                rest = group.pattern.sub(lambda match: "\0" * len(match[0]), rest)
        asked = [self.entries[place] for place in sorted(found)]
        return Terms(
            tuple(dict.fromkeys(entry.target for entry in asked if not entry.forbidden)),
            tuple(dict.fromkeys(entry.target for entry in asked if entry.forbidden)),
        )


class _Group:
    """Source terms that differ in capitals only.

    Args:
        variants: term, as :func:`_spelled` -> places of its entries.
    """

    def __init__(self, variants: dict[str, list[int]]) -> None:
        self.variants = variants
        self.pattern = regex.compile("|".join(map(_pattern, variants)), regex.IGNORECASE)

    def meant(self, match: str) -> Sequence[int]:
        """Places of the entries that are for `match`."""
        exact = self.variants.get(_spelled(match))
        return exact or [place for places in self.variants.values() for place in places]


_WORD = regex.compile(r"\w+")


def _spelled(text: str) -> str:
    """`text` in one form, whatever its spaces are, and whether its accents are characters of their own."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _folded(word: str) -> str:
    """What words that match each other have in common; the dot is what is left of "İ" beside "i"."""
    return word.casefold().replace("\u0307", "")


def _first_word(term: str) -> str | None:
    """The word that a source must have for `term` to occur in it; None if that cannot be said.

    Most terms of a large glossary are ruled out by it, without a search for each.
    """
    word = _WORD.match(term)
    return _folded(word[0]) if word and words_are_spaced(term) else None


def _is_word(character: str) -> bool:
    """Whether it is part of a word; vowel signs, which `str.isalnum` leaves out, are."""
    return _WORD.match(character) is not None


def _pattern(term: str) -> str:
    inner = r"\s+".join(regex.escape(word) for word in term.split())
    edges = words_are_spaced(term)
    before = r"(?<!\w)" if edges and _is_word(term[0]) else ""
    after = r"(?!\w)" if edges and _is_word(term[-1]) else ""
    return before + inner + after


def _entry(line: str, where: str) -> Entry:
    fields = [" ".join(field.split()) for field in line.split("\t")]
    if len(fields) not in (2, 3):
        raise DataError(f"{len(fields)} columns instead of 2 or 3", where=where, remedy=_REMEDY)
    if not fields[0] or not fields[1]:
        raise DataError(f"the {'target' if fields[0] else 'source'} term is empty", where=where, remedy=_REMEDY)
    kind = fields[2].lower() if len(fields) == 3 else ""
    if kind not in ("", "required", "forbidden"):
        raise DataError(f"{fields[2]!r} in the third column", where=where, remedy=_REMEDY)
    return Entry(fields[0], fields[1], forbidden=kind == "forbidden")
