"""Stage `prepare`: read the corpora and split them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from enc2gen.corpora.builtin import split_of
from enc2gen.corpora.languages import normalise_language
from enc2gen.corpora.readers import read_records
from enc2gen.data.tasks import Example, build_task
from enc2gen.encoders.loading import encoder_positions
from enc2gen.errors import ConfigError, DataError
from enc2gen.experiments.recipe import DatasetConfig, MonolingualConfig, Recipe
from enc2gen.experiments.workspace import Workspace

SPLITS = ("train", "dev", "test")
_EXAMPLE = pa.schema(
    [
        ("source", pa.string()),
        ("target", pa.string()),
        ("source_language", pa.string()),
        ("target_language", pa.string()),
        ("references", pa.list_(pa.string())),
        ("objective", pa.string()),
        ("stages", pa.list_(pa.string())),
    ]
)
_TEXT = pa.schema([("text", pa.string()), ("language", pa.string())])


@dataclass
class PreparedData:
    """What `prepare` wrote, opened without loading it into memory."""

    folder: Path

    def _open(self, name: str) -> Dataset:
        return Dataset.from_parquet(str(self.folder / f"{name}.parquet"), cache_dir=str(self.folder / "cache"))

    def examples(self, split: str) -> Dataset:
        """Examples of `train`, `dev` or `test`."""
        return self._open(split)

    def texts(self) -> Dataset:
        """Plain texts for denoising."""
        return self._open("monolingual")


def prepare(recipe: Recipe, workspace: Workspace, log: Callable[[str], None]) -> None:
    """Write `data/*.parquet` and `data/summary.json`.

    Raises:
        DataError: a corpus is missing, empty or does not fit its mapping; or nothing is left to train on or test with.
    """
    _check_lengths(recipe)
    counts: Counter[tuple[str, str]] = Counter()
    by_source: Counter[tuple[str | None, str]] = Counter()
    workspace.data.mkdir(parents=True, exist_ok=True)
    writers = {split: _Writer(workspace.data / f"{split}.parquet", _EXAMPLE) for split in SPLITS}
    for dataset in recipe.data.datasets:
        for split, example in _grouped(_split_examples(dataset, recipe)):
            counts[split, example.target_language] += 1
            by_source[example.source_language, example.target_language] += split == "test"
            row = {name: value for name, value in asdict(example).items() if name != "group"}
            writers[split].add({**row, "stages": list(dataset.stages)})
    for writer in writers.values():
        writer.close()
    texts = _Writer(workspace.data / "monolingual.parquet", _TEXT)
    for text, language in _plain_texts(recipe, PreparedData(workspace.data)):
        counts["monolingual", language] += 1
        texts.add({"text": text, "language": language})
    texts.close()
    _check_counts(recipe, counts, by_source)
    tags = _languages(recipe, PreparedData(workspace.data))
    summary: dict[str, Any] = {
        "languages": tags,
        "counts": {
            split: {tag: n for (s, tag), n in sorted(counts.items()) if s == split}
            for split in (*SPLITS, "monolingual")
        },
    }
    workspace.write_json(workspace.data / "summary.json", summary)
    for split in SPLITS:
        log(f"{split}: " + ", ".join(f"{tag} {n:,}" for tag, n in summary["counts"][split].items()))


def fingerprint(*names: str) -> list[dict[str, Any]]:
    """Size and time of every local file under these names, so that what depends on changed files is done again."""
    files: list[Path] = []
    for path in map(Path, names):
        files += (
            sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
        )
    return [{"file": str(f), "bytes": f.stat().st_size, "modified": f.stat().st_mtime_ns} for f in files]


def data_files(recipe: Recipe) -> list[str]:
    """Names of everything the recipe reads text from."""
    named = [path for d in recipe.data.datasets for path in (d.path, d.dev, d.test) if path is not None]
    return named + [corpus.path for corpus in recipe.data.monolingual]


class _Writer:
    """Writes rows to Parquet in chunks, so that memory stays flat."""

    def __init__(self, path: Path, schema: pa.Schema, chunk: int = 10_000) -> None:
        self.schema, self.chunk = schema, chunk
        self.writer = pq.ParquetWriter(path, schema)
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) == self.chunk:
            self._flush()

    def close(self) -> None:
        self._flush()
        self.writer.close()

    def _flush(self) -> None:
        self.writer.write_table(pa.Table.from_pylist(self.rows, schema=self.schema))
        self.rows = []


def _expand(path: str, recipe: Recipe) -> str:
    return path.replace("{languages}", ",".join(recipe.languages))


def _split_examples(dataset: DatasetConfig, recipe: Recipe) -> Iterator[tuple[str, Example]]:
    """Examples with their split: of files of their own, or by a hash of the source."""
    task = build_task(dataset.task, dataset.fields)
    held_out = {
        "dev": dataset.dev,
        "test": dataset.test,
    }
    for split, path in held_out.items():
        if path is not None:
            records = read_records(_expand(path, recipe), split="validation" if split == "dev" else "test")
            yield from ((split, example) for example in task.examples(records, where=path))
    records = islice(read_records(_expand(dataset.path, recipe), split=dataset.split), dataset.limit)
    for example in task.examples(records, where=dataset.path):
        split = split_of(
            example.group,
            dev_percent=0 if dataset.dev else dataset.dev_percent,
            test_percent=0 if dataset.test else dataset.test_percent,
        )
        yield split, example


def _grouped(examples: Iterable[tuple[str, Example]]) -> Iterator[tuple[str, Example]]:
    """Held-out examples with the same source become one with several references; training examples pass through."""
    held_out: dict[tuple[str, str, str | None, str], list[Example]] = {}
    for split, example in examples:
        if split == "train":
            yield split, example
        else:
            key = (split, example.source, example.source_language, example.target_language)
            held_out.setdefault(key, []).append(example)
    for (split, *_), group in held_out.items():
        first = group[0]
        references = tuple(dict.fromkeys(text for example in group for text in example.references or (example.target,)))
        yield (
            split,
            Example(
                first.source, first.target, first.source_language, first.target_language, references, first.objective
            ),
        )


def _plain_texts(recipe: Recipe, data: PreparedData) -> Iterator[tuple[str, str]]:
    for corpus in recipe.data.monolingual:
        yield from _corpus_texts(corpus, recipe)
    if recipe.data.denoise_targets:
        for row in data.examples("train"):
            if "pretrain" in row["stages"]:
                yield row["target"], row["target_language"]


def _corpus_texts(corpus: MonolingualConfig, recipe: Recipe) -> Iterator[tuple[str, str]]:
    fixed = normalise_language(corpus.language) if corpus.language else None
    columns = [corpus.field] + ([corpus.language_field] if corpus.language_field else [])
    records = read_records(_expand(corpus.path, recipe), split=corpus.split, columns=columns)
    for record in islice(records, corpus.limit):
        text = str(record[corpus.field] or "").strip()
        if text:
            yield text, fixed or normalise_language(str(record[str(corpus.language_field)]), where=corpus.path)


def _check_lengths(recipe: Recipe) -> None:
    """Refuse length limits that the encoder has no positions for."""
    for encoder in dict.fromkeys((recipe.encoder.name, *(config.name for config in recipe.variants.values()))):
        positions = encoder_positions(encoder)
        for name in ("max_source_length", "max_target_length"):
            if getattr(recipe.data, name) > positions:
                raise ConfigError(
                    f"{getattr(recipe.data, name)} tokens, but {encoder} has positions for {positions}",
                    where=f"data.{name}",
                    remedy=f"set it to {positions} or less",
                )


def _check_counts(recipe: Recipe, counts: Counter[tuple[str, str]], by_source: Counter[tuple[str | None, str]]) -> None:
    for (source, target), found in by_source.items():
        if target in recipe.languages and found == 1:
            raise DataError(
                f"there is one test example only from {source} to {target}",
                where="data.datasets",
                remedy="raise test_percent: the shuffled-source control needs two or more",
            )
    for tag in recipe.languages:
        for split in ("train", "test"):
            least = 1 if split == "train" else 2
            if counts[split, tag] < least:
                raise DataError(
                    f"only {counts[split, tag]} {split} examples with target language {tag!r}",
                    where="data.datasets",
                    remedy=f"add data for {tag}, name a {split} file, raise {split}_percent, or leave {tag} out",
                )


def _languages(recipe: Recipe, data: PreparedData) -> list[str]:
    """The recipe's languages first, then all others that occur."""
    seen = set()
    for split in SPLITS:
        table = data.examples(split)
        seen |= set(table.unique("source_language")) | set(table.unique("target_language"))
    seen |= set(data.texts().unique("language"))
    return [*recipe.languages, *sorted(tag for tag in seen if tag and tag not in recipe.languages)]
