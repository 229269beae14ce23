"""Weights come from safetensors files only: a pickle file can run any code when it is read.

transformers takes safetensors where it finds them and pickles (`pytorch_model.bin`) where it does not. A folder is
therefore looked at before transformers may open it. What comes from the Hub by name is left to transformers, which
reads pickles there with PyTorch's restricted unpickler (`weights_only`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from enc2gen.errors import CheckpointError

_WEIGHTS = "model.safetensors"
_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_REMEDY = (
    "convert it where you trust it: load the model with transformers and call save_pretrained, which writes safetensors"
)


def refuse_pickles(name: str | os.PathLike[str]) -> None:
    """Make sure that loading the model folder `name` opens no pickle; other names (of the Hub) pass.

    Pickles that lie beside safetensors weights do no harm: nothing opens them.

    Raises:
        CheckpointError: the weights, a shard of them or an adapter's weights are a pickle; names the file.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    for file in _pickles_in_use(folder):
        raise CheckpointError("the weights are in a pickle file, which is not opened", where=str(file), remedy=_REMEDY)
    base = _json(folder / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(base, str) and base and Path(base).is_dir() and not folder.samefile(base):
        refuse_pickles(base)


def _pickles_in_use(folder: Path) -> Iterator[Path]:
    """Files that transformers' `from_pretrained` would open and that are no safetensors."""
    named = _json(folder / "config.json").get("transformers_weights")
    if isinstance(named, str) and not named.endswith((".safetensors", ".safetensors.index.json")):
        yield folder / named
    for index in folder.glob("*.index.json"):
        shards = _json(index).get("weight_map")
        names = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set()
        if index.name.endswith(".safetensors.index.json"):
            yield from (folder / shard for shard in sorted(names) if not shard.endswith(".safetensors"))
    if (folder / "adapter_config.json").is_file() and not (folder / "adapter_model.safetensors").is_file():
        yield from folder.glob("adapter_model.bin")
    if not (folder / _WEIGHTS).is_file() and not (folder / f"{_WEIGHTS}.index.json").is_file():
        yield from (file for file in sorted(folder.glob("pytorch_model*")) if file.suffix in _SUFFIXES)


def _json(path: Path) -> dict[str, Any]:
    """The object in the file; nothing if it is missing or no JSON object, which other code complains about."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
