"""Our trainer against transformers' `Seq2SeqTrainer` on the same batches: without dropout, the same weights."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from conftest import tiny_encoder, tiny_tokenizer
from enc2gen.data.batching import Batch, EncodedExample, collate
from enc2gen.errors import ConfigError, TrainingError
from enc2gen.experiments.recipe import digest, load_recipe
from enc2gen.experiments.run import Run
from enc2gen.models.baselines import build_system
from enc2gen.training import Trainer, TrainingConfig
from enc2gen.training.cross_check import TransformersTrainer
from test_run import recipe_content, write_pairs


def batch(seed: int, index: int) -> Batch:
    """A copy task whose batches hold 1 to 4 rows: means over batches are not means over tokens."""
    rng = np.random.default_rng([seed, index])
    rows = []
    for _ in range(rng.integers(1, 5)):
        ids = tuple(rng.integers(5, 60, rng.integers(2, 9)).tolist())
        rows.append(EncodedExample(input_ids=(0, *ids, 2), decoder_input_ids=(4, *ids), labels=(*ids, 2)))
    return collate(rows, pad_token_id=1)


class Stream:
    """Position -> batch."""

    def __init__(self) -> None:
        self.position = 0

    fingerprint = "copies"

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.position += 1
            yield batch(0, self.position - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


VALIDATION = {"a": [batch(1, index) for index in range(3)], "b": [batch(2, 0)]}


def settings(**changes: Any) -> TrainingConfig:
    content = {
        "max_steps": 12, "learning_rate": 1e-2, "warmup": 4, "weight_decay": 0.3, "max_grad_norm": 0.5, "eval_every": 5,
        "log_every": 2, "gradient_accumulation": 2, "precision": "fp32", "tensorboard": False, "progress": False,
        "eps": 1e-4,
    }  # fmt: skip
    return TrainingConfig(**{**content, **changes})


def system(preset: str) -> Any:
    options: dict[str, Any] = {"dropout": 0.0}
    return build_system(
        preset,
        tiny_encoder(layers=2),
        tokenizer=tiny_tokenizer(),
        languages=["kk"],
        seed=0,
        verbose=False,
        options=options,
    )


def trained(kind: Any, preset: str, folder: Path, **changes: Any) -> tuple[Any, Any]:
    model = system(preset)
    return model, kind(model, Stream(), VALIDATION, settings(**changes), folder).train()


@pytest.mark.parametrize("preset", ["swcm", "warm-start", "mbart-shaped"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": "cosine", "label_smoothing": 0.1, "no_decay": ("bias",), "warmup": 0},
        {"schedule": "constant", "no_decay": (), "gradient_accumulation": 3, "max_grad_norm": None, "eps": 1e-2},
    ],
)
def test_both_trainers_end_with_the_same_weights(preset: str, changes: dict[str, Any], tmp_path: Path) -> None:
    start = system(preset).state_dict()
    ours, mine = trained(Trainer, preset, tmp_path / "ours", **changes)
    theirs, other = trained(TransformersTrainer, preset, tmp_path / "theirs", **changes)
    for name, tensor in ours.state_dict().items():
        difference, moved = (tensor - theirs.state_dict()[name]).norm(), (tensor - start[name]).norm()
        # Sums in another order differ in the last bits of float32, which Adam's division by small gradients enlarges.
        assert difference <= 1e-3 * moved + 1e-6, name
    assert mine.best_step == other.best_step and mine.tokens == other.tokens and mine.steps == other.steps
    assert mine.losses == pytest.approx(other.losses, rel=1e-4)
    assert mine.parameters == other.parameters


def test_lower_precision_is_transformers_own(tmp_path: Path) -> None:
    """bf16 rounds in other places on both sides, but to nearly the same losses, and our trainer works afterwards."""
    full = trained(TransformersTrainer, "warm-start", tmp_path / "full")[1]
    theirs, other = trained(TransformersTrainer, "warm-start", tmp_path / "theirs", precision="bf16")
    mine = trained(Trainer, "warm-start", tmp_path / "ours", precision="bf16")[1]
    assert other.losses != full.losses
    assert mine.losses == pytest.approx(other.losses, rel=1e-2)
    assert all(parameter.dtype == torch.float32 for parameter in theirs.parameters())
    inputs = {name: tensor for name, tensor in batch(3, 0).as_model_inputs().items() if name != "labels"}
    plain = theirs(**inputs, use_cache=False).logits
    assert not torch.equal(plain, plain.bfloat16().float()), "the autocast of training is left on"


def test_dropout_is_drawn_from_the_seed(tmp_path: Path) -> None:
    def losses(folder: str, seed: int) -> dict[str, float]:
        model = build_system("swcm", tiny_encoder(layers=2), tokenizer=tiny_tokenizer(), languages=["kk"], seed=0)
        assert model.config.hidden_dropout_prob > 0
        torch.manual_seed(len(folder))  # what was drawn before does not matter
        trainer = TransformersTrainer(model, Stream(), VALIDATION, settings(seed=seed), tmp_path / folder)
        return dict(trainer.train().losses)

    assert losses("a", 1) == losses("same", 1) != losses("other", 2)


def test_metrics_are_those_of_our_trainer(tmp_path: Path) -> None:
    for kind, name in ((Trainer, "ours"), (TransformersTrainer, "theirs")):
        trained(kind, "swcm", tmp_path / name, max_steps=7)
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("ours", "theirs")
    )
    assert [(row["kind"], row["step"], *row) for row in ours] == [(row["kind"], row["step"], *row) for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in {*mine} & {"learning_rate", "gradient_norm", "tokens", "mean"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-3), (name, mine["step"])
    assert [row["step"] for row in theirs if row["kind"] == "validation"] == [5, 7]


def test_early_stopping_and_the_best_weights(tmp_path: Path) -> None:
    contrary = {"a": [batch(1, 0)]}
    contrary["a"][0].labels = torch.where(contrary["a"][0].labels == -100, -100, 99)  # copying makes this worse
    results = {}
    for kind in (Trainer, TransformersTrainer):
        model = system("swcm")
        changes = {"patience": 2, "eval_every": 1, "warmup": 0}
        trainer = kind(model, Stream(), contrary, settings(**changes), tmp_path / kind.__name__)
        results[kind] = trainer.train(), model
    (mine, ours), (other, theirs) = results.values()
    assert mine.stopped_early and other.stopped_early and mine.steps == other.steps < 12
    assert mine.best_step == other.best_step < mine.steps
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-4)


def test_an_interruption_ends_the_stage_which_then_starts_anew(tmp_path: Path) -> None:
    class Interrupting(Stream):
        def __iter__(self) -> Iterator[Batch]:
            for found in super().__iter__():
                if self.position == 9:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield found

    folder = tmp_path / "run"
    stopped = TransformersTrainer(system("swcm"), Interrupting(), VALIDATION, settings(), folder).train()
    assert stopped.interrupted and 0 < stopped.steps < 12 and stopped.last_checkpoint is None
    again, result = trained(TransformersTrainer, "swcm", folder)
    whole, expected = trained(TransformersTrainer, "swcm", tmp_path / "whole")
    assert result.steps == 12 and result.losses == expected.losses and not result.interrupted
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_what_only_our_trainer_does_is_refused(tmp_path: Path) -> None:
    for changes in ({"layer_decay": 0.9}, {"r_drop": 1.0}, {"new_parameters_lr": 2.0}, {"nonfinite": "skip"}):
        with pytest.raises(ConfigError, match=f"transformers' trainer has no {next(iter(changes))}"):
            trained(TransformersTrainer, "swcm", tmp_path, **changes)
    model = system("warm-start")
    with torch.no_grad():
        model.decoder.lm_head.bias[0] = math.nan
    with pytest.raises(TrainingError, match="loss nan"):
        TransformersTrainer(model, Stream(), {}, settings(), tmp_path).train()


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    start = system("swcm").state_dict()
    model, _ = trained(TransformersTrainer, "swcm", tmp_path, freeze=("encoder.encoder.*",), load_best=False)
    for name, tensor in model.state_dict().items():
        if name.startswith("encoder.encoder."):
            assert torch.equal(tensor, start[name]), name
    assert not torch.equal(model.lm_head.bias, start["lm_head.bias"])


def test_a_recipe_compares_both(tmp_path: Path, encoder_folder: Path) -> None:
    write_pairs(tmp_path / "pairs.tsv")
    content = recipe_content(tmp_path, encoder_folder)
    content["encoder"]["dropout"] = 0.0
    del content["pretrain"]
    content["systems"] = {
        "ours": {"preset": "warm-start"},
        "theirs": {"preset": "warm-start", "trainer": "transformers"},
        "again": {"preset": "warm-start", "trainer": "enc2gen"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    run = Run(load_recipe(path), Console(quiet=True))
    metrics = json.loads((run.run() / "metrics.json").read_text())
    ours, theirs, again = (metrics["training"][f"{name}/finetune"] for name in ("ours", "theirs", "again"))
    assert ours["best_loss"] == pytest.approx(theirs["best_loss"], rel=1e-4)
    assert ours["losses"] == again["losses"] and ours["tokens"] == theirs["tokens"]
    assert ours.keys() == theirs.keys()
    section, training = run.recipe.finetune, run.recipe.training("ours", "finetune")
    for name, more in (("ours", {}), ("again", {}), ("theirs", {"trainer": "transformers"})):
        depends = {"before": run.keys[f"build-{name}"], "section": section.identity(), "training": training.identity()}
        assert run.keys[f"finetune-{name}"] == digest({"stage": f"finetune-{name}", **depends, **more})
    content["systems"]["theirs"]["finetune"] = {"r_drop": 1.0}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"systems.theirs.finetune: transformers' trainer has no r_drop"):
        load_recipe(path)
