"""Which values of the searched settings each variant takes: the best ones on the development set."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from enc2gen.errors import CheckpointError
from enc2gen.evaluation.metrics import METRICS
from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.grid.planning import Planner, Settings, points
from enc2gen.experiments.grid.records import RunRecord


def choose(
    planner: Planner, searches: Sequence[GridRun], damaged: Callable[[GridRun, str], None] | None = None
) -> tuple[dict[str, Settings], dict[str, Any]]:
    """The settings of each variant, and the scores that they were chosen by.

    The score of a combination of values is the headline metric on the development set, averaged over languages, then
    over tasks; a combination with a run that failed, or whose scores are damaged, has none.

    Args:
        planner: of the runs.
        searches: the runs of the search.
        damaged: told each run whose scores are damaged, and what is wrong with them.

    Returns:
        Per variant, the best combination; a searched variant without any score is missing. Of a variant that is not
        carried out, it is known once all its scores are. And, for results.json, per variant that is carried out:
        {settings: {values: score}, "chosen": {setting: value}}, with several settings joined by commas.
    """
    chosen: dict[str, Settings] = {}
    table: dict[str, Any] = {}
    metric = planner.experiment.headline

    def score(run: GridRun) -> float | None:
        try:
            return development_score(run, metric)
        except CheckpointError as error:
            if damaged is not None and run.variant in planner.variants:
                damaged(run, str(error))
            return None

    better = max if METRICS.get(metric).higher_is_better else min
    wanted = planner.variants
    for name, variant in planner.every.items():
        searched = planner.searched(name, variant)
        tried: list[tuple[Settings, float | None]] = []
        for settings in points(searched):
            among = searches if name in wanted else planner.searching
            runs = [r for r in among if r.kind == "search" and r.variant == name and r.settings == settings]
            found = [value for run in runs if (value := score(run)) is not None]
            tried.append((settings, mean(found) if found and len(found) == len(planner.tasks) else None))
        known = [(value, settings) for settings, value in tried if value is not None]
        # Another variant may yet choose otherwise, as long as not all of its search is done.
        if known and (name in wanted or len(known) == len(tried)):
            chosen[name] = better(known, key=lambda pair: pair[0])[1]
        if tried and name in wanted:
            table[name] = {", ".join(searched): {_values(settings): value for settings, value in tried}}
            table[name] |= {"chosen": dict(chosen[name])} if known else {}
    return chosen, table


def first_values(planner: Planner) -> dict[str, Settings]:
    """For each searched variant, carried out or not, the first combination, as long as nothing is known."""
    found = {name: points(planner.searched(name, variant)) for name, variant in planner.every.items()}
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
        values = [float(scores[metric]["value"]) for scores in by_language.values() if scores.get(metric)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the scores of a run are damaged ({error})",
            where=str(path),
            remedy=f"remove {run.folder} and start the experiment again",
        ) from error
    return float(mean(values)) if values else None


def _values(settings: Settings) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for _, value in settings)
