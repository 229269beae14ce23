"""Both tokenizers of a bridge and its templates: text to model inputs, and ids back to text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from enc2gen.encoders.loading import load_tokenizer
from enc2gen.errors import DataError, ModelError
from enc2gen.llms.loading import load_llm_tokenizer
from enc2gen.models.bridge.configuration import BridgeConfig
from enc2gen.tokenization.bridge_codec import BridgeCodec
from enc2gen.tokenization.examples import IGNORED_LABEL

ENCODER_FOLDER = "encoder_tokenizer"
"""Folder of the encoder's tokenizer inside a saved bridge; the LLM's lies at the root, where AutoTokenizer looks."""
MAX_TARGET_LENGTH = 200
"""Longest target in tokens (arXiv 2508.09091, released code: max_gen_len)."""


class BridgeProcessor:
    """Turns text into a bridge's inputs and what it wrote into text; saved with the model.

    Args:
        encoder_tokenizer, llm_tokenizer: fast tokenizers.
        config: of the model: templates, special ids and longest source.
        max_target_length: longest target in tokens, EOS included.

    Raises:
        ModelError, ConfigError: as `BridgeCodec`.
    """

    def __init__(
        self,
        encoder_tokenizer: PreTrainedTokenizerBase,
        llm_tokenizer: PreTrainedTokenizerBase,
        config: BridgeConfig,
        *,
        max_target_length: int = MAX_TARGET_LENGTH,
    ) -> None:
        self.encoder_tokenizer, self.llm_tokenizer, self.config = encoder_tokenizer, llm_tokenizer, config
        self.codec = self.make_codec(max_target_length)

    def make_codec(
        self,
        max_target_length: int = MAX_TARGET_LENGTH,
        prompt: str | None = None,
        prompt_with_source: bool | None = None,
    ) -> BridgeCodec:
        """The codec that makes training examples; `prompt` and `prompt_with_source` replace the model's own."""
        config = self.config
        if config.max_source_length is None or isinstance(config.eos_token_id, list):
            raise ModelError("max_source_length and one eos_token_id must be set", where="config.json")
        return BridgeCodec(
            self.encoder_tokenizer,
            self.llm_tokenizer,
            source_template=config.source_template,
            prompt=config.prompt if prompt is None else prompt,
            prompt_with_source=config.prompt_with_source if prompt_with_source is None else prompt_with_source,
            max_source_length=config.max_source_length,
            max_target_length=max_target_length,
            start_id=config.decoder_start_token_id,
            eos_id=config.eos_token_id,
            encoder_pad_id=config.encoder_pad_token_id,
            llm_pad_id=config.pad_token_id,
        )

    def __call__(self, texts: str | Sequence[str], targets: str | Sequence[str] | None = None) -> BatchEncoding:
        """Model inputs as tensors, all `[batch, length]`.

        Without `targets`, what `generate` takes: `input_ids`, `attention_mask`, and, if the model has a prompt,
        `decoder_input_ids` padded on the left and `decoder_attention_mask`. With `targets`, what `forward` takes to
        compute the loss: padded on the right, with `labels`.

        Raises:
            DataError: no text, another number of targets, or text that is not valid Unicode.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise DataError("there is no text", where="texts")
        encoder_pad, pad = self.codec.encoder_pad_id, self.codec.llm_pad_id
        ids, mask = _padded(self.codec.encode_sources(texts), encoder_pad)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if targets is None:
            if self.codec.prompt:
                ids, mask = _padded(self.codec.encode_prompts(texts), pad, left=True)
                inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
            return BatchEncoding(inputs)
        targets = [targets] if isinstance(targets, str) else list(targets)
        if len(targets) != len(texts):
            raise DataError(f"{len(targets)} targets for {len(texts)} texts", where="targets")
        examples = self.codec.encode_pairs(texts, targets)
        ids, mask = _padded([example.decoder_input_ids for example in examples], pad)
        labels, _ = _padded([example.labels for example in examples], IGNORED_LABEL)
        return BatchEncoding(inputs | {"decoder_input_ids": ids, "decoder_attention_mask": mask, "labels": labels})

    def encode_sources(self, texts: Sequence[str]) -> list[list[int]]:
        """Encoder ids of each text in its template, special tokens included."""
        return self.codec.encode_sources(texts)

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """LLM ids of each text, with EOS at the end."""
        return self.codec.encode_targets(texts)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text that the LLM wrote: without the start, up to the first EOS. A prompt in `ids` is decoded too."""
        return self.batch_decode([ids])[0]

    def batch_decode(self, batch: Iterable[Sequence[int] | Tensor]) -> list[str]:
        """:meth:`decode` of each row."""
        return self.codec.decode_batch([row.tolist() if isinstance(row, Tensor) else row for row in batch])

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write both tokenizers; templates and ids are in the model's config.json."""
        self.llm_tokenizer.save_pretrained(folder)
        self.encoder_tokenizer.save_pretrained(Path(folder) / ENCODER_FOLDER)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], config: BridgeConfig | None = None) -> BridgeProcessor:
        """Load the tokenizers of a saved bridge.

        Raises:
            ModelError: a tokenizer's files are missing.
        """
        config = BridgeConfig.from_pretrained(folder) if config is None else config
        return cls(load_tokenizer(Path(folder) / ENCODER_FOLDER), load_llm_tokenizer(folder), config)


def _padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """`[rows, longest]` ids and mask."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), fill), torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask
