"""An encoder with its masked-LM head: transformers' own `*ForMaskedLM`, computed where a piece is predicted only.

**A fresh head** (for an encoder whose checkpoint has none, such as multilingual-e5-small) starts as a harmless
map instead of noise: dense layers as the identity, the output projection tied to the word embeddings, its bias at the
log unigram frequencies of the training text, and the gain of the layer norm small (`FRESH_GAIN`), so that the first
predictions are the unigram distribution and the first gradients those of a log-bilinear model. How much of that there
is depends on the family's head:

- BERT, RoBERTa, XLM-R, XLM-R XL: the dense layer starts as x + 3, where the activation (gelu) is the identity up to
  0.4 %, and the layer norm that follows removes the constant again: the head starts as LayerNorm(x), undistorted.
- ModernBERT: its dense layer has no bias to shift x by (unless `classifier_bias`), so that the activation bends x.
- EuroBERT: a projection alone, without bias: first predictions are those of x itself, frequencies have no place.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from enc2gen.data.masking import MaskedBatch, MaskedExample, Masker, MaskingConfig, masked_batches
from enc2gen.encoders.loading import EMBEDDED_PREFIX, has_masked_lm_head, load_encoder
from enc2gen.errors import DataError, ModelError
from enc2gen.models.linear_cross_entropy import linear_cross_entropy, without_projection
from enc2gen.models.token_loss import TokenLoss

# Submodules of `*ForMaskedLM` that make logits of hidden states, one after the other.
_HEADS: dict[str, tuple[str, ...]] = {
    "bert": ("cls",),
    "roberta": ("lm_head",),
    "xlm-roberta": ("lm_head",),
    "xlm-roberta-xl": ("lm_head",),
    "modernbert": ("head", "decoder"),
    "eurobert": ("lm_head",),
}
FRESH_SHIFT = 3.0
"""Bias of a fresh dense layer: with it gelu is nearly linear (our choice)."""
FRESH_GAIN = 0.3
"""Gain of a fresh layer norm (our choice: with 0.1 learning hardly started, with 1 it started from worse)."""


class MaskedLanguageModel(nn.Module):
    """Encoder and masked-LM head.

    Args:
        model: transformers' `*ForMaskedLM` of a supported family, or a bare encoder, which gets a fresh head and is
            shared, not copied: training this trains it.
        unigram: for a fresh head, the relative frequency of each id; the bias is 0 without it. Not used where the
            family's head has no bias (EuroBERT).
            *Shape* `[vocab]`.

    Attributes:
        model: the `*ForMaskedLM`, with `save_pretrained`.
        fresh_head: whether the head was made here.

    Raises:
        ModelError: the family has no known masked-LM head.
    """

    def __init__(self, model: PreTrainedModel, unigram: Tensor | None = None) -> None:
        super().__init__()
        if model.config.model_type not in _HEADS:
            raise ModelError(
                f"no masked-LM head is known for encoders of type {model.config.model_type!r}",
                where=str(model.config.name_or_path or "encoder"),
                remedy=f"use one of: {', '.join(sorted(_HEADS))}",
            )
        self.fresh_head = type(model) is not MODEL_FOR_MASKED_LM_MAPPING[type(model.config)]
        self.model = _with_fresh_head(model, unigram) if self.fresh_head else model
        self._head_names = _HEADS[model.config.model_type]

    @property
    def encoder(self) -> PreTrainedModel:
        """The bare encoder inside."""
        return cast(PreTrainedModel, self.model.base_model)

    @property
    def head(self) -> list[nn.Module]:
        """The modules that make logits of hidden states, in order."""
        return [self.model.get_submodule(name) for name in self._head_names]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        predicted: Tensor,
        labels: Tensor | None = None,
        label_smoothing: float | None = None,
    ) -> MaskedLMOutput | TokenLoss:
        """Logits where `predicted` is True, row by row; equal to the full computation there.

        With `labels` and `label_smoothing` the summed loss instead, for which no logits are computed.

        Shape:
            input_ids, attention_mask, predicted: `[batch, length]`; labels: `[predicted]`;
            logits: `[predicted, vocab]`.
        """
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[predicted]
        if labels is None or label_smoothing is None:
            return MaskedLMOutput(logits=self._through_head(hidden))
        projection = cast(nn.Linear, self.model.get_output_embeddings())
        with without_projection(projection):
            hidden = self._through_head(hidden)
        return linear_cross_entropy(hidden, projection.weight, projection.bias, labels, label_smoothing=label_smoothing)

    def _through_head(self, hidden: Tensor) -> Tensor:
        for module in self.head:
            hidden = module(hidden)
        return hidden

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """As of transformers' models."""
        self.model.activation_checkpointing_enable(**options)

    def activation_checkpointing_disable(self) -> None:
        """As of transformers' models."""
        self.model.activation_checkpointing_disable()


def load_masked_lm(name: str | os.PathLike[str]) -> PreTrainedModel:
    """The checkpoint's encoder with its masked-LM head, or the bare encoder where the checkpoint has no head.

    Args:
        name: as `load_encoder` takes it.

    Raises:
        ModelError, CheckpointError: as `load_encoder`.
    """
    name = os.fspath(name)
    encoder = load_encoder(name)  # checks the family and that the encoder's weights are complete
    trained = encoder.config.model_type in _HEADS and has_masked_lm_head(encoder.config)
    if name.startswith(EMBEDDED_PREFIX) or not trained:
        return encoder
    model, info = AutoModelForMaskedLM.from_pretrained(name, dtype="float32", output_loading_info=True)
    prefix = f"{model.base_model_prefix}."
    if any(not key.startswith(prefix) for key in info["missing_keys"]):
        return encoder
    return cast(PreTrainedModel, model.eval())


def _with_fresh_head(encoder: PreTrainedModel, unigram: Tensor | None) -> PreTrainedModel:
    """The family's `*ForMaskedLM` around `encoder` itself, with a fresh head."""
    encoder = cast(PreTrainedModel, encoder.base_model)
    config: Any = encoder.config
    config.tie_word_embeddings = True
    model_class: Any = MODEL_FOR_MASKED_LM_MAPPING[type(config)]
    with torch.device("meta"):  # the encoder's weights exist already
        model = model_class(config)
    setattr(model, model.base_model_prefix, encoder)
    table = cast(nn.Embedding, encoder.get_input_embeddings()).weight
    for name in _HEADS[config.model_type]:
        head = model.get_submodule(name)
        head.to_empty(device=table.device)
        head.to(table.dtype)
    model.tie_weights()
    _start_head(model, unigram)
    return cast(PreTrainedModel, model.train(encoder.training))


@torch.no_grad()
def _start_head(model: PreTrainedModel, unigram: Tensor | None) -> None:
    projection = cast(nn.Linear, model.get_output_embeddings())
    modules = [m for name in _HEADS[model.config.model_type] for m in model.get_submodule(name).modules()]
    for module in modules:
        if module is projection:
            continue
        if isinstance(module, nn.Linear):
            nn.init.eye_(module.weight)
            if module.bias is not None:
                module.bias.fill_(FRESH_SHIFT)
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(FRESH_GAIN)
            if module.bias is not None:
                module.bias.zero_()
    if projection.bias is not None:
        projection.bias.zero_()
        if unigram is not None:
            projection.bias.copy_(unigram.clamp_min(1e-12).log())


def unigram_frequencies(ids: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Relative frequencies of ids, with one count added to each. *Shape* `[vocabulary]`."""
    flat = np.concatenate([np.asarray(row, dtype=np.int64) for row in ids]) if ids else np.empty(0, dtype=np.int64)
    counts = np.bincount(flat, minlength=vocabulary) + 1.0
    return torch.from_numpy(counts / counts.sum()).float()


@dataclass(frozen=True)
class MaskedScore:
    """Sums over the masked words of some texts.

    Attributes:
        bits: sum of -log2 p over the predicted pieces.
        pieces: number of predicted pieces.
        bytes: UTF-8 bytes, white space left out, under them.
        unknown_bytes: those under masked pieces that the vocabulary only knows as `<unk>`.
    """

    bits: float
    pieces: int
    bytes: int
    unknown_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of masked text; a byte under `<unk>` costs 8 bits."""
        return (self.bits + 8.0 * self.unknown_bytes) / (self.bytes + self.unknown_bytes)


def masked_score(
    model: MaskedLanguageModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    seed: int = 0,
    mask_ratio: float = 0.15,
    max_length: int = 256,
    max_tokens: int = 4096,
) -> MaskedScore:
    """What :func:`masked_bits_per_byte` divides.

    Raises:
        DataError: the texts hold nothing that could be masked.
    """
    scorer = model if isinstance(model, MaskedLanguageModel) else MaskedLanguageModel(model)
    masker = Masker(tokenizer, MaskingConfig(mask_ratio=mask_ratio), max_length)
    examples = [
        example
        for index, text in enumerate(texts)
        for example in masker.scored_examples(text, mask_ratio, np.random.default_rng([seed, index]))
    ]
    return score_examples(scorer, examples, masker.pad_id, max_tokens)


def score_examples(
    model: MaskedLanguageModel, examples: Sequence[MaskedExample], pad_token_id: int, max_tokens: int = 4096
) -> MaskedScore:
    """Score examples of `Masker.scored_examples`; raises as :func:`masked_score`."""
    covered, unknown = sum(e.covered for e in examples), sum(e.unknown for e in examples)
    if not covered + unknown:
        raise DataError("the texts hold nothing to mask", remedy="give longer texts")
    bits, pieces = _bits(model, masked_batches(examples, pad_token_id, max_tokens))
    return MaskedScore(bits, pieces, covered, unknown)


@torch.inference_mode()
def _bits(model: MaskedLanguageModel, batches: Sequence[MaskedBatch]) -> tuple[float, int]:
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    bits, pieces = 0.0, 0
    for batch in batches:
        if not batch.num_target_tokens:
            continue
        inputs = batch.to(device).as_model_inputs()
        labels = inputs.pop("labels")
        loss = cast(TokenLoss, model(**inputs, labels=labels, label_smoothing=0.0))
        bits += loss.negative_log_likelihood.item() / math.log(2.0)
        pieces += batch.num_target_tokens
    model.train(was_training)
    return bits, pieces


def masked_bits_per_byte(
    model: MaskedLanguageModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    seed: int = 0,
    mask_ratio: float = 0.15,
    max_length: int = 256,
    max_tokens: int = 4096,
) -> float:
    """Bits that the model needs for a byte of masked text: sum of -log2 p(piece) / UTF-8 bytes under the pieces.

    Words are drawn at random (syllables in Tibetan, letters in scripts without spaces), and all pieces of a word
    are hidden behind mask tokens. The draw is a function of `seed` and the text alone, so each call and each model
    sees the same masks, and other vocabularies hide the same words (unless a piece reaches over several).

    *What is comparable.* Models with one vocabulary: fully. Models with different vocabularies: with care. Bytes
    are counted without white space, which some tokenizers count to their pieces and others do not, and the same
    text is predicted. But the pieces of a hidden word are predicted independently of each other, which costs a
    finer vocabulary bits, and the number of mask tokens tells how many pieces the word has, which helps it; and a
    long text is cut into blocks of `max_length` tokens, which hold less text the finer the vocabulary. Text under
    `<unk>` cannot be compared by prediction: to predict `<unk>` is easy and says nothing about the text. Such
    pieces are therefore hidden but not predicted, and each of their bytes costs 8 bits, as if written out. Where
    much is unknown, this says little more than how much.

    Args:
        model: in any precision; a bare encoder gets a fresh head, which makes the result a starting value.
        texts: of any length.
        mask_ratio: share of the words hidden (0.15: BERT, arXiv 1810.04805, section 3.1).
        max_length: tokens per block, special tokens included.
        max_tokens: tokens per batch; does not change the result beyond rounding.

    Raises:
        DataError: the texts hold nothing that could be masked.
    """
    score = masked_score(
        model, tokenizer, texts, seed=seed, mask_ratio=mask_ratio, max_length=max_length, max_tokens=max_tokens
    )
    return score.bits_per_byte
