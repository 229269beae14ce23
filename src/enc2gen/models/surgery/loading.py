"""Load what vocabulary surgery works on: our generators, and encoders with the head they were pretrained with."""

from __future__ import annotations

import os
from typing import Any, cast

import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from enc2gen.encoders.donor import donor_for, supported_model_types
from enc2gen.encoders.embedded import EMBEDDED
from enc2gen.encoders.loading import EMBEDDED_PREFIX, has_masked_lm_head, load_encoder, load_tokenizer
from enc2gen.encoders.weights import check_complete, reading_weights
from enc2gen.errors import ModelError, first_line
from enc2gen.models.swcm import SwcmConfig, SwcmForConditionalGeneration


def load_for_surgery(name: str | os.PathLike[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, in evaluation mode.

    Args:
        name: folder or Hub name of a generator of ours or of an encoder, or `embedded:multilingual-e5-small`. An
            encoder whose checkpoint names a masked-language-model head among its `architectures` comes with it, so
            that later adaptation starts with that head; otherwise it comes bare.

    Raises:
        ModelError: there is no such model, its kind is not supported, there is no fast tokenizer, or the tokenizer
            has more tokens than the model has rows.
        CheckpointError: the weights are truncated or incomplete.
    """
    name = os.fspath(name)
    transformers.logging.disable_progress_bar()  # the caller shows progress, if any
    model = load_encoder(name) if name.startswith(EMBEDDED_PREFIX) else _load(name, _read_config(name))
    tokenizer = load_tokenizer(name)
    check_pair(model, tokenizer, where=name)
    if isinstance(model, SwcmForConditionalGeneration):
        model.tokenizer = tokenizer
    return model.eval(), tokenizer


def check_pair(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, where: str | None = None) -> None:
    """Raise `ModelError` unless the model has a row for every token."""
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    if needed > rows:
        raise ModelError(
            f"the tokenizer needs {needed} rows but the model has only {rows}",
            where=where or str(model.config.name_or_path or type(model).__name__),
            remedy="use the tokenizer that was saved with this model",
        )


def _read_config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"no model can be loaded from this name ({first_line(error)})",
            where=name,
            remedy="give a folder with config.json, the name of a Hub model that is reachable from here, or one of: "
            + ", ".join(EMBEDDED_PREFIX + entry for entry in EMBEDDED),
        ) from error


def _load(name: str, config: Any) -> PreTrainedModel:
    if isinstance(config, SwcmConfig):
        return _load_whole(SwcmForConditionalGeneration, name)
    if config.model_type not in supported_model_types():
        raise ModelError(
            f"the vocabulary of a model of type {config.model_type!r} cannot be changed",
            where=name,
            remedy="use a generator of enc2gen, or an encoder of one of these types: "
            + ", ".join(supported_model_types()),
        )
    donor_for(config)
    if has_masked_lm_head(config):
        return _load_whole(AutoModelForMaskedLM, name, dtype="float32")
    return load_encoder(name)


def _load_whole(model_class: Any, name: str, **options: Any) -> PreTrainedModel:
    """The model with every weight out of its checkpoint."""
    with reading_weights(name, "model"):
        model, info = model_class.from_pretrained(name, output_loading_info=True, **options)
    check_complete(info["missing_keys"], name, "model", otherwise="would write nonsense")
    return cast(PreTrainedModel, model)
