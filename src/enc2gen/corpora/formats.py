"""File formats: from a path to its records, with errors that name the file and the line or byte.

Text formats are read line by line here rather than through `datasets`, whose errors name neither; Parquet
goes batch by batch through pyarrow. Nothing is held in memory but a line or a batch or, for .po files and
JSON arrays, the file.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import polib

from enc2gen.corpora.catalogues import catalogue_entries
from enc2gen.errors import DataError
from enc2gen.registry import Registry

Record = dict[str, Any]

FORMATS: Registry[Callable[[Path], Iterator[Record]]] = Registry("file format")
"""Format name -> function from a path to its records."""

EXTENSIONS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".txt": "text", ".po": "po",
}  # fmt: skip
"""File name extension -> format; all but .parquet may be followed by one of `PACKED`."""

PACKED: dict[str, tuple[Callable[[Path, str], Any], str]] = {
    ".gz": (gzip.open, "gzip"), ".xz": (lzma.open, "xz"), ".bz2": (bz2.open, "bzip2"),
}  # fmt: skip
"""Extension of a compressed file -> what opens it, and the command that tests and unpacks it."""

DAMAGED = (EOFError, zlib.error, lzma.LZMAError, OSError)
"""What the readers of compressed files raise; an `OSError` only where it has no `errno` (see `damaged`)."""


class NoRecordsError(DataError):
    """A file is whole, and there is no record in it."""


_MAX_FIELD = 16 * 2**20  # our choice: a longer CSV field means a quotation mark that is never closed
_PO_LINE = re.compile(
    r'\s*(?:#.*|(?:(?:msgctxt|msgid|msgid_plural|msgstr(?:\[\d+\])?)\s*)?"(?:[^"\\]|\\.)*"\s*)?', re.DOTALL
)
_PARQUET_BATCH = 1024  # our choice
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading what is in it, unpacked if its extension is in `PACKED`."""
    packed = PACKED.get(path.suffix.lower())
    return cast(IO[bytes], packed[0](path, "rb")) if packed else path.open("rb")


def damaged(error: BaseException, path: Path, line: int) -> Exception:
    """What to raise for one of `DAMAGED` after `line` lines: a `DataError`; the error itself if the disk did it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    command = PACKED.get(path.suffix.lower(), (None, "gzip"))[1]
    return DataError(
        f"the compressed file is truncated or damaged: {error}",
        where=f"{path}, after line {line}",
        remedy=f"copy or download it again; `{command} -t {path}` must succeed",
    )


def text_lines(path: Path) -> Iterator[str]:
    r"""Yield the lines of a UTF-8 file with their ends. Only "\n" ends one: texts hold U+2028 too."""
    offset = 0
    with open_bytes(path) as file:
        for number, raw in enumerate(_raw_lines(path, file), 1):
            if number == 1:
                _check_mark(path, raw)
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, offset + error.start, raw[error.start]) from error
            if "\0" in line:
                raise DataError(
                    f"NUL byte at byte {offset + raw.index(0)}: binary, or UTF-16 without a mark",
                    where=f"{path}, line {number}",
                    remedy=f"if it is UTF-16: {_iconv(path, 'UTF-16LE')}",
                )
            offset += len(raw)
            yield line.removeprefix("\ufeff") if number == 1 else line
    if offset == 0:
        raise NoRecordsError(
            "the file is empty", where=str(path), remedy="check that it was written or copied completely"
        )


def _raw_lines(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    number = 0
    try:
        for number, raw in enumerate(file, 1):  # noqa: B007 - the number is wanted after the loop
            yield raw
    except DAMAGED as error:
        raise damaged(error, path, number) from error


def _check_mark(path: Path, start: bytes) -> None:
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            raise DataError(
                f"the file is {encoding} (byte order mark at byte 0), not UTF-8",
                where=f"{path}, line 1",
                remedy=_iconv(path, encoding),
            )


def _not_utf8(path: Path, line: int, offset: int, byte: int) -> DataError:
    return DataError(
        f"byte {offset} (0x{byte:02x}) is not UTF-8",
        where=f"{path}, line {line}",
        remedy=f"convert it, with its true encoding (for example WINDOWS-1251, GB18030) for ENCODING: "
        f"{_iconv(path, 'ENCODING')}",
    )


def _iconv(path: Path, encoding: str) -> str:
    if packed := PACKED.get(path.suffix.lower()):
        command = packed[1]
        unpacked = f"{path.with_suffix('')}.utf8{path.suffix}"
        return f"{command} -dc {path} | iconv -f {encoding} -t UTF-8 | {command} > {unpacked}"
    return f"iconv -f {encoding} -t UTF-8 {path} > {path.with_suffix('')}.utf8{path.suffix}"


@FORMATS.register("text")
def _read_text(path: Path) -> Iterator[Record]:
    for line in text_lines(path):
        if text := line.strip():
            yield {"text": text}


@FORMATS.register("jsonl")
def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: a number of more digits than Python reads, too
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = getattr(error, "msg", "nested too deeply" if isinstance(error, RecursionError) else str(error))
            raise DataError(
                f"not valid JSON{column}: {reason}",
                where=where,
                remedy="write one JSON object per line; the file may be cut off here",
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"the line is a JSON {_json_type(record)}, not an object",
                where=where,
                remedy='write one object per line, for example {"source": "...", "target": "..."}',
            )
        yield record


def _json_type(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


@FORMATS.register("json")
def _read_json(path: Path) -> Iterator[Record]:
    """Read a .json file: an array of objects as a whole, anything else as JSON Lines."""
    first = next((line for line in text_lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    try:
        array = json.loads("".join(text_lines(path)))
    except (ValueError, RecursionError) as error:
        placed = error if isinstance(error, json.JSONDecodeError) else None
        reason = f" at column {placed.colno}: {placed.msg}" if placed else f": {error}"
        raise DataError(
            f"not valid JSON{reason}",
            where=f"{path}, line {placed.lineno}" if placed else str(path),
            remedy="repair the file, or write JSON Lines (one object per line), which is read line by line",
        ) from error
    for number, record in enumerate(array, 1):
        if not isinstance(record, dict):
            raise DataError(
                f"element {number} of the array is a JSON {_json_type(record)}, not an object",
                where=str(path),
                remedy='write an array of objects, for example [{"source": "...", "target": "..."}]',
            )
        yield record


@FORMATS.register("csv")
def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(_MAX_FIELD)  # the module's default of 128 KiB is shorter than a long document
    yield from _read_table(path, csv.reader(text_lines(path), strict=True))


@FORMATS.register("tsv")
def _read_tsv(path: Path) -> Iterator[Record]:
    """Read text/tab-separated-values as IANA registers it: no quoting, a quotation mark is a character."""
    csv.field_size_limit(_MAX_FIELD)
    yield from _read_table(path, csv.reader(text_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE))


def _read_table(path: Path, rows: Any) -> Iterator[Record]:
    try:
        header: list[str] = next(rows, [])
        repeated = sorted({name for name in header if header.count(name) > 1 or not name.strip()})
        if repeated:
            raise DataError(
                f"column names are empty or repeated: {', '.join(map(repr, repeated))}",
                where=f"{path}, line 1",
                remedy="name every column once in the first line",
            )
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{len(row)} fields, but the header names {len(header)}: {', '.join(header)}",
                    where=f"{path}, line {rows.line_num}",
                    remedy="give each row one field per column; quote CSV fields that hold commas",
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        quoted = rows.dialect.quoting != csv.QUOTE_NONE
        raise DataError(
            f"not a valid table: {error}",
            where=f"{path}, line {rows.line_num}",
            remedy="close every quotation mark; a field with a line break needs them"
            if quoted
            else "end lines with LF or CR LF; a field cannot hold a line break (write .csv or .jsonl for that)",
        ) from error


@FORMATS.register("parquet")
def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file ({path.stat().st_size} bytes): {str(error).splitlines()[0]}",
            where=str(path),
            remedy="it may be truncated, or Git LFS may have left a pointer: copy or download it again",
        ) from error


def _bad_catalogue(path: Path, line: int) -> DataError:
    return DataError(
        "not a valid gettext catalogue",
        where=f"{path}, line {line}",
        remedy=f"`msgfmt --check {path}` says what is wrong",
    )


@FORMATS.register("po")
def _read_po(path: Path) -> Iterator[Record]:
    lines = list(text_lines(path))
    for number, line in enumerate(lines, 1):  # polib drops a string that is not closed without a word
        if not _PO_LINE.fullmatch(line):
            raise _bad_catalogue(path, number)
    try:
        catalogue = polib.pofile("".join(lines))
    except (OSError, ValueError) as error:
        number_found = re.search(r"line (\d+)", str(error))
        raise _bad_catalogue(path, int(number_found[1]) if number_found else 1) from error
    for entry in catalogue_entries(catalogue, catalogue.metadata.get("Plural-Forms", "")):
        yield entry._asdict()
