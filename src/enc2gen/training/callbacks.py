"""What happens beside the updates: progress line, metrics file, TensorBoard, early stopping."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from enc2gen.errors import OutputError
from enc2gen.training.config import TrainingConfig


@dataclass(frozen=True)
class StepMetrics:
    """Means over the updates since the previous report.

    Attributes:
        step: updates done.
        loss: label-smoothed loss per target token, nats.
        learning_rate: of the latest update, before per-group multipliers.
        gradient_norm: L2 norm of the latest update's gradient before clipping.
        tokens: source and target tokens seen in the whole run.
        tokens_per_second: source and target tokens per second.
        seconds: training time of the whole run.
        skipped: updates skipped in the whole run because they were not finite.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float
    skipped: int


@dataclass(frozen=True)
class ValidationMetrics:
    """Losses after `step` updates, nats per target token without label smoothing; `mean` over the sets."""

    step: int
    losses: Mapping[str, float]
    mean: float
    improved: bool


class Callback:
    """Base of all callbacks; every hook does nothing.

    Under `accelerate launch` the hooks run in every process, with equal values.
    """

    should_stop: bool = False

    def on_start(self, step: int, max_steps: int) -> None:
        """Training starts, or goes on after `step` updates."""

    def on_step(self, metrics: StepMetrics) -> None:
        """Every `log_every` updates and after the last."""

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """After each validation."""

    def on_end(self) -> None:
        """Training ended, for whatever reason; release resources."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""


def named_callbacks(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Callbacks under names that do not change between runs: class name and number among its kind."""
    named: dict[str, Callback] = {}
    seen: Counter[str] = Counter()
    for callback in callbacks:
        kind = type(callback).__name__
        named[f"{kind}-{seen[kind]}"] = callback
        seen[kind] += 1
    return named


class ProgressLine(Callback):
    """One live line on a terminal, plain lines elsewhere: step/total, loss, rate, tokens/s, time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._max_steps = 0
        self._first_step = 0
        self._first_seconds: float | None = None

    def on_start(self, step: int, max_steps: int) -> None:
        self._max_steps, self._first_step = max_steps, step
        if not self.console.is_terminal:
            return
        columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self.console)
        self._task = self._progress.add_task("starting", total=max_steps, completed=step)
        self._progress.start()

    def on_step(self, metrics: StepMetrics) -> None:
        speed = f"{metrics.tokens_per_second:,.0f} tokens/s"
        numbers = f"loss {metrics.loss:.3f}  lr {metrics.learning_rate:.2e}  {speed}"
        if self._progress is not None:
            self._progress.update(self._task, completed=metrics.step, description=numbers)
        else:
            self._print(f"step {metrics.step}/{self._max_steps}  {numbers}{self._time_left(metrics)}")

    def _time_left(self, metrics: StepMetrics) -> str:
        if self._first_seconds is None:  # the first report only starts the clock: it holds one-off costs
            self._first_step, self._first_seconds = metrics.step, metrics.seconds
            return ""
        per_step = (metrics.seconds - self._first_seconds) / max(1, metrics.step - self._first_step)
        left = round(per_step * (self._max_steps - metrics.step))
        return f"  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"

    def on_validation(self, metrics: ValidationMetrics) -> None:
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in metrics.losses.items())
        self._print(f"validation at step {metrics.step}: {losses}{'  (best so far)' if metrics.improved else ''}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def on_end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class JsonlMetrics(Callback):
    """Appends one JSON object per report to `path`; `kind` is "train" or "validation".

    Starting at step s removes the lines after s (and a half-written last one), so a resumed run leaves no
    duplicates.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def on_start(self, step: int, max_steps: int) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = self._lines_up_to(step)
            temporary = self.path.with_name(f".tmp-{self.path.name}")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._error(error) from error

    def _lines_up_to(self, step: int) -> list[str]:
        if not self.path.exists() or step == 0:
            return []
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        return kept

    def on_step(self, metrics: StepMetrics) -> None:
        self._write({"kind": "train", **asdict(metrics)})

    def on_validation(self, metrics: ValidationMetrics) -> None:
        self._write({"kind": "validation", **asdict(metrics)})

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            # JSON has no NaN and no infinity: an update that was not finite is null
            self._file.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> OutputError:
        return OutputError(
            f"metrics cannot be written: {error.strerror}",
            where=str(self.path),
            remedy="free disk space or check permissions, then resume",
        )

    def on_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard(Callback):
    """TensorBoard curves in `folder`; a resumed run hides the points after the step it goes on from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def on_start(self, step: int, max_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def on_step(self, metrics: StepMetrics) -> None:
        for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second"):
            self._writer.add_scalar(f"train/{name}", getattr(metrics, name), metrics.step)

    def on_validation(self, metrics: ValidationMetrics) -> None:
        for name, loss in metrics.losses.items():
            self._writer.add_scalar(f"validation/{name}", loss, metrics.step)
        self._writer.add_scalar("validation/mean", metrics.mean, metrics.step)

    def on_end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class EarlyStopping(Callback):
    """Asks to stop after `patience` validations in a row without a better mean loss."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.validations_since_best = 0

    def on_validation(self, metrics: ValidationMetrics) -> None:
        self.validations_since_best = 0 if metrics.improved else self.validations_since_best + 1

    @property
    def should_stop(self) -> bool:  # type: ignore[override]
        return self.validations_since_best >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"validations_since_best": self.validations_since_best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.validations_since_best = int(state["validations_since_best"])


def default_callbacks(config: TrainingConfig, output_dir: Path, *, write: bool) -> list[Callback]:
    """The callbacks that the settings ask for; those that print or write files only if `write`."""
    callbacks: list[Callback] = []
    if config.patience is not None:
        callbacks.append(EarlyStopping(config.patience))
    if write:
        callbacks.append(JsonlMetrics(output_dir / "metrics.jsonl"))
    if write and config.tensorboard:
        callbacks.append(TensorBoard(output_dir / "tensorboard"))
    if write and config.progress:
        callbacks.append(ProgressLine())
    return callbacks
