"""A rehearsal of a launch with several processes: they meet, agree on what to do, and say what it will be."""

from __future__ import annotations

import os
import socket
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from enc2gen.errors import ConfigError
from enc2gen.training.runtime import make_accelerator
from enc2gen.training.sharding import sharding_requested

if TYPE_CHECKING:
    from enc2gen.data.batching import BatchingConfig
    from enc2gen.training.config import TrainingConfig


@dataclass(frozen=True)
class Launch:
    """Processes that train together.

    Attributes:
        machines: name of each machine, by its rank.
        main: whether this is the process that writes.
        device: kind of device of all of them.
        sharded: whether they train parts of the model (FSDP2); else each trains a copy (DDP).
    """

    processes: int
    machines: tuple[str, ...]
    main: bool
    device: str
    sharded: bool

    def describe(self) -> str:
        """Who takes part, in one line."""
        names = ", ".join(f"{name} x{count}" if count > 1 else name for name, count in Counter(self.machines).items())
        nodes = f"{len(self.machines)} node{'s' * (len(self.machines) > 1)} ({names})"
        kind = "one sharded model (FSDP2)" if self.sharded else "replicas of the model (DDP)"
        return f"{self.processes} processes on {nodes}, device {self.device}, {kind}"

    def global_batch(self, training: TrainingConfig, batching: BatchingConfig) -> str:
        """Most that an update is computed from, over all processes, in one line."""
        batches = self.processes * training.gradient_accumulation
        limits = {"tokens": batching.max_tokens, "examples": batching.max_examples}
        most = [f"{batches * limit:,} {unit}" for unit, limit in limits.items() if limit is not None]
        share = f"{self.processes} processes x gradient_accumulation {training.gradient_accumulation}"
        return f"{batches} batches an update ({share}), at most {' and '.join(most)}"


def rehearse(digest: str) -> Launch:
    """Let all launched processes meet, compare notes and part; every one of them must call this.

    Args:
        digest: of what this process would do.

    Raises:
        ConfigError: the processes would do different things; it names their machines.
    """
    accelerator = make_accelerator()
    sharded, device = sharding_requested(), accelerator.device.type
    own = (os.environ.get("GROUP_RANK", "0"), socket.gethostname(), digest, device, sharded)
    found: list[tuple[str, str, str, str, bool] | None] = [None] * accelerator.num_processes
    dist.all_gather_object(found, own)
    accelerator.wait_for_everyone()
    dist.destroy_process_group()
    met = [one for one in found if one is not None]
    for place, what in ((2, "recipes or settings"), (3, "devices"), (4, "ways to share the model (FSDP or not)")):
        if any(one[place] != met[0][place] for one in met):
            others = sorted({one[1] for one in met if one[place] != met[0][place]})
            raise ConfigError(
                f"{met[0][1]} and {', '.join(others)} have different {what}",
                where="--dry-run",
                remedy="start the same command, with the same files, on every machine",
            )
    machines = tuple(name for _, name in sorted({(int(one[0]), one[1]) for one in met}))
    return Launch(len(met), machines, accelerator.is_main_process, device, sharded)
