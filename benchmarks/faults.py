"""Does a run that is killed end as if it had not been? Kills training at random moments and compares, bit for bit.

    python benchmarks/faults.py --kills 50 --seed 0 --output faults.json

One run is left alone. Then each of the killed runs is trained in a process of its own, which is sent SIGKILL (or, one
time in five, SIGTERM) at a random moment: half of the time at any, half of the time while a checkpoint is being written
(one is written every few updates). A new process takes the run up. Compared are weights, optimiser, random states,
data position and metrics at the end; after every kill, all checkpoints that bear their final name must be whole.

The processes are forked from one that has loaded the libraries and done nothing else, because starting Python anew
takes longer than the training. Not for Windows. Prints a Markdown table; the exit status tells whether all runs were
the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import XLMRobertaConfig, XLMRobertaModel

from enc2gen import SwcmForConditionalGeneration
from enc2gen.data.batching import BatchingConfig, BatchStream, EncodedExample, evaluation_batches
from enc2gen.data.mixture import MixtureSampler
from enc2gen.errors import CheckpointError
from enc2gen.training import Trainer, TrainingConfig
from enc2gen.training.checkpoint import verify_checkpoint

VOCABULARY, STEPS = 64, 40
TERM_SHARE = 0.2  # of the kills are SIGTERM, which training answers by saving
AIMED_SHARE = 0.5  # of the kills wait for a checkpoint to be written
PATIENCE = 120.0  # seconds a process may take before the harness gives up on it


@dataclass(frozen=True)
class FaultReport:
    """What the kills did.

    Attributes:
        kills: processes killed; each in a run of its own.
        identical: runs that ended bit for bit as the undisturbed one.
        unreadable: states that could not be read: broken checkpoints under their final name, or failed resumes.
        in_checkpoint: kills that hit a process while it wrote a checkpoint.
        terminated: kills by SIGTERM; the others by SIGKILL.
        saved_on_term: of these, how many left a checkpoint of the very update they were stopped at.
        seconds: of everything.
    """

    kills: int
    identical: int
    unreadable: int
    in_checkpoint: int
    terminated: int
    saved_on_term: int
    seed: int
    seconds: float

    def table(self) -> str:
        """The report as a Markdown table."""
        rows = [
            ("runs killed once and taken up again", self.kills),
            ("of them bit-identical at the end", self.identical),
            ("unreadable states", self.unreadable),
            ("killed while a checkpoint was written", self.in_checkpoint),
            ("stopped by SIGTERM; of them saved at once", f"{self.terminated}; {self.saved_on_term}"),
            ("seconds", f"{self.seconds:.0f}"),
        ]
        return "\n".join(["| what | count |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def make_trainer(folder: Path) -> Trainer:
    """A tiny generator on a denoising-like copy task: all parts of real training, a few milliseconds an update."""
    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    encoder = XLMRobertaModel(
        XLMRobertaConfig(
            **shape, num_attention_heads=2, intermediate_size=32, max_position_embeddings=40, pad_token_id=1
        ),
        add_pooling_layer=False,
    )
    model = SwcmForConditionalGeneration.from_encoder(encoder, insert_every=2, verbose=False)

    def encode(stream: str, item: int, rng: np.random.Generator) -> EncodedExample:
        target = np.random.default_rng(item).integers(5, VOCABULARY, 4 + item % 8)
        noised = np.where(rng.random(len(target)) < 0.2, 4, target)
        return EncodedExample((0, *noised.tolist(), 2), (3, *target.tolist()), (*target.tolist(), 2))

    stream = BatchStream(encode, MixtureSampler({"copy": 200}), 1, BatchingConfig(max_tokens=120), 0, {"task": "copy"})
    held_out = [encode("copy", item, np.random.default_rng(item)) for item in range(200, 212)]
    config = TrainingConfig(
        max_steps=STEPS, learning_rate=1e-2, precision="fp32", gradient_accumulation=2, freeze_encoder_steps=9,
        eval_every=8, save_every=3, log_every=1, tensorboard=False, progress=False,
    )  # fmt: skip
    return Trainer(model, stream, {"copy": evaluation_batches(held_out, 1, 400)}, config, folder)


def final_state(folder: Path) -> dict[str, Any]:
    """Everything that two equal runs share at their end: tensors as bytes, and the state without its timings."""
    checkpoint = folder / "checkpoints" / f"step-{STEPS:08d}"
    verify_checkpoint(checkpoint)
    state = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
    state["progress"].pop("seconds")
    for name in ("model/model", "optimizer", "rng"):
        for key, tensor in load_file(checkpoint / f"{name}.safetensors").items():
            state[f"{name}:{key}"] = (str(tensor.dtype), tuple(tensor.shape), tensor.numpy().tobytes())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    state["metrics"] = [
        {name: value for name, value in record.items() if name not in ("seconds", "tokens_per_second")}
        for record in records
    ]
    return state


def _train(folder: Path) -> None:
    """What a child process does: train until the end or the kill; what it prints goes into files beside the run."""
    torch.set_num_threads(1)
    for name in ("stdout", "stderr"):
        setattr(sys, name, (folder.parent / f"{folder.name}.{name}").open("a", encoding="utf-8"))
    make_trainer(folder).train()


class Harness:
    """Trains and kills runs below `folder`, at moments that `seed` decides as far as the machine's pace allows."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self._context = multiprocessing.get_context("fork")

    def start(self, name: str) -> Any:
        """Start a process that trains, or goes on with, the run `name`."""
        process = self._context.Process(target=_train, args=(self.folder / name,))
        process.start()
        return process

    def finish(self, name: str) -> float:
        """Train the run to its end in a new process; seconds it took.

        Raises:
            RuntimeError: the process failed or hung.
        """
        start = time.monotonic()
        process = self.start(name)
        process.join(PATIENCE)
        if process.exitcode != 0:
            process.kill()
            log = self.folder / f"{name}.stderr"
            tail = log.read_text(encoding="utf-8")[-2000:] if log.exists() else ""
            raise RuntimeError(f"run {name} ended with status {process.exitcode}\n{tail}")
        return time.monotonic() - start

    def kill(self, name: str, duration: float) -> tuple[int, bool]:
        """Start the run and kill it at a random moment of its `duration`.

        Returns:
            The signal, and whether a checkpoint was being written; signal 0 if the run was over before.
        """
        number = signal.SIGTERM if self.random.random() < TERM_SHARE else signal.SIGKILL
        aimed = self.random.random() < AIMED_SHARE
        moment, offset = self.random.uniform(0.05, 0.95) * duration, self.random.uniform(0.0, 0.01)
        process = self.start(name)
        deadline = time.monotonic() + moment
        process.join(moment)
        if aimed:
            deadline += duration
            while process.is_alive() and time.monotonic() < deadline and not self.hidden(name):
                time.sleep(0.0002)
            time.sleep(offset)  # a checkpoint takes a few hundredths of a second
        if not process.is_alive():
            return 0, False
        os.kill(process.pid, number)
        process.join(PATIENCE)
        # SIGTERM lets a checkpoint be finished: only SIGKILL can leave one half written
        return (number if process.exitcode != 0 or number == signal.SIGTERM else 0), bool(self.hidden(name))

    def hidden(self, name: str) -> list[Path]:
        """Checkpoints of the run that have not got their names, or have lost them."""
        return list((self.folder / name / "checkpoints").glob(".*"))

    def broken(self, name: str) -> int:
        """Checkpoints of the run that bear their final names and are not whole."""
        count = 0
        for path in (self.folder / name / "checkpoints").glob("[!.]*-[0-9]*"):
            try:
                verify_checkpoint(path)
            except CheckpointError:
                count += 1
        return count


def run_faults(
    kills: int, seed: int, folder: Path, on_kill: Callable[[int], None] = lambda number: None
) -> FaultReport:
    """Kill `kills` runs below `folder`, which must be empty or missing, and compare their ends.

    Args:
        on_kill: called with the number of runs done.
    """
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    harness = Harness(folder, seed)
    duration = harness.finish("undisturbed")
    expected = final_state(folder / "undisturbed")
    count = dict.fromkeys(("identical", "unreadable", "in_checkpoint", "terminated", "saved_on_term"), 0)
    done = 0
    while done < kills:
        name = f"killed-{done}"
        number, in_checkpoint = harness.kill(name, duration)
        if number == 0:  # the run was faster than the kill
            shutil.rmtree(folder / name, ignore_errors=True)
            duration *= 0.95
            continue
        done += 1
        count["unreadable"] += harness.broken(name)
        count["in_checkpoint"] += in_checkpoint
        if number == signal.SIGTERM:
            count["terminated"] += 1
            count["saved_on_term"] += _saved_last_update(folder / name)
        try:
            harness.finish(name)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            count["unreadable"] += 1
        else:
            count["identical"] += final_state(folder / name) == expected
        shutil.rmtree(folder / name, ignore_errors=True)
        on_kill(done)
    return FaultReport(kills=kills, seed=seed, seconds=time.monotonic() - start, **count)


def _saved_last_update(folder: Path) -> bool:
    """Whether the newest checkpoint is of the last update in the metrics."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    steps = [int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*")]
    return max(steps, default=0) == (json.loads(lines[-1])["step"] if lines else 0)


def main() -> None:
    """Parse the command line, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--folder", type=Path, help="where the runs are made; else a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = run_faults(
            arguments.kills,
            arguments.seed,
            Path(folder),
            lambda number: print(f"{number} of {arguments.kills}", end="\r", file=sys.stderr, flush=True),
        )
    print(report.table())
    if arguments.output:
        arguments.output.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if report.identical == report.kills and not report.unreadable else 1)


if __name__ == "__main__":
    main()
