"""Systems to compare, all built through one function: the paper's model, its ablations and honest baselines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, EncoderDecoderModel, PreTrainedModel, PreTrainedTokenizerBase

from enc2gen.encoders.loading import load_encoder
from enc2gen.errors import ConfigError
from enc2gen.models.swcm.configuration import GrowthOptions
from enc2gen.models.swcm.growing import MAX_NEW_TOKENS, extend_vocabulary, fill_rows
from enc2gen.models.swcm.modeling import SwcmForConditionalGeneration
from enc2gen.registry import Registry

Options = Mapping[str, Any]

PRESETS: Registry[Options] = Registry("system preset")
PRESETS.add("swcm", {})
"""The paper's model (arXiv 2502.10852, section 3)."""
PRESETS.add("swcm-tied", {"sharing": "tied"})
"""Decoder parameters that stay the encoder's own: our variant."""
PRESETS.add("deltalm", {"growth": "deltalm", "insert_every": None})
"""DeltaLM's initialisation (arXiv 2106.13736, section 2.2)."""
PRESETS.add("random-decoder", {"growth": "standard", "copy": ("embeddings",), "norm_order": "pre"})
"""The paper's Cino-Transformer (section 5): n standard random layers; pre-norm, their stronger order."""
PRESETS.add("random-decoder-post-norm", {"growth": "standard", "copy": ("embeddings",)})
"""Cino-Transformer in the encoder's own norm order."""
PRESETS.add("no-sharing", {"copy": ("embeddings",)})
"""The paper's "-WS": the full model's layers, all random."""
PRESETS.add("base-a", {"insert_every": None})
"""BASE-A: no normal layers."""
PRESETS.add("base-b", {"normal_layers": "duplicate"})
"""BASE-B: normal layers replaced by duplicates of the layer before."""
PRESETS.add("all-random", {"growth": "standard", "random_encoder": True, "norm_order": "pre"})
"""Nothing pretrained at all, encoder and embeddings included."""
PRESETS.add("warm-start", {})
"""transformers' own `EncoderDecoderModel`: the encoder twice, cross-attention random."""


def build_system(
    preset: str,
    encoder: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    languages: Sequence[str],
    seed: int,
    verbose: bool = True,
    options: Options | None = None,
) -> PreTrainedModel:
    """Build the system `preset` from `encoder`.

    Args:
        options: arguments of `SwcmForConditionalGeneration.from_encoder` that override the preset's.

    Raises:
        ConfigError: unknown preset, or options that it does not have.
    """
    chosen = {**PRESETS.get(preset), **(options or {})}
    if unknown := unknown_options(preset, chosen):
        raise ConfigError(f"the preset {preset!r} does not take {', '.join(unknown)}", where="options")
    if preset == "warm-start":
        return warm_start(encoder, tokenizer=tokenizer, languages=languages, seed=seed)
    return SwcmForConditionalGeneration.from_encoder(
        encoder, tokenizer=tokenizer, languages=languages, seed=seed, verbose=verbose, **chosen
    )


def unknown_options(preset: str, options: Options) -> list[str]:
    """Names in `options` that `build_system` cannot take for this preset."""
    settable = {field.name for field in fields(GrowthOptions)} - {"languages", "tokenizer", "seed", "verbose"}
    return sorted(set(options) - (set() if preset == "warm-start" else settable))


def warm_start(
    encoder: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    languages: Sequence[str],
    seed: int,
) -> EncoderDecoderModel:
    """transformers' `EncoderDecoderModel` with both sides from `encoder` and language tokens added.

    Cross-attention and the head's transform stay random, and there are two embedding tables: what a user of
    transformers gets (transformers 5 ignores `tie_encoder_decoder`).
    """
    loaded = load_encoder(encoder)
    tokenizer, ids, fresh_rows = extend_vocabulary(encoder, loaded, tokenizer, languages)
    state = dict(loaded.state_dict())
    config = loaded.config.from_dict(loaded.config.to_dict())
    decoder_config = loaded.config.from_dict(
        loaded.config.to_dict() | {"is_decoder": True, "add_cross_attention": True, "use_cache": True}
    )
    name = next(name for name, tensor in loaded.named_parameters() if tensor is loaded.get_input_embeddings().weight)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state[name] = fill_rows(state[name], max([len(state[name]), *(i + 1 for i in ids.values())]), fresh_rows)
        config.vocab_size = decoder_config.vocab_size = len(state[name])
        own = type(loaded)(config, add_pooling_layer=False)
        own.load_state_dict(state, strict=False)
        decoder = AutoModelForCausalLM.from_config(decoder_config)
        decoder.base_model.load_state_dict(state, strict=False)
        model = EncoderDecoderModel(encoder=own, decoder=decoder)
    model.config.languages = ids
    generation = model.generation_config
    generation.pad_token_id = model.config.pad_token_id = config.pad_token_id
    generation.eos_token_id = cast(Any, tokenizer).eos_token_id if tokenizer is not None else config.eos_token_id
    generation.max_length, generation.max_new_tokens = None, MAX_NEW_TOKENS
    return model.eval()
