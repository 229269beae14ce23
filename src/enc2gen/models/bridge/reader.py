"""The source side of a bridge: encoder, fusion and mapper, from source ids to the soft prefix the LLM reads.

Shapes: B batch, T source length, H encoder size, L fused layers, P prefix length, D LLM embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from enc2gen.encoders.reading import encoder_facts
from enc2gen.errors import DataError, ModelError

if TYPE_CHECKING:
    from enc2gen.models.bridge.modeling import BridgeForConditionalGeneration


@dataclass
class BridgeEncoderOutput(ModelOutput):
    """What the LLM reads of the sources. The batch comes first everywhere, so `generate` can repeat rows for beams.

    Attributes:
        last_hidden_state: soft prefix, `[B, P, D]`.
        prefix_mask: `[B, P]`, 1 for real prefix positions.
        source_mask: `[B, T]`, 1 for real source tokens.
        aligner_keys_values: what the aligner's cross-attention reads; `None` without an aligner.
    """

    last_hidden_state: Tensor | None = None
    prefix_mask: Tensor | None = None
    source_mask: Tensor | None = None
    aligner_keys_values: Tensor | None = None


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of `module` learns."""
    return not any(parameter.requires_grad for parameter in module.parameters())


class BridgeReader(nn.Module):
    """Encoder, fusion, mapper and aligner of a bridge, called as one. Built on the fly, without own weights."""

    main_input_name = "input_ids"

    def __init__(self, bridge: BridgeForConditionalGeneration) -> None:
        super().__init__()
        self.encoder, self.states, self.fusion = bridge.encoder, bridge.states, bridge.fusion
        self.mapper, self.aligner, self.llm = bridge.mapper, bridge.aligner, bridge.llm
        self.pad_token_id = bridge.config.encoder_pad_token_id
        self.name = bridge.config.encoder_name or type(bridge.encoder).__name__

    def mask(self, input_ids: Tensor | None, attention_mask: Tensor | None, like: Tensor | None = None) -> Tensor:
        """The source mask `[B, T]`: as given, else 1 on everything but the encoder's pad tokens.

        Raises:
            ModelError: nothing to make a mask from, or one of the wrong shape.
            DataError: a row without a token.
        """
        if attention_mask is None:
            if input_ids is not None:
                pads = input_ids == self.pad_token_id if self.pad_token_id is not None else input_ids < 0
                attention_mask = (~pads).long()
            elif like is not None:
                attention_mask = torch.ones(like.shape[-3:-1], dtype=torch.long, device=like.device)
            else:
                raise ModelError("no source: give input_ids, fused_states, encoder_states or encoder_outputs")
        shape = input_ids.shape if input_ids is not None else (like.shape[-3:-1] if like is not None else None)
        if shape is not None and attention_mask.shape != shape:
            raise ModelError(
                f"the mask is {tuple(attention_mask.shape)}, the sources {tuple(shape)}", where="attention_mask"
            )
        if attention_mask.shape[1] == 0 or not bool(attention_mask.any(dim=1).all()):
            raise DataError(
                "a source has no token",
                where="input_ids",
                remedy="leave such rows out, or add the encoder's special tokens, as BridgeProcessor does",
            )
        return attention_mask

    def encode_raw(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Hidden states of the encoder, embedding output first: `layers + 1` tensors `[B, T, H]`.

        A frozen encoder runs without gradients.

        Raises:
            ModelError: a source is longer than the encoder's positions.
            DataError: a row without a token.
        """
        limit = encoder_facts(self.encoder).max_positions
        if limit is not None and input_ids.shape[1] > limit:
            raise ModelError(
                f"a source is {input_ids.shape[1]} tokens long, but the encoder has positions for {limit}",
                where=self.name,
                remedy=f"truncate sources to {limit} tokens (BridgeProcessor does), or split them into sentences",
            )
        mask = self.mask(input_ids, attention_mask)
        context: AbstractContextManager[Any] = torch.no_grad() if is_frozen(self.encoder) else nullcontext()
        with context:
            output = self.encoder(input_ids=input_ids, attention_mask=mask, output_hidden_states=True, return_dict=True)
        return cast("tuple[Tensor, ...]", output.hidden_states)

    def stack(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """The layers that are fused, normalised as configured: `[L, B, T, H]`."""
        context: AbstractContextManager[Any] = torch.no_grad() if is_frozen(self.encoder) else nullcontext()
        with context:
            return self.states(tuple(hidden_states), encoder_facts(self.encoder).final_norm)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_states: Tensor | None = None,
        aligner_states: Tensor | None = None,
        fused_states: Tensor | None = None,
        **_: Any,
    ) -> BridgeEncoderOutput:
        """From sources, or from what was computed of them before, to the prefix.

        Args:
            input_ids: `[B, T]`, encoder ids; not needed where the states are given.
            attention_mask: `[B, T]`.
            encoder_states: `[L, B, T, H]`, what `encode` returned.
            aligner_states: `[layers, B, T, H]`: raw states with the embedding output, without the last layer.
            fused_states: `[B, T, H]`, what the fusion returned.

        Raises:
            ModelError, DataError: as `encode_raw`; states that lack what the aligner reads.
        """
        given = fused_states if fused_states is not None else encoder_states
        mask = self.mask(input_ids, attention_mask, like=given)
        wants_aligner_states = self.aligner is not None and aligner_states is None
        if given is None and input_ids is not None:
            raw = self.encode_raw(input_ids, mask)
            encoder_states = self.stack(raw)
            if wants_aligner_states:
                aligner_states = torch.stack(raw[:-1])
        elif wants_aligner_states:
            raise ModelError(
                "the aligner needs the encoder's raw states",
                where="aligner_states",
                remedy="pass aligner_states=torch.stack(model.encode_raw(input_ids, attention_mask)[:-1])",
            )
        if fused_states is None:
            fused_states = self.fusion(cast(Tensor, encoder_states), mask)
        prefix, prefix_mask = self.mapper(fused_states, mask)
        keys_values = (
            None if self.aligner is None else self.aligner.keys_values(cast(Tensor, aligner_states), mask, self.llm)
        )
        return BridgeEncoderOutput(prefix, prefix_mask, mask, keys_values)
