"""Grow a decoder out of an encoder: plan the layers, transfer the weights, account for every tensor."""

from __future__ import annotations

import copy as copying
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from enc2gen.corpora.languages import normalise_languages
from enc2gen.encoders.donor import Donor, NormOrder, donor_for
from enc2gen.encoders.dtypes import to_dtype
from enc2gen.encoders.loading import load_encoder, load_tokenizer
from enc2gen.errors import ConfigError, ModelError
from enc2gen.models.seeding import seeded
from enc2gen.models.swcm.configuration import COPY_PARTS, GrowthOptions, LayerPlan, SwcmConfig, plan_layers
from enc2gen.models.swcm.fresh import silence_fresh_sublayers, top_norm, typical_gain
from enc2gen.models.swcm.modeling import SwcmForConditionalGeneration
from enc2gen.models.swcm.report import InitReport, Origin, TensorOrigin
from enc2gen.models.swcm.sources import decoder_sources, tied_parameters
from enc2gen.tokenization.tokenizer import add_language_tokens

MAX_NEW_TOKENS = 256
"""Output limit before one is learnt from data: the paper's maximal length (arXiv 2502.10852, section 4.1)."""

NARROW = 0.5
"""Gains of the norm below the LM head that are warned of; fresh ones are 1 (our choice)."""


def grow(encoder: str | os.PathLike[str] | PreTrainedModel, options: GrowthOptions) -> SwcmForConditionalGeneration:
    """Carry out `SwcmForConditionalGeneration.from_encoder`, where options, result and errors are described."""
    loaded = load_encoder(encoder)
    own = not isinstance(encoder, PreTrainedModel)
    kept, donors = select_layers(donor_for(loaded.config), options.encoder_layers, options.donor_layers)
    if kept is not None:
        loaded = loaded if own else copying.deepcopy(loaded)
        donor_for(loaded.config).keep_layers(loaded, kept)
    plan = plan_layers(
        donors,
        growth=options.growth,
        insert_every=options.insert_every,
        normal_after_last=options.normal_after_last,
        normal_layers=options.normal_layers,
    )
    tokenizer, language_ids, fresh_rows = with_language_tokens(encoder, loaded, options.tokenizer, options.languages)
    parts: list[str] = [] if options.random_encoder else [part for part in COPY_PARTS if part in options.copy_parts]
    config = _configure(loaded, plan, parts, options, language_ids, tokenizer)
    device = next(loaded.parameters()).device
    with seeded(options.seed), torch.device(device):
        model = SwcmForConditionalGeneration(config)
        if device.type != "meta" and not options.random_encoder:
            _transfer(model, loaded, fresh_rows)
        if device.type != "meta" and options.fresh_output == "zero":
            silence_fresh_sublayers(model.decoder, decoder_sources(config))
    to_dtype(model, loaded.dtype)
    scaled = _settle_top_norm(model, options) if device.type != "meta" else {}
    model.tie_weights()
    model.tokenizer = tokenizer
    model.init_report = account(model, _name(encoder), fresh_rows, scaled, random_encoder=options.random_encoder)
    _set_generation_defaults(model)
    if options.verbose:
        model.init_report.print()
    return model.eval()


def table_of(model: PreTrainedModel) -> Tensor:
    """The word embedding table, `[vocabulary, hidden]`."""
    return cast(Tensor, model.get_input_embeddings().weight)


def _name(encoder: str | os.PathLike[str] | PreTrainedModel) -> str:
    if isinstance(encoder, PreTrainedModel):
        return str(encoder.config.name_or_path or type(encoder).__name__)
    return os.fspath(encoder)


def select_layers(
    donor: Donor, encoder_layers: Sequence[int] | None, donor_layers: Sequence[int] | None
) -> tuple[list[int] | None, list[int]]:
    """Encoder layers to keep (`None`: all) and donor layers in the numbering after the cut."""
    kept = list(encoder_layers) if encoder_layers is not None else list(range(donor.num_layers))
    wanted = list(donor_layers) if donor_layers is not None else kept
    if foreign := [layer for layer in wanted if layer not in kept]:
        raise ConfigError(
            f"donor layers {foreign} are not among the encoder's layers {kept}",
            where="donor_layers",
            remedy="use layers that the encoder keeps",
        )
    return (kept if encoder_layers is not None else None), [kept.index(layer) for layer in wanted]


def with_language_tokens(
    encoder: str | os.PathLike[str] | PreTrainedModel,
    loaded: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    languages: Sequence[str],
) -> tuple[PreTrainedTokenizerBase | None, dict[str, int], list[int]]:
    """Add language tokens: a copy of the tokenizer that has them, tag -> id, and the ids whose embedding rows are new.

    Raises:
        ModelError: the tokenizer has more tokens than the encoder's table has rows.
        LanguageError: an unknown tag.
    """
    tags = normalise_languages(languages)
    rows = table_of(loaded).shape[0]
    if tokenizer is None and not isinstance(encoder, PreTrainedModel):
        tokenizer = load_tokenizer(encoder)
    if tokenizer is None:
        # A loaded encoder without its tokenizer: the tokens follow the last row of the table.
        ids = {tag: rows + index for index, tag in enumerate(tags)}
        return None, ids, sorted(ids.values())
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens but the encoder's embedding table only {rows} rows",
            where=_name(encoder),
            remedy="use the tokenizer that belongs to this encoder",
        )
    tokenizer = copying.deepcopy(tokenizer)
    known = len(tokenizer)
    ids = add_language_tokens(tokenizer, tags)
    return tokenizer, ids, sorted(index for index in ids.values() if index >= known)


def _configure(
    encoder: PreTrainedModel,
    plan: Sequence[LayerPlan],
    parts: list[str],
    options: GrowthOptions,
    language_ids: dict[str, int],
    tokenizer: PreTrainedTokenizerBase | None,
) -> SwcmConfig:
    source: Any = copying.deepcopy(encoder.config)
    donor = donor_for(source)
    source.vocab_size = max([table_of(encoder).shape[0], *(index + 1 for index in language_ids.values())])
    style = donor.style()
    if (rate := options.dropout) is not None:
        donor.set_dropout(rate)
        style = replace(style, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
    order = options.norm_order or donor.norm_order
    _warn_of_other_order(donor, order, plan, parts)
    special = tokenizer if tokenizer is not None else source
    config = SwcmConfig(
        encoder_config=source,
        sharing=options.sharing,
        norm_order=order,
        tie_lm_head=options.tie_lm_head,
        qk_norm=options.qk_norm,
        copied_parts=parts,
        languages=language_ids,
        vocab_size=source.vocab_size,
        pad_token_id=source.pad_token_id,
        bos_token_id=special_token_id("bos", "cls", special, source),
        eos_token_id=special_token_id("eos", "sep", special, source),
        **asdict(style),
    )
    if config.eos_token_id is None:
        warnings.warn(
            "no end token is known, so only the length limit ends an output: pass the tokenizer as tokenizer=, "
            "or set generation_config.eos_token_id",
            stacklevel=3,
        )
    config.set_plan(style_layers(plan, donor, order))
    return config


def _warn_of_other_order(donor: Donor, order: NormOrder, plan: Sequence[LayerPlan], parts: Sequence[str]) -> None:
    grown = any(layer.first is not None for layer in plan)
    if order != donor.norm_order and grown and set(parts) & {"self_attention", "cross_attention", "ffn"}:
        warnings.warn(
            f"weights copied from a {donor.norm_order}-norm encoder into a {order}-norm decoder lose their meaning",
            stacklevel=4,
        )


def style_layers(plan: Sequence[LayerPlan], donor: Donor, order: NormOrder) -> list[LayerPlan]:
    """`plan` with each layer's rotation, window and norm, taken from its first donor layer.

    A donor layer without a norm of its own relies on normed embeddings below it, so that only the decoder's bottom
    layer can do without, and only in pre-norm order.
    """
    styled = []
    for index, layer in enumerate(plan):
        style = donor.layer_style(layer.first)
        normed = style.attention_norm or index > 0 or order == "post"
        styled.append(
            replace(layer, rope_theta=style.rope_theta, sliding_window=style.sliding_window, input_norm=normed)
        )
    return styled


def special_token_id(name: str, stand_in: str, *owners: Any) -> int | None:
    """The first of `<name>_token_id` and `<stand_in>_token_id` that is set; the first of several end tokens."""
    for owner in owners:
        for role in (name, stand_in):
            value = getattr(owner, f"{role}_token_id", None)
            if value is not None:
                return int(value[0] if isinstance(value, list) else value)
    return None


@torch.no_grad()
def _transfer(model: SwcmForConditionalGeneration, encoder: PreTrainedModel, fresh_rows: list[int]) -> None:
    """Copy the encoder, then grow the decoder from it. Runs after `post_init`, which would overwrite it."""
    words = donor_for(encoder.config).word_embeddings()
    state = dict(encoder.state_dict())
    table = state.pop(words)
    missing = set(model.encoder.load_state_dict(state, strict=False).missing_keys) - {words}
    if missing:
        raise ModelError(f"the encoder lacks {sorted(missing)[0]} and {len(missing) - 1} other tensors")
    rows = table_of(model)
    rows.copy_(fill_rows(table, len(rows), fresh_rows))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = tied_parameters(cast(SwcmConfig, model.config))
    for target, source in decoder_sources(cast(SwcmConfig, model.config)).items():
        if target not in tied:
            parameters[target].copy_(source.take(parameters))
    if "lm_head.weight" not in tied:
        model.lm_head.weight.copy_(rows)


def fill_rows(table: Tensor, size: int, fresh_rows: Sequence[int]) -> Tensor:
    """`table` `[old, hidden]` extended to `[size, hidden]`, with `fresh_rows` drawn around the table's mean row.

    New rows look like the average row, so that softmax and attention see nothing unusual.
    """
    rows = table.new_zeros(size, table.shape[1])
    rows[: len(table)] = table
    if fresh_rows:
        noise = torch.randn(len(fresh_rows), table.shape[1])
        rows[list(fresh_rows)] = (table.mean(dim=0) + table.std(dim=0) * noise).to(table.dtype)
    return rows


@torch.no_grad()
def _settle_top_norm(model: SwcmForConditionalGeneration, options: GrowthOptions) -> dict[str, float]:
    """Widen the norm below the LM head, or warn of a narrow one; names of what was scaled, and the factor."""
    norm = top_norm(model.decoder)
    size = typical_gain(norm)
    # In pre-norm order the encoder's last norm is on top, whatever layer is below.
    grown = cast(SwcmConfig, model.config).plan[-1].kind == "custom" and model.decoder.final_norm is None
    other = ", or have a normal layer on top, with insert_every a divisor of the number of grown layers" * grown
    if options.top_norm == "copied":
        if size < NARROW:
            warnings.warn(
                f"the norm below the LM head has gains of about {size:.2f}, after the encoder's, so that the decoder "
                f"learns to choose words slowly (docs/results/normal-layers.md): use top_norm='unit'{other}",
                stacklevel=4,
            )
        return {}
    names = {name for name, parameter in model.named_parameters() if any(parameter is own for own in norm.parameters())}
    if any(name.startswith("encoder.") for name in names):
        raise ConfigError(
            "top_norm='unit' would scale the encoder's own norm, which is tied to the decoder's",
            where="top_norm",
            remedy=f"use sharing='copy'{other}",
        )
    for parameter in norm.parameters():
        parameter.mul_(1 / size)
    return {name: 1 / size for name in names}


def account(
    model: SwcmForConditionalGeneration,
    encoder: str,
    fresh_rows: Sequence[int] = (),
    scaled: Mapping[str, float] = MappingProxyType({}),
    *,
    random_encoder: bool = False,
) -> InitReport:
    """Say for every decoder and LM head tensor where it came from, from its actual values.

    Args:
        model: just grown.
        encoder: its name.
        fresh_rows: rows of the word embeddings that are new.
        scaled: tensor -> what its source is multiplied by.
        random_encoder: whether nothing was taken from the encoder, word embeddings included.

    Raises:
        ModelError: a tensor that the plan copies or ties differs from its source, or a tensor that is neither
            copied, tied nor expected to be random exists.
    """
    config = cast(SwcmConfig, model.config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sources, tied = decoder_sources(config), tied_parameters(config)
    expected = re.compile("|".join(_fresh_patterns(config, random_encoder)))
    tensors = []
    for name, tensor in parameters.items():
        if not name.startswith(("decoder.", "lm_head.")):
            continue
        source = sources.get(name)
        if name == "lm_head.weight" and (name in tied or not random_encoder):
            source = sources["decoder.embed_tokens.weight"]
        if source is None and not expected.fullmatch(name):
            raise ModelError(f"{name} would stay random although nothing in the plan says so", where="init report")
        factor = scaled.get(name)
        if source is not None and not _same(tensor, source.take(parameters), factor, must_share=name in tied):
            raise ModelError(f"{name} was not taken from {source}", where="init report")
        note = f"times {factor:.4g}" if factor is not None else None
        if fresh_rows and len(tensor) == config.vocab_size:
            note = f"{len(fresh_rows)} rows new, for language tokens"
        origin = _origin(name, tensor, source is not None, name in tied)
        tensors.append(TensorOrigin(name, origin, tuple(tensor.shape), str(source) if source else None, note))
    total = sum(parameter.numel() for parameter in model.parameters())
    plan = [layer.kind if layer.first is None else f"{layer.kind}:{layer.first}" for layer in config.plan]
    plan = [
        text if layer.first == layer.second else f"{text}+{layer.second}"
        for text, layer in zip(plan, config.plan, strict=True)
    ]
    return InitReport(encoder, plan, tensors, total)


def _origin(name: str, tensor: Tensor, has_source: bool, is_tied: bool) -> Origin:
    if has_source:
        return "tied" if is_tied else "copied"
    zero = tensor.device.type != "meta" and not tensor.any()  # by fresh_output
    return "constant" if zero or name.endswith(".bias") or "norm" in name else "random"


def _same(tensor: Tensor, source: Tensor, factor: float | None = None, *, must_share: bool) -> bool:
    if must_share:
        return tensor is source
    return tensor.device.type == "meta" or torch.equal(tensor, source if factor is None else source * factor)


def _fresh_patterns(config: SwcmConfig, random_encoder: bool) -> list[str]:
    """Names that may be random, from the switches alone (not from the list of sources, which this checks)."""
    parts = set(config.copied_parts or ())
    patterns = [r"lm_head\.bias"]
    grown = any(layer.first is not None for layer in config.plan)
    if "norms" not in parts or not grown or donor_for(cast(Any, config.encoder_config)).norm_order == "post":
        patterns.append(r"decoder\.final_norm\.(weight|bias)")
    if random_encoder:
        patterns.append(r"lm_head\.weight")
    if "embeddings" not in parts:
        patterns.append(r"decoder\.embed_(positions|types|norm)\.(weight|bias)")
    for index, layer in enumerate(config.plan):
        prefix = rf"decoder\.layers\.{index}"
        if layer.kind == "normal":
            patterns.append(prefix + r"\..+")
            continue
        if config.qk_norm:
            patterns.append(rf"{prefix}\.(self|cross)_attention\.[qk]_norm\.weight")
        for part, names in (
            ("self_attention", "self_attention"),
            ("cross_attention", "cross_attention"),
            ("ffn", r"ffn[12]"),
        ):
            if part not in parts:
                patterns.append(rf"{prefix}\.{names}\..+")
            if part not in parts or "norms" not in parts:
                patterns.append(rf"{prefix}\.{names}_norm\..+")
    return patterns


def _set_generation_defaults(model: SwcmForConditionalGeneration) -> None:
    """Stop transformers' default of 20 new tokens, and never start from the pad token."""
    config, generation = model.config, model.generation_config
    generation.max_length = None
    positions = donor_for(cast(Any, config.encoder_config)).max_positions
    generation.max_new_tokens = min(MAX_NEW_TOKENS, positions - 1)
    generation.pad_token_id = config.pad_token_id
    generation.bos_token_id = config.bos_token_id
    generation.eos_token_id = config.eos_token_id
    if not config.languages:
        generation.decoder_start_token_id = config.bos_token_id
