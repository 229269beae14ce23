"""The controls: another source for every target, the best constant string, permuted hypotheses."""

from __future__ import annotations

import json
import math
import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import CHRF

from enc2gen.data.batching import EncodedExample, collate
from enc2gen.errors import ConfigError, DataError
from enc2gen.evaluation import source_use
from enc2gen.evaluation.source_use import (
    best_constant,
    copy_source,
    derangement,
    distinct_outputs,
    measure_source_use,
    permuted_chrf,
    shuffled_source_batches,
    shuffled_source_examples,
    source_gain,
    with_another_source,
)

PAD, BOS, EOS, KK, UG, EN = 1, 0, 2, 100, 101, 102


def examples(count: int, seed: int = 0) -> list[EncodedExample]:
    """Sources name their example, `<s> language index ... </s>`; targets are Kazakh or Uyghur."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        target = (KK, UG)[index % 2]
        source = EN if index % 3 else target
        words = tuple(rng.randrange(10, 90) for _ in range(rng.randrange(6)))
        labels = (*words, EOS)
        made.append(EncodedExample((BOS, source, 1000 + index, *words, EOS), (target, *labels[:-1]), labels))
    return made


def corpus_chrf(text: str, references: list[list[str]]) -> float:
    return CHRF(word_order=2).corpus_score([text] * len(references), [[r[0] for r in references]]).score


def names(count: int, seed: int) -> list[list[str]]:
    rng = random.Random(seed)
    return [["".join(rng.choices("анбаы к", k=rng.randint(1, 14)))] for _ in range(count)]


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.integers(0, 3))
def test_derangement_moves_everything_to_a_different_value(values: list[int], seed: int) -> None:
    if 2 * max(values.count(value) for value in values) > len(values):
        with pytest.raises(DataError, match="cannot give every sentence another one"):
            derangement(values, seed)
        return
    order = derangement(values, seed).tolist()
    assert sorted(order) == list(range(len(values)))
    assert all(values[order[index]] != values[index] for index in range(len(values)))


def test_derangement_depends_on_the_seed_and_reaches_every_partner() -> None:
    assert derangement(range(9), 1).tolist() == derangement(range(9), 1).tolist()
    partners = {int(derangement(range(6), seed)[0]) for seed in range(60)}
    assert partners == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_cannot_be_shuffled(count: int) -> None:
    with pytest.raises(DataError):
        derangement(range(count), 0)


def test_shuffled_examples_keep_targets_and_languages() -> None:
    given_examples = examples(60)
    shuffled = shuffled_source_examples(given_examples, 3, language_ids={KK, UG, EN})
    assert sorted(e.input_ids for e in shuffled) == sorted(e.input_ids for e in given_examples)
    for before, after in zip(given_examples, shuffled, strict=True):
        assert (after.labels, after.decoder_input_ids) == (before.labels, before.decoder_input_ids)
        assert after.input_ids != before.input_ids
        assert after.input_ids[1] == before.input_ids[1]  # the language of the source
        assert (after.input_ids[2] - before.input_ids[2]) % 2 == 0  # the language of the target
    assert shuffled_source_examples(given_examples, 4, language_ids={KK, UG, EN}) != shuffled


def test_repeated_sources_never_meet_themselves() -> None:
    sources = [(BOS, 7, EOS)] * 5 + [(BOS, 8, EOS)] * 3 + [(BOS, 9, EOS)] * 2
    made = [EncodedExample(source, (KK, 5), (5, EOS)) for source in sources]
    for seed in range(20):
        shuffled = shuffled_source_examples(made, seed)
        assert all(a.input_ids != b.input_ids for a, b in zip(made, shuffled, strict=True))
    with pytest.raises(DataError, match=r"6 of 11 are the same(.|\n)*more different"):
        shuffled_source_examples([*made, made[0]], 0)


def test_languages_without_another_source_are_left_out() -> None:
    made = examples(40)
    ids = {KK, UG, EN}
    assert with_another_source(made, language_ids=ids) == made
    alone = EncodedExample((BOS, 103, 1, EOS), (KK, 5), (5, EOS))
    twice = EncodedExample((BOS, UG, 1, EOS), (EN, 5), (5, EOS))
    mixed = [*made[:20], alone, twice, twice, *made[20:]]
    kept = with_another_source(mixed, language_ids=ids | {103})
    assert kept == made
    assert len(shuffled_source_examples(kept, language_ids=ids | {103})) == 40
    assert with_another_source([alone]) == []


def test_shuffled_batches_are_the_shuffled_examples_in_place() -> None:
    made = examples(30)
    batches = [collate(made[start : start + 8], PAD) for start in range(0, 30, 8)]
    shuffled = shuffled_source_batches(batches, PAD, 3, language_ids={KK, UG, EN})
    expected = shuffled_source_examples(made, 3, language_ids={KK, UG, EN})
    for start, before, after in zip(range(0, 30, 8), batches, shuffled, strict=True):
        wanted = collate(expected[start : start + 8], PAD)
        for name, tensor in wanted.as_model_inputs().items():
            assert torch.equal(tensor, after.as_model_inputs()[name]), name
            assert tensor.dtype == before.as_model_inputs()[name].dtype
        assert torch.equal(after.labels, before.labels)
        assert after.num_target_tokens == before.num_target_tokens


@pytest.mark.parametrize("optimistic", [False, True])
def test_best_constant_is_the_best_of_all_candidates(optimistic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_use, "_EXACT_CANDIDATES", 1)  # the quick ranking alone must find it
    dev, test = names(40, 0), names(50, 1)
    found = best_constant(dev, test, optimistic=optimistic, candidates=["кабан", ""], resamples=20)
    chosen_on = test if optimistic else dev
    strings = {text for texts in [*dev, *(test if optimistic else [])] for text in texts} | {"кабан"}
    best = max(corpus_chrf(text, chosen_on) for text in strings if text.strip())
    assert corpus_chrf(found.text, chosen_on) == best
    assert found.score.value == corpus_chrf(found.text, test)
    assert found.score.low <= found.score.value <= found.score.high


def test_optimistic_constant_is_at_least_as_good() -> None:
    dev, test = names(30, 2), names(30, 3)
    honest, optimistic = (best_constant(dev, test, optimistic=flag, resamples=20) for flag in (False, True))
    assert optimistic.score.value >= honest.score.value


def test_best_constant_with_several_references_is_a_candidate_and_near_the_best() -> None:
    dev = [[a[0], b[0]] for a, b in zip(names(25, 4), names(25, 5), strict=True)]
    found = best_constant(dev, dev, resamples=20)
    streams = [[texts[0] for texts in dev], [texts[1] for texts in dev]]
    scores = {text: CHRF(word_order=2).corpus_score([text] * 25, streams).score for texts in dev for text in texts}
    assert found.score.value == scores[found.text]
    assert found.score.value >= 0.95 * max(scores.values())


def test_best_constant_is_quick_and_its_cap_holds() -> None:
    dev = names(1500, 6)
    start = time.process_time()
    best_constant(dev, names(200, 7), resamples=20)
    assert time.process_time() - start < 8.0  # every candidate against every reference would be 9 million pairs
    one = best_constant(dev, dev[:10], max_candidates=1, seed=1, resamples=2).text
    assert one == best_constant(dev, dev[:10], max_candidates=1, seed=1, resamples=2).text
    assert len({best_constant(dev[:50], dev[:9], max_candidates=1, seed=s, resamples=2).text for s in range(5)}) > 1


@pytest.mark.parametrize(
    ("dev", "test", "options", "error"),
    [
        ([], [["a"]], {}, DataError),
        ([["a"]], [], {}, DataError),
        ([[""]], [["a"]], {}, DataError),
        (["a"], [["a"]], {}, DataError),
        ([["a"]], [["a"]], {"max_candidates": 0}, ConfigError),
    ],
)
def test_best_constant_refuses(dev, test, options, error) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error):
        best_constant(dev, test, **options)


def test_permuting_costs_a_source_user_and_not_a_constant_system() -> None:
    references = names(60, 8)
    perfect = [texts[0] for texts in references]
    used = measure_source_use(perfect, references, loss=1.0, shuffled_loss=3.5, resamples=50)
    constant = measure_source_use(["бана"] * 60, references, loss=1.0, shuffled_loss=1.0, resamples=50)
    assert used.chrf.value == pytest.approx(100.0)
    assert used.chrf.above(used.permuted_chrf)
    assert used.permuted_chrf.value < 40.0
    assert constant.permuted_chrf == constant.chrf
    assert (constant.distinct_outputs, constant.outputs, constant.gain) == (1, 60, 0.0)
    assert (used.distinct_outputs, used.gain) == (len(set(map(str.strip, perfect))), 2.5)
    saved = json.loads(json.dumps(used.to_dict()))
    assert (saved["gain"], saved["chrf"]["value"]) == (2.5, used.chrf.value)


def test_permuted_chrf_gives_no_hypothesis_to_its_own_reference() -> None:
    """Texts without a common letter: any hypothesis left in place would score."""
    texts = [chr(0x4E00 + index) * 3 for index in range(30)]
    for seed in range(5):
        assert permuted_chrf(texts, [[text] for text in texts], seed, resamples=2).value == 0.0
    with pytest.raises(DataError):
        permuted_chrf(["a"], [["a"]])


def test_small_helpers() -> None:
    assert distinct_outputs(["a", "a ", "b", ""]) == 3
    assert copy_source(("a", "b")) == ["a", "b"]
    assert source_gain(4.0, 6.5) == 2.5
    for loss in (math.nan, math.inf):
        with pytest.raises(DataError, match="losses are"):
            source_gain(loss, 1.0)
