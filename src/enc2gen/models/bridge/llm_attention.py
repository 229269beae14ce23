"""Reading further keys and values in every self-attention layer of a decoder-only LLM, whose code stays as it is.

Three hooks per layer stand around the layer's own computation: one takes the rotary position embeddings, one takes
the queries that `q_proj` has just made, and one adds what these queries read to the input of `o_proj`. So `W_Q` and
`W_O` run once for both attentions, and the hooks do not depend on how the LLM computes its own (eager, sdpa, ...).

Shapes: `rows` = `sources * rows per source` (beams, or labels that share a source), grouped by source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from enc2gen.errors import ModelError

SUPPORTED = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Model types whose attention is tested: separate projections, rotary queries, the parts named as in Llama."""


def self_attentions(llm: PreTrainedModel) -> list[Any]:
    """The self-attention module of every layer of `llm`, lowest first.

    Raises:
        ModelError: the layout of this LLM's attention is not one of `SUPPORTED`, or the LLM is training with gradient
            checkpointing, which computes a layer again, in the backward pass, when nothing is attached to it any more.
    """
    decoder = llm.get_decoder()
    kind = getattr(getattr(decoder, "config", None), "model_type", type(decoder).__name__)
    if kind not in SUPPORTED:
        raise ModelError(
            f"a layer-wise aligner cannot read the attention of an LLM of type {kind!r}",
            where="aligner",
            remedy=f"use an LLM of type {', '.join(SUPPORTED)}, or a bridge without aligner",
        )
    layers: Any = decoder.layers
    if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers):
        raise ModelError(
            "gradient checkpointing of the LLM does not work with a layer-wise aligner",
            where="aligner",
            remedy="switch it off: llm.gradient_checkpointing_disable()",
        )
    return [layer.self_attn for layer in layers]


def project_keys_values(attention: Any, keys: Tensor, values: Tensor) -> Tensor:
    """Pass `keys` and `values` `[batch, length, llm_hidden]` through `W_K` and `W_V` of `attention`.

    The keys get no rotary embedding (as published: encoder tokens have no position in the LLM's text), but the
    normalisation that this LLM gives all its keys (Qwen 3, Gemma 3), since its queries are normalised too.

    Returns:
        `[batch, 2, key_value_heads, length, head_dim]`.
    """
    heads = (*keys.shape[:-1], -1, attention.head_dim)
    projected_keys = attention.k_proj(keys).view(heads)
    if hasattr(attention, "k_norm"):
        projected_keys = attention.k_norm(projected_keys)
    projected_values = attention.v_proj(values).view(heads)
    return torch.stack((projected_keys, projected_values), dim=1).transpose(2, 3)


class LayerReader:
    """Adds `gate * attention(queries of this layer, keys, values)` to one self-attention layer while attached.

    Args:
        attention: the layer's self-attention module.
        gate: scalar.
        keys_values: `[sources, 2, key_value_heads, length, head_dim]`, from `project_keys_values`.
        mask: `[sources, length]`, true where a token is real.
    """

    def __init__(self, attention: Any, gate: Tensor, keys_values: Tensor, mask: Tensor) -> None:
        self.attention = attention
        self.gate = gate
        self.keys, self.values = keys_values.unbind(1)
        self.mask = mask[:, None, None, :]
        self.rotation: tuple[Tensor, Tensor] | None = None
        self.read: Tensor | None = None

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks; removing the returned handles undoes it."""
        return [
            self.attention.register_forward_pre_hook(self._take_rotation, with_kwargs=True),
            self.attention.q_proj.register_forward_hook(self._take_queries),
            self.attention.o_proj.register_forward_pre_hook(self._add),
        ]

    def _take_rotation(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.rotation = kwargs["position_embeddings"] if getattr(module, "use_rope", True) else None

    def _take_queries(self, module: nn.Module, args: tuple[Any, ...], queries: Tensor) -> None:
        self.read = self.attend(queries)

    def _add(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self.read is not None, "o_proj ran before q_proj"
        read, self.read, self.rotation = self.read, None, None
        # The product in float32: the gate is trained from zero and its first values are small.
        return (args[0] + (self.gate * read.float()).to(args[0].dtype), *args[1:])

    def attend(self, queries: Tensor) -> Tensor:
        """What `queries` `[rows, length, heads * head_dim]` read, in the same shape, before gate and `W_O`."""
        attention = self.attention
        rows, length, _ = queries.shape
        sources, key_value_heads, _, head_dim = self.keys.shape
        if rows % sources:
            raise ModelError(
                f"{rows} rows of the LLM's input cannot be grouped by {sources} sources",
                where="aligner",
                remedy="give one source per row, or rows grouped by source, the same number for each",
            )
        queries = queries.view(rows, length, -1, head_dim)
        if hasattr(attention, "q_norm"):
            queries = attention.q_norm(queries)
        queries = queries.transpose(1, 2)
        if self.rotation is not None:
            queries = rotate(queries, *self.rotation)
        # Rows of one source and query heads of one key head share keys: they are further queries, not further keys.
        queries = queries.reshape(sources, rows // sources, key_value_heads, -1, length, head_dim).transpose(1, 2)
        shape = queries.shape
        keys, values = self.keys.to(queries.dtype), self.values.to(queries.dtype)
        scores = queries.reshape(sources, key_value_heads, -1, head_dim) @ keys.transpose(2, 3) * attention.scaling
        softcap = getattr(attention, "attn_logit_softcapping", None)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.float().masked_fill(~self.mask, torch.finfo(torch.float32).min)
        weights = scores.softmax(dim=-1).to(queries.dtype)
        weights = functional.dropout(weights, attention.attention_dropout, training=attention.training)
        return (weights @ values).view(shape).permute(0, 2, 4, 1, 3, 5).reshape(rows, length, -1)


def rotate(queries: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of `[rows, heads, length, head_dim]`, halves paired.

    `cosine` and `sine` are `[rows or 1, length, head_dim]`, as transformers hands them to the layers.
    """
    first, second = queries.chunk(2, dim=-1)
    return queries * cosine[:, None] + torch.cat((-second, first), dim=-1) * sine[:, None]
