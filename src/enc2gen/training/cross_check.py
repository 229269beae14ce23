"""The same training carried out by transformers' `Seq2SeqTrainer`: what our own trainer is checked against.

Batches, their order, the peak rate and every other setting are ours, such as which parameters decay and when warm-up
begins; the loop, the optimiser, the schedules, accumulation, clipping, autocast, and the choice of the best weights are
transformers' own, and the loss is PyTorch's from the model's logits. Dropout draws other numbers than in our trainer:
without it, both give the same weights.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from enc2gen.errors import ConfigError, DataError
from enc2gen.locking import locked_folder
from enc2gen.tokenization.examples import IGNORED_LABEL
from enc2gen.training.callbacks import Callback, StepMetrics, ValidationMetrics, default_callbacks
from enc2gen.training.config import TrainingConfig
from enc2gen.training.optim import frozen_names
from enc2gen.training.runtime import (
    InterruptFlag,
    forward_options,
    gradient_checkpointing,
    resolve_precision,
)
from enc2gen.training.state import TrainingResult, TrainingStream, checked_validation, nonfinite_error

if TYPE_CHECKING:
    from enc2gen.data.protocols import TrainingBatch

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class TransformersTrainer:
    """Trains like :class:`enc2gen.training.Trainer`, through transformers' `Seq2SeqTrainer`, in one process.

    A run that was interrupted is not resumed: the next call of `train` starts it anew.

    Args:
        model: a transformers model whose `forward` returns `logits`, `[batch, length, vocabulary]`; trained in place,
            in float32.
        stream, validation, config, output_dir: as for our trainer.

    Raises:
        ConfigError: settings that only our trainer has, or more than one process.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: TrainingStream,
        validation: Mapping[str, Sequence[TrainingBatch]],
        config: TrainingConfig,
        output_dir: Path,
    ) -> None:
        config.check_transformers()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "trainer transformers runs in one process",
                where="accelerate launch",
                remedy="start this recipe without it",
            )
        self.model, self.stream, self.config, self.output_dir = model.float(), stream, config, Path(output_dir)
        self.validation = checked_validation(validation)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = resolve_precision(config.precision, device)

    def train(self) -> TrainingResult:
        """Train from the start until `max_steps`, early stopping or an interruption; the model gets the best weights.

        Raises:
            TrainingError: a loss is not finite.
            OutputError: the folder is in use or cannot be written.
        """
        with locked_folder(self.output_dir), InterruptFlag() as interrupt:
            checkpoints = self.output_dir / "checkpoints"
            shutil.rmtree(checkpoints, ignore_errors=True)
            checkpoints.mkdir()
            log = _Log(self.config, self.output_dir)
            frozen = frozen_names(self.model, self.config.freeze)
            for name, parameter in self.model.named_parameters():
                if name in frozen:
                    parameter.requires_grad_(False)
            if self.config.gradient_checkpointing:
                gradient_checkpointing(self.model, enable=True)
            try:
                trainer = self._trainer(checkpoints, log, interrupt)
                log.start()
                trainer.train()
                trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # undoes the autocast of forward
            finally:
                log.end()
                # The next trainer in this process makes its own; both refuse settings that differ.
                AcceleratorState._reset_state()
                GradientState._reset_state()
            if self.config.gradient_checkpointing:
                gradient_checkpointing(self.model, enable=False)
            self.model.eval()
            return log.result(trainer.state.global_step, self.model, trainer.state.best_model_checkpoint)

    def _trainer(self, folder: Path, log: _Log, interrupt: InterruptFlag) -> _Seq2SeqTrainer:
        config = self.config
        options = forward_options(self.model)
        trainer = _Seq2SeqTrainer(
            model=self.model,
            args=_arguments(config, folder, bf16=self.precision == "bf16", validated=bool(self.validation)),
            train_dataset=_Batches(self.stream, options),
            eval_dataset=cast(Any, [*self.validation] or None),  # only its presence counts: see `evaluate`
            data_collator=_only_one,
            compute_loss_func=_Loss(config.label_smoothing),
            callbacks=[_Hooks(log, interrupt)],
        )
        trainer.settings, trainer.validation, trainer.record = config, self.validation, log
        trainer.interrupt, trainer.options = interrupt, options
        trainer.remove_callback(PrinterCallback)
        return trainer


def _arguments(config: TrainingConfig, folder: Path, *, bf16: bool, validated: bool) -> Seq2SeqTrainingArguments:
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=config.max_steps,
        per_device_train_batch_size=1,  # one item is one of our batches
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=_SCHEDULES[config.schedule],
        warmup_steps=config.warmup_steps,
        optim="adamw_torch_fused",
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_epsilon=config.eps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm or 0.0,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps" if validated else "no",
        eval_steps=config.eval_every,
        save_strategy="best" if validated else "no",
        save_total_limit=1,
        save_only_model=True,
        metric_for_best_model="eval_loss" if validated else None,
        greater_is_better=False,
        load_best_model_at_end=validated and config.load_best,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"dispatch_batches": False},
        seed=config.seed % 2**32,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else it would split each batch over all GPUs
    return arguments


def _only_one(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[0]


class _Batches(IterableDataset):
    """The batches of a stream as the model's arguments."""

    def __init__(self, stream: TrainingStream, options: Mapping[str, Any]) -> None:
        self.stream, self.options = stream, options

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.stream:
            yield {**batch.as_model_inputs(), **self.options}
        raise DataError("the stream ended before training did", remedy="pass a stream that repeats its data")


class _Loss:
    """Cross-entropy per target token of the whole update.

    The losses that models compute by themselves are means over each batch, which weigh the tokens of the batches of
    an update unequally.
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
        return _summed(outputs.logits, labels, self.smoothing) / num_items_in_batch


def _summed(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(
        logits.float().flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
        label_smoothing=smoothing,
    )


class _Seq2SeqTrainer(Seq2SeqTrainer):
    """transformers' trainer with our weight-decay groups, warm-up and validation."""

    settings: TrainingConfig
    validation: Mapping[str, Sequence[TrainingBatch]]
    record: _Log
    interrupt: InterruptFlag
    options: Mapping[str, Any]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay; transformers' own choice would be all but biases and norms.

        A tied parameter has several names, and is left alone if one of them says so.
        """
        norms = {type(module) for module in model.modules() if "norm" in type(module).__name__.lower()}
        kinds: dict[str, set[type]] = {"norm": norms, "embedding": {nn.Embedding}}
        without = {one for kind, types in kinds.items() if kind in self.settings.no_decay for one in types}
        names = set(get_parameter_names(model, list(without)))
        if "bias" in self.settings.no_decay:
            names -= {name for name in get_parameter_names(model, list(norms)) if name.endswith("bias")}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        alone = {id(parameter) for name, parameter in parameters.items() if name not in names}
        return [name for name, parameter in parameters.items() if id(parameter) not in alone]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """transformers' schedule, with the first update at 1/w of the rate instead of 0 in w updates of warm-up."""
        warmup = self.args.get_warmup_steps(num_training_steps)
        optimizer = cast(torch.optim.Optimizer, self.optimizer if optimizer is None else optimizer)
        theirs = get_scheduler(self.args.lr_scheduler_type, optimizer, warmup, num_training_steps)
        factor: Callable[[int], float] = theirs.lr_lambdas[0]
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        self.lr_scheduler = LambdaLR(optimizer, lambda step: factor(step + 1 if step < warmup else step))
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One batch; counts its tokens and raises `TrainingError` if the loss is not finite."""
        self.record.tokens += int(inputs["attention_mask"].sum()) + int(inputs["decoder_attention_mask"].sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(float(loss)):
            when = f"at step {self.state.global_step}"
            raise nonfinite_error(float(loss), math.nan, when, self.record.folder, None)
        return loss

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss per target token of each set, and their mean as `eval_loss`; ends training where that is due."""
        model: Any = self.model
        model.eval()
        losses = {}
        for name, batches in self.validation.items():
            total = torch.zeros(2, dtype=torch.float64)
            for batch in batches:
                if self.interrupt.raised:
                    self.record.interrupted = self.control.should_training_stop = True
                    return {"eval_loss": math.nan}
                inputs = batch.to(self.args.device).as_model_inputs()
                labels = inputs.pop("labels")
                total[0] += _summed(model(**inputs, **self.options).logits, labels).double().cpu()
                total[1] += int((labels != IGNORED_LABEL).sum())
            losses[name] = float(total[0] / total[1])
        metrics = {"eval_loss": self.record.validated(self.state.global_step, losses)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.state.global_step < self.settings.max_steps and self.record.should_stop:
            self.record.stopped_early = self.control.should_training_stop = True
        return metrics


class _Hooks(TrainerCallback):
    """Logs the last update too, and ends training at an interruption."""

    def __init__(self, log: _Log, interrupt: InterruptFlag) -> None:
        self.record, self.interrupt = log, interrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True
        elif self.interrupt.raised:
            self.record.interrupted = control.should_training_stop = True
            control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.record.logged(state.global_step, logs)


class _Log:
    """What a run has come to, handed to the callbacks that our trainer has."""

    def __init__(self, config: TrainingConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.callbacks: list[Callback] = default_callbacks(config, folder, write=True)
        self.tokens = 0
        self.interrupted = self.stopped_early = False
        self._best: tuple[int, float, dict[str, float]] | None = None
        self._start = time.perf_counter()
        self._then = (self._start, 0)

    @property
    def should_stop(self) -> bool:
        """Whether a callback asks for the end."""
        return any(callback.should_stop for callback in self.callbacks)

    def start(self) -> None:
        """Training begins."""
        for callback in self.callbacks:
            callback.on_start(0, self.config.max_steps)

    def logged(self, step: int, logs: Mapping[str, float]) -> None:
        """transformers' means since the log before."""
        now, (then, tokens_then) = time.perf_counter(), self._then
        self._then = (now, self.tokens)
        metrics = StepMetrics(
            step=step,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            gradient_norm=logs.get("grad_norm", math.nan),
            tokens=self.tokens,
            tokens_per_second=(self.tokens - tokens_then) / max(now - then, 1e-9),
            seconds=now - self._start,
            skipped=0,
        )
        for callback in self.callbacks:
            callback.on_step(metrics)

    def validated(self, step: int, losses: dict[str, float]) -> float:
        """Note the losses of all sets; returns their mean."""
        mean = sum(losses.values()) / len(losses)
        improved = math.isfinite(mean) and (self._best is None or mean < self._best[1])
        if improved:
            self._best = step, mean, losses
        for callback in self.callbacks:
            callback.on_validation(ValidationMetrics(step=step, losses=losses, mean=mean, improved=improved))
        return mean

    def end(self) -> None:
        """Training ended, for whatever reason."""
        for callback in self.callbacks:
            callback.on_end()

    def result(self, steps: int, model: nn.Module, best: str | None) -> TrainingResult:
        """What our trainer would return."""
        seconds = time.perf_counter() - self._start
        step, loss, losses = self._best or (None, None, {})
        return TrainingResult(
            steps=steps,
            best_step=step,
            best_loss=loss,
            losses=losses,
            tokens=self.tokens,
            seconds=seconds,
            tokens_per_second=self.tokens / max(seconds, 1e-9),
            stopped_early=self.stopped_early,
            interrupted=self.interrupted,
            skipped=0,
            last_checkpoint=None,
            best_checkpoint=Path(best) if best else None,
            parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        )
