"""Attention with dropout (arXiv 1706.03762, section 3.2.1) that is quick in training on CPUs.

torch has no fused kernel for dropout there: it converts bfloat16 to float32, draws one Bernoulli number an element and
keeps several copies of the weights. Here products stay in their precision, the softmax is taken in float32 of a few
texts at a time, which stay in the cache, and what is kept for the backward pass are the weights and two bytes an
element. Short sequences gain without dropout, too: the fused kernel is made for long ones.

Shapes: B batch, A heads, K heads of keys and values, T target length, S source length, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from enc2gen.errors import ModelError
from enc2gen.models.dropout import drawn_mask, masked
from enc2gen.models.padding_free import SequencePair

NAME = "sdpa_training"
"""Name of this implementation in transformers; outside training on a CPU it is "sdpa"."""

_SHORT = 256 * 256  # positions times positions up to which it is taken without dropout, too (measured: half the time)


_CACHED = 2**18  # scores turned into weights at once, 1 MB in float32 (our choice: a core's own cache)


def _attention_weights(queries: Tensor, keys: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """softmax(Q K^T) where `mask`, `[B or 1, 1 or A, T, S]` or `[T, S]`, is True: `[B * A, T, S]`.

    Queries and keys are `[B * A, T or S, D]`.
    """
    weights = torch.bmm(queries, keys.transpose(1, 2))
    work = torch.promote_types(weights.dtype, torch.float32)
    if mask is not None:
        hidden = torch.zeros(mask.shape, dtype=work).masked_fill_(~mask, torch.finfo(work).min)
        shared = hidden.dim() == 2 or hidden.shape[0] == 1  # by all texts
    texts = max(1, _CACHED // max(1, weights[:heads].numel()))
    for part in weights.view(-1, heads, *weights.shape[1:]).split(texts):
        scores = part.to(work, copy=True)
        if mask is not None:
            scores += hidden if shared else hidden[: len(part)]
            hidden = hidden if shared else hidden[len(part) :]
        part.copy_(torch.softmax(scores, dim=-1))
    return weights


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float, scaling: float
    ) -> Tensor:
        queries, keys, values = (states.flatten(0, 1) for states in (query * scaling, key, value))
        with torch.autocast("cpu", enabled=False):
            weights = _attention_weights(queries, keys, mask, query.shape[1])
            keep, scale = drawn_mask(weights, rate)
            output = torch.bmm(weights if keep is None else masked(weights, keep), values).mul_(scale)
        ctx.save_for_backward(queries, keys, values, weights, keep)
        ctx.shapes, ctx.scales = (query.shape, key.shape, value.shape), (scaling, scale)
        return output.view(query.shape[:3] + value.shape[3:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, weights, keep = ctx.saved_tensors
        scaling, scale = ctx.scales
        gradient = gradient.flatten(0, 1) * scale
        of_weights = torch.bmm(gradient, values.transpose(1, 2))
        if keep is not None:
            of_weights = masked(of_weights, keep)
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_queries = torch.bmm(of_scores, keys).mul_(scaling)
        of_keys = torch.bmm(of_scores.transpose(1, 2), queries)
        kept = weights if keep is None else masked(weights, keep)
        of_values = torch.bmm(kept.transpose(1, 2), gradient)
        found = (of_queries, of_keys, of_values)
        return (*(grad.view(shape) for grad, shape in zip(found, ctx.shapes, strict=True)), None, None, None)


@torch.compiler.disable  # compiled, it is slower, and torch 2.13 gets the views wrong
def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float
) -> Tensor:
    return cast(Tensor, _Attention.apply(query, key, value, mask, dropout, scaling))


def training_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sequence_pair: SequencePair | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(Q K^T / sqrt(D)) V with dropout of the weights; transformers' "sdpa" wherever this is not quicker.

    A position that may see nothing sees everything equally, as in transformers' eager attention.

    Args:
        query: `[B, A, T, D]`; key, value: `[B, K, S, D]`, each head serving A / K neighbouring query heads;
            attention_mask: True where a position is seen, `[B, 1, T, S]`.
        dropout: of the weights; 0 outside training.
        scaling: 1 / sqrt(D) by default.
        is_causal: without a mask, whether a position sees those up to itself only; `module.is_causal` by default.
        sequence_pair: queries, keys and values are the tokens of these in one row, B = 1; there is no other mask.

    Returns:
        Output `[B, T, A, D]`, and no weights.
    """
    if sequence_pair is not None:
        joined, limits = (query, key, value), (dropout, scaling)
        return _apart(sequence_pair, module, joined, limits, _causal(module, is_causal), options), None
    lengths = query.shape[2], key.shape[2]
    causal = attention_mask is None and _causal(module, is_causal)
    usable = (
        module.training
        and query.device.type == "cpu"
        and (0 < dropout < 1 or (dropout == 0 and lengths[0] * lengths[1] <= _SHORT))
        and (attention_mask is None or attention_mask.dtype is torch.bool)
        and not (causal and lengths[0] != lengths[1])
        and all(options.get(name) is None for name in ("position_bias", "cache", "softcap"))
    )
    if not usable:
        options |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if causal:
        attention_mask = torch.ones(lengths, dtype=torch.bool).tril()
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _attention(query, key, value, attention_mask, dropout, scaling)
    return output.transpose(1, 2).contiguous(), None


def _causal(module: nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _apart(
    pair: SequencePair,
    module: nn.Module,
    joined: tuple[Tensor, Tensor, Tensor],
    limits: tuple[float, float | None],
    causal: bool,
    options: Mapping[str, Any],
) -> Tensor:
    """Attention within each sequence of `joined` queries, keys and values, `[1, A or K, N, D]`: `[1, N, A, D]`."""
    query, key, value = (
        sequences.split(states.transpose(1, 2)).transpose(1, 2)
        for sequences, states in zip((pair.queries, pair.keys, pair.keys), joined, strict=True)
    )
    window = options.get("sliding_window")
    # padding behind a text is never seen by what stands before it: no mask is needed, and kernels know this case
    plain = causal and window is None and pair.queries is pair.keys and pair.queries.on_the_right
    mask = None if plain else pair.mask(causal=causal, window=window)
    output, _ = training_attention(module, query, key, value, mask, *limits, is_causal=plain, **options)
    return pair.queries.join(output)


def separates_sequences(model: nn.Module) -> bool:
    """Whether every part of `model` has an attention implementation that `sequence_options` knows."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return all(_separates(part.config._attn_implementation) for part in parts)


def _separates(implementation: str | None) -> bool:
    return implementation == NAME or is_flash_attention_requested(requested_attention_implementation=implementation)


def sequence_options(pair: SequencePair, implementation: str | None) -> Mapping[str, Any]:
    """Keyword arguments by which an attention implementation of transformers keeps sequences without padding apart.

    Raises:
        ModelError: `implementation` cannot.
    """
    if implementation == NAME:
        return {"sequence_pair": pair}
    if _separates(implementation):
        sides = pair.queries, pair.keys
        limits = [F.pad(sequences.lengths.cumsum(0), (1, 0)).int() for sequences in sides]
        longest = [int(sequences.lengths.max()) for sequences in sides]
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return dict(zip(names, (*limits, *longest), strict=True))
    raise ModelError(
        f"attention {implementation!r} cannot keep sequences without padding apart",
        where="training.padding_free",
        remedy="load the model with attn_implementation sdpa or flash_attention_2, or switch padding_free off",
    )


ALL_ATTENTION_FUNCTIONS.register(NAME, training_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def use_training_attention(model: PreTrainedModel) -> None:
    """Let every part of `model` that computes attention by transformers' "sdpa" do so by this."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._supports_attention_backend:
            config: Any = module.config
            if config._attn_implementation == "sdpa":
                config._attn_implementation = NAME
