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
from enc2gen.data.mixture import MixtureSampler, objective_of
from enc2gen.errors import DataError
from enc2gen.experiments.data_config import StageName
from enc2gen.experiments.objectives import OBJECTIVES, Objective, build_objective
from enc2gen.experiments.recipe import PretrainConfig, StageConfig
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
        DataError: nothing to train on, or no text for an objective that the recipe names.
    """
    pairs, plain = rows_of(examples), rows_of(texts)
    streams = _task_streams(stage, examples)
    parts: dict[str, Any] = {"pairs": source_fingerprint(pairs)}
    noised: dict[str, tuple[Objective, IndexedSource[Row]]] = {}
    for name in config.objectives if isinstance(config, PretrainConfig) else ():
        reads_texts = OBJECTIVES.get(name).reads == "texts"
        if found := _text_streams(name, texts) if reads_texts else _pair_streams(name, streams):
            objective = build_objective(name, codec, config)
            streams |= found
            noised[name] = objective, plain if reads_texts else pairs
            parts |= {"texts": source_fingerprint(plain)} if reads_texts else {}
            parts[objective.settings] = objective.config.model_dump()
        elif name != "denoising":  # the default, which a recipe without plain text may keep
            raise _nothing_for(name, f"{stage}.objectives", "plain text" if reads_texts else "translation pair")
    if not streams:
        raise DataError(
            f"no example is meant for {stage}", where="data", remedy=f"list {stage} under a dataset's stages"
        )
    mixture, sizes = config.mixture, {name: len(indices) for name, indices in streams.items()}
    sampler = MixtureSampler(sizes, mixture.alpha, seed, mixture.objective_weights)

    def encode(stream: str, item: int, rng: np.random.Generator) -> EncodedExample:
        index, name = streams[stream][item], objective_of(stream)
        if name in noised:
            objective, rows = noised[name]
            return objective(rows[index], rng)
        return encode_pair(codec, pairs[index])

    parts["lengths"] = [codec.max_source_length, codec.max_target_length]
    parts["tokenizer"] = sorted(codec.tokenizer.get_vocab().items())
    return BatchStream(encode, sampler, codec.pad_id, config.batching, seed, parts)


def _nothing_for(objective: str, where: str, needed: str) -> DataError:
    return DataError(
        f"there is no {needed} for the objective {objective!r}",
        where=where,
        remedy="add such data, or leave the objective out",
    )


def _task_streams(stage: StageName, examples: Any) -> dict[str, list[int]]:
    """Numbers of the examples of each task and direction that `stage` trains on."""
    streams: dict[str, list[int]] = {}
    for index, (stages, objective, source, target) in enumerate(
        zip(*(examples[name] for name in ("stages", "objective", "source_language", "target_language")), strict=True)
    ):
        if stage in stages:
            streams.setdefault(f"{objective}:{source or 'any'}-{target}", []).append(index)
    return streams


def _text_streams(objective: str, texts: Any) -> dict[str, list[int]]:
    """Numbers of the plain texts in each language."""
    streams: dict[str, list[int]] = {}
    for index, language in enumerate(texts["language"]):
        streams.setdefault(f"{objective}:{language}", []).append(index)
    return streams


def _pair_streams(objective: str, streams: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The translation streams under the name of another objective."""
    found = {name: indices for name, indices in streams.items() if objective_of(name) == "translation"}
    return {f"{objective}:{name.partition(':')[2]}": indices for name, indices in found.items()}


def target_limit(codec: TextCodec, targets: Sequence[str]) -> int:
    """Output limit in tokens learnt from training targets: a quarter above the 99.9th percentile (our choice)."""
    lengths = [len(ids) + 1 for ids in codec.encode_texts(list(targets))]
    return min(codec.max_target_length, int(np.ceil(1.25 * np.percentile(lengths, 99.9))))
