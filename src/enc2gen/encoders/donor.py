"""What a decoder may take from an encoder: one small interface, one class per family of encoders.

A donor answers questions about *names* and *shapes* only. The same answers serve copying (weights are copied
from the named parameter), tying (the decoder's parameter becomes the named one) and the init report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from enc2gen.errors import ConfigError, ModelError
from enc2gen.registry import Registry

NormOrder = Literal["post", "pre"]

ATTENTION_TENSORS = tuple(
    f"{part}.{kind}" for part in ("q_proj", "k_proj", "v_proj", "out_proj") for kind in ("weight", "bias")
)
"""Canonical tensors of one attention, in the decoder's own names."""
FFN_TENSORS = tuple(f"{part}.{kind}" for part in ("fc1", "fc2") for kind in ("weight", "bias"))
"""Canonical tensors of one feed-forward network."""
NORM_TENSORS = ("weight", "bias")


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
    @abstractmethod
    def position_offset(self) -> int:
        """Row of the position table that belongs to the first token."""

    @property
    def max_positions(self) -> int:
        """Longest sequence in tokens, special tokens included."""
        return int(self.config.max_position_embeddings) - self.position_offset

    @abstractmethod
    def word_embeddings(self) -> str:
        """Parameter name of the word embedding table, `[vocabulary, hidden]`."""

    @abstractmethod
    def embeddings(self) -> dict[str, str]:
        """Decoder embedding tensor (canonical name) -> encoder parameter: positions, types, embedding norm."""

    @abstractmethod
    def attention(self, layer: int) -> dict[str, str]:
        """Each of `ATTENTION_TENSORS` -> encoder parameter of self-attention in `layer`."""

    @abstractmethod
    def attention_norm(self, layer: int) -> dict[str, str]:
        """`weight`, `bias` of the norm that belongs to self-attention in `layer`."""

    @abstractmethod
    def ffn(self, layer: int) -> dict[str, str]:
        """Each of `FFN_TENSORS` -> encoder parameter of the feed-forward network in `layer`."""

    @abstractmethod
    def ffn_norm(self, layer: int) -> dict[str, str]:
        """`weight`, `bias` of the norm that belongs to the feed-forward network in `layer`."""

    @abstractmethod
    def layer_list(self, encoder: PreTrainedModel) -> nn.ModuleList:
        """The encoder's list of layers."""

    def keep_layers(self, encoder: PreTrainedModel, layers: list[int]) -> None:
        """Cut `encoder` in place down to `layers` (indices in increasing order), for small machines.

        Raises:
            ConfigError: an index is out of range, repeated or out of order.
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
            config.num_hidden_layers = len(kept)


DONORS: Registry[type[Donor]] = Registry("encoder family")
DONORS.add("bert", "enc2gen.encoders.bert:BertDonor")
DONORS.add("roberta", "enc2gen.encoders.roberta:RobertaDonor")


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
