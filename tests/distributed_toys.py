"""Runs of a tiny generator for the tests of training with several processes, and those processes."""

from __future__ import annotations

import os
import socket
import traceback
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from conftest import tiny_encoder
from enc2gen import SwcmForConditionalGeneration
from enc2gen.training import Trainer, TrainingConfig
from training_toys import ToyStream, toy_batch


@dataclass(frozen=True)
class Case:
    """One run: how the model is built and trained, and how many processes share the 4 batches of an update."""

    name: str
    model: tuple[tuple[str, Any], ...] = ()
    training: tuple[tuple[str, Any], ...] = ()
    sharded: bool = False

    def trainer(self, folder: Path, processes: int) -> Trainer:
        encoder = tiny_encoder(layers=3)
        options: dict[str, Any] = {"insert_every": 2, "dropout": 0.1, "verbose": False, **dict(self.model)}
        model = SwcmForConditionalGeneration.from_encoder(encoder, **options)
        settings: dict[str, Any] = {
            "max_steps": 4, "learning_rate": 1e-2, "warmup": 0, "precision": "fp32", "eps": 1e-3,
            "gradient_accumulation": 4 // processes, "eval_every": 4, "save_every": 2, "log_every": 1,
            "max_grad_norm": 0.5, "tensorboard": False, "progress": False, **dict(self.training),
        }  # fmt: skip
        sets = {"three batches": [toy_batch(9, index) for index in range(3)]}
        return Trainer(model, ToyStream(), sets, TrainingConfig(**settings), folder)


def run_cases(runs: list[tuple[Case, Path]], processes: int = 2) -> None:
    """Train every case with `processes` processes that talk over gloo; their failures are raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")  # loading the libraries anew would take longer than the training
    workers = [context.Process(target=_worker, args=(rank, processes, port, runs)) for rank in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)
    failures = [path.read_text() for _, folder in runs for path in folder.parent.glob(f"{folder.name}.failure-*")]
    for worker in workers:
        worker.kill()
    assert not failures and all(worker.exitcode == 0 for worker in workers), "\n".join(failures) or "a process hung"


def _worker(rank: int, processes: int, port: int, runs: list[tuple[Case, Path]]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FSDP_VERSION": "2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one was forked from
    for case, folder in runs:
        os.environ["ACCELERATE_USE_FSDP"] = str(case.sharded).lower()
        try:
            trainer = case.trainer(folder, processes)
            trainer.train()
            if rank == 0:
                trainer.model.save_pretrained(folder / "final")
        except BaseException:
            folder.with_name(f"{folder.name}.failure-{rank}").write_text(traceback.format_exc())
            os._exit(1)  # the other one waits for us and is ended by the test
    torch.distributed.destroy_process_group()
