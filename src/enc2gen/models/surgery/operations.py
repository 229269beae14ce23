"""Trim a model to the pieces in use, or extend it with pieces for new text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from enc2gen.corpora.languages import normalise_languages
from enc2gen.errors import DataError, LanguageError, ModelError
from enc2gen.models.embedding_init import InitialisationConfig, initialise_rows
from enc2gen.models.surgery.loading import check_pair
from enc2gen.models.surgery.replacing import output_layer, replace_vocabulary, take_rows
from enc2gen.models.swcm import SwcmForConditionalGeneration
from enc2gen.tokenization.extension import extend_vocabulary
from enc2gen.tokenization.vocabulary import trim_vocabulary
from enc2gen.tokenization.vocabulary_size import SizeTrial


@dataclass(frozen=True)
class ModelSize:
    """Rows of the word embedding table, parameters (shared ones once) and bytes of a model."""

    rows: int
    parameters: int
    bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSize:
        """Measure `model`."""
        parameters = list(model.parameters())
        return cls(
            rows=cast(Tensor, model.get_input_embeddings().weight).shape[0],
            parameters=sum(parameter.numel() for parameter in parameters),
            bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        )


@dataclass
class VocabularyChange:
    """What was done to a model.

    Attributes:
        tokenizer: the model's tokenizer from now on.
        origins: for each new id the old id, or None for a new piece.
        before: size of the model before.
        after: size of the model now.
        pieces: new pieces, ascending ids.
        how: for each new id, where its row came from; empty if no piece is new.
        trials: sizes that were tried, where the size was chosen automatically.
        kept_characters: characters that the old normalizer rewrote and the new one leaves alone.
        still_altered: characters that were to be kept, but the tokenizer's kind of normalizer rewrites them still.
    """

    tokenizer: PreTrainedTokenizerFast
    origins: list[int | None]
    before: ModelSize
    after: ModelSize
    pieces: list[str] = field(default_factory=list)
    how: list[str] = field(default_factory=list)
    trials: list[SizeTrial] = field(default_factory=list)
    kept_characters: list[str] = field(default_factory=list)
    still_altered: list[str] = field(default_factory=list)


def trim_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    keep: Iterable[str] = (),
    keep_languages: Sequence[str] | None = None,
    max_size: int | None = None,
) -> VocabularyChange:
    """Cut the vocabulary of `model`, in place, to what `texts` use.

    Logits on kept tokens stay what they were, within rounding; `texts` are split and decoded as before.

    Args:
        texts: all text that must be split as before.
        keep: pieces to keep besides.
        keep_languages: languages that the generator shall still write; all by default. The tokens of the others
            stay in the vocabulary, one row each, but the model refuses to write them.
        max_size: as in `trim_vocabulary`.

    Raises:
        DataError: there is no text.
        ModelError: the tokenizer does not fit the model or cannot be trimmed.
        LanguageError: one of `keep_languages` is not a language of the model, or there is none.
    """
    used = _some_text(texts)
    check_pair(model, tokenizer)
    kept_languages = _kept_languages(model, keep_languages)
    before = ModelSize.of(model)
    trimmed = trim_vocabulary(tokenizer, used, keep=keep, max_size=max_size)
    origins: list[int | None] = list(trimmed.kept_ids)
    table = cast(Tensor, model.get_input_embeddings().weight)
    replace_vocabulary(model, take_rows(table, origins, table.new_zeros(())), origins, trimmed.tokenizer)
    if kept_languages is not None:
        _restrict_languages(cast(SwcmForConditionalGeneration, model), kept_languages)
    return VocabularyChange(trimmed.tokenizer, origins, before, ModelSize.of(model))


def extend_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    size: int | Literal["auto"],
    initialisation: InitialisationConfig | None = None,
    *,
    dev_texts: Sequence[str] = (),
    pairs: Sequence[tuple[str, str]] = (),
    byte_fallback: bool = False,
    keep_characters: str = "",
    seed: int = 0,
) -> VocabularyChange:
    """Extend the vocabulary of `model`, in place, with pieces trained on `texts`.

    The rows of old pieces stay what they were, bit by bit (unless `initialisation` projects them).

    Args:
        texts: of the new language.
        size: number of new pieces, or "auto": chosen on held-out bits per character.
        initialisation: of the new rows; the default method if None.
        dev_texts: held-out text for "auto"; a twentieth of `texts` if empty.
        pairs: (source, target) texts that share a meaning, which link the new script to the old vocabulary.
        byte_fallback: add the 256 bytes, so that no text is unknown.
        keep_characters: as in `extend_vocabulary`.
        seed: of everything random.

    Raises:
        DataError: there is no text.
        ModelError: the tokenizer does not fit the model or cannot be extended.
        ConfigError: unknown method.
    """
    lines = _some_text(texts)
    check_pair(model, tokenizer)
    config = initialisation or InitialisationConfig()
    before = ModelSize.of(model)
    extended = extend_vocabulary(
        tokenizer,
        lines,
        size=size,
        dev_texts=dev_texts,
        byte_fallback=byte_fallback,
        keep_characters=keep_characters,
        seed=seed,
    )
    new, origins = extended.tokenizer, extended.origins
    context: list[str | tuple[str, str]] = [*pairs, *lines]
    initialised = partial(initialise_rows, config=config, texts=context, seed=seed)
    table, head = cast(Tensor, model.get_input_embeddings().weight), output_layer(model)
    made = initialised(table.detach(), tokenizer, new, origins)
    head_rows = None
    if head is not None and head.weight is not table:
        head_rows = initialised(head.weight.detach(), tokenizer, new, origins).table
    replace_vocabulary(model, made.table, origins, new, head_rows=head_rows)
    return VocabularyChange(
        tokenizer=new,
        origins=origins,
        before=before,
        after=ModelSize.of(model),
        pieces=extended.pieces,
        how=made.how,
        trials=extended.trials,
        kept_characters=extended.exempted,
        still_altered=extended.still_altered,
    )


def _some_text(texts: Iterable[str]) -> list[str]:
    found = [text for text in texts if text.strip()]
    if not found:
        raise DataError("there is no text", where="corpus", remedy="give a corpus with at least one line of text")
    return found


def _kept_languages(model: PreTrainedModel, wanted: Sequence[str] | None) -> list[str] | None:
    if wanted is None:
        return None
    tags = normalise_languages(wanted, where="keep_languages")
    if not isinstance(model, SwcmForConditionalGeneration):
        raise ModelError(
            "only a generator has languages to keep",
            where="keep_languages",
            remedy="leave it out: an encoder's vocabulary is cut by the corpora alone",
        )
    if not tags:
        raise LanguageError(
            "no language is to be kept, and the model could not write any more",
            where="keep_languages",
            remedy="name one or more, or leave it out to keep all",
        )
    for tag in tags:
        model.language_id(tag)
    return tags


def _restrict_languages(model: SwcmForConditionalGeneration, kept: Sequence[str]) -> None:
    config = model.config
    config.languages = {tag: index for tag, index in config.language_ids.items() if tag in kept}
    if config.default_source_language not in kept:
        config.default_source_language = None
    if config.default_target_language not in kept:
        config.default_target_language = None
        model.generation_config.decoder_start_token_id = None
