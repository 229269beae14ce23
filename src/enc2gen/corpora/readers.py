"""Sources of records: files, folders, Hub datasets and built-in corpora, all as streams."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from urllib.parse import parse_qsl

from enc2gen.corpora.builtin import MAX_PER_ORIGIN, localisation_records
from enc2gen.corpora.formats import EXTENSIONS, FORMATS, PACKED, NoRecordsError, Record, text_lines
from enc2gen.corpora.hub import hub_file, hub_records
from enc2gen.errors import ConfigError, DataError

__all__ = [
    "EXTENSIONS",
    "FORMATS",
    "Record",
    "check_source",
    "known_extension",
    "parallel_records",
    "read_records",
    "source_files",
    "source_sides",
    "unread_files",
]

_HUB_NAME = re.compile(r"(?:hub:)?(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?")
_HUB_FILE = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)/(?P<file>[^|]+)")
_BESIDE = "|"
_UNKNOWN_PACKED = frozenset((
    ".zst", ".zstd", ".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz", ".lz4", ".lzma", ".br", ".z",
))  # fmt: skip


def read_records(
    source: str | Path,
    *,
    format: str | None = None,
    split: str = "train",
    columns: Sequence[str] | None = None,
) -> Iterator[Record]:
    """Stream the records of a source.

    Args:
        source: a file (.jsonl, .json, .csv, .tsv, .txt, .po, each also .gz, .xz, .bz2; .parquet), a folder (all
            such files below it, sorted by path, but hidden ones), `builtin:localisation?languages=kk,ug`, or a Hub
            dataset: `owner/name[:config]`, `hub:name[:config]`, or one file of it, `hub:owner/name/FILE`. Plain text
            gives one record {"text": line} per non-blank line; .po gives "source", "target" and "context".
            `FIRST|SECOND` reads two of these side by side (:func:`parallel_records`).
        format: one of `FORMATS`, where the extension does not tell; in a folder, only files of this format
            are read.
        split: which split of a Hub dataset or built-in corpus; files have none.
        columns: the fields to keep; each must be there in every record. None keeps all.

    Raises:
        DataError: at the call, for a source that is not there; while reading, for a file that is empty,
            damaged, not UTF-8, or without a wanted column, naming file and line or byte.
        ConfigError: an unknown format or built-in corpus, or options that it does not take.
    """
    if str(source).startswith("builtin:"):
        return _select(_builtin_records(str(source), split), columns, str(source))
    path = Path(source)
    if len(sides := source_sides(source)) == 2:
        return _select(parallel_records(*sides, split=split), columns, str(source))
    if file := _HUB_FILE.fullmatch(str(source)):
        return read_records(hub_file(file["name"], file["file"]), format=format, columns=columns)
    if name := _hub_name(str(source)):
        return _select(hub_records(name["name"], name["config"], split), columns, str(source))
    check_source(source)
    return _chain([(file, _reader(file, format)) for file in source_files(path, format)], columns)


def _hub_name(source: str) -> re.Match[str] | None:
    """Name and configuration of a data set on the Hub, if the source is one."""
    if not source.startswith("hub:") and Path(source).exists():
        return None
    name = _HUB_NAME.fullmatch(source)
    if name and not known_extension(Path(source)) and (source.startswith("hub:") or "/" in name["name"]):
        return name
    return None


def check_source(source: str | Path) -> None:
    """Raise `DataError` if the source, one side alone, is meant to lie on this machine and is not there."""
    text = str(source)
    if not (text.startswith("builtin:") or Path(text).exists() or _HUB_FILE.fullmatch(text) or _hub_name(text)):
        raise DataError(
            "no such file or folder",
            where=text,
            remedy="check the path; a Hub dataset is written owner/name[:config] or hub:name, "
            "a built-in corpus builtin:localisation?languages=kk,ug, two parallel files FIRST|SECOND",
        )


def source_sides(source: str | Path) -> list[str]:
    """The sources in `FIRST|SECOND`, else the source alone."""
    text = str(source)
    sides = [side.strip() for side in text.split(_BESIDE)]
    return sides if len(sides) == 2 and all(sides) and not Path(text).exists() else [text]


def parallel_records(first: str, second: str, *, split: str = "train") -> Iterator[Record]:
    """Stream {"source": text of `first`, "target": text of `second`}: the n-th of one belongs to the n-th of the other.

    Plain text counts by lines, whatever the file's extension; of other sources the field "text" is read. Where either
    text is blank there is no record.

    Raises:
        DataError: as in `read_records`, or one has more texts than the other.
    """
    return _paired([first, second], [_texts_in_line(side, split) for side in (first, second)])


def _paired(names: Sequence[str], texts: Sequence[Iterator[str]]) -> Iterator[Record]:
    counts = [0, 0]
    for pair in zip_longest(*texts):
        for side, text in enumerate(pair):
            counts[side] += text is not None
        if None not in pair and all(text.strip() for text in pair):
            yield {"source": pair[0].strip(), "target": pair[1].strip()}
    if counts[0] != counts[1]:
        raise DataError(
            f"{counts[0]:,} texts in {names[0]}, but {counts[1]:,} in {names[1]}",
            where=_BESIDE.join(names),
            remedy="parallel texts need as many lines on both sides; check that both are whole and of one version",
        )


def _texts_in_line(side: str, split: str) -> Iterator[str]:
    path = hub_file(file["name"], file["file"]) if (file := _HUB_FILE.fullmatch(side)) else Path(side)
    if path.is_file() and EXTENSIONS.get(known_extension(path), "text") == "text":
        return text_lines(path)
    if path.is_dir():
        raise DataError(
            "a folder has no line that belongs to another's",
            where=side,
            remedy="name two files, FIRST|SECOND; or put both texts into one file, as .tsv or .jsonl",
        )
    if file:
        return (str(record["text"] or "") for record in read_records(path, columns=("text",)))
    return (str(record["text"] or "") for record in read_records(side, split=split, columns=("text",)))


def source_files(path: Path, format: str | None = None, *, leave_out: Path | None = None) -> list[Path]:
    """Return the files that `read_records` reads for a path: itself, or a folder's readable files, sorted.

    Hidden files and folders are left out, as is what `enc2gen prepare` wrote beside its shards. Links to folders are
    followed, no folder is read twice.

    Args:
        leave_out: a folder below `path` that does not count.

    Raises:
        DataError: there is nothing to read, or the file is packed in a way that is not read.
    """
    if not path.is_dir():
        if _is_unread(path):
            raise DataError(
                f"the file is packed as {path.suffix}, which is not read",
                where=str(path),
                remedy=f"unpack it first; what is read packed are single files with {', '.join(PACKED)}",
            )
        return [path]
    if format is not None and format not in FORMATS:
        raise FORMATS.unknown(format, where=str(path))
    inside = _files_below(path, leave_out)
    beside = _beside_shards(inside)
    inside = [file for file in inside if not beside & {file, file.parent}]
    files = [file for file in inside if (found := EXTENSIONS.get(known_extension(file))) and format in (None, found)]
    if not files:
        packed = next((file for file in inside if _is_unread(file)), None)
        raise DataError(
            f"the folder holds no {format or 'readable'} file",
            where=str(path),
            remedy=(f"unpack {packed.name} and the like; " if packed else "") + f"put files there: {_known()}",
        )
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _beside_shards(files: Sequence[Path]) -> set[Path]:
    """Files and folders of prepared corpora that are not their texts: settings, figures, dropped lines."""
    from enc2gen.corpora.shards import MANIFEST, read_manifest  # which reads shards with this module

    corpora = [file.parent for file in files if file.name == MANIFEST and read_manifest(file.parent) is not None]
    return {corpus / name for corpus in corpora for name in (MANIFEST, "report.json", "dropped")}


def unread_files(path: Path) -> list[Path]:
    """Return the packed files below a folder that :func:`source_files` leaves out, sorted; none for anything else."""
    files = _files_below(path) if path.is_dir() else []
    return sorted(
        file for file in files
        if _is_unread(file) or (file.suffix.lower() in PACKED and not known_extension(file))
    )  # fmt: skip


def _is_unread(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return bool(suffixes) and (suffixes[-1] in _UNKNOWN_PACKED or (suffixes[-1] in PACKED and ".tar" in suffixes))


def _files_below(folder: Path, leave_out: Path | None = None) -> list[Path]:
    """All files that are not hidden; folders that are linked come last, for those that lie here go first."""
    found: list[Path] = []
    folders, linked, seen = [folder], list[Path](), set[tuple[int, int]]()
    if leave_out is not None and leave_out.is_dir() and not leave_out.samefile(folder):
        seen.add(_identity(leave_out))
    while folders or linked:
        if not folders:
            linked.sort(reverse=True)  # whatever order the file system has
        current = folders.pop() if folders else linked.pop()
        if (identity := _identity(current)) in seen:
            continue
        seen.add(identity)
        try:
            with os.scandir(current) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise DataError(
                f"the folder cannot be read: {error.strerror or error}",
                where=str(current),
                remedy="check its permissions, move it away, or name the folders beside it one by one",
            ) from error
        for entry in visible:
            if entry.is_dir():
                (linked if entry.is_symlink() else folders).append(current / entry.name)
            elif entry.is_file():
                found.append(current / entry.name)
    return found


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def source_names(source: str | Path, split: str) -> frozenset[str]:
    """What a source reads, under one name however it is written: equal names are equal texts.

    These are the full paths of its files; of a built-in corpus its name, without its settings, with the split (`all` is
    all three); of a Hub data set its name with the split, or one file of it.
    """
    found: set[str] = set()
    for side in source_sides(source):
        path, hub = Path(side), side.removeprefix("hub:")
        by_name = not path.exists() and not known_extension(path) and side.count("/") == 1 and not side.startswith(".")
        if side.startswith("builtin:"):
            name = side.partition("?")[0]
            found |= {f"{name} {part}" for part in (("train", "dev", "test") if split == "all" else (split,))}
        elif side.startswith("hub:") and hub.count("/") > 1:  # one file, which has no splits
            found.add(side)
        elif side.startswith("hub:") or by_name:
            found.add(f"hub:{hub} {split}")
        else:
            found |= {str(file.resolve()) for file in source_files(path)}
    return frozenset(found)


def known_extension(path: Path) -> str:
    """Return the lower-cased extension that names the format if it is known, else ""."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in EXTENSIONS and suffixes[-1] != ".parquet" else ""
    return suffixes[-1] if suffixes and suffixes[-1] in EXTENSIONS else ""


def _known() -> str:
    return f"{', '.join(sorted(EXTENSIONS))} (all but .parquet also with {', '.join(PACKED)})"


def _reader(path: Path, format: str | None) -> Callable[[Path], Iterator[Record]]:
    if format is not None:
        return FORMATS.get(format, where=str(path))
    extension = known_extension(path)
    if not extension:
        raise DataError(
            f"unknown file type {''.join(path.suffixes[-2:]) or path.name!r}",
            where=str(path),
            remedy=f"name the format ({', '.join(FORMATS)}), or rename the file to one of {_known()}",
        )
    return FORMATS.get(EXTENSIONS[extension], where=str(path))


def _chain(
    files: Sequence[tuple[Path, Callable[[Path], Iterator[Record]]]], columns: Sequence[str] | None
) -> Iterator[Record]:
    for path, reader in files:
        try:
            yield from _select(reader(path), columns, str(path))
        except OSError as error:
            raise DataError(
                f"cannot be read: {error.strerror or error}",
                where=str(path),
                remedy="check the file's permissions",
            ) from error


def _select(records: Iterator[Record], columns: Sequence[str] | None, where: str) -> Iterator[Record]:
    """Yield the records cut to `columns`; an error if a column is missing or there is no record at all."""
    number = 0
    for number, record in enumerate(records, 1):
        if columns is None:
            yield record
            continue
        missing = [column for column in columns if column not in record]
        if missing:
            close = difflib.get_close_matches(missing[0], list(record), n=1)
            raise DataError(
                f"missing column {', '.join(map(repr, missing))} in record {number}",
                where=where,
                remedy=(f"did you mean {close[0]!r}? " if close else "")
                + f"available: {', '.join(map(str, record)) or 'none'}",
            )
        yield {column: record[column] for column in columns}
    if number == 0:
        raise NoRecordsError("the source holds no records", where=where, remedy="check that it is the file you meant")


def _builtin_records(source: str, split: str) -> Iterator[Record]:
    name, _, query = source.removeprefix("builtin:").partition("?")
    if name != "localisation":
        raise ConfigError(
            f"unknown built-in corpus {name!r}",
            where=source,
            remedy="available: builtin:localisation?languages=kk,ug",
        )
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - {"languages", "max_per_origin"})
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r}", where=source, remedy="available: languages, max_per_origin")
    limit = options.get("max_per_origin", str(MAX_PER_ORIGIN))
    if not limit.isdecimal():
        raise ConfigError(f"max_per_origin={limit} is no number", where=source, remedy="use a number of at least 1")
    languages = [tag for tag in options.get("languages", "").split(",") if tag.strip()]
    return iter(list(localisation_records(languages, split=split, max_per_origin=int(limit))))
