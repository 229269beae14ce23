"""The trainer's promises: exact accumulation, clipping, stages, the best weights, clear errors."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertModel,
    EncoderDecoderModel,
)

from enc2gen.data.batching import Batch, EncodedExample, collate
from enc2gen.errors import ConfigError, DataError, OutputError, TrainingError
from enc2gen.locking import locked_folder
from enc2gen.training import Callback, StepMetrics, Trainer, TrainingResult
from enc2gen.training.runtime import resolve_precision
from training_toys import (
    VOCABULARY,
    SignalAt,
    ToySeq2Seq,
    ToyStream,
    config,
    contradiction,
    metrics,
    trainer,
    trainer_steps,
    validation,
)


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
    reported = [record["gradient_norm"] for record in metrics(tmp_path / "clipped") if record["kind"] == "train"]
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
    message = r"loss nan.*at step 7, learning rate 0\.01[\s\S]*remedy: lower learning_rate[\s\S]*step-00000006"
    run = poisoned(tmp_path, 7)
    with pytest.raises(TrainingError, match=message):
        run.train()
    assert all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())
    assert trainer_steps(tmp_path) == [3, 6]


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

    def run(*callbacks: Callback) -> TrainingResult:
        return Trainer(ToySeq2Seq(), ToyStream(), contradiction(), settings, tmp_path, callbacks).train()

    assert run(SignalAt(6)).interrupted  # patience goes on counting where it was
    for _ in range(2):
        result = run()
        assert result.stopped_early and result.best_step == 2
        assert result.steps == 2 + 3 * 2


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


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    recomputed = []
    for on in (False, True):
        torch.manual_seed(0)
        encoder = BertModel(BertConfig(**shape, intermediate_size=16))
        decoder = BertGenerationDecoder(
            BertGenerationConfig(**shape, intermediate_size=16, is_decoder=True, add_cross_attention=True)
        )
        model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
        calls: list[int] = []
        decoder.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_, c=calls: c.append(1))
        settings = config(max_steps=3, warmup=0, gradient_checkpointing=on)
        result = Trainer(model, ToyStream(), validation(), settings, tmp_path / str(on)).train()
        recomputed.append(
            (len(calls), result.best_loss, any(getattr(m, "gradient_checkpointing", False) for m in model.modules()))
        )
    (plain, loss, _), (checkpointed, same_loss, left_on) = recomputed
    assert checkpointed == plain + 3 * 2  # once more for each batch of each update, not in validation
    assert same_loss == loss and not left_on
