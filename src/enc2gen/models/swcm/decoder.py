"""The grown decoder (arXiv 2502.10852, section 3).

Shapes: B batch, S source length, T target length, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, sliding_window_overlay
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.logging import get_logger

from enc2gen.errors import ModelError
from enc2gen.models.padding_free import SequencePair, Sequences
from enc2gen.models.swcm.attention import Rotation, rotation_at
from enc2gen.models.swcm.configuration import SwcmConfig
from enc2gen.models.swcm.layers import CustomDecoderLayer, DecoderLayer, NormalDecoderLayer
from enc2gen.models.swcm.norms import build_norm
from enc2gen.models.training_attention import sequence_options

_LOG: Any = get_logger(__name__)


class SwcmPreTrainedModel(PreTrainedModel):
    """What all modules with XLM-SWCM weights share."""

    config_class = SwcmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CustomDecoderLayer", "NormalDecoderLayer"]  # noqa: RUF012 as transformers declares it
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @staticmethod
    def create_masks_for_generate(config: Any, inputs_embeds: Any, attention_mask: Tensor | None, **_: Any) -> Any:
        """The padding mask `[B, T]` as it is: what transformers' `generate` hands the decoder for a static cache.

        transformers would make one causal mask for all layers of it. Of that the decoder could not tell where padding
        is, which it counts positions by, and layers with a sliding window would see everything.
        """
        return attention_mask


class SwcmDecoder(SwcmPreTrainedModel):
    """The grown decoder: embeddings as in the encoder, then custom and normal layers as planned."""

    def __init__(self, config: SwcmConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        rows = config.max_position_embeddings
        self.embed_positions = nn.Embedding(rows, hidden) if config.learned_positions else None
        self.embed_types = nn.Embedding(config.type_vocab_size, hidden) if config.type_vocab_size else None
        self.embed_norm = build_norm(config) if config.embed_norm else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        kinds: dict[str, type[DecoderLayer]] = {"custom": CustomDecoderLayer, "normal": NormalDecoderLayer}
        self.layers = nn.ModuleList(kinds[plan.kind](config, index, plan) for index, plan in enumerate(config.plan))
        self.final_norm = build_norm(config) if config.norm_order == "pre" else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embedding table, `[V, H]`."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding table."""
        self.embed_tokens = cast(nn.Embedding, value)

    def _positions(self, mask: Tensor | None, batch: int, length: int, past: int, device: torch.device) -> Tensor:
        """Positions, as rows of the position table where there is one, `[B, T]`.

        They are explicit, so that cached and uncached decoding agree: transformers' XLM-R derives positions from the
        ids and miscounts when the first token is padding.
        """
        if mask is not None and mask.dim() == 2:
            positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
        else:
            positions = torch.arange(past, past + length, device=device).expand(batch, -1)
        return positions + self.config.position_offset

    def _check_length(self, length: int) -> None:
        limit = self.config.max_position_embeddings - self.config.position_offset
        if length > limit:
            raise ModelError(
                f"the target is {length} tokens long, but the model has positions for {limit}",
                where="decoder_input_ids",
                remedy=f"cut targets (or max_new_tokens) to {limit} tokens",
            )

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, positions: Tensor) -> Tensor:
        """Word (+ position, + first type) embeddings, normed where the encoder norms them: `[B, T, H]`."""
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embed_positions is not None:
            states = states + self.embed_positions(positions)
        if self.embed_types is not None:
            states = states + self.embed_types.weight[0]
        if self.embed_norm is not None:
            states = self.embed_norm(states)
        return self.dropout(states)

    def _decoder_layers(self) -> Iterable[DecoderLayer]:
        return cast(Iterable[DecoderLayer], self.layers)

    def _rotations(self, positions: Tensor) -> dict[float | None, Rotation | None]:
        """Rotary angles at `positions` `[B, T]`, for each base that a layer uses; none for layers without."""
        head_dim = self.config.head_dim or self.config.hidden_size // self.config.num_attention_heads
        bases = {layer.rope_theta for layer in self._decoder_layers()}
        return {base: None if base is None else rotation_at(positions, base, head_dim) for base in bases}

    def _self_masks(
        self, states: Tensor, attention_mask: Tensor | None, cache: EncoderDecoderCache | None
    ) -> dict[int | None, Any]:
        """Causal masks in the attention implementation's form: for each sliding window, and for layers without."""
        windows = {layer.sliding_window for layer in self._decoder_layers()}
        return {
            window: create_causal_mask(
                config=self.config,
                inputs_embeds=states,
                attention_mask=attention_mask,
                past_key_values=cache.self_attention_cache if cache is not None else None,
                and_mask_function=None if window is None else sliding_window_overlay(window),
            )
            for window in windows
        }

    def _options(self, sequences: tuple[Sequences, Sequences] | None) -> Mapping[str, Mapping[str, Any]]:
        if sequences is None:
            return {}
        targets, sources = sequences
        pairs = {"self_attention": SequencePair(targets, targets), "cross_attention": SequencePair(targets, sources)}
        return {name: sequence_options(pair, self.config._attn_implementation) for name, pair in pairs.items()}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        sequences: tuple[Sequences, Sequences] | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decode `input_ids` `[B, T]` against `encoder_hidden_states` `[B, S, H]`.

        Args:
            attention_mask: `[B, past + T]`, 1 for real tokens.
            encoder_attention_mask: `[B, S]`, 1 for real tokens.
            position_ids: `[B, T]`, rows of the position table (rotary: from 0); by default counted from the mask or
                the cache.
            sequences: targets and sources, whose tokens `input_ids` and `encoder_hidden_states` then are in one row
                each, `[1, N]` and `[1, M, H]`, without cache.

        Returns:
            `last_hidden_state` `[B, T, H]`; hidden states and attentions of every layer where asked for.

        Raises:
            ModelError: the target is longer than the model's positions.
        """
        if (input_ids is None) == (inputs_embeds is None) or encoder_hidden_states is None:
            raise ModelError("the decoder needs encoder states and either input_ids or inputs_embeds")
        shape = input_ids.shape if input_ids is not None else cast(Tensor, inputs_embeds).shape[:-1]
        if self.gradient_checkpointing and self.training and (use_cache or past_key_values is not None):
            # A layer that is computed again would find its own keys and values there, without their gradients.
            _LOG.warning_once("gradient checkpointing works without a cache of keys and values only: use_cache=False")
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        self._check_length(int(past) + shape[1] if sequences is None else sequences[0].mask.shape[1])
        if sequences is not None:
            position_ids = sequences[0].positions + self.config.position_offset
        elif position_ids is None:
            position_ids = self._positions(attention_mask, shape[0], shape[1], past, encoder_hidden_states.device)
        states = self.embed(input_ids, inputs_embeds, position_ids)
        rotations = self._rotations(position_ids)
        options, self_masks, cross_mask = self._options(sequences), {}, None
        if sequences is None:
            self_masks = self._self_masks(states, attention_mask, past_key_values)
            cross_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=states,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        all_states, self_weights, cross_weights = [states], [], []
        for layer in self._decoder_layers():
            masks, rotation = (self_masks.get(layer.sliding_window), cross_mask), rotations[layer.rope_theta]
            states, own, cross = layer(states, encoder_hidden_states, *masks, past_key_values, rotation, options)
            all_states.append(states)
            self_weights.append(own)
            cross_weights.append(cross)
        if self.final_norm is not None:
            states = self.final_norm(states)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(all_states) if output_hidden_states else None,
            attentions=tuple(self_weights) if output_attentions else None,
            cross_attentions=tuple(cross_weights) if output_attentions else None,
        )
