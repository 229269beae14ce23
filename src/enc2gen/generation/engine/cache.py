"""What the decoding engine remembers of each source and each hypothesis.

Beams share one cache a source. Every token that any beam has ever read has a slot; which slots a beam sees is one row
of a mask. A beam that continues another one takes over that one's row, so keys and values are never copied between
beams, and a slot that no beam sees any more is left out when the cache is next compacted.

Shapes: B sources, K beams, Q queries a source (beams x new tokens), A heads of keys and values, C slots, D head size,
S source length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]

_GROW = 32
_COMPACT_EVERY = 64
_COMPACT_BELOW = 0.6
"""After so many new slots, the cache is compacted if the fullest source uses less than this share of it."""


@dataclass
class DecoderState:
    """A batch of sources in the middle of decoding.

    Attributes:
        cross: for each layer, keys and values of the source, `[B, A, S, D]`, computed once a source.
        source_mask: 0 on source tokens and -inf on padding, `[B, 1, 1, S]`.
        visible: `[B, K, C]`, which slots each beam sees.
        slots: `[B, C]`, the position in its text of the token in each slot.
        lengths: `[B]`, tokens read so far, the same for all beams of a source.
        keys_values: for each layer `[B, A, capacity, D]`, of which the first C slots are in use.
    """

    cross: list[KeysValues]
    source_mask: Tensor
    visible: Tensor
    slots: Tensor
    lengths: Tensor
    keys_values: list[KeysValues] = field(default_factory=list)
    _compact_at: int = _COMPACT_EVERY

    @classmethod
    def start(cls, cross: list[KeysValues], source_mask: Tensor) -> DecoderState:
        """Nothing read yet, one beam a source; `source_mask` `[B, S]` is 1 on source tokens."""
        rows, device = len(source_mask), source_mask.device
        dtype = cross[0][0].dtype
        hidden = torch.zeros(source_mask.shape, dtype=dtype, device=device)
        hidden.masked_fill_(source_mask == 0, torch.finfo(dtype).min)
        return cls(
            cross=cross,
            source_mask=hidden[:, None, None],
            visible=torch.zeros(rows, 1, 0, dtype=torch.bool, device=device),
            slots=torch.zeros(rows, 0, dtype=torch.long, device=device),
            lengths=torch.zeros(rows, dtype=torch.long, device=device),
        )

    def expand(self, beams: int) -> None:
        """From one beam a source to `beams` equal ones; nothing is copied but the mask."""
        self.visible = self.visible.repeat(1, beams, 1)

    def reorder(self, parents: Tensor) -> None:
        """Beam k goes on from what was beam `parents[b, k]`, `[B, K]`."""
        self.visible = self.visible.gather(1, parents[..., None].expand(-1, -1, self.visible.shape[2]))

    def select(self, rows: Tensor) -> None:
        """Keep these sources only, `[B']`."""
        used = self.visible.shape[2]
        self.cross = [(keys[rows], values[rows]) for keys, values in self.cross]
        self.keys_values = [(keys[:, :, :used][rows], values[:, :, :used][rows]) for keys, values in self.keys_values]
        for name in ("source_mask", "visible", "slots", "lengths"):
            setattr(self, name, getattr(self, name)[rows])
        self._trim_sources()

    def _trim_sources(self) -> None:
        """Shorten what is read of the sources to the longest that is left."""
        longest = int((self.source_mask == 0).sum(-1).max())
        if longest < self.source_mask.shape[-1] and bool((self.source_mask[..., longest:] != 0).all()):
            self.source_mask = self.source_mask[..., :longest].contiguous()
            self.cross = [
                (keys[:, :, :longest].contiguous(), values[:, :, :longest].contiguous()) for keys, values in self.cross
            ]

    def open_slots(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Make room for `tokens` new tokens of every beam, each of which sees what its beam sees and those before it.

        Returns:
            positions of the new tokens, `[B, K x tokens]`, and which slots each sees, `[B, K x tokens, C]`.
        """
        self._compact()
        rows, beams, _ = self.visible.shape
        device = self.visible.device
        order = torch.arange(tokens, device=device)
        positions = (self.lengths[:, None, None] + order).expand(rows, beams, tokens).reshape(rows, -1)
        same_beam = torch.eye(beams, dtype=torch.bool, device=device)[:, None, :, None]
        own = same_beam & (order[:, None, None] >= order)  # [K, tokens, K, tokens]
        own = own.reshape(beams * tokens, beams * tokens).expand(rows, -1, -1)
        seen = torch.cat([self.visible.repeat_interleave(tokens, dim=1), own], dim=2)
        self.visible = seen.view(rows, beams, tokens, -1)[:, :, -1]
        self.slots = torch.cat([self.slots, positions], dim=1)
        self.lengths = self.lengths + tokens
        return positions, seen

    def room(self, layer: int) -> KeysValues:
        """Keys and values of all slots of `layer`, `[B, A, C, D]`; those of the newest slots are to be written."""
        end = self.slots.shape[1]
        if layer == len(self.keys_values):
            keys, values = self.cross[layer]
            self.keys_values.append((_room(keys, end), _room(values, end)))
        elif self.keys_values[layer][0].shape[2] < end:
            old_keys, old_values = self.keys_values[layer]
            self.keys_values[layer] = (_larger(old_keys, 2 * end), _larger(old_values, 2 * end))
        keys, values = self.keys_values[layer]
        return keys[:, :, :end], values[:, :, :end]

    def forget(self, tokens: Tensor) -> None:
        """Take back the last `tokens` `[B]` tokens of each source (one beam), which turned out not to be wanted."""
        self.lengths = self.lengths - tokens
        self.visible = self.visible & (self.slots < self.lengths[:, None])[:, None]

    def _compact(self) -> None:
        """Leave out slots that no beam sees; sources keep equally many, the fullest one all of its own."""
        used = self.visible.shape[2]
        if used < self._compact_at:
            return
        wanted = self.visible.any(dim=1)
        most = int(wanted.sum(dim=1).max())
        worth_it = most <= _COMPACT_BELOW * used
        self._compact_at = (most if worth_it else used) + _COMPACT_EVERY
        if not worth_it:
            return
        kept = wanted.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :most]  # [B, most]
        self.visible = self.visible.gather(2, kept[:, None].expand(-1, self.visible.shape[1], -1))
        self.slots = self.slots.gather(1, kept)
        for layer, (keys, values) in enumerate(self.keys_values):
            index = kept[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            self.keys_values[layer] = (keys.gather(2, index), values.gather(2, index))


def _room(like: Tensor, slots: int) -> Tensor:
    rows, heads, _, size = like.shape
    return like.new_empty(rows, heads, -(-slots // _GROW) * _GROW, size)


def _larger(old: Tensor, slots: int) -> Tensor:
    new = _room(old, slots)
    new[:, :, : old.shape[2]] = old
    return new
