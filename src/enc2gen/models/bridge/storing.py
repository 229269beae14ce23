"""Saving and loading bridges: complete, or without the halves that anyone can load again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from enc2gen.encoders.dtypes import parse_dtype
from enc2gen.encoders.reading import load_reading_encoder
from enc2gen.encoders.safe_weights import refuse_pickles
from enc2gen.errors import CheckpointError, ModelError
from enc2gen.llms.loading import load_llm
from enc2gen.models.bridge.configuration import BridgeConfig
from enc2gen.models.bridge.processor import ENCODER_FOLDER, BridgeProcessor
from enc2gen.models.seeding import seeded

if TYPE_CHECKING:
    from enc2gen.models.bridge.modeling import BridgeForConditionalGeneration

WEIGHTS = "model.safetensors"
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BY_PLACE = "2:"
"""What fingerprints begin with that know the places of the bits; those of older bridges have no such mark."""
_BLOCK = 2**18
_GOLDEN, _PRIME = -7046029254386353131, 1099511628211  # 2^64 over the golden ratio, as int64; FNV's prime


def fingerprint(module: nn.Module) -> str | None:
    """Checksum of names, shapes and bits of the weights, the same on all devices; `None` on the meta device.

    Bits are summed as integers, each with a weight that says its place: exact in any order, and as quick as reading.
    """
    return _checksum(module, _sum_by_place, _BY_PLACE)


def is_as_loaded(module: nn.Module, original: str | None) -> bool:
    """Whether `module` has the weights that `original` is the fingerprint of, made by whatever version."""
    if original is None or original.startswith(_BY_PLACE):
        return fingerprint(module) == original
    return _checksum(module, _sum, "") == original  # of before there were places: blind to an exchange of rows


def _checksum(module: nn.Module, total: Callable[[Tensor], int], version: str) -> str | None:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_meta:
            return None
        flat = tensor.detach().contiguous().flatten()
        bits = flat.view(_BITS[flat.element_size()])
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total(bits)}\n".encode())
    return version + digest.hexdigest()[:32]


def _sum(bits: Tensor) -> int:
    return int(bits.sum(dtype=torch.int64))


def _sum_by_place(bits: Tensor) -> int:
    """Sum of bits times odd weights modulo 2^64, block by block (the weights of all places would not fit a cache)."""
    weights = torch.arange(min(_BLOCK, bits.numel()), device=bits.device) * _GOLDEN | 1
    total = 0
    for block in bits.split(_BLOCK):
        total = (total * _PRIME + int((block.long() * weights[: len(block)]).sum())) % 2**64
    return total


def align(module: nn.Module) -> None:
    """Move weights in main memory to multiples of 64 bytes, where PyTorch itself puts them.

    Weights read from a file lie anywhere, and some CPU kernels round differently there: without this a saved and
    loaded model would differ in the last bit.
    """
    for tensor in module.parameters():
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def save_bridge(
    model: BridgeForConditionalGeneration,
    save: Callable[..., None],
    folder: str | os.PathLike[str],
    is_main_process: bool,
    *args: Any,
    parts: str,
    **kwargs: Any,
) -> None:
    """What `save_pretrained` does; `save` is transformers' own."""
    if parts not in ("all", "trained"):
        raise ModelError(f"{parts!r} is no choice of parts", where="parts", remedy='use "all" or "trained"')
    updates = [name for name in model.state_dict() if ".lora_" in name]
    if updates:
        raise ModelError(
            f"low-rank updates are not merged yet, for example {updates[0]}",
            where="save_pretrained",
            remedy="call enc2gen.models.lora.merge_lora on the encoder or the LLM first",
        )
    config = model.config
    config.encoder_dtype = str(next(model.encoder.parameters()).dtype).removeprefix("torch.")
    config.llm_dtype = str(next(model.llm.parameters()).dtype).removeprefix("torch.")
    if parts == "trained":
        kwargs["state_dict"] = _own_state(model)
    if is_main_process and model.processor is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        model.processor.save_pretrained(folder)
    config.saved_parts = parts
    try:
        save(folder, is_main_process, *args, **kwargs)
    finally:
        config.saved_parts = "all"


def _own_state(model: BridgeForConditionalGeneration) -> dict[str, Tensor]:
    """All tensors but those of a half that is as it was loaded from its name."""
    config, state = model.config, model.state_dict()
    halves = (
        ("encoder", model.encoder, config.encoder_name, config.encoder_fingerprint),
        ("llm", model.llm, config.llm_name, config.llm_fingerprint),
    )
    for part, module, name, original in halves:
        if not name:
            raise ModelError(
                f"where the {part} came from is not known, so that it could not be loaded again",
                where=f"config.{part}_name",
                remedy='save with parts="all", or set its name',
            )
        if is_as_loaded(module, original):
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{part}.")}
    return state


def load_bridge(
    model_class: type[BridgeForConditionalGeneration],
    load: Callable[..., Any],
    name: Any,
    *args: Any,
    config: BridgeConfig | None = None,
    dtype: str | torch.dtype | None = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """What `from_pretrained` does; `load` is transformers' own."""
    folder = None if name is None else _local_folder(name, kwargs)
    if folder is not None:
        refuse_pickles(folder)
    if config is None:
        config, kwargs = cast(Any, BridgeConfig.from_pretrained(name, return_unused_kwargs=True, **kwargs))
    config = cast(BridgeConfig, config)
    if dtype is not None and dtype != "auto":
        config.encoder_dtype = config.llm_dtype = str(parse_dtype(dtype)).removeprefix("torch.")
    if config.saved_parts == "trained":
        model, info = _load_trained(model_class, config, cast(Path, folder), dtype is None or dtype == "auto", kwargs)
    else:
        model, info = load(name, *args, config=config, dtype=torch.float32, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{len(missing)} tensors are missing, for example {missing[0]}",
            where=str(name),
            remedy="save the model again; its weights are incomplete",
        )
    align(model)
    model._freeze()
    if folder is not None and (folder / ENCODER_FOLDER).is_dir():
        model.processor = BridgeProcessor.from_pretrained(folder, model.config)
    return (model, info) if output_loading_info else model


def _local_folder(name: Any, kwargs: dict[str, Any]) -> Path:
    """The folder `name`, or where its files lie after download from the Hub."""
    path = Path(name)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    hub = {key: kwargs[key] for key in _HUB if key in kwargs}
    try:
        return Path(snapshot_download(os.fspath(name), **hub))
    except Exception as error:
        raise CheckpointError(
            f"there is no such folder, and no such model can be had from the Hub ({type(error).__name__})",
            where=str(name),
            remedy="check the path, or the Hub name and the connection",
        ) from error


def _load_trained(
    model_class: type[BridgeForConditionalGeneration],
    config: BridgeConfig,
    folder: Path,
    check: bool,
    kwargs: dict[str, Any],
) -> tuple[BridgeForConditionalGeneration, dict[str, Any]]:
    attention = kwargs.pop("attn_implementation", None)
    # AutoModel passes on arguments that ask for nothing, such as trust_remote_code=False.
    silent = (*_HUB, "adapter_kwargs")
    unknown = sorted(key for key, value in kwargs.items() if value and key not in silent and not key.startswith("_"))
    if unknown:
        raise ModelError(
            f"a bridge saved without its halves cannot be loaded with {', '.join(unknown)}",
            where="from_pretrained",
            remedy='load it, save it with parts="all", and load that',
        )
    encoder = load_reading_encoder(cast(str, config.encoder_name), dtype=config.encoder_dtype)
    llm = load_llm(cast(str, config.llm_name), dtype=config.llm_dtype, attn_implementation=attention)
    halves = (("encoder", encoder, config.encoder_fingerprint), ("llm", llm, config.llm_fingerprint))
    state = _read(folder / WEIGHTS)
    for part, module, expected in halves:
        if any(key.startswith(f"{part}.") for key in state):
            _fit_rows(module, part, state)
        elif check and expected is not None and not is_as_loaded(module, expected):
            raise CheckpointError(
                f"the {part} is not the one that this bridge was trained with: its weights differ",
                where=str(getattr(config, f"{part}_name")),
                remedy=f"give the right one as {part}_name=...",
            )
    model = model_class(config, encoder, llm)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    result = model.load_state_dict(state, strict=False)
    loaded = {key.partition(".")[0] for key in state}
    missing = [key for key in result.missing_keys if key.partition(".")[0] not in {"encoder", "llm"} - loaded]
    tied = set(model.all_tied_weights_keys)
    info = {"missing_keys": {key for key in missing if key not in tied}, "unexpected_keys": set(result.unexpected_keys)}
    return model.eval(), info | {"mismatched_keys": set(), "error_msgs": []}


def _fit_rows(half: PreTrainedModel, part: str, state: dict[str, Tensor]) -> None:
    """Give `half` as many word embeddings as `state` has of it: `resize_token_embeddings` may have been called."""
    table = cast(Tensor, half.get_input_embeddings().weight)
    names = [f"{part}.{name}" for name, parameter in half.named_parameters() if parameter is table]
    rows = next((len(state[name]) for name in names if name in state), len(table))
    if rows != len(table):
        with seeded(0):  # rows that are overwritten at once
            half.resize_token_embeddings(rows, mean_resizing=False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the trained weights cannot be read ({type(error).__name__}: {error})",
            where=str(path),
            remedy="save the model again, or copy the folder completely",
        ) from error
