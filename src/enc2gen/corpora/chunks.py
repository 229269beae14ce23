"""The parallel phase of cleaning: from a chunk of lines as read to the lines that pass, with their duplicate keys.

A chunk's result depends on nothing but its lines and the settings, so that it does not matter where, or in which
order, chunks are worked on.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from enc2gen.corpora.cleaning import CleaningConfig, clean_line
from enc2gen.corpora.cleaning_report import CleaningStats
from enc2gen.corpora.deduplication import MinHasher, duplicate_form, form_key
from enc2gen.corpora.explanations import explanation
from enc2gen.corpora.filters import LanguageFilter, Refusal, refuse_text
from enc2gen.corpora.lines import Line
from enc2gen.corpora.readers import source_files, source_sides

if TYPE_CHECKING:
    from enc2gen.corpora.decontamination import EvaluationIndex

CHUNK_LINES = 10_000
CHUNK_CHARACTERS = 2_000_000
"""What is handed to a worker at once, at most (our choice); a single line may be longer."""
_GROWTH = (1 / 16, 1 / 16, 1 / 16, 1 / 16, 1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 4)
"""Shares of that for the first chunks (our choice), so that a small corpus keeps several workers busy as well."""
_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("text", pa.string()),
        ("document", pa.string()),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("key", pa.binary()),
        ("bands", pa.list_(pa.uint64())),
    ]
)


@dataclass(frozen=True)
class Chunk:
    """Work for one call: lines `first_id`, `first_id + 1`, ... of the whole input.

    Attributes:
        explain: return every dropped line, not only counts.
    """

    index: int
    first_id: int
    lines: list[Line]
    config: CleaningConfig
    explain: bool


@dataclass(frozen=True)
class ChunkResult:
    """What is left of a chunk.

    Attributes:
        passed: Parquet file with the lines that pass all tests on single lines.
        lines: how many they are.
        stats: counts, as JSON; lines that pass are not counted as kept yet.
        dropped: JSON Lines of dropped lines, for `explain`.
    """

    index: int
    passed: bytes
    lines: int
    stats: dict[str, Any]
    dropped: str


class _Passed(NamedTuple):
    id: int
    text: str
    line: Line
    form: str  # what duplicates and evaluation texts are compared by; empty if nothing is


def chunked(lines: Iterable[Line], config: CleaningConfig, explain: bool) -> Iterator[Chunk]:
    """Cut the input into chunks, bounded in lines and characters."""
    first_id = index = characters = 0
    collected: list[Line] = []
    for line in lines:
        collected.append(line)
        characters += len(line.text)
        share = _GROWTH[index] if index < len(_GROWTH) else 1
        if len(collected) >= share * CHUNK_LINES or characters >= share * CHUNK_CHARACTERS:
            yield Chunk(index, first_id, collected, config, explain)
            first_id, index, characters, collected = first_id + len(collected), index + 1, 0, []
    if collected:
        yield Chunk(index, first_id, collected, config, explain)


@lru_cache(maxsize=2)
def _language_filter(language: str, identifier: str) -> LanguageFilter:
    return LanguageFilter(language, identifier)


@lru_cache(maxsize=2)
def _evaluation_index(paths: tuple[str, ...], state: tuple[tuple[str, int, int], ...]) -> EvaluationIndex:
    """The index of evaluation sets, built once in a process for the files' present `state`."""
    from enc2gen.corpora.decontamination import EvaluationIndex

    return EvaluationIndex.from_files([Path(path) for path in paths])


def _state(paths: tuple[str, ...]) -> tuple[tuple[str, int, int], ...]:
    """Size and time of all files of evaluation sets, which may change between two preparations in one process."""
    sides = [Path(side) for path in paths for side in source_sides(path)]
    files = [file for side in sides if side.exists() for file in source_files(side)]
    return tuple((str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files)


def clean_chunk(chunk: Chunk) -> ChunkResult:
    """Clean, filter, identify and decontaminate the lines of a chunk, and hash those that pass."""
    config, stats, dropped = chunk.config, CleaningStats(), io.StringIO()

    def drop(line: Line, refusal: Refusal) -> None:
        reason, detail, language = refusal
        stats.add_dropped(reason, line.text, language, source=line.source, detail=detail)
        if chunk.explain:
            dropped.write(explanation(reason, line.source, line.number, line.document, line.text, detail))

    passed = list(_clean_lines(chunk, stats, drop))
    for refuse in (_refused_languages, _contaminated):
        refusals = refuse(passed, config)
        for entry, refusal in zip(passed, refusals, strict=True):
            if refusal is not None:
                drop(entry.line, refusal)
        passed = [entry for entry, refusal in zip(passed, refusals, strict=True) if refusal is None]
    return ChunkResult(chunk.index, _table(passed, config), len(passed), stats.to_json(), dropped.getvalue())


def _clean_lines(chunk: Chunk, stats: CleaningStats, drop: Any) -> Iterator[_Passed]:
    config = chunk.config
    for number, line in enumerate(chunk.lines):
        stats.add_read(line.text)
        if line.problem:
            drop(line, Refusal(line.problem, "cannot be read"))
            continue
        text, repairs = clean_line(line.text, config)
        if not text:
            drop(line, Refusal("markup" if "markup" in repairs else "empty"))
            continue
        for kind in repairs:
            stats.add_repaired(kind, line.text, text, source=line.source)
        if refusal := refuse_text(text, config):
            drop(line, refusal)
        else:
            compared = config.against or config.duplicates != "none"
            yield _Passed(chunk.first_id + number, text, line, duplicate_form(text) if compared else "")


def _refused_languages(passed: list[_Passed], config: CleaningConfig) -> list[Refusal | None]:
    if not config.filter_language:
        return [None] * len(passed)
    return _language_filter(config.language, config.identifier).refuse([entry.text for entry in passed])


def _contaminated(passed: list[_Passed], config: CleaningConfig) -> list[Refusal | None]:
    if not config.against:
        return [None] * len(passed)
    found = _evaluation_index(config.against, _state(config.against)).contaminated_forms(
        [entry.form for entry in passed]
    )
    return [Refusal("contaminated", language=config.language) if hit else None for hit in found]


def _table(passed: list[_Passed], config: CleaningConfig) -> bytes:
    forms = [entry.form for entry in passed]
    keys = [b""] * len(forms) if config.duplicates == "none" else [form_key(form) for form in forms]
    near = config.duplicates == "near"
    bands = MinHasher(config.near_duplicates).signatures_of_forms(forms) if near else [()] * len(forms)
    columns = [
        [entry.id for entry in passed],
        [entry.text for entry in passed],
        [entry.line.document for entry in passed],
        [entry.line.source for entry in passed],
        [entry.line.number for entry in passed],
        keys,
        bands,
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA), buffer)
    return buffer.getvalue()
