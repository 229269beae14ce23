"""A toy sequence-to-sequence model, data stream and run, for the tests of the trainer."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from enc2gen.data.batching import Batch, EncodedExample, collate
from enc2gen.training import Callback, StepMetrics, Trainer, TrainingConfig

VOCABULARY = 20


class ToySeq2Seq(nn.Module):
    """The least that has an encoder, tied embeddings, dropout and a head: it learns to copy the source."""

    def __init__(self, seed: int = 0, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.ModuleDict({"embed": nn.Embedding(VOCABULARY, 16), "dense": nn.Linear(16, 16)})
        self.decoder = nn.Linear(32, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, VOCABULARY)
        self.head.weight = self.encoder["embed"].weight
        self.factor = 1.0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor,
    ) -> SimpleNamespace:
        source = self.encoder["dense"](self.encoder["embed"](input_ids[:, : decoder_input_ids.shape[1]]))
        target = self.encoder["embed"](decoder_input_ids)
        hidden = torch.tanh(self.decoder(torch.cat([source, target], dim=-1)))
        return SimpleNamespace(logits=self.head(self.dropout(hidden)) * self.factor)


def toy_batch(seed: int, index: int, rows: int = 3) -> Batch:
    """A copy task: rows of different lengths."""
    rng = np.random.default_rng([seed, index])
    examples = []
    for _ in range(rows):
        ids = tuple(rng.integers(2, VOCABULARY, rng.integers(2, 8)).tolist())
        examples.append(EncodedExample(input_ids=ids, decoder_input_ids=(1, *ids[:-1]), labels=ids))
    return collate(examples, pad_token_id=0)


class ToyStream:
    """Position -> batch. `kill_at`: the process dies when it asks for that batch."""

    def __init__(self, seed: int = 0, kill_at: int | None = None, length: int | None = None) -> None:
        self.seed, self.position, self.kill_at, self.length = seed, 0, kill_at, length

    @property
    def fingerprint(self) -> str:
        return f"toy {self.seed}"

    def __iter__(self) -> Iterator[Batch]:
        while self.length is None or self.position < self.length:
            if self.position == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.position += 1
            yield toy_batch(self.seed, self.position - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def validation() -> dict[str, list[Batch]]:
    return {"a": [toy_batch(100, index) for index in range(2)], "b": [toy_batch(101, 0)]}


def contradiction() -> dict[str, list[Batch]]:
    """A set on which every update that learns to copy makes the loss worse."""
    batch = toy_batch(100, 0)
    labels = torch.where(batch.labels == -100, -100, (batch.labels + 1) % VOCABULARY)
    return {"a": [replace(batch, labels=labels)]}


def config(**changes: Any) -> TrainingConfig:
    settings = {
        "max_steps": 12, "learning_rate": 3e-2, "warmup": 3, "gradient_accumulation": 2, "precision": "fp32",
        "eval_every": 4, "save_every": 3, "log_every": 2, "label_smoothing": 0.1, "freeze_encoder_steps": 5,
        "tensorboard": False, "progress": False,
    }  # fmt: skip
    return TrainingConfig(**{**settings, **changes})


def trainer(folder: Path, *, kill_at: int | None = None, callbacks: Any = (), **changes: Any) -> Trainer:
    return Trainer(ToySeq2Seq(), ToyStream(kill_at=kill_at), validation(), config(**changes), folder, callbacks)


def final_state(folder: Path, step: int = 12) -> dict[str, Any]:
    """Everything a resumed run must share with an uninterrupted one, from its last checkpoint and metrics."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    state = json.loads((checkpoint / "trainer.json").read_text())
    state["progress"].pop("seconds")
    files = ("model/model.safetensors", "optimizer.safetensors", "rng.safetensors")
    tensors = {f"{file}:{name}": tensor for file in files for name, tensor in load_file(checkpoint / file).items()}
    return {"state": state, "tensors": tensors, "metrics": metrics(folder)}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics file without its timings."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in records]


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["state"] == expected["state"]
    assert actual["metrics"] == expected["metrics"]
    assert actual["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert torch.equal(actual["tensors"][name], tensor), name


class SignalAt(Callback):
    """Sends this process a signal in the given steps, as Ctrl-C or a scheduler would."""

    def __init__(self, *steps: int, number: int = signal.SIGINT) -> None:
        self.steps, self.number = steps, number

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step in self.steps:
            os.kill(os.getpid(), self.number)


def trainer_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
