"""What batching, streams and the trainer ask of examples and batches, whatever the objective."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class BatchExample(Protocol):
    """What the batching needs to know of an example: how long its two sides are, in tokens."""

    @property
    def source_length(self) -> int: ...  # 1 or more

    @property
    def target_length(self) -> int: ...  # 0 where there is no second sequence


class TrainingBatch(Protocol):
    """What the trainer needs of a batch; :class:`Batch` for sequence-to-sequence models is one."""

    input_ids: Tensor
    labels: Tensor

    @property
    def num_target_tokens(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    def to(self, device: torch.device | str) -> TrainingBatch: ...

    def as_model_inputs(self) -> dict[str, Tensor]: ...
