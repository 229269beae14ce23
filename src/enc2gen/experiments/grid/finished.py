"""What evaluated runs of an experiment have left: read and checked whole, run by run, so that damage costs one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enc2gen.errors import CheckpointError
from enc2gen.experiments.findings import source_reading
from enc2gen.experiments.grid.learning import stage_folders
from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.grid.records import RunRecord
from enc2gen.experiments.recipe import FLOORS
from enc2gen.models.swcm.report import REPORT_FILE

Sentence = tuple[str, tuple[str, ...]]
"""Source and references."""

Texts = dict[str, dict[str, Mapping[str, float]]]
"""Language -> text -> its `nats`, `tokens` and `characters`."""

MEANS = ("loss", "shuffled_loss", "gain", "distinct_outputs")
"""Source-use controls of which cells have means over their seeds."""


@dataclass(frozen=True)
class Finished:
    """A run that was evaluated.

    Attributes:
        run: which.
        floors: model-free system -> language -> metric -> score.
        outputs: language -> (test sentence, hypothesis), in the order of the test set.
        controls: language -> source-use controls: `MEANS`, `outputs`, `permuted_chrf` and `reading`.
        denoising: losses of held-out texts, in the order of the texts; empty where none were measured.
        examples: target language -> training examples that there were.
        tokens, steps: of all training that led to its model, the pretraining that it started from included.
        parameters: of its model; None if that was not noted.
    """

    run: GridRun
    floors: Mapping[str, Mapping[str, Any]]
    outputs: Mapping[str, Sequence[tuple[Sentence, str]]]
    controls: Mapping[str, Mapping[str, Any]]
    denoising: Texts
    examples: Mapping[str, int]
    tokens: int
    steps: int
    parameters: int | None


def chain(run: GridRun) -> list[GridRun]:
    """A run and those whose model it goes on from."""
    return [run, *(chain(run.start) if run.start is not None else ())]


def read_finished(run: GridRun) -> Finished | None:
    """What an evaluated run left; None if it is not finished with today's data, settings and version.

    Raises:
        CheckpointError: a file is damaged, of this run or of one that it started from.
    """
    system = run.folder / "systems" / run.recipe.main_system
    path, hypotheses = run.folder / "metrics.json", system / "hypotheses.jsonl"
    if not RunRecord(run).finished or not path.exists() or not hypotheses.exists():
        return None
    with _damage(run):
        metrics = _json(path)
        measured = {name: metrics["systems"][name] for name in FLOORS if name in metrics["systems"]}
        floors = {name: {tag: dict(of or {}) for tag, of in by_tag.items()} for name, by_tag in measured.items()}
        outputs: dict[str, list[tuple[Sentence, str]]] = {}
        for row in _lines(hypotheses):
            sentence = (row["source"], tuple(row["references"]))
            outputs.setdefault(row["language"], []).append((sentence, row["hypothesis"]))
        controls = _controls(run, metrics, outputs)
        denoising, examples = _denoising(system / "denoising.jsonl"), _examples(run)
    results, parameters = [], []
    for one in chain(run):
        with _damage(one):
            paths = [folder / "result.json" for _, folder in stage_folders(one)]
            results += [(int(found["tokens"]), int(found["steps"])) for found in map(_json, filter(Path.exists, paths))]
            report = one.folder / "systems" / one.recipe.main_system / "initial" / REPORT_FILE
            parameters += [int(_json(report)["parameters"])] if report.exists() else []
    return Finished(
        run,
        floors,
        outputs,
        controls,
        denoising,
        examples,
        tokens=sum(tokens for tokens, _ in results),
        steps=sum(steps for _, steps in results),
        parameters=next(filter(None, parameters), None),
    )


@contextmanager
def _damage(run: GridRun) -> Iterator[None]:
    """Whatever is wrong with a file of `run` becomes `CheckpointError`."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"a run of the experiment is damaged ({type(error).__name__}: {error})",
            where=str(run.folder),
            remedy="remove this folder and start the experiment again: it is the only run that is repeated",
        ) from error


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> Iterator[Any]:
    # Not splitlines: texts may hold other characters that end a line.
    yield from map(json.loads, filter(str.strip, path.read_text(encoding="utf-8").split("\n")))


def _controls(run: GridRun, metrics: Mapping[str, Any], languages: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The source-use controls of each language that has them."""
    system = run.recipe.main_system
    return {
        tag: {
            **{name: float(use[name]) for name in MEANS},
            "outputs": use["outputs"],
            "permuted_chrf": float(use["permuted_chrf++"]["value"]),
            "reading": source_reading(metrics, system, tag),
        }
        for tag in languages
        if (use := metrics["source_use"][system].get(tag))
    }


def _denoising(path: Path) -> Texts:
    found: Texts = {}
    for row in _lines(path) if path.exists() else ():
        values = {name: float(row[name]) for name in ("nats", "tokens", "characters")}
        found.setdefault(row["language"], {})[row["text"]] = values
    return {language: dict(sorted(texts.items())) for language, texts in found.items()}


def _examples(run: GridRun) -> dict[str, int]:
    path = run.folder / "data" / "summary.json"
    if not path.exists():
        return {}
    return {str(tag): int(count) for tag, count in _json(path)["counts"]["train"].items()}
