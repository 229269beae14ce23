"""Mappers: from fused encoder states to the soft prefix that the LLM reads.

Shapes: `length` counts the encoder's tokens, `hidden` is the encoder's width (H), `prefix` counts the LLM's positions,
`llm` is the LLM's width (D).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from enc2gen.models.bridge.options import checked_options
from enc2gen.models.seeding import seeded
from enc2gen.registry import Registry

SENTENCE_DESCRIPTION = (
    "share s of the sentence's mean in every token's state: (1 - s) * F_t + s * mean(F); 0, the published value, "
    "leaves the states alone (our variant)"
)


LLINK_DROPOUT = 0.1
"""Dropout in the projector of LLINK (arXiv 2510.27254)."""


class MapperConfig(BaseModel):
    """Options of every mapper."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    feature_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="in training, this share of the encoder's features is dropped, the same ones in all tokens of a "
        "text, so that the map relies on no single one, which may mean something else in another language (our "
        "variant; 0, the published value: none)",
    )


class Mapper(nn.Module):
    """Base of all mappers.

    Args:
        config: options of the mapper.
        encoder_size: width of the encoder.
        llm_size: width of the LLM's embeddings.
    """

    config_class: ClassVar[type[MapperConfig]]

    def __init__(self, config: Any, *, encoder_size: int, llm_size: int) -> None:
        super().__init__()
        self.config = config
        self.encoder_size = encoder_size
        self.llm_size = llm_size

    def forward(self, fused: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map.

        Args:
            fused: `[batch, length, hidden]`, 0 at padding.
            mask: `[batch, length]`, 1 or true at real tokens.

        Returns:
            The prefix `[batch, prefix, llm]`, in the type of the mapper's parameters and 0 at padding, and its mask
            `[batch, prefix]`, in the type of `mask`.
        """
        raise NotImplementedError

    def _inputs(self, states: Tensor) -> Tensor:
        """`states` in the type of the parameters (encoder and mapper may differ), with feature dropout in training."""
        states = states.to(next(self.parameters()).dtype)
        # Features are the channels of dropout1d, which drops whole channels: [batch, hidden, length].
        return F.dropout1d(states.mT, self.config.feature_dropout, self.training).mT


class LinearConfig(MapperConfig):
    """Options of the linear mapper."""

    sentence: float = Field(default=0.0, ge=0, le=1, description=SENTENCE_DESCRIPTION)


class LinearMapper(Mapper):
    """One linear map with bias per token (LangBridge, arXiv 2401.10695; also arXiv 2508.09091): P_t = W F_t + b."""

    config_class: ClassVar[type[MapperConfig]] = LinearConfig

    def __init__(self, config: LinearConfig, *, encoder_size: int, llm_size: int) -> None:
        super().__init__(config, encoder_size=encoder_size, llm_size=llm_size)
        self.map = nn.Linear(encoder_size, llm_size)

    def forward(self, fused: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mixed = with_sentence(self._inputs(fused), mask, self.config.sentence)
        return _zero_padding(self.map(mixed), mask), mask


class MlpConfig(MapperConfig):
    """Options of the two-layer mapper; the defaults are the published ones."""

    hidden_size: int | None = Field(
        default=None, ge=1, description="inner width; null: twice the encoder's (MindMerger, arXiv 2405.17386)"
    )
    activation: Literal["relu", "gelu"] = Field(
        default="relu", description="relu (MindMerger), or gelu (LangBridge's `ffn` variant)"
    )
    sentence: float = Field(default=0.0, ge=0, le=1, description=SENTENCE_DESCRIPTION)


class MlpMapper(Mapper):
    """Two linear maps per token (MindMerger, arXiv 2405.17386): P_t = W_2 relu(W_1 F_t + b_1) + b_2."""

    config_class: ClassVar[type[MapperConfig]] = MlpConfig

    def __init__(self, config: MlpConfig, *, encoder_size: int, llm_size: int) -> None:
        super().__init__(config, encoder_size=encoder_size, llm_size=llm_size)
        inner = config.hidden_size or 2 * encoder_size
        activation = nn.ReLU() if config.activation == "relu" else nn.GELU()
        self.map = nn.Sequential(nn.Linear(encoder_size, inner), activation, nn.Linear(inner, llm_size))

    def forward(self, fused: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mixed = with_sentence(self._inputs(fused), mask, self.config.sentence)
        return _zero_padding(self.map(mixed), mask), mask


class SlotsConfig(MapperConfig):
    """Options of the slot mapper; the defaults are the published ones."""

    slots: int = Field(default=8, ge=1, description="K, vectors that the LLM reads (LLINK, arXiv 2510.27254)")
    kind: Literal["mlp", "linear"] = Field(
        default="mlp",
        description="mlp: projector and expander (LLINK); linear: one linear map from the mean state to all slots, "
        "our variant",
    )
    hidden_size: int | None = Field(
        default=None,
        ge=1,
        description="inner width of the projector; null: four times the encoder's (LLINK: 3072 for 768); mlp only",
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="dropout in the projector; null: 0.1 (LLINK); mlp only"
    )

    @model_validator(mode="after")
    def _linear_has_no_projector(self) -> SlotsConfig:
        if self.kind == "linear" and (self.hidden_size is not None or self.dropout is not None):
            raise ValueError("hidden_size and dropout belong to kind='mlp'; kind='linear' has neither")
        return self


class SlotsMapper(Mapper):
    """The whole text in K vectors (LLINK, arXiv 2510.27254), made from the mean m of its real tokens' states.

    v = LN(W_2 gelu(W_1 m + b_1) + b_2), with dropout after the activation; slots = LN([K, D] reshaped from
    W_4 gelu(W_3 v + b_3) + b_4), where W_3 doubles the width. LLINK trains v in a stage of its own, and has a learned
    scale and an adapter between v and the slots; here both parts are trained together and need neither.
    Number words and literal wording suffer from so few vectors; topics do not.
    """

    config_class: ClassVar[type[MapperConfig]] = SlotsConfig

    def __init__(self, config: SlotsConfig, *, encoder_size: int, llm_size: int) -> None:
        super().__init__(config, encoder_size=encoder_size, llm_size=llm_size)
        width = config.slots * llm_size
        if config.kind == "linear":
            self.map: nn.Module = nn.Linear(encoder_size, width)
            return
        inner = config.hidden_size or 4 * encoder_size
        self.map = nn.Sequential(
            nn.Linear(encoder_size, inner),
            nn.GELU(),
            nn.Dropout(LLINK_DROPOUT if config.dropout is None else config.dropout),
            nn.Linear(inner, llm_size),
            nn.LayerNorm(llm_size),
            nn.Linear(llm_size, 2 * llm_size),
            nn.GELU(),
            nn.Linear(2 * llm_size, width),
            nn.Unflatten(-1, (config.slots, llm_size)),
            nn.LayerNorm(llm_size),
        )

    def forward(self, fused: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.map(mean_state(self._inputs(fused), mask))
        prefix = slots.reshape(len(fused), self.config.slots, self.llm_size)
        return prefix, mask.new_ones(len(fused), self.config.slots)


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens: `[batch, length, hidden]` and `[batch, length]` to `[batch, hidden]`; 0 without tokens."""
    real = mask.bool()
    total = states.masked_fill(~real[..., None], 0).sum(1, dtype=torch.promote_types(states.dtype, torch.float32))
    return (total / real.sum(1, keepdim=True).clamp_min(1)).to(states.dtype)


def with_sentence(states: Tensor, mask: Tensor, share: float) -> Tensor:
    """Mix each token's state with its sentence's mean: (1 - share) * F_t + share * mean(F), `[batch, length, hidden]`.

    Padding gets the mean's share as well; it is masked afterwards.
    """
    return torch.lerp(states, mean_state(states, mask)[:, None], share) if share else states


def _zero_padding(prefix: Tensor, mask: Tensor) -> Tensor:
    return prefix.masked_fill(~mask.bool()[..., None], 0)


MAPPERS: Registry[type[Mapper]] = Registry("mapper")
"""Mappers by name."""
MAPPERS.add("linear", LinearMapper)
MAPPERS.add("mlp", MlpMapper)
MAPPERS.add("slots", SlotsMapper)


def build_mapper(name: str, *, encoder_size: int, llm_size: int, seed: int = 0, **options: Any) -> Mapper:
    """Build the mapper `name`.

    Args:
        encoder_size: width of the encoder.
        llm_size: width of the LLM's embeddings.
        seed: of the initial parameters.
        options: of the mapper; see its configuration class.

    Raises:
        ConfigError: unknown mapper, or options that it does not have.
    """
    mapper = MAPPERS.get(name)
    config = checked_options(mapper.config_class, options, where=f"mapper {name!r}")
    with seeded(seed):
        return mapper(config, encoder_size=encoder_size, llm_size=llm_size)
