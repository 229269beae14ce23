"""From records to batches: tasks, denoising noise, mixing of streams, batching."""

from __future__ import annotations

from enc2gen.data.batching import (
    Batch,
    BatchingConfig,
    BatchStream,
    EncodedExample,
    IndexedSource,
    collate,
    evaluation_batches,
    source_fingerprint,
)
from enc2gen.data.mixture import MixtureConfig, MixtureSampler, mixture_probabilities
from enc2gen.data.noising import Denoiser, NoiseConfig, split_sentences, word_starts
from enc2gen.data.tasks import TASKS, Example, Task, TaskConfig, build_task

__all__ = [
    "TASKS",
    "Batch",
    "BatchStream",
    "BatchingConfig",
    "Denoiser",
    "EncodedExample",
    "Example",
    "IndexedSource",
    "MixtureConfig",
    "MixtureSampler",
    "NoiseConfig",
    "Task",
    "TaskConfig",
    "build_task",
    "collate",
    "evaluation_batches",
    "mixture_probabilities",
    "source_fingerprint",
    "split_sentences",
    "word_starts",
]
