"""Batches without padding: the tokens of all sequences in one row, and attention that never crosses them.

Everything that looks at one token at a time (projections, feed-forward networks, norms, dropout) runs on real tokens
only, which changes no result. Attention gets its sequences back, one a row, or their limits where the implementation
takes these (flash attention's variable lengths). It is what transformers and TRL call padding-free, and ModernBERT
unpadding (arXiv 2412.13663, section 2.2.2).

Shapes: B batch, L length with padding, N tokens of all sequences together, A heads, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Sequences:
    """Where the tokens of a padded batch lie.

    Args:
        mask: `[B, L]`, 1 on tokens and 0 on padding, on either side.

    Attributes:
        mask: the same as booleans.
        lengths: tokens of each sequence, `[B]`.
        full: whether there is no padding at all.
        on_the_right: whether padding is behind the tokens only.
        positions: place of each token in its sequence, from 0, `[1, N]`.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask.bool()
        self.lengths = self.mask.sum(1)
        flat = self.mask.flatten()
        self._places = _Places(
            flat.nonzero().squeeze(1), (flat.cumsum(0) - 1).clamp_(min=0), (~flat).nonzero().squeeze(1)
        )
        self.full = not len(self._places.padding)
        self.on_the_right = bool((self.mask[:, :-1] >= self.mask[:, 1:]).all())
        self.positions = (self.mask.cumsum(1) - 1).flatten()[self._places.tokens][None]

    def join(self, padded: Tensor) -> Tensor:
        """The tokens of all sequences in one row, `[B, L, ...]` to `[1, N, ...]`."""
        flat = padded.flatten(0, 1)
        joined: Tensor = flat if self.full else _Join.apply(flat, self._places)
        return joined[None]

    def split(self, joined: Tensor) -> Tensor:
        """One sequence a row, `[1, N, ...]` to `[B, L, ...]`.

        At padding there are the states of some token. What becomes of them there has no gradient.
        """
        flat = joined.flatten(0, 1)
        padded: Tensor = flat if self.full else _Split.apply(flat, self._places)
        return padded.unflatten(0, self.mask.shape)


class SequencePair:
    """What attends to what: queries of one batch of sequences, keys of the same one or of their sources.

    Args:
        queries, keys: as many sequences each; the i-th sees the i-th only.
    """

    def __init__(self, queries: Sequences, keys: Sequences) -> None:
        self.queries, self.keys = queries, keys
        self._masks: dict[tuple[bool, int | None], Tensor | None] = {}

    def mask(self, *, causal: bool, window: int | None = None) -> Tensor | None:
        """True where a query sees a key, `[B, 1, L of queries or 1, L of keys]`; `None` where every query sees all.

        Args:
            causal: a token sees those up to itself only.
            window: it sees those less than so many places away only.
        """
        if (causal, window) not in self._masks:
            self._masks[causal, window] = self._new_mask(causal, window)
        return self._masks[causal, window]

    def _new_mask(self, causal: bool, window: int | None) -> Tensor | None:
        if self.keys.full and not causal and window is None:
            return None
        mask = self.keys.mask[:, None, None, :]
        if causal or window is not None:
            lengths = (sequences.mask.shape[1] for sequences in (self.queries, self.keys))
            places = [torch.arange(length, device=mask.device) for length in lengths]
            ahead = places[0][:, None] - places[1]
            mask = mask & (ahead >= 0) if causal else mask
            mask = mask if window is None else mask & (ahead.abs() < window)
        return mask


class _Places(NamedTuple):
    """Rows of the padded batch and of the tokens in one row.

    Attributes:
        tokens: where the tokens stand, `[N]`.
        sources: which token stands there, `[B * L]`; a neighbour at padding.
        padding: where there is none.
    """

    tokens: Tensor
    sources: Tensor
    padding: Tensor


# Each is the gradient of the other. Rows are selected, which is a plain copy: to place them takes a CPU longer.
class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, places: _Places) -> Tensor:
        ctx.places = places
        return states.index_select(0, places.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.places.sources).index_fill_(0, ctx.places.padding, 0), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, places: _Places) -> Tensor:
        ctx.places = places
        return states.index_select(0, places.sources)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.places.tokens), None
