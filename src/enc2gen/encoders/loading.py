"""Load an encoder and its tokenizer by Hub name, path, `embedded:` name, or take a loaded one."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from enc2gen.encoders.donor import donor_for
from enc2gen.encoders.embedded import EMBEDDED, load_embedded, load_embedded_tokenizer
from enc2gen.encoders.weights import check_complete, reading_weights
from enc2gen.errors import ModelError, first_line

EMBEDDED_PREFIX = "embedded:"


def load_encoder(
    encoder: str | os.PathLike[str] | PreTrainedModel, *, rows: Sequence[int] | None = None
) -> PreTrainedModel:
    """Return the bare encoder, in float32 and evaluation mode unless it was given loaded.

    Args:
        encoder: Hub name, folder, `embedded:multilingual-e5-small`, or a loaded model (with or without a task head).
        rows: keep only these rows of the word embedding table, in this order (a trimmed vocabulary). A loaded model
            is not changed: the result is a copy.

    Raises:
        ModelError: nothing of this name, or an encoder that cannot donate (the message lists those that can).
        CheckpointError: the weights are truncated or are not weights of this encoder.
    """
    if isinstance(encoder, PreTrainedModel):
        donor_for(encoder.config)
        base = cast(PreTrainedModel, encoder.base_model)
        return base if rows is None else _keep_rows(copy.deepcopy(base), rows)
    name = os.fspath(encoder)
    if name.startswith(EMBEDDED_PREFIX):
        return load_embedded(name.removeprefix(EMBEDDED_PREFIX), rows=rows)
    loaded = _load_checkpoint(name)
    return loaded if rows is None else _keep_rows(loaded, rows)


_SPECIAL_TOKENS = ("pad", "bos", "eos", "cls", "sep", "mask")


def _keep_rows(encoder: PreTrainedModel, rows: Sequence[int]) -> PreTrainedModel:
    config, place = encoder.config, {old: new for new, old in enumerate(rows)}
    table = cast(nn.Embedding, encoder.get_input_embeddings())
    first_position = donor_for(config).position_offset
    for field in (f"{role}_token_id" for role in _SPECIAL_TOKENS):
        if (old := getattr(config, field, None)) is not None:
            setattr(config, field, _moved(old, place, field, table.num_embeddings))
    if donor_for(config).position_offset != first_position:
        # RoBERTa's positions are counted from the pad token's id, so it must keep its place.
        raise ModelError(f"the trimmed vocabulary moves the pad token away from id {first_position - 1}", where="rows")
    kept = nn.Embedding(len(rows), table.embedding_dim, padding_idx=config.pad_token_id)
    with torch.no_grad():
        kept.weight.copy_(table.weight[list(rows)])
    encoder.set_input_embeddings(kept)
    config.vocab_size = len(rows)
    return encoder


def _moved(old: int | list[int], place: Mapping[int, int], field: str, size: int) -> int | list[int] | None:
    """New id of the special token `old` (or of several); None for an id that the table of `size` rows has not.

    Such ids are the defaults of ModernBERT's class (50281 ...), which stay in the configuration of an encoder with
    another tokenizer: they mean no token of it.
    """
    if isinstance(old, list):
        found = [_moved(index, place, field, size) for index in old]
        return [cast(int, new) for new in found if new is not None]
    if not 0 <= old < size:
        return None
    if old not in place:
        raise ModelError(
            f"the trimmed vocabulary leaves out row {old}, which is {field}",
            where="rows",
            remedy="keep the rows of all special tokens",
        )
    return place[old]


def _load_checkpoint(name: str) -> PreTrainedModel:
    config = _load_config(name)
    donor_for(config)
    model_class: Any = MODEL_MAPPING[type(config)]
    options: dict[str, Any] = {"dtype": "float32"}
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False  # a pooler is dead weight here, and often missing from checkpoints
    with reading_weights(name, "encoder"):
        model, info = AutoModel.from_pretrained(name, config=config, output_loading_info=True, **options)
    check_complete(info["missing_keys"], name, "encoder", otherwise="would make a useless generator")
    return cast(PreTrainedModel, model.eval())


def has_masked_lm_head(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint of this configuration holds a trained masked-LM head, by its `architectures`.

    BERT's `BertForPreTraining` has it, too, next to a head that tells whether two sentences follow each other.
    """
    endings = ("ForMaskedLM", "ForPreTraining") if config.model_type == "bert" else ("ForMaskedLM",)
    return any(str(kind).endswith(endings) for kind in config.architectures or ())


def encoder_positions(name: str) -> int:
    """Longest sequence in tokens that the encoder `name` has positions for; raises as `load_encoder`."""
    if name.startswith(EMBEDDED_PREFIX):
        return EMBEDDED.get(name.removeprefix(EMBEDDED_PREFIX), where=name).max_positions
    return donor_for(_load_config(name)).max_positions


def _load_config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no encoder can be loaded from this name ({first_line(error)})",
            where=name,
            remedy="give a folder with config.json, the name of a Hub model that is reachable from here, or one of: "
            + ", ".join(EMBEDDED_PREFIX + entry for entry in EMBEDDED),
        ) from error


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Return the fast tokenizer of an encoder or of a saved model.

    Raises:
        ModelError: there is none, or only a slow one.
    """
    name = os.fspath(name)
    if name.startswith(EMBEDDED_PREFIX):
        return load_embedded_tokenizer(name.removeprefix(EMBEDDED_PREFIX))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ModelError(
            f"no tokenizer can be loaded from this name ({first_line(error)})",
            where=name,
            remedy="give a folder with tokenizer.json, or a reachable Hub name",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer",
            where=name,
            remedy="save it once as tokenizer.json (transformers converts most slow tokenizers) and use that folder",
        )
    if len(tokenizer) <= len({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}) + 1:
        # transformers 5 answers missing files with an empty tokenizer, to which every text is unknown; those of T5 and
        # mBART hold the lone word boundary besides special tokens.
        raise ModelError(
            "there is no vocabulary: the tokenizer holds special tokens only",
            where=name,
            remedy="put its tokenizer.json into the folder",
        )
    return tokenizer
