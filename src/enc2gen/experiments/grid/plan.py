"""One run of an experiment, and what it is part of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from enc2gen.experiments.recipe import Recipe

RunKind = Literal["pretrain", "task", "search"]

VERBS = {"build": "build", "pretrain": "pretrain", "evaluate": "evaluate", "report": "run"}
"""Stage that a run is carried out up to -> verb of the command."""

ONLY_TASK = "task"
"""Name of the task of an experiment that names none."""


@dataclass(frozen=True)
class GridRun:
    """One recipe with one system, carried out in a folder of its own.

    Attributes:
        cell: "variant", or "variant/task" or "variant/task/size" where there are several; of a "pretrain" run the
            variant.
        variant: its name in the experiment.
        task: "task" where the experiment names no tasks; None for a "pretrain" run.
        size: training examples of the task (`train_limit`); None where the experiment has no sizes.
        seed: of everything random.
        folder: of the run.
        recipe: what is carried out there; `recipe.main_system` is the name of its only system.
        kind: "pretrain" (trained only), "task" (evaluated on the test set), "search" (evaluated on the development
            set, to choose settings).
        start: the run whose model it goes on from: trained, or built if `start.stage` is "build".
        same_training: an earlier run that trains exactly the same model; this one takes it over and evaluates it.
        stage: the stage that it is carried out up to.
        settings: searched settings, dotted, and their values.
    """

    cell: str
    variant: str
    task: str | None
    size: int | None
    seed: int
    folder: Path
    recipe: Recipe
    kind: RunKind
    start: GridRun | None = None
    same_training: GridRun | None = None
    stage: str = "report"
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def verb(self) -> str:
        """The verb of the command that carries it out: `enc2gen VERB RECIPE`."""
        return VERBS[self.stage]

    @property
    def model(self) -> Path:
        """Folder of the model that a "pretrain" run leaves."""
        name = "pretrained" if self.stage == "pretrain" else "initial"
        return self.folder / "systems" / self.recipe.main_system / name

    @property
    def needs(self) -> tuple[GridRun, ...]:
        """Runs that must be finished before this one begins."""
        return tuple(run for run in (self.start, self.same_training) if run is not None)
