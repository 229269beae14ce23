"""The one training loop, for pretraining and fine-tuning alike.

Exact resume: everything a step depends on is either in the checkpoint (weights, optimiser, data position,
random states) or a pure function of the step (learning rate, dropout seed, frozen stage). On CPU an
interrupted and resumed run therefore equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from enc2gen.errors import DataError, OutputError
from enc2gen.locking import locked_folder
from enc2gen.models.compilation import compile_layers
from enc2gen.training.callbacks import Callback, StepMetrics, ValidationMetrics, default_callbacks, named_callbacks
from enc2gen.training.checkpoint import CheckpointStore, load_weights, read_training_state
from enc2gen.training.config import TrainingConfig
from enc2gen.training.objective import Objective
from enc2gen.training.optim import (
    build_optimizer,
    encoder_parameters,
    load_optimizer_tensors,
    set_learning_rate,
)
from enc2gen.training.parallel import parallelism
from enc2gen.training.runtime import (
    InterruptFlag,
    gradient_checkpointing,
    make_accelerator,
    resolve_precision,
    restore_rng,
    rng_tensors,
    seed_everything,
    seed_torch,
    set_padding_free,
)
from enc2gen.training.state import (
    Progress,
    TrainingResult,
    TrainingStream,
    batches_per_update,
    checked_validation,
    nonfinite_error,
    require_same_run,
    validation_fingerprint,
)
from enc2gen.training.validation import mean_loss

if TYPE_CHECKING:
    from enc2gen.data.protocols import TrainingBatch


class Trainer:
    """Trains `model` on `stream` with AdamW and keeps the best and the latest state in `output_dir`.

    Works on any module whose `forward(**inputs)` takes the fields of a batch except the labels and returns an
    object with `logits`, `[..., vocab]` where the labels are `[...]`; a `forward` that takes `label_smoothing` gets
    `labels` too and returns a `TokenLoss`, which needs no logits. Trains in float32: a half-precision model is
    converted. Under `accelerate launch` process r takes every r-th batch of the same stream.

    Args:
        model: trained in place.
        stream: training batches.
        validation: named sets; their mean loss picks the best weights. May be empty.
        config: settings.
        output_dir: gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
        callbacks: run after the built-in ones.
        new_parameters: tells by name which parameters are randomly initialised (for `new_parameters_lr`).
        leave_frozen: parameters that need no gradient keep their precision and are not in the checkpoints; to
            resume, the caller builds the model with the same frozen weights again.

    Raises:
        ConfigError: the settings do not fit the model or the validation sets.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: TrainingStream,
        validation: Mapping[str, Sequence[TrainingBatch]],
        config: TrainingConfig,
        output_dir: Path,
        callbacks: Sequence[Callback] = (),
        *,
        new_parameters: Callable[[str], bool] | None = None,
        leave_frozen: bool = False,
    ) -> None:
        self.stream, self.config, self.output_dir = stream, config, Path(output_dir)
        self.validation = checked_validation(validation)
        self.accelerator = make_accelerator()
        self.precision = resolve_precision(config.precision, self.accelerator.device)
        self.model = (model if leave_frozen else model.float()).to(parallelism().home(self.accelerator))
        set_padding_free(model, config)
        self.objective = Objective(model, config, self.accelerator.device, self.precision)
        self.optimizer = build_optimizer(model, config, new_parameters)
        self._parallel = parallelism()(self.accelerator, self.model, self.optimizer)
        self._stage_parameters = encoder_parameters(model) if config.freeze_encoder_steps else []
        self._encoder_frozen = False
        self._trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for parameter in self._trained:
            parameter.data = parameter.data.float()
        self.store = CheckpointStore(self.output_dir / "checkpoints", config.keep_last, trained_only=leave_frozen)
        self.callbacks = [
            *default_callbacks(config, self.output_dir, write=self.accelerator.is_main_process),
            *callbacks,
        ]
        self.progress = Progress()
        self._batches: Iterator[TrainingBatch] = iter(())
        self._clock = (0.0, 0)
        self._last_checkpoint: Path | None = None
        self._decompile: Callable[[], None] = lambda: None

    def train(self, *, resume: bool = True) -> TrainingResult:
        """Train until `max_steps`, early stopping or an interruption.

        Args:
            resume: go on from the newest whole checkpoint in `output_dir`, if there is one.

        Raises:
            TrainingError: a loss or gradient is not finite (see `nonfinite`).
            CheckpointError: the checkpoint belongs to other settings or data, or none is whole.
            OutputError: the folder is in use, cannot be written, or holds checkpoints and `resume` is False.
        """
        lock = locked_folder(self.output_dir) if self.accelerator.is_main_process else nullcontext()
        with lock, InterruptFlag() as interrupt:
            try:
                self._start(resume)
                interrupted = self._loop(interrupt)
            finally:
                for callback in self.callbacks:
                    callback.on_end()
            return self._finish(interrupted)

    def _loop(self, interrupt: InterruptFlag) -> bool:
        """Run updates until the end; True if interrupted."""
        progress, config = self.progress, self.config
        while progress.validation_due or (progress.step < config.max_steps and not progress.stopped_early):
            if self._parallel.any_process(interrupt.raised):
                self._save()
                return True
            if not progress.validation_due:
                learning_rate, norm = self._step(progress.step)
                progress.step += 1
                if progress.step % config.log_every == 0 or progress.step == config.max_steps:
                    self._report(learning_rate, norm)
            last = progress.step == config.max_steps
            if progress.validation_due or (self.validation and (progress.step % config.eval_every == 0 or last)):
                progress.validation_due = True
                if not self._validate(interrupt):
                    continue
                progress.validation_due = False
                progress.stopped_early = not last and any(callback.should_stop for callback in self.callbacks)
            if progress.step % config.save_every == 0 or last or progress.stopped_early:
                self._save()
        return False

    def _step(self, step: int) -> tuple[float, float]:
        """One update from `gradient_accumulation` batches per process; returns the rate and gradient norm."""
        batches, tokens, targets = self._next_batches(step)
        self._set_stage(step)
        learning_rate = set_learning_rate(self.optimizer, step, self.config)
        self.optimizer.zero_grad(set_to_none=True)
        device = self.accelerator.device
        total = torch.zeros((), device=device)
        for index, batch in enumerate(batches):
            # by the batch's place in the update: the same dropout however many processes share the batches
            place = index * self.accelerator.num_processes + self.accelerator.process_index
            seed_torch(device, self.config.seed, step, place, 0)
            with self._parallel.gradient_sync(last=index == len(batches) - 1):
                loss = self.objective.training(self._parallel.trained, batch).loss
                # Divided by the targets of the whole update: batches weigh by their tokens, as in one big
                # batch (transformers#35438). Data-parallel wrappers average over processes, hence the factor.
                self.accelerator.backward(loss * (self.accelerator.num_processes / targets))
            total += loss.detach()
        gradients = [p.grad for p in self._parallel.of(self._trained) if p.grad is not None]
        norm = self._parallel.gradient_norm(gradients)
        # One wait for the device, for both.
        loss_sum, norm_value = torch.stack([self._parallel.sum(total), norm.float()]).tolist()
        if self._finite(loss_sum, norm_value, step, learning_rate):
            if self.config.max_grad_norm is not None:
                self._parallel.clip(gradients, self.config.max_grad_norm, norm)
            self.optimizer.step()
            self.progress.window_loss += loss_sum
            self.progress.window_targets += targets
        self.progress.tokens += tokens
        return learning_rate, norm_value

    def _next_batches(self, step: int) -> tuple[list[TrainingBatch], int, int]:
        """This process's batches of the update; tokens and target tokens over all processes."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        drawn = []
        for _ in range(self.config.gradient_accumulation * processes):
            try:
                drawn.append(next(self._batches))
            except StopIteration:
                remedy = "pass a stream that repeats its data"
                raise DataError(f"the stream ended at step {step}", remedy=remedy) from None
        targets = sum(int(batch.num_target_tokens) for batch in drawn)
        if targets == 0:
            raise DataError(f"the batches of step {step} hold no target token", remedy="check the data")
        return drawn[rank::processes], sum(int(batch.num_tokens) for batch in drawn), targets

    def _finite(self, loss: float, norm: float, step: int, learning_rate: float) -> bool:
        """Whether to apply the update; raises `TrainingError` where the settings say so."""
        progress = self.progress
        if math.isfinite(loss) and math.isfinite(norm):
            progress.skipped_in_row = 0
            return True
        progress.skipped += 1
        progress.skipped_in_row += 1
        if self.config.nonfinite == "skip" and progress.skipped_in_row < self.config.max_skipped_in_row:
            return False
        times = f", {progress.skipped_in_row} times in a row" if self.config.nonfinite == "skip" else ""
        when = f"at step {step}, learning rate {learning_rate:.3g}{times}"
        raise nonfinite_error(loss, norm, when, self.output_dir, self._last_checkpoint)

    def _report(self, learning_rate: float, norm: float) -> None:
        progress = self.progress
        seconds, tokens = self._lap()
        metrics = StepMetrics(
            step=progress.step,
            loss=progress.window_loss / progress.window_targets if progress.window_targets else math.nan,
            learning_rate=learning_rate,
            gradient_norm=norm,
            tokens=progress.tokens,
            tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
            seconds=progress.seconds,
            skipped=progress.skipped,
        )
        progress.window_loss, progress.window_targets = 0.0, 0
        for callback in self.callbacks:
            callback.on_step(metrics)

    def _lap(self) -> tuple[float, int]:
        """Seconds and tokens since the last call; adds the seconds to the run's."""
        now, (then, tokens_then) = time.perf_counter(), self._clock
        self._clock = (now, self.progress.tokens)
        self.progress.seconds += now - then
        return now - then, self.progress.tokens - tokens_then

    def _validate(self, interrupt: InterruptFlag) -> bool:
        """Losses of all sets; False if an interruption came first, and it has to be done again."""
        progress, losses = self.progress, {}
        for name, batches in self.validation.items():
            losses[name] = self.evaluate(batches, stop=lambda: interrupt.raised)
            if self._parallel.any_process(interrupt.raised):
                return False
        mean = sum(losses.values()) / len(losses)
        improved = math.isfinite(mean) and (progress.best_loss is None or mean < progress.best_loss)
        if improved:
            progress.best_step, progress.best_loss, progress.best_losses = progress.step, mean, losses
            self._parallel.collect()
            if self.accelerator.is_main_process:
                self.store.save_best(progress.step, self.model, {"losses": losses, "mean_loss": mean})
        metrics = ValidationMetrics(step=progress.step, losses=losses, mean=mean, improved=improved)
        for callback in self.callbacks:
            callback.on_validation(metrics)
        self._lap()
        return True

    def evaluate(self, batches: Sequence[TrainingBatch], *, stop: Callable[[], bool] = lambda: False) -> float:
        """Mean negative log-likelihood per target token in nats, no dropout, the precision of training.

        Once `stop`, asked before every batch, says yes, the rest is left out.
        """
        model = self._parallel.evaluated
        return mean_loss(self._parallel, lambda batch: self.objective.validation(model, batch), batches, stop)

    def _start(self, resume: bool) -> None:
        if not resume and self.store.exists():
            raise OutputError(
                "the output folder already holds checkpoints",
                where=str(self.store.folder),
                remedy="resume that run, delete the folder, or choose another one",
            )
        self._parallel.end()  # of a run before, by the same trainer
        if self.config.gradient_checkpointing:
            gradient_checkpointing(self.model, enable=True)
        if self.config.compile:
            self._decompile = compile_layers(self.model, self.accelerator.device, where="training.compile")
        self.model.train()
        with self.accelerator.main_process_first():
            self.store.recover()
        checkpoint = self.store.newest()
        if checkpoint is None:
            seed_everything(self.config.seed)
        else:
            self._restore(checkpoint)
        for parameter in self._stage_parameters:
            parameter.requires_grad_(True)
        self._encoder_frozen = False
        self._parallel.begin()
        self._batches = iter(self.stream)
        self._clock = (time.perf_counter(), self.progress.tokens)
        for callback in self.callbacks:
            callback.on_start(self.progress.step, self.config.max_steps)

    def _restore(self, path: Path) -> None:
        optimizer, rng, state = read_training_state(path)
        set_padding_free(self.model, self.config, before=bool(state["identity"].get("padding_free", False)))
        require_same_run(batches_per_update(state["identity"]), self._identity(), where=str(path))
        self.stream.load_state_dict(state["stream"])  # says which part of the data differs, if any
        require_same_run(state["data"], self._data_identity(), where=str(path))
        load_weights(self.model, path / "model", trained_only=self.store.trained_only)
        load_optimizer_tensors(self.optimizer, self.model, optimizer)
        restore_rng(rng)
        self.progress = Progress(**state["progress"])
        for name, callback in named_callbacks(self.callbacks).items():
            if name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][name])
        self._last_checkpoint = path
        if self.progress.best_step is not None and self.accelerator.is_main_process:
            self.store.point_best(self.progress.best_step)

    def _save(self) -> None:
        self._lap()
        self._parallel.collect()
        optimizer = self._parallel.optimizer_tensors()
        if self.accelerator.is_main_process:
            self._last_checkpoint = self.store.save(
                self.progress.step,
                self.model,
                optimizer=optimizer,
                rng=rng_tensors(),
                state={
                    "identity": self._identity(),
                    "data": self._data_identity(),
                    "progress": asdict(self.progress),
                    "stream": self.stream.state_dict(),
                    "callbacks": {n: c.state_dict() for n, c in named_callbacks(self.callbacks).items()},
                },
                best_step=self.progress.best_step,
            )
        self.accelerator.wait_for_everyone()
        self._lap()

    def _finish(self, interrupted: bool) -> TrainingResult:
        progress = self.progress
        self._lap()
        self._parallel.end()
        best = self.store.best(progress.best_step) if progress.best_step is not None else None
        if best is not None and self.config.load_best and not interrupted:
            load_weights(self.model, best / "model", trained_only=self.store.trained_only)
        if self.config.gradient_checkpointing:
            gradient_checkpointing(self.model, enable=False)
        self._decompile()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()
        return TrainingResult(
            steps=progress.step,
            best_step=progress.best_step,
            best_loss=progress.best_loss,
            losses=progress.best_losses,
            tokens=progress.tokens,
            seconds=progress.seconds,
            tokens_per_second=progress.tokens / progress.seconds if progress.seconds > 0 else 0.0,
            stopped_early=progress.stopped_early,
            interrupted=interrupted,
            skipped=progress.skipped,
            last_checkpoint=self._last_checkpoint,
            best_checkpoint=best,
            parameters=sum(parameter.numel() for parameter in self._trained),
        )

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to equal an uninterrupted one."""
        on_tokens = {"padding_free": True} if getattr(self.model, "padding_free", False) else {}  # absent in older runs
        return {
            **batches_per_update({**self.config.identity(), "processes": self.accelerator.num_processes}),
            "precision": self.precision,
            **on_tokens,
        }

    def _data_identity(self) -> dict[str, Any]:
        return {"training": self.stream.fingerprint, "validation": validation_fingerprint(self.validation)}

    def _set_stage(self, step: int) -> None:
        """Freeze or release the encoder: a function of the step, so that resuming finds the right stage."""
        frozen = bool(self._stage_parameters) and step < self.config.freeze_encoder_steps
        if frozen == self._encoder_frozen:
            return
        for parameter in self._parallel.of(self._stage_parameters):
            parameter.requires_grad_(not frozen)
        self._encoder_frozen = frozen
        self._parallel.stage_changed()
