"""What is remembered of a run: with which inputs it was finished, and what its attempts cost."""

from __future__ import annotations

import filecmp
import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from enc2gen import __version__
from enc2gen.data.held_out import DRAWN, how_split
from enc2gen.errors import OutputError
from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.prepare import data_files, fingerprint
from enc2gen.experiments.provenance import code
from enc2gen.experiments.recipe import digest
from enc2gen.experiments.store import link_file, link_tree
from enc2gen.experiments.workspace import MARKER, Workspace, replace_folder
from enc2gen.training.checkpoint import write_json

RECORD = "grid.json"
DEFINITION = "experiment.yaml"
"""Of an experiment, in its folder."""

RECIPE = "recipe.yaml"
LOG = "log.txt"
TRAINING_STAGES = ("prepare", "vocabulary-", "adapt-", "build-", "pretrain-", "finetune-")
MODEL_FOLDERS = ("initial", "pretrain", "pretrained", "finetune", "finetuned")


class RunRecord:
    """The record of one run, a file in its folder.

    Args:
        run: whose record it is.
    """

    def __init__(self, run: GridRun) -> None:
        self.run = run
        self.path = run.folder / RECORD
        try:
            self._content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a run without a record is looked at again by its own stages
            self._content = {"attempts": [], "finished": None}

    @property
    def inputs(self) -> str:
        """Hash of what the run depends on beside its settings, which its folder stands for."""
        return self._inputs([RunRecord(other).inputs for other in self.run.needs])

    def _inputs(self, before: list[str | None]) -> str:
        """That hash, given those of the runs that this one needs."""
        recipe, system = self.run.recipe, self.run.recipe.main_system
        names = [*data_files(recipe), recipe.encoder.name]
        own = recipe.encoder_of(system).name
        names += [own] if own != recipe.encoder.name else []
        # A model that another run of the grid made has its inputs in `before`.
        model = recipe.systems[system].whole_model if self.run.start is None else None
        names += [model] if model is not None else []
        depends = [__version__, self.run.stage, system, fingerprint(*names), before]
        splits = [how_split(data.task, data.fields, own_files=data.own_files) for data in recipe.data.datasets]
        depends += sorted({mark for marks in splits for mark in marks.values()})
        depends += [DRAWN] if self.run.kind != "pretrain" and recipe.evaluate.limit is not None else []
        return digest(depends)

    @property
    def finished(self) -> bool:
        """Whether the run is finished, with the inputs that there are now."""
        return bool(self._content["finished"] == self.inputs)

    @property
    def code(self) -> str | None:
        """Stands for the code that carried it out; None if that was not noted."""
        return self._content.get("code")

    @property
    def core_seconds(self) -> float:
        """Seconds of processor time that all attempts took."""
        return float(sum(attempt["core_seconds"] for attempt in self._content["attempts"]))

    def begin(self) -> None:
        """Note what the run depends on before it reads any of it: what changes meanwhile is not what it was done with.

        Of the runs that it needs, that is what they were finished with.
        """
        started = self._inputs([RunRecord(other)._content["finished"] for other in self.run.needs])
        self._content = {**self._content, "finished": None, "started": started, "code": code()}
        write_json(self.path, self._content)

    def add(self, status: int, core_seconds: float, wall_seconds: float) -> None:
        """Remember an attempt: exit status of its process, seconds of processor time and of real time."""
        attempt = {
            "status": status,
            "core_seconds": round(core_seconds, 2),
            "wall_seconds": round(wall_seconds, 2),
        }
        finished = self._content.get("started") if status == 0 else None
        attempts = [*self._content["attempts"], attempt]
        self._content = {**self._content, "attempts": attempts, "finished": finished}
        write_json(self.path, self._content)


def make_ready(run: GridRun) -> None:
    """Write recipe and record into the run's folder, and take over the training of a run with the same one."""
    run.folder.mkdir(parents=True, exist_ok=True)
    Workspace.write_json(run.folder / MARKER, {"name": run.recipe.name})
    _write_recipe(run, run.folder)
    RunRecord(run).begin()
    if run.same_training is None:
        _mark_trained(run)
    elif _differs(run.same_training.folder, run):
        _take_over(run.same_training.folder, run.folder, run.recipe.main_system)


def take_finished(run: GridRun) -> str | None:
    """Take over all of the same run of an experiment beside this one, if one has finished it.

    The same run has the same name, which holds a hash of its settings, and was finished with the inputs that there are
    now. Only a run that was never begun is taken over; it has its own recipe, and what the other one cost. Pretraining
    without its weights is none to start from.

    Returns:
        The name of that experiment's folder; None if there is none, or its files cannot be had.
    """
    if run.folder.exists():
        return None
    for other in sorted(run.folder.absolute().parents[2].glob(f"*/runs/{run.name}")):
        experiment = other.parents[1]
        if (
            (experiment / DEFINITION).is_file()
            and RunRecord(found := replace(run, folder=other)).finished
            and not (run.kind == "pretrain" and lost_weights(found.model))
            and _said(other / RECIPE) == _settings(_given(run))
        ):

            def take(folder: Path, other: Path = other) -> None:
                # Weights and data are only ever replaced, and can be links; what may be written into is copied.
                links = (".safetensors", ".parquet")
                link_tree(other, folder, leave_out=(".lock", "cache", RECIPE), suffixes=links)
                _write_recipe(run, folder)

            with suppress(OSError, OutputError):  # then the run is carried out, and says what is wrong
                replace_folder(run.folder, take)
                return experiment.name
    return None


def lost_weights(model: Path) -> bool:
    """Whether a model's weights are gone, which are often removed from finished runs for the room they take."""
    return (model / "config.json").is_file() and not any(model.glob("*.safetensors"))


def _given(run: GridRun) -> dict[str, Any]:
    return run.recipe.model_dump(mode="json", exclude_unset=True)


def _write_recipe(run: GridRun, folder: Path) -> None:
    text = yaml.safe_dump(_given(run), sort_keys=False, allow_unicode=True)
    (folder / RECIPE).write_text(text, encoding="utf-8")


def _said(recipe: Path) -> Any:
    """What a recipe's file says that is not the experiment's; None if it cannot be read."""
    try:
        return _settings(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _settings(recipe: Any) -> Any:
    """A recipe without what says which experiment it belongs to; of a path to start from, the run and its model."""
    if not isinstance(recipe, dict):
        return None
    systems = {
        name: system | ({"start": Path(system["start"]).parts[-4:]} if system.get("start") else {})
        for name, system in recipe.get("systems", {}).items()
    }
    return {key: value for key, value in recipe.items() if key not in ("description", "output")} | {"systems": systems}


def _mark_trained(run: GridRun) -> None:
    """Have an empty folder of checkpoints tell that training would be lost if a finished stage's folder were replaced.

    `tidy` leaves it; runs that were tidied before it did get it here, before they are begun again.
    """
    for stage in ("pretrain", "finetune"):
        folder = run.folder / "systems" / run.recipe.main_system / stage
        if (folder / "result.json").exists():
            (folder / "checkpoints").mkdir(exist_ok=True)


def _differs(source: Path, run: GridRun) -> bool:
    """Whether `run` is to take over what training `source` has left: it has no training yet, or took over another one.

    Training of its own, which has checkpoints, is left to its stages, which keep it, or refuse to replace it.
    """
    if not (run.folder / "stages").exists():
        return True
    system = run.folder / "systems" / run.recipe.main_system
    if any((system / stage / "checkpoints").exists() for stage in ("pretrain", "finetune")):
        return False
    own = _stage_keys(run.folder)
    return any(own.get(stage) != key for stage, key in _stage_keys(source).items())


def _stage_keys(folder: Path) -> dict[str, Any]:
    """Training stage -> what it was finished with."""
    paths = [path for path in (folder / "stages").glob("*.json") if path.name.startswith(TRAINING_STAGES)]
    found = {}
    for path in paths:
        with suppress(OSError, ValueError, LookupError, TypeError):  # as if it were not finished
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))["key"]
    return found


def _take_over(source: Path, target: Path, system: str) -> None:
    """Link everything that training `source` has left, in the place of what was taken over before; what measures and
    reports is made anew."""
    for path in (target / "stages").glob("*"):
        if path.name.startswith(TRAINING_STAGES):
            path.unlink()
    for name in ("data", "encoders", *(f"systems/{system}/{folder}" for folder in MODEL_FOLDERS)):
        shutil.rmtree(target / name, ignore_errors=True)
        if (source / name).is_dir():
            link_tree(source / name, target / name, leave_out=("cache", "checkpoints"))
    (target / "stages").mkdir(exist_ok=True)
    for path in (source / "stages").iterdir():
        if path.name.startswith(TRAINING_STAGES):
            shutil.copy2(path, target / "stages" / path.name)


def tidy(run: GridRun) -> None:
    """Free what a finished run does not need any more: training states, and second copies of its model."""
    system = run.folder / "systems" / run.recipe.main_system
    for stage in ("pretrain", "finetune"):
        shutil.rmtree(system / stage / "checkpoints", ignore_errors=True)
    if run.same_training is None:
        _mark_trained(run)
    model = run.folder / "model"
    final = system / ("finetuned" if run.recipe.finetune is not None else "pretrained")
    for path in final.glob("*.safetensors") if model.is_dir() else ():
        if (model / path.name).exists():
            link_file(path, model / path.name)
    if run.start is not None:
        for path in (system / "initial").glob("*.safetensors"):
            other = run.start.model / path.name
            if other.is_file() and filecmp.cmp(path, other, shallow=False):
                link_file(other, path)
