"""Stage `prepare`: read the corpora and split them."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from enc2gen.corpora.builtin import package_versions, split_of
from enc2gen.corpora.languages import normalise_language
from enc2gen.corpora.readers import check_source, read_records, source_sides
from enc2gen.corpora.text_values import as_text, check_whole
from enc2gen.data.held_out import limit_rank, reading, unseen
from enc2gen.data.tasks import Example, build_task
from enc2gen.encoders.loading import encoder_positions
from enc2gen.errors import ConfigError, DataError
from enc2gen.experiments.data_config import DatasetConfig, MonolingualConfig
from enc2gen.experiments.recipe import Recipe
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
        path = self.folder / f"{name}.parquet"
        if pq.read_metadata(path).num_rows == 0:  # which from_parquet does not take
            return Dataset(pq.read_table(path))
        found = Dataset.from_parquet(str(path), cache_dir=str(self.folder / "cache"))
        # Its own fingerprint stands for the file's place and time: a run that was moved would not go on.
        return Dataset(found.data, found.info, found.split, fingerprint=_hashed(path, path.stat().st_mtime_ns))

    def examples(self, split: str) -> Dataset:
        """Examples of `train`, `dev` or `test`; in `train` also those that are read for the vocabulary only."""
        return self._open(split)

    def trained(self) -> Dataset:
        """Examples of `train` that a stage trains on."""
        table = self.examples("train")
        indices = [index for index, stages in enumerate(table["stages"]) if stages]
        return table if len(indices) == len(table) else table.select(indices)

    def texts(self) -> Dataset:
        """Plain texts for denoising."""
        return self._open("monolingual")

    def held_out_texts(self) -> Dataset:
        """Plain texts that their corpus holds out; another corpus may have one of them, too."""
        if not (self.folder / "monolingual-test.parquet").exists():  # data of before there were any
            return self.texts().select([])
        return self._open("monolingual-test")


def prepare(recipe: Recipe, workspace: Workspace, log: Callable[[str], None]) -> None:
    """Write `data/*.parquet` and `data/summary.json`.

    Raises:
        DataError: a corpus is missing, empty or does not fit its mapping; or nothing is left to train on or test with.
    """
    _check_lengths(recipe)
    counts: Counter[tuple[str, str]] = Counter()
    pairs: Counter[tuple[str, str | None, str]] = Counter()
    workspace.data.mkdir(parents=True, exist_ok=True)
    writers = {split: _Writer(workspace.data / f"{split}.parquet", _EXAMPLE) for split in SPLITS}
    for dataset in recipe.data.datasets:
        for split, example in _chosen(_grouped(_held_apart(dataset, recipe, log)), dataset):
            counts[split if dataset.stages else "vocabulary", example.target_language] += 1
            pairs[split, example.source_language, example.target_language] += 1
            row = {name: value for name, value in asdict(example).items() if name != "group"}
            writers[split].add({**row, "stages": list(dataset.stages)})
    for writer in writers.values():
        writer.close()
    names = ("monolingual", "monolingual-test")
    writers = {name: _Writer(workspace.data / f"{name}.parquet", _TEXT) for name in names}
    for name, text, language in _plain_texts(recipe, PreparedData(workspace.data)):
        counts[name, language] += 1
        writers[name].add({"text": text, "language": language})
    for writer in writers.values():
        writer.close()
    tags = _languages(recipe, PreparedData(workspace.data))
    summary: dict[str, Any] = {
        "languages": tags,
        "counts": {
            split: {tag: n for (s, tag), n in sorted(counts.items()) if s == split}
            for split in (*SPLITS, *names, "vocabulary")
        },
        "pairs": [[*pair, count] for pair, count in pairs.items()],
    }
    workspace.write_json(workspace.data / "summary.json", summary)
    for split, found in summary["counts"].items():
        if found and split not in names:
            log(f"{split}: " + ", ".join(f"{tag} {n:,}" for tag, n in found.items()))


def fingerprint(*names: str) -> list[dict[str, Any]]:
    """Size and content hash of every local file under these names, so that what depends on changed files is done again;
    for built-in corpora the versions of the packages that they are read from. Data sets on the Hub are not looked at.

    Times do not count: data that was copied, mounted or checked out anew is the same data.
    """
    files: list[Path] = []
    for path in map(Path, names):
        files += (
            sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
        )
    found: list[dict[str, Any]] = [
        {"file": str(file), "bytes": (stat := file.stat()).st_size, "blake2b": _hashed(file, stat.st_mtime_ns)}
        for file in files
    ]
    return found + ([{"packages": package_versions()}] if any(name.startswith("builtin:") for name in names) else [])


def model_content(name: str) -> list[dict[str, Any]]:
    """The files of a local model with size and content hash, wherever its folder lies; none of a model on the Hub."""
    return [entry | {"file": Path(entry["file"]).relative_to(name).as_posix()} for entry in fingerprint(name)]


@lru_cache(maxsize=65_536)
def _hashed(file: Path, modified: int) -> str:
    """Hash of a file's bytes; read again in this process only if its time has changed."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()


def data_files(recipe: Recipe) -> list[str]:
    """Names of everything the recipe reads text from."""
    named = [path for d in recipe.data.datasets for path in (d.path, d.dev, d.test) if path is not None]
    named += [corpus.path for corpus in recipe.data.monolingual]
    return [side for path in named for side in source_sides(_expand(path, recipe))]


def check_files(recipe: Recipe) -> None:
    """Raise `DataError` if a file or folder that the recipe reads text from is not there."""
    for name in data_files(recipe):
        check_source(name)


def missing_files(recipe: Recipe) -> list[str]:
    """Files and folders that the recipe reads text from and that are not there."""
    missing: dict[str, None] = {}
    for name in data_files(recipe):
        try:
            check_source(name)
        except DataError:
            missing[name] = None
    return list(missing)


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
    held_out = {"dev": (dataset.dev, dataset.dev_split), "test": (dataset.test, dataset.test_split)}
    for split, (path, hub_split) in held_out.items():
        if path is not None:
            records = read_records(_expand(path, recipe), split=hub_split)
            yield from ((split, example) for example in task.examples(records, where=path))
    records = islice(read_records(_expand(dataset.path, recipe), split=dataset.split), dataset.limit)
    for example in task.examples(records, where=dataset.path):
        split = split_of(
            example.group,
            dev_percent=0 if dataset.dev else dataset.dev_percent,
            test_percent=0 if dataset.test else dataset.test_percent,
        )
        yield split, example


def _held_apart(dataset: DatasetConfig, recipe: Recipe, log: Callable[[str], None]) -> Iterator[tuple[str, Example]]:
    """Examples with their split, none with a source that a split held out from it has."""
    read = partial(_split_examples, dataset, recipe)
    return unseen(read, dataset.fields, where=dataset.path, log=log, own_files=dataset.own_files)


def _grouped(examples: Iterable[tuple[str, Example]]) -> Iterator[tuple[str, Example]]:
    """Held-out examples with the same source become one with several references; training examples pass through."""
    held_out: dict[tuple[str, tuple[str, str | None, str]], list[Example]] = {}
    for split, example in examples:
        if split == "train":
            yield split, example
        else:
            held_out.setdefault((split, reading(example)), []).append(example)
    for (split, *_), group in held_out.items():
        first = group[0]
        references = tuple(dict.fromkeys(text for example in group for text in example.references or (example.target,)))
        yield split, replace(first, references=references)


def _chosen(examples: Iterable[tuple[str, Example]], dataset: DatasetConfig) -> Iterator[tuple[str, Example]]:
    """Examples within `train_limit` and `dev_limit`; of a data set that nothing trains on, the training texts only.

    What is chosen comes in the order in which it was read. Memory holds `limit` examples per direction.
    """
    limits: dict[str, int] = {}
    for split, limit in (("train", dataset.train_limit), ("dev", dataset.dev_limit)):
        if limit is not None:
            limits[split] = limit
    kept: dict[tuple[str, str | None, str], list[tuple[int, int, Example]]] = {}
    for number, (split, example) in enumerate(examples):
        if not dataset.stages and split != "train":
            continue
        if split not in limits:
            yield split, example
            continue
        # A heap with the largest hash on top, which is the first to go; equal sources: the first that was read stays.
        heap = kept.setdefault((split, example.source_language, example.target_language), [])
        entry = (-limit_rank(example.group), -number, example)
        if len(heap) < limits[split]:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
    chosen = ((-number, key[0], example) for key, heap in kept.items() for _, number, example in heap)
    yield from ((split, example) for _, split, example in sorted(chosen, key=lambda entry: entry[0]))


def _plain_texts(recipe: Recipe, data: PreparedData) -> Iterator[tuple[str, str, str]]:
    """File of prepared texts, text and language."""
    for corpus in recipe.data.monolingual:
        for text, language in _corpus_texts(corpus, recipe):
            held_out = split_of(text, dev_percent=0, test_percent=corpus.test_percent) == "test"
            yield "monolingual-test" if held_out else "monolingual", text, language
    if recipe.data.denoise_targets:
        for row in data.examples("train"):
            if "pretrain" in row["stages"]:
                yield "monolingual", row["target"], row["target_language"]


def _corpus_texts(corpus: MonolingualConfig, recipe: Recipe) -> Iterator[tuple[str, str]]:
    fixed = normalise_language(corpus.language) if corpus.language else None
    columns = [corpus.field] + ([corpus.language_field] if corpus.language_field else [])
    records = read_records(_expand(corpus.path, recipe), split=corpus.split, columns=columns)
    for number, record in enumerate(islice(records, corpus.limit), 1):
        where = f"{corpus.path}, record {number}"
        text = as_text(record[corpus.field], corpus.field, where=where, remedy="name a field of text").strip()
        if check_whole(text, corpus.field, where=where):
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


def check_counts(recipe: Recipe, workspace: Workspace) -> None:
    """Raise `DataError` unless there is something to train on, and enough of the split that `recipe` evaluates.

    Prepared data may have been made for a run that evaluates another split.
    """
    summary = workspace.read_json(workspace.data / "summary.json")
    counts = Counter({(split, tag): n for split, found in summary["counts"].items() for tag, n in found.items()})
    for split, source, target, found in summary["pairs"]:
        if split == recipe.evaluate.split and target in recipe.languages and found == 1:
            raise DataError(
                f"there is one {split} example only from {source} to {target}",
                where="data.datasets",
                remedy=f"raise {split}_percent: the shuffled-source control needs two or more",
            )
    for tag in recipe.languages:
        if counts["vocabulary", tag] and not any(counts[split, tag] for split in SPLITS):
            continue  # another run trains and measures it, with this run's vocabulary
        for split, least in (("train", 1), (recipe.evaluate.split, 2)):
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
    seen |= set(data.texts().unique("language")) | set(data.held_out_texts().unique("language"))
    return [*recipe.languages, *sorted(tag for tag in seen if tag and tag not in recipe.languages)]
