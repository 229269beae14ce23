"""Matrix products of the decoding engine: float32, bfloat16 or int8 weights, packed once for many small calls.

Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16", "fp16", "int8"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WIDE = 4096
"""Outputs from which onednn's int8 product is quicker than fbgemm's (measured with 4 and 128 rows)."""


class PackedLinear(ABC):
    """x W^T + b of `[R, I]`, for weights that do not change any more."""

    @abstractmethod
    def __call__(self, states: Tensor) -> Tensor:
        """`[R, I]` to `[R, O]`, in the type of `states`."""


class PlainLinear(PackedLinear):
    """PyTorch's product: on accelerators, and on CPUs without oneDNN.

    Args:
        weight: `[O, I]`; bias: `[O]` or none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        self._weight = weight.detach().to(dtype)
        self._bias = None if bias is None else bias.detach().to(dtype)

    def __call__(self, states: Tensor) -> Tensor:
        """`[R, I]` to `[R, O]`."""
        return nn.functional.linear(states.to(self._weight.dtype), self._weight, self._bias).to(states.dtype)


class OneDnnLinear(PackedLinear):
    """float32 or bfloat16 weights in oneDNN's own order, float32 in and out: the rest of a CPU decoder is in float32.

    In float32, too, this is more than twice as quick as `torch.nn.functional.linear` on AMD processors, on which that
    one's library leaves their wide registers alone.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        operators = cast(Any, torch.ops.mkldnn)
        self._dtype = dtype
        self._weight = operators._reorder_linear_weight(weight.detach().to(dtype), 0)
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._multiply = operators._linear_pointwise.default

    def __call__(self, states: Tensor) -> Tensor:
        """`[R, I]` to `[R, O]`."""
        product = self._multiply(states.to(self._dtype), self._weight, self._bias, "none", [], "")
        return cast(Tensor, product).to(states.dtype)


class Int8Linear(PackedLinear):
    """int8 weights with one scale per output, int8 states with one scale per call (dynamic quantisation).

    A row's product thus depends on the other rows of the call; a scale per row would cost more time than it is worth
    (docs/decisions.md).

    Weights are rounded symmetrically: w = round(127 w / max|w|), row by row.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, but without a successor that is as quick: docs/decisions.md
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        operators = cast(Any, torch.ops.quantized)
        chosen = torch.backends.quantized.engine
        torch.backends.quantized.engine = _int8_library(len(weight))
        try:
            self._packed = operators.linear_prepack(quantised, None if bias is None else bias.detach().float())
        finally:
            torch.backends.quantized.engine = chosen
        self._multiply = operators.linear_dynamic

    def __call__(self, states: Tensor) -> Tensor:
        """`[R, I]` to `[R, O]`."""
        return cast(Tensor, self._multiply(states, self._packed, reduce_range=False))


def _int8_library(outputs: int) -> str:
    """The quickest of the libraries that this build of PyTorch has."""
    wanted = ["onednn", "x86"] if outputs >= _WIDE else ["x86", "onednn"]
    return next(name for name in [*wanted, "fbgemm", "qnnpack"] if name in torch.backends.quantized.supported_engines)


def pack_linear(weight: Tensor, bias: Tensor | None, precision: Precision) -> PackedLinear:
    """The product with `weight` `[O, I]` in `precision`; int8 is for CPUs, fp16 for accelerators."""
    if weight.device.type == "cpu" and precision == "int8":
        return Int8Linear(weight, bias)
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return OneDnnLinear(weight, bias, _DTYPES[precision])
    return PlainLinear(weight, bias, _DTYPES[precision])


def pack_module(linear: nn.Linear, precision: Precision) -> PackedLinear:
    """:func:`pack_linear` of a module."""
    return pack_linear(linear.weight, linear.bias, precision)


def stack_modules(linears: list[nn.Linear], precision: Precision) -> PackedLinear:
    """Several products of the same states as one; outputs lie behind each other."""
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    weights: list[Tensor] = [linear.weight for linear in linears]
    return pack_linear(torch.cat(weights), bias, precision)


def states_dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """What is between the products: float32 on CPUs, where attention over few queries is quickest in it."""
    return torch.float32 if device.type == "cpu" else _DTYPES[precision]
