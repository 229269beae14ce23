"""Exact resume: whatever ends a run, going on gives what an undisturbed run gives, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from enc2gen.data.batching import Batch
from enc2gen.errors import CheckpointError
from enc2gen.training import Callback, StepMetrics, Trainer, TrainingResult
from enc2gen.training.runtime import (
    InterruptFlag,
    restore_rng,
    rng_tensors,
    seed_everything,
)
from training_toys import (
    SignalAt,
    ToySeq2Seq,
    ToyStream,
    assert_same,
    config,
    final_state,
    metrics,
    toy_batch,
    trainer,
    validation,
)


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], TrainingResult, dict[str, Tensor]]:
    """State, result and final weights of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = trainer(folder)
    result = run.train()
    return final_state(folder), result, {name: t.clone() for name, t in run.model.state_dict().items()}


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, uninterrupted: Any) -> None:
    script = "import sys; from pathlib import Path; import training_toys as t\n"
    script += "t.trainer(Path(sys.argv[1]), kill_at=int(sys.argv[2])).train()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    # Batches 2k and 2k + 1 make update k: 9 is in the middle of one; the other differs from run to run.
    points = {9, random.Random(os.getpid()).randrange(1, 24)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / str(at)), str(at)], env=environment)
        for at in points
    ]
    for at, process in zip(points, processes, strict=True):
        assert process.wait(timeout=100) == -signal.SIGKILL
        folder = tmp_path / str(at)
        result = trainer(folder).train()
        assert_same(final_state(folder), uninterrupted[0])
        assert result.best_loss == uninterrupted[1].best_loss, f"killed at batch {at}"


@pytest.fixture
def hang_ups_end() -> Iterator[None]:
    """As in a terminal, where these tests may not have been started: under nohup, hang-ups are ignored."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, uninterrupted: Any, number: int, hang_ups_end: None
) -> None:
    expected, expected_result, expected_weights = uninterrupted
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for step in (2, 4, 10):  # in the frozen stage, at a validation, between two checkpoints
        seed_everything(step)  # what the process did before must not matter
        result = trainer(tmp_path, callbacks=[SignalAt(step, number=number)]).train()
        assert result.interrupted and result.steps == step
        assert result.last_checkpoint == tmp_path / "checkpoints" / f"step-{step:08d}"
    run = trainer(tmp_path)
    result = run.train()
    assert not result.interrupted
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    actual = final_state(tmp_path)
    actual["state"]["callbacks"].pop("SignalAt-0", None)
    assert_same(actual, expected)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, expected_weights[name]), name
    for field in ("steps", "best_step", "best_loss", "losses", "tokens", "stopped_early", "skipped"):
        assert getattr(result, field) == getattr(expected_result, field), field


def test_the_same_trainer_goes_on_after_an_interruption(tmp_path: Path, uninterrupted: Any) -> None:
    run = trainer(tmp_path, callbacks=[SignalAt(2)])
    assert run.train().interrupted
    assert run.train().steps == 12
    actual = final_state(tmp_path)
    actual["state"]["callbacks"].pop("SignalAt-0")
    assert_same(actual, uninterrupted[0])


def test_callbacks_that_draw_random_numbers_change_nothing(tmp_path: Path, uninterrupted: Any) -> None:
    class Draw(Callback):
        def on_step(self, metrics: StepMetrics) -> None:
            torch.rand(metrics.step)

    trainer(tmp_path, callbacks=[Draw()]).train()
    actual, expected = final_state(tmp_path)["tensors"], uninterrupted[0]["tensors"]
    assert all(torch.equal(actual[name], expected[name]) for name in expected if name.startswith("model"))
    other = trainer(tmp_path / "other seed", seed=1)
    other.train()
    assert not torch.equal(other.model.decoder.weight, uninterrupted[2]["decoder.weight"])


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    class Twice(SignalAt):
        def on_step(self, metrics: StepMetrics) -> None:
            super().on_step(metrics)
            super().on_step(metrics)

    # A shell that starts the tests in the background has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, callbacks=[Twice(6)]).train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer(tmp_path).train().steps == 12


def test_broken_newest_checkpoint_falls_back_and_ends_the_same(tmp_path: Path, uninterrupted: Any) -> None:
    trainer(tmp_path, callbacks=[SignalAt(10)]).train()
    weights = tmp_path / "checkpoints" / "step-00000010" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"step-00000010.*model\.safetensors[\s\S]*truncated"):
        trainer(tmp_path).train()
    assert_same(final_state(tmp_path), uninterrupted[0])


def test_falling_back_behind_the_best_step_points_to_the_best_before(tmp_path: Path) -> None:
    class StopAtOnce(Callback):
        def on_start(self, step: int, max_steps: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    assert trainer(tmp_path, keep_last=3, callbacks=[SignalAt(10)]).train().best_step == 8
    checkpoints = tmp_path / "checkpoints"
    for step in (9, 10):
        (checkpoints / f"step-{step:08d}" / "trainer.json").unlink()
    with pytest.warns(UserWarning, match="missing"):
        result = trainer(tmp_path, keep_last=3, callbacks=[StopAtOnce()]).train()
    assert (result.steps, result.best_step) == (6, 4)
    assert result.best_checkpoint == checkpoints / "best-00000004"
    assert json.loads((checkpoints / "best.json").read_text()) == {
        "checkpoint": "best-00000004",
        "step": 4,
    }


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    result = first.train()
    before = final_state(tmp_path)
    again = trainer(tmp_path)
    repeated = again.train()
    timings = {"seconds": result.seconds, "tokens_per_second": result.tokens_per_second}
    assert replace(repeated, **timings) == result
    assert_same(final_state(tmp_path), before)
    assert torch.equal(again.model.head.weight, first.model.head.weight)


def test_other_settings_or_data_are_refused_by_name(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[SignalAt(4)]).train()
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.03 in the checkpoint, 0\.01 now[\s\S]*remedy"):
        trainer(tmp_path, learning_rate=0.01).train()
    with pytest.raises(CheckpointError, match="training: 'toy 0' in the checkpoint, 'toy 5' now"):
        Trainer(ToySeq2Seq(), ToyStream(seed=5), validation(), config(), tmp_path).train()
    with pytest.raises(CheckpointError, match="validation: "):
        Trainer(ToySeq2Seq(), ToyStream(), {"a": [toy_batch(7, 7)]}, config(), tmp_path).train()
    model = ToySeq2Seq()
    model.decoder = nn.Linear(32, 16, bias=False)
    with pytest.raises(CheckpointError, match=r"no tensor 'decoder\.bias'"):
        Trainer(model, ToyStream(), validation(), config(), tmp_path).train()
    assert trainer(tmp_path, save_every=5, keep_last=1, log_every=3).train().steps == 12  # these are free


def test_random_states_survive_their_tensors() -> None:
    def draw() -> tuple[float, ...]:
        return (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item())

    for cached in (False, True):  # both generators keep every second Gaussian
        seed_everything(0)
        if cached:
            random.gauss(0, 1)
            np.random.randn()
        saved = rng_tensors()
        expected = draw()
        draw()
        restore_rng(saved)
        assert draw() == expected


class SignallingBatch(Batch):
    """Sends this process SIGTERM when as many of its kind were used as `at` says."""

    used = at = 0

    def to(self, device: Any) -> Batch:
        SignallingBatch.used += 1
        if SignallingBatch.used == SignallingBatch.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().to(device)


@pytest.mark.parametrize(("at", "step"), [(2, 4), (82, 12)], ids=["in the first validation", "in the last"])
def test_sigterm_does_not_wait_for_the_end_of_a_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, step: int
) -> None:
    many = {"a": [toy_batch(100, index) for index in range(2)] * 20, "b": [toy_batch(101, 0)]}

    def run(folder: Path, first: list[Any]) -> TrainingResult:
        return Trainer(ToySeq2Seq(), ToyStream(), {**many, "a": first}, config(), folder).train()

    expected = run(tmp_path / "undisturbed", many["a"])
    monkeypatch.setattr(SignallingBatch, "used", 0)
    monkeypatch.setattr(SignallingBatch, "at", at)
    result = run(tmp_path / "signalled", [SignallingBatch(**vars(batch)) for batch in many["a"]])
    assert result.interrupted and result.steps == step and SignallingBatch.used == at, "asked before each batch"
    assert result.last_checkpoint == tmp_path / "signalled" / "checkpoints" / f"step-{step:08d}"
    assert [m["step"] for m in metrics(tmp_path / "signalled") if "mean" in m] == list(range(4, step, 4))
    result = run(tmp_path / "signalled", many["a"])
    assert not result.interrupted and result.losses == expected.losses
    assert_same(final_state(tmp_path / "signalled"), final_state(tmp_path / "undisturbed"))


def test_torchruns_signal_after_the_batch_systems_own_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "my-run")
    with InterruptFlag() as interrupted:
        for _ in range(2):  # the second would end the process
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted.raised


def test_under_nohup_a_closed_terminal_interrupts_nothing() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with InterruptFlag() as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupted.raised
    finally:
        signal.signal(signal.SIGHUP, previous)
