"""Which of the encoder's hidden states a bridge reads, and on which scale.

Shapes: `layers` counts the states that are read, `length` the encoder's tokens, `hidden` is the encoder's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from enc2gen.errors import ConfigError, DataError, ModelError

CONSTANT_FEATURE = 1e-6
"""Features with a smaller standard deviation are centred but not scaled (our choice)."""


class HiddenStatesConfig(BaseModel):
    """The convention by which hidden states are read; the default is the published one (arXiv 2508.09091)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include_embeddings: bool = Field(
        default=False,
        description="whether the embedding output is read as the lowest layer; arXiv 2508.09091 leaves it out",
    )
    normalise: Literal["none", "layer-norm", "final-norm", "standardise"] = Field(
        default="none",
        description="none: as the encoder gives them (arXiv 2508.09091); layer-norm: every token's state of every "
        "layer to mean 0 and variance 1; final-norm: the encoder's own last norm on the layers that have not passed "
        "it (T5, mT5, XLM-R XL, NLLB); standardise: every feature of every layer to mean 0 and variance 1 over tokens "
        "(the last three are our variants)",
    )


class HiddenStates(nn.Module):
    """Stacks an encoder's hidden states, and puts its layers on one scale if asked.

    Pre-norm encoders (T5, XLM-R XL, NLLB) give the raw residual stream in all layers but the last, which alone has
    passed the final norm: a weighted sum of their raw layers is dominated by the late, large ones. The published code
    sums them raw, and so does the default here.

    Has no parameters. With `standardise` it has the buffers `mean` and `std`, both `[layers, hidden]`, and `tokens`,
    the number of tokens that they were computed from; :meth:`fit` fills them and they are saved with the model.

    Args:
        num_hidden_layers: layers of the encoder, embeddings not counted.
        hidden_size: width of the encoder.

    Attributes:
        num_layers: how many layers are read.
    """

    mean: Tensor
    std: Tensor
    tokens: Tensor

    def __init__(self, config: HiddenStatesConfig, *, num_hidden_layers: int, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size = hidden_size
        self.num_layers = num_hidden_layers + int(config.include_embeddings)
        if config.normalise == "standardise":
            self.register_buffer("mean", torch.zeros(self.num_layers, hidden_size))
            self.register_buffer("std", torch.ones(self.num_layers, hidden_size))
            self.register_buffer("tokens", torch.zeros((), dtype=torch.long))

    def forward(self, hidden_states: Sequence[Tensor], final_norm: nn.Module | None = None) -> Tensor:
        """Stack the states that the bridge reads, lowest layer first.

        Args:
            hidden_states: as transformers gives them, the embedding output and then one state per layer, each
                `[batch, length, hidden]`.
            final_norm: the norm that only the last state has passed; needed for `final-norm`.

        Returns:
            `[layers, batch, length, hidden]`, in the type of the states.

        Raises:
            ModelError: another number of states, no final norm although `final-norm` asks for one, or `standardise`
                before :meth:`fit`.
        """
        return self.normalised(self.select(hidden_states), final_norm)

    def select(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """The states that the bridge reads, as the encoder gives them: `[layers, batch, length, hidden]`."""
        if len(hidden_states) != self.num_hidden_layers + 1:
            raise ModelError(
                f"the encoder gave {len(hidden_states)} hidden states, not its embeddings and {self.num_hidden_layers} "
                "layers",
                remedy="call the encoder with output_hidden_states=True",
            )
        return torch.stack(tuple(hidden_states[len(hidden_states) - self.num_layers :]))

    def normalised(self, states: Tensor, final_norm: nn.Module | None = None) -> Tensor:
        """Put selected states on the scale of the configuration; shapes and errors as in :meth:`forward`."""
        kind = self.config.normalise
        if kind == "layer-norm":
            return F.layer_norm(_wide(states), (self.hidden_size,)).to(states.dtype)
        if kind == "final-norm":
            if final_norm is None:
                raise ModelError(
                    "normalise='final-norm' needs an encoder whose layers share a final norm, and this one normalises "
                    "within every layer",
                    remedy="use 'none' or 'layer-norm'",
                )
            return torch.cat([final_norm(states[:-1]).to(states.dtype), states[-1:]])
        if kind == "standardise":
            if not int(self.tokens):
                raise ModelError(
                    "normalise='standardise' has no statistics yet", remedy="call fit() with the encoder's states first"
                )
            mean, std = (_wide(buffer)[:, None, None, :] for buffer in (self.mean, self.std))
            return ((_wide(states) - mean) / std).to(states.dtype)
        return states

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Compute the statistics of `standardise` over all real tokens.

        Args:
            batches: pairs of selected states `[layers, batch, length, hidden]`, not normalised (:meth:`select`), and
                their mask `[batch, length]`.

        Raises:
            ConfigError: the configuration is not `standardise`.
            ModelError: states of another shape.
            DataError: no batch has a real token.
        """
        if self.config.normalise != "standardise":
            raise ConfigError(
                f"normalise={self.config.normalise!r} has no statistics to fit", remedy="use normalise='standardise'"
            )
        # Means of encoders are far from zero in a few features, so that squares are summed in double precision.
        total = torch.zeros(self.num_layers, self.hidden_size, dtype=torch.float64)
        squares = torch.zeros_like(total)
        count = 0
        for states, mask in batches:
            if states.shape[0] != self.num_layers or states.shape[-1] != self.hidden_size:
                raise ModelError(
                    f"states of shape {list(states.shape)} do not fit [{self.num_layers}, batch, length, "
                    f"{self.hidden_size}]"
                )
            real = states[:, mask.bool()].double()  # [layers, tokens, hidden]
            total += real.sum(1).cpu()
            squares += real.square().sum(1).cpu()
            count += real.shape[1]
        if not count:
            raise DataError("there is no token to standardise with", remedy="give at least one text that is not empty")
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std < CONSTANT_FEATURE, torch.ones_like(std), std))
        self.tokens.fill_(count)


def _wide(states: Tensor) -> Tensor:
    """`states` in float32, or in float64 if they are."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
