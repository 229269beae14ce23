"""Finished runs of an experiment -> `results.json`: scores over seeds, paired differences, controls, floors, costs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from enc2gen import __version__
from enc2gen.errors import CheckpointError
from enc2gen.evaluation.metrics import METRICS
from enc2gen.experiments.grid.denoising import denoising
from enc2gen.experiments.grid.finished import MEANS, Finished, chain, read_finished
from enc2gen.experiments.grid.learning import MEAN, Losses, panels, speed
from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.grid.records import RunRecord
from enc2gen.experiments.grid.scoring import scores_and_differences, shared_languages
from enc2gen.experiments.provenance import code, machine, versions

NOT_FINISHED = "not finished"
"""Why a run is missing that neither failed nor is damaged."""
HEADLINE = "chrf++"
"""The metric of comparisons where an experiment names none."""


def collect(
    experiment: Mapping[str, Any],
    runs: Sequence[GridRun],
    *,
    scale: str | None = None,
    seeds: Sequence[int] = (),
    command: str = "",
    core_seconds: Mapping[str, float] | None = None,
    search: Mapping[str, Any] | None = None,
    failed: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What an experiment has shown so far, JSON-able; runs that are not finished are listed under `failed`.

    Args:
        experiment: its resolved definition; `reference`, `headline`, `published` and the
            variants' labels are read.
        runs: all runs of the grid, whether carried out or not; those of the search count for nothing here.
        scale, seeds, command: recorded as they are.
        core_seconds: name of a run -> seconds of processor time that it took.
        search: variant -> searched setting -> value -> development score, and `chosen`: setting -> value.
        failed: runs that failed, each with `run`, `cell`, `seed` and `reason`.

    A finished run with a damaged file counts as failed.

    Raises:
        ConfigError: runs of one cell were scored with different settings.
    """
    done, damaged = _finished(runs)
    curves = panels([run for run in runs if run.kind != "search" and RunRecord(run).finished])
    reference, headline = str(experiment["reference"]), str(experiment.get("headline", HEADLINE))
    scores, differences = scores_and_differences(done, headline, reference)
    spent = core_seconds or {}
    return {
        "experiment": dict(experiment),
        "headline": headline,
        "scale": scale,
        "seeds": list(seeds),
        "enc2gen": __version__,
        "versions": versions(),
        "code": _codes(done),
        "machine": {**machine(), "cores": os.cpu_count()},
        "command": command,
        **_of_cells(done, experiment, spent),
        "cells": scores,
        "paired": differences,
        "denoising": denoising(done, reference),
        "core_seconds": sum(spent.values()),
        "curves": _thin(curves),
        "speed": speed(curves, reference),
        "search": dict(search or {}),
        "failed": _failed(runs, done, [*failed, *damaged]),
        "published": experiment.get("published"),
    }


def _of_cells(
    done: Mapping[str, Sequence[Finished]], experiment: Mapping[str, Any], spent: Mapping[str, float]
) -> dict[str, Any]:
    """What is told of each cell beside its scores."""
    return {
        "grid": {cell: _place(found, experiment) for cell, found in done.items()},
        "higher_is_better": {name: METRICS.get(name).higher_is_better for name in _metric_names(done)},
        "controls": {cell: _controls(found) for cell, found in done.items()},
        "floors": _floors(done),
        "costs": {cell: _costs(found, spent) for cell, found in done.items()},
    }


def _finished(runs: Sequence[GridRun]) -> tuple[dict[str, list[Finished]], list[dict[str, Any]]]:
    """Cell -> its evaluated runs, in the order of the grid; and what is damaged, as it is listed under `failed`."""
    done: dict[str, list[Finished]] = {}
    damaged = []
    for run in runs:
        if run.kind != "task":
            continue
        try:
            if (finished := read_finished(run)) is not None:
                done.setdefault(run.cell, []).append(finished)
        except CheckpointError as error:
            damaged.append({"run": run.name, "cell": run.cell, "seed": run.seed, "reason": str(error)})
    return done, damaged


def _codes(done: Mapping[str, Sequence[Finished]]) -> dict[str, Any]:
    """Which code wrote these results, and which carried out how many of the runs ("unknown": before it was noted)."""
    carried = Counter(RunRecord(one.run).code or "unknown" for found in done.values() for one in found)
    return {"report": code(), "runs": dict(carried.most_common())}


def _place(found: Sequence[Finished], experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Where a cell lies in the grid, and by seed the folders of its runs and of the runs that they start from."""
    runs = [one.run for one in found]
    run = runs[0]
    own = experiment.get("variants", {}).get(run.variant) or {}
    return {
        "variant": run.variant,
        "label": own.get("label") or run.variant,
        "task": run.task,
        "size": run.size,
        "examples": dict(found[0].examples),
        "runs": {str(one.seed): one.folder.as_posix() for one in runs},
        "starts": {
            str(one.seed): {"verb": one.start.verb, "folder": one.start.folder.as_posix()}
            for one in runs
            if one.start is not None
        },
    }


def _metric_names(done: Mapping[str, Sequence[Finished]]) -> list[str]:
    lists = [one.run.recipe.evaluate.metrics for found in done.values() for one in found]
    return list(dict.fromkeys(name for names in lists for name in names))


# Controls, floors, costs


def _controls(found: Sequence[Finished]) -> dict[str, Any]:
    """Language -> means over seeds of the source-use controls, and how many seeds are shown to use their source."""
    controls: dict[str, Any] = {}
    for language in shared_languages(found):
        uses = [one.controls[language] for one in found if language in one.controls]
        if len(uses) < len(found):
            continue
        readings = [use["reading"] for use in uses]
        controls[language] = {
            **{name: _mean(use[name] for use in uses) for name in (*MEANS, "permuted_chrf")},
            "outputs": uses[0]["outputs"],
            "gain_seeds": {str(one.run.seed): use["gain"] for one, use in zip(found, uses, strict=True)},
            "reading_seeds": readings.count("yes") if "not measured" not in readings else None,
            "of_seeds": len(found),
        }
    return controls


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _floors(done: Mapping[str, Sequence[Finished]]) -> dict[str, Any]:
    """Task -> model-free system -> language -> metric -> score, of the first finished run at the task's largest size.

    Neither depends on the system, and the test set is the same for all seeds; the best constant string is looked for
    among the training targets, too.
    """
    floors: dict[str, Any] = {}
    for found in sorted(done.values(), key=lambda found: found[0].run.size or 0, reverse=True):
        floors.setdefault(str(found[0].run.task), dict(found[0].floors))
    return floors


def _costs(found: Sequence[Finished], spent: Mapping[str, float]) -> dict[str, Any]:
    """What one seed of a cell cost on average, the pretraining that it started from included."""
    # A run that took over equal training did not pay for it, but its model costs that much.
    timed = [sum(spent.get(one.name, 0.0) for run in chain(done.run) for one in _payers(run)) for done in found]
    return {
        "tokens": _mean(one.tokens for one in found),
        "steps": _mean(one.steps for one in found),
        "core_seconds": _mean(timed) if all(timed) else None,
        "parameters": next((one.parameters for one in found if one.parameters), None),
    }


def _payers(run: GridRun) -> list[GridRun]:
    return [run, *(_payers(run.same_training) if run.same_training is not None else ())]


def _thin(curves: Mapping[str, Mapping[str, Mapping[int, Losses]]]) -> dict[str, Any]:
    """Panel -> variant -> seed -> [tokens, mean validation loss] points."""
    return {
        panel: {
            variant: {
                str(seed): [[tokens, loss.get(MEAN)] for tokens, loss in losses] for seed, losses in seeds.items()
            }
            for variant, seeds in variants.items()
        }
        for panel, variants in curves.items()
    }


def _failed(
    runs: Sequence[GridRun], done: Mapping[str, Sequence[Finished]], failed: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The runs that failed, then those that are not finished for another reason."""
    listed = [dict(entry) for entry in failed]
    known = {entry["run"] for entry in listed} | {one.run.name for found in done.values() for one in found}
    for run in runs:
        if run.kind == "task" and run.name not in known:
            listed.append({"run": run.name, "cell": run.cell, "seed": run.seed, "reason": NOT_FINISHED})
    return listed
