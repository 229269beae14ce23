"""Span corruption: nothing is lost, rates and lengths match, and recipes train on what they name."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from enc2gen.data.span_corruption import (
    SpanCorruptionConfig,
    SpanCorruptor,
    TranslationSpanCorruptionConfig,
    UL2Config,
    UL2Denoiser,
)
from enc2gen.errors import ConfigError, DataError
from enc2gen.experiments.encoding import training_stream
from enc2gen.experiments.objectives import OBJECTIVES, build_objective
from enc2gen.experiments.recipe import PretrainConfig
from enc2gen.tokenization.tokenizer import TextCodec, add_language_tokens

MASK = 10**6


def corrupt(length: int, seed: int = 0, **config: Any) -> tuple[list[int], list[int]]:
    kind = UL2Denoiser if "at_end" in config else SpanCorruptionConfig
    corrupted = SpanCorruptor(MASK).corrupt(range(length), kind(**config), np.random.default_rng(seed))
    return corrupted.source, corrupted.target


def pieces(ids: list[int]) -> list[list[int]]:
    """Ids between mask tokens."""
    parts: list[list[int]] = [[]]
    for piece in ids:
        if piece == MASK:
            parts.append([])
        else:
            parts[-1].append(piece)
    return parts


def refill(source: list[int], target: list[int]) -> list[int]:
    """The text, put together again by the order of the mask tokens alone."""
    visible, (before, *hidden) = pieces(source), pieces(target)
    assert before == [] and len(hidden) == len(visible) - 1 and all(hidden)
    return visible[0] + [piece for span, rest in zip(hidden, visible[1:], strict=True) for piece in span + rest]


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    ratio=st.floats(0.05, 0.9),
    span=st.floats(1, 70),
    at_end=st.booleans(),
)
def test_source_and_target_together_are_the_text(
    length: int, seed: int, ratio: float, span: float, at_end: bool
) -> None:
    source, target = corrupt(length, seed, mask_ratio=ratio, mean_span=span, at_end=at_end)
    assert refill(source, target) == list(range(length))
    assert not any(first == second == MASK for first, second in pairwise(source))
    if length > 1:
        assert set(source) != {MASK}, "something stays visible"


@pytest.mark.parametrize("ratio", [0.15, 0.5])
@pytest.mark.parametrize("length", [10, 41])
def test_the_masked_share_is_the_rate(ratio: float, length: int) -> None:
    trials = 2000
    masked = sum(len(corrupt(length, seed, mask_ratio=ratio)[1]) for seed in range(trials))
    spans = sum(corrupt(length, seed, mask_ratio=ratio)[1].count(MASK) for seed in range(trials))
    assert (masked - spans) / (trials * length) == pytest.approx(ratio, abs=0.01)


def test_the_mean_span_and_every_place_are_as_asked_for() -> None:
    lengths: list[int] = []
    places: Counter[int] = Counter()
    for seed in range(2000):
        _, target = corrupt(40, seed, mask_ratio=0.3, mean_span=4.0)
        lengths += [len(span) for span in pieces(target)[1:]]
        places.update(set(target) - {MASK})
        assert target.count(MASK) == 3  # round(12 / 4)
    assert np.mean(lengths) == pytest.approx(4.0, abs=1e-9)
    assert len(set(lengths)) == 10, "lengths are drawn, from 1 to 12 - 2"
    assert min(places[0], places[39]) > 0.1 * 2000, "the first and the last token are masked, too"
    assert max(places.values()) < 0.5 * 2000


def test_the_sequential_denoiser_continues_the_text() -> None:
    source, target = corrupt(40, mask_ratio=0.25, at_end=True)
    assert source == [*range(30), MASK] and target == [MASK, *range(30, 40)]


def test_ul2_draws_its_denoisers_by_weight() -> None:
    config = UL2Config()
    rates = {(d.mean_span, d.mask_ratio) for d in config.denoisers if not d.at_end}
    assert rates == {(3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)}
    assert [d.mask_ratio for d in config.denoisers if d.at_end] == [0.25]
    rng = np.random.default_rng(0)
    drawn = Counter(config.denoisers.index(config.draw(rng)) for _ in range(7000))
    assert all(abs(drawn[index] - 1000) < 150 for index in range(7))
    weighted = UL2Config(denoisers=({"weight": 0}, {"at_end": True}))
    assert all(weighted.draw(rng).at_end for _ in range(50))


def test_impossible_settings_are_refused() -> None:
    for bad in ({"mask_ratio": 0.0}, {"mask_ratio": 1.0}, {"mean_span": 0.5}):
        with pytest.raises(ValidationError):
            SpanCorruptionConfig(**bad)
    with pytest.raises(ValidationError, match="above 0"):
        UL2Config(denoisers=({"weight": 0},))
    with pytest.raises(ConfigError, match="mask_token_id"):
        SpanCorruptor(-1)


PAIR = {"source": "the bread is hot", "target": "нан ыстық", "source_language": "en", "target_language": "kk"}
TEXT = {"text": "алма мен нан ыстық су", "language": "kk"}


def codec_of(tokenizer: Any, source: int = 32, target: int = 32) -> TextCodec:
    languages = add_language_tokens(tokenizer, ["en", "kk"])
    return TextCodec(tokenizer, languages, max_source_length=source, max_target_length=target)


def test_a_text_becomes_a_source_with_gaps_and_its_spans(tokenizer: Any) -> None:
    codec = codec_of(tokenizer)
    objective = build_objective("span-corruption", codec, pretrain(span_corruption={"mask_ratio": 0.5}))
    example = objective(TEXT, np.random.default_rng(0))
    start, language, *read, end = example.input_ids
    assert (start, language, end) == (codec.start_id, codec.language_id("kk"), codec.end_id)
    *written, last = example.labels
    assert last == codec.end_id and example.decoder_input_ids == (codec.language_id("kk"), *written)
    mask = tokenizer.mask_token_id
    swap = {mask: MASK}
    text = refill([swap.get(i, i) for i in read], [swap.get(i, i) for i in written])
    assert text == codec.encode_text(TEXT["text"])
    assert len(example.labels) < len(codec.encode_text(TEXT["text"])) + 1 or written.count(mask) > 1


def test_both_sides_of_a_pair_are_masked_and_kept_apart(tokenizer: Any) -> None:
    codec = codec_of(tokenizer)
    objective = build_objective("translation-span-corruption", codec, pretrain())
    example = objective(PAIR, np.random.default_rng(1))
    inner = list(example.input_ids[2:-1])
    border = inner.index(codec.end_id)
    mask = tokenizer.mask_token_id
    spans = [MASK if i == mask else i for i in example.labels[:-1]]
    read = [[MASK if i == mask else i for i in side] for side in (inner[:border], inner[border + 1 :])]
    assert example.input_ids[1] == codec.language_id("en") and example.decoder_input_ids[0] == codec.language_id("kk")
    assert all(MASK in side for side in read)
    # The spans of the first side come first: as many as it has mask tokens.
    starts = [place for place, piece in enumerate(spans) if piece == MASK]
    cut = starts[read[0].count(MASK)]
    assert refill(read[0], spans[:cut]) == codec.encode_text(PAIR["source"])
    assert refill(read[1], spans[cut:]) == codec.encode_text(PAIR["target"])


@pytest.mark.parametrize("name", ["span-corruption", "ul2", "translation-span-corruption"])
def test_long_texts_fit_the_limits_and_are_counted(tokenizer: Any, name: str) -> None:
    codec = codec_of(tokenizer, source=16, target=8)
    long = " ".join(["алма нан"] * 40)
    row = {**PAIR, "source": long, "target": long, "text": long, "language": "kk"}
    for seed in range(30):
        example = build_objective(name, codec, pretrain())(row, np.random.default_rng(seed))
        assert example.source_length <= 16 and example.target_length <= 8
        assert example.input_ids[-1] == example.labels[-1] == codec.end_id
    assert codec.truncated >= 30


def test_the_shorter_side_of_a_pair_is_not_cut(tokenizer: Any) -> None:
    codec = codec_of(tokenizer, source=40, target=64)
    row = {**PAIR, "target": " ".join(["алма нан"] * 40)}
    short = len(codec.encode_text(PAIR["source"]))
    assert short < 18
    config = pretrain(translation_span_corruption={"mask_ratio": 0.01})  # one token of either side
    example = build_objective("translation-span-corruption", codec, config)(row, np.random.default_rng(0))
    assert list(example.input_ids).index(codec.end_id) == 2 + short
    assert example.source_length == 40


def pretrain(**changes: Any) -> PretrainConfig:
    content = {
        "training": {"max_steps": 1, "learning_rate": 1e-3},
        "batching": {"max_tokens": 200, "buffer_batches": 2},
    }
    return PretrainConfig(**{**content, **changes})


def stream(codec: TextCodec, config: PretrainConfig, texts: int = 5) -> Any:
    row = {**PAIR, "objective": "translation", "stages": ["pretrain"]}
    other = {**row, "objective": "summarisation"}
    pairs = Dataset.from_list([*({**row, "source": f"{row['source']} {n}"} for n in range(6)), other])
    plain = Dataset.from_dict({"text": [f"{TEXT['text']} {n}" for n in range(texts)], "language": ["kk"] * texts})
    return training_stream("pretrain", config, pairs, plain, codec, seed=0)


def test_recipes_mix_the_objectives_that_they_name(tokenizer: Any) -> None:
    codec = codec_of(tokenizer, source=48, target=48)
    weights = {"translation": 0, "summarisation": 0, "span-corruption": 1.0, "translation-span-corruption": 1.0}
    config = pretrain(
        objectives=["span-corruption", "translation-span-corruption"], mixture={"objective_weights": weights}
    )
    batches = stream(codec, config)
    kinds: Counter[int] = Counter()
    for _ in range(12):
        batch = next(batches)
        kinds.update((batch.input_ids == codec.end_id).sum(1).tolist())  # a pair has two end tokens
        first = batch.labels[:, 0]
        assert (first == tokenizer.mask_token_id).all(), "targets are spans"
    assert set(kinds) == {1, 2} and 0.5 < kinds[1] / kinds[2] < 2


def test_streams_resume_exactly_and_refuse_other_rates(tokenizer: Any) -> None:
    codec = codec_of(tokenizer, source=48, target=48)
    config = pretrain(objectives=["ul2", "denoising"])
    whole = stream(codec, config)
    for _ in range(5):
        next(whole)
    state = whole.state_dict()
    resumed = stream(codec, config)
    resumed.load_state_dict(state)
    for _ in range(6):
        expected, actual = next(whole), next(resumed)
        assert all(
            torch.equal(tensor, actual.as_model_inputs()[name]) for name, tensor in expected.as_model_inputs().items()
        )
    changed = pretrain(objectives=["ul2", "denoising"], ul2={"denoisers": [{"mask_ratio": 0.3}]})
    with pytest.raises(Exception, match="ul2"):
        stream(codec, changed).load_state_dict(state)


def test_the_default_stream_is_that_of_before_there_was_a_choice(tokenizer: Any) -> None:
    parts = stream(codec_of(tokenizer), pretrain()).state_dict()["parts"]
    named = {name for name in parts if name.startswith("data.")}
    assert named == {"data.pairs", "data.texts", "data.noise", "data.lengths", "data.tokenizer"}
    identity = pretrain().identity()
    assert identity.keys() == {"batching", "mixture", "noise"}
    other = pretrain(objectives=["span-corruption"]).identity()
    assert other.keys() == {"batching", "mixture", "objectives", "span_corruption"}


def test_mistakes_in_objectives_are_named(tokenizer: Any) -> None:
    with pytest.raises(ValidationError, match="span-corruption"):
        pretrain(objectives=["span-coruption"])
    with pytest.raises(ValidationError, match="twice"):
        pretrain(objectives=["ul2", "ul2"])
    with pytest.raises(DataError, match="no plain text for the objective 'ul2'"):
        stream(codec_of(tokenizer), pretrain(objectives=["ul2"]), texts=0)
    assert next(stream(codec_of(tokenizer), pretrain(), texts=0)).num_tokens > 0
    assert {kind.settings for name in OBJECTIVES for kind in [OBJECTIVES.get(name)]} < set(PretrainConfig.model_fields)
    assert TranslationSpanCorruptionConfig().mask_ratio > SpanCorruptionConfig().mask_ratio
