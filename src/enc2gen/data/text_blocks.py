"""Plain texts cut into blocks: the items of a stream over a corpus of lines and documents of any length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from enc2gen.data.batching import IndexedSource
from enc2gen.errors import DataError

UNKNOWN_LANGUAGE = "und"
"""BCP 47's tag for text of which nobody said the language."""
_LOOK_BACK = 0.25  # a long text is cut at white space within this last share of a block (our choice)
_SYLLABLE_ENDS = "\u0f0b\u0f0c\u0f0d\u0f0e"  # Tibetan: tsheg, hard tsheg, shad, double shad


def text_row(item: Any) -> tuple[str, str]:
    """Text and language of a row: a `str`, `(text, language)`, or a mapping with these fields."""
    if isinstance(item, str):
        return item, UNKNOWN_LANGUAGE
    if isinstance(item, Mapping):
        item = (item.get("text"), item.get("language"))
    if isinstance(item, Sequence) and len(item) == 2 and isinstance(item[0], str):
        return item[0], str(item[1] or UNKNOWN_LANGUAGE)
    raise DataError(f"{item!r:.80} is no text", remedy="give strings, (text, language), or rows with these fields")


class TextBlocks:
    """Texts cut into blocks that fill about `characters` characters, at white space or tsheg where there is one.

    Short texts stay blocks of their own, unpacked: batches are ordered by length, so there is little padding, and
    no block mixes documents. Empty texts are left out. Holds 24 bytes a block; the texts stay where they are.

    Attributes:
        languages: language -> numbers of its blocks.
    """

    def __init__(self, texts: IndexedSource[Any], characters: int) -> None:
        self._texts = texts
        spans: list[tuple[int, int, int]] = []
        self.languages: dict[str, list[int]] = {}
        for row in range(len(texts)):
            text, language = text_row(texts[row])
            for start, end in _spans(text, characters):
                self.languages.setdefault(language, []).append(len(spans))
                spans.append((row, start, end))
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        row, start, end = self._spans[index].tolist()
        return text_row(self._texts[row])[0][start:end]


def _spans(text: str, limit: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(text):
        end = min(start + limit, len(text))
        if end < len(text):
            least = end - max(1, int(limit * _LOOK_BACK))
            places = (i for i in range(end, least, -1) if text[i - 1].isspace() or text[i - 1] in _SYLLABLE_ENDS)
            end = next(places, end)
        if not text[start:end].isspace():
            yield start, end
        start = end
