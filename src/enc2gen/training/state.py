"""What goes into a training run, what changes while it runs, and what comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from enc2gen.errors import CheckpointError, ConfigError, TrainingError

if TYPE_CHECKING:
    from enc2gen.data.protocols import TrainingBatch


class TrainingStream(Protocol):
    """An infinite stream of batches that knows its position (`enc2gen.data.batching.BatchStream`)."""

    @property
    def fingerprint(self) -> str: ...

    def __iter__(self) -> Iterator[TrainingBatch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        steps: updates done.
        best_step, best_loss: the lowest validation loss (mean over sets, nats per token) and its update.
        losses: validation loss per set at the best step.
        tokens: source and target tokens seen, padding not counted; over resumed parts too.
        seconds: training and validation time over resumed parts too.
        stopped_early: validation stopped improving.
        interrupted: stopped by Ctrl-C or SIGTERM; calling `train` again goes on from `last_checkpoint`.
        skipped: updates skipped because they were not finite.
        last_checkpoint: resumable folder.
        best_checkpoint: folder whose `model/` holds the best weights.
        parameters: how many learnt; of low-rank updates, theirs and not those of the weights they change.
    """

    steps: int
    best_step: int | None
    best_loss: float | None
    losses: dict[str, float]
    tokens: int
    seconds: float
    tokens_per_second: float
    stopped_early: bool
    interrupted: bool
    skipped: int
    last_checkpoint: Path | None
    best_checkpoint: Path | None
    parameters: int


@dataclass
class Progress:
    """Everything that changes while training, besides tensors and the data position; saved as JSON."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    best_losses: dict[str, float] = field(default_factory=dict)
    stopped_early: bool = False
    skipped: int = 0
    skipped_in_row: int = 0
    window_loss: float = 0.0
    window_targets: int = 0
    validation_due: bool = False  # of this step; an interruption came in between


def checked_validation(validation: Mapping[str, Sequence[TrainingBatch]]) -> dict[str, Sequence[TrainingBatch]]:
    """The sets as a dictionary; a set without target tokens is a `ConfigError`."""
    for name, batches in validation.items():
        if not any(int(batch.num_target_tokens) for batch in batches):
            raise ConfigError(
                f"validation set {name!r} holds no target token",
                remedy="give it examples or leave the set out",
            )
    return dict(validation)


def validation_fingerprint(validation: Mapping[str, Sequence[TrainingBatch]]) -> str:
    """SHA-256 over names and token ids: early stopping and the best weights depend on them."""
    digest = hashlib.sha256()
    for name, batches in validation.items():
        digest.update(name.encode())
        for batch in batches:
            for tensor in (batch.input_ids, batch.labels):
                digest.update(repr(tuple(tensor.shape)).encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def nonfinite_error(loss: float, norm: float, when: str, folder: Path, last: Path | None) -> TrainingError:
    """What to raise when an update is not finite; `last` is the last good checkpoint."""
    kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
    return TrainingError(
        f"loss {loss} and gradient norm {norm} {when}",
        where=str(folder),
        remedy=f"lower learning_rate, lengthen warmup, or use precision fp32; {kept}",
    )


def batches_per_update(identity: Mapping[str, Any]) -> dict[str, Any]:
    """`identity` with the batches of an update in place of those per process: how many share them may change."""
    named = {name: value for name, value in identity.items() if name not in ("gradient_accumulation", "processes")}
    if "gradient_accumulation" in identity:
        named["gradient_accumulation x processes"] = identity["gradient_accumulation"] * identity.get("processes", 1)
    return named


def require_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], *, where: str) -> None:
    """Raise `CheckpointError` naming every setting in which two run identities differ."""
    differing = [
        f"{name}: {saved.get(name)!r} in the checkpoint, {current.get(name)!r} now"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint belongs to another run; different: {'; '.join(differing)}",
            where=where,
            remedy="go back to these settings and data to resume, or choose a new output folder",
        )
