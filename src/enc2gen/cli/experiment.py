"""`enc2gen experiment`: a grid of runs that answers a question, with its statistics and report."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from enc2gen.cli.bridge import listed
from enc2gen.errors import ConfigError

if TYPE_CHECKING:
    from enc2gen.experiments.grid.definition import Experiment
    from enc2gen.experiments.grid.planning import Planner
    from enc2gen.experiments.grid.run import ExperimentRun

OUTPUT = Path("runs/experiments")

console = Console()


def register(app: typer.Typer) -> None:
    """Add the command `experiment`."""
    app.command("experiment")(experiment)


def experiment(
    name: Annotated[
        str | None,
        typer.Argument(help="A shipped experiment, a YAML file, or a results.json to do again; none: list them."),
    ] = None,
    scale: Annotated[
        str | None, typer.Option("--scale", help="tiny, small, paper; the definition's first by default.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Number of seeds instead of its own.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with corpora, which {data} in paths stands for.")
    ] = None,
    languages: Annotated[
        str | None, typer.Option("--languages", "-l", help="Languages to write instead of its own, such as sw,ha.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Runs at once; one per GPU, or else per core.")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="local, or ray: a cluster with a shared folder.")] = "local",
    only: Annotated[list[str] | None, typer.Option("--only", help="Carry out this variant alone. Repeatable.")] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Variant to compare with, instead of its own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder instead of runs/experiments/NAME.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace training done with other data.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write the report of what is finished; run nothing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the grid; do nothing.")] = False,
) -> None:
    """Answer a question by a grid of runs: variants x tasks x sizes x seeds, compared pair by pair, with a report.

    Finished runs are kept; after Ctrl-C or a failure the same command goes on.
    """
    if name is None:
        _list()
        return
    from enc2gen.experiments.grid.definition import load_experiment

    definition, chosen = load_experiment(
        name, scale=scale, seeds=seeds, languages=listed(languages), reference=reference
    )
    planner = _planner(definition, data, only or (), output)
    if dry_run:
        print_grid(planner, chosen)
        return
    from enc2gen.experiments.grid.report import print_results
    from enc2gen.experiments.grid.run import RESULTS, ExperimentRun

    folder = planner.folder
    command = f"enc2gen {shlex.join(sys.argv[1:])}"
    run = ExperimentRun(planner, chosen, command, folder.parent / "store", _say)
    page = run.report() if report else run.run(engine=engine, jobs=jobs, overwrite=overwrite)
    print_results(json.loads((folder / RESULTS).read_text(encoding="utf-8")), console)
    _say(f"report: {page}; tables: {folder / 'report.md'}; figures: {folder / 'results.json'}")
    if run.failed:
        _print_failures(run)
        raise typer.Exit(1)


def _planner(definition: Experiment, data: Path | None, only: Sequence[str], output: Path | None) -> Planner:
    """What plans the runs of the experiment."""
    from enc2gen.experiments.grid.planning import Planner

    if data is not None and not data.is_dir():
        raise ConfigError(f"there is no folder {data}", where="--data", remedy="name the folder with the corpora")
    return Planner(definition, output or OUTPUT / definition.name, data, tuple(only))


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_failures(run: ExperimentRun) -> None:
    for failure in run.failed:
        _say(f"\nfailed: {failure.run.name}, {failure.reason}")
        if failure.tail:
            _say("  " + failure.tail.replace("\n", "\n  "))
            _say(f"  whole log: {failure.run.folder / 'log.txt'}")
    _say("\nThe report is made of what there is. Once repaired, the same command does what is missing.")


def _list() -> None:
    """The shipped experiments with their questions."""
    from enc2gen.experiments.grid.definition import shipped

    table = Table("experiment", "question", "scales", box=None, pad_edge=False)
    for name, content in shipped().items():
        table.add_row(name, str(content.get("question", "")), ", ".join(content.get("scales") or {}))
    console.print(table)
    _say("\nWhat one would do: enc2gen experiment NAME --dry-run")


def print_grid(planner: Planner, scale: str | None) -> None:
    """Print variants, tasks, sizes, seeds, the number of runs, and where they go."""
    from enc2gen.experiments.grid.run import counted
    from enc2gen.experiments.prepare import missing_files

    definition = planner.experiment
    searches, runs, assumed = counted(planner)
    _say(f"# {definition.name}{f' at scale {scale}' if scale else ''}: {definition.question}")
    if definition.description:
        _say(f"# {definition.description.strip()}")
    _say(f"variants: {'; '.join(planner.variants)} (reference: {definition.reference})")
    _say(f"tasks: {', '.join(planner.tasks)}; metric: {definition.headline}")
    if definition.sizes:
        _say(f"sizes: {', '.join(f'{size:,}' for size in definition.sizes)} training examples")
    _say(f"seeds: {', '.join(map(str, definition.seeds))}")
    for variant, settings in assumed.items():
        values = definition.searched(planner.variants[variant])
        _say(f"search, {variant}: {values}; first seed, development set; the plan below assumes {dict(settings)}")
    kinds = {"search": searches, "pretrain": [*searches, *runs], "task": runs}
    counts = {kind: len({r.folder for r in among if r.kind == kind}) for kind, among in kinds.items()}
    shared = sum(run.same_training is not None for run in runs)
    _say(
        f"runs: {counts['task']} of tasks, {counts['pretrain']} of pretraining, {counts['search']} of the search"
        + (f"; {shared} of them take over the training of another" if shared else "")
    )
    _say(f"output: {planner.folder}")
    for name in dict.fromkeys(name for run in [*searches, *runs] for name in missing_files(run.recipe)):
        _say(f"not there yet: {name}")
    for run in {run.folder: run for run in [*searches, *runs]}.values():
        _say(f"  {run.folder.relative_to(planner.folder)}  ({run.kind}, up to {run.stage})")
