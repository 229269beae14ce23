"""Which values of the searched settings each variant takes: the best ones on the development set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import mean
from typing import Any

from enc2gen.errors import CheckpointError
from enc2gen.evaluation.metrics import METRICS
from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.grid.planning import Planner, Settings, points
from enc2gen.experiments.grid.records import RunRecord


def choose(planner: Planner, searches: Sequence[GridRun]) -> tuple[dict[str, Settings], dict[str, Any]]:
    """The settings of each variant, and the scores that they were chosen by.

    The score of a combination of values is the headline metric on the development set, averaged over languages, then
    over tasks; a combination with a run that failed has none.

    Returns:
        Per variant, the best combination; a searched variant without any score is missing. And, for results.json, per
        variant: {settings: {values: score}, "chosen": {setting: value}}, with several settings joined by commas.
    """
    chosen: dict[str, Settings] = {}
    table: dict[str, Any] = {}
    metric = planner.experiment.headline
    better = max if METRICS.get(metric).higher_is_better else min
    for name, variant in planner.variants.items():
        searched = planner.searched(name, variant)
        tried: list[tuple[Settings, float | None]] = []
        for settings in points(searched):
            runs = [r for r in searches if r.kind == "search" and r.variant == name and r.settings == settings]
            found = [score for run in runs if (score := development_score(run, metric)) is not None]
            tried.append((settings, mean(found) if found and len(found) == len(planner.tasks) else None))
        if not tried:
            continue
        table[name] = {", ".join(searched): {_values(settings): score for settings, score in tried}}
        if known := [(score, settings) for settings, score in tried if score is not None]:
            chosen[name] = better(known, key=lambda pair: pair[0])[1]
            table[name]["chosen"] = dict(chosen[name])
    return chosen, table


def first_values(planner: Planner) -> dict[str, Settings]:
    """For each searched variant the first combination, as long as nothing is known."""
    found = {name: points(planner.searched(name, variant)) for name, variant in planner.variants.items()}
    return {name: settings[0] for name, settings in found.items() if settings}


def development_score(run: GridRun, metric: str) -> float | None:
    """The mean over languages of a metric of a finished run; None if it is not finished with today's inputs.

    Raises:
        CheckpointError: the file with the scores is damaged.
    """
    path = run.folder / "systems" / run.recipe.main_system / "scores.json"
    if not RunRecord(run).finished or not path.exists():
        return None
    try:
        by_language = json.loads(path.read_text(encoding="utf-8"))["scores"]
        values = [scores[metric]["value"] for scores in by_language.values() if scores.get(metric)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the scores of a run are damaged ({error})",
            where=str(path),
            remedy=f"remove {run.folder} and start the experiment again",
        ) from error
    return float(mean(values)) if values else None


def _values(settings: Settings) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for _, value in settings)
