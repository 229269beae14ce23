"""No pickle in a folder of the user's is ever opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from enc2gen import SwcmForConditionalGeneration
from enc2gen.encoders.loading import load_encoder
from enc2gen.encoders.reading import load_reading_encoder
from enc2gen.encoders.safe_weights import refuse_pickles
from enc2gen.errors import CheckpointError
from enc2gen.generation.generator import Generator
from enc2gen.llms.loading import load_llm
from enc2gen.models.bridge import BridgeForConditionalGeneration
from enc2gen.models.masked_lm import load_masked_lm
from enc2gen.models.surgery.loading import load_for_surgery


class _Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.trace,))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were given to `torch.load`."""
    files: list[str] = []

    def load(file: Any, *_: Any, **__: Any) -> Any:
        files.append(str(file))
        raise AssertionError("a pickle is opened")

    monkeypatch.setattr(torch, "load", load)
    return files


def _plain(folder: Path) -> None:
    """Weights in a pickle instead of safetensors."""
    (folder / "model.safetensors").unlink()
    torch.save({"bomb": _Bomb(folder / "exploded")}, folder / "pytorch_model.bin")


def _sharded(folder: Path) -> None:
    """A safetensors index whose shard is a pickle."""
    _plain(folder)
    (folder / "pytorch_model.bin").rename(folder / "shard.bin")
    index = {"metadata": {}, "weight_map": {"a": "shard.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _adapter(folder: Path) -> None:
    """A file that the configuration names, which transformers allows for adapters."""
    torch.save({"bomb": _Bomb(folder / "exploded")}, folder / "adapter_model.bin")
    content = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "adapter_model.bin"}
    (folder / "config.json").write_text(json.dumps(content))


LOADERS: dict[str, Callable[[Path], Any]] = {
    "load_encoder": lambda folder: load_encoder(str(folder)),
    "load_reading_encoder": lambda folder: load_reading_encoder(str(folder)),
    "load_masked_lm": lambda folder: load_masked_lm(folder),
    "load_llm": lambda folder: load_llm(str(folder)),
    "load_for_surgery": lambda folder: load_for_surgery(str(folder)),
    "Generator": Generator.from_pretrained,
    "Swcm": SwcmForConditionalGeneration.from_pretrained,
    "Bridge": BridgeForConditionalGeneration.from_pretrained,
}


@pytest.mark.parametrize("plant", [_plain, _sharded, _adapter])
@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_refuses_pickles(
    name: str, plant: Callable[[Path], None], opened: list[str], encoder_folder: Path, tmp_path: Path
) -> None:
    folder = encoder_folder
    if name in ("Generator", "Swcm"):
        folder = tmp_path / "model"
        SwcmForConditionalGeneration.from_encoder(encoder_folder, languages=["kk"], verbose=False).save_pretrained(
            folder
        )
    elif name == "load_llm":
        from bridge_toys import llm_tokenizer, tiny_llm

        folder = tmp_path / "llm"
        tiny_llm().save_pretrained(folder)
        llm_tokenizer().save_pretrained(folder)
    plant(folder)
    with pytest.raises(CheckpointError, match=r"pickle file, which is not opened(?s:.)*save_pretrained"):
        LOADERS[name](folder)
    assert not opened and not (folder / "exploded").exists()


def test_pickles_beside_safetensors_are_left_alone(encoder_folder: Path, opened: list[str]) -> None:
    for name in ("pytorch_model.bin", "optimizer.bin", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        torch.save({"bomb": _Bomb(encoder_folder / "exploded")}, encoder_folder / name)
    assert load_encoder(str(encoder_folder)).config.hidden_size == 24
    assert not opened and not (encoder_folder / "exploded").exists()


def test_an_adapter_is_looked_at_and_the_model_it_belongs_to(encoder_folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(encoder_folder)}))
    (adapter / "adapter_model.safetensors").touch()
    refuse_pickles(adapter)
    base = shutil.copytree(encoder_folder, tmp_path / "base")
    _plain(base)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    with pytest.raises(CheckpointError, match=r"base/pytorch_model\.bin"):
        refuse_pickles(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        refuse_pickles(adapter)


def test_the_bomb_would_go_off(encoder_folder: Path) -> None:
    """Unguarded, transformers opens what the tests above plant."""
    _plain(encoder_folder)
    with pytest.raises(Exception, match=r"(?i)weights_only|unpickl|pickle"):
        AutoModel.from_pretrained(encoder_folder)
    torch.load(encoder_folder / "pytorch_model.bin", weights_only=False)
    assert (encoder_folder / "exploded").exists()
