"""A prepared corpus on disk: Parquet shards of bounded size, a folder a split, and the manifest that vouches for them.

manifest.json               written last: without it the corpus is not complete
train/part-00000.parquet    columns text, language, document, source
dev/, test/                 the same
report.html, report.json    what was dropped, and why
dropped/REASON.jsonl        the dropped lines, where asked for
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from enc2gen.corpora.cleaning_report import CleaningStats
from enc2gen.corpora.readers import Record, read_records
from enc2gen.errors import DataError

SPLITS = ("train", "dev", "test")
MANIFEST = "manifest.json"
FORMAT = "enc2gen-corpus"
FORMAT_VERSION = 1
SCHEMA = pa.schema([(name, pa.string()) for name in ("text", "language", "document", "source")])
_ROW_GROUP_LINES = 20_000
_ROW_GROUP_CHARACTERS = 8_000_000
"""What is held in memory before it is written (our choice)."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON to `path`: whoever reads it sees all of it or nothing, also after a power failure."""
    temporary = path.with_name(f".{path.name}.tmp")
    # Half of a surrogate pair is no UTF-8; as an escape it is JSON, and is read back as it was.
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class ShardWriter:
    """Writes records into `part-00000.parquet`, `part-00001.parquet` ... of one folder.

    A shard is closed when it holds `max_lines` lines or `max_bytes` bytes of text; the same records in the same order
    give the same bytes.
    """

    def __init__(self, folder: Path, *, max_lines: int, max_bytes: int) -> None:
        self.folder = folder
        self.max_lines = max_lines
        self.max_bytes = max_bytes
        self.shards: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[tuple[str, ...]] = []
        self._row_characters = self._lines = self._bytes = 0

    def add(self, text: str, language: str, document: str, source: str) -> None:
        """Write one record."""
        self._rows.append((text, language, document, source))
        self._row_characters += len(text)
        self._lines += 1
        self._bytes += len(text.encode())
        if self._lines >= self.max_lines or self._bytes >= self.max_bytes:
            self.close()
        elif len(self._rows) >= _ROW_GROUP_LINES or self._row_characters >= _ROW_GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"part-{len(self.shards):05d}.parquet"
            self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        columns = [pa.array(column, pa.string()) for column in zip(*self._rows, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))
        self._rows, self._row_characters = [], 0

    def close(self) -> None:
        """Finish the current shard."""
        self._flush()
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        path = self.folder / f"part-{len(self.shards):05d}.parquet"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        self.shards.append({"file": path.name, "lines": self._lines, "bytes": path.stat().st_size, "sha256": digest})
        self._lines = self._bytes = 0


@dataclass(frozen=True)
class PreparedCorpus:
    """A folder that `enc2gen prepare` wrote, opened without reading its texts.

    Attributes:
        folder: where it is.
        manifest: settings, counts and shards.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> PreparedCorpus:
        """Open a folder, and check that all shards are there in full.

        Raises:
            DataError: the folder is no prepared corpus, incomplete, or a shard is missing or of another size.
        """
        folder = Path(folder)
        remedy = "run `enc2gen prepare SOURCE... --lang LANGUAGE --output FOLDER` to its end"
        manifest = read_manifest(folder)
        if manifest is None:
            raise DataError("not a complete prepared corpus: no valid manifest.json", where=str(folder), remedy=remedy)
        for split, shards in manifest["shards"].items():
            for shard in shards:
                path = folder / split / shard["file"]
                size = path.stat().st_size if path.is_file() else None
                if size != shard["bytes"]:
                    found = "is missing" if size is None else f"has {size:,} bytes instead of {shard['bytes']:,}"
                    raise DataError(
                        f"a shard {found}", where=str(path), remedy=f"copy it again, or {remedy}, with --overwrite"
                    )
        return cls(folder, manifest)

    @property
    def splits(self) -> dict[str, int]:
        """Lines of each split."""
        return {split: sum(shard["lines"] for shard in shards) for split, shards in self.manifest["shards"].items()}

    @property
    def language(self) -> str:
        """BCP 47 tag of the texts."""
        return str(self.manifest["config"]["language"])

    def records(self, split: str = "train") -> Iterator[Record]:
        """Stream the records of a split: text, language, document, source.

        Raises:
            DataError: there is no such split, or a shard is damaged.
        """
        if split not in self.splits:
            raise DataError(
                f"no split {split!r}", where=str(self.folder), remedy=f"available: {', '.join(self.splits)}"
            )
        for shard in self.manifest["shards"][split]:
            yield from read_records(self.folder / split / shard["file"])

    def stats(self) -> CleaningStats:
        """What was read, kept and dropped; `DataError` if the report is missing or damaged."""
        return CleaningStats.from_json(read_json(self.folder / "report.json") or {})


def read_json(path: Path) -> Any:
    """Return the JSON in `path`, None if there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a complete corpus in `folder`, None if there is none."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    return manifest if manifest.get("version") == FORMAT_VERSION else None
