"""From prepared examples to training streams and evaluation batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from enc2gen.data.batching import (
    BatchStream,
    EncodedExample,
    IndexedSource,
    source_fingerprint,
)
from enc2gen.data.mixture import MixtureSampler
from enc2gen.data.noising import Denoiser, NoiseConfig, split_sentences, word_starts
from enc2gen.errors import DataError
from enc2gen.experiments.recipe import PretrainConfig, StageConfig, StageName
from enc2gen.tokenization.tokenizer import TextCodec

IN_MEMORY = 200_000
"""Up to so many rows are held as Python objects, which is quicker than reading each from the memory map."""

Row = Mapping[str, Any]


def rows_of(dataset: Any) -> IndexedSource[Row]:
    """The rows of a `datasets.Dataset`: in memory where few, else memory-mapped."""
    return dataset.to_list() if len(dataset) <= IN_MEMORY else dataset


def encode_pair(codec: TextCodec, row: Row) -> EncodedExample:
    """Source and target of an example: `<s> <source language> ... </s>` to `<target language> ... </s>`."""
    decoder_input_ids, labels = codec.encode_target(row["target"], row["target_language"])
    source = codec.encode_source(row["source"], row["source_language"])
    return EncodedExample(tuple(source), tuple(decoder_input_ids), tuple(labels))


class DenoisingEncoder:
    """Makes denoising examples: the noised text is the source, the text the target, both in one language.

    mBART's noise (arXiv 2001.08210, section 2.2), as XLM-SWCM uses it (arXiv 2502.10852, section 3.2).
    """

    def __init__(self, codec: TextCodec, noise: NoiseConfig) -> None:
        mask = codec.tokenizer.mask_token_id
        if mask is None:
            raise DataError("the tokenizer has no mask token, which denoising needs", where="tokenizer")
        self.codec = codec
        self.denoiser = Denoiser(noise, mask)

    def __call__(self, row: Row, rng: np.random.Generator) -> EncodedExample:
        """Encode `row` (`text`, `language`) with noise drawn from `rng`."""
        text, language = row["text"], row["language"]
        decoder_input_ids, labels = self.codec.encode_target(text, language)
        kept = self.codec.decode(labels) if len(labels) == self.codec.max_target_length else text
        sentences = [ids for ids in self.codec.encode_texts(split_sentences(kept, language)) if ids]
        starts = [word_starts(self.codec.tokenizer.convert_ids_to_tokens(ids)) for ids in sentences]
        noised = self.denoiser.noise(sentences, rng, starts)
        source = self.codec.wrap_source(noised, language)
        return EncodedExample(tuple(source), tuple(decoder_input_ids), tuple(labels))


def training_stream(
    stage: StageName,
    config: StageConfig,
    examples: Any,
    texts: Any,
    codec: TextCodec,
    *,
    seed: int,
) -> BatchStream:
    """The infinite batch stream of a stage.

    Args:
        examples: training examples (`datasets.Dataset`).
        texts: plain texts; used by pretraining only.

    Raises:
        DataError: nothing to train on.
    """
    pairs = rows_of(examples)
    streams: dict[str, list[int]] = {}
    for index, (stages, objective, source, target) in enumerate(
        zip(*(examples[name] for name in ("stages", "objective", "source_language", "target_language")), strict=True)
    ):
        if stage in stages:
            streams.setdefault(f"{objective}:{source or 'any'}-{target}", []).append(index)
    parts: dict[str, Any] = {"pairs": source_fingerprint(pairs)}
    denoise, plain = None, rows_of(texts)
    if isinstance(config, PretrainConfig) and len(plain):
        denoise = DenoisingEncoder(codec, config.noise)
        parts |= {"texts": source_fingerprint(plain), "noise": config.noise.model_dump()}
        for index, language in enumerate(texts["language"]):
            streams.setdefault(f"denoising:{language}", []).append(index)
    if not streams:
        raise DataError(
            f"no example is meant for {stage}", where="data", remedy=f"list {stage} under a dataset's stages"
        )
    sizes = {name: len(indices) for name, indices in streams.items()}
    mixture = config.mixture
    sampler = MixtureSampler(sizes, mixture.alpha, seed, mixture.objective_weights)

    def encode(stream: str, item: int, rng: np.random.Generator) -> EncodedExample:
        index = streams[stream][item]
        if denoise is not None and stream.startswith("denoising:"):
            return denoise(plain[index], rng)
        return encode_pair(codec, pairs[index])

    parts["lengths"] = [codec.max_source_length, codec.max_target_length]
    parts["tokenizer"] = sorted(codec.tokenizer.get_vocab().items())
    return BatchStream(encode, sampler, codec.pad_id, config.batching, seed, parts)


def target_limit(codec: TextCodec, targets: Sequence[str]) -> int:
    """Output limit in tokens learnt from training targets: a quarter above the 99.9th percentile (our choice)."""
    lengths = [len(ids) + 1 for ids in codec.encode_texts(list(targets))]
    return min(codec.max_target_length, int(np.ceil(1.25 * np.percentile(lengths, 99.9))))
