"""The folder of a run: which stage is done with which settings, and where everything lies."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from enc2gen.errors import CheckpointError, OutputError
from enc2gen.experiments.recipe import Recipe
from enc2gen.training.checkpoint import write_json, writing
from enc2gen.training.runtime import cpu_processes

MARKER = "enc2gen-run.json"


def replace_folder(target: Path, fill: Callable[[Path], object]) -> None:
    """Have a folder written whole by `fill`, then put it in the place of an older `target`; may raise `OutputError`."""
    temporary = target.with_name(f".{target.name}.tmp")
    with writing(target):
        shutil.rmtree(temporary, ignore_errors=True)
        fill(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)


def refuse_foreign(folder: Path, marker: Path, what: str) -> None:
    """Raise `OutputError` if `folder` holds something and not the file `marker`, which tells that it is `what`."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not marker.exists()):
        raise OutputError(
            f"the output folder exists and is not {what} of enc2gen",
            where=str(folder),
            remedy="choose another folder with --output, or move this one away",
        )


class Workspace:
    """Files of one run, and the memory of its finished stages.

    A stage is identified by a key: a hash of everything it depends on. A finished stage with the same key is not run
    again; with another key its old output is replaced.

    Under `accelerate launch` every process has a workspace; only the first one writes, and all wait for each other.

    Args:
        recipe: of the run.
        overwrite: replace training that was done with other settings, instead of refusing.

    Raises:
        OutputError: the folder holds something else than a run, or cannot be written.
    """

    def __init__(self, recipe: Recipe, *, overwrite: bool = False) -> None:
        self.recipe = recipe
        self.overwrite = overwrite
        self.root = recipe.folder
        self.processes = PartialState(cpu=cpu_processes())
        if self.processes.is_main_process:
            self._open()
        self.processes.wait_for_everyone()

    def _open(self) -> None:
        marker = self.root / MARKER
        refuse_foreign(self.root, marker, "a run")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.write_json(marker, {"name": self.recipe.name})
        except OSError as error:
            raise OutputError(
                f"cannot write: {error.strerror}", where=str(self.root), remedy="check space and rights"
            ) from error

    def record_recipe(self) -> None:
        """Keep the resolved recipe beside the results."""
        if self.processes.is_main_process:
            self.write_json(self.root / "recipe.json", self.recipe.model_dump(mode="json"))

    @property
    def data(self) -> Path:
        """Prepared examples."""
        return self.root / "data"

    def encoder(self, variant: str, *parts: str) -> Path:
        """Folder of a prepared encoder and its tokenizer, before language tokens are added."""
        return self.root.joinpath("encoders", variant, *parts)

    def system(self, name: str, *parts: str) -> Path:
        """Folder of a system."""
        return self.root.joinpath("systems", name, *parts)

    @staticmethod
    def write_json(path: Path, value: Any) -> None:
        """Write `value`: a reader sees the old file or the new one, never half of it; may raise `OutputError`."""
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, value)

    def read_json(self, path: Path) -> Any:
        """Read a file of this run; `CheckpointError` if it is missing or damaged."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(path, error) from error

    def read_lines(self, path: Path) -> list[Any]:
        """Read a file of JSON lines of this run; `CheckpointError` if it is missing or damaged."""
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
            return [json.loads(line) for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            raise self._damaged(path, error) from error

    def _damaged(self, path: Path, error: Exception) -> CheckpointError:
        # Not the folder of all stages: without NAME.started, training that is there is taken for another's.
        record = path if path.parent == self.root / "stages" else self._record(self._maker(path))
        if record.exists():
            remedy = f"remove {record} (that file alone) and run again: this stage is repeated"
        else:
            remedy = (
                f"remove from {self.root / 'stages'} the NAME.json, not the NAME.started, of the stage that writes it, "
                "and run again: that stage is repeated"
            )
        return CheckpointError(f"a file of the run is missing or damaged ({error})", where=str(path), remedy=remedy)

    def _maker(self, path: Path) -> str:
        """The stage that writes a file of the run: by its place; perhaps one that this run does not have."""
        match path.relative_to(self.root).parts if path.is_relative_to(self.root) else ():
            case ("data", *_):
                return "prepare"
            case ("encoders", variant, "adaptation" | "adaptation.json", *_):
                return f"adapt-{variant}"
            case ("encoders", variant, *_):
                return f"vocabulary-{variant}"
            case ("systems", system, "initial", *_):
                return f"build-{system}"
            case ("systems", system, "pretrain" | "pretrained", *_):
                return f"pretrain-{system}"
            case ("systems", system, "finetune" | "finetuned", *_):
                return f"finetune-{system}"
            case ("systems", system, _):
                return f"evaluate-{system}"
            case ("floors.json",):
                return "evaluate-floors"
            case ("controls", name):
                return f"control-{Path(name).stem}"
            case ("bridges", bridge, seed, _, "scores.json"):
                return f"evaluate-{bridge}-{seed}"
            case ("bridges", bridge, seed, step, *_):
                return f"train-{bridge}-{seed}-{step}"
        return path.stem

    def _record(self, stage: str) -> Path:
        """Where it stands that `stage` is finished."""
        return self.root / "stages" / f"{stage}.json"

    def key(self, stage: str) -> str | None:
        """Key that `stage` was last finished with."""
        path = self._record(stage)
        try:
            return self.read_json(path)["key"] if path.exists() else None
        except CheckpointError:
            if path.exists():
                raise
            return None  # another process has just begun the stage with another key

    def done(self, stage: str, key: str) -> bool:
        """Whether `stage` is finished with exactly this key."""
        return self.key(stage) == key

    def run_stage(
        self,
        stage: str,
        key: str,
        work: Callable[[], Any],
        *,
        folder: Path | None = None,
        everywhere: bool = False,
    ) -> None:
        """Run `work`, and remember that `stage` is finished with `key`.

        Args:
            folder: emptied first if it holds the output of other settings; an interrupted run of the same goes on.
            everywhere: run `work` in every process (training), not only in the first.
        """
        main = self.processes.is_main_process
        if main:
            self._begin(stage, key, folder)
        self.processes.wait_for_everyone()
        start = time.perf_counter()
        if main or everywhere:
            work()
        if main:
            seconds = round(time.perf_counter() - start, 2)
            self.write_json(self._record(stage), {"key": key, "seconds": seconds})
        self.processes.wait_for_everyone()

    def check_training(self, stage: str, key: str, folder: Path) -> None:
        """Refuse to replace training in `folder`, of `stage`, that was done with another key; changes nothing.

        Raises:
            OutputError: there is such training, and the run shall not overwrite it.
        """
        if self.overwrite or self.done(stage, key) or self._began(stage, key):
            return
        if folder.exists() and any(folder.rglob("checkpoints")):
            raise OutputError(
                "this folder holds training with other settings, data or seed",
                where=str(folder),
                remedy="choose another folder with --output, or replace it with --overwrite",
            )

    def _began(self, stage: str, key: str) -> bool:
        """Whether the last attempt at `stage` was with this key: what lies in its folder is of that."""
        started = self.root / "stages" / f"{stage}.started"
        return started.exists() and started.read_text() == key

    def _begin(self, stage: str, key: str, folder: Path | None) -> None:
        if self._began(stage, key):
            return
        started = self.root / "stages" / f"{stage}.started"
        if folder is not None:
            self.check_training(stage, key, folder)
        with writing(started):
            # First: should this attempt fail, what is left is not what was finished with the old key.
            self._record(stage).unlink(missing_ok=True)
            if folder is not None and folder.exists():
                shutil.rmtree(folder)
        with writing(started):  # whole or not at all: with half a key, a full disk would cost the training below
            started.parent.mkdir(exist_ok=True)
            temporary = started.with_name(f".{started.name}.tmp")
            temporary.write_text(key)
            temporary.replace(started)

    def seconds(self) -> dict[str, float]:
        """Duration of each finished stage."""
        return {path.stem: self.read_json(path)["seconds"] for path in sorted((self.root / "stages").glob("*.json"))}
