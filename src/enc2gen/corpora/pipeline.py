"""From messy sources to clean shards, in three phases:

1. Chunks of lines are cleaned, filtered and hashed in parallel (:mod:`enc2gen.corpora.chunks`); results lie on disk.
2. The hashes go into an index on disk, which names the duplicates; the earliest line of several is kept.
3. The lines that are left are written in input order, split by document.

Memory stays flat while the input grows. The shards are the same, byte for byte, whatever the engine and the number of
workers. A run that is stopped goes on with the chunks that are missing.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from enc2gen import __version__
from enc2gen.corpora.chunks import Chunk, ChunkResult, chunked, clean_chunk
from enc2gen.corpora.cleaning import DROP_REASONS, REPAIRS, CleaningConfig
from enc2gen.corpora.cleaning_report import CleaningStats, write_cleaning_report
from enc2gen.corpora.deduplication import DuplicateIndex
from enc2gen.corpora.engines import ENGINES, Engine
from enc2gen.corpora.explanations import Explanations
from enc2gen.corpora.filters import LanguageFilter
from enc2gen.corpora.language_id import LANGUAGE_IDENTIFIERS
from enc2gen.corpora.lines import Source, find_sources, read_lines
from enc2gen.corpora.output_folder import OutputFolder, fingerprint
from enc2gen.corpora.readers import read_records, source_files, source_sides
from enc2gen.corpora.shards import FORMAT, FORMAT_VERSION, SPLITS, PreparedCorpus, ShardWriter, read_json, write_json
from enc2gen.corpora.text_values import well_formed
from enc2gen.errors import DataError

_BATCH_LINES = 2000
FEW_DOCUMENTS = 1000
"""Corpora of up to so many documents are split with exact shares (our choice)."""

REMEDIES = {
    "encoding": "name the encoding of text that is not UTF-8 with --encoding",
    "too-short": "lower --set min_length=N",
    "too-long": "raise --set max_length=N, or put one sentence or paragraph on a line",
    "few-letters": "check --field, or lower --set min_letters=SHARE",
    "repetition": "raise --set max_ngram_share=SHARE or --set max_repeated_share=SHARE",
    "wrong-language": "check --lang, or turn the filter off with --set filter_language=false",
    "contaminated": "check --against: it may name the corpus itself",
    "exact-duplicate": "keep duplicates with --duplicates none",
    "near-duplicate": "keep near-duplicates with --duplicates exact",
}


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        phase: "cleaning", "duplicates" or "writing".
        lines: lines done in this phase.
        kept: how many of them are kept so far.
        total: lines of this phase, None while that is unknown.
    """

    phase: str
    lines: int
    kept: int
    total: int | None = None


def prepare_corpus(
    sources: Sequence[str],
    output: Path,
    config: CleaningConfig,
    *,
    engine: str = "local",
    workers: int | None = None,
    explain: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> CleaningStats:
    """Clean the sources into Parquet shards; see :mod:`enc2gen.corpora.shards` for what is written.

    Args:
        sources: files, folders, Hub data sets or built-in corpora, as :func:`read_records` takes them; nothing in the
            output folder is one.
        output: a folder that is empty, not there, or holds this same preparation, which is then gone on with.
        engine: one of `ENGINES`.
        workers: processes; None for all cores.
        explain: write every dropped line, with its reason.
        overwrite: replace a corpus prepared with other settings, once the new one is complete.

    Returns:
        The counts of the whole run; those of the finished run where it was complete already.

    Raises:
        DataError: a source cannot be used, or no line is left.
        ConfigError: an unknown engine or identifier.
        OutputError: the folder holds something else, or another process fills it.
    """
    start = time.monotonic()
    if config.filter_language:
        LANGUAGE_IDENTIFIERS.get(config.identifier, where="identifier")
    runner = ENGINES.get(engine, where="engine")(workers)
    evaluation = _evaluation_files(config)
    # Workers may be in another folder.
    absolute = tuple(str(Path(path).resolve()) if Path(path).exists() else path for path in config.against)
    files = find_sources(sources, config.reading, output=output)
    notify = on_progress or (lambda progress: None)
    with OutputFolder(output, _identity(files, evaluation, config, explain), overwrite=overwrite) as folder:
        if folder.complete:
            return PreparedCorpus.open(output).stats()
        lines = read_lines(files, config.reading)
        chunks = chunked(lines, config.model_copy(update={"against": absolute}), explain)
        stats = _clean(chunks, folder, runner, notify)
        manifest = _write(folder, config, stats, explain, notify)
        stats.seconds = time.monotonic() - start
        if not stats.splits.total():
            raise _nothing_left(stats, sources, folder)
        settings = {"sources": [well_formed(source) for source in sources], **folder.identity["config"]}
        write_cleaning_report(stats, folder.partial, DROP_REASONS, repairs=REPAIRS, title="Corpus", settings=settings)
        folder.finish(manifest)
    return stats


def _evaluation_files(config: CleaningConfig) -> dict[str, Path]:
    """The files of the evaluation sets; `DataError` if a set is not there."""
    files = {}
    for number, name in enumerate(config.against):
        read_records(name)  # complains about what is neither a file nor a data set
        for path in source_files(Path(name)) if Path(name).exists() else ():
            inside = path.relative_to(name).as_posix() if Path(name).is_dir() else path.name
            files[f"against {number}: {inside}"] = path
        for side in _parallel_files(name):
            files[f"against {number}: {side.name}"] = side
    return files


def _parallel_files(source: str) -> list[Path]:
    """The files on both sides of `FIRST|SECOND`; none of another source."""
    sides = source_sides(source)
    return [Path(side) for side in sides if Path(side).is_file()] if len(sides) > 1 else []


def _identity(
    files: Sequence[Source], evaluation: Mapping[str, Path], config: CleaningConfig, explain: bool
) -> dict[str, Any]:
    """Everything that the output depends on; evaluation sets count by name and content, not by their folder."""
    against = tuple(well_formed(Path(name).name if Path(name).exists() else name) for name in config.against)
    inputs = {file.name: file.path for file in files if file.path is not None}
    inputs |= {str(side): side for file in files if file.path is None for side in _parallel_files(file.name)}
    return {
        "config": config.model_copy(update={"against": against}).model_dump(mode="json"),
        "inputs": [
            fingerprint({**inputs, **evaluation}),
            *(well_formed(file.name) for file in files if file.path is None),
        ],
        "explain": explain,
        "version": __version__,
    }


def _clean(
    chunks: Iterable[Chunk], folder: OutputFolder, engine: Engine, notify: Callable[[Progress], None]
) -> CleaningStats:
    """Phase 1: work on all chunks that are not done, and return the counts of all, in order."""
    count = kept = lines = 0

    def missing() -> Iterator[Chunk]:
        nonlocal count, kept, lines
        for chunk in chunks:
            count += 1
            finished = read_json(folder.chunks / f"{chunk.index:06d}.json")
            if finished is None:
                yield chunk
            else:
                stats = CleaningStats.from_json(finished)
                lines, kept = lines + stats.read, kept + stats.read - stats.total_dropped

    with closing(engine.map(clean_chunk, missing())) as results:
        for result in results:
            _store(result, folder.chunks)
            lines, kept = lines + result.stats["read"], kept + result.lines
            notify(Progress("cleaning", lines, kept))
    total = CleaningStats()
    for index in range(count):
        total.merge(CleaningStats.from_json(read_json(folder.chunks / f"{index:06d}.json")))
    return total


def _store(result: ChunkResult, folder: Path) -> None:
    """Write a result; the counts, whose file says that the chunk is done, last."""
    contents = {".parquet": result.passed, ".jsonl": result.dropped.encode("utf-8", "replace")}
    for suffix, content in contents.items():
        temporary = folder / f"{result.index:06d}{suffix}.tmp"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / f"{result.index:06d}{suffix}")
    write_json(folder / f"{result.index:06d}.json", result.stats)


def _rows(folder: OutputFolder, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Stream the lines that passed phase 1, in batches, in input order."""
    for path in sorted(folder.chunks.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_LINES, columns=list(columns)):
                yield batch.to_pylist()


def _duplicate_index(
    folder: OutputFolder, config: CleaningConfig, total: int, notify: Callable[[Progress], None]
) -> DuplicateIndex:
    """Phase 2: an index of all lines that passed phase 1."""
    index, done = DuplicateIndex(folder.index, config.near_duplicates), 0
    for rows in _rows(folder, ("id", "key", "bands")):
        index.add([row["id"] for row in rows], [row["key"] for row in rows], [row["bands"] for row in rows])
        done += len(rows)
        notify(Progress("duplicates", done, done, total))
    return index


def _documents(folder: OutputFolder, duplicates: Iterator[tuple[int, str, int]]) -> Iterator[str]:
    """The document of every line but the duplicates, in input order."""
    duplicate = next(duplicates, None)
    for rows in _rows(folder, ("id", "document")):
        for row in rows:
            if duplicate is not None and duplicate[0] == row["id"]:
                duplicate = next(duplicates, None)
            else:
                yield row["document"]


def _write(
    folder: OutputFolder,
    config: CleaningConfig,
    stats: CleaningStats,
    explain: bool,
    notify: Callable[[Progress], None],
) -> dict[str, Any]:
    """Phases 2 and 3: write all lines but the duplicates, and return the manifest."""
    passed = stats.read - stats.total_dropped
    folder.partial.mkdir(parents=True)
    dropped, done = folder.partial / "dropped" if explain else None, 0
    with ExitStack() as stack:
        if config.duplicates == "none":
            index = None
        else:
            index = stack.enter_context(closing(_duplicate_index(folder, config, passed, notify)))
        documents = _documents(folder, index.duplicates() if index else iter(()))
        splits = _SplitWriter(folder.partial, config, split_few_documents(documents, config))
        duplicates = index.duplicates() if index else iter(())
        duplicate = next(duplicates, None)
        explanations = stack.enter_context(Explanations.opened(folder.positions, dropped))
        for path in sorted(folder.chunks.glob("*.jsonl")) if explain else ():
            explanations.copy(path)
        for rows in _rows(folder, ("id", "text", "document", "source", "line")):
            for row in rows:
                explanations.remember(row)
                if duplicate is not None and duplicate[0] == row["id"]:
                    detail = explanations.add_duplicate(row, *duplicate[1:])
                    stats.add_dropped(duplicate[1], row["text"], config.language, source=row["source"], detail=detail)
                    duplicate = next(duplicates, None)
                else:
                    stats.add_kept(row["text"], config.language)
                    splits.add(row)
            done += len(rows)
            notify(Progress("writing", done, stats.total_kept, passed))
    splits.close()
    stats.splits.update(splits.lines)
    stats.split_documents.update(splits.documents)
    stats.documents = splits.documents.total()
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "config": folder.identity["config"],
        "lines": {"read": stats.read, "kept": stats.total_kept},
        "dropped": {reason: counts.total() for reason, counts in stats.dropped.items()},
        "documents": dict(splits.documents),
        "shards": {split: writer.shards for split, writer in splits.writers.items()},
    }


class _SplitWriter:
    """Writes each line into the shards of its document's split.

    Documents are counted where they begin: one whose lines are not together in the input counts more than once.
    """

    def __init__(self, folder: Path, config: CleaningConfig, few: Mapping[str, str]) -> None:
        limits = {"max_lines": config.shard_lines, "max_bytes": config.shard_megabytes * 2**20}
        self.writers = {split: ShardWriter(folder / split, **limits) for split in SPLITS}
        self.lines = Counter(dict.fromkeys(SPLITS, 0))
        self.documents = Counter(dict.fromkeys(SPLITS, 0))
        self._config, self._few = config, few
        self._document: tuple[str, str] | None = None
        self._split = ""

    def add(self, row: Mapping[str, Any]) -> None:
        document = (row["source"], row["document"])
        if document != self._document:
            name = row["document"]
            self._document, self._split = document, self._few.get(name) or split_of_document(name, self._config)
            self.documents[self._split] += 1
        self.lines[self._split] += 1
        self.writers[self._split].add(row["text"], self._config.language, row["document"], row["source"])

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


def split_few_documents(names: Iterable[str], config: CleaningConfig) -> dict[str, str]:
    """The splits of a corpus of 3 to 1,000 documents, with exact shares and at least one document wherever a share is
    not 0; empty for other corpora. Chance alone often leaves a split of few documents empty."""
    places: dict[str, float] = {}
    for name in names:
        places.setdefault(name, _place(name, config))
        if len(places) > FEW_DOCUMENTS:
            return {}
    if len(places) < len(SPLITS):
        return {}
    order = sorted(places, key=lambda name: (places[name], name))
    shares = (("test", config.test_percent), ("dev", config.dev_percent))
    held = [
        split for split, percent in shares for _ in range(max(1, round(len(order) * percent / 100)) if percent else 0)
    ]
    return dict(zip(order, [*held, *["train"] * len(order)], strict=False))


def _place(document: str, config: CleaningConfig) -> float:
    """A number in [0, 100) that depends on the name and the seed alone."""
    digest = hashlib.blake2b(f"{config.seed}\0{document}".encode("utf-8", "replace"), digest_size=8).digest()
    return 100 * int.from_bytes(digest, "big") / 2**64


def split_of_document(document: str, config: CleaningConfig) -> str:
    """Return "train", "dev" or "test" for the name of a document: a pure function of it, the seed and the shares."""
    percent = _place(document, config)
    if percent < config.test_percent:
        return "test"
    return "dev" if percent < config.test_percent + config.dev_percent else "train"


def _nothing_left(stats: CleaningStats, sources: Sequence[str], folder: OutputFolder) -> DataError:
    where = ", ".join(sources)
    dropped = folder.give_up()
    if not stats.dropped:
        return DataError("the sources hold no lines", where=where, remedy="check that they were copied completely")
    counts = {reason: languages.total() for reason, languages in stats.dropped.items()}
    most = max(counts, key=lambda reason: counts[reason])
    found = f", most of them {stats.dropped[most].most_common(1)[0][0]}" if most == "wrong-language" else ""
    listed = f"the dropped lines are in {dropped}" if dropped else "--explain writes the dropped lines"
    return DataError(
        f"nothing is left of {stats.read:,} lines: {counts[most] / stats.read:.0%} are dropped as {most} "
        f"({DROP_REASONS.get(most, most)}{found})",
        where=where,
        remedy=f"{REMEDIES.get(most, 'look at the sources')}; {listed}",
    )


def remarks(stats: CleaningStats, config: CleaningConfig) -> list[str]:
    """Return what a user should know about a finished run, in sentences; empty if there is nothing."""
    found = []
    for split, percent in (("dev", config.dev_percent), ("test", config.test_percent)):
        if percent and not stats.splits[split]:
            found.append(
                f"{split} is empty: there are only {stats.documents:,} documents. Give --{split}-percent a higher "
                "number, or say with --documents or --document-field what a document is."
            )
    if config.filter_language and LanguageFilter(config.language, config.identifier).by_script_only:
        found.append(
            f"{config.identifier} does not know {config.language}: lines in other languages of the same script stay."
        )
    return found
