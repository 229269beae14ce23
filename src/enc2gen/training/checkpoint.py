"""Checkpoints that are either whole or not there: safetensors and JSON only, never pickle.

A checkpoint is a folder. It is written under a temporary name; every file is flushed to the disk and hashed;
the marker `COMPLETE.json` (sizes and SHA-256 of all files) is written last; then the folder is renamed.
A crash at any moment leaves the previous checkpoints as they were.

    checkpoints/step-00000100/{model/, optimizer.safetensors, rng.safetensors, trainer.json, COMPLETE.json}
    checkpoints/best-00000080/{model/, COMPLETE.json}           weights only
    checkpoints/{last,best}.json                                pointers
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from enc2gen.errors import CheckpointError, OutputError

MARKER = "COMPLETE.json"
FORMAT = 1
_TEMPORARY = ".tmp-"
_DISCARDED = ".old-"


def write_json(path: Path, value: object) -> None:
    """Replace the file at `path` atomically and durably by `value` as JSON."""
    temporary = path.with_name(_TEMPORARY + path.name)
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders; its renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seal(path: Path) -> dict[str, Any]:
    """Flush the file at `path` to the disk; its size and SHA-256."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Disk full, no permission and the like become `OutputError`."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"could not be written: {reason}",
            where=str(where),
            remedy="free disk space or check permissions, then start again: earlier checkpoints and models are intact",
        ) from error


def write_checkpoint(path: Path, fill: Callable[[Path], None], info: Mapping[str, Any]) -> None:
    """Create or replace the checkpoint folder `path`.

    Args:
        fill: writes the content into the folder it is given.
        info: JSON-able facts that go into the marker.

    Raises:
        OutputError: it cannot be written; what was at `path` before is still there.
    """
    temporary = path.with_name(_TEMPORARY + path.name)
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            fill(temporary)
            files = sorted(file for file in temporary.rglob("*") if file.is_file())
            sealed = {file.relative_to(temporary).as_posix(): _seal(file) for file in files}
            for folder in {file.parent for file in files}:
                _sync_folder(folder)
            write_json(temporary / MARKER, {**info, "format": FORMAT, "files": sealed})
            _publish(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _publish(temporary: Path, path: Path) -> None:
    discarded = path.with_name(_DISCARDED + path.name)
    if path.exists():
        shutil.rmtree(discarded, ignore_errors=True)
        path.rename(discarded)
    try:
        temporary.rename(path)
    except OSError:
        if discarded.exists():
            discarded.rename(path)
        raise
    _sync_folder(path.parent)
    shutil.rmtree(discarded, ignore_errors=True)


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """The marker of the checkpoint at `path`, after checking the size and hash of every file.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or this is no checkpoint; names the file.
    """
    marker = path / MARKER
    remedy = "resume from another checkpoint, or start again in a new output folder"
    if not marker.is_file():
        raise CheckpointError(
            "is not a complete enc2gen checkpoint: it has no marker file", where=str(marker), remedy=remedy
        )
    try:
        info = json.loads(marker.read_text(encoding="utf-8"))
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in info["files"].items()}
        version = info["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("the marker file is damaged or foreign", where=str(marker), remedy=remedy) from error
    if version != FORMAT:
        raise CheckpointError(
            f"checkpoint format {version!r} is not {FORMAT}",
            where=str(marker),
            remedy="use the enc2gen that wrote it",
        )
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError("the file is missing", where=str(file), remedy=remedy)
        actual = file.stat().st_size
        if actual != size:
            problem = "truncated" if actual < size else "foreign"
            raise CheckpointError(f"the file is {problem}: {actual} of {size} bytes", where=str(file), remedy=remedy)
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                raise CheckpointError("the file's content has changed", where=str(file), remedy=remedy)
    return dict(info)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar per file, across the trainer's own progress line."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def save_weights(model: nn.Module, folder: Path, *, trained_only: bool = False) -> None:
    """Write `model` into `folder`, weights in one file: `save_pretrained` where there is one.

    Args:
        trained_only: write the parameters that need gradients, and nothing else.
    """
    if trained_only:
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        safetensors.torch.save_file(trained, folder / "model.safetensors")
    elif isinstance(model, PreTrainedModel):
        with _no_progress_bars():
            model.save_pretrained(folder, max_shard_size="100TB")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(model, str(folder / "model.safetensors"))


def load_weights(model: nn.Module, folder: Path, *, trained_only: bool = False) -> None:
    """Copy the weights that :func:`save_weights` wrote into `model`, in place; tied parameters stay tied.

    Args:
        trained_only: the file holds the parameters that need gradients only; the others stay as they are.

    Raises:
        CheckpointError: names or shapes do not fit the model.
    """
    file = folder / "model.safetensors"
    where, remedy = str(file), "build the model with the settings of the run that wrote the checkpoint"
    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the weights cannot be read: {error}", where=where, remedy=remedy) from error
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own:
            raise CheckpointError(f"the model has no tensor {name!r}", where=where, remedy=remedy)
        if own[name].shape != tensor.shape:
            shapes = f"{list(tensor.shape)} in the checkpoint, {list(own[name].shape)} in the model"
            raise CheckpointError(f"tensor {name!r} has shape {shapes}", where=where, remedy=remedy)
    covered = {own[name].data_ptr() for name in tensors}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad} if trained_only else set(own)
    wanted -= set(tensors)
    missing = [name for name, tensor in own.items() if name in wanted and tensor.data_ptr() not in covered]
    if missing:
        raise CheckpointError(f"the checkpoint lacks tensor {missing[0]!r}", where=where, remedy=remedy)
    model.load_state_dict(tensors, strict=False)


class CheckpointStore:
    """The checkpoints of one run: `step-*` resumable, `best-*` weights only.

    Args:
        folder: where they live; made when the first one is written.
        keep_last: number of resumable checkpoints kept.
        trained_only: leave frozen parameters out (`save_weights`).
    """

    def __init__(self, folder: Path, keep_last: int = 2, *, trained_only: bool = False) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.trained_only = trained_only

    def save(
        self,
        step: int,
        model: nn.Module,
        *,
        optimizer: Mapping[str, Tensor],
        rng: Mapping[str, Tensor],
        state: Mapping[str, Any],
        best_step: int | None = None,
    ) -> Path:
        """Write the resumable checkpoint of `step`, point `last` at it and delete what is not kept."""

        def fill(folder: Path) -> None:
            save_weights(model, folder / "model", trained_only=self.trained_only)
            contiguous = {name: tensor.contiguous() for name, tensor in optimizer.items()}
            safetensors.torch.save_file(contiguous, folder / "optimizer.safetensors")
            safetensors.torch.save_file(dict(rng), folder / "rng.safetensors")
            write_json(folder / "trainer.json", state)

        path = self._path("step", step)
        write_checkpoint(path, fill, {"step": step, "best_step": best_step})
        self._point("last", path)
        self._prune(path, best_step)
        return path

    def save_best(self, step: int, model: nn.Module, info: Mapping[str, Any]) -> Path:
        """Write the weights of `step` and point `best` at them."""
        path = self._path("best", step)

        def fill(folder: Path) -> None:
            save_weights(model, folder / "model", trained_only=self.trained_only)

        write_checkpoint(path, fill, {**info, "step": step})
        self._point("best", path)
        return path

    def exists(self) -> bool:
        """Whether the run has any resumable checkpoint, whole or not."""
        return bool(self._folders("step"))

    def point_best(self, step: int) -> None:
        """Point `best` back at the weights of `step`, after resuming from before a later best."""
        self._point("best", self._path("best", step))

    def newest(self) -> Path | None:
        """The newest whole resumable checkpoint; broken ones are passed over with a warning.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        first_error: CheckpointError | None = None
        for path in reversed(self._folders("step")):
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                first_error = first_error or error
                warnings.warn(f"passing over a broken checkpoint\n{error}", stacklevel=2)
            else:
                return path
        if first_error is not None:
            raise first_error
        return None

    def best(self, step: int) -> Path:
        """The weights of the best step, verified."""
        path = self._path("best", step)
        verify_checkpoint(path)
        return path

    def recover(self) -> None:
        """Finish what a killed process had begun: put back checkpoints that were under other names.

        Replacing a checkpoint takes two renames; between them, neither the old nor the new one has its name. To be
        called by the process that holds the run's folder, before anything is read.
        """
        for prefix in (_TEMPORARY, _DISCARDED):  # the new one first: it is sealed when it waits for its name
            for hidden in sorted(self.folder.glob(f"{prefix}*-[0-9]*")):
                path = hidden.with_name(hidden.name.removeprefix(prefix))
                if path.exists():
                    continue
                with suppress(CheckpointError, OSError):  # half written or half deleted: of no use
                    verify_checkpoint(hidden)
                    hidden.rename(path)

    def _path(self, kind: str, step: int) -> Path:
        return self.folder / f"{kind}-{step:08d}"

    def _folders(self, kind: str) -> list[Path]:
        return sorted(path for path in self.folder.glob(f"{kind}-[0-9]*") if path.is_dir())

    def _point(self, name: str, path: Path) -> None:
        with writing(self.folder / f"{name}.json"):
            write_json(self.folder / f"{name}.json", {"checkpoint": path.name, "step": int(path.name.split("-")[1])})

    def _prune(self, saved: Path, best_step: int | None) -> None:
        """Delete old checkpoints, and best weights that no kept checkpoint refers to.

        Later ones than `saved` go too: a run passes over them only when they are broken.
        """
        steps = self._folders("step")
        kept = [path for path in steps if path <= saved][-self.keep_last :]
        needed = {best_step}
        for path in kept:
            with suppress(OSError, ValueError, KeyError):
                needed.add(json.loads((path / MARKER).read_text(encoding="utf-8"))["best_step"])
        needed_paths = {self._path("best", step) for step in needed if step is not None}
        unneeded = [path for path in self._folders("best") if path not in needed_paths]
        for path in [*(path for path in steps if path not in kept), *unneeded]:
            discarded = path.with_name(_DISCARDED + path.name)
            with suppress(OSError):  # a checkpoint that cannot be deleted does no harm
                path.rename(discarded)
                shutil.rmtree(discarded, ignore_errors=True)
        for leftover in [*self.folder.glob(f"{_TEMPORARY}*"), *self.folder.glob(f"{_DISCARDED}*")]:
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)


def read_training_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Optimiser tensors, random states and trainer state of a verified resumable checkpoint."""
    try:
        optimizer = safetensors.torch.load_file(path / "optimizer.safetensors")
        rng = safetensors.torch.load_file(path / "rng.safetensors")
        state = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"the training state cannot be read: {error}",
            where=str(path),
            remedy="resume from a step-* checkpoint; best-* ones hold weights only",
        ) from error
    return optimizer, rng, state
