"""Teach a trained generator one more language without losing the old ones, and measure that."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from enc2gen.corpora.languages import normalise_language
from enc2gen.data.batching import IGNORED_LABEL, EncodedExample, evaluation_batches
from enc2gen.data.tasks import Example
from enc2gen.encoders.donor import donor_for
from enc2gen.errors import DataError, LanguageError, ModelError
from enc2gen.models.embedding_init import InitialisationConfig
from enc2gen.models.surgery.loading import check_pair
from enc2gen.models.surgery.operations import VocabularyChange, extend_model
from enc2gen.models.surgery.replacing import extend_bias, output_layer, replace_vocabulary, take_rows
from enc2gen.models.swcm import SwcmForConditionalGeneration
from enc2gen.tokenization.coverage import CoverageReport, compare_coverage
from enc2gen.tokenization.tokenizer import TextCodec, add_language_tokens

_BATCH_TOKENS = 2048
"""Padded tokens of a batch when losses are measured (our choice; memory only)."""


@dataclass(frozen=True)
class LanguageLoss:
    """Loss of one old language, in bits per character of the target: comparable between vocabularies.

    Attributes:
        language: tag.
        examples: how many were measured, the same before and after.
        skipped: how many are longer than the model's positions.
        before: bits per character before the language was added.
        after: bits per character afterwards.
    """

    language: str
    examples: int
    skipped: int
    before: float
    after: float


@dataclass
class AddedLanguage:
    """A language that was added.

    Attributes:
        language: its canonical tag.
        token_id: id of its token.
        like: the language whose row its token's row was copied from; None: the mean of all languages.
        tokenizer: the model's tokenizer from now on.
        change: what happened to the pieces; None if the vocabulary was not extended.
        losses: of old languages.
        coverage: how the old and the new tokenizer cover the texts; None without texts.
    """

    language: str
    token_id: int
    like: str | None
    tokenizer: PreTrainedTokenizerFast
    change: VocabularyChange | None = None
    losses: list[LanguageLoss] = field(default_factory=list)
    coverage: tuple[CoverageReport, CoverageReport] | None = None


def check_examples(records: Iterable[Mapping[str, Any]], language: str, model: PreTrainedModel) -> list[Example]:
    """Examples on which the loss of an old language is measured.

    Args:
        records: with fields `source`, `target` and perhaps `source_language` (the model's default source language
            where missing), or with a field `text`, which the model is to write down again as it is.
        language: of the targets, or of the texts.
        model: the generator.

    Raises:
        DataError: a record has neither, or none has any text.
        LanguageError: unknown language.
    """
    tag = normalise_language(language, where="check")
    default = getattr(model.config, "default_source_language", None)
    examples = []
    for number, record in enumerate(records, 1):
        if "source" in record and "target" in record:
            source, target = str(record["source"] or ""), str(record["target"] or "")
            spoken = record.get("source_language") or default
        elif "text" in record:
            source = target = str(record["text"] or "")
            spoken = tag
        else:
            raise DataError(
                "a record has neither 'source' and 'target' nor 'text', but: "
                + (", ".join(map(str, record)) or "nothing"),
                where=f"check of {tag}, record {number}",
                remedy="rename its fields",
            )
        if source.strip() and target.strip():
            examples.append(Example(source, target, spoken, tag, references=(target,)))
    if not examples:
        raise DataError("there is no text", where=f"check of {tag}", remedy="give a file with at least one example")
    return examples


def add_language(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    language: str,
    texts: Iterable[str] = (),
    *,
    like: str | None = None,
    size: int | Literal["auto"] | None = None,
    initialisation: InitialisationConfig | None = None,
    checks: Mapping[str, Sequence[Example]] | None = None,
    pairs: Sequence[tuple[str, str]] = (),
    dev_texts: Sequence[str] = (),
    byte_fallback: bool = False,
    keep_characters: str = "",
    seed: int = 0,
) -> AddedLanguage:
    """Add `language` to a trained generator, in place; the rows of old tokens stay what they were, bit by bit.

    Args:
        texts: of the new language: tested for exact round trips, and what new pieces are trained on.
        like: a related language whose token's row the new token starts from; the mean of all by default.
        size: number of new pieces, or "auto"; no new pieces if None.
        initialisation: of the new pieces' rows.
        checks: old language -> examples (see `check_examples`) whose loss is measured before and after.
        pairs: as in `extend_model`; as are `dev_texts`, `byte_fallback`, `keep_characters` and `seed`.

    Raises:
        ModelError: not a generator, or model and tokenizer do not fit.
        LanguageError: the model has the language already, or does not have `like` or a language of `checks`.
        DataError: a size but no texts.
    """
    tag, generator = _check_request(model, tokenizer, language, like, checks or {})
    lines = [text for text in texts if text.strip()]
    if size is not None and not lines:
        raise DataError("there is no text to train new pieces on", where="corpus", remedy=f"give text in {tag!r}")
    before = {old: example_nats(generator, tokenizer, examples) for old, examples in (checks or {}).items()}
    change = None
    if size is not None:
        change = extend_model(
            generator,
            tokenizer,
            lines,
            size,
            initialisation,
            dev_texts=dev_texts,
            pairs=pairs,
            byte_fallback=byte_fallback,
            keep_characters=keep_characters,
            seed=seed,
        )
    new = copy.deepcopy(change.tokenizer if change else tokenizer)
    token_id = add_language_tokens(new, [tag])[tag]
    _add_row(generator, new, token_id, like)
    generator.config.languages = {**generator.config.language_ids, tag: token_id}
    losses = [
        _compare(old, examples, before[old], example_nats(generator, new, examples))
        for old, examples in (checks or {}).items()
    ]
    added = AddedLanguage(tag, token_id, like, cast(PreTrainedTokenizerFast, new), change, losses)
    if lines:
        before_and_after = compare_coverage([tokenizer, new], [(line, tag) for line in lines])
        added.coverage = before_and_after[0], before_and_after[1]
    return added


def _check_request(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    language: str,
    like: str | None,
    checks: Mapping[str, Sequence[Example]],
) -> tuple[str, SwcmForConditionalGeneration]:
    """The canonical tag and the model as a generator."""
    if not isinstance(model, SwcmForConditionalGeneration):
        raise ModelError(
            "a language is added to a trained generator, and this is none",
            where=str(model.config.name_or_path or type(model).__name__),
            remedy="extend an encoder with `enc2gen vocab extend`, and name the language in the recipe that grows it",
        )
    tag = normalise_language(language, where="language")
    if tag in model.config.language_ids:
        raise LanguageError(
            f"the model already has language {tag!r}",
            where="language",
            remedy="train it further with a recipe that starts from this model; "
            "`enc2gen vocab extend` gives it more pieces",
        )
    for known in [*checks, *([like] if like else [])]:
        model.language_id(known)
    check_pair(model, tokenizer)
    return tag, model


@torch.no_grad()
def _add_row(
    model: SwcmForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, token_id: int, like: str | None
) -> None:
    """Give the token `token_id` the row, output row and bias of `like`, or the mean of all languages'.

    The row may be there already: a spare one behind the tokenizer's last id, or that of a language which was
    trimmed away earlier.
    """
    table = cast(Tensor, model.get_input_embeddings().weight)
    head = cast(Any, output_layer(model))
    size = max(len(table), token_id + 1)
    origins: list[int | None] = [index if index < len(table) and index != token_id else None for index in range(size)]
    ids = [model.language_id(like)] if like else sorted(model.config.language_ids.values())
    models = torch.tensor(ids or list(range(len(table))))
    bias = extend_bias(head.bias, origins)
    bias[token_id] = head.bias[models].mean()
    replace_vocabulary(
        model,
        take_rows(table, origins, table[models].mean(dim=0)),
        origins,
        tokenizer,
        head_rows=take_rows(head.weight, origins, head.weight[models].mean(dim=0)),
        head_bias=bias,
    )


@torch.no_grad()
def example_nats(
    model: SwcmForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[float | None]:
    """Negative log likelihood of each target given its source, in nats; None where one is too long for the model."""
    limit = donor_for(cast(Any, model.config.encoder_config)).max_positions
    known = model.config.language_ids
    codec = TextCodec(tokenizer, known, max_source_length=limit, max_target_length=limit, overflow="error")
    encoded: list[EncodedExample] = []
    places: list[int] = []
    for place, example in enumerate(examples):
        language = example.source_language if example.source_language in known else None
        try:
            decoder_input_ids, labels = codec.encode_target(example.target, example.target_language)
            source = codec.encode_source(example.source, language)
        except DataError:
            continue
        encoded.append(EncodedExample(tuple(source), tuple(decoder_input_ids), tuple(labels)))
        places.append(place)
    nats: list[float | None] = [None] * len(examples)
    model.eval()
    for batch in evaluation_batches(encoded, codec.pad_id, max(_BATCH_TOKENS, 2 * limit)):
        inputs = batch.to(model.device).as_model_inputs()
        expected = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits  # [batch, length, vocabulary]
        loss = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), expected, ignore_index=IGNORED_LABEL, reduction="none"
        )
        for index, value in zip(batch.order, loss.double().sum(dim=1).tolist(), strict=True):
            nats[places[index]] = value
    return nats


def _compare(
    language: str, examples: Sequence[Example], before: Sequence[float | None], after: Sequence[float | None]
) -> LanguageLoss:
    """Bits per character over the examples that fit into the model both before and after."""
    pairs = [
        (len(example.target), old, new)
        for example, old, new in zip(examples, before, after, strict=True)
        if old is not None and new is not None
    ]
    if not pairs:
        raise DataError(
            "every example is longer than the model's positions",
            where=f"check of {language}",
            remedy="split its texts into sentences",
        )
    bits = math.log(2) * sum(length for length, _, _ in pairs)
    return LanguageLoss(
        language=normalise_language(language),
        examples=len(pairs),
        skipped=len(examples) - len(pairs),
        before=sum(old for _, old, _ in pairs) / bits,
        after=sum(new for _, _, new in pairs) / bits,
    )
