"""What decoding starts from: the start token, a prompt per row, padded on the left, and an empty cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from enc2gen.errors import ModelError
from enc2gen.models.bridge.configuration import BridgeConfig
from enc2gen.tokenization.bridge_codec import SOURCE

if TYPE_CHECKING:
    from enc2gen.models.bridge.modeling import BridgeForConditionalGeneration


def decoder_start(model: BridgeForConditionalGeneration, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` with decoder ids that all begin, behind their left padding, with the start.

    Without `decoder_input_ids` the model's own prompt is read. Given ones are prompts with or without the start before
    them; those of different length are padded on the left and need a `decoder_attention_mask`.

    Raises:
        ModelError: padding on the right, rows with and without start, the model's prompt needs the source text or the
            tokenizer, or a cache that has no room for the prefix.
    """
    settings: GenerationConfig = arguments.get("generation_config") or model.generation_config
    kind = arguments.get("cache_implementation", settings.cache_implementation)
    if kind not in (None, "dynamic", "offloaded"):
        raise ModelError(
            f"a bridge cannot use the cache {kind!r}", where="cache_implementation", remedy='use "dynamic"'
        )
    cached = arguments.get("use_cache", settings.use_cache) is not False
    if kind is None and cached and arguments.get("past_key_values") is None:
        # transformers makes a pair, for self- and cross-attention, and cannot where layers have no attention (LFM2).
        arguments = arguments | {"past_key_values": DynamicCache(config=model.config.get_text_config(decoder=True))}
    ids, mask = arguments.pop("decoder_input_ids", None), arguments.pop("decoder_attention_mask", None)
    if ids is None:
        if not model.config.prompt:
            return arguments
        read = arguments["encoder_outputs"].last_hidden_state
        ids, mask = _own_prompt(model).to(read.device).repeat(read.shape[0], 1), None
    mask = torch.ones_like(ids) if mask is None else mask
    given = (arguments.get("decoder_start_token_id"), settings.decoder_start_token_id)
    start = next(value for value in (*given, model.config.decoder_start_token_id) if value is not None)
    ids, mask = _begun(ids, mask, int(cast(int, start)))
    return arguments | {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def ids_from_labels(labels: Tensor | None, config: BridgeConfig) -> Tensor:
    """Decoder ids `[B, T]` for labels without a prompt: shifted right behind the start.

    Raises:
        ModelError: no labels, or labels that leave out a prompt.
    """
    if labels is None:
        raise ModelError("no target: give decoder_input_ids or labels", where="decoder_input_ids")
    if bool(((labels[:, :-1] == -100) & (labels[:, 1:] != -100)).any()):
        raise ModelError(
            "the prompt's ids cannot be made from labels", where="labels", remedy="pass decoder_input_ids too"
        )
    shifted = labels.new_full(labels.shape, cast(int, config.decoder_start_token_id))
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == -100, cast(int, config.pad_token_id))


def _own_prompt(model: BridgeForConditionalGeneration) -> Tensor:
    """`[1, T]`: start and the model's prompt."""
    if SOURCE in model.config.prompt or model.processor is None:
        raise ModelError(
            "the model has a prompt, but no tokenizer"
            if model.processor is None
            else "the model's prompt needs the source text",
            where="decoder_input_ids",
            remedy="pass all that processor(texts) returns, decoder_input_ids too",
        )
    return torch.tensor(model.processor.codec.encode_prompts([""]))


def _begun(ids: Tensor, mask: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The ids and their mask with one start per row, and no column of padding alone."""
    if ids.shape != mask.shape or not bool((mask[:, -1] != 0).all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ModelError(
            "decoder_input_ids must be padded on the left, with a decoder_attention_mask of their shape",
            where="decoder_attention_mask",
            remedy="processor(texts) pads prompts this way",
        )
    first = mask.argmax(1)
    begins = ids.gather(1, first[:, None])[:, 0] == start
    if bool(begins.all()):
        least = int(first.min())
        return ids[:, least:], mask[:, least:]
    if bool(begins.any()):
        raise ModelError(
            f"some rows begin with the start token {start} and some do not",
            where="decoder_input_ids",
            remedy="put the start token before every prompt",
        )
    begin, real = torch.full_like(ids[:, :1], start), torch.ones_like(mask[:, :1])
    return torch.cat([begin, ids], dim=1), torch.cat([real, mask], dim=1)
