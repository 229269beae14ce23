"""Validation losses: means over all processes, given up in time when the run is to end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from enc2gen.models.token_loss import TokenLoss
from enc2gen.training.parallel import Replicas

if TYPE_CHECKING:
    from enc2gen.data.protocols import TrainingBatch


@torch.no_grad()
def mean_loss(
    parallel: Replicas,
    loss_of: Callable[[TrainingBatch], TokenLoss],
    batches: Sequence[TrainingBatch],
    stop: Callable[[], bool],
) -> float:
    """Mean negative log-likelihood per target token in nats; all processes must call this together.

    Args:
        parallel: the processes; they share the batches, and the model is in evaluation mode meanwhile.
        loss_of: calls the model.
        stop: asked before every batch, in each process; once it says yes, the result is of no meaning.
    """
    model = parallel.evaluated
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=parallel.device)
    own = list(batches[parallel.rank :: parallel.processes])
    if parallel.every_process_evaluates and len(own) * parallel.processes < len(batches):
        own.append(batches[0])  # not counted: the others have one more, for which they need this process
    for index, batch in enumerate(own):
        if parallel.gives_up(stop()):
            break
        loss = loss_of(batch)
        if index * parallel.processes + parallel.rank < len(batches):
            total += torch.stack([loss.negative_log_likelihood.double(), loss.count.double()])
    model.train(was_training)
    nll, count = parallel.sum(total).tolist()
    return nll / count if count else math.nan
