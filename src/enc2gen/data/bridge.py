"""Batches for bridges: two padding ids, and what a frozen encoder says of the sources if it is known already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from enc2gen.data.batching import Batch, collate, length_ordered
from enc2gen.tokenization.examples import EncodedExample

SourceIds = tuple[int, ...]


class SourceStates(Protocol):
    """Where states of sources are kept; :class:`enc2gen.models.bridge.state_cache.FrozenStateCache` is one."""

    def lookup(self, sources: Sequence[SourceIds]) -> dict[str, Tensor]:
        """States of the sources, padded to one batch with zeros, under the name of the model's argument.

        Returns:
            `{"encoder_states": [layers, batch, length, hidden]}`, `{"fused_states": [batch, length, hidden]}`, or
            nothing if a source is not there.
        """
        ...


@dataclass
class BridgeBatch(Batch):
    """A batch whose sources are encoder ids and whose targets are LLM ids.

    Attributes:
        sources: ids of each row without padding.
        states: looked up when the model's inputs are asked for, so that a list of batches stays small.
    """

    sources: tuple[SourceIds, ...] = ()
    states: SourceStates | None = None

    def to(self, device: torch.device | str) -> BridgeBatch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in super().as_model_inputs().items()}
        return replace(self, **moved)

    def as_model_inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of the bridge's `forward`, with the states that are known."""
        inputs = super().as_model_inputs()
        if self.states is not None:
            known = self.states.lookup(self.sources)
            inputs |= {name: tensor.to(self.input_ids.device) for name, tensor in known.items()}
        return inputs


def collate_bridge(
    examples: Sequence[EncodedExample],
    encoder_pad_id: int,
    llm_pad_id: int,
    cache: SourceStates | None = None,
    *,
    order: Sequence[int] = (),
) -> BridgeBatch:
    """Pad examples on the right; everything is masked by position, so padding may share its id with a real token.

    `functools.partial(collate_bridge, llm_pad_id=..., cache=...)` is what `BatchStream(collate=...)` takes.

    Raises:
        DataError: no examples.
    """
    batch = collate(examples, encoder_pad_id, order=order)
    decoder_input_ids = batch.decoder_input_ids.masked_fill(batch.decoder_attention_mask == 0, llm_pad_id)
    return BridgeBatch(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        decoder_input_ids=decoder_input_ids,
        decoder_attention_mask=batch.decoder_attention_mask,
        labels=batch.labels,
        order=batch.order,
        sources=tuple(example.input_ids for example in examples),
        states=cache,
    )


def bridge_evaluation_batches(
    examples: Sequence[EncodedExample],
    encoder_pad_id: int,
    llm_pad_id: int,
    cache: SourceStates | None = None,
    *,
    max_tokens: int | None = 4096,
    max_examples: int | None = None,
) -> list[BridgeBatch]:
    """Batches of all examples, longest first; `order` leads back to the order given.

    Raises:
        DataError: an example alone exceeds `max_tokens`.
    """
    return [
        collate_bridge([examples[i] for i in cut], encoder_pad_id, llm_pad_id, cache, order=cut)
        for cut in length_ordered(examples, max_tokens, max_examples)
    ]
