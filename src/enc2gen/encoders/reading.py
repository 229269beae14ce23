"""Encoders that a bridge reads: any text encoder of transformers, and the encoder half of any encoder-decoder.

A donor (`encoders/donor.py`) must answer for every weight of its layers; here only hidden states are wanted, so far
more models will do: BERT, XLM-R, ModernBERT, DeBERTa, ... and the encoders of T5, mT5, umT5, M2M100 (NLLB), mBART.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
)

from enc2gen.encoders.dtypes import check_dtype, parse_dtype, to_dtype
from enc2gen.encoders.embedded import EMBEDDED, load_embedded
from enc2gen.encoders.loading import EMBEDDED_PREFIX
from enc2gen.encoders.weights import check_complete, reading_weights
from enc2gen.errors import ModelError, first_line

FINAL_NORMS: Mapping[str, str] = {
    "blenderbot": "layer_norm",
    "eurobert": "norm",
    "longt5": "final_layer_norm",
    "m2m_100": "layer_norm",
    "mbart": "layer_norm",
    "megatron-bert": "encoder.ln",
    "modernbert": "final_norm",
    "mt5": "final_layer_norm",
    "nllb-moe": "layer_norm",
    "pegasus": "layer_norm",
    "roberta-prelayernorm": "LayerNorm",
    "switch_transformers": "final_layer_norm",
    "t5": "final_layer_norm",
    "umt5": "final_layer_norm",
    "xlm-roberta-xl": "encoder.LayerNorm",
}
"""Where pre-norm encoders keep the norm that the last hidden state alone has passed, by `model_type`."""


_ENCODERS_THAT_WORK = "give an encoder like XLM-R, BERT, ModernBERT, mT5, NLLB, mBART or embedded:multilingual-e5-small"


@dataclass(frozen=True)
class EncoderFacts:
    """What a bridge must know about an encoder.

    Attributes:
        num_layers: transformer layers L; the encoder gives L + 1 hidden states, the embedding output first.
        hidden_size: width of a hidden state.
        max_positions: longest source in tokens, special tokens included; None: no limit (relative positions).
        final_norm: the norm that only the last hidden state has passed; None for post-norm encoders, whose layers
            end in a norm each, and for types that `FINAL_NORMS` does not list.
    """

    num_layers: int
    hidden_size: int
    max_positions: int | None
    final_norm: nn.Module | None


def encoder_facts(encoder: PreTrainedModel) -> EncoderFacts:
    """The facts of a loaded encoder, as :func:`load_reading_encoder` returns it."""
    config = encoder.config
    path = FINAL_NORMS.get(config.model_type)
    return EncoderFacts(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        max_positions=_positions(encoder),
        final_norm=None if path is None else encoder.get_submodule(path),
    )


def _positions(encoder: PreTrainedModel) -> int | None:
    limit = getattr(encoder.config, "max_position_embeddings", None)
    if limit is None or limit < 1:
        return None
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    # RoBERTa counts positions from the pad token's id, so the first rows are never used.
    unused = getattr(table, "padding_idx", None)
    return limit if unused is None else limit - unused - 1


def load_reading_encoder(
    encoder: str | os.PathLike[str] | PreTrainedModel, *, dtype: str | torch.dtype | None = None
) -> PreTrainedModel:
    """Return an encoder whose call with `output_hidden_states=True` gives L + 1 tensors `[batch, length, hidden]`.

    Of an encoder-decoder it is the encoder alone, whose embedding table is its own; poolers and task heads are left
    out. Its tokenizer comes from `encoders.loading.load_tokenizer`. NLLB's and mBART's tokenizers put the token of a
    source language first (`eng_Latn`, `en_XX`): set `tokenizer.src_lang` for another.

    Args:
        encoder: Hub name, folder, `embedded:multilingual-e5-small`, or a loaded model (with or without heads), which
            keeps its weights, type and mode, and shares them with the result.
        dtype: of the weights; float32 if None.

    Raises:
        ConfigError: an unknown `embedded:` name or dtype.
        ModelError: nothing of this name, not an encoder, or a dtype that this machine cannot compute in.
        CheckpointError: the weights are truncated, incomplete or another model's.
    """
    wanted = torch.float32 if dtype is None else parse_dtype(dtype)
    check_dtype(wanted, where="the encoder's dtype")
    if isinstance(encoder, PreTrainedModel):
        _check_type(encoder.config, type(encoder).__name__)
        half = encoder if _is_half(encoder) else _encoder_half(encoder)
        return _without_pooler(half if dtype is None else to_dtype(half, wanted))
    name = os.fspath(encoder)
    if name.startswith(EMBEDDED_PREFIX):
        return to_dtype(load_embedded(name.removeprefix(EMBEDDED_PREFIX)), wanted)
    return _load_checkpoint(name, wanted)


def reading_encoder_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """The same module with random weights, from `encoder.config` of a loaded one.

    Raises:
        ModelError: not an encoder's configuration.
    """
    _check_type(config, config.model_type)
    model_class = _model_class(config)
    model = model_class(copy.deepcopy(config), **_no_pooler(model_class))
    return _without_pooler(_encoder_half(model)).eval()


def _load_checkpoint(name: str, dtype: torch.dtype) -> PreTrainedModel:
    config = _load_config(name)
    _check_type(config, name)
    model_class = _model_class(config)
    with reading_weights(name, "encoder"):
        model, info = model_class.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, **_no_pooler(model_class)
        )
    half = _encoder_half(model)
    own = {id(parameter) for parameter in half.parameters()}
    missing = info["missing_keys"] & {name for name, p in model.named_parameters() if id(p) in own}
    check_complete(missing, name, "encoder", otherwise="would say nothing about a text")
    half.config.name_or_path = name
    return _without_pooler(half).eval()


def _load_config(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        embedded = [EMBEDDED_PREFIX + entry for entry in EMBEDDED]
        raise ModelError(
            f"no encoder can be loaded from this name ({first_line(error)})",
            where=name,
            remedy=f"{suggestion(name, embedded)}give a folder with config.json, the name of a Hub model that is "
            f"reachable from here, or one of: {', '.join(embedded)}",
        ) from error


def suggestion(name: str, known: Iterable[str]) -> str:
    """`did you mean ...? ` with the nearest of the `known` names and of the folders beside `name`; may be empty."""
    path = Path(name)
    try:
        beside = [str(folder) for folder in path.parent.iterdir() if folder.is_dir()]
    except OSError:
        beside = []
    bare = {entry.removeprefix(EMBEDDED_PREFIX).casefold(): entry for entry in known}
    wanted = path.name.removeprefix(EMBEDDED_PREFIX).casefold()
    if close := difflib.get_close_matches(wanted, bare, n=1):
        return f"did you mean {bare[close[0]]!r}? "
    if close := difflib.get_close_matches(str(path), beside, n=1, cutoff=0.8):
        return f"did you mean {close[0]!r}? "
    return ""


def _check_type(config: PreTrainedConfig, where: str) -> None:
    kind = type(config)
    if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return
    if kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        if kind in MODEL_MAPPING and not _takes_masks(MODEL_MAPPING[kind]):
            raise ModelError(
                f"{config.model_type!r} takes no attention_mask, so that a text's states would depend on the padding "
                "of its batch",
                where=where,
                remedy=_ENCODERS_THAT_WORK,
            )
        return
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{config.model_type!r} is a decoder-only language model; as an encoder its states would know only what "
            "stands to their left",
            where=where,
            remedy="give it as the LLM, and as the encoder one like XLM-R, BERT, ModernBERT, mT5, NLLB, mBART or "
            "embedded:multilingual-e5-small",
        )
    raise ModelError(f"{config.model_type!r} is not a text encoder", where=where, remedy=_ENCODERS_THAT_WORK)


def _takes_masks(model_class: Any) -> bool:
    """Whether a class, or every one of several that share a configuration (Funnel), takes attention masks."""
    classes = model_class if isinstance(model_class, tuple) else (model_class,)
    return all("attention_mask" in inspect.signature(each.forward).parameters for each in classes)


def _model_class(config: PreTrainedConfig) -> Any:
    """The class to load: of T5's family the one without a decoder, of other encoder-decoders the full one."""
    kind = type(config)
    if kind not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return MODEL_MAPPING[kind]
    if kind in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return MODEL_FOR_TEXT_ENCODING_MAPPING[kind]
    return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[kind]


def _no_pooler(model_class: Any) -> dict[str, Any]:
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}


def _is_half(model: PreTrainedModel) -> bool:
    """Whether `model` is the encoder of an encoder-decoder by itself."""
    return type(model.config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and not (
        hasattr(model.base_model, "encoder") or hasattr(model, "encoder")
    )


def _encoder_half(model: PreTrainedModel) -> PreTrainedModel:
    base = cast(PreTrainedModel, model.base_model)
    if type(model.config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return base
    return cast(PreTrainedModel, base.get_encoder())


def _without_pooler(encoder: PreTrainedModel) -> PreTrainedModel:
    """The encoder without its pooler (dead weight here); a given model is not changed, its layers are shared."""
    if getattr(encoder, "pooler", None) is None:
        return encoder
    bare = copy.copy(encoder)
    bare._modules = {**encoder._modules, "pooler": None}
    return bare
