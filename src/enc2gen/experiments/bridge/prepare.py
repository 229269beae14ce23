"""Stage `prepare` of a bridge recipe: read the task and the pairs, split them, write them down."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import enc2gen.data.name_kinds  # noqa: F401  registers a task
from enc2gen import __version__
from enc2gen.corpora.builtin import split_of
from enc2gen.corpora.languages import normalise_language
from enc2gen.corpora.readers import read_records, source_names, source_sides
from enc2gen.data.classification import (
    ClassificationTask,
    LabelledText,
    balanced,
    build_classification_task,
    label_names,
)
from enc2gen.data.code_switching import builtin_lexicon, code_switched_examples, load_lexicon
from enc2gen.data.held_out import drawn, how_split, unseen
from enc2gen.data.language_files import is_pattern, language_file, own_splits
from enc2gen.data.tasks import Example, build_task
from enc2gen.errors import ConfigError, DataError, LanguageError
from enc2gen.experiments.bridge.recipe import (
    BridgeRecipe,
    CodeSwitchedSection,
    PairsSection,
    StageSection,
    TaskSection,
    TaskTextsSection,
)
from enc2gen.experiments.prepare import fingerprint
from enc2gen.experiments.workspace import Workspace
from enc2gen.training.checkpoint import writing

SPLITS = ("train", "dev", "test")
Log = Callable[[str], None]


@dataclass(frozen=True)
class TextPair:
    """What the encoder reads and what the LLM should write. `group` names the set it is scored in, such as "kk-en"."""

    source: str
    target: str
    group: str
    references: tuple[str, ...] = ()


def language_written(group: str) -> str:
    """The target's tag in the name of a group, SOURCE-TARGET, where both sides may hold hyphens: en-zh-Hant.

    Both are canonical tags, so the shortest end that is a tag is the target: scripts and regions begin none.
    """
    parts = group.split("-")
    for start in range(len(parts) - 1, 0, -1):
        tag = "-".join(parts[start:])
        with suppress(LanguageError):
            if re.fullmatch("[a-z]{2,3}", parts[start]) and normalise_language(tag):
                return tag
    return parts[-1]


class PreparedBridgeData:
    """What `prepare` wrote.

    Args:
        workspace: of the run.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.folder = workspace.data

    @property
    def summary(self) -> dict[str, Any]:
        """Labels of the task, languages and counts."""
        found: dict[str, Any] = self.workspace.read_json(self.folder / "summary.json")
        return found

    def texts(self, split: str) -> list[LabelledText]:
        """The task's texts of `train`, `dev` or `test`."""
        return [LabelledText(**row) for row in _read(self.folder / "task" / f"{split}.jsonl")]

    def pairs(self, stage: str, split: str) -> list[TextPair]:
        """A stage's own pairs (parallel or code-switched) of `train`, `dev` or `test`."""
        rows = _read(self.folder / "stages" / stage / f"{split}.jsonl")
        return [TextPair(**{**row, "references": tuple(row["references"])}) for row in rows]

    def tests(self, recipe: BridgeRecipe) -> dict[str, list[TextPair]]:
        """Held-out pairs of all stages by group, `evaluate.limit` drawn from each."""
        found: dict[str, list[TextPair]] = {}
        for stage in recipe.stages:
            for pair in self.pairs(stage.name, "test"):
                found.setdefault(pair.group, []).append(pair)
        limit = recipe.evaluate.limit
        return {group: drawn(pairs, limit, lambda pair: pair.source) for group, pairs in sorted(found.items())}


def data_key(recipe: BridgeRecipe) -> dict[str, Any]:
    """Everything that decides what `prepare` writes."""
    task = recipe.task
    named = [data.path for stage in recipe.stages for data in stage.data if not isinstance(data, TaskTextsSection)]
    lexicons = [
        _lexicon_path(data, tag)
        for stage in recipe.stages
        for data in stage.data
        if isinstance(data, CodeSwitchedSection)
        for tag in data.languages
    ]
    pairs = [data for stage in recipe.stages for data in stage.data if isinstance(data, PairsSection)]
    splits = {mark for data in pairs for mark in how_split(data.task, data.fields).values()}
    return {
        "version": __version__,
        "seed": recipe.seeds[0],
        **({"reverse_split": sorted(splits)} if splits else {}),
        "task": task.model_dump(mode="json") if task else None,
        "stages": {stage.name: [data.model_dump(mode="json") for data in stage.data] for stage in recipe.stages},
        "files": fingerprint(
            *(side for path in named for side in source_sides(path)),
            *lexicons,
            *(_task_files(task) if task else ()),
        ),
    }


def _task_files(section: TaskSection) -> list[str]:
    """The path of the task's data; of a pattern, which is no file, the files that it stands for in this recipe."""
    path = section.path
    if path is None or not is_pattern(path):
        return [path] if path else []
    task = build_classification_task(section.name, section.options)
    read = {(language, split): None for language in section.train_languages for split in SPLITS}
    tested = section.languages or task.available_languages(path)
    found: dict[str, None] = {}
    for language, split in read | {(language, "test"): None for language in tested}:
        with suppress(DataError):
            if (file := language_file(path, language, split)) is not None:
                found[str(file)] = None
    return sorted(found)


def _lexicon_path(data: CodeSwitchedSection, language: str) -> str:
    return data.lexicon.replace("{language}", language)


def training_digest(recipe: BridgeRecipe, workspace: Workspace) -> str:
    """sha256 of what is trained and validated on, so that another choice of test languages repeats no training."""
    found = hashlib.sha256()
    stages = workspace.data / "stages"
    for folder in (workspace.data / "task", *(stages / stage.name for stage in recipe.stages)):
        for split in ("train", "dev"):
            path = folder / f"{split}.jsonl"
            found.update(path.read_bytes() if path.exists() else b"none")
            found.update(b"\0")
    return found.hexdigest()


def prepare(recipe: BridgeRecipe, workspace: Workspace, log: Log) -> None:
    """Write `data/task/*.jsonl`, `data/stages/NAME/*.jsonl` and `data/summary.json`.

    Raises:
        ConfigError: a stage would train on what another tests.
        DataError: data are missing or empty, or nothing is left to train on or test with.
    """
    check_hold_outs(recipe)
    summary: dict[str, Any] = {"labels": [], "languages": [], "train_languages": [], "counts": {}}
    if recipe.task is not None:
        summary |= _prepare_task(recipe.task, workspace)
        log("task: " + ", ".join(f"{split} {count:,}" for split, count in summary["counts"].items()))
    for stage in recipe.stages:
        pairs = _stage_pairs(stage, recipe, workspace, log)
        for split in SPLITS:
            _write(workspace.data / "stages" / stage.name / f"{split}.jsonl", map(asdict, pairs[split]))
        counts = {split: dict(Counter(pair.group for pair in pairs[split])) for split in SPLITS}
        summary["counts"][stage.name] = counts
        for group, count in counts["train"].items():
            held_out = f"{counts['dev'].get(group, 0):,} dev, {counts['test'].get(group, 0):,} test"
            log(f"{stage.name}, {group}: {count:,} pairs to train on; {held_out}")
    workspace.write_json(workspace.data / "summary.json", summary)


def check_languages(section: TaskSection) -> None:
    """Refuse two languages of one file: nothing there says whose a text is, so trained texts would be tested, too.

    Raises:
        DataError: such a file.
    """
    task, path = build_classification_task(section.name, section.options), section.path
    if path is None and task.hub is None:
        return  # built in
    readers: dict[tuple[str, str], str] = {}
    for language in [*section.train_languages, *(section.languages or task.available_languages(path))]:
        for split in SPLITS if language in section.train_languages else ("test",):
            try:
                source = task.source(language, split, path)
            except DataError:
                continue  # said where it is read, if it has to be there
            if (other := readers.setdefault(source, language)) != language:
                raise DataError(
                    f"the texts of {language!r} would be read from here, and those of {other!r} are: nothing says "
                    "which language a text is in",
                    where=source[0],
                    remedy=f"give each language files of its own, as in FOLDER/{language}/{split}.tsv with task.path: "
                    f'FOLDER, or write {{language}} in the name (task.path: "FOLDER/{{language}}.tsv")',
                )


def check_prepared(recipe: BridgeRecipe, workspace: Workspace) -> None:
    """Refuse data, prepared now or long ago, without which a bridge cannot be measured or chosen once it is trained.

    Raises:
        DataError: no test text of a trained language, or no development example in the last stage of a search, by
            which the rates are compared.
    """
    summary = PreparedBridgeData(workspace).summary
    if recipe.task and (untested := set(recipe.task.train_languages) - set(summary["languages"])):
        raise _nothing_left(sorted(untested)[0], "test", recipe.task)
    for bridge in recipe.bridges:
        last = recipe.stages_of(bridge)[-1]
        on_task = any(isinstance(data, TaskTextsSection) for data in last.data)
        if recipe.searched(bridge) and not summary["counts"][last.name]["dev"] and not on_task:
            raise DataError(
                f"no development example: the learning rates of {bridge} cannot be compared",
                where=f"stages.{last.name}",
                remedy="give more pairs, raise dev_percent, or leave search out and set training.learning_rate",
            )


def check_hold_outs(recipe: BridgeRecipe) -> None:
    """Refuse recipes that train on what they test, because two entries hold out different shares of one file.

    A file's test share is the lowest buckets of a hash of each text (:func:`split_of`). So whoever trains on a file
    must hold out at least as large a share of it as anyone tests.

    Raises:
        ConfigError: two entries of which one trains on what the other tests.
    """
    entries = [
        (f"stages.{stage.name}.data.{number}", data, source_names(data.path, data.split))
        for stage in recipe.stages
        for number, data in enumerate(stage.data)
        if not isinstance(data, TaskTextsSection)
    ]
    for trainer, training, files in entries:
        if isinstance(training, PairsSection) and training.languages == []:
            continue
        held_out = training.test_percent if isinstance(training, PairsSection) else 0
        for tester, testing, others in entries:
            if isinstance(testing, PairsSection) and testing.test_percent > held_out and files & others:
                raise ConfigError(
                    f"it would train on what {tester} tests: {testing.test_percent} % of {sorted(files & others)[0]} "
                    f"are tested there, and {held_out} % are held out here",
                    where=trainer,
                    remedy=f"hold out as much in both (test_percent: {testing.test_percent}), or read other files"
                    if isinstance(training, PairsSection)
                    else f"read another file, or set test_percent of {tester} to 0",
                )


def _prepare_task(section: TaskSection, workspace: Workspace) -> dict[str, Any]:
    task, path = build_classification_task(section.name, section.options), section.path
    wanted = section.languages or task.available_languages(path)
    if not wanted and (path is None or not Path(path).is_file()):
        raise ConfigError("the languages of these data are not known", where="task.languages", remedy="name them")
    rows: dict[str, list[LabelledText]] = {"train": [], "dev": [], "test": []}
    for language in section.train_languages:
        for split, texts in _trained_language(task, section, language).items():
            rows[split] += texts
    for language in dict.fromkeys(wanted):
        if language not in section.train_languages:
            rows["test"] += task.load(language, "test", path)
    labels = task.labels or label_names(rows["train"])
    if unseen := sorted({row.label for row in rows["test"]} - set(labels)):
        raise DataError(f"the test data have labels that training lacks: {unseen}", where=f"task {section.name}")
    for split, found in rows.items():
        _write(workspace.data / "task" / f"{split}.jsonl", map(asdict, found))
    return {
        "labels": list(labels),
        "languages": list(dict.fromkeys(row.language for row in rows["test"])),
        "train_languages": section.train_languages,
        "counts": {split: len(found) for split, found in rows.items()},
    }


def _trained_language(task: ClassificationTask, section: TaskSection, language: str) -> dict[str, list[LabelledText]]:
    """Texts of a trained language by split; dev and test without a file of their own are held out of training."""
    path, own = section.path, own_splits(section.path, language)
    shares = {
        f"{split}_percent": 0 if split in own else getattr(section, f"{split}_percent") for split in ("dev", "test")
    }
    found: dict[str, list[LabelledText]] = {"train": [], "dev": [], "test": []}
    for text in task.load(language, "train", path):
        found[split_of(text.text, **shares)].append(text)
    for split in own - {"train"}:
        found[split] = task.load(language, split, path)
    if section.limit is not None:
        found["train"] = balanced(found["train"], section.limit)
    if empty := [split for split, texts in found.items() if not texts]:
        raise _nothing_left(language, empty[0], section)
    return found


def _nothing_left(language: str, split: str, section: TaskSection) -> DataError:
    share = "task.limit" if split == "train" else f"task.{split}_percent"
    return DataError(
        f"no text of language {language!r} is left for {split}",
        where=section.path or section.name,
        remedy=f"give more texts, a file for {split}, or another share ({share}), or leave the language out of "
        "task.train_languages",
    )


def _stage_pairs(
    stage: StageSection, recipe: BridgeRecipe, workspace: Workspace, log: Log
) -> dict[str, list[TextPair]]:
    """Pairs of a stage by split; empty for a stage that trains on the task alone."""
    pairs: dict[str, list[TextPair]] = {split: [] for split in SPLITS}
    for data in stage.data:
        found = (
            parallel_pairs(data, log)
            if isinstance(data, PairsSection)
            else _code_switched(data, recipe, workspace)
            if isinstance(data, CodeSwitchedSection)
            else ()
        )
        before = len(pairs["train"])
        for split, pair in found:
            pairs[split].append(pair)
        for_testing = isinstance(data, PairsSection) and data.languages == []
        if not isinstance(data, TaskTextsSection) and not for_testing and len(pairs["train"]) == before:
            raise DataError("no pair to train on", where=f"stages.{stage.name}", remedy="check path, fields, languages")
    return pairs


def parallel_pairs(data: PairsSection, log: Log) -> Iterator[tuple[str, TextPair]]:
    """Pairs with their split, which is a hash of the group of the pair: both directions lie on one side."""
    task = build_task(data.task, data.fields)
    kept: Counter[str] = Counter()

    def read() -> Iterator[tuple[str, Example]]:
        for example in task.examples(read_records(data.path, split=data.split), where=data.path):
            yield split_of(example.group, dev_percent=data.dev_percent, test_percent=data.test_percent), example

    for split, example in unseen(read, data.fields, where=data.path, log=log):
        wanted = data.test_languages if split == "test" else data.languages
        if wanted is not None and example.source_language not in wanted:
            continue
        group = f"{example.source_language}-{example.target_language}"
        if split == "train":
            kept[group] += 1
            if data.limit is not None and kept[group] > data.limit:
                continue
        yield split, TextPair(example.source, example.target, group, example.references)


def _code_switched(
    data: CodeSwitchedSection, recipe: BridgeRecipe, workspace: Workspace
) -> Iterator[tuple[str, TextPair]]:
    """Code-switched English and the English it came from, for every text and language."""
    lexicons = [
        builtin_lexicon(tag) if data.lexicon == "builtin" else load_lexicon(_lexicon_path(data, tag), tag)
        for tag in data.languages
    ]
    for example in code_switched_examples(_english(data, workspace), lexicons, data.rate, recipe.seeds[0]):
        pair = TextPair(example.source, example.target, f"{example.source_language}-en", example.references)
        yield split_of(example.group, dev_percent=data.dev_percent, test_percent=0), pair


def _english(data: CodeSwitchedSection, workspace: Workspace) -> Sequence[str]:
    if data.path == "task":
        rows: Iterable[dict[str, Any]] = _read(workspace.data / "task" / "train.jsonl")
    else:
        rows = islice(read_records(data.path, split=data.split, columns=[data.field]), data.limit)
    field = "text" if data.path == "task" else data.field
    return [text for row in rows if (text := str(row[field] or "").strip())][: data.limit]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8", errors="surrogatepass")


def _read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="surrogatepass")
    return [json.loads(line) for line in text.split("\n") if line]
