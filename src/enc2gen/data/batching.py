"""From encoded examples to padded batches, and the endless training stream that resumes at any batch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import LongTensor, Tensor

from enc2gen.data.mixture import MixtureSampler
from enc2gen.data.protocols import BatchExample, TrainingBatch
from enc2gen.errors import CheckpointError, DataError
from enc2gen.tokenization.examples import IGNORED_LABEL, EncodedExample

# First words of the seeds of independent random sequences. mixture.py uses 1 and 2.
_EXAMPLE, _BUFFER = 3, 4

T_co = TypeVar("T_co", covariant=True)


class IndexedSource(Protocol[T_co]):
    """Where items come from: a list, or anything indexable such as a memory-mapped `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


def source_fingerprint(source: IndexedSource[Any]) -> str:
    """Hash of a source's items in their order; a `datasets.Dataset` brings its own, from its cache."""
    own = getattr(source, "_fingerprint", None)
    if isinstance(own, str):
        return own
    digest = hashlib.sha256()
    for index in range(len(source)):
        item = repr(source[index]).encode("utf-8", "surrogatepass")
        digest.update(len(item).to_bytes(8, "big") + item)
    return digest.hexdigest()


@dataclass
class Batch:
    """Padded examples. *Shape* of all tensors: `[batch, length]`; source and target each have their length.

    Attributes:
        input_ids, attention_mask: source; the mask is 1 on tokens and 0 on padding.
        decoder_input_ids, decoder_attention_mask: what the decoder reads.
        labels: what it should write; padding is -100, which the loss ignores.
        order: in evaluation batches, each row's place among the examples given; else empty.
    """

    input_ids: Tensor
    attention_mask: Tensor
    decoder_input_ids: Tensor
    decoder_attention_mask: Tensor
    labels: Tensor
    order: tuple[int, ...] = ()

    @property
    def num_target_tokens(self) -> int:
        """Labels that count in the loss."""
        return int((self.labels != IGNORED_LABEL).sum())

    @property
    def num_tokens(self) -> int:
        """Source and target tokens, padding not counted."""
        return int(self.attention_mask.sum()) + int(self.decoder_attention_mask.sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        tensors = {name: tensor.to(device) for name, tensor in self.as_model_inputs().items()}
        return Batch(**tensors, order=self.order)

    def as_model_inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a sequence-to-sequence model's `forward`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "decoder_input_ids": self.decoder_input_ids,
            "decoder_attention_mask": self.decoder_attention_mask,
            "labels": self.labels,
        }


def collate(examples: Sequence[EncodedExample], pad_token_id: int, *, order: Sequence[int] = ()) -> Batch:
    """Pad examples on the right to a batch.

    Raises:
        DataError: no examples.
    """
    if not examples:
        raise DataError("a batch needs at least one example")
    sources = [example.input_ids for example in examples]
    targets = [example.labels for example in examples]
    return Batch(
        input_ids=_padded(sources, pad_token_id),
        attention_mask=_mask(sources),
        decoder_input_ids=_padded([example.decoder_input_ids for example in examples], pad_token_id),
        decoder_attention_mask=_mask(targets),
        labels=_padded(targets, IGNORED_LABEL),
        order=tuple(order),
    )


def _padded(rows: Sequence[Sequence[int]], padding: int) -> LongTensor:
    width = max(len(row) for row in rows)
    return LongTensor([[*row, *[padding] * (width - len(row))] for row in rows])


def _mask(rows: Sequence[Sequence[int]]) -> LongTensor:
    width = max(len(row) for row in rows)
    return LongTensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


class BatchingConfig(BaseModel):
    """How examples are put into batches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int | None = Field(
        default=4096,
        ge=1,
        description="largest batch in tokens with padding: rows x (longest source + longest target)",
    )
    max_examples: int | None = Field(default=None, ge=1, description="largest batch in examples")
    buffer_batches: int = Field(
        default=64,
        ge=1,
        description="batches' worth of examples that are sorted by length together (our choice); more means "
        "less padding and a longer wait for the first batch",
    )
    length_noise: float = Field(
        default=0.1,
        ge=0.0,
        le=1.0,
        description="lengths are multiplied by a random factor of up to 1 + this before sorting, so that "
        "examples of equal length do not always meet (our choice)",
    )

    @model_validator(mode="after")
    def _bounded(self) -> BatchingConfig:
        if self.max_tokens is None and self.max_examples is None:
            raise ValueError("give max_tokens or max_examples")
        return self


# Ratio of the longest to the shortest source in a band. Our choice: on simulated mixtures of translation,
# denoising and summarisation, 1.2 to 1.35 padded 12 % of the tokens, 1.1 or 1.5 14 %, and sorting by total
# length 32 %.
_BAND = 1.25


def _by_length(examples: Sequence[BatchExample], noise: float, rng: np.random.Generator) -> list[int]:
    """Indices of `examples` such that neighbours have similar sources and similar targets.

    Bands of similar source length follow each other, and within a band targets ascend and descend in turn, so
    that target lengths do not jump from band to band.
    """
    factors = 1.0 + noise * rng.random((2, len(examples)))
    sources = factors[0] * [example.source_length for example in examples]
    targets = factors[1] * [example.target_length for example in examples]
    bands = np.floor(np.log(sources) / math.log(_BAND))
    turns = np.where(bands % 2 == 0, 1, -1)
    return np.lexsort((turns * targets, bands)).tolist()


def _cut(
    examples: Sequence[BatchExample], order: Sequence[int], max_tokens: int | None, max_examples: int | None
) -> list[list[int]]:
    """Cut `order`, indices into `examples`, greedily into the largest runs that fit the budget."""
    batches: list[list[int]] = []
    source = target = 0
    for index in order:
        example = examples[index]
        source, target = max(source, example.source_length), max(target, example.target_length)
        rows = len(batches[-1]) + 1 if batches else 1
        full = max_examples is not None and rows > max_examples
        if not batches or full or (max_tokens is not None and rows * (source + target) > max_tokens):
            batches.append([])
            source, target = example.source_length, example.target_length
        batches[-1].append(index)
    return batches


def _check_length(example: BatchExample, max_tokens: int | None, where: str) -> None:
    source, target = example.source_length, example.target_length
    if max_tokens is not None and source + target > max_tokens:
        raise DataError(
            f"{f'{source} source and {target} target' if target else source} tokens do not fit into a "
            f"batch of at most {max_tokens} tokens",
            where=where,
            remedy=f"raise max_tokens to {source + target} or more, or lower the limits on the length of examples",
        )


def length_ordered(
    examples: Sequence[BatchExample], max_tokens: int | None, max_examples: int | None = None
) -> list[list[int]]:
    """Indices of all examples, longest first, cut into batches; raises as :func:`evaluation_batches`."""
    for index, example in enumerate(examples):
        _check_length(example, max_tokens, f"example {index}")
    order = sorted(
        range(len(examples)),
        key=lambda index: (-examples[index].source_length, -examples[index].target_length, index),
    )
    return _cut(examples, order, max_tokens, max_examples)


def evaluation_batches(
    examples: Sequence[EncodedExample],
    pad_token_id: int,
    max_tokens: int | None = 4096,
    max_examples: int | None = None,
) -> list[Batch]:
    """Batches of all examples, longest first (too large a budget fails at once); `Batch.order` leads back.

    Args:
        examples: in the order in which the results are wanted.
        pad_token_id: padding of sources and decoder inputs.
        max_tokens: as in :class:`BatchingConfig`.
        max_examples: as in :class:`BatchingConfig`.

    Raises:
        DataError: an example alone exceeds `max_tokens`.
    """
    cuts = length_ordered(examples, max_tokens, max_examples)
    return [collate([examples[index] for index in cut], pad_token_id, order=cut) for cut in cuts]


Encoder = Callable[[str, int, np.random.Generator], BatchExample]
Collate = Callable[[Sequence[Any], int], TrainingBatch]


class BatchStream:
    """Infinite, deterministic stream of training batches that resumes at any batch.

    The sampler says which item stands at each position; `encode` makes an example of it with a generator that
    depends on the seed and the position only, so that a position always has the same noise. A buffer of
    successive positions is ordered by length and cut into batches, which are shuffled; every position is in
    exactly one batch. The state is the buffer's first position and the number of batches taken from it.

    The stream has one position: all its iterators advance it together.

    Args:
        encode: `(stream, item, rng) -> example`.
        sampler: the mixture.
        pad_token_id: padding of sources and decoder inputs.
        config: budget and buffer.
        seed: 0 or more.
        fingerprint_parts: JSON-able description of everything `encode` depends on (hashes of the sources and
            of the tokenizer, noise rates, length limits): a state saved under other parts is refused.
        collate: makes a batch of examples and the padding id.

    Attributes:
        fingerprint: sha256 of the parts, the mixture, the configuration and the seed.
    """

    def __init__(
        self,
        encode: Encoder,
        sampler: MixtureSampler,
        pad_token_id: int,
        config: BatchingConfig,
        seed: int,
        fingerprint_parts: Mapping[str, Any],
        collate: Collate = collate,
    ) -> None:
        self._encode, self._sampler, self._pad_token_id, self._collate = encode, sampler, pad_token_id, collate
        self._config, self._seed = config, seed
        self._parts = {
            **{f"data.{name}": _digest(part) for name, part in fingerprint_parts.items()},
            **{f"batching.{name}": _digest(value) for name, value in config.model_dump().items()},
            "stream sizes": _digest(sampler.sizes),
            "mixture": _digest([sampler.probabilities[name] for name in sampler.streams]),
            "pad_token_id": _digest(pad_token_id),
            "seed": _digest([seed, sampler.seed]),
        }
        self.fingerprint = _digest(self._parts)
        self._start = self._taken = 0
        self._sampler_state = sampler.state_dict(0)
        self._buffer: list[BatchExample] = []
        self._batches: list[list[int]] = []

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        if not self._batches:
            self._fill()
        if self._taken == len(self._batches):
            self._start, self._taken = self._start + len(self._buffer), 0
            self._fill()
        batch = self._collate([self._buffer[index] for index in self._batches[self._taken]], self._pad_token_id)
        self._taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position: what follows is the batch after the last one returned."""
        return {
            "fingerprint": self.fingerprint,
            "parts": dict(self._parts),
            "buffer_start": self._start,
            "batches_taken": self._taken,
            "sampler": self._sampler_state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            CheckpointError: the state is malformed, or of other data or settings; it names what differs.
        """
        try:
            fingerprint, parts = state["fingerprint"], dict(state["parts"])
            start, taken, sampler = int(state["buffer_start"]), int(state["batches_taken"]), state["sampler"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the data position is malformed: {error!r}") from error
        if fingerprint != self.fingerprint:
            names = sorted(self._parts.keys() | parts.keys())
            said = {"data.tokenizer": "the vocabulary (data.tokenizer)"}
            changed = [said.get(name, name) for name in names if self._parts.get(name) != parts.get(name)]
            raise CheckpointError(
                f"the data position was saved with other data or settings; different: {', '.join(changed)}",
                remedy="resume with the data and settings of the interrupted run, or start in a new folder",
            )
        if start < 0:
            raise CheckpointError(f"the data position is malformed: it starts at {start}")
        self._sampler.load_state_dict(sampler)
        self._start, self._taken = start, taken
        self._fill()
        if not 0 <= taken <= len(self._batches):
            raise CheckpointError(f"the data position is malformed: {taken} batches taken of {len(self._batches)}")

    def _fill(self) -> None:
        """Encode the positions from `_start` until the buffer holds its share, and cut them into batches."""
        config, self._buffer, tokens = self._config, [], 0
        self._sampler_state = self._sampler.state_dict(self._start)
        while not self._is_full(len(self._buffer), tokens):
            position = self._start + len(self._buffer)
            stream, item = self._sampler.sample(position)
            rng = np.random.default_rng([self._seed, _EXAMPLE, position])
            example = self._encode(stream, item, rng)
            _check_length(example, config.max_tokens, f"item {item} of {stream!r}")
            self._buffer.append(example)
            tokens += example.source_length + example.target_length
        rng = np.random.default_rng([self._seed, _BUFFER, self._start])
        order = _by_length(self._buffer, config.length_noise, rng)
        cuts = _cut(self._buffer, order, config.max_tokens, config.max_examples)
        self._batches = [cuts[index] for index in rng.permutation(len(cuts))]

    def _is_full(self, examples: int, tokens: int) -> bool:
        config = self._config
        full = config.max_examples is not None and examples >= config.buffer_batches * config.max_examples
        return full or (config.max_tokens is not None and tokens >= config.buffer_batches * config.max_tokens)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
