"""The continuation task: what plain text alone can teach a generator, in any language."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from pydantic import Field

from enc2gen.data.noising import split_sentences
from enc2gen.data.tasks import Example, Task, WithinLanguageConfig, _Record

# A word or syllable with what ends it: white space, Tibetan tsheg, Ethiopic word space.
_UNIT = re.compile(r"[^\s\u0F0B\u1361]*[\s\u0F0B\u1361]+|[^\s\u0F0B\u1361]+$")


class ContinuationConfig(WithinLanguageConfig):
    """Mapping of plain text: the first part is read, the rest is written."""

    text: str = Field(default="text", description="field with the text")
    document: str | None = Field(
        default=None, description="field that names the text's document: one document stays in one split"
    )
    share: float = Field(
        default=0.5, gt=0.0, lt=1.0, description="share of the text that is read, in characters (our choice: half)"
    )


class Continuation(Task[ContinuationConfig]):
    """The beginning of a text to its continuation; texts of one character are left out."""

    name = "continuation"
    config_class = ContinuationConfig

    def _examples_of(self, record: _Record) -> Iterator[Example]:
        config = self.config
        read = self._language(record, "language")
        text = record.text(config.text)
        begin, rest = split_text(text, read or "und", config.share)
        write = self._language(record, "target_language") or str(read)
        example = self._example(begin, (rest,) if rest else (), read, write)
        group = record.text(config.document) if config.document is not None else text
        yield replace(example, group=group)


def split_text(text: str, language: str, share: float) -> tuple[str, str]:
    """Cut `text` where `share` of its characters is nearest: between sentences if there are several, else words.

    Scripts without spaces are cut after the sign that ends a syllable, or between characters. The rest is empty if
    `text` is a single character.
    """
    ends = _cuts(text, language)
    if not ends:
        return text, ""
    cut = min(ends, key=lambda end: abs(end - share * len(text)))
    return text[:cut].strip(), text[cut:].strip()


def _cuts(text: str, language: str) -> list[int]:
    """Where `text` may be cut: the ends of all its sentences, words or characters but the last."""
    ends, position = [], 0
    for sentence in split_sentences(text, language):
        position = text.index(sentence, position) + len(sentence)
        ends.append(position)
    if len(ends) < 2:
        ends = [match.end() for match in _UNIT.finditer(text)]
    if len(ends) < 2:
        ends = list(range(1, len(text) + 1))
    return ends[:-1]
