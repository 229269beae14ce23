"""How several processes train one model: each with a whole copy (DDP), or each with a part of it (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from enc2gen.training.optim import optimizer_tensors
from enc2gen.training.sharding import ShardedCopy, local_parts, sharded_norm, sharding_requested


class Replicas:
    """A whole copy in every process; with one process, simply the model.

    Args:
        accelerator: the processes.
        model: what the user gave.
        optimizer: of the model's parameters.

    Attributes:
        home: where the whole model is kept.
        trained: to be called in training; set by `begin`.
        evaluated: to be called in validation.
        device, processes, rank: this process's device, how many there are, and which of them it is.
    """

    every_process_evaluates = False  # as often as the others, that is

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._accelerator, self._model, self._optimizer = accelerator, model, optimizer
        self.trained: Any = model
        self.evaluated = model
        self.device = accelerator.device
        self.processes, self.rank = accelerator.num_processes, accelerator.process_index

    @staticmethod
    def home(accelerator: Accelerator) -> torch.device:
        """Where the whole model is kept: on the device that trains it."""
        return accelerator.device

    def begin(self) -> None:
        """Set up training, with the model's and the optimiser's present state."""
        self.trained = self._accelerator.prepare_model(self._model)

    def stage_changed(self) -> None:
        """Parameters were frozen or released: data-parallel wrappers note at the start which need gradients."""
        self.begin()

    def of(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters that are trained in place of the user's model's."""
        return list(parameters)

    def gradient_sync(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward pass; gradients are summed in the `last` one of an update only."""
        return nullcontext() if last else self._accelerator.no_sync(self.trained)

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """L2 norm of all gradients together, a scalar."""
        return nn.utils.get_total_norm(gradients)

    def clip(self, gradients: Sequence[Tensor], limit: float, norm: Tensor) -> None:
        """Scale gradients of norm `norm` down to `limit`, in place, as `torch.nn.utils.clip_grads_with_norm_`."""
        parts = local_parts(gradients)
        torch._foreach_mul_(parts, (limit / (norm + 1e-6)).clamp(max=1.0))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes."""
        return tensor if self._accelerator.num_processes == 1 else self._accelerator.reduce(tensor, "sum")

    def any_process(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        if self._accelerator.num_processes == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self._accelerator.device)).item())

    def gives_up(self, flag: bool) -> bool:
        """Whether this process leaves out the rest of its validation, as `flag` asks it to."""
        return flag

    def collect(self) -> None:
        """Bring the trained weights into the user's model; all processes must call this together."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """As in `training.optim`, whole; all processes must call this together."""
        return optimizer_tensors(self._optimizer, self._model)

    def end(self) -> None:
        """The user's model has the trained weights, and the optimiser is its own again."""


class Shards(Replicas):
    """A part of weights, gradients and optimiser state in every process (`training.sharding`)."""

    every_process_evaluates = True  # a forward pass gathers weights, in which all take part

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(accelerator, model, optimizer)
        self._copy: ShardedCopy | None = None

    @staticmethod
    def home(accelerator: Accelerator) -> torch.device:
        """Where the whole model is kept: out of the way, on the CPU."""
        return torch.device("cpu")

    def begin(self) -> None:
        self._copy = ShardedCopy(self._model, self._optimizer, self._accelerator.device)
        self.trained = self.evaluated = self._copy.module

    def stage_changed(self) -> None:
        """FSDP2 looks at every pass which parameters need gradients."""

    def of(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        return list(parameters) if self._copy is None else self._copy.of(parameters)

    def gradient_sync(self, *, last: bool) -> AbstractContextManager[Any]:
        self.trained.set_requires_gradient_sync(last)
        return nullcontext()

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return sharded_norm(gradients, self._accelerator.device)

    def gives_up(self, flag: bool) -> bool:
        """A forward pass takes all processes: they leave together."""
        return self.any_process(flag)

    def collect(self) -> None:
        if self._copy is not None:
            self._copy.gather()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return super().optimizer_tensors() if self._copy is None else self._copy.optimizer_tensors()

    def end(self) -> None:
        if self._copy is not None:
            self._copy.gather()
            self._copy.give_back()
            self._copy, self.trained, self.evaluated = None, self._model, self._model


def parallelism() -> type[Replicas]:
    """What the launcher asks for; `ConfigError` where that is not supported."""
    return Shards if sharding_requested() else Replicas
