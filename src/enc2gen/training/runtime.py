"""What a training process needs around the loop: signals, precision, random states."""

from __future__ import annotations

import inspect
import os
import random
import signal
import threading
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel

from enc2gen.errors import ConfigError
from enc2gen.models.training_attention import separates_sequences, use_training_attention
from enc2gen.training.config import TrainingConfig
from enc2gen.training.sharding import hidden_request

_HANG_UP = getattr(signal, "SIGHUP", None)  # not on Windows
_INTERRUPTS = [number for number in (signal.SIGINT, signal.SIGTERM, _HANG_UP) if number is not None]


class InterruptFlag:
    """Turns the first Ctrl-C, SIGTERM or hang-up (a closed terminal) into a flag that the loop reads; the second acts
    as usual. Under nohup, hang-ups stay ignored.

    Under torchrun a second SIGTERM does nothing: a batch system may signal every process, and torchrun hands its own
    signal on to processes that have had one. It kills what has not ended after 30 seconds.
    """

    def __init__(self) -> None:
        self.raised = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            for number in _INTERRUPTS:
                # A shell's background processes ignore Ctrl-C, too, and yet shall save when asked to by `kill -INT`.
                if number != _HANG_UP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        if number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ:
            return
        signal.signal(number, self._previous[number] or signal.SIG_DFL)


def resolve_precision(precision: str, device: torch.device) -> str:
    """`"auto"` -> `"bf16"` or `"fp32"`.

    auto takes bf16 under two conditions. Hardware: AMX-BF16 or AVX512_BF16 on CPU (elsewhere bfloat16 is
    emulated and slower than float32), native support on CUDA (Ampere or later). Numbers: a bfloat16 matrix
    product agrees with the float32 one to 2 % (our choice: 8 bits of mantissa give about 0.4 % per operand).

    Raises:
        ConfigError: bf16 was asked for and fails the numeric test on this device.
    """
    if precision == "fp32":
        return precision
    if precision == "bf16":
        if not _bf16_agrees(device):
            raise ConfigError(f"bfloat16 does not work on {device}", where="training.precision", remedy="use fp32")
        return precision
    return "bf16" if _bf16_native(device) and _bf16_agrees(device) else "fp32"


def _bf16_native(device: torch.device) -> bool:
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return False


def _bf16_agrees(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 64, 64, generator=generator).to(device)
    exact = left @ right
    try:
        rounded = (left.bfloat16() @ right.bfloat16()).float()
    except RuntimeError:
        return False
    return bool((rounded - exact).norm() <= 0.02 * exact.norm())


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, so that whatever draws from them is repeatable."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_torch(device: torch.device, *key: int) -> None:
    """Seed the generators of CPU and `device` by a counter: dropout is a function of the counter."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    # torch.manual_seed would queue a call with a stack trace for every kind of device that is not there.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def rng_tensors() -> dict[str, torch.Tensor]:
    """States of Python's, NumPy's legacy and torch's (CPU and CUDA) generators as tensors."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)  # typed as a dictionary or a tuple
    name, keys, position, has_gauss, cached = legacy
    if version != 3 or name != "MT19937":
        raise NotImplementedError(f"unknown generators: Python {version}, NumPy {name}")
    tensors = {
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.keys": torch.from_numpy(keys.astype(np.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "torch.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"torch.cuda.{index}"] = state
    return tensors


def restore_rng(tensors: dict[str, torch.Tensor]) -> None:
    """Inverse of :func:`rng_tensors`; states of CUDA devices that are not here are left out."""
    gauss = tensors["python.gauss"].tolist()
    random.setstate((3, tuple(tensors["python.words"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = tensors["numpy.position"].tolist()
    keys = tensors["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, tensors["numpy.gauss"].item()))
    torch.set_rng_state(tensors["torch.cpu"])
    for index in range(torch.cuda.device_count()):
        state = tensors.get(f"torch.cuda.{index}")
        if state is not None:
            torch.cuda.set_rng_state(state, index)


def cpu_processes() -> bool:
    """Whether several processes were launched on a machine without a GPU, which Accelerate must be told."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


def make_accelerator() -> Accelerator:
    """One process or several, as `accelerate launch` or `torchrun` asks; other kinds are a `ConfigError`.

    Whether the model is sharded over the processes is not Accelerate's business here: see `training.sharding`.
    """
    # The trainer does its own autocast, so that the model's forward is left as it is, and its own sharding.
    try:
        with hidden_request():
            accelerator = Accelerator(mixed_precision="no", cpu=cpu_processes())
    except ValueError as error:
        raise ConfigError(
            f"Accelerate was already set up differently in this process: {error}",
            remedy="set precision in the training config, not in another Accelerator",
        ) from error
    kind = accelerator.distributed_type
    if kind is not DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise ConfigError(
            f"distributed training of kind {kind.value} is not supported",
            where="accelerate launch",
            remedy="use one process, data parallelism (--multi_gpu, --multi_cpu) or --use_fsdp --fsdp_version 2",
        )
    return accelerator


def forward_options(model: nn.Module) -> dict[str, Any]:
    """A decoding cache costs memory in training and serves nothing."""
    return {"use_cache": False} if takes_argument(model, "use_cache") else {}


def takes_argument(model: nn.Module, name: str) -> bool:
    """Whether the model's `forward` names this argument."""
    return name in inspect.signature(model.forward).parameters


def gradient_checkpointing(model: nn.Module, *, enable: bool) -> None:
    """Switch recomputation of activations on or off; a model without it is a `ConfigError`."""
    end = "enable" if enable else "disable"
    # transformers renamed the methods in 5.23 and warns about the old names
    names = {"activation": f"activation_checkpointing_{end}", "gradient": f"gradient_checkpointing_{end}"}
    kind = next((kind for kind, name in names.items() if hasattr(model, name)), None)
    # Reentrant checkpointing breaks with tied weights under data parallelism (allenai/longformer#63).
    options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}} if enable else {}
    try:
        if kind is None:
            raise ValueError("the model has no such method")
        getattr(model, names[kind])(**options)
    except ValueError as error:
        raise ConfigError(
            f"{type(model).__name__} has no gradient checkpointing: {error}",
            where="training.gradient_checkpointing",
            remedy="set it to false",
        ) from error


def set_padding_free(model: nn.Module, config: TrainingConfig, *, before: bool = True) -> None:
    """Let `model` train on real tokens only where `config` says so; `ConfigError` where it is told to but cannot.

    Args:
        before: what a run that goes on has done; `auto` keeps to it.
    """
    known = isinstance(model, PreTrainedModel) and hasattr(model, "padding_free")
    if known:
        use_training_attention(cast(PreTrainedModel, model))  # which another choice of attention since has undone
    can = known and separates_sequences(model)
    if config.padding_free is True and not can:
        raise ConfigError(
            f"{type(model).__name__} cannot train on real tokens only, at least not with its kind of attention",
            where="training.padding_free",
            remedy="set it to auto, or load the model with attn_implementation sdpa or flash_attention_2",
        )
    if known:
        wanted = before if config.padding_free == "auto" else config.padding_free
        model.padding_free = can and wanted  # type: ignore[assignment]  # a plain attribute
