"""Lines of messy sources: bounded in memory, with what cannot be read marked instead of ending the run.

Plain text and JSON Lines are read here, a line at a time and never more of it than a limit; other formats and data
sets of the Hub come from :func:`read_records`. A record's text may hold several lines.

Which lines make up a document matters for the split, which never cuts one. A record is a document, unless a field
names it. In plain text a document is a file if there are many files, else a block: the lines up to a blank one.
"""

from __future__ import annotations

import codecs
import difflib
import io
import json
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from enc2gen.corpora.formats import DAMAGED, NoRecordsError, damaged, open_bytes
from enc2gen.corpora.readers import EXTENSIONS, known_extension, read_records, source_files
from enc2gen.corpora.text_values import as_text, well_formed
from enc2gen.errors import DataError

MAX_LINE_BYTES = 2**20
MAX_RECORD_BYTES = 64 * 2**20
"""Longest line of plain text, and of JSON Lines, that is held in memory; a longer one is dropped (our choice)."""
MAX_BLOCK_LINES = 100
MANY_FILES = 20
"""From how many text files on each is one document by default, and the longest block otherwise (our choice)."""
_SAMPLE_BYTES = 64 * 2**10  # our choice: enough lines to tell in which encoding a file is
# Our choice: text in UTF-16 or UTF-32 has more such bytes. A space or line end holds a NUL; in scripts up to U+1FFF
# half of all bytes are controls but for Devanagari, Gurmukhi and Malayalam, which have many spaces; in Han text and
# others, bytes from 0x80 on do not make up characters of UTF-8.
_STRAY_SHARE = 0.02
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


class ReadingConfig(BaseModel):
    """How sources are read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str = Field(default="text", description="Field or column of the text in structured files.")
    document_field: str | None = Field(default=None, description="Field that names the document; else a record is one.")
    documents: Literal["auto", "file", "block", "line"] = Field(
        default="auto",
        description="What a document of plain text is: a file, a block up to a blank line (at most 100 lines), a line; "
        "auto: files if there are at least 20, else blocks.",
    )
    format: str | None = Field(default=None, description="File format, where the extension does not tell.")
    split: str = Field(default="train", description="Split of a Hub data set.")
    encoding: str | None = Field(
        default=None,
        description="Encoding of plain text and JSON Lines that are not UTF-8; without it, such lines are dropped. "
        "Other formats have to be UTF-8.",
    )

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, name: str | None) -> str | None:
        if name is None:
            return None
        try:
            return codecs.lookup(name).name
        except LookupError:
            raise ValueError(f"unknown encoding {name!r}; for example windows-1251, gb18030, utf-16-le") from None


class Line(NamedTuple):
    """A line as it was read.

    Attributes:
        text: without its end; of a line that could not be read, what can be shown of it.
        document: name of the document it belongs to.
        source: file, relative to the folder that was given, or data set.
        number: of the line in a text file, of the record in a structured one, from 1.
        problem: "encoding" or "too-long" if it could not be read, else "".
    """

    text: str
    document: str
    source: str
    number: int
    problem: str = ""


class Source(NamedTuple):
    """One file, or data set without a file.

    Attributes:
        name: as lines give it.
        path: None for a Hub data set or built-in corpus.
        kind: name of the format; "records" for what has no file.
    """

    name: str
    path: Path | None
    kind: str


def find_sources(sources: Sequence[str], config: ReadingConfig, *, output: Path | None = None) -> list[Source]:
    """Return the files behind the sources in reading order; folders are listed, empty files left out.

    A file is named relative to the folder that was given, or, given itself, by its own name: the split, which hangs on
    names, is the same wherever the folder lies, whatever it is called, and whatever else is read with it. Only where
    two files would have one name, the later one gets a number in front.

    Args:
        output: a folder in which nothing is a source; it may lie in one.

    Raises:
        DataError: a source is not there, or files are in another encoding than UTF-8 and `encoding` is not given.
    """
    names: dict[str, str] = {}  # of files by their full paths: a file that is given twice is the same document
    taken: set[str] = set()
    found: list[Source] = []
    for source in sources:
        if not _is_path(source):
            read_records(source, split=config.split)  # complains about what is neither a file nor a data set
            found.append(Source(source, None, "records"))
            continue
        given = Path(source)
        # Links keep their own names: what they point at, as in a cache of the Hub, may be named by hashes, or alike.
        for path in source_files(given, config.format, leave_out=output):
            if path.stat().st_size:
                inside = path.relative_to(given).as_posix() if path != given else path.name
                name = names.setdefault(os.path.abspath(path), _free_name(_readable(inside), taken))
                taken.add(name)
                found.append(Source(name, path, config.format or EXTENSIONS.get(known_extension(path), "records")))
    if not found:
        raise DataError(
            "all files are empty", where=", ".join(sources), remedy="check that they were copied completely"
        )
    _check_encodings(found, config)
    return found


def _readable(name: str) -> str:
    """The name as it can be written: old archives hold names that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


def _free_name(name: str, taken: Container[str]) -> str:
    numbered = (f"{number}/{name}" for number in count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def _is_path(source: str) -> bool:
    return not source.startswith(("hub:", "builtin:")) and Path(source).exists()


def _check_encodings(sources: Sequence[Source], config: ReadingConfig) -> None:
    """Complain about files that are wholly in another encoding, before hours are spent on the others."""
    if config.encoding is not None:
        return
    foreign = [
        source for source in sources if source.kind in ("text", "jsonl") and source.path and _is_foreign(source.path)
    ]
    if foreign:
        shown = ", ".join(source.name for source in foreign[:5]) + (" ..." if len(foreign) > 5 else "")
        raise DataError(
            f"{len(foreign)} of {len(sources)} files are not UTF-8: {shown}",
            where=str(foreign[0].path),
            remedy="name their encoding with --encoding (for example windows-1251, gb18030, utf-16-le), which is used "
            "for what is not UTF-8; or convert them with `iconv -f ENCODING -t UTF-8`; or move them away",
        )


def _is_foreign(path: Path) -> bool:
    try:
        with open_bytes(path) as file:
            start = file.read(_SAMPLE_BYTES)
    except DAMAGED:
        return False  # as the reader will say
    if _mark(start):
        return False
    if _controls(start) > _STRAY_SHARE * len(start):
        return True
    lines = start.split(b"\n")
    if len(start) == _SAMPLE_BYTES:  # the last line is cut off, perhaps inside a character
        lines = lines[:-1]
    beyond_ascii = [line for line in lines if not line.isascii()]
    return 2 * sum(_decoded(line, None)[1] != "" for line in beyond_ascii) > len(beyond_ascii)


def _controls(start: bytes) -> int:
    return len(start) - len(start.translate(None, _CONTROLS))


def _is_utf8(start: bytes) -> bool:
    """Whether nearly all of it is text in UTF-8."""
    broken = start.decode("utf-8", "replace").count("\ufffd") - start.count("\ufffd".encode())
    return _controls(start) + broken <= _STRAY_SHARE * len(start)


def _mark(start: bytes) -> str | None:
    return next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), None)


def _decoded(raw: bytes, fallback: str | None) -> tuple[str, str]:
    """Decode a line; return it and its problem, "" for none."""
    try:
        return raw.decode("utf-8"), ""
    except UnicodeDecodeError:
        pass
    try:
        if fallback is not None:
            return raw.decode(fallback), ""
    except UnicodeDecodeError:
        pass
    return raw.decode("utf-8", "replace"), "encoding"


def read_lines(sources: Sequence[Source], config: ReadingConfig) -> Iterator[Line]:
    r"""Stream the lines of all sources, blank ones too. Only "\n" and "\r\n" end one.

    Raises:
        DataError: a file is damaged, or lacks the field; a line that cannot be read only gets a `problem`.
    """
    documents = config.documents
    if documents == "auto":
        documents = "file" if sum(source.kind == "text" for source in sources) >= MANY_FILES else "block"
    for source in sources:
        try:
            if source.kind == "text":
                yield from _text_lines(source, documents, config)
            else:
                yield from _record_lines(source, config)
        except OSError as error:
            raise DataError(
                f"cannot be read: {error.strerror or error}", where=source.name, remedy="check the file's permissions"
            ) from error


def _text_lines(source: Source, documents: str, config: ReadingConfig) -> Iterator[Line]:
    assert source.path is not None
    document, block_lines = source.name, 0
    for number, (text, problem) in enumerate(_physical_lines(source.path, MAX_LINE_BYTES, config.encoding), 1):
        blank = not problem and not text.strip()
        if documents == "line":
            document = f"{source.name}#{number}"
        elif documents == "block":
            if block_lines in (0, MAX_BLOCK_LINES):
                document, block_lines = f"{source.name}#{number}", 0
            block_lines = 0 if blank else block_lines + 1
        yield Line(text, document, source.name, number, problem)


def _physical_lines(path: Path, limit: int, fallback: str | None) -> Iterator[tuple[str, str]]:
    """Yield lines without their ends, and their problem ("" for none); of no line more than `limit` bytes are held."""
    number = 0
    with closing(open_bytes(path)) as file:
        try:
            wide = _wide_encoding(path, fallback)
            if wide is not None:
                lines: Iterator[tuple[str, str]] = _wide_lines(file, wide, limit)
            else:  # single lines of a file cannot be in an encoding that ends lines otherwise
                lines = _byte_lines(file, limit, None if _is_wide(fallback) else fallback)
            for number, line in enumerate(lines, 1):  # noqa: B007 - the number is wanted after the loop
                yield line
        except DAMAGED as error:
            raise damaged(error, path, number) from error


def _wide_encoding(path: Path, fallback: str | None) -> str | None:
    """The encoding of a file whose characters take two or four bytes: by its mark, or as the user says."""
    with open_bytes(path) as file:
        start = file.read(_SAMPLE_BYTES)
    if mark := _mark(start):
        return mark
    return fallback if _is_wide(fallback) and not _is_utf8(start) else None


def _is_wide(encoding: str | None) -> bool:
    return encoding is not None and encoding.startswith(("utf-16", "utf-32"))


def _byte_lines(file: IO[bytes], limit: int, fallback: str | None) -> Iterator[tuple[str, str]]:
    first = True
    while raw := file.readline(limit):
        whole, first = (raw.removeprefix(codecs.BOM_UTF8) if first else raw), False
        if len(raw) >= limit and not raw.endswith(b"\n"):
            shown = whole[:1000].decode("utf-8", "ignore")
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(limit)
            yield shown, "too-long"
            continue
        yield _decoded(whole.removesuffix(b"\n").removesuffix(b"\r"), fallback)


def _wide_lines(file: IO[bytes], encoding: str, limit: int) -> Iterator[tuple[str, str]]:
    # What cannot be decoded becomes U+FFFD, for which the line is dropped later.
    text = io.TextIOWrapper(file, encoding, errors="replace", newline="\n")
    while line := text.readline(limit):
        if len(line) >= limit and not line.endswith("\n"):
            shown = line[:1000]
            while line and not line.endswith("\n"):
                line = text.readline(limit)
            yield shown, "too-long"
            continue
        yield line.removesuffix("\n").removesuffix("\r"), ""


def _record_lines(source: Source, config: ReadingConfig) -> Iterator[Line]:
    number = 0
    for number, (record, problem) in enumerate(_records(source, config), 1):
        name = f"{source.name}#{number}"
        if isinstance(record, str):
            yield Line(record, name, source.name, number, problem)
            continue
        text = _field(record, config.field, source.name, number)
        if config.document_field is not None:
            name = _document(record, config.document_field, source.name, number) or name
        for line in _as_text(text, config.field, source.name, number).split("\n"):
            yield Line(line.removesuffix("\r"), name, source.name, number)


def _document(record: dict[str, Any], field: str, source: str, number: int) -> str:
    """The document that a record names, "" for none: those without a name do not belong together."""
    value = _field(record, field, source, number)
    if isinstance(value, list | dict):
        raise DataError(
            f"field {field!r} holds a {type(value).__name__}, not the name of a document",
            where=f"{source}, record {number}",
            remedy="give --document-field a field of text or numbers",
        )
    missing = value is None or value != value  # NaN, which tables have for an empty cell, is not itself
    return "" if missing or not (name := str(value)).strip() else well_formed(name)


def _records(source: Source, config: ReadingConfig) -> Iterator[tuple[dict[str, Any] | str, str]]:
    """Yield records; for a line of JSON Lines that cannot be read, what can be shown of it, and its problem."""
    if source.kind != "jsonl":
        try:
            for record in read_records(source.path or source.name, format=config.format, split=config.split):
                yield record, ""
        except NoRecordsError:
            if source.path is None:
                raise
        return  # one empty shard of many is nothing to stop for; if all are empty, the run says so
    assert source.path is not None
    for number, (text, problem) in enumerate(_physical_lines(source.path, MAX_RECORD_BYTES, config.encoding), 1):
        if problem:
            yield text[:1000], problem
        elif text.strip():
            yield _json_object(text, f"{source.name}, line {number}"), ""


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: a number of more digits than Python reads, too
        reason = getattr(error, "msg", "nested too deeply" if isinstance(error, RecursionError) else str(error))
        raise DataError(
            f"not valid JSON: {reason}",
            where=where,
            remedy="write one JSON object per line; the file may be cut off here",
        ) from error
    if not isinstance(record, dict):
        raise DataError("the line is no JSON object", where=where, remedy='write one per line: {"text": "..."}')
    return record


def _field(record: dict[str, Any], field: str, source: str, number: int) -> Any:
    if field not in record:
        close = difflib.get_close_matches(field, [str(name) for name in record], n=1)
        raise DataError(
            f"no field {field!r} in record {number}",
            where=source,
            remedy=(f"did you mean {close[0]!r}? " if close else "")
            + f"name the field with --field; available: {', '.join(map(str, record)) or 'none'}",
        )
    return record[field]


def _as_text(value: Any, field: str, source: str, number: int) -> str:
    return as_text(value, field, where=f"{source}, record {number}", remedy="name a field of text with --field")
