"""Names of floating-point types, and whether a device can compute in them."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from enc2gen.errors import ConfigError, ModelError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""Types that weights may be loaded in."""
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp64": "float64"}


def parse_dtype(dtype: str | torch.dtype, *, where: str = "dtype") -> torch.dtype:
    """`"bfloat16"`, `"bf16"`, `"torch.bfloat16"` or the type itself as a `torch.dtype`.

    Raises:
        ConfigError: not one of `DTYPES`; the message suggests the nearest.
    """
    name = str(dtype).removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in DTYPES:
        close = difflib.get_close_matches(name, [*DTYPES, *_SHORT], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"{name!r} is no type that weights can be loaded in", where=where, remedy=f"{hint}use {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def check_dtype(dtype: torch.dtype, device: str | torch.device = "cpu", *, where: str | None = None) -> None:
    """Raise `ModelError` unless `device` can compute in `dtype` (bfloat16 needs Ampere or later on NVIDIA GPUs)."""
    device = torch.device(device)
    if (reason := _lack(dtype, device)) is not None:
        short = str(dtype).removeprefix("torch.")
        raise ModelError(f"{device} cannot compute in {short} ({reason})", where=where, remedy="use float32")


def to_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` with its weights cast to `dtype`, in place.

    Buffers that are computed and not saved keep their precision, as when transformers loads in `dtype`: rotary
    frequencies in half precision turn far positions by wrong angles.
    """
    computed = [
        (module, name, module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    ]
    cast(Any, model).to(dtype)
    for module, name, buffer in computed:
        module._buffers[name] = buffer
    return model


@cache
def _lack(dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "this PyTorch sees no CUDA device"
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere and would emulate it"
    try:
        ones = torch.ones(4, 4, dtype=dtype, device=device)
        product = float(torch.nn.functional.softmax(ones @ ones, dim=-1).sum())
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return None if abs(product - 4) < 0.1 else f"a test product gave {product}"
