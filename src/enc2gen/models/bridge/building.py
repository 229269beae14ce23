"""Building a bridge: load both halves, check that they fit, settle special ids and lengths, connect them."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from enc2gen.encoders.dtypes import parse_dtype
from enc2gen.encoders.loading import load_tokenizer
from enc2gen.encoders.reading import encoder_facts, load_reading_encoder, reading_encoder_from_config
from enc2gen.errors import ConfigError, ModelError
from enc2gen.llms.loading import LlmSpecialIds, llm_special_ids, load_llm, load_llm_tokenizer
from enc2gen.models.bridge.configuration import BridgeConfig
from enc2gen.models.bridge.hidden_states import HiddenStatesConfig
from enc2gen.models.bridge.options import checked_options
from enc2gen.models.bridge.processor import MAX_TARGET_LENGTH, BridgeProcessor
from enc2gen.models.bridge.storing import align, fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from enc2gen.models.bridge.modeling import BridgeForConditionalGeneration

DEFAULT_SOURCE_LENGTH = 1024
"""Longest source for encoders without a limit (LangBridge's scripts, arXiv 2401.10695: max_length_enc)."""
_NO_LIMIT = 10**6  # tokenizers without a limit say 10^30


@dataclass(frozen=True)
class PartOptions:
    """Arguments of `BridgeForConditionalGeneration.from_parts`, where each is described."""

    fusion: str
    fusion_options: Mapping[str, Any] | None
    mapper: str
    mapper_options: Mapping[str, Any] | None
    hidden_states: Mapping[str, Any] | HiddenStatesConfig | None
    aligner: Mapping[str, Any] | bool | None
    end_vector: Literal["zeros", "random"]
    source_template: str
    prompt: str
    prompt_with_source: bool
    prefix_bos: bool
    max_source_length: int | None
    encoder_tokenizer: PreTrainedTokenizerBase | None
    llm_tokenizer: PreTrainedTokenizerBase | None
    encoder_dtype: str | torch.dtype | None
    llm_dtype: str | torch.dtype | None
    freeze_encoder: bool
    freeze_llm: bool
    seed: int

    def aligner_options(self) -> dict[str, Any] | None:
        """Options of the aligner; `None`: no aligner."""
        if self.aligner is None or self.aligner is False:
            return None
        return {} if self.aligner is True else dict(self.aligner)

    def convention(self) -> dict[str, Any]:
        """All fields of `HiddenStatesConfig`."""
        given = self.hidden_states
        if isinstance(given, HiddenStatesConfig):
            return given.model_dump()
        return checked_options(HiddenStatesConfig, given or {}, where="hidden_states").model_dump()


def build_from_parts(
    model_class: type[BridgeForConditionalGeneration],
    encoder: str | os.PathLike[str] | PreTrainedModel,
    llm: str | os.PathLike[str] | PreTrainedModel,
    options: PartOptions,
) -> BridgeForConditionalGeneration:
    """What `from_parts` does, where arguments and errors are described."""
    if options.end_vector not in ("zeros", "random"):
        raise ConfigError(f"{options.end_vector!r} is no end vector", where="end_vector", remedy="use zeros or random")
    encoder_tokenizer, llm_tokenizer = options.encoder_tokenizer, options.llm_tokenizer
    if not isinstance(encoder, PreTrainedModel):
        encoder_tokenizer = encoder_tokenizer or load_tokenizer(encoder)
    if not isinstance(llm, PreTrainedModel):
        llm_tokenizer = llm_tokenizer or load_llm_tokenizer(llm)
    reading = load_reading_encoder(encoder, dtype=options.encoder_dtype)
    writing = load_llm(llm, dtype=options.llm_dtype)
    config = _config(options, reading, writing, encoder_tokenizer, llm_tokenizer)
    config.encoder_name, config.llm_name = _name(encoder), _name(llm)
    model = model_class(config, reading, writing)
    align(model)
    _set_generation(model)
    if encoder_tokenizer is not None and llm_tokenizer is not None:
        model.processor = BridgeProcessor(encoder_tokenizer, llm_tokenizer, config)
    return model.eval()


def _name(half: str | os.PathLike[str] | PreTrainedModel) -> str | None:
    """Where a half came from; folders by their full path, which is valid wherever the model is loaded."""
    name = half.config.name_or_path if isinstance(half, PreTrainedModel) else os.fspath(half)
    return str(Path(name).resolve()) if name and Path(name).exists() else name or None


def _config(
    options: PartOptions,
    encoder: PreTrainedModel,
    llm: PreTrainedModel,
    encoder_tokenizer: PreTrainedTokenizerBase | None,
    llm_tokenizer: PreTrainedTokenizerBase | None,
) -> BridgeConfig:
    ids = _special_ids(llm_tokenizer, llm)
    return BridgeConfig(
        # Copies: a composite configuration resets the attention implementation of its parts.
        encoder_config=copy.deepcopy(encoder.config),
        llm_config=copy.deepcopy(llm.config),
        encoder_dtype=_dtype_name(encoder),
        llm_dtype=_dtype_name(llm),
        hidden_states=_checked_convention(options, encoder),
        fusion=options.fusion,
        fusion_options=dict(options.fusion_options or {}),
        mapper=options.mapper,
        mapper_options=dict(options.mapper_options or {}),
        end_vector=options.end_vector,
        aligner=options.aligner_options(),
        source_template=options.source_template,
        prompt=options.prompt,
        prompt_with_source=options.prompt_with_source,
        prefix_bos=options.prefix_bos,
        max_source_length=_source_length(options.max_source_length, encoder, encoder_tokenizer),
        freeze_encoder=options.freeze_encoder,
        freeze_llm=options.freeze_llm,
        encoder_fingerprint=fingerprint(encoder),
        llm_fingerprint=fingerprint(llm),
        seed=options.seed,
        encoder_pad_token_id=_encoder_pad(encoder, encoder_tokenizer),
        bos_token_id=ids.bos,
        eos_token_id=ids.eos,
        pad_token_id=ids.pad,
        decoder_start_token_id=ids.pad if ids.bos is None else ids.bos,
    )


def _special_ids(tokenizer: PreTrainedTokenizerBase | None, llm: PreTrainedModel) -> LlmSpecialIds:
    without = SimpleNamespace(name_or_path=None)  # a configuration alone may know them
    return llm_special_ids(cast(Any, without if tokenizer is None else tokenizer), llm.config)


def _dtype_name(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _checked_convention(options: PartOptions, encoder: PreTrainedModel) -> dict[str, Any]:
    convention = options.convention()
    if convention["normalise"] == "final-norm" and encoder_facts(encoder).final_norm is None:
        raise ConfigError(
            f"no norm behind the last layer of {type(encoder).__name__} is known: post-norm encoders have none",
            where="hidden_states.normalise",
            remedy="use none or layer-norm",
        )
    return convention


def _source_length(wanted: int | None, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    positions = encoder_facts(encoder).max_positions
    if wanted is None:
        limit = getattr(tokenizer, "model_max_length", _NO_LIMIT) or _NO_LIMIT
        known = [length for length in (positions, limit) if length is not None and length < _NO_LIMIT]
        return min(known, default=DEFAULT_SOURCE_LENGTH)
    if positions is not None and wanted > positions:
        raise ModelError(
            f"sources of {wanted} tokens do not fit: the encoder has positions for {positions}",
            where="max_source_length",
            remedy=f"use {positions} or less",
        )
    return wanted


def _encoder_pad(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Id that pads sources; padding is masked by place, so that any id will do where there is no pad token."""
    rows = cast(nn.Embedding, encoder.get_input_embeddings()).weight.shape[0]
    if tokenizer is not None:
        highest = max(tokenizer.get_vocab().values())
        if highest >= rows:
            raise ModelError(
                f"the encoder's tokenizer knows ids up to {highest}, the encoder has {rows} embeddings",
                where="encoder_tokenizer",
                remedy="use the tokenizer that belongs to this encoder",
            )
        if tokenizer.pad_token_id is not None:
            return int(tokenizer.pad_token_id)
    return int(getattr(encoder.config, "pad_token_id", None) or 0)


def _set_generation(model: BridgeForConditionalGeneration) -> None:
    """Greedy search that ends at the LLM's EOS, any of them if it has several."""
    config, settings = model.config, model.generation_config
    own = getattr(getattr(model.llm, "generation_config", None), "eos_token_id", None)
    others = own if isinstance(own, list) else [own]
    ends = list(dict.fromkeys([cast(int, config.eos_token_id), *(i for i in others if i is not None)]))
    settings.eos_token_id = ends if len(ends) > 1 else ends[0]
    settings.bos_token_id, settings.pad_token_id = config.bos_token_id, config.pad_token_id
    settings.decoder_start_token_id = config.decoder_start_token_id
    settings.max_length, settings.max_new_tokens = None, MAX_TARGET_LENGTH


@contextmanager
def _default_dtype(name: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(parse_dtype(name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def bare_halves(
    config: BridgeConfig, encoder: PreTrainedModel | None, llm: PreTrainedModel | None
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Both halves: as given, and marked so that transformers does not initialise them again; else random ones."""
    for half in (encoder, llm):
        for module in half.modules() if half is not None else ():
            cast(Any, module)._is_hf_initialized = True
    if encoder is None:
        with _default_dtype(config.encoder_dtype):
            encoder = reading_encoder_from_config(cast(Any, config.encoder_config))
    if llm is None:
        llm_config = cast(Any, config.llm_config)
        if llm_config._attn_implementation is None and not torch.cuda.is_available():
            llm_config._attn_implementation = "eager"  # as load_llm chooses, so that saving changes no bit
        llm = AutoModelForCausalLM.from_config(llm_config, dtype=parse_dtype(config.llm_dtype))
    config.encoder_config, config.llm_config = encoder.config, llm.config
    return encoder, llm
