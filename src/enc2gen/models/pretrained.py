"""Baselines that exist: encoder-decoders by Hub name or folder, such as mT5, mBART-50 and NLLB-200."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from enc2gen.corpora.languages import base_language, default_script, normalise_language, normalise_languages
from enc2gen.encoders.loading import load_tokenizer
from enc2gen.encoders.weights import check_complete, reading_weights
from enc2gen.errors import LanguageError, ModelError, first_line
from enc2gen.models.seeding import seeded
from enc2gen.models.swcm.growing import MAX_NEW_TOKENS, fill_rows
from enc2gen.tokenization.layout import TextLayout
from enc2gen.tokenization.tokenizer import add_language_tokens

_CODE = re.compile(r"[a-z]{2}_[A-Z]{2}|[a-z]{2,3}_[A-Z][a-z]{3}")  # kk_KZ of mBART, kaz_Cyrl of NLLB
_DROPOUT = ("dropout", "dropout_rate", "attention_dropout", "activation_dropout")


def pretrained(
    name: str | os.PathLike[str],
    *,
    languages: Sequence[str],
    seed: int,
    dropout: float | None = None,
) -> PreTrainedModel:
    """A pretrained encoder-decoder, with its own tokenizer as `tokenizer` and its own vocabulary.

    A language takes the model's own code where its tokenizer has one (`kk_KZ`, `kaz_Cyrl`), in the place where the
    tokenizer puts it in sources; others get a new token `<kk>`. Either comes right after what the decoder starts from.

    Args:
        name: Hub name or folder.
        languages: BCP 47 tags.
        seed: of the embeddings of new tokens.
        dropout: replaces the model's dropout rates; None keeps them.

    Raises:
        ModelError: nothing of this name, not an encoder-decoder, or no fast tokenizer.
        CheckpointError: the weights are truncated, or a pickle.
    """
    name = os.fspath(name)
    try:
        config: Any = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model can be loaded from this name ({first_line(error)})",
            where=name,
            remedy="give a folder with config.json, or the name of a Hub model that is reachable from here",
        ) from error
    if not config.is_encoder_decoder:
        raise ModelError(f"{config.model_type!r} is not an encoder-decoder", where=name, remedy="use another preset")
    for field in _DROPOUT if dropout is not None else ():
        if hasattr(config, field):
            setattr(config, field, dropout)
    tokenizer = load_tokenizer(name)
    with reading_weights(name, "model"):
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            name, config=config, dtype="float32", output_loading_info=True
        )
    check_complete(info["missing_keys"], name, "model", otherwise="would make a useless baseline")
    _set_languages(model, tokenizer, normalise_languages(languages), seed)
    model.tokenizer = tokenizer
    model.generation_config = GenerationConfig(
        pad_token_id=model.config.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=model.config.text_layout["start"][0],
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return cast(PreTrainedModel, model.eval())


def own_code(tokenizer: PreTrainedTokenizerBase, language: str) -> str | None:
    """The tokenizer's own code of a language, None if it has none.

    The language itself counts before members of its macro-language (`khk_Cyrl` for "mn"), of which there may be one.
    """
    found: dict[str, list[str]] = {"language": [], "member": []}
    wanted = normalise_language(language)
    for code in dict.fromkeys((*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())):
        if not _CODE.fullmatch(code):
            continue
        tag = code.replace("_", "-") if len(code.partition("_")[2]) == 4 else code.partition("_")[0]
        try:
            known = normalise_language(tag)
        except LanguageError:
            continue
        if default_script(known) != default_script(wanted):
            continue
        if known.partition("-")[0] == wanted.partition("-")[0]:
            found["language"].append(code)
        elif base_language(known) == base_language(wanted):
            found["member"].append(code)
    return next((codes[0] for codes in found.values() if len(codes) == 1), None)


def _set_languages(model: Any, tokenizer: PreTrainedTokenizerBase, languages: Sequence[str], seed: int) -> None:
    codes = {tag: code for tag in languages if (code := own_code(tokenizer, tag)) is not None}
    before, after = _around_source(tokenizer, next(iter(codes.values()), None))
    known = len(tokenizer)
    new = add_language_tokens(tokenizer, [tag for tag in languages if tag not in codes])
    own = {tag: int(cast(Any, tokenizer.convert_tokens_to_ids(code))) for tag, code in codes.items()}
    _add_rows(model, sorted(index for index in new.values() if index >= known), seed)
    first = model.config.decoder_start_token_id
    text = str(tokenizer.convert_ids_to_tokens(first)) if first is not None else ""
    start = (None,) if first is None or _CODE.fullmatch(text) else (int(first), None)
    model.config.languages = {tag: {**new, **own}[tag] for tag in languages}
    model.config.text_layout = TextLayout(before, after, start, codes).saved()


def _around_source(
    tokenizer: PreTrainedTokenizerBase, code: str | None
) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
    """What the tokenizer puts before and after a source, None for the language; first where it has no place for it."""
    code = code or getattr(tokenizer, "src_lang", None)
    if hasattr(tokenizer, "src_lang"):
        cast(Any, tokenizer).src_lang = code
    whole, text = (cast("list[int]", tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    at = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), None)
    if at is None:
        raise ModelError("the tokenizer changes texts when it adds special tokens", where=tokenizer.name_or_path)
    language = None if code is None else tokenizer.convert_tokens_to_ids(code)
    before, after = (
        tuple(None if index == language else index for index in part) for part in (whole[:at], whole[at + len(text) :])
    )
    return (before if None in (*before, *after) else (*before, None)), after


def _add_rows(model: Any, fresh: Sequence[int], seed: int) -> None:
    """Embeddings of new tokens, in the output layer too where that has weights of its own."""
    if not fresh:
        return
    size = max(model.get_input_embeddings().weight.shape[0], fresh[-1] + 1)
    if size > model.get_input_embeddings().weight.shape[0]:  # mT5 has more rows than its tokenizer has tokens
        model.resize_token_embeddings(size, mean_resizing=False)
    with seeded(seed), torch.no_grad():
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        for weight in {id(layer.weight): cast(Tensor, layer.weight) for layer in layers}.values():
            weight[list(fresh)] = fill_rows(weight[: fresh[0]], size, fresh)[list(fresh)]
