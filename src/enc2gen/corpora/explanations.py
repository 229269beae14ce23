"""`--explain`: every dropped line in `dropped/REASON.jsonl`, in input order, duplicates with the line that was kept."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from enc2gen.corpora.text_values import well_formed

_POSITION = struct.Struct("<qq")  # number of the source, line in it


def explanation(
    reason: str, source: str, line: int, document: str, text: str, detail: str, kept: Mapping[str, Any] | None = None
) -> str:
    """Return the JSON line that explains why a line was dropped; `kept` is the earlier line it duplicates."""
    record = {"reason": reason, "source": source, "line": line, "document": document, "detail": detail}
    if kept is not None:
        record["kept"] = dict(kept)
    record["text"] = well_formed(text)
    return json.dumps(record, ensure_ascii=False) + "\n"


class Explanations:
    """Knows where each line of the final phase came from, and writes explanations into `folder`.

    Positions lie in a file, 16 bytes a line, for a corpus may have more lines than memory can name.

    Args:
        positions: file for the positions.
        folder: where explanations are written; None writes none.
    """

    def __init__(self, positions: IO[bytes], folder: Path | None) -> None:
        self._positions = positions
        self._end = 0
        self._folder = folder
        self._sources: dict[str, int] = {}
        self._names: list[str] = []
        self._files = ExitStack()
        self._open: dict[str, IO[str]] = {}

    @classmethod
    @contextmanager
    def opened(cls, positions: Path, folder: Path | None) -> Iterator[Explanations]:
        """An object whose files are closed at the end."""
        with positions.open("w+b") as file:
            explanations = cls(file, folder)
            with explanations._files:
                yield explanations

    def copy(self, path: Path) -> None:
        """Copy the explanations of a chunk, each into the file of its reason."""
        with path.open(encoding="utf-8") as file:
            for line in file:
                self._write(json.loads(line)["reason"], line)

    def remember(self, row: Mapping[str, Any]) -> None:
        """Remember where line `row["id"]` came from."""
        source = row["source"]
        if source not in self._sources:
            self._sources[source] = len(self._names)
            self._names.append(source)
        if row["id"] != self._end:  # lines that were dropped before leave gaps, which no disk space is needed for
            self._positions.seek(row["id"] * _POSITION.size)
        self._positions.write(_POSITION.pack(self._sources[source], row["line"]))
        self._end = row["id"] + 1

    def add_duplicate(self, row: Mapping[str, Any], reason: str, kept: int) -> str:
        """Explain that `row` duplicates line `kept`; return where that one is, in words."""
        self._positions.seek(kept * _POSITION.size)
        number, line = _POSITION.unpack(self._positions.read(_POSITION.size))
        self._end = -1  # the next line has to look for its place again
        detail = f"of {self._names[number]}, line {line}"
        position = {"id": kept, "source": self._names[number], "line": line}
        if self._folder is not None:
            text = explanation(reason, row["source"], row["line"], row["document"], row["text"], detail, position)
            self._write(reason, text)
        return detail

    def _write(self, reason: str, text: str) -> None:
        if self._folder is None:
            return
        if reason not in self._open:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = (self._folder / f"{reason}.jsonl").open("w", encoding="utf-8")
            self._open[reason] = self._files.enter_context(file)
        self._open[reason].write(text)
