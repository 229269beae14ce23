"""Checkpoints are whole or not there, whatever fails."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from enc2gen.errors import CheckpointError, OutputError
from enc2gen.training import checkpoint as module
from enc2gen.training.checkpoint import (
    CheckpointStore,
    load_weights,
    read_training_state,
    save_weights,
    verify_checkpoint,
)


class Tied(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, 40)
        self.head = nn.Linear(40, 50)
        self.head.weight = self.embed.weight


def _save(store: CheckpointStore, step: int, model: nn.Module | None = None, best: int | None = None) -> Path:
    tensors = {"exp_avg/head.bias": torch.full((50,), float(step))}
    state = {"progress": {"step": step}}
    return store.save(step, model or Tied(), optimizer=tensors, rng=tensors, state=state, best_step=best)


def _names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def _pointer(store: CheckpointStore, name: str) -> str:
    return str(json.loads((store.folder / f"{name}.json").read_text())["checkpoint"])


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def test_round_trip(store: CheckpointStore) -> None:
    model = Tied(seed=1)
    path = _save(store, 3, model)
    other = Tied(seed=2)
    load_weights(other, path / "model")
    assert torch.equal(other.embed.weight, model.embed.weight) and torch.equal(other.head.bias, model.head.bias)
    assert other.head.weight is other.embed.weight
    optimizer, _, state = read_training_state(path)
    assert torch.equal(optimizer["exp_avg/head.bias"], torch.full((50,), 3.0))
    assert state == {"progress": {"step": 3}}
    assert store.newest() == path


def test_transformers_models_are_saved_so_that_they_load_again(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model, other = BertForMaskedLM(config), BertForMaskedLM(config)
    save_weights(model, tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    load_weights(other, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]) and torch.equal(tensor, other.state_dict()[name]), name
    assert other.cls.predictions.decoder.weight is other.bert.embeddings.word_embeddings.weight


def test_nothing_is_pickled(store: CheckpointStore) -> None:
    path = _save(store, 1)
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".json", ".safetensors"}


def test_only_the_last_and_the_best_are_kept(store: CheckpointStore) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 4), (5, 4)):
        if step == best:
            store.save_best(step, Tied(), {"mean_loss": 1.0})
        _save(store, step, best=best)
        assert _pointer(store, "last") == f"step-{step:08d}"
    # best-2 went with step-3, the last checkpoint whose best it was
    assert _names(store) == ["best-00000004", "best.json", "last.json", "step-00000004", "step-00000005"]
    assert _pointer(store, "best") == "best-00000004"
    verify_checkpoint(store.best(4))


def test_best_weights_of_a_kept_checkpoint_outlive_a_newer_best(store: CheckpointStore) -> None:
    store.save_best(1, Tied(), {})
    _save(store, 1, best=1)
    store.save_best(2, Tied(), {})
    _save(store, 2, best=2)
    assert {"best-00000001", "best-00000002"} <= set(_names(store))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model/model.safetensors", "optimizer.safetensors", "rng.safetensors", "trainer.json"]
)
@pytest.mark.parametrize(
    ("damage", "message"),
    [(_truncate, "truncated"), (_flip, "content has changed"), (Path.unlink, "missing")],
)
def test_damage_is_named_and_the_older_whole_one_is_used(
    store: CheckpointStore, name: str, damage: Callable[[Path], Any], message: str
) -> None:
    older, newer = _save(store, 1), _save(store, 2)
    damage(newer / name)
    with pytest.raises(CheckpointError, match=rf"{name}: [\s\S]*{message}[\s\S]*remedy"):
        verify_checkpoint(newer)
    with pytest.warns(UserWarning, match=f"broken checkpoint[\\s\\S]*{name}"):
        assert store.newest() == older


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 99, "files": {}}'])
def test_damaged_or_foreign_markers(store: CheckpointStore, content: str) -> None:
    path = _save(store, 1)
    (path / "COMPLETE.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"COMPLETE\.json"), pytest.warns(UserWarning):
        store.newest()


def test_a_folder_without_marker_is_no_checkpoint(tmp_path: Path) -> None:
    save_weights(Tied(), tmp_path / "model")
    with pytest.raises(CheckpointError, match="not a complete enc2gen checkpoint"):
        verify_checkpoint(tmp_path)


def test_saving_before_a_broken_newer_one_keeps_what_was_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    _save(store, 1)
    _save(store, 5)
    (tmp_path / "step-00000005" / "COMPLETE.json").unlink()
    _save(store, 2)
    assert store.newest() == tmp_path / "step-00000002"


def test_weights_of_another_model_name_the_tensor(tmp_path: Path) -> None:
    for other, message in (
        (nn.Sequential(nn.Linear(2, 2)), "no tensor '(embed|head)"),
        (_with(Tied(), bias=7), r"'head\.bias' has shape \[50\] in the checkpoint, \[7\] in the model"),
        (
            nn.ModuleDict({"embed": nn.Embedding(50, 40), "head": Tied().head}),  # not tied
            "lacks tensor 'head.weight'",
        ),
    ):
        save_weights(Tied(), tmp_path)
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            load_weights(other, tmp_path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def _with(model: Tied, bias: int) -> Tied:
    model.head.bias = nn.Parameter(torch.zeros(bias))
    return model


def _failing(original: Callable[..., Any], failing_call: int) -> Callable[..., Any]:
    calls = iter(range(1, 10_000))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == failing_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_at_any_flush_or_rename_leaves_a_whole_checkpoint(tmp_path: Path, overwrite: bool) -> None:
    failures = 0
    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "rename"), (Path, "mkdir"), (module, "_seal")):
        for call in range(1, 40):
            store = CheckpointStore(tmp_path / f"{name}-{call}", keep_last=2)
            old_model, new_model = Tied(1), Tied(2)
            _save(store, 1, old_model)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, name, _failing(getattr(owner, name), call))
                try:
                    _save(store, 1 if overwrite else 2, new_model)
                except OutputError as error:
                    assert (
                        "No space left" in str(error)
                        and error.remedy
                        and "earlier checkpoints and models are intact" in error.remedy
                    )
                    failures += 1
                else:
                    break
            newest = store.newest()
            assert newest is not None
            loaded = Tied(3)
            load_weights(loaded, newest / "model")
            assert any(torch.equal(loaded.head.bias, model.head.bias) for model in (old_model, new_model))
            _save(store, 3)  # and the run can go on
            assert not [path for path in _names(store) if path.startswith(".")]
    assert failures > 15


@pytest.mark.parametrize("limit", [0, 100, 4_000, 8_000])
def test_a_disk_that_fills_up_while_weights_are_written(store: CheckpointStore, limit: int) -> None:
    _save(store, 1, Tied(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # the kernel refuses to let files grow beyond it
    try:
        with pytest.raises(OutputError, match="could not be written"):
            _save(store, 2, Tied(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _names(store) == ["last.json", "step-00000001"]
    assert _pointer(store, "last") == "step-00000001"
    loaded = Tied(3)
    load_weights(loaded, store.folder / "step-00000001" / "model")
    assert torch.equal(loaded.head.bias, Tied(1).head.bias)


def test_a_process_killed_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    for sealed in (False, True):  # whether the new one was complete
        store = CheckpointStore(tmp_path / str(sealed), keep_last=1)
        path = _save(store, 1, Tied(1))
        if sealed:
            shutil.copytree(path, path.with_name(".tmp-step-00000001"))
        else:
            path.with_name(".tmp-step-00000001").mkdir()
        path.rename(path.with_name(".old-step-00000001"))
        assert store.newest() is None
        store.recover()
        assert store.newest() == path
        _save(store, 2)
        _save(store, 3)
        assert _names(store) == ["last.json", "step-00000003"]


def test_an_interrupt_in_the_middle_of_writing_leaves_no_trace(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(store, 1)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _save(store, 2)
    assert _names(store) == ["last.json", "step-00000001"]
