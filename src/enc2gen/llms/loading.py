"""Load a causal language model and its tokenizer by Hub name, folder, GGUF file, `embedded:` name, or take a model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from enc2gen.encoders.dtypes import check_dtype, parse_dtype, to_dtype
from enc2gen.encoders.embedded import EMBEDDED
from enc2gen.encoders.loading import EMBEDDED_PREFIX, load_tokenizer
from enc2gen.encoders.reading import suggestion
from enc2gen.encoders.weights import check_complete, reading_weights
from enc2gen.errors import ConfigError, ModelError, first_line
from enc2gen.llms.embedded import EMBEDDED_LLMS, converted, plain, read_gguf, read_gguf_tokenizer
from enc2gen.tokenization.tokenizer import protect_special_tokens

_LLMS_THAT_WORK = "as the LLM one like Llama, Qwen, Gemma or embedded:smollm2-135m-instruct"


def load_llm(
    llm: str | os.PathLike[str] | PreTrainedModel,
    *,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Return a causal language model with its head, in evaluation mode, on the CPU unless it was given loaded.

    Args:
        llm: Hub name, folder, `.gguf` file, `embedded:smollm2-135m-instruct`, or a loaded model, which is not copied
            (one that transformers read from a GGUF file is rebuilt around the same weights so that it can be saved).
        dtype: of the weights; None: as they are stored (float32 for GGUF).
        attn_implementation: transformers' name of it; None: "eager" where there is no GPU (measured: 1.4 times
            quicker than "sdpa" for short masked prefixes on the CPU), else transformers' own choice. A loaded model
            keeps its own.

    Raises:
        ConfigError: an unknown `embedded:` name, dtype or attention.
        ModelError: nothing of this name, not a decoder-only model with a language-model head, or a dtype that this
            machine cannot compute in.
        CheckpointError: the weights are truncated, incomplete or another model's.
    """
    wanted = None if dtype is None else parse_dtype(dtype)
    if wanted is not None:
        check_dtype(wanted, where="the LLM's dtype")
    if isinstance(llm, PreTrainedModel):
        return _loaded(llm, wanted)
    name = os.fspath(llm)
    options: dict[str, Any] = {"attn_implementation": attn_implementation or _default_attention()}
    gguf = _gguf_file(name)
    if gguf is None:
        model = _load_checkpoint(name, wanted, options)
    elif (folder := converted(gguf)) is not None:
        model = _load_checkpoint(str(folder), wanted, options)
    else:
        model = to_dtype(read_gguf(gguf), wanted or torch.float32)
        model.set_attn_implementation(options["attn_implementation"])
    model.config.name_or_path = name
    return model.eval()


def _default_attention() -> str | None:
    return None if torch.cuda.is_available() else "eager"


def _gguf_file(name: str) -> Path | None:
    """The GGUF file that `name` stands for, None if it is a folder's or the Hub's."""
    if name.startswith(EMBEDDED_PREFIX):
        entry = name.removeprefix(EMBEDDED_PREFIX)
        if entry in EMBEDDED and entry not in EMBEDDED_LLMS:
            raise ModelError(
                "this is an encoder, it cannot write",
                where=name,
                remedy="give it as the encoder; LLMs: " + ", ".join(EMBEDDED_PREFIX + llm for llm in EMBEDDED_LLMS),
            )
        return EMBEDDED_LLMS.get(entry, where=name).path()
    if not name.endswith(".gguf"):
        return None
    path = Path(name)
    if not path.is_file():
        raise ModelError("there is no such GGUF file", where=name, remedy="check the path")
    return path


def _loaded(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    _check_type(model.config, type(model).__name__)
    if model.get_output_embeddings() is None:
        raise ModelError(
            f"{type(model).__name__} has no language-model head",
            where="llm",
            remedy="load it with AutoModelForCausalLM",
        )
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None and "gguf" in str(getattr(quantization, "quant_method", quantization)).lower():
        model = plain(model)
    return (model if dtype is None else to_dtype(model, dtype)).eval()


def _load_checkpoint(name: str, dtype: torch.dtype | None, options: dict[str, Any]) -> PreTrainedModel:
    config = _load_config(name)
    _check_type(config, name)
    auto_class: Any = AutoModelForCausalLM
    with reading_weights(name, "LLM"), _fitting_options(name):
        model, info = auto_class.from_pretrained(
            name, config=config, dtype=dtype or "auto", output_loading_info=True, **options
        )
    check_complete(info["missing_keys"], name, "LLM", otherwise="cannot write")
    check_dtype(model.dtype, where=name)
    return cast(PreTrainedModel, model)


@contextmanager
def _fitting_options(name: str) -> Iterator[None]:
    """Errors that are not the checkpoint's fault."""
    try:
        yield
    except Exception as error:
        if "attn_implementation" in str(error):
            remedy = 'use "eager" or "sdpa"'
            raise ConfigError(first_line(error), where="attn_implementation", remedy=remedy) from error
        if isinstance(error, ImportError):
            raise ModelError(
                f"a package is missing: {first_line(error)}",
                where=name,
                remedy="install it, or choose another attn_implementation or an unquantized checkpoint",
            ) from error
        raise


def _load_config(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        embedded = [EMBEDDED_PREFIX + entry for entry in EMBEDDED_LLMS]
        raise ModelError(
            f"no LLM can be loaded from this name ({first_line(error)})",
            where=name,
            remedy=f"{suggestion(name, embedded)}give a folder with config.json, a .gguf file, the name of a Hub model "
            f"that is reachable from here, or one of: {', '.join(embedded)}",
        ) from error


def _check_type(config: PreTrainedConfig, where: str) -> None:
    kind = type(config)
    if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and getattr(config, "is_encoder_decoder", True):
        wrong = "an encoder-decoder"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        wrong = "an encoder, it cannot write"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        wrong = "not a language model"
    elif lacking := _lacking_arguments(kind):
        raise ModelError(
            f"{config.model_type!r} cannot write behind a soft prefix: it takes no {' and no '.join(lacking)}",
            where=where,
            remedy=f"recurrent LLMs such as Mamba and RWKV do not work; give {_LLMS_THAT_WORK}",
        )
    else:
        return
    raise ModelError(
        f"{config.model_type!r} is {wrong}; a bridge writes with a decoder-only language model",
        where=where,
        remedy=f"give it as the encoder, and {_LLMS_THAT_WORK}",
    )


def _lacking_arguments(kind: type[PreTrainedConfig]) -> list[str]:
    """What a bridge gives its LLM and this kind does not take: the state of Mamba and RWKV is no `past_key_values`."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    given = inspect.signature(model_class.forward).parameters
    return [name for name in ("inputs_embeds", "attention_mask", "past_key_values") if name not in given]


def load_llm_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Return the fast tokenizer of an LLM, set up to read text that spells a special token as plain text.

    A chat template is rendered to a string with special tokens in it: encode that with
    `tokenizer(rendered, add_special_tokens=False, split_special_tokens=False)`.

    Raises:
        ConfigError: an unknown `embedded:` name.
        ModelError: there is none, only a slow one, or its vocabulary files are missing.
        CheckpointError: the GGUF file is damaged.
    """
    name = os.fspath(name)
    gguf = _gguf_file(name)
    if gguf is None:
        tokenizer = load_tokenizer(name)
    else:
        folder = converted(gguf)
        tokenizer = read_gguf_tokenizer(gguf) if folder is None else load_tokenizer(folder)
    protect_special_tokens(tokenizer)
    tokenizer.name_or_path = name
    return tokenizer


@dataclass(frozen=True)
class LlmSpecialIds:
    """Ids that a bridge needs of its LLM.

    Attributes:
        bos: what a text begins with; None if the LLM knows no such token.
        eos: what ends a text.
        pad: what fills up batches; any id will do, because padding is masked by place and never by id.
    """

    bos: int | None
    eos: int
    pad: int


def llm_special_ids(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> LlmSpecialIds:
    """The special ids: the tokenizer's, else the configuration's; a missing pad token is replaced by EOS.

    Raises:
        ModelError: no end-of-sequence token, or an id outside the embedding table.
    """
    bos, eos, pad = (_special_id(role, tokenizer, config) for role in ("bos", "eos", "pad"))
    where = str(tokenizer.name_or_path or config.name_or_path or "") or "llm"
    if eos is None:
        raise ModelError(
            "the LLM has no end-of-sequence token, so that its answers would never end",
            where=where,
            remedy='set one: tokenizer.eos_token = "..." (a token of its vocabulary), then pass tokenizer and model',
        )
    rows = config.get_text_config().vocab_size
    for role, value in (("bos", bos), ("eos", eos)):
        if value is not None and not 0 <= value < rows:
            raise ModelError(
                f"the {role} token has id {value}, but the LLM has {rows} embeddings",
                where=where,
                remedy="use the tokenizer that belongs to this LLM",
            )
    # Pad tokens added to a tokenizer alone have no row: Llama 2 with "[PAD]" at id 32000 is common.
    return LlmSpecialIds(bos, eos, pad if pad is not None and 0 <= pad < rows else eos)


def _special_id(role: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int | None:
    value = getattr(tokenizer, f"{role}_token_id", None)
    if value is None:
        value = getattr(config.get_text_config(), f"{role}_token_id", None)
    return value[0] if isinstance(value, list) else value
