"""The output layer of the decoding engine, for vocabularies of any size.

Logits are made and looked at in chunks that stay in the cache; `[rows, vocabulary]` is never written to memory. That
matters: with 250,000 tokens it would be half a gigabyte per step.

Shapes: R rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from enc2gen.generation.engine.linear import Precision, pack_linear

_CHUNK = 8192
_BLOCKS = 128
"""A chunk's columns are looked at in this many interleaved blocks; the largest of each is found first."""


class Top(NamedTuple):
    """The likeliest tokens of each row.

    Attributes:
        log_probabilities: `[R, k]`, in nats, falling.
        tokens: `[R, k]`.
    """

    log_probabilities: Tensor
    tokens: Tensor


class OutputHead:
    """p(token | state) = softmax(W state + b) over the vocabulary, or over a shortlist of it.

    Args:
        weight: `[V, H]`; bias: `[V]` or none.
        precision: of the product; what follows is float32.
        shortlist: sorted token ids, the only ones to be written; all by default.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, precision: Precision, *, shortlist: Tensor | None = None
    ) -> None:
        self.shortlist = None if shortlist is None else shortlist.to(weight.device)
        if self.shortlist is not None:
            weight = weight.index_select(0, self.shortlist)
            bias = None if bias is None else bias.index_select(0, self.shortlist)
        self.vocabulary = len(weight)
        self._weight, self._bias = weight, bias
        starts = range(0, self.vocabulary, _CHUNK)
        self._chunks = [
            (start, pack_linear(weight[start : start + _CHUNK], _part(bias, start), precision)) for start in starts
        ]

    def logits(self, states: Tensor) -> Tensor:
        """All logits, `[R, V]` in float32; columns are those of the shortlist where there is one."""
        return torch.cat([multiply(states) for _, multiply in self._chunks], dim=1).float()

    def top(self, states: Tensor, count: int) -> Top:
        """The `count` likeliest tokens (all, if there are fewer) of each row of `states` `[R, H]`."""
        values, tokens, sums = [], [], []
        for start, multiply in self._chunks:
            logits = multiply(states).float()
            sums.append(torch.logsumexp(logits, dim=1))
            best, where = _largest(logits, min(count, logits.shape[1]))
            values.append(best)
            tokens.append(where + start)
        merged, order = torch.cat(values, dim=1).topk(min(count, self.vocabulary), dim=1)
        total = torch.logsumexp(torch.stack(sums, dim=1), dim=1, keepdim=True)
        return Top(merged - total, self.ids(torch.cat(tokens, dim=1).gather(1, order)))

    def likeliest(self, states: Tensor) -> Tensor:
        """The likeliest token of each row, `[R]`; no probability is computed."""
        best, tokens = [], []
        for start, multiply in self._chunks:
            value, where = multiply(states).max(dim=1)
            best.append(value)
            tokens.append(where + start)
        chosen = torch.stack(best, dim=1).argmax(dim=1, keepdim=True)
        return self.ids(torch.stack(tokens, dim=1).gather(1, chosen).squeeze(1))

    def log_probabilities(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities of given tokens, `[R, n]`, in nats; -inf for tokens outside a shortlist.

        Args:
            states: `[R, H]`; tokens: ids, `[R, n]`.
        """
        sums = [torch.logsumexp(multiply(states).float(), dim=1) for _, multiply in self._chunks]
        total = torch.logsumexp(torch.stack(sums, dim=1), dim=1, keepdim=True)
        columns, known = self._columns(tokens)
        logits = torch.einsum("rnh,rh->rn", self._weight[columns].float(), states.float())
        if self._bias is not None:
            logits = logits + self._bias[columns].float()
        return (logits - total).masked_fill(~known, -torch.inf)

    def columns(self, tokens: Sequence[Collection[int]]) -> list[list[int]]:
        """Columns of `logits` that belong to tokens; those outside a shortlist have none."""
        found = []
        for ids in tokens:
            columns, known = self._columns(torch.tensor(sorted(ids), dtype=torch.long, device=self._weight.device))
            found.append(columns[known].tolist())
        return found

    def ids(self, columns: Tensor) -> Tensor:
        """Tokens that belong to columns of `logits`."""
        return columns if self.shortlist is None else self.shortlist[columns]

    def _columns(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of tokens, and whether there are any; a token outside the shortlist is given column 0."""
        if self.shortlist is None:
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        columns = torch.searchsorted(self.shortlist, tokens).clamp_max(len(self.shortlist) - 1)
        known = self.shortlist[columns] == tokens
        return columns.masked_fill(~known, 0), known


def _part(bias: Tensor | None, start: int) -> Tensor | None:
    return None if bias is None else bias[start : start + _CHUNK]


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the `count` largest of each row, in any order.

    They lie in the `count` blocks with the largest maxima, so that only those are sorted.
    """
    rows, columns = logits.shape
    if columns % _BLOCKS or count >= _BLOCKS or columns <= 2 * _BLOCKS:
        return torch.topk(logits, count, dim=1)
    blocks = logits.view(rows, -1, _BLOCKS)  # block b holds the columns b, b + _BLOCKS, ...
    chosen = blocks.amax(dim=1).topk(count, dim=1).indices  # [R, count]
    inside = blocks.gather(2, chosen[:, None].expand(-1, blocks.shape[1], -1)).flatten(1)
    values, places = inside.topk(count, dim=1)
    return values, places // count * _BLOCKS + chosen.gather(1, places % count)
