"""Masked-LM examples: plain texts become blocks, words of a block are masked, the masked pieces are the labels.

Masking is dynamic (RoBERTa, arXiv 1907.11692, section 4.1): each time a block is drawn, other words are masked,
as a pure function of the seed and the position in the training data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import regex
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import LongTensor, Tensor
from transformers import PreTrainedTokenizerBase

from enc2gen.data.batching import (
    IGNORED_LABEL,
    BatchingConfig,
    BatchStream,
    IndexedSource,
    length_ordered,
    source_fingerprint,
)
from enc2gen.data.mixture import MixtureSampler
from enc2gen.data.text_blocks import TextBlocks, text_row
from enc2gen.errors import ConfigError, DataError, ModelError
from enc2gen.tokenization.tokenizer import protect_special_tokens

# A word of a text, by the rules of `noising.word_starts`: white space sets words apart; Tibetan syllables end
# with tsheg or shad; in scripts without spaces each letter with its marks stands alone.
_UNSPACED = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Han}\p{Hiragana}\p{Katakana}"
_ENDS = "\u0f0b\u0f0c\u0f0d\u0f0e"
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[^\s{_UNSPACED}{_ENDS}]+[{_ENDS}]*|[{_ENDS}]+")
_PROBES = 200  # texts that the number of characters per token is measured on (our choice)


class MaskingConfig(BaseModel):
    """What is masked in continued masked-LM pretraining."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mask_ratio: float = Field(
        default=0.3,
        gt=0,
        lt=1,
        description="share of the words that are predicted (0.3: ModernBERT, arXiv 2412.13663, section 2.2; "
        "BERT 0.15, arXiv 1810.04805, section 3.1; up to 0.4 pays: arXiv 2202.08005)",
    )
    mask_share: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="share of the predicted words whose pieces become mask tokens (BERT, arXiv 1810.04805, "
        "section 3.1: 0.8); 1 with random_share 0 masks them all",
    )
    random_share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of the predicted words whose pieces become random pieces (BERT: 0.1); what is left of "
        "1 stays as it is",
    )
    whole_words: bool = Field(
        default=True,
        description="mask all pieces of a word together (arXiv 1906.08101); a Tibetan syllable is a word, and so is "
        "each piece in scripts without spaces. False: each piece by itself",
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> MaskingConfig:
        if self.mask_share + self.random_share > 1:
            raise ValueError("mask_share and random_share together exceed 1")
        return self


@dataclass(frozen=True)
class MaskedExample:
    """One masked block: `labels[i]` is the piece hidden at i, or -100 where nothing is predicted.

    `covered` is the number of UTF-8 bytes, white space left out, under the predicted pieces; `unknown` the
    number of bytes under masked `<unk>` pieces, which are never predicted.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    covered: int = 0
    unknown: int = 0

    @property
    def source_length(self) -> int:
        """Tokens, special tokens included."""
        return len(self.input_ids)

    @property
    def target_length(self) -> int:
        """0: predictions take no length of their own."""
        return 0


@dataclass
class MaskedBatch:
    """Padded masked blocks.

    Attributes:
        input_ids, attention_mask: *Shape* `[batch, length]`; the mask is 1 on tokens and 0 on padding.
        predicted: bool, `[batch, length]`: where a piece is predicted.
        labels: the pieces there, row by row. *Shape* `[predicted]`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    predicted: Tensor
    labels: Tensor

    @property
    def num_target_tokens(self) -> int:
        """Pieces to predict."""
        return self.labels.numel()

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device | str) -> MaskedBatch:
        """The same batch with its tensors on `device`."""
        return MaskedBatch(**{name: tensor.to(device) for name, tensor in self.as_model_inputs().items()})

    def as_model_inputs(self) -> dict[str, Tensor]:
        """The arguments of `MaskedLanguageModel.forward`, and `labels`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "predicted": self.predicted,
            "labels": self.labels,
        }


def collate_masked(examples: Sequence[MaskedExample], pad_token_id: int) -> MaskedBatch:
    """Pad examples on the right to a batch; `DataError` if there is none."""
    if not examples:
        raise DataError("a batch needs at least one example")
    width = max(len(example.input_ids) for example in examples)
    ids = LongTensor([[*example.input_ids, *[pad_token_id] * (width - len(example.input_ids))] for example in examples])
    labels = LongTensor([[*example.labels, *[IGNORED_LABEL] * (width - len(example.labels))] for example in examples])
    lengths = torch.tensor([[len(example.input_ids)] for example in examples])
    predicted = labels != IGNORED_LABEL
    return MaskedBatch(ids, (torch.arange(width) < lengths).long(), predicted, labels[predicted])


def masked_batches(
    examples: Sequence[MaskedExample], pad_token_id: int, max_tokens: int | None = 4096
) -> list[MaskedBatch]:
    """Batches of all examples for evaluation, longest first."""
    cuts = length_ordered(examples, max_tokens)
    return [collate_masked([examples[index] for index in cut], pad_token_id) for cut in cuts]


def word_numbers(text: str) -> np.ndarray:
    """Number of the word that each character belongs to, -1 for white space. *Shape:* `[characters]`.

    A function of the text alone, so that the same words can be masked whatever the tokenizer.
    """
    numbers = np.full(len(text), -1, dtype=np.int64)
    for number, match in enumerate(_WORD.finditer(text)):
        numbers[match.start() : match.end()] = number
    return numbers


class Masker:
    """Encodes texts and masks words in them.

    Args:
        tokenizer: a fast tokenizer with a mask token. It is set up to read text that spells a special token as
            plain text.
        config: what is masked.
        max_length: most tokens of an example, special tokens included.

    Raises:
        ModelError: the tokenizer is slow, or has no mask or padding token.
        ConfigError: `max_length` leaves no room for text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: MaskingConfig, max_length: int) -> None:
        self._backend = protect_special_tokens(tokenizer)
        self.tokenizer, self.config, self.max_length = tokenizer, config, max_length
        for role in ("mask", "pad"):
            if getattr(tokenizer, f"{role}_token_id") is None:
                raise ModelError(
                    f"the tokenizer has no {role} token, which masked-LM training needs",
                    where=tokenizer.name_or_path or None,
                    remedy=f'name it: tokenizer.add_special_tokens({{"{role}_token": "<{role}>"}})',
                )
        self.mask_id, self.pad_id = int(cast(int, tokenizer.mask_token_id)), int(cast(int, tokenizer.pad_token_id))
        self._unknown_id = tokenizer.unk_token_id
        added = self._backend.get_added_tokens_decoder().items()
        special = {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}
        self._plain_ids = np.array(sorted(set(self._backend.get_vocab().values()) - special))
        self._prefix, self._suffix = self._template()
        self.room = max_length - len(self._prefix) - len(self._suffix)
        if self.room < 2:
            raise ConfigError(f"max_length {max_length} is too short", remedy="use 8 or more")

    def _template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer puts before and after a text."""
        encoding = self._encode("a", special=True)
        flags = encoding.special_tokens_mask
        first = flags.index(0) if 0 in flags else len(flags)
        last = len(flags) - flags[::-1].index(0) if 0 in flags else len(flags)
        return tuple(encoding.ids[:first]), tuple(encoding.ids[last:])

    def _encode(self, text: str, *, special: bool = False) -> Any:
        backend = self._backend
        backend.encode_special_tokens = True  # calls of the tokenizer itself may have changed these
        backend.no_truncation()
        backend.no_padding()
        try:
            return backend.encode(text, add_special_tokens=special)
        except (TypeError, UnicodeEncodeError) as error:
            raise DataError(
                f"a text cannot be encoded: {error}", remedy="texts must be str without lone surrogates"
            ) from error

    def ids(self, text: str) -> list[int]:
        """Pieces of `text`, without special tokens and without a limit."""
        return list(self._encode(text).ids)

    def training_example(self, text: str, rng: np.random.Generator) -> MaskedExample:
        """Mask a block of `text` (a random one if it is longer than `max_length`) as the settings say."""
        encoding = self._encode(text)
        start = 0
        if len(encoding.ids) > self.room:
            start = int(rng.integers(len(encoding.ids) - self.room + 1))
        words = self._words(text, encoding.offsets) if self.config.whole_words else np.arange(len(encoding.ids))
        draws = rng.random((2, int(words.max(initial=0)) + 1))
        block = slice(start, start + self.room)
        return self._masked(text, encoding, block, words, (draws[0], draws[1]), self.config, rng)

    def scored_examples(self, text: str, mask_ratio: float, rng: np.random.Generator) -> list[MaskedExample]:
        """All blocks of `text` with whole words masked, all their pieces by mask tokens.

        The draw belongs to the word of the text, not to the piece: other vocabularies hide the same words.
        """
        config = MaskingConfig(mask_ratio=mask_ratio, mask_share=1.0, random_share=0.0)
        encoding = self._encode(text)
        words = self._words(text, encoding.offsets)
        draws = rng.random(int(words.max(initial=0)) + 1)
        blocks = [slice(start, start + self.room) for start in range(0, len(encoding.ids), self.room)]
        return [self._masked(text, encoding, block, words, (draws, draws), config, rng) for block in blocks]

    def _words(self, text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
        """Word number of each piece; a piece that reaches into further words binds them. *Shape:* `[pieces]`."""
        numbers = word_numbers(text)
        words = np.zeros(len(offsets), dtype=np.int64)
        current, reached, first = 0, -1, 0
        for index, (start, end) in enumerate(offsets):
            span = numbers[start:end]
            span = span[span >= 0]
            if not len(span):  # a piece of white space alone goes with the word after it
                continue
            if span[0] > reached:
                current = int(span[0])
            reached = max(reached, int(span[-1]))
            words[first : index + 1] = current
            first = index + 1
        words[first:] = current
        return words

    def _masked(
        self,
        text: str,
        encoding: Any,
        block: slice,
        words: np.ndarray,
        draws: tuple[np.ndarray, np.ndarray],
        config: MaskingConfig,
        rng: np.random.Generator,
    ) -> MaskedExample:
        """Mask the words of `block` whose first draw is below the ratio, or else the one with the lowest.

        The second draw says what becomes of the word. `<unk>` pieces are hidden with their word, never predicted.
        """
        ids = np.array(encoding.ids[block], dtype=np.int64)
        own = words[block]
        draw, action = draws[0][own], draws[1][own]
        known = ids != (-1 if self._unknown_id is None else self._unknown_id)
        chosen = draw < config.mask_ratio
        if not (chosen & known).any() and known.any():
            chosen |= own == own[known][draw[known].argmin()]
        predicted = chosen & known
        inputs = ids.copy()
        inputs[chosen & (action < config.mask_share)] = self.mask_id
        noisy = predicted & (action >= config.mask_share) & (action < config.mask_share + config.random_share)
        inputs[noisy] = self._plain_ids[rng.integers(len(self._plain_ids), size=int(noisy.sum()))]
        offsets = encoding.offsets[block]
        ignored = [IGNORED_LABEL]
        return MaskedExample(
            (*self._prefix, *inputs.tolist(), *self._suffix),
            (
                *ignored * len(self._prefix),
                *np.where(predicted, ids, IGNORED_LABEL).tolist(),
                *ignored * len(self._suffix),
            ),
            covered=_bytes_under(text, offsets, predicted),
            unknown=_bytes_under(text, offsets, chosen & ~known),
        )


def _bytes_under(text: str, offsets: Sequence[tuple[int, int]], chosen: np.ndarray) -> int:
    """UTF-8 bytes of the characters, white space left out, under the chosen pieces; each counts once."""
    total, done = 0, 0
    for index in np.flatnonzero(chosen).tolist():
        start, end = offsets[index]
        total += len("".join(text[max(start, done) : end].split()).encode("utf-8", "surrogatepass"))
        done = max(done, end)
    return total


def block_characters(texts: IndexedSource[Any], masker: Masker) -> int:
    """Characters that fill a block, from the characters per token of up to 200 rows spread over `texts`."""
    rows = sorted({index * len(texts) // _PROBES for index in range(_PROBES)}) if len(texts) else []
    probes = [text_row(texts[row])[0][:10_000] for row in rows]
    tokens = sum(len(masker.ids(text)) for text in probes)
    return max(8, round(masker.room * sum(map(len, probes)) / tokens)) if tokens else masker.room


def masked_stream(
    texts: IndexedSource[Any],
    masker: Masker,
    batching: BatchingConfig,
    *,
    alpha: float = 0.3,
    seed: int = 0,
    fingerprint_parts: Mapping[str, Any] | None = None,
) -> BatchStream:
    """The infinite stream of masked batches over `texts`; languages are mixed with `alpha` (`MixtureConfig`).

    Args:
        texts: rows as :func:`text_row` takes them.
        masker: encodes and masks.
        fingerprint_parts: what else must be equal for a run to be resumed.

    Raises:
        DataError: there is no text.
    """
    blocks = TextBlocks(texts, block_characters(texts, masker))
    if not len(blocks):
        raise DataError("there is no text to train on", remedy="check the corpus and its filters")
    streams = {f"masked:{language}": numbers for language, numbers in blocks.languages.items()}
    sampler = MixtureSampler({name: len(numbers) for name, numbers in streams.items()}, alpha, seed)

    def encode(stream: str, item: int, rng: np.random.Generator) -> MaskedExample:
        return masker.training_example(blocks[streams[stream][item]], rng)

    parts = {
        "texts": source_fingerprint(texts),
        "tokenizer": sorted(masker.tokenizer.get_vocab().items()),
        "masking": masker.config.model_dump(),
        "max_length": masker.max_length,
        **(fingerprint_parts or {}),
    }
    return BatchStream(encode, sampler, masker.pad_id, batching, seed, parts, collate_masked)
