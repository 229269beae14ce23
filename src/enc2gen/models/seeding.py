"""Random numbers from a seed, without a trace in the generators of whoever calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers from `seed` inside the block, and leave the global generators as they were, GPUs' too."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if torch.cuda.is_available() and not devices:
            # torch.manual_seed would seed GPUs that nobody uses yet as soon as they are used, and nothing undo it.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        yield
