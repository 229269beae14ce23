"""The trainer's promises: exact resume, exact accumulation, clear ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from enc2gen.data.batching import Batch, EncodedExample, collate
from enc2gen.errors import CheckpointError, ConfigError, DataError, OutputError, TrainingError
from enc2gen.training import Callback, StepMetrics, Trainer, TrainingConfig, TrainingResult
from enc2gen.training.runtime import locked_folder, resolve_precision, restore_rng, rng_tensors

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
    return Trainer(
        ToySeq2Seq(), ToyStream(kill_at=kill_at), validation(), config(**changes), folder, callbacks
    )


def final_state(folder: Path, step: int = 12) -> dict[str, Any]:
    """Everything a resumed run must share with an uninterrupted one, from its last checkpoint and metrics."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    state = json.loads((checkpoint / "trainer.json").read_text())
    state["progress"].pop("seconds")
    files = ("model/model.safetensors", "optimizer.safetensors", "rng.safetensors")
    tensors = {
        f"{file}:{name}": tensor for file in files for name, tensor in load_file(checkpoint / file).items()
    }
    return {"state": state, "tensors": tensors, "metrics": metrics(folder)}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics file without its timings."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in records
    ]


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
    script = "import sys; from pathlib import Path; import test_trainer as t\n"
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, uninterrupted: Any, number: int
) -> None:
    expected, expected_result, expected_weights = uninterrupted
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for step in (2, 4, 10):  # in the frozen stage, at a validation, between two checkpoints
        torch.manual_seed(step)  # what the process did before must not matter
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


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    class Twice(SignalAt):
        def on_step(self, metrics: StepMetrics) -> None:
            super().on_step(metrics)
            super().on_step(metrics)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[Twice(6)]).train()
    assert trainer(tmp_path).train().steps == 12


def test_broken_newest_checkpoint_falls_back_and_ends_the_same(tmp_path: Path, uninterrupted: Any) -> None:
    trainer(tmp_path, callbacks=[SignalAt(10)]).train()
    weights = tmp_path / "checkpoints" / "step-00000010" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"step-00000010.*model\.safetensors[\s\S]*truncated"):
        trainer(tmp_path).train()
    assert_same(final_state(tmp_path), uninterrupted[0])


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


def test_the_final_model_holds_the_best_weights(tmp_path: Path) -> None:
    run = Trainer(ToySeq2Seq(), ToyStream(), contradiction(), config(), tmp_path / "best")
    result = run.train()
    assert result.best_step == 4
    assert run.evaluate(run.validation["a"]) == result.losses["a"] == result.best_loss
    assert result.best_checkpoint is not None
    saved = load_file(result.best_checkpoint / "model" / "model.safetensors")
    assert torch.equal(saved["decoder.weight"], run.model.decoder.weight)
    assert not run.model.training
    kept = Trainer(ToySeq2Seq(), ToyStream(), contradiction(), config(load_best=False), tmp_path / "last")
    kept.train()
    assert kept.evaluate(kept.validation["a"]) > result.losses["a"] + 0.1


def test_validation_loss_is_the_mean_per_target_token(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.model.eval()
    total, count = 0.0, 0
    for batch in run.validation["a"]:
        inputs = batch.as_model_inputs()
        labels = inputs.pop("labels")
        logits = run.model(**inputs).logits
        total += nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
    run.model.train()
    assert run.evaluate(run.validation["a"]) == pytest.approx(total / count, rel=1e-5)
    assert run.model.training


def test_it_learns(tmp_path: Path) -> None:
    settings = {"freeze_encoder_steps": 0, "label_smoothing": 0.0, "eval_every": 250, "save_every": 250}
    result = trainer(tmp_path, max_steps=250, **settings).train()
    assert result.best_loss is not None and result.best_loss < 0.1


class OneBigBatch(ToyStream):
    """What the toy stream gives in four draws, in one."""

    def __iter__(self) -> Iterator[Batch]:
        source = super().__iter__()
        while batches := list(islice(source, 4)):
            rows = [
                EncodedExample(*(tuple(t[row][m[row] == 1].tolist()) for t, m in _fields(batch)))
                for batch in batches
                for row in range(batch.labels.shape[0])
            ]
            yield collate(rows, pad_token_id=0)


def _fields(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    target = batch.decoder_attention_mask
    return [
        (batch.input_ids, batch.attention_mask),
        (batch.decoder_input_ids, target),
        (batch.labels, target),
    ]


def test_accumulated_batches_equal_one_big_batch(tmp_path: Path) -> None:
    # eps of the size of the gradients: Adam would blow up rounding differences of parameters without gradient
    settings = config(max_steps=6, eps=1e-3)
    models = []
    for name, stream, accumulation in (("four", ToyStream(), 4), ("one", OneBigBatch(), 1)):
        model = ToySeq2Seq(dropout=0.0)
        changed = settings.model_copy(update={"gradient_accumulation": accumulation})
        Trainer(model, stream, {}, changed, tmp_path / name).train()
        models.append(model)
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(parameter, models[1].get_parameter(name), rtol=1e-4, atol=1e-6)
    four, one = metrics(tmp_path / "four"), metrics(tmp_path / "one")
    assert [r["loss"] for r in four] == pytest.approx([r["loss"] for r in one], rel=1e-5)
    assert [r["tokens"] for r in four] == [r["tokens"] for r in one]


def test_gradients_are_clipped_to_the_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
        original(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    trainer(tmp_path / "clipped", max_grad_norm=0.01, log_every=1, freeze_encoder_steps=0).train()
    assert norms == pytest.approx([0.01] * 12, rel=1e-3)
    reported = [
        record["gradient_norm"] for record in metrics(tmp_path / "clipped") if record["kind"] == "train"
    ]
    assert min(reported) > 0.02  # the norm before clipping
    norms.clear()
    trainer(tmp_path / "free", max_grad_norm=None, log_every=1, freeze_encoder_steps=0).train()
    reported = [record["gradient_norm"] for record in metrics(tmp_path / "free") if record["kind"] == "train"]
    assert norms == pytest.approx(reported, rel=1e-5)


def test_the_encoder_stands_still_in_the_first_stage(tmp_path: Path) -> None:
    class Watch(Callback):
        moved: list[bool] = []  # noqa: RUF012

        def on_step(self, metrics: StepMetrics) -> None:
            self.moved.append(not torch.equal(run.model.encoder["dense"].weight, start))

    run = trainer(tmp_path, callbacks=[Watch()], log_every=1, freeze_encoder_steps=5)
    start = run.model.encoder["dense"].weight.detach().clone()
    embedding = run.model.head.weight.detach().clone()
    run.train()
    assert Watch.moved == [False] * 5 + [True] * 7
    assert not torch.equal(embedding, run.model.head.weight)


class PoisonAt(Callback):
    """Makes the logits infinite in the updates after the given steps."""

    def __init__(self, model: ToySeq2Seq, *steps: int) -> None:
        self.model, self.steps = model, steps

    def on_start(self, step: int, max_steps: int) -> None:
        self.model.factor = float("inf") if step in self.steps else 1.0

    def on_step(self, metrics: StepMetrics) -> None:
        self.model.factor = float("inf") if metrics.step in self.steps else 1.0


def poisoned(folder: Path, *steps: int, **changes: Any) -> Trainer:
    model = ToySeq2Seq()
    settings = config(log_every=1, eval_every=100, **changes)
    return Trainer(model, ToyStream(), {}, settings, folder, [PoisonAt(model, *steps)])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    message = (
        r"loss nan.*at step 7, learning rate 0\.01[\s\S]*remedy: lower learning_rate[\s\S]*step-00000006"
    )
    run = poisoned(tmp_path, 7)
    with pytest.raises(TrainingError, match=message):
        run.train()
    assert all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())
    assert trainer_steps(tmp_path) == [3, 6]


def trainer_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def test_updates_that_are_not_finite_can_be_skipped(tmp_path: Path) -> None:
    run = poisoned(tmp_path, 4, 7, nonfinite="skip", max_skipped_in_row=2)
    result = run.train()
    assert result.skipped == 2 and result.steps == 12
    assert all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())
    assert [record["step"] for record in metrics(tmp_path) if record["loss"] is None] == [5, 8]


def test_skipping_ends_after_too_many_in_a_row(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"at step 6.*3 times in a row"):
        poisoned(tmp_path, 1, 4, 5, 6, 7, nonfinite="skip", max_skipped_in_row=3).train()


def test_training_stops_early_and_stays_stopped(tmp_path: Path) -> None:
    settings = config(max_steps=200, warmup=0, eval_every=2, patience=3, save_every=100)
    for _ in range(2):
        result = Trainer(ToySeq2Seq(), ToyStream(), contradiction(), settings, tmp_path).train()
        assert result.stopped_early and result.best_step == 2
        assert result.steps == 2 + 3 * 2


def test_other_settings_or_data_are_refused_by_name(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[SignalAt(4)]).train()
    with pytest.raises(
        CheckpointError, match=r"learning_rate: 0\.03 in the checkpoint, 0\.01 now[\s\S]*remedy"
    ):
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


def test_starting_afresh_does_not_overwrite_a_run(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    with pytest.raises(OutputError, match="already holds checkpoints"):
        trainer(tmp_path).train(resume=False)
    assert trainer(tmp_path / "new").train(resume=False).steps == 12


def test_an_output_folder_in_use_is_refused(tmp_path: Path) -> None:
    with locked_folder(tmp_path), pytest.raises(OutputError, match=f"in use by process {os.getpid()}"):
        trainer(tmp_path).train()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / ".lock").write_text(json.dumps({"pid": dead.pid, "host": "x"}))
    assert trainer(tmp_path).train().steps == 12


def test_an_output_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write to the output folder[\s\S]*remedy"):
        trainer(tmp_path / "file" / "run").train()


def test_a_full_disk_ends_training_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, callbacks=[DiskFullAfter(7, monkeypatch)])
    with pytest.raises(OutputError, match="No space left"):
        run.train()
    monkeypatch.undo()
    assert trainer_steps(tmp_path) == [3, 6]
    assert trainer(tmp_path).train().steps == 12


class DiskFullAfter(Callback):
    def __init__(self, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self.monkeypatch = step, monkeypatch

    def on_step(self, metrics: StepMetrics) -> None:
        def full(_: int) -> None:
            raise OSError(28, os.strerror(28))

        if metrics.step >= self.step:
            self.monkeypatch.setattr(os, "fsync", full)


def test_data_that_cannot_be_trained_on_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="stream ended at step 2"):
        Trainer(ToySeq2Seq(), ToyStream(length=5), {}, config(), tmp_path / "1").train()
    with pytest.raises(ConfigError, match="validation set 'empty' holds no target token"):
        Trainer(ToySeq2Seq(), ToyStream(), {"empty": []}, config(), tmp_path / "2")


def test_half_precision_models_are_trained_in_float32(tmp_path: Path) -> None:
    model = ToySeq2Seq().bfloat16()
    Trainer(model, ToyStream(), {}, config(precision="bf16"), tmp_path).train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.head.weight is model.encoder["embed"].weight


def test_bf16_computes_in_bfloat16_and_fp32_does_not(tmp_path: Path) -> None:
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        run, seen = trainer(tmp_path / precision, precision=precision, max_steps=2, warmup=0), set()
        run.model.decoder.register_forward_hook(lambda *args, seen=seen: seen.add(args[2].dtype))
        run.train()
        assert seen == {dtype}


def test_auto_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for name, expected in (("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx2", "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert resolve_precision("auto", cpu) == expected
    assert resolve_precision("fp32", cpu) == "fp32"


def test_gradient_checkpointing_needs_a_model_that_can(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ToySeq2Seq has no gradient checkpointing"):
        trainer(tmp_path, gradient_checkpointing=True).train()


def test_random_states_survive_their_tensors() -> None:
    def draw() -> tuple[float, ...]:
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            torch.rand(()).item(),
        )

    for odd in (False, True):  # with and without a cached second Gaussian
        if odd:
            random.gauss(0, 1)
            np.random.randn()
        saved = rng_tensors()
        expected = draw()
        draw()
        restore_rng(saved)
        assert draw() == expected
