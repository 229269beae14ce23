"""LayAlign's layer-wise aligner: every LLM layer reads the layers of the encoder (arXiv 2502.11405, section 3).

Each LLM layer i gets keys and values from ALL encoder layers (Equation 1), and a gate, zero at the start, admits
what the layer's queries read there (Equation 2):

    (K_i, V_i) = f_i(H_0, ..., H_{n-1})        GA(T) = SA(T) + g_i CA(T, K_i, V_i)

CA uses the frozen W_Q, W_K, W_V and W_O of the layer's self-attention SA. Queries keep their rotary positions,
encoder keys have none. Unlike the published code, padding of the encoder's input is masked in CA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from enc2gen.errors import ModelError
from enc2gen.models.bridge.llm_attention import LayerReader, project_keys_values, self_attentions
from enc2gen.models.bridge.options import checked_options
from enc2gen.models.seeding import seeded


class AlignerConfig(BaseModel):
    """Shape of the map from encoder layers to the keys and values of LLM layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    structure: Literal["linear", "mlp"] = Field(
        default="linear",
        description="map from the mixed encoder layers to the LLM's width: one linear map, as published, or two with "
        "a ReLU between them",
    )


class LayerwiseAligner(nn.Module):
    """Keys and values for every LLM layer from all encoder layers, with one gate per LLM layer.

    `fc1` (over the axis of layers, `num_layers -> 2 * llm_layers`) and `fc2` (`encoder_size -> llm_size`) are shared
    by all LLM layers: rows 2i and 2i + 1 of `fc1` are the mixtures that become keys and values of LLM layer i.

    Args:
        config: structure.
        num_layers: encoder layers read; the embedding output counts, the last layer is left out (it is the prefix).
        encoder_size: width of the encoder's states.
        llm_layers: layers of the LLM.
        llm_size: width of the LLM's states.
        seed: seed of the initial weights.
    """

    def __init__(
        self,
        config: AlignerConfig,
        *,
        num_layers: int,
        encoder_size: int,
        llm_layers: int,
        llm_size: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_layers = num_layers
        self.encoder_size = encoder_size
        self.llm_layers = llm_layers
        with seeded(seed):
            self.fc1 = nn.Linear(num_layers, 2 * llm_layers)
            self.fc2 = nn.Linear(encoder_size, llm_size)
            self.fc3 = nn.Linear(llm_size, llm_size) if config.structure == "mlp" else None
        # Zero, without tanh: at the start the LLM computes exactly what it computes without aligner.
        self.gates = nn.Parameter(torch.zeros(llm_layers))

    def keys_values(self, states: Tensor, mask: Tensor, llm: PreTrainedModel) -> Tensor:
        """Keys and values of every LLM layer, after the LLM's `W_K` and `W_V`: computed once per source.

        Args:
            states: `[num_layers, batch, length, encoder_size]`, raw: embedding output first, last layer left out.
            mask: `[batch, length]`, non-zero where a token is real.
            llm: the LLM that will read them.

        Returns:
            `[batch, llm_layers, 2, key_value_heads, length, head_dim]` in the LLM's dtype, zero at padding.

        Raises:
            ModelError: the states or the LLM do not have the shape this aligner was made for.
        """
        expected = (self.num_layers, *mask.shape, self.encoder_size)
        if tuple(states.shape) != expected:
            raise ModelError(
                f"encoder states have the shape {list(states.shape)}, expected {list(expected)}",
                where="aligner",
                remedy="give all hidden states but the last, embedding output first: [layers, batch, length, hidden]",
            )
        padding = mask == 0
        states = states.to(self.fc1.weight.dtype).masked_fill(padding[None, :, :, None], 0.0)
        mixed = self.fc1(states.movedim(0, -1)).relu().movedim(-1, 0)  # [2 * llm_layers, batch, length, encoder_size]
        layers = []
        for index, attention in enumerate(self._attentions(llm)):
            keys, values = (self._widen(mixed[2 * index + part]).to(llm.dtype) for part in (0, 1))
            layers.append(project_keys_values(attention, keys, values))
        return torch.stack(layers, dim=1).masked_fill(padding[:, None, None, None, :, None], 0.0)

    def _widen(self, mixed: Tensor) -> Tensor:
        wide = self.fc2(mixed)
        return wide if self.fc3 is None else self.fc3(wide.relu())

    def _attentions(self, llm: PreTrainedModel) -> list[Any]:
        attentions = self_attentions(llm)
        if len(attentions) != self.llm_layers:
            raise ModelError(
                f"the LLM has {len(attentions)} layers, the aligner was made for {self.llm_layers}", where="aligner"
            )
        return attentions

    @contextmanager
    def reading(self, llm: PreTrainedModel, keys_values: Tensor, mask: Tensor) -> Iterator[None]:
        """Within this context every self-attention layer of `llm` reads the encoder (Equation 2).

        Whatever happens inside, the LLM is as before afterwards. Without cache, with cache, in training or search:
        rows of the LLM's input may be several times the sources, if they are grouped by source.

        Args:
            llm: the LLM that `keys_values` was computed for.
            keys_values: `[sources, llm_layers, 2, key_value_heads, length, head_dim]`, from :meth:`keys_values`.
            mask: `[sources, length]`, the encoder's mask, non-zero where a token is real.

        Raises:
            ModelError: keys and mask do not fit each other or the LLM, or the LLM is training with gradient
                checkpointing.
        """
        if (keys_values.shape[0], keys_values.shape[-2]) != tuple(mask.shape):
            raise ModelError(
                f"keys for {keys_values.shape[0]} sources of length {keys_values.shape[-2]} do not fit a mask of the "
                f"shape {list(mask.shape)}",
                where="aligner",
            )
        handles = []
        try:
            for index, attention in enumerate(self._attentions(llm)):
                reader = LayerReader(attention, self.gates[index], keys_values[:, index], mask != 0)
                handles += reader.attach()
            yield
        finally:
            for handle in handles:
                handle.remove()


def build_aligner(
    options: Mapping[str, Any] | AlignerConfig,
    *,
    num_layers: int,
    encoder_size: int,
    llm: PreTrainedModel,
    seed: int = 0,
) -> LayerwiseAligner:
    """The aligner for an encoder and `llm`.

    Args:
        options: fields of `AlignerConfig`; `{}` for the published structure.
        num_layers: encoder layers read: embedding output and all layers but the last, so the encoder's layer count.
        encoder_size: width of the encoder's states.
        llm: the LLM that will read the encoder.
        seed: seed of the initial weights.

    Raises:
        ConfigError: an option is unknown or has a wrong value.
        ModelError: the attention of this LLM has no supported layout.
    """
    config = options if isinstance(options, AlignerConfig) else checked_options(AlignerConfig, options, where="aligner")
    self_attentions(llm)
    text = llm.config.get_text_config(decoder=True)
    return LayerwiseAligner(
        config,
        num_layers=num_layers,
        encoder_size=encoder_size,
        llm_layers=text.num_hidden_layers,
        llm_size=text.hidden_size,
        seed=seed,
    )
