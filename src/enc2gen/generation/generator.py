"""Text in, text out: tokenisation, length-sorted batches, decoding, original order restored."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

import enc2gen.models.swcm  # noqa: F401  registers the model with transformers
from enc2gen.corpora.languages import normalise_language
from enc2gen.encoders.donor import donor_for
from enc2gen.encoders.loading import load_tokenizer
from enc2gen.errors import CheckpointError, Enc2genError, LanguageError, ModelError
from enc2gen.tokenization.tokenizer import TextCodec


class DecodingConfig(BaseModel):
    """How outputs are searched. Lengths are limited by the model's own generation_config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_beams: int = Field(default=4, ge=1, description="beams; 1 is greedy search")
    length_penalty: float = Field(default=1.0, description="exponent of the length that scores are divided by")
    no_repeat_ngram_size: int = Field(default=0, ge=0, description="no token n-gram of this size twice; 0: allowed")
    do_sample: bool = Field(default=False, description="sample instead of searching (give num_beams 1)")
    temperature: float = Field(default=1.0, gt=0, description="of sampling")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus of sampling (arXiv 1904.09751)")
    max_new_tokens: int | None = Field(default=None, ge=1, description="overrides the limit saved with the model")
    batch_size: int = Field(default=32, ge=1, description="sources decoded at once")

    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        chosen: dict[str, Any] = {"num_beams": self.num_beams, "do_sample": self.do_sample}
        if self.num_beams > 1:
            chosen |= {"length_penalty": self.length_penalty, "early_stopping": True}
        if self.no_repeat_ngram_size:
            chosen["no_repeat_ngram_size"] = self.no_repeat_ngram_size
        if self.do_sample:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        if self.max_new_tokens is not None:
            chosen["max_new_tokens"] = self.max_new_tokens
        return chosen


class Generator:
    """A model and its tokenizer, ready to write.

    Args:
        model: with `config.languages` (tag -> id of its token).
        tokenizer: that knows the language tokens.
        max_source_length: longest source in tokens, special tokens included; longer ones are cut.

    Raises:
        ModelError: model and tokenizer do not belong together.
    """

    codec: Any  # of this class a TextCodec; what it encodes, only the class that owns it looks into

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_source_length: int | None = None
    ) -> None:
        languages: Mapping[str, int] = getattr(model.config, "languages", None) or {}
        _check_pair(model, tokenizer, languages)
        self.model, self.tokenizer, self.languages = model.eval(), tokenizer, dict(languages)
        limit = min(max_source_length or 512, tokenizer.model_max_length, _positions(model))
        self.codec = TextCodec(tokenizer, self.languages, max_source_length=limit, max_target_length=limit)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, device: str | torch.device | None = None) -> Generator:
        """Load a saved model and its tokenizer from a folder or the Hub; a bridge becomes a `BridgeGenerator`.

        Raises:
            CheckpointError: not a model of this kind, or truncated.
        """
        from enc2gen.generation.bridge_generator import BridgeGenerator  # a subclass of this one

        name = os.fspath(path)
        transformers.logging.disable_progress_bar()  # ours is the only progress shown
        if not Path(name).exists() and name.count("/") != 1:
            raise CheckpointError("there is no such model folder", where=name, remedy="check the path")
        try:
            model, info = AutoModelForSeq2SeqLM.from_pretrained(name, output_loading_info=True)
        except Enc2genError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"no generator can be loaded ({reason})",
                where=name,
                remedy="give a folder that `enc2gen run` or `save_pretrained` wrote completely",
            ) from error
        if info["missing_keys"]:
            raise CheckpointError(
                f"{len(info['missing_keys'])} tensors are missing, for example {sorted(info['missing_keys'])[0]}",
                where=name,
                remedy="save the model again; its weights are incomplete",
            )
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if model.config.model_type == "enc2gen-bridge":
            return BridgeGenerator(model)
        return cls(model, load_tokenizer(name))

    def source_language(self, given: str | None) -> str | None:
        """The language of sources: as given, or the model's default."""
        if given is not None:
            return self._known(given, "source_language")
        return getattr(self.model.config, "default_source_language", None)

    def target_language(self, given: str | None) -> str | None:
        """The language to write: as given, or the model's default; None in a model without languages."""
        given = given or getattr(self.model.config, "default_target_language", None)
        if given is None:
            raise LanguageError(
                "no target language given",
                where="target_language",
                remedy=f"choose one of: {', '.join(sorted(self.languages))}",
            )
        return self._known(given, "target_language")

    def _known(self, tag: str, where: str) -> str:
        language = normalise_language(tag, where=where)
        if language not in self.languages:
            raise LanguageError(
                f"this model does not know language {language!r}",
                where=where,
                remedy=f"it knows: {', '.join(sorted(self.languages))}",
            )
        return language

    @torch.inference_mode()
    def generate(
        self,
        texts: Sequence[str],
        *,
        target_language: str | None = None,
        source_language: str | None = None,
        config: DecodingConfig | None = None,
        seed: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Write one output per text, in the order of `texts`; an empty text gives an empty output.

        Args:
            target_language: language to write.
            source_language: language of the texts.
            seed: of sampling.
            on_batch: called with the number of texts finished so far.

        Raises:
            LanguageError: a language the model does not know.
        """
        config = config or DecodingConfig()
        target, source = self.target_language(target_language), self.source_language(source_language)
        encoded = self._encode(list(texts), source)
        order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: -self._length(encoded[i]))
        outputs, arguments = [""] * len(texts), config.arguments()
        if seed is not None:
            torch.manual_seed(seed)
        for start in range(0, len(order), config.batch_size):
            chosen = order[start : start + config.batch_size]
            ids = self._decode([encoded[index] for index in chosen], target, arguments)
            for index, row in zip(chosen, ids, strict=True):
                outputs[index] = self.codec.decode(row)
            if on_batch is not None:
                on_batch(start + len(chosen))
        return outputs

    def _encode(self, texts: Sequence[str], source_language: str | None) -> list[Any]:
        """What the model reads of each text."""
        return self.codec.encode_sources(texts, source_language)

    def _length(self, encoded: Any) -> int:
        """Source tokens of an encoded text, by which batches are sorted."""
        return len(encoded)

    def _decode(self, sources: Sequence[Any], target: str | None, arguments: dict[str, Any]) -> list[list[int]]:
        """Output ids, without what the decoder was given to start from, for sources padded to one batch."""
        ids, mask = pad_rows(sources, int(self.model.config.pad_token_id), self.model.device)
        output: Any = self.model.generate(
            input_ids=ids, attention_mask=mask, decoder_start_token_id=self.languages[cast(str, target)], **arguments
        )
        return output[:, 1:].tolist()


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Ids and mask of `rows`, both `[rows, longest]`, padded on the right or the left."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row, dtype=torch.long), 1
    return ids.to(device), mask.to(device)


def _positions(model: PreTrainedModel) -> int:
    """Longest source, in tokens, that the model's encoder has positions for."""
    config: Any = model.config
    encoder = getattr(config, "encoder_config", None) or getattr(config, "encoder", None)
    return donor_for(encoder).max_positions if encoder is not None else 512


def _check_pair(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, languages: Mapping[str, int]) -> None:
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    where = str(model.config.name_or_path or type(model).__name__)
    remedy = "use the tokenizer that was saved with the model"
    if len(tokenizer) > rows:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows}", where=where, remedy=remedy)
    vocabulary = tokenizer.get_vocab()
    for tag, index in languages.items():
        if vocabulary.get(f"<{tag}>") != index:
            raise ModelError(
                f"the tokenizer does not know the language token <{tag}> as {index}", where=where, remedy=remedy
            )
