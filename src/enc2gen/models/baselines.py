"""Systems to compare, all built through one function: the paper's model, its ablations and honest baselines."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, EncoderDecoderModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from enc2gen.encoders.donor import donor_for
from enc2gen.encoders.loading import load_encoder
from enc2gen.errors import ConfigError, ModelError
from enc2gen.models.mbart import mbart_shaped, set_generation_defaults
from enc2gen.models.pretrained import pretrained
from enc2gen.models.seeding import seeded
from enc2gen.models.swcm.configuration import growth_options
from enc2gen.models.swcm.growing import fill_rows, select_layers, special_token_id, with_language_tokens
from enc2gen.models.swcm.modeling import SwcmForConditionalGeneration
from enc2gen.models.swcm.report import InitReport, TensorOrigin
from enc2gen.registry import Registry

Options = Mapping[str, Any]

FOREIGN_OPTIONS = {
    "warm-start": {"encoder_layers", "donor_layers", "dropout"},
    "mbart-shaped": {"encoder_layers", "dropout", "layers"},
    "pretrained": {"name", "dropout"},
}
"""Options of the presets that are transformers' own models."""

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
"""Nothing pretrained at all, encoder and embeddings included: the encoder's shape in its own norm order."""
PRESETS.add("mbart-shaped", {})
"""transformers' mBART (pre-norm, as deep on both sides) of the size of `swcm`, all random."""
PRESETS.add("warm-start", {})
"""transformers' own `EncoderDecoderModel`: the encoder twice, cross-attention random."""
PRESETS.add("pretrained", {})
"""A whole encoder-decoder that exists (mT5, mBART-50, NLLB-200, ...): the option `name`, of the Hub or a folder."""


def build_system(
    preset: str,
    encoder: str | os.PathLike[str] | PreTrainedModel | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    languages: Sequence[str],
    seed: int,
    verbose: bool = True,
    options: Options | None = None,
) -> PreTrainedModel:
    """Build the system `preset` from `encoder`.

    Args:
        encoder, tokenizer: not used by `pretrained`, which has its own.
        options: arguments of `SwcmForConditionalGeneration.from_encoder` that override the preset's.

    Raises:
        ConfigError: unknown preset, or options that it does not have.
    """
    chosen = {**PRESETS.get(preset), **(options or {})}
    check_options(preset, chosen)
    if preset == "pretrained":
        return pretrained(languages=languages, seed=seed, **chosen)
    if encoder is None:
        raise ConfigError(f"the preset {preset!r} needs an encoder", where="encoder")
    if preset in FOREIGN_OPTIONS:
        build = warm_start if preset == "warm-start" else mbart_shaped
        return build(encoder, tokenizer=tokenizer, languages=languages, seed=seed, verbose=verbose, **chosen)
    return SwcmForConditionalGeneration.from_encoder(
        encoder, tokenizer=tokenizer, languages=languages, seed=seed, verbose=verbose, **chosen
    )


def check_options(preset: str, options: Options) -> None:
    """Raise `ConfigError` unless `build_system` can take `options` for this preset; all mistakes are listed."""
    if (known := FOREIGN_OPTIONS.get(preset)) is not None:
        if unknown := sorted(set(options) - known):
            raise ConfigError(f"the preset {preset!r} does not take {', '.join(unknown)}", where="options")
        if preset == "pretrained" and not isinstance(options.get("name"), str):
            raise ConfigError("the preset 'pretrained' needs the option name", where="options")
        return
    if reserved := sorted(set(options) & {"languages", "tokenizer", "seed", "verbose"}):
        raise ConfigError(f"{', '.join(reserved)} cannot be set here", where="options")
    parameters = inspect.signature(SwcmForConditionalGeneration.from_encoder).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    growth_options({**defaults, **PRESETS.get(preset), **options})


def warm_start(
    encoder: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    languages: Sequence[str],
    seed: int,
    encoder_layers: Sequence[int] | None = None,
    donor_layers: Sequence[int] | None = None,
    dropout: float | None = None,
    verbose: bool = True,
) -> EncoderDecoderModel:
    """transformers' `EncoderDecoderModel` with both sides from `encoder` and language tokens added.

    Cross-attention and the head's transform stay random, and there are two embedding tables: what a user of
    transformers gets (transformers 5 ignores `tie_encoder_decoder`).

    Args:
        encoder_layers: keep only these encoder layers; all by default.
        donor_layers: those of them that the decoder starts from, in the encoder's numbering; all by default.

    Raises:
        ConfigError: layers that the encoder does not have or keep.
        ModelError: transformers has no decoder of this family, or a tensor of the encoder found no place.
    """
    loaded = load_encoder(encoder)
    if type(loaded.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"transformers has no decoder with cross-attention for {loaded.config.model_type!r} encoders",
            where="preset warm-start",
            remedy="use another baseline: random-decoder, no-sharing, base-a or base-b",
        )
    kept, donors = select_layers(donor_for(loaded.config), encoder_layers, donor_layers)
    if kept is not None:
        loaded = copy.deepcopy(loaded)
        donor_for(loaded.config).keep_layers(loaded, kept)
    tokenizer, ids, fresh_rows = with_language_tokens(encoder, loaded, tokenizer, languages)
    words = donor_for(loaded.config).word_embeddings()
    state = {name: tensor for name, tensor in loaded.state_dict().items() if not name.startswith("pooler.")}
    with seeded(seed):
        state[words] = fill_rows(state[words], max([len(state[words]), *(i + 1 for i in ids.values())]), fresh_rows)
        settings = loaded.config.to_dict() | {"vocab_size": len(state[words])}
        if dropout is not None:
            settings |= dict.fromkeys(donor_for(loaded.config).dropout_fields, dropout)
        config = loaded.config.from_dict(settings)
        own = cast(Any, type(loaded))(config, add_pooling_layer=False)
        shape = {"num_hidden_layers": len(donors), "is_decoder": True, "add_cross_attention": True, "use_cache": True}
        decoder = AutoModelForCausalLM.from_config(config.from_dict(settings | shape))
        sources = _decoder_sources(loaded, donors)
        copied = {name: state[source] for name, source in sources.items() if source in state}
        for side, tensors in ((own, state), (decoder.base_model, copied)):
            if unplaced := side.load_state_dict(tensors, strict=False).unexpected_keys:
                raise ModelError(f"{unplaced[0]} found no place in transformers' EncoderDecoderModel")
        model = EncoderDecoderModel(encoder=own, decoder=decoder)
    model.config.languages = ids
    model.config.pad_token_id = config.pad_token_id
    set_generation_defaults(model, special_token_id("eos", "sep", config if tokenizer is None else tokenizer, config))
    report = _warm_start_report(model, state, sources, donors, str(loaded.config.name_or_path or "encoder"))
    model.init_report = cast(Any, report)
    if verbose:
        report.print()
    return model.eval()


def _decoder_sources(encoder: PreTrainedModel, donors: Sequence[int]) -> dict[str, str]:
    """Each tensor of a decoder with the layers `donors` -> the encoder's tensor that it starts from."""
    stack = donor_for(encoder.config).layer_list(encoder)
    layers = next(name for name, module in encoder.named_modules() if module is stack)
    sources = {}
    for name in encoder.state_dict():
        if not name.startswith(f"{layers}."):
            sources[name] = name
            continue
        number, _, rest = name.removeprefix(f"{layers}.").partition(".")
        sources |= {f"{layers}.{place}.{rest}": name for place, donor in enumerate(donors) if donor == int(number)}
    return sources


def _warm_start_report(
    model: EncoderDecoderModel,
    state: Mapping[str, Tensor],
    sources: Mapping[str, str],
    donors: Sequence[int],
    encoder: str,
) -> InitReport:
    """Origins by value: a decoder tensor is copied if it equals the encoder's tensor that it starts from."""
    prefix = f"decoder.{model.decoder.base_model_prefix}."
    tensors = []
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if not name.startswith("decoder."):
            continue
        source = sources.get(name.removeprefix(prefix), "")
        if source in state and torch.equal(tensor, state[source]):
            tensors.append(TensorOrigin(name, "copied", tuple(tensor.shape), source))
        elif tensor is model.decoder.get_input_embeddings().weight:
            tensors.append(
                TensorOrigin(name, "tied", tuple(tensor.shape), prefix + "embeddings.word_embeddings.weight")
            )
        else:
            constant = name.endswith(".bias") or "norm" in name.lower()
            tensors.append(TensorOrigin(name, "constant" if constant else "random", tuple(tensor.shape)))
    plan = [f"encoder:{donor}" for donor in donors]
    return InitReport(encoder, plan, tensors, sum(p.numel() for p in model.parameters()))
