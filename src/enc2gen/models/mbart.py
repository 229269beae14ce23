"""The baseline trained from scratch: mBART's architecture (arXiv 2001.08210) of the size of a grown model."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import (
    AutoModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from enc2gen.encoders.donor import donor_for
from enc2gen.encoders.loading import load_encoder
from enc2gen.errors import ConfigError
from enc2gen.models.seeding import seeded
from enc2gen.models.swcm.growing import MAX_NEW_TOKENS, special_token_id, with_language_tokens
from enc2gen.models.swcm.modeling import SwcmForConditionalGeneration
from enc2gen.models.swcm.report import InitReport, TensorOrigin


def mbart_shaped(
    encoder: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    languages: Sequence[str],
    seed: int,
    encoder_layers: Sequence[int] | None = None,
    layers: int | None = None,
    dropout: float | None = None,
    verbose: bool = True,
) -> MBartForConditionalGeneration:
    """transformers' mBART with random weights and the vocabulary, width, heads and length limit of `encoder`.

    Norms come before the sub-layers, and both sides end in one; embeddings are scaled by the square root of the width
    and shared by encoder, decoder and head.

    Args:
        encoder: nothing but its shape and vocabulary is taken.
        encoder_layers: the encoder layers that the grown model of the same size would keep.
        layers: of either side; by default as many as come closest to the parameters of the preset `swcm`.
        dropout: replaces the encoder's rates; `None` keeps them.

    Raises:
        ConfigError: `layers` is not positive.
        ModelError: the encoder's family is not supported, or the tokenizer does not belong to it.
    """
    if layers is not None and layers < 1:
        raise ConfigError(f"layers={layers} is not positive", where="layers", remedy="use 1 or more, or none")
    loaded = load_encoder(encoder)
    own = copy.deepcopy(cast(Any, loaded.config))
    tokenizer, ids, _ = with_language_tokens(encoder, loaded, tokenizer, languages)
    rows = cast(Any, loaded.get_input_embeddings()).weight.shape[0]
    config = _configuration(own, max([rows, *(index + 1 for index in ids.values())]), tokenizer, dropout)
    depth = _depth(config, _grown_size(own, encoder_layers, rows, languages)) if layers is None else layers
    with seeded(seed):
        model = MBartForConditionalGeneration(_deep(config, depth))
    model.config.languages = ids
    model.tokenizer = cast(Any, tokenizer)
    set_generation_defaults(model, cast("int | None", config.eos_token_id))
    model.init_report = cast(Any, _report(model, depth))
    if verbose:
        cast(Any, model.init_report).print()
    return model.eval()


def set_generation_defaults(model: PreTrainedModel, end: int | None) -> None:
    """Stop at the end token or after the limit of new tokens that grown models have, and nothing else."""
    generation = cast(Any, model.generation_config)
    generation.pad_token_id, generation.eos_token_id = model.config.pad_token_id, end
    generation.max_length, generation.max_new_tokens = None, MAX_NEW_TOKENS


def _configuration(
    encoder: PreTrainedConfig, rows: int, tokenizer: PreTrainedTokenizerBase | None, dropout: float | None
) -> MBartConfig:
    donor = donor_for(encoder)
    style, special = donor.style(), cast(Any, encoder if tokenizer is None else tokenizer)
    rate = style.hidden_dropout_prob if dropout is None else dropout
    return MBartConfig(
        vocab_size=rows,
        d_model=style.hidden_size,
        encoder_ffn_dim=style.intermediate_size,
        decoder_ffn_dim=style.intermediate_size,
        encoder_attention_heads=style.num_attention_heads,
        decoder_attention_heads=style.num_attention_heads,
        max_position_embeddings=donor.max_positions,
        dropout=rate,
        attention_dropout=style.attention_probs_dropout_prob if dropout is None else dropout,
        scale_embedding=True,
        pad_token_id=encoder.pad_token_id,
        bos_token_id=special_token_id("bos", "cls", special, encoder),
        eos_token_id=special_token_id("eos", "sep", special, encoder),
        decoder_start_token_id=None,  # the target language's token is
        forced_eos_token_id=None,  # an output that the limit cuts has no end
    )


def _deep(config: MBartConfig, layers: int) -> MBartConfig:
    return MBartConfig(**{**config.to_dict(), "encoder_layers": layers, "decoder_layers": layers})


def _depth(config: MBartConfig, size: int) -> int:
    """Layers of either side with which a model comes closest to `size` parameters; 1 at least."""
    with torch.device("meta"):
        one, two = (MBartForConditionalGeneration(_deep(config, layers)).num_parameters() for layers in (1, 2))
    return max(1, 1 + round((size - one) / (two - one)))


def _grown_size(config: PreTrainedConfig, kept: Sequence[int] | None, rows: int, languages: Sequence[str]) -> int:
    """Parameters of the preset `swcm` from an encoder of this configuration."""
    config = copy.deepcopy(config)
    config.vocab_size = rows
    with torch.device("meta"):
        encoder = AutoModel.from_config(config)
        grown = SwcmForConditionalGeneration.from_encoder(
            encoder, encoder_layers=kept, languages=languages, verbose=False
        )
    return int(grown.num_parameters())


def _report(model: MBartForConditionalGeneration, layers: int) -> InitReport:
    tensors = []
    for name, tensor in model.named_parameters():
        constant = name.endswith(".bias") or "norm" in name
        tensors.append(TensorOrigin(name, "constant" if constant else "random", tuple(tensor.shape)))
    return InitReport("the shape of an encoder", ["mbart"] * layers, tensors, model.num_parameters())
