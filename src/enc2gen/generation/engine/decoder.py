"""The grown decoder in the form in which it decodes: weights packed, one call a step, nothing else in the way.

It computes what :class:`enc2gen.models.swcm.decoder.SwcmDecoder` computes in evaluation mode. Cross-attention's keys
and values are projected once a source and are shared by its beams, which are queries of one attention.

Shapes: B sources, K beams, T new tokens of each beam, Q = K x T queries, S source length, H hidden size, A heads,
G heads of keys and values, D head size, C slots of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from enc2gen.generation.engine.cache import DecoderState, KeysValues
from enc2gen.generation.engine.linear import Precision, pack_module, stack_modules, states_dtype
from enc2gen.models.compilation import compiled
from enc2gen.models.swcm.attention import Attention, Rotation, rotate, rotation_at
from enc2gen.models.swcm.decoder import SwcmDecoder
from enc2gen.models.swcm.ffn import FeedForward, GatedFeedForward
from enc2gen.models.swcm.layers import DecoderLayer

Normalise = Callable[[Tensor], Tensor]


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """softmax(Q K^T + mask) V, without copies of keys and values for heads that share them.

    Args:
        query: scaled, `[B, Q, A, D]`; keys, values: `[B, G, C, D]`; mask: additive, `[B, 1, Q, C]` or `[B, 1, 1, C]`.

    Returns:
        `[B, Q, A, D]`.
    """
    rows, queries, heads, size = query.shape
    groups = keys.shape[1]
    folded = query.view(rows, queries, groups, heads // groups, size).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(rows, groups, -1, size)  # [B, G, A / G x Q, D]
    if heads > groups and mask.shape[2] > 1:
        mask = mask.repeat(1, 1, heads // groups, 1)
    scores = torch.matmul(folded, keys.transpose(2, 3)).add_(mask)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    mixed = torch.matmul(weights, values).view(rows, groups, heads // groups, queries, size)
    return mixed.permute(0, 3, 1, 2, 4).reshape(rows, queries, heads, size)


def _head_norm(module: nn.Module | None) -> Normalise:
    """RMSNorm of each head's queries or keys, `[..., D]`; nothing where the decoder has none."""
    if module is None:
        return lambda states: states
    norm = cast(nn.RMSNorm, module)
    gain, shape, eps = norm.weight.detach(), list(norm.normalized_shape), norm.eps
    return lambda states: nn.functional.rms_norm(states, shape, gain.to(states.dtype), eps)


class _SelfAttention:
    """Self-attention over the cache; queries, keys and values are one product."""

    def __init__(self, module: Attention, precision: Precision) -> None:
        self._project = stack_modules([module.q_proj, module.k_proj, module.v_proj], precision)
        self._output = pack_module(module.out_proj, precision)
        self._heads = module.q_proj.out_features // module.head_dim
        self._groups = module.k_proj.out_features // module.head_dim
        self._size, self._scale = module.head_dim, module.scaling
        self._query_norm, self._key_norm = _head_norm(module.q_norm), _head_norm(module.k_norm)

    def __call__(self, states: Tensor, cache: KeysValues, mask: Tensor, rotation: Rotation | None) -> Tensor:
        rows, queries, _ = states.shape
        mixed = self._project(states.flatten(0, 1)).view(rows, queries, -1, self._size)
        query, key, value = mixed.split([self._heads, self._groups, self._groups], dim=2)
        query, key = self._query_norm(query), self._key_norm(key)
        if rotation is not None:
            query, key = _rotated(query, rotation), _rotated(key, rotation)
        keys, values = cache
        keys[:, :, -queries:], values[:, :, -queries:] = key.transpose(1, 2), value.transpose(1, 2)
        return self._output(attend(query * self._scale, keys, values, mask).reshape(rows * queries, -1))


class _CrossAttention:
    """Attention to the source, whose keys and values are there already."""

    def __init__(self, module: Attention, precision: Precision) -> None:
        self._query = pack_module(module.q_proj, precision)
        self._source = stack_modules([module.k_proj, module.v_proj], precision)
        self._output = pack_module(module.out_proj, precision)
        self._size, self._scale = module.head_dim, module.scaling
        self._query_norm, self._key_norm = _head_norm(module.q_norm), _head_norm(module.k_norm)

    def read(self, encoded: Tensor) -> KeysValues:
        """Keys and values `[B, G, S, D]` of encoder states `[B, S, H]`."""
        rows, length, _ = encoded.shape
        mixed = self._source(encoded.flatten(0, 1)).view(rows, length, 2, -1, self._size)
        keys, values = mixed.permute(2, 0, 3, 1, 4).contiguous()
        return self._key_norm(keys), values

    def __call__(self, states: Tensor, source: KeysValues, mask: Tensor) -> Tensor:
        rows, queries, _ = states.shape
        return self._output(attend(self._scaled_queries(states), *source, mask).reshape(rows * queries, -1))

    def _scaled_queries(self, states: Tensor) -> Tensor:
        # [B, Q, H] -> [B, Q, A, D]
        query = self._query(states.flatten(0, 1)).view(*states.shape[:2], -1, self._size)
        return self._query_norm(query) * self._scale

    def weights(self, states: Tensor, source: KeysValues, mask: Tensor) -> Tensor:
        """How much of its attention each query pays to each source token, mean over heads: `[B, Q, S]`."""
        query = self._scaled_queries(states)
        keys = source[0].repeat_interleave(query.shape[2] // source[0].shape[1], dim=1)
        return (torch.matmul(query.transpose(1, 2), keys.transpose(2, 3)) + mask).softmax(dim=-1).mean(dim=1)


class _FeedForward:
    def __init__(self, module: nn.Module, precision: Precision) -> None:
        if isinstance(module, GatedFeedForward):
            self._enter = stack_modules([module.gate_proj, module.up_proj], precision)
            self._leave = pack_module(module.down_proj, precision)
        else:
            plain = cast(FeedForward, module)
            self._enter, self._leave = pack_module(plain.fc1, precision), pack_module(plain.fc2, precision)
        self._gated = isinstance(module, GatedFeedForward)
        self._activation = cast(Any, module).activation

    def __call__(self, states: Tensor) -> Tensor:
        inner = self._enter(states.flatten(0, 1))
        if self._gated:
            gate, up = inner.chunk(2, dim=-1)
            return self._leave(self._activation(gate) * up)
        return self._leave(self._activation(inner))


class _Layer:
    """One decoder layer: its sub-layers in order, each with its residual and norm."""

    def __init__(self, layer: DecoderLayer, precision: Precision, normal: Callable[[nn.Module], Normalise]) -> None:
        self.window, self.theta, self._pre = layer.sliding_window, layer.rope_theta, layer.pre_norm
        kinds: dict[str, Any] = {"self_attention": _SelfAttention, "cross_attention": _CrossAttention}
        self._parts = [
            (
                name,
                kinds.get(name, _FeedForward)(layer.get_submodule(name), precision),
                normal(layer.get_submodule(f"{name}_norm")),
            )
            for name in layer.sublayers
        ]
        self.cross: _CrossAttention = next(part for name, part, _ in self._parts if name == "cross_attention")

    def __call__(self, states: Tensor, around: _Surroundings, watch: list[Tensor] | None) -> Tensor:
        for name, part, norm in self._parts:
            entering = norm(states) if self._pre else states
            if name == "self_attention":
                out = part(entering, around.cache, around.mask, around.rotation)
            elif name == "cross_attention":
                out = part(entering, around.source, around.source_mask)
                if watch is not None:
                    watch.append(part.weights(entering, around.source, around.source_mask))
            else:
                out = part(entering)
            states = out.view_as(states).add_(states)
            if not self._pre:
                states = norm(states)
        return states


class _Surroundings(NamedTuple):
    """What a layer meets in one step besides the states. No number of its place is in it: layers share a compilation.

    Attributes:
        cache: keys and values of all slots, the new ones still to be written; mask: of self-attention.
        rotation: at the new positions.
        source: keys and values of the source; source_mask: of their padding.
    """

    cache: KeysValues
    mask: Tensor
    rotation: Rotation | None
    source: KeysValues
    source_mask: Tensor


class _Step:
    """What all layers share in one step: masks by window, rotations by base, each computed once."""

    def __init__(self, state: DecoderState, tokens: int, dtype: torch.dtype, head_dim: int) -> None:
        self.state, self._dtype, self._size = state, dtype, head_dim
        self.positions, self._seen = state.open_slots(tokens)
        self._masks: dict[int | None, Tensor] = {}
        self._rotations: dict[float, Rotation] = {}

    def around(self, layer: _Layer, index: int) -> _Surroundings:
        """What the `index`-th layer meets."""
        cache, mask, rotation = self.state.room(index), self.mask(layer.window), self.rotation(layer.theta)
        return _Surroundings(cache, mask, rotation, self.state.cross[index], self.state.source_mask)

    def mask(self, window: int | None) -> Tensor:
        """Additive mask `[B, 1, Q, C]`: hypotheses of their own past, as far back as `window`."""
        if window not in self._masks:
            seen = self._seen
            if window is not None:
                seen = seen & (self.positions[..., None] - self.state.slots[:, None] < window)
            mask = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
            self._masks[window] = mask.masked_fill_(~seen, torch.finfo(self._dtype).min)[:, None]
        return self._masks[window]

    def rotation(self, theta: float | None) -> Rotation | None:
        """Angles at the new positions; none where the layer has no rotary positions."""
        if theta is None:
            return None
        if theta not in self._rotations:
            self._rotations[theta] = rotation_at(self.positions, theta, self._size)
        return self._rotations[theta]


def _rotated(states: Tensor, rotation: Rotation) -> Tensor:
    """Rotate `[B, Q, A, D]`."""
    return rotate(states.transpose(1, 2), rotation).transpose(1, 2)


class EngineDecoder:
    """A decoder whose weights are packed for decoding. The weights are read once; later changes are not seen.

    Args:
        decoder: of a `SwcmForConditionalGeneration`, on the device where it is to run.
        precision: of the products.
        compiles: whether layers are compiled when they are first used; not with oneDNN's products.
    """

    def __init__(self, decoder: SwcmDecoder, precision: Precision, *, compiles: bool = False) -> None:
        self._decoder = decoder
        self._through = compiled(_Layer.__call__) if compiles else _Layer.__call__
        config = decoder.config
        self._size = config.head_dim or config.hidden_size // config.num_attention_heads
        self.dtype = states_dtype(decoder.embed_tokens.weight.device, precision)
        layers = cast(Any, decoder.layers)
        self._layers = [_Layer(layer, precision, self._norm) for layer in layers]
        self._final = self._norm(decoder.final_norm) if decoder.final_norm is not None else None
        self._limit = config.max_position_embeddings - config.position_offset

    @property
    def longest(self) -> int:
        """Most target tokens, the start included, that there are positions for."""
        return int(self._limit)

    def _norm(self, module: nn.Module) -> Normalise:
        if isinstance(module, nn.Identity):
            return module
        scale, shift = cast(Tensor, module.weight), cast("Tensor | None", getattr(module, "bias", None))
        weight, bias = scale.detach().to(self.dtype), None if shift is None else shift.detach().to(self.dtype)
        eps = cast(float, module.eps)
        shape = [self._decoder.config.hidden_size]
        if isinstance(module, nn.LayerNorm):
            return lambda states: nn.functional.layer_norm(states, shape, weight, bias, eps)
        return lambda states: nn.functional.rms_norm(states, shape, weight, eps)

    def start(self, encoded: Tensor, source_mask: Tensor) -> DecoderState:
        """Read sources: encoder states `[B, S, H]` and their mask `[B, S]`, 1 on tokens."""
        encoded = encoded.to(self.dtype)
        return DecoderState.start([layer.cross.read(encoded) for layer in self._layers], source_mask)

    def step(self, state: DecoderState, tokens: Tensor, *, watch: bool = False) -> tuple[Tensor, Tensor | None]:
        """Read new tokens `[B, K, T]`.

        Args:
            watch: also return how attention is spread over the source.

        Returns:
            States that predict what follows each token, `[B, K, T, H]`, and attention of the last layer to the source,
            mean over its heads, `[B, K, T, S]`.
        """
        rows, beams, length = tokens.shape
        step = _Step(state, length, self.dtype, self._size)
        states = self._embed(tokens.reshape(rows, -1), step.positions)
        watched: list[Tensor] | None = None
        for index, layer in enumerate(self._layers):
            watched = [] if watch and index == len(self._layers) - 1 else None
            states = self._through(layer, states, step.around(layer, index), watched)
        if self._final is not None:
            states = self._final(states)
        seen = watched[0].view(rows, beams, length, -1) if watched else None
        return states.view(rows, beams, length, -1), seen

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As `SwcmDecoder.embed` (its dropout does nothing in evaluation mode), in the engine's type."""
        embedded = self._decoder.embed(tokens, None, positions + self._decoder.config.position_offset)
        return embedded.to(self.dtype)
