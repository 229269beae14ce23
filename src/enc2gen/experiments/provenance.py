"""What figures were made with: the machine, the versions of libraries, and the code itself."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import enc2gen
from enc2gen.corpora.builtin import package_versions

LIBRARIES = ("torch", "transformers", "tokenizers", "sacrebleu")
"""Whose versions may change a figure."""


def processor() -> str:
    """The processor's name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu() -> str | None:
    """The GPU's name, if one may be used."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def machine() -> dict[str, Any]:
    """Processor, cores that this process uses, and GPU."""
    return {"processor": processor(), "cores": torch.get_num_threads(), "gpu": gpu()}


def versions() -> dict[str, str]:
    """Version of Python, of the libraries that figures depend on, and of the packages with built-in texts."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **found, **package_versions()}


@lru_cache(maxsize=1)
def code() -> str:
    """Twelve digits that stand for the files of this package: they tell code of the same version apart."""
    root = Path(enc2gen.__file__).parent
    found = hashlib.sha256()
    for path in sorted(path for suffix in ("*.py", "*.yaml") for path in root.rglob(suffix)):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]
