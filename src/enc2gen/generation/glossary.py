"""Glossaries: terms that a translation must contain, or must not, where a term occurs in the source."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
    does not count ("York" in "New York"). In scripts without spaces it counts wherever it occurs.

    Args:
        entries: in any order.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(dict.fromkeys(entries))
        sources = sorted({entry.source for entry in self.entries if entry.source}, key=lambda term: (-len(term), term))
        self._patterns = [(source, _pattern(source)) for source in sources]

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
        lines = enumerate(text.splitlines(), start=1)
        entries = [_entry(line, f"{where}, line {number}") for number, line in lines if line.strip()]
        if not entries:
            raise DataError("there is no term", where=where, remedy=_REMEDY)
        return cls(entries)

    def with_forbidden(self, terms: Iterable[str]) -> Glossary:
        """This glossary, and terms that no output may contain."""
        return Glossary([*self.entries, *(Entry("", " ".join(term.split()), forbidden=True) for term in terms)])

    def terms(self, source: str) -> Terms:
        """What this source's output must and must not contain."""
        found, rest = {""}, source
        for term, pattern in self._patterns:
            if pattern.search(rest):
                found.add(term)
                rest = pattern.sub(lambda match: "\n" * len(match[0]), rest)
        asked = [entry for entry in self.entries if entry.source in found]
        return Terms(
            tuple(dict.fromkeys(entry.target for entry in asked if not entry.forbidden)),
            tuple(dict.fromkeys(entry.target for entry in asked if entry.forbidden)),
        )


def _pattern(term: str) -> regex.Pattern[str]:
    inner = r"\s+".join(regex.escape(word) for word in term.split())
    edges = words_are_spaced(term)
    before = r"(?<![\w])" if edges and (term[0].isalnum() or term[0] == "_") else ""
    after = r"(?![\w])" if edges and (term[-1].isalnum() or term[-1] == "_") else ""
    return regex.compile(before + inner + after, regex.IGNORECASE)


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
