"""Mixing streams: which stream, and which of its items, stands at each position of the training data.

A stream is a data source under one objective, named `"objective:languages"` ("translation:en-kk",
"denoising:kk"). Everything here is a function of (sizes, alpha, weights, seed, position), never of the past.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from enc2gen.errors import CheckpointError, ConfigError, DataError

# Positions per block: the choices of one block are drawn together (our choice). A block is counted in about
# 0.1 ms, so the 11 million positions of the paper's pretraining are counted anew in a fraction of a second.
BLOCK = 4096
# First words of the seeds of independent random sequences. batching.py uses 3 and 4.
_CHOICE, _PERMUTATION = 1, 2


class MixtureConfig(BaseModel):
    """How streams are mixed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: float = Field(
        default=0.3,
        ge=0.0,
        description="exponent of the stream's share of the data: 1 keeps the shares, 0 makes all streams "
        "equal (0.3: XLM-SWCM, arXiv 2502.10852, section 3.2)",
    )
    objective_weights: dict[str, float] = Field(
        default_factory=dict,
        description="share of each objective; alpha then mixes the streams within it. Empty: alpha mixes all streams",
    )


def objective_of(stream: str) -> str:
    """The objective of a stream: "denoising" of "denoising:kk"."""
    return stream.partition(":")[0]


def mixture_probabilities(
    sizes: Mapping[str, int], alpha: float = 0.3, objective_weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Sampling probability of each stream: p_i = q_i^alpha / sum_j q_j^alpha, q_i its share of all items.

    The formula and alpha = 0.3 are those of XLM-SWCM (arXiv 2502.10852, section 3.2). With
    `objective_weights` it holds within each objective, and the objectives share the mass in proportion to
    their weights.

    Raises:
        DataError: no stream, or a stream without items.
        ConfigError: negative alpha; weights that are negative or all zero, that leave out an objective present, or
            that give one that is not present more than 0.
    """
    if not sizes:
        raise DataError("there is no stream to sample from", remedy="give at least one corpus")
    for stream, size in sizes.items():
        if size < 1:
            raise DataError(f"stream {stream!r} has no items", remedy="remove it, or check why it is empty")
    if not 0 <= alpha < math.inf:
        raise ConfigError(f"alpha is {alpha}, but must be 0 or more")
    if not objective_weights:
        return _tempered(sizes, alpha)
    _check_weights(objective_weights, {objective_of(stream) for stream in sizes})
    whole = sum(objective_weights.values())
    probabilities: dict[str, float] = {}
    for objective, weight in objective_weights.items():
        siblings = {stream: size for stream, size in sizes.items() if objective_of(stream) == objective}
        if not siblings:  # weighed with 0
            continue
        for stream, share in _tempered(siblings, alpha).items():
            probabilities[stream] = share * weight / whole
    return {stream: probabilities[stream] for stream in sizes}


def _tempered(sizes: Mapping[str, int], alpha: float) -> dict[str, float]:
    # Relative to the largest rather than to the total, which cancels out: no power underflows to a sum of
    # zero.
    largest = max(sizes.values())
    powers = {stream: (size / largest) ** alpha for stream, size in sizes.items()}
    normaliser = sum(powers.values())
    return {stream: power / normaliser for stream, power in powers.items()}


def _check_weights(weights: Mapping[str, float], objectives: set[str]) -> None:
    for objective, weight in weights.items():
        if objective not in objectives and weight != 0:
            close = difflib.get_close_matches(objective, objectives, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(
                f"objective_weights names {objective!r}, which no stream has",
                remedy=f"{hint}objectives present: {', '.join(sorted(objectives))}",
            )
    if missing := sorted(objectives - set(weights)):
        raise ConfigError(
            f"objective_weights has no weight for {', '.join(missing)}", remedy="give one (0 leaves it out)"
        )
    if not all(0 <= weight < math.inf for weight in weights.values()) or not sum(weights.values()) > 0:
        raise ConfigError(f"objective_weights must be 0 or more, and one above 0: {dict(weights)}")


class MixtureSampler:
    """Counter-based sampler: `sample(i)` is the i-th (stream, item) of an infinite sequence.

    Streams are drawn independently with the probabilities of :func:`mixture_probabilities`. Within a stream
    every epoch is a fresh permutation of its items, so an item returns only after all others were seen. The
    permutations in use are kept in memory: at most 8 bytes for each item of the data.

    `sample` is a pure function of its index. To know how often a stream was drawn before, it counts blocks of
    choices from the block it counted last; `state_dict` saves such a count, so that a resumed run need not
    count from zero. Positions are therefore cheap to visit in ascending order.

    Args:
        sizes: number of items of each stream.
        alpha, objective_weights: see :class:`MixtureConfig`.
        seed: 0 or more.

    Raises:
        DataError, ConfigError: as :func:`mixture_probabilities`.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        alpha: float = 0.3,
        seed: int = 0,
        objective_weights: Mapping[str, float] | None = None,
    ) -> None:
        if seed < 0:
            raise ConfigError(f"seed is {seed}, but must be 0 or more")
        self.probabilities = mixture_probabilities(sizes, alpha, objective_weights)
        self.streams = sorted(sizes)
        self.sizes = {stream: int(sizes[stream]) for stream in self.streams}
        self.seed = seed
        edges = np.cumsum([self.probabilities[stream] for stream in self.streams])
        self._edges = edges[:-1] / edges[-1]
        self._origin = (0, np.zeros(len(self.streams), dtype=np.int64))
        self._counted = self._origin
        self._choices: tuple[int, np.ndarray, np.ndarray] | None = None
        self._permutations: dict[str, tuple[int, np.ndarray]] = {}

    def sample(self, index: int) -> tuple[str, int]:
        """The stream at position `index` (0 or more) and the item drawn from it."""
        if index < 0:
            raise IndexError(f"position {index} is negative")
        block, offset = divmod(index, BLOCK)
        if self._choices is None or self._choices[0] != block:
            choices = self._choose(block)
            self._choices = (block, choices, self._drawn_within(choices) + self._drawn_before(block)[choices])
        _, choices, draws = self._choices
        stream = self.streams[choices[offset]]
        epoch, place = divmod(int(draws[offset]), self.sizes[stream])
        return stream, int(self._permutation(stream, epoch)[place])

    def state_dict(self, index: int = 0) -> dict[str, Any]:
        """JSON-able count of draws before the block that holds position `index`."""
        block = index // BLOCK
        counts = self._drawn_before(block)
        return {"block": block, "drawn": dict(zip(self.streams, counts.tolist(), strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start counting from a saved count.

        Raises:
            CheckpointError: the state is malformed or of other streams.
        """
        try:
            block, drawn = int(state["block"]), {str(name): int(n) for name, n in state["drawn"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the mixture's state is malformed: {error!r}") from error
        if sorted(drawn) != self.streams:
            raise CheckpointError(
                f"the mixture's state is of the streams {sorted(drawn)}, not {self.streams}",
                remedy="resume with the data the run was started with",
            )
        counts = np.array([drawn[stream] for stream in self.streams], dtype=np.int64)
        if block < 0 or counts.min() < 0 or counts.sum() != block * BLOCK:
            raise CheckpointError(f"the mixture's state does not add up: {dict(state)}")
        self._counted = (block, counts)
        self._choices = None

    def _choose(self, block: int) -> np.ndarray:
        """Stream numbers at the positions of a block. *Shape:* `[BLOCK]`."""
        draws = np.random.default_rng([self.seed, _CHOICE, block]).random(BLOCK)
        return np.searchsorted(self._edges, draws, side="right")

    def _drawn_within(self, choices: np.ndarray) -> np.ndarray:
        """How often each position's stream occurs earlier in the block. *Shape:* `[BLOCK]`."""
        order = np.argsort(choices, kind="stable")
        ordered = choices[order]
        starts = np.searchsorted(ordered, ordered, side="left")
        within = np.empty(BLOCK, dtype=np.int64)
        within[order] = np.arange(BLOCK) - starts
        return within

    def _drawn_before(self, block: int) -> np.ndarray:
        """Draws of each stream before `block`. *Shape:* `[streams]`."""
        start, counts = self._counted if self._counted[0] <= block else self._origin
        for earlier in range(start, block):
            counts = counts + np.bincount(self._choose(earlier), minlength=len(self.streams))
        self._counted = (block, counts)
        return counts

    def _permutation(self, stream: str, epoch: int) -> np.ndarray:
        held = self._permutations.get(stream)
        if held is None or held[0] != epoch:
            # Seeded by the stream's name: adding another stream leaves this one's order as it was.
            name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big")
            rng = np.random.default_rng([self.seed, _PERMUTATION, name, epoch])
            held = (epoch, rng.permutation(self.sizes[stream]))
            self._permutations[stream] = held
        return held[1]
