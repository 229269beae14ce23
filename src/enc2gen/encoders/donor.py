"""What a decoder may take from an encoder: one small interface, one class per family of encoders.

A donor answers questions about *names*, *rows* and *shapes* only. The same answers serve copying (weights are copied
from the named parameter), tying (the decoder's parameter becomes the named one) and the init report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from enc2gen.errors import ConfigError, ModelError
from enc2gen.registry import Registry

NormOrder = Literal["post", "pre"]
NormType = Literal["layer", "rms"]
FfnType = Literal["plain", "gated"]

ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Projections of one attention, in the decoder's own names."""
FFN_PARTS: Mapping[FfnType, tuple[str, ...]] = {"plain": ("fc1", "fc2"), "gated": ("gate_proj", "up_proj", "down_proj")}
"""Projections of one feed-forward network, in the decoder's own names."""


@dataclass(frozen=True)
class Source:
    """A parameter of the encoder, or a block of its rows where several projections are fused into one.

    Attributes:
        name: of the parameter.
        rows: first row and the one after the last; `None` for the whole parameter.
    """

    name: str
    rows: tuple[int, int] | None = None

    def take(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The tensor (a view for a block of rows) in `parameters`."""
        tensor = parameters[self.name]
        return tensor if self.rows is None else tensor[slice(*self.rows)]

    def within(self, module: str) -> Source:
        """The same source, seen from the module that holds the encoder as `module`."""
        return Source(f"{module}.{self.name}", self.rows)

    def __str__(self) -> str:
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


def whole(names: Mapping[str, str]) -> dict[str, Source]:
    """Sources that are whole parameters, from their names."""
    return {ours: Source(theirs) for ours, theirs in names.items()}


@dataclass(frozen=True, kw_only=True)
class DecoderStyle:
    """What a decoder must look like for the encoder's weights to fit; the names are those of `SwcmConfig`.

    Attributes:
        head_dim: size of one attention head; `None`: `hidden_size / num_attention_heads`.
        num_key_value_heads: heads of keys and values, each shared by a group of query heads (arXiv 2305.13245);
            `None`: as many as query heads.
        norm_type: `layer` (LayerNorm) or `rms` (RMSNorm, arXiv 1910.07467).
        ffn_type: `plain`, W2 act(W1 x), or `gated`, Wd (act(Wg x) * Wu x) (arXiv 2002.05202).
        embed_norm: whether the sum of embeddings is normed.
        learned_positions: whether there is a table of positions.
        position_offset: row of that table which belongs to the first token.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str
    norm_type: NormType = "layer"
    norm_bias: bool = True
    layer_norm_eps: float
    attention_bias: bool = True
    ffn_type: FfnType = "plain"
    ffn_bias: bool = True
    embed_norm: bool = True
    learned_positions: bool = True
    position_offset: int = 0
    type_vocab_size: int = 0
    max_position_embeddings: int
    initializer_range: float
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float


@dataclass(frozen=True)
class LayerStyle:
    """What may differ from layer to layer.

    Attributes:
        rope_theta: base of the rotary positions (arXiv 2104.09864); `None`: no rotation.
        sliding_window: tokens that causal self-attention sees, the current one included; `None`: all.
        attention_norm: whether self-attention has a norm of its own.
    """

    rope_theta: float | None = None
    sliding_window: int | None = None
    attention_norm: bool = True


class Donor(ABC):
    """A pretrained encoder seen as a source of decoder weights.

    Args:
        config: the encoder's configuration.

    Raises:
        ModelError: the configuration has a feature this family cannot carry over (named in the message).
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    norm_order: ClassVar[NormOrder]
    dropout_fields: ClassVar[tuple[str, ...]]
    """Dropout rates in the encoder's configuration."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = cast(Any, config)
        self.check()

    def check(self) -> None:  # noqa: B027 a hook: most families have nothing to refuse
        """Refuse configurations this family cannot carry over; raise `ModelError`."""

    @property
    def num_layers(self) -> int:
        """Number of encoder layers that can donate."""
        return int(self.config.num_hidden_layers)

    @property
    def position_offset(self) -> int:
        """Row of the position table that belongs to the first token; 0 where there is no table."""
        return self.style().position_offset

    @property
    def max_positions(self) -> int:
        """Longest sequence in tokens, special tokens included."""
        return int(self.config.max_position_embeddings) - self.position_offset

    @abstractmethod
    def style(self) -> DecoderStyle:
        """What a decoder of this encoder's weights looks like."""

    def layer_style(self, layer: int | None) -> LayerStyle:
        """What a decoder layer grown from `layer` looks like; `None`: a random layer among such layers."""
        return LayerStyle()

    @abstractmethod
    def word_embeddings(self) -> str:
        """Parameter name of the word embedding table, `[vocabulary, hidden]`."""

    @abstractmethod
    def embeddings(self) -> dict[str, Source]:
        """Decoder embedding tensor (canonical name) -> its source: positions, types, embedding norm."""

    @abstractmethod
    def attention(self, layer: int) -> dict[str, Source]:
        """Each weight (and bias) of `ATTENTION_PARTS` -> its source in the self-attention of `layer`."""

    @abstractmethod
    def attention_norm(self, layer: int) -> dict[str, Source]:
        """Weight (and bias) of the norm that belongs to self-attention in `layer`."""

    @abstractmethod
    def ffn(self, layer: int) -> dict[str, Source]:
        """Each weight (and bias) of `FFN_PARTS` -> its source in the feed-forward network of `layer`."""

    @abstractmethod
    def ffn_norm(self, layer: int) -> dict[str, Source]:
        """Weight (and bias) of the norm that belongs to the feed-forward network in `layer`."""

    def final_norm(self) -> dict[str, Source]:
        """Weight (and bias) of the norm after the last layer; empty where there is none (post-norm)."""
        return {}

    @abstractmethod
    def layer_list(self, encoder: PreTrainedModel) -> nn.ModuleList:
        """The encoder's list of layers."""

    def set_dropout(self, rate: float) -> None:
        """Set every dropout rate of the configuration, in place."""
        for field in self.dropout_fields:
            setattr(self.config, field, rate)

    def keep_layers(self, encoder: PreTrainedModel, layers: list[int]) -> None:
        """Cut `encoder` in place down to `layers` (indices in increasing order), for small machines.

        Raises:
            ConfigError: an index is out of range, repeated or out of order, or the family needs a layer that is cut.
        """
        if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= self.num_layers:
            raise ConfigError(
                f"encoder_layers={layers} is not a strictly increasing list of layers of this encoder",
                where="encoder_layers",
                remedy=f"use indices from 0 to {self.num_layers - 1}",
            )
        stack = self.layer_list(encoder)
        kept = [stack[index] for index in layers]
        del stack[:]
        stack.extend(kept)
        for config in {id(c): c for c in (self.config, encoder.config)}.values():
            self._cut(config, layers)

    def _cut(self, config: Any, layers: list[int]) -> None:
        """Make `config` describe the encoder of only `layers`."""
        config.num_hidden_layers = len(layers)

    def _refuse(self, feature: str, remedy: str) -> None:
        raise ModelError(feature, where=str(self.config.name_or_path or "encoder"), remedy=remedy)


DONORS: Registry[type[Donor]] = Registry("encoder family")
DONORS.add("bert", "enc2gen.encoders.bert:BertDonor")
DONORS.add("eurobert", "enc2gen.encoders.eurobert:EuroBertDonor")
DONORS.add("modernbert", "enc2gen.encoders.modernbert:ModernBertDonor")
DONORS.add("roberta", "enc2gen.encoders.roberta:RobertaDonor")
DONORS.add("xlm-roberta-xl", "enc2gen.encoders.xlm_roberta_xl:XlmRobertaXlDonor")


def supported_model_types() -> list[str]:
    """`model_type` of every encoder that can donate, sorted."""
    return sorted(model_type for name in DONORS for model_type in DONORS.get(name).model_types)


def donor_for(config: PreTrainedConfig) -> Donor:
    """The donor of an encoder configuration.

    Raises:
        ModelError: no family supports this `model_type`; the message lists those supported.
    """
    for name in DONORS:
        family = DONORS.get(name)
        if config.model_type in family.model_types:
            return family(config)
    raise ModelError(
        f"encoder type {config.model_type!r} cannot donate weights to a decoder",
        where=str(getattr(config, "name_or_path", "") or "encoder"),
        remedy=f"use an encoder of one of these types: {', '.join(supported_model_types())}",
    )
