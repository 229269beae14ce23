"""Objectives of pretraining: from a plain text or a sentence pair and a generator of noise to an example.

A recipe names them (`pretrain.objectives`); each makes a stream `objective:languages` of its own, which
`mixture.objective_weights` weighs. The tasks of the data sets (translation, ...) are streams beside them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel

from enc2gen.data.noising import Denoiser, NoiseConfig, split_sentences, word_starts
from enc2gen.data.span_corruption import (
    SpanCorruptionConfig,
    SpanCorruptor,
    TranslationSpanCorruptionConfig,
    UL2Config,
    UL2Denoiser,
)
from enc2gen.errors import DataError
from enc2gen.registry import Registry
from enc2gen.tokenization.examples import EncodedExample
from enc2gen.tokenization.tokenizer import TextCodec

Row = Mapping[str, Any]


class Objective(ABC):
    """Makes examples of rows, with noise.

    Args:
        codec: of the model; its tokenizer needs a mask token.
        config: the objective's settings, what the recipe's section `settings` holds.

    Attributes:
        reads: `texts` (rows with `text` and `language`) or `pairs` (rows with `source`, `target` and their languages).
        settings: name of the section of `pretrain` with its settings.

    Raises:
        DataError: the tokenizer has no mask token.
    """

    reads: ClassVar[Literal["texts", "pairs"]] = "texts"
    settings: ClassVar[str]

    def __init__(self, codec: TextCodec, config: Any) -> None:
        mask = codec.tokenizer.mask_token_id
        if mask is None:
            raise DataError("the tokenizer has no mask token, which denoising needs", where="tokenizer")
        self.codec = codec
        self.config = config
        self.mask_id = int(mask)

    @abstractmethod
    def __call__(self, row: Row, rng: np.random.Generator) -> EncodedExample:
        """The example of `row`; all randomness is drawn from `rng`."""


OBJECTIVES: Registry[type[Objective]] = Registry("objective")
"""Objectives by the name that recipes and `objective_weights` use."""


@OBJECTIVES.register("denoising")
class DenoisingEncoder(Objective):
    """The noised text is the source, the text the target, both in one language.

    mBART's noise (arXiv 2001.08210, section 2.2), as XLM-SWCM uses it (arXiv 2502.10852, section 3.2).
    """

    settings = "noise"

    def __init__(self, codec: TextCodec, config: NoiseConfig) -> None:
        super().__init__(codec, config)
        self.denoiser = Denoiser(config, self.mask_id)

    def __call__(self, row: Row, rng: np.random.Generator) -> EncodedExample:
        text, language = row["text"], row["language"]
        decoder_input_ids, labels = self.codec.encode_target(text, language)
        kept = self.codec.decode(labels) if len(labels) == self.codec.max_target_length else text
        sentences = [ids for ids in self.codec.encode_texts(split_sentences(kept, language)) if ids]
        starts = [word_starts(self.codec.tokenizer.convert_ids_to_tokens(ids)) for ids in sentences]
        noised = self.denoiser.noise(sentences, rng, starts)
        source = self.codec.wrap_source(noised, language)
        return EncodedExample(tuple(source), tuple(decoder_input_ids), tuple(labels))


@OBJECTIVES.register("span-corruption")
class SpanCorruption(Objective):
    """The text without some spans is the source, the spans the target (T5, arXiv 1910.10683, section 3.1.4).

    Texts that do not fit the longest source are cut at the end before spans are masked; targets that do not fit are
    cut at the end.
    """

    settings = "span_corruption"

    def __init__(self, codec: TextCodec, config: SpanCorruptionConfig | UL2Config) -> None:
        super().__init__(codec, config)
        self.corruptor = SpanCorruptor(self.mask_id)

    def __call__(self, row: Row, rng: np.random.Generator) -> EncodedExample:
        ids = self._fit(
            self.codec.encode_text(row["text"]), self.codec.max_source_length - 3
        )  # <s> <language> ... </s>
        corrupted = self.corruptor.corrupt(ids, self._rates(rng), rng)
        return self._example(corrupted.source, corrupted.target, row["language"], row["language"])

    def _rates(self, rng: np.random.Generator) -> SpanCorruptionConfig:
        return self.config

    def _fit(self, ids: list[int], room: int) -> list[int]:
        self.codec.truncated += len(ids) > room
        return ids[:room]

    def _example(self, source: list[int], target: list[int], read: str | None, write: str) -> EncodedExample:
        decoder_input_ids, labels = self.codec.wrap_target(target, write)
        return EncodedExample(tuple(self.codec.wrap_source(source, read)), tuple(decoder_input_ids), tuple(labels))


@OBJECTIVES.register("ul2")
class MixtureOfDenoisers(SpanCorruption):
    """Span corruption with rates that are drawn anew for each example (UL2, arXiv 2205.05131, section 3.1)."""

    settings = "ul2"

    def _rates(self, rng: np.random.Generator) -> UL2Denoiser:
        return self.config.draw(rng)


@OBJECTIVES.register("translation-span-corruption")
class TranslationSpanCorruption(SpanCorruption):
    """Both sentences of a pair without some spans are the source, the spans of both the target.

    mT6 (arXiv 2104.08692) and DeltaLM (arXiv 2106.13736, section 3.2). The sentences are set apart by the end token,
    and no span reaches over it. The source has the language token of the pair's source, and the decoder starts with
    that of its target. A pair that does not fit is cut at the end of its longer side first.
    """

    reads = "pairs"
    settings = "translation_span_corruption"

    def __init__(self, codec: TextCodec, config: TranslationSpanCorruptionConfig) -> None:
        super().__init__(codec, config)

    def __call__(self, row: Row, rng: np.random.Generator) -> EncodedExample:
        sides = [self.codec.encode_text(row[name]) for name in ("source", "target")]
        room = self.codec.max_source_length - 4  # <s> <language> ... </s> ... </s>
        lengths = [max(room // 2, room - len(other)) for other in reversed(sides)]
        first, second = (
            self.corruptor.corrupt(self._fit(ids, length), self.config, rng)
            for ids, length in zip(sides, lengths, strict=True)
        )
        source = [*first.source, self.codec.end_id, *second.source]
        return self._example(source, first.target + second.target, row["source_language"], row["target_language"])


def build_objective(name: str, codec: TextCodec, pretrain: BaseModel) -> Objective:
    """The objective `name` with its settings out of the recipe's section `pretrain`."""
    kind = OBJECTIVES.get(name)
    return kind(codec, getattr(pretrain, kind.settings))
