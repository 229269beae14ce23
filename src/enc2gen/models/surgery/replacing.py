"""Give a model another vocabulary: every table, head, bias, id and configuration at once, in place.

Shapes: V old vocabulary, W new vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from enc2gen.encoders.donor import donor_for
from enc2gen.errors import LanguageError, ModelError
from enc2gen.models.swcm.modeling import SwcmForConditionalGeneration
from enc2gen.tokenization.tokenizer import language_token

_RARE = 0.1
"""Quantile of the old biases that new entries get (our choice), see `extend_bias`."""
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
"""Ids in a generation configuration besides those whose names end in `_token_id`."""


def replace_vocabulary(
    model: PreTrainedModel,
    rows: Tensor,
    origins: Sequence[int | None],
    tokenizer: PreTrainedTokenizerBase,
    *,
    head_rows: Tensor | None = None,
    head_bias: Tensor | None = None,
) -> None:
    """Replace, in place, everything in `model` that depends on the vocabulary.

    Parameters that were one and the same before (word embeddings, LM head, biases) are one and the same afterwards.
    Nothing is changed if an error is raised.

    Args:
        model: bare encoder, masked language model or generator.
        rows: the new input table, `[W, H]`.
        origins: for each new id the old id, or None for a new piece; W of them.
        tokenizer: has the new ids; saved with our generators.
        head_rows: rows of an output layer that is not tied to the table, `[W, H]`. By default kept ones are copied
            and new ones are the mean, which disturbs the softmax least. Not used where the two are tied.
        head_bias: bias of the output layer, `[W]`; `extend_bias` by default.

    Raises:
        ModelError: table, origins and tokenizer do not fit each other or the model; the pad token moves although
            the model counts positions from its id (RoBERTa, XLM-R).
        LanguageError: a language's token is lost.
    """
    table, head = cast(nn.Embedding, model.get_input_embeddings()), output_layer(model)
    _check_shapes(table, rows, origins, tokenizer)
    moved = {old: new for new, old in enumerate(origins) if old is not None}
    _check_padding(model, moved)
    languages = _moved_languages(model, moved, tokenizer)
    fresh = _fresh_parameters(model, table, head, rows, origins, head_rows, head_bias)
    old_size = table.weight.shape[0]
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in fresh:
                module._parameters[name] = fresh[id(parameter)]
    _set_sizes(model, fresh, old_size, len(origins), moved)
    for config in _configurations(model):
        config.vocab_size = len(origins)
        _move_ids(config, moved, tokenizer)
    if languages:
        cast(Any, model.config).languages = languages
    if getattr(model, "generation_config", None) is not None:
        _move_ids(model.generation_config, moved, tokenizer)
    if isinstance(model, SwcmForConditionalGeneration):
        model.tokenizer = tokenizer
        _update_report(model, fresh, len(moved))


def output_layer(model: PreTrainedModel) -> nn.Linear | None:
    """The layer that predicts tokens; None for a bare encoder."""
    try:
        return cast("nn.Linear | None", model.get_output_embeddings())
    except NotImplementedError:
        return None


def take_rows(old: Tensor, origins: Sequence[int | None], fill: Tensor) -> Tensor:
    """Rows of `old` in the order of `origins`, and `fill` where there is none: `[V, ...]` -> `[W, ...]`."""
    kept = torch.tensor([index for index, origin in enumerate(origins) if origin is not None], dtype=torch.long)
    source = torch.tensor([origin for origin in origins if origin is not None], dtype=torch.long)
    taken = fill.to(old).expand(len(origins), *old.shape[1:]).clone()
    taken[kept.to(old.device)] = old.detach()[source.to(old.device)]
    return taken


def extend_bias(bias: Tensor, origins: Sequence[int | None]) -> Tensor:
    """The output bias of a new vocabulary: `[V]` -> `[W]`.

    Next to the hidden state, the bias of a token plays the part of its log frequency. New entries get the bias that
    a tenth of the old ones lie below: the model takes them for rare tokens, so they take little probability from
    the old languages, yet stay within what it has seen, so their gradients are ordinary ones (our choice).
    """
    return take_rows(bias, origins, torch.quantile(bias.detach().float(), _RARE))


def _check_shapes(
    table: nn.Embedding, rows: Tensor, origins: Sequence[int | None], tokenizer: PreTrainedTokenizerBase
) -> None:
    old, hidden = table.weight.shape
    if tuple(rows.shape) != (len(origins), hidden):
        raise ModelError(
            f"rows of shape {list(rows.shape)} are no table of {len(origins)} pieces in {hidden} dimensions",
            where="replace_vocabulary",
        )
    known = [origin for origin in origins if origin is not None]
    if known and (min(known) < 0 or max(known) >= old or len(set(known)) < len(known)):
        raise ModelError(f"origins must be different old ids, 0 to {old - 1}", where="replace_vocabulary")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= len(origins):
        raise ModelError(
            f"the tokenizer uses ids up to {largest}, but there are only {len(origins)} rows",
            where="replace_vocabulary",
            remedy="give origins and rows for every id of the tokenizer",
        )


def _check_padding(model: PreTrainedModel, moved: Mapping[int, int]) -> None:
    """RoBERTa's positions begin behind the pad token's id, so moving the token would shift all positions."""
    config: Any = model.config
    encoder: Any = getattr(config, "encoder_config", None) or config
    pad = encoder.pad_token_id
    if pad is None or donor_for(encoder).position_offset != pad + 1:
        return
    if moved.get(pad) != pad:
        raise ModelError(
            f"the new vocabulary moves the pad token from id {pad} to {moved.get(pad)}, but positions are counted "
            "from this id",
            where=str(config.name_or_path or type(model).__name__),
            remedy=f"keep the pad token at id {pad}",
        )


def _moved_languages(
    model: PreTrainedModel, moved: Mapping[int, int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, int]:
    languages: Mapping[str, int] = getattr(model.config, "languages", None) or {}
    vocabulary = tokenizer.get_vocab()
    for tag, old in languages.items():
        if old not in moved or vocabulary.get(language_token(tag)) != moved[old]:
            raise LanguageError(
                f"the token of language {tag!r} is not the same in tokenizer and origins",
                where="replace_vocabulary",
                remedy="keep the tokens of all the model's languages",
            )
    return {tag: moved[old] for tag, old in languages.items()}


def _fresh_parameters(
    model: PreTrainedModel,
    table: nn.Embedding,
    head: nn.Linear | None,
    rows: Tensor,
    origins: Sequence[int | None],
    head_rows: Tensor | None,
    head_bias: Tensor | None,
) -> dict[int, nn.Parameter]:
    """`id` of each old parameter of vocabulary size -> its successor."""
    new = {id(table.weight): (table.weight, rows)}
    if head is not None:
        if head.weight is not table.weight:
            weight = head.weight.detach()
            new[id(head.weight)] = (
                head.weight,
                take_rows(weight, origins, weight.float().mean(dim=0)) if head_rows is None else head_rows,
            )
        for bias in _head_biases(model, head):
            new[id(bias)] = (bias, extend_bias(bias, origins) if head_bias is None else head_bias)
    return {
        key: nn.Parameter(
            value.detach().to(device=old.device, dtype=old.dtype).clone(), requires_grad=old.requires_grad
        )
        for key, (old, value) in new.items()
    }


def _head_biases(model: PreTrainedModel, head: nn.Linear) -> Iterator[nn.Parameter]:
    """The output bias, and its second copy in the modules around it (transformers' BERT and RoBERTa heads)."""
    owners = [head, *(module for module in model.modules() if any(child is head for child in module.children()))]
    for owner in owners:
        bias = owner._parameters.get("bias")
        if isinstance(bias, nn.Parameter) and bias.shape == (head.weight.shape[0],):
            yield bias


def _set_sizes(
    model: PreTrainedModel, fresh: Mapping[int, nn.Parameter], old_size: int, size: int, moved: Mapping[int, int]
) -> None:
    """Sizes and padding rows that modules remember beside their parameters."""
    new = {id(parameter) for parameter in fresh.values()}
    pad = cast(Any, model.config).pad_token_id
    for module in cast(Iterator[Any], model.modules()):
        if isinstance(module, nn.Embedding) and id(module.weight) in new:
            module.num_embeddings = size
        if isinstance(module, nn.Linear) and id(module.weight) in new:
            module.out_features = size
        if getattr(module, "vocab_size", None) == old_size:
            module.vocab_size = size
        if pad is not None and getattr(module, "padding_idx", None) == pad:
            module.padding_idx = moved.get(pad, pad)


def _configurations(model: PreTrainedModel) -> list[Any]:
    """Every configuration object in the model, nested ones too."""
    found: dict[int, PreTrainedConfig] = {}
    waiting = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += list(vars(config).values())
    return list(found.values())


def _move_ids(config: Any, moved: Mapping[int, int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Renumber the ids of special tokens; one that meant no old token becomes the tokenizer's own of this role."""
    for name, value in list(vars(config).items()):
        if value is None or not (name.endswith("_token_id") or name in _ID_LISTS):
            continue
        if isinstance(value, list | tuple):
            setattr(config, name, _moved_list(value, moved))
        else:
            setattr(config, name, moved.get(value, getattr(tokenizer, name, None)))


def _moved_list(ids: Sequence[Any], moved: Mapping[int, int]) -> list[Any]:
    """The ids (or lists of ids) whose tokens are all kept, renumbered."""
    if any(isinstance(item, list | tuple) for item in ids):
        return [_moved_list(item, moved) for item in ids if all(index in moved for index in item)]
    return [moved[index] for index in ids if index in moved]


def _update_report(model: SwcmForConditionalGeneration, fresh: Mapping[int, nn.Parameter], kept: int) -> None:
    """Keep the init report's shapes true, and say what happened to the rows."""
    if model.init_report is None:
        return
    new = {id(parameter) for parameter in fresh.values()}
    changed = {n: p for n, p in model.named_parameters(remove_duplicate=False) if id(p) in new}
    tensors = []
    for tensor in model.init_report.tensors:
        if tensor.name in changed:
            shape = tuple(changed[tensor.name].shape)
            event = f"vocabulary replaced: {kept} of {shape[0]} rows kept"
            tensor = replace(tensor, shape=shape, note=f"{tensor.note}; {event}" if tensor.note else event)
        tensors.append(tensor)
    total = sum(parameter.numel() for parameter in model.parameters())
    model.init_report = replace(model.init_report, tensors=tensors, parameters=total)
