"""The target side of a bridge: what the LLM reads, `[BOS][prefix][end vector][prompt and target tokens]`.

The padding of a shorter prefix or prompt would stand in the middle of that. Position ids can skip it, but much in LLMs
counts places and not positions (sliding windows, local attention, ALiBi, convolutions), so that a text would be read
otherwise in a batch than alone. Therefore each row's padding comes first.

Shapes: B batch, P prefix length, T decoder positions so far, N of them new, D LLM embedding size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from enc2gen.errors import ModelError
from enc2gen.models.bridge.reader import BridgeEncoderOutput


@dataclass(frozen=True)
class LlmInputs:
    """What one call of the LLM reads.

    Attributes:
        inputs_embeds: `[B, new, D]`: all on the first call, later only what is new.
        attention_mask: `[B, all]`, what was read before included, padding in front of each row first.
        position_ids: `[B, new]`, counted over real positions only, so that padding changes nothing.
        written: how many of the last new positions are decoder positions.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    written: int

    def arguments(self, llm: PreTrainedModel) -> dict[str, Tensor]:
        """Keyword arguments of `llm`; models without explicit positions derive them from the mask."""
        inputs = {"inputs_embeds": self.inputs_embeds, "attention_mask": self.attention_mask}
        return inputs | ({"position_ids": self.position_ids} if accepts(llm, "position_ids") else {})


@cache
def _arguments(model_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether `forward` of `model` names this argument."""
    return argument in _arguments(cast(Any, type(model)))


def llm_inputs(
    llm: PreTrainedModel,
    read: BridgeEncoderOutput,
    decoder_input_ids: Tensor,
    decoder_attention_mask: Tensor | None,
    *,
    end_vector: Tensor,
    bos_token_id: int | None,
    past_length: int = 0,
) -> LlmInputs:
    """Assemble what the LLM reads.

    The first real position of each row of `decoder_input_ids` is the start: the learned end vector stands there, found
    by place and not by id, because a prompt may hold the same token.

    Args:
        llm: gives word embeddings and the longest input.
        read: prefix and its mask.
        decoder_input_ids: `[B, N]`: all on the first call, the new ones later.
        decoder_attention_mask: `[B, T]` (or `[B, N]` on the first call, the same then); `None`: all real.
        end_vector: `[D]`.
        bos_token_id: read before the prefix; `None` for nothing.
        past_length: positions in the cache.

    Raises:
        ModelError: a mask that does not fit, or more positions than the LLM has.
    """
    prefix, prefix_mask = cast(Tensor, read.last_hidden_state), cast(Tensor, read.prefix_mask)
    rows, new = decoder_input_ids.shape
    lead = prefix.shape[1] + (bos_token_id is not None)
    total = new if past_length == 0 else past_length - lead + new
    mask = decoder_attention_mask
    if mask is None:
        mask = torch.ones((rows, total), dtype=torch.long, device=decoder_input_ids.device)
    if mask.shape != (rows, total) or prefix.shape[0] != rows:
        raise ModelError(
            f"{prefix.shape[0]} sources, decoder ids for {rows} rows and {total} positions, and a mask of "
            f"{tuple(mask.shape)} do not belong together",
            where="decoder_attention_mask",
            remedy="the mask covers all decoder positions, those in the cache too, and not the prefix",
        )
    _check_length(llm, lead + total)
    mask = mask.to(prefix_mask.dtype)
    words = llm.get_input_embeddings()(decoder_input_ids)
    start = ((mask.cumsum(1) == 1) & (mask != 0))[:, -new:]
    embeds = torch.where(start[..., None], end_vector.to(words.dtype), words)
    has_bos = bos_token_id is not None
    whole = read_mask(prefix_mask, mask, has_bos=has_bos)
    if past_length == 0:
        parts = [prefix.to(words.dtype), embeds]
        if bos_token_id is not None:
            token = torch.full((rows, 1), bos_token_id, dtype=torch.long, device=words.device)
            parts.insert(0, llm.get_input_embeddings()(token))
        embeds = torch.cat(parts, dim=1)
        _, leading = _in_given_order(prefix_mask, mask, has_bos)
        order = (~leading).long().argsort(dim=1, stable=True)
        embeds = embeds.gather(1, order[..., None].expand_as(embeds))
    positions = (whole.long().cumsum(1) - 1).clamp_min(0)[:, -embeds.shape[1] :]
    return LlmInputs(embeds, whole, positions, new)


def read_mask(prefix_mask: Tensor, decoder_mask: Tensor, *, has_bos: bool) -> Tensor:
    """The mask of all that the LLM has read, in the order in which it has read it and its cache holds it.

    Args:
        prefix_mask: `[B, P]`; decoder_mask: `[B, T]`, of the same type.
        has_bos: whether the LLM reads its BOS before the prefix.

    Returns:
        `[B, P + T]`, or one more with BOS: padding of prefix and left padding of the decoder first, in each row.
    """
    real, leading = _in_given_order(prefix_mask, decoder_mask, has_bos)
    places = torch.arange(real.shape[1], device=real.device)
    # Leading padding makes room where it stood; what follows the first decoder token has not moved.
    return ((places >= leading.sum(1, keepdim=True)) & (real | leading)).to(prefix_mask.dtype)


def _in_given_order(prefix_mask: Tensor, decoder_mask: Tensor, has_bos: bool) -> tuple[Tensor, Tensor]:
    """What is real, and what is padding before the row's first decoder token, in the order BOS, prefix, decoder."""
    real = torch.cat([prefix_mask != 0, decoder_mask != 0], dim=1)
    real = nn.functional.pad(real, (1, 0), value=True) if has_bos else real
    first = real.shape[1] - decoder_mask.shape[1] + (decoder_mask != 0).long().argmax(1, keepdim=True)
    return real, ~real & (torch.arange(real.shape[1], device=real.device) < first)


def _check_length(llm: PreTrainedModel, length: int) -> None:
    limit = getattr(llm.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length > limit > 0:
        raise ModelError(
            f"prefix, prompt and target are {length} positions long, but the LLM has {limit}",
            where="decoder_input_ids",
            remedy="shorten sources (max_source_length), prompt or max_new_tokens",
        )


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


@contextmanager
def contiguous_head_input(llm: PreTrainedModel) -> Iterator[None]:
    """Within this context the LM head reads contiguous states.

    The states behind the prefix are a slice, and a matrix product in bfloat16 with one is far slower on CPUs.
    """
    head = llm.get_output_embeddings()
    handle = cast(nn.Module, head).register_forward_pre_hook(_contiguous)
    try:
        yield
    finally:
        handle.remove()
