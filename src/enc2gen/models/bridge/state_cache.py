"""What a frozen encoder says of each source, computed once: a training run reads it in every epoch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from enc2gen.errors import ConfigError

_LOG = logging.getLogger(__name__)

SourceIds = tuple[int, ...]


class ReadingModel(Protocol):
    """What the cache needs of a bridge."""

    encoder: nn.Module
    fusion: Any  # callable [layers, batch, length, hidden], [batch, length] -> [batch, length, hidden]; `trainable`

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor: ...


class FrozenStateCache:
    """Keeps the states of every distinct source in main memory.

    What is kept is the stack of layers, `[layers, length, hidden]` a source, or, if the fusion has no parameters,
    the fused states, `[length, hidden]`. A source that is not there is encoded by the model as without a cache.

    Args:
        model: a bridge whose encoder is frozen.
        max_gigabytes: most memory (10^9 bytes) of the kept states.
        batch_tokens: tokens with padding that are encoded at once.
        pad_token_id: padding of the encoder's inputs; by default as in the encoder's configuration.
        dtype: of the kept states; by default as computed. Half precision halves the memory and rounds the states.

    Attributes:
        argument: the model's argument that the kept states are for: "encoder_states" or "fused_states".
        bytes: memory in use.

    Raises:
        ConfigError: the encoder is trained, so that what it says changes.
    """

    def __init__(
        self,
        model: ReadingModel,
        max_gigabytes: float = 4.0,
        *,
        batch_tokens: int = 4096,
        pad_token_id: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        trained = [name for name, parameter in model.encoder.named_parameters() if parameter.requires_grad]
        if trained:
            raise ConfigError(
                f"{len(trained)} tensors of the encoder are trained, for example {trained[0]}",
                where="cache",
                remedy="freeze the encoder, or train without a cache of its states",
            )
        if getattr(model, "aligner", None) is not None:
            raise ConfigError(
                "a layer-wise aligner reads all layers of the encoder, which are not kept",
                where="cache",
                remedy="train this bridge without a cache",
            )
        self._model, self._limit, self._batch_tokens = model, max_gigabytes * 1e9, batch_tokens
        self._pad = pad_token_id
        if pad_token_id is None:
            self._pad = getattr(getattr(model.encoder, "config", None), "pad_token_id", None)
        self._dtype = dtype
        self._states: dict[SourceIds, Tensor] = {}
        self.argument = "encoder_states" if model.fusion.trainable else "fused_states"
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, source: object) -> bool:
        return source in self._states

    def add(self, sources: Iterable[Sequence[int]]) -> bool:
        """Encode the sources that are not there yet, each once; False, with a logged line, if they do not fit.

        Args:
            sources: encoder ids, without padding.
        """
        missing = sorted({tuple(source) for source in sources} - self._states.keys(), key=lambda s: (-len(s), s))
        tokens = sum(map(len, missing))
        for number, batch in enumerate(self._cut(missing)):
            states = self._encode(batch)
            if number == 0:
                needed = states.element_size() * states[..., 0, 0, :].numel() * tokens
                if not self._fits(needed, len(missing)):
                    return False
            for row, source in enumerate(batch):
                kept = states[..., row, : len(source), :].clone()
                self._states[source] = kept
                self.bytes += kept.element_size() * kept.numel()
        return True

    def lookup(self, sources: Sequence[SourceIds]) -> dict[str, Tensor]:
        """States of the sources as one batch, zero at padding, under the model's argument; empty if one is missing.

        Returns:
            `{"encoder_states": [layers, batch, length, hidden]}` or `{"fused_states": [batch, length, hidden]}`.
        """
        if not sources or any(source not in self._states for source in sources):
            return {}
        found = [self._states[source] for source in sources]  # [layers, length, hidden] or [length, hidden]
        *layers, _, hidden = found[0].shape
        batch = found[0].new_zeros(*layers, len(found), max(map(len, sources)), hidden)
        for row, states in enumerate(found):
            batch[..., row, : states.shape[-2], :] = states
        return {self.argument: batch}

    def _fits(self, needed: int, sources: int) -> bool:
        if self.bytes + needed <= self._limit:
            return True
        _LOG.warning(
            "The encoder's states of %d sources would need %.2f GB, the cache may hold %.2f GB: the encoder "
            "runs in every step instead. Raise the limit to save that time.",
            sources,
            (self.bytes + needed) / 1e9,
            self._limit / 1e9,
        )
        return False

    def _cut(self, sources: Sequence[SourceIds]) -> Iterator[list[SourceIds]]:
        """Batches of neighbours; the first source of each is its longest."""
        start = 0
        while start < len(sources):
            rows = max(1, self._batch_tokens // max(1, len(sources[start])))
            yield list(sources[start : start + rows])
            start += rows

    @torch.no_grad()
    def _encode(self, sources: Sequence[SourceIds]) -> Tensor:
        """`[layers, batch, length, hidden]`, or fused `[batch, length, hidden]`, in main memory.

        Computed where the encoder is; the rest of the model has to be there, too.
        """
        width, pad = max(map(len, sources)), self._pad or 0
        device = next(self._model.encoder.parameters()).device
        ids = torch.tensor([[*source, *[pad] * (width - len(source))] for source in sources], device=device)
        mask = torch.tensor([[1] * len(source) + [0] * (width - len(source)) for source in sources], device=device)
        states = self._model.encode(ids, mask)
        if self.argument == "fused_states":
            states = self._model.fusion(states, mask)
        return states.to(device="cpu", dtype=self._dtype or states.dtype)
