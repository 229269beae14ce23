"""Fully sharded data parallelism (PyTorch's FSDP2): each process keeps a part of weights, gradients and optimiser.

The model that the user gave stays whole, on the CPU; a copy is sharded over the devices and trained. Whenever whole
weights are wanted (a checkpoint, the end), they are gathered into the user's model. So checkpoints have the same form
with any number of processes, sharded or not.

Groups: PyTorch gathers the parameters of one group together, and refuses a parameter that two groups share
(torch >= 2.13). A transformer layer is a group where nothing outside it uses its parameters; everything else (the word
embeddings that encoder, decoder and LM head share, tied layers) is in the outermost group.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from enc2gen.errors import ConfigError

_REQUESTED = "ACCELERATE_USE_FSDP"  # what `accelerate launch --use_fsdp` tells the processes it starts


def sharding_requested() -> bool:
    """Whether the launcher asks for sharding: `accelerate launch --use_fsdp --fsdp_version 2`.

    Raises:
        ConfigError: it asks for version 1, which PyTorch has deprecated.
    """
    if os.environ.get(_REQUESTED, "").lower() not in ("1", "true") or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise ConfigError(
            "only version 2 of fully sharded data parallelism is supported",
            where="accelerate launch",
            remedy="add --fsdp_version 2",
        )
    return True


@contextmanager
def hidden_request() -> Iterator[None]:
    """Accelerate is not to shard by itself: its groups know nothing of parameters that encoder and decoder share."""
    before = os.environ.pop(_REQUESTED, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_REQUESTED] = before


def layer_groups(model: nn.Module) -> list[nn.Module]:
    """The layers (elements of module lists) whose trained parameters no module outside them uses, outermost first."""
    users: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    groups: list[nn.Module] = []
    inside: set[int] = set()
    for stack in model.modules():
        if not isinstance(stack, nn.ModuleList) or id(stack) in inside:
            continue
        for layer in stack:
            own: dict[int, int] = {}
            for _, parameter in layer.named_parameters(remove_duplicate=False):
                own[id(parameter)] = own.get(id(parameter), 0) + 1
            if own and all(users[key] == count for key, count in own.items()):
                groups.append(layer)
                inside.update(id(module) for module in layer.modules())
    return groups


class ShardedCopy:
    """A sharded copy of a model, which an optimiser trains instead of it.

    Args:
        model: whole, on the CPU; every process has the same weights in it.
        optimizer: of the model's parameters, with or without state; from now on, of the copy's.
        device: where this process computes.

    Raises:
        ConfigError: the model has gradient hooks, which a copy would not have.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        if any(parameter._backward_hooks for parameter in model.parameters()):
            raise ConfigError(
                "training of some rows of the embedding table alone cannot be sharded",
                where="accelerate launch --use_fsdp",
                remedy="use data parallelism without sharding: --multi_gpu",
            )
        self.whole, self.optimizer, self.device = model, optimizer, device
        self.module: Any = copy.deepcopy(model)
        mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
        for group in layer_groups(self.module):
            fully_shard(group, mesh=mesh, reshard_after_forward=True)
        fully_shard(self.module, mesh=mesh, reshard_after_forward=True)
        if device.type == "cpu":  # gloo cannot average
            for module in self.module.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
        self._copies = dict(self.module.named_parameters())
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._hand_over()

    def _hand_over(self) -> None:
        """Let the optimiser train the copy, with its state sharded as the weights are."""
        state: dict[Tensor, dict[str, Any]] = {}
        for parameter, values in self.optimizer.state.items():
            shard: Any = self._copies[self._names[cast(nn.Parameter, parameter)]]
            state[shard] = {
                key: distribute_tensor(value.to(self.device), shard.device_mesh, shard.placements)
                if isinstance(value, Tensor) and value.shape == parameter.shape
                else value
                for key, value in values.items()
            }
        for group in self.optimizer.param_groups:
            group["params"] = self.of(group["params"])
        self.optimizer.state.clear()
        self.optimizer.state.update(state)

    def of(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The copy's parameters for those of the whole model."""
        return [self._copies[self._names[parameter]] for parameter in parameters]

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """As `training.optim.optimizer_tensors`, whole and on the CPU; all processes must call this together."""
        return {
            f"{key}/{name}": _full(torch.as_tensor(value)).cpu()
            for name, parameter in self._copies.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def give_back(self) -> None:
        """Let the optimiser train the whole model again; its state is dropped (a checkpoint has it)."""
        originals = {self._copies[name]: parameter for parameter, name in self._names.items()}
        for group in self.optimizer.param_groups:
            group["params"] = [originals[parameter] for parameter in group["params"]]
        self.optimizer.state.clear()

    @torch.no_grad()
    def gather(self) -> None:
        """Copy the trained weights into the whole model; all processes must call this together."""
        for parameter, name in self._names.items():
            parameter.copy_(_full(self._copies[name]))
        copies = dict(self.module.named_buffers())
        for name, buffer in self.whole.named_buffers():
            buffer.copy_(_full(copies[name]))


def sharded_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """L2 norm of gradients that lie in pieces on all processes; all of them must call this together."""
    squares = [part.float().square().sum() for part in local_parts(gradients)]
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=device)
    dist.all_reduce(total)
    return total.sqrt()


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's parts of sharded tensors; whole tensors as they are."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
