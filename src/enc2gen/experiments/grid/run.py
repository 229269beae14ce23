"""Carry out an experiment: search, runs, statistics, report; whatever is finished is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from enc2gen.corpora.report_pages import replace_text, writing_report
from enc2gen.errors import OutputError
from enc2gen.experiments.grid.definition import Experiment
from enc2gen.experiments.grid.engines import RUNNERS
from enc2gen.experiments.grid.execution import Execution, Failure
from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.grid.planning import Planner, Settings
from enc2gen.experiments.grid.records import DEFINITION, RunRecord
from enc2gen.experiments.grid.report import REPORT_FILES, write_report
from enc2gen.experiments.grid.results import NOT_FINISHED, collect
from enc2gen.experiments.grid.searching import choose, first_values
from enc2gen.experiments.recipe import digest
from enc2gen.experiments.workspace import Workspace, refuse_foreign
from enc2gen.locking import locked_folder

RESULTS = "results.json"


@dataclass
class ExperimentRun:
    """One experiment in its folder.

    Args:
        planner: of its runs.
        scale: that it is carried out at; recorded.
        command: that started it; recorded.
        store: folder of what runs share.
        log: told one line at a time.
    """

    planner: Planner
    scale: str | None
    command: str
    store: Path
    log: Callable[[str], None]
    failed: list[Failure] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Folder of the experiment."""
        return self.planner.folder

    def run(self, *, engine: str = "local", jobs: int | None = None, overwrite: bool = False) -> Path:
        """Carry out what is not finished, then write results and report; returns the path of report.html.

        Args:
            engine, jobs: where, and how many runs at once (None: one per GPU, or else per core).
            overwrite: replace training that was done with other data.

        Raises:
            Interrupted: everything is saved; another call goes on.
            OutputError: the folder is something else, in use, or cannot be written.
            ConfigError: a run would not be valid, or the engine is unknown.
        """
        runner_class = RUNNERS.get(engine, where="--engine")
        searches = self.planner.searches()
        self.planner.runs(first_values(self.planner))  # mistakes in a recipe are found before anything is started
        with self._held(), runner_class(jobs, self.folder) as runner:
            execution = Execution(runner, self.store, self.log, overwrite=overwrite)
            if searches:
                self.log(f"search: {sum(run.kind == 'search' for run in searches)} runs")
                self.failed += execution.carry_out(searches)
            chosen, table = self._choose(searches)
            runs = self.planner.runs(chosen)
            self.failed += [failure for failure in execution.carry_out(runs) if failure not in self.failed]
            return self._write(runs, searches, table)

    def report(self) -> Path:
        """Write results and report of what is finished; carries out nothing. Raises as :meth:`run`."""
        searches = self.planner.searches()
        chosen, table = self._choose(searches)
        with self._held():
            return self._write(self.planner.runs(chosen), searches, table)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Check that the folder is this experiment's, lock it, and note the definition there."""
        marker = self.folder / DEFINITION
        refuse_foreign(self.folder, marker, "an experiment")
        if not marker.exists():  # before the lock's own file, with which alone the folder would be a foreign one
            self._note(marker)
        with locked_folder(self.folder):
            self._note(marker)  # only now: who holds the folder has noted its own
            yield

    def _note(self, marker: Path) -> None:
        definition = yaml.safe_dump(resolved(self.planner.experiment), sort_keys=False, allow_unicode=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(marker, definition)
        except OSError as error:
            raise OutputError(
                f"cannot write: {error.strerror}", where=str(self.folder), remedy="check space and rights"
            ) from error

    def _choose(self, searches: Sequence[GridRun]) -> tuple[dict[str, Settings], dict[str, Any]]:
        """What the search has chosen; runs with damaged scores count as failed."""

        def damaged(run: GridRun, reason: str) -> None:
            self.log(f"{run.name}: FAILED, {reason}")
            self.failed.append(Failure(run, None, reason))

        return choose(self.planner, searches, damaged)

    def _write(self, runs: Sequence[GridRun], searches: Sequence[GridRun], table: Mapping[str, Any]) -> Path:
        experiment = self.planner.experiment
        wanted = self.planner.variants
        results = collect(
            resolved(experiment, wanted),
            [run for run in runs if run.variant in wanted],  # without what these took over from other variants
            scale=self.scale or "",
            seeds=experiment.seeds,
            command=self.command,
            core_seconds={run.name: RunRecord(run).core_seconds for run in [*searches, *runs]},
            search=table,
            failed=[failure.to_json() for failure in self.failed],
        )
        known, by_name = {failure.run.name for failure in self.failed}, {run.name: run for run in runs}
        for entry in results["failed"]:
            if entry["reason"] != NOT_FINISHED and entry["run"] not in known:  # its files are damaged
                self.failed.append(Failure(by_name[entry["run"]], None, entry["reason"]))
        self._keep_earlier(results)
        Workspace.write_json(self.folder / RESULTS, results)
        return write_report(results, self.folder)

    def _keep_earlier(self, results: Mapping[str, Any]) -> None:
        """Move results and report that hold what the new ones will not (other runs or reference) to `earlier/`."""
        path = self.folder / RESULTS
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            held, reference = _held(before), before["experiment"]["reference"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # none, or not whole
        if reference == results["experiment"]["reference"] and held <= _held(results):
            return
        name = "-".join(filter(None, (before.get("scale"), digest(before)[:8])))
        target = self.folder / "earlier" / name
        with writing_report(target):
            target.mkdir(parents=True, exist_ok=True)
            for file in (RESULTS, *REPORT_FILES):
                if (self.folder / file).exists():
                    (self.folder / file).replace(target / file)
        self.log(f"the earlier report is of other runs, and is kept: {target}")


def _held(results: Mapping[str, Any]) -> set[tuple[Any, ...]]:
    """Scale, cell, seed and folder of the runs that results are made of."""
    return {
        (results["scale"], cell, seed, Path(folder).name)
        for cell, place in results["grid"].items()
        for seed, folder in place["runs"].items()
    }


def resolved(experiment: Experiment, only: Collection[str] | None = None) -> dict[str, Any]:
    """The definition with its factors multiplied out into variants, JSON-able; a definition again.

    Args:
        only: variants that it is to have beside the reference; all by default.
    """
    variants = {
        name: variant.model_dump(mode="json")
        for name, variant in experiment.all_variants.items()
        if only is None or name in only or name == experiment.reference
    }
    return experiment.model_dump(mode="json", exclude={"factors"}) | {"variants": variants}


def counted(planner: Planner) -> tuple[list[GridRun], list[GridRun], dict[str, Settings]]:
    """The runs of the search, all other runs with the first value of each searched setting, and those values."""
    searches, chosen = planner.searches(), first_values(planner)
    wanted = planner.variants
    return searches, planner.runs(chosen), {name: values for name, values in chosen.items() if name in wanted}
