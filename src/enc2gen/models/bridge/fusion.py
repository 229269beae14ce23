"""Fusions: how the states of many encoder layers become one state per token.

Shapes: `layers` counts the hidden states that are read (L), `length` the encoder's tokens, `hidden` is its width (D).
Every fusion is a weighted sum F_t = sum_l a_{t,l} H_{l,t} of the states as they come in; they differ in the weights a.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from enc2gen.errors import ConfigError, ModelError
from enc2gen.models.bridge.options import checked_options
from enc2gen.models.seeding import seeded
from enc2gen.registry import Registry

INITIAL_LOGIT = 3e-5
"""Initial value of each layer's weight in Global Softmax (authors' code of arXiv 2508.09091)."""
BASE_TEMPERATURE = 1e2
TEMPERATURE_FACTOR = 1e5
INITIAL_TEMPERATURE = 1e-5
"""Global Softmax scales by tau = 1e2 + 1e5 * temperature, which starts at 101 (authors' code of arXiv 2508.09091)."""


class Fusion(nn.Module):
    """Base of all fusions. A subclass gives :meth:`weights`; the weighted sum is the same for all.

    Args:
        config: options of the fusion.
        num_layers: layers that are fused.
        hidden_size: width of the encoder.
    """

    config_class: ClassVar[type[BaseModel]]

    def __init__(self, config: Any, *, num_layers: int, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.num_layers = num_layers
        self.hidden_size = hidden_size

    @property
    def trainable(self) -> bool:
        """Whether the fusion has parameters; without, its output can be computed once and kept."""
        return next(self.parameters(), None) is not None

    def weights(self, states: Tensor, mask: Tensor) -> Tensor:
        """The weight of each layer for each token.

        Args:
            states: `[layers, batch, length, hidden]`.
            mask: `[batch, length]`, 1 or true at real tokens.

        Returns:
            `[batch, length, layers]`, float32 (float64 for states in float64): rows sum to 1 at real tokens and are 0
            at padding.
        """
        raise NotImplementedError

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Fuse.

        Args:
            states: `[layers, batch, length, hidden]`.
            mask: `[batch, length]`, 1 or true at real tokens.

        Returns:
            `[batch, length, hidden]` in the type of the states, exactly 0 at padding. Sums are in float32 or wider.

        Raises:
            ModelError: states of another number of layers or width.
        """
        self._check(states)
        weights = self.weights(states, mask)
        # Layer by layer: a product of all layers at once would need the memory of the whole stack again, and a matrix
        # product would run in half precision under autocast.
        fused = weights[..., 0, None] * states[0]
        for layer in range(1, self.num_layers):
            fused = fused + weights[..., layer, None] * states[layer]
        return fused.to(states.dtype).masked_fill(~mask.bool()[..., None], 0)

    def _check(self, states: Tensor) -> None:
        if states.dim() != 4 or states.shape[0] != self.num_layers or states.shape[-1] != self.hidden_size:
            raise ModelError(
                f"states of shape {list(states.shape)} do not fit this fusion, which expects "
                f"[{self.num_layers}, batch, length, {self.hidden_size}]",
                remedy="build the fusion with the num_layers and hidden_size of what HiddenStates gives",
            )

    def _same_for_all(self, layer_weights: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Weights `[layers]` for every real token: `[batch, length, layers]`."""
        real = mask.bool()[..., None]
        return torch.where(real, layer_weights.to(_wide_type(states)), 0)


class NoOptions(BaseModel):
    """The fusion has no options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerIndexConfig(BaseModel):
    """Which layer `layer_index` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int = Field(
        description="layer, counted from 0 among those that are read (0 is the first layer, or the embeddings where "
        "they are read); negative numbers count from the last, -1"
    )


class LayerIndexFusion(Fusion):
    """One layer alone: F_t = H_{index,t}. A control for fusions that weigh layers.

    Raises:
        ConfigError: there is no such layer.
    """

    config_class: ClassVar[type[BaseModel]] = LayerIndexConfig

    def __init__(self, config: LayerIndexConfig, *, num_layers: int, hidden_size: int) -> None:
        super().__init__(config, num_layers=num_layers, hidden_size=hidden_size)
        if not -num_layers <= config.index < num_layers:
            raise ConfigError(
                f"there is no layer {config.index} among {num_layers}",
                where="fusion 'layer_index'",
                remedy=f"use {-num_layers} to {num_layers - 1}",
            )
        self.index = config.index % num_layers

    def weights(self, states: Tensor, mask: Tensor) -> Tensor:
        one_hot = torch.zeros(self.num_layers, device=states.device)
        one_hot[self.index] = 1
        return self._same_for_all(one_hot, states, mask)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        self._check(states)
        return states[self.index].masked_fill(~mask.bool()[..., None], 0)


class LastFusion(LayerIndexFusion):
    """The last layer, as in LangBridge (arXiv 2401.10695): F_t = H_{L,t}."""

    config_class: ClassVar[type[BaseModel]] = NoOptions

    def __init__(self, config: NoOptions, *, num_layers: int, hidden_size: int) -> None:
        super().__init__(LayerIndexConfig(index=-1), num_layers=num_layers, hidden_size=hidden_size)


class MeanFusion(Fusion):
    """All layers alike: F_t = 1/L sum_l H_{l,t}."""

    config_class: ClassVar[type[BaseModel]] = NoOptions

    def weights(self, states: Tensor, mask: Tensor) -> Tensor:
        equal = torch.zeros(self.num_layers, device=states.device).softmax(0)
        return self._same_for_all(equal, states, mask)


class GlobalConfig(BaseModel):
    """Options of Global Softmax; the defaults are the published ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: Literal["learned", "plain"] = Field(
        default="learned",
        description="learned: softmax(tau * w) with tau = 1e2 + 1e5 * temperature, which makes a learning rate of 3e-5 "
        "move the weights (authors' code of arXiv 2508.09091; a step of Adam can change tau by 1e5 learning rates, "
        "so that larger rates make it erratic); plain: softmax(w), our variant",
    )
    prior: float = Field(
        default=0.0,
        ge=0,
        description="prior towards upper layers: logits grow by this much from each layer to the next before anything "
        "is learned; 0, the published value, starts at the mean of all layers; with 1 (our suggestion) the last "
        "layer starts with 63 % of the weight",
    )


class GlobalFusion(Fusion):
    """Global Softmax (arXiv 2508.09091): one learned weight per layer, the same for all tokens and texts.

    a = softmax(tau * w) over the layers, with w in R^L and tau = 1e2 + 1e5 * temperature, both learned (L + 1
    numbers); F_t = sum_l a_l H_{l,t}. At the start all layers weigh the same, unless a `prior` adds prior * (l - L),
    l = 1..L, to the logits: a constant outside tau, so that learning the temperature leaves it alone.
    """

    config_class: ClassVar[type[BaseModel]] = GlobalConfig

    def __init__(self, config: GlobalConfig, *, num_layers: int, hidden_size: int) -> None:
        super().__init__(config, num_layers=num_layers, hidden_size=hidden_size)
        learned = config.temperature == "learned"
        self.logits = nn.Parameter(torch.full((num_layers,), INITIAL_LOGIT if learned else 0.0))
        if learned:
            self.temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))

    def weights(self, states: Tensor, mask: Tensor) -> Tensor:
        return self._same_for_all(self.layer_weights(), states, mask)

    def layer_weights(self) -> Tensor:
        """The softmax weights, `[layers]`, float32 or wider."""
        logits = self.logits.to(_wide_type(self.logits))
        if self.config.temperature == "learned":
            logits = logits * (BASE_TEMPERATURE + TEMPERATURE_FACTOR * self.temperature.to(logits.dtype))
        below = torch.arange(1 - self.num_layers, 1, device=logits.device, dtype=logits.dtype)  # l - L
        return (logits + self.config.prior * below).softmax(0)


class TransformerConfig(BaseModel):
    """Options of Transformer Softmax; the defaults are the published ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    feed_forward: int = Field(
        default=2048, ge=1, description="width of the feed-forward part (authors' code of arXiv 2508.09091)"
    )
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="dropout of the layer (authors' code of arXiv 2508.09091)"
    )


class TransformerFusion(Fusion):
    """Transformer Softmax (arXiv 2508.09091): weights for each token, from all states of that token.

    For each token, X = [cls; H_1 + p_1; ...; H_L + p_L] passes one post-norm transformer encoder layer (one head,
    ReLU) over the axis of layers; a_t = softmax(W Y_cls + b); F_t = sum_l a_{t,l} H_{l,t}. cls starts at zero, p is
    drawn from N(0, 1). Tokens do not see each other, so that padding changes nothing.
    """

    config_class: ClassVar[type[BaseModel]] = TransformerConfig

    def __init__(self, config: TransformerConfig, *, num_layers: int, hidden_size: int) -> None:
        super().__init__(config, num_layers=num_layers, hidden_size=hidden_size)
        self.cls = nn.Parameter(torch.zeros(hidden_size))
        self.positions = nn.Parameter(torch.randn(num_layers, hidden_size))
        self.layer = nn.TransformerEncoderLayer(
            hidden_size, nhead=1, dim_feedforward=config.feed_forward, dropout=config.dropout, batch_first=True
        )
        self.classifier = nn.Linear(hidden_size, num_layers)

    def weights(self, states: Tensor, mask: Tensor) -> Tensor:
        real = mask.bool()
        chosen = self._layer_logits(states[:, real].to(self.cls.dtype)).to(_wide_type(states)).softmax(-1)
        return chosen.new_zeros(*mask.shape, self.num_layers).masked_scatter(real[..., None], chosen)

    def _layer_logits(self, states: Tensor) -> Tensor:
        """Logits `[tokens, layers]` of states `[layers, tokens, hidden]`.

        Only the output at cls is needed, and cls has the same query q for every token. So its attention scores are
        x_l . (W_k' q), and its context is W_v applied to the weighted mean of the x_l: the same as the whole layer
        gives at cls (the keys' bias shifts all scores alike), without keys, values and a feed-forward pass for every
        layer of every token.
        """
        layer, attention = self.layer, self.layer.self_attn
        query_map, key_map, value_map = attention.in_proj_weight.chunk(3)
        query_bias, _, value_bias = attention.in_proj_bias.chunk(3)
        query = (query_map @ self.cls + query_bias) * self.hidden_size**-0.5
        key = key_map.T @ query  # [hidden]
        layer_scores = states @ key + (self.positions @ key)[:, None]  # [layers, tokens]
        cls_score = (self.cls @ key).expand(1, states.shape[1])
        chances = torch.cat([cls_score, layer_scores]).softmax(0)  # [1 + layers, tokens]
        chances = nn.functional.dropout(chances, attention.dropout, self.training)
        mixed = torch.outer(chances[0], self.cls) + chances[1:].T @ self.positions  # [tokens, hidden]
        for index in range(self.num_layers):
            mixed = mixed + chances[1 + index, :, None] * states[index]
        # Dropout leaves chances that do not sum to one, and the values' bias is inside the sum.
        context = nn.functional.linear(mixed, value_map) + chances.sum(0)[:, None] * value_bias
        hidden = layer.norm1(self.cls + layer.dropout1(attention.out_proj(context)))
        inner = layer.dropout(layer.activation(layer.linear1(hidden)))
        return self.classifier(layer.norm2(hidden + layer.dropout2(layer.linear2(inner))))


FUSIONS: Registry[type[Fusion]] = Registry("fusion")
"""Fusions by name."""
FUSIONS.add("last", LastFusion)
FUSIONS.add("mean", MeanFusion)
FUSIONS.add("layer_index", LayerIndexFusion)
FUSIONS.add("global", GlobalFusion)
FUSIONS.add("transformer", TransformerFusion)


def build_fusion(name: str, *, num_layers: int, hidden_size: int, seed: int = 0, **options: Any) -> Fusion:
    """Build the fusion `name`.

    Args:
        num_layers: layers that are fused.
        hidden_size: width of the encoder.
        seed: of the initial parameters.
        options: of the fusion; see its configuration class.

    Raises:
        ConfigError: unknown fusion, or options that it does not have.
    """
    fusion = FUSIONS.get(name)
    config = checked_options(fusion.config_class, options, where=f"fusion {name!r}")
    with seeded(seed):
        return fusion(config, num_layers=num_layers, hidden_size=hidden_size)


def _wide_type(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for tensors in float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
