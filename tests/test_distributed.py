"""Two processes train as one does: replicated and sharded, with tied parameters, checkpointing and frozen parts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from conftest import tiny_encoder
from distributed_toys import Case, run_cases
from enc2gen import SwcmForConditionalGeneration
from enc2gen.errors import ConfigError
from enc2gen.training.sharding import layer_groups, sharding_requested
from training_toys import metrics

CHECKPOINTING = (("gradient_checkpointing", True),)
PLAIN = [
    Case("copied, tied head, checkpointed", training=CHECKPOINTING),
    Case("tied layers", model=(("sharing", "tied"),)),
    Case("tied layers, checkpointed", model=(("sharing", "tied"),), training=CHECKPOINTING),
    Case(
        "untied head, frozen embeddings",
        model=(("tie_lm_head", False),),
        training=(("freeze", ("encoder.embeddings.*",)),),
    ),
    Case("encoder frozen at first", training=(("freeze_encoder_steps", 2),)),
]
CASES = [*PLAIN, *(replace(case, name=f"{case.name}, sharded", sharded=True) for case in PLAIN)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases trained by two processes, and the same without sharding by one."""
    folder = tmp_path_factory.mktemp("distributed")
    run_cases([(case, folder / case.name) for case in CASES])
    for case in PLAIN:
        trainer = case.trainer(folder / f"{case.name}, one", processes=1)
        trainer.train()
        trainer.model.save_pretrained(folder / f"{case.name}, one" / "final")
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_train_as_one(case: Case, folder: Path) -> None:
    one, two = (folder / name for name in (f"{case.name.removesuffix(', sharded')}, one", case.name))
    expected, actual = metrics(one), metrics(two)
    assert [record["step"] for record in actual] == [record["step"] for record in expected]
    for field in ("loss", "gradient_norm", "mean"):
        found = [[record[field] for record in records if field in record] for records in (actual, expected)]
        assert found[0] == pytest.approx(found[1], rel=1e-4) and found[1], field
    for file in ("checkpoints/step-00000004/model/model", "checkpoints/step-00000004/optimizer", "final/model"):
        tensors, wanted = (load_file(run / f"{file}.safetensors") for run in (two, one))
        assert tensors.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_sharded_model_is_saved_as_any_other(folder: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "tied layers, sharded" / "final")
    assert type(model) is SwcmForConditionalGeneration
    assert json.loads((folder / "tied layers, sharded/final/config.json").read_text())["architectures"] == [
        "SwcmForConditionalGeneration"
    ]
    assert model.lm_head.weight is model.encoder.embeddings.word_embeddings.weight


def test_processes_may_come_and_go(folder: Path, tmp_path: Path) -> None:
    """A run begun by one process is finished by two, sharded, and the other way round."""
    case = next(case for case in PLAIN if case.name == "tied layers")
    shard = replace(case, sharded=True)
    for start, end in ((1, 2), (2, 1)):
        run = tmp_path / f"from {start} to {end}"
        for processes in (start, end):
            if processes == 1:
                case.trainer(run, 1).train()
            else:
                run_cases([(shard, run)])
            last = run / "checkpoints" / "step-00000004"
            if processes == start:
                for file in sorted(last.rglob("*"), reverse=True):
                    file.rmdir() if file.is_dir() else file.unlink()
                last.rmdir()
        expected = folder / f"{case.name}, one" / "checkpoints" / "step-00000004"
        tensors, wanted = (load_file(at / "model" / "model.safetensors") for at in (last, expected))
        for name, tensor in wanted.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=2e-5)


def test_a_layer_is_a_group_of_its_own_unless_it_is_tied() -> None:
    options = {"insert_every": 2, "verbose": False}
    copied = SwcmForConditionalGeneration.from_encoder(tiny_encoder(), **options)
    groups = layer_groups(copied)
    assert all(layer in groups for layer in [*copied.encoder.encoder.layer, *copied.decoder.layers])
    tied = SwcmForConditionalGeneration.from_encoder(tiny_encoder(), sharing="tied", **options)
    groups = layer_groups(tied)
    used = [{id(p) for p in group.parameters()} for group in groups]
    outside = {id(p) for m in (tied.encoder.encoder.layer, tied.decoder.layers) for p in m.parameters()} - set().union(
        *used
    )
    assert outside and sum(map(len, used)) == len(set().union(*used))


def test_the_first_version_of_sharding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--fsdp_version 2"):
        sharding_requested()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding_requested()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not sharding_requested()
