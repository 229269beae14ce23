"""Tasks: from records to examples, and what a wrong mapping says."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from enc2gen.data.tasks import TASKS, Example, build_task
from enc2gen.errors import ConfigError, DataError, LanguageError

PAIR = {"src": "hello", "tgt": "сәлем", "src_lang": "EN", "tgt_lang": "kaz"}
FIELDS = {"source": "src", "target": "tgt"}
FROM_FIELDS = {**FIELDS, "source_language_field": "src_lang", "target_language_field": "tgt_lang"}
FIXED = {**FIELDS, "source_language": "en", "target_language": "KK"}


def run(name: str, mapping: dict[str, Any], *records: dict[str, Any]) -> list[Example]:
    return list(build_task(name, mapping).examples(records, where="corpus.jsonl"))


def test_the_four_tasks_are_registered() -> None:
    assert list(TASKS) == ["continuation", "reading-comprehension", "summarisation", "text-to-text", "translation"]


@pytest.mark.parametrize("mapping", [FROM_FIELDS, FIXED])
def test_translation_takes_languages_from_fields_or_config_and_normalises_them(mapping: dict) -> None:
    assert run("translation", mapping, PAIR) == [Example("hello", "сәлем", "en", "kk", ("сәлем",), "translation")]


def test_translation_in_both_directions_swaps_text_and_languages() -> None:
    forward, reverse = run("translation", {**FIXED, "directions": "both"}, PAIR)
    assert (forward.source, forward.target_language) == ("hello", "kk")
    assert reverse == Example("сәлем", "hello", "kk", "en", ("hello",), "translation")
    assert run("translation", {**FIXED, "directions": "reverse"}, PAIR) == [reverse]


def test_a_dot_reaches_into_nested_records_as_hub_translation_sets_have_them() -> None:
    mapping = {**FIXED, "source": "translation.en", "target": "translation.kk"}
    (example,) = run("translation", mapping, {"translation": {"en": "hello", "kk": "сәлем"}})
    assert (example.source, example.target) == ("hello", "сәлем")


def test_further_references_follow_the_target_without_repetition() -> None:
    record = {**PAIR, "others": ["сәлеметсіз бе", "сәлем", " "]}
    (example,) = run("translation", {**FIXED, "references": "others"}, record)
    assert example.references == ("сәлем", "сәлеметсіз бе")


def test_summarisation_reads_and_writes_one_language_unless_told_otherwise() -> None:
    record = {"body": "ཡིག་ཆ", "headline": "ཁ་བྱང", "lang": "bo"}
    fields = {"document": "body", "summary": "headline", "language_field": "lang"}
    (example,) = run("summarisation", fields, record)
    assert example == Example("ཡིག་ཆ", "ཁ་བྱང", "bo", "bo", ("ཁ་བྱང",), "summarisation")
    (crossed,) = run("summarisation", {**fields, "target_language": "zh"}, record)
    assert (crossed.source_language, crossed.target_language) == ("bo", "zh")


QA = {"context": "Abai was born in 1845 {sic}.", "question": "When?", "answer": ["1845", "in 1845", "1845"]}


def test_reading_comprehension_learns_the_first_answer_and_accepts_all() -> None:
    (example,) = run("reading-comprehension", {"language": "en"}, QA)
    assert example.source == "When? Abai was born in 1845 {sic}."
    assert (example.target, example.references) == ("1845", ("1845", "in 1845"))


def test_reading_comprehension_joins_question_and_context_as_declared() -> None:
    mapping = {"language": "en", "template": "question: {question} context: {context}"}
    (example,) = run("reading-comprehension", mapping, QA)
    assert example.source == "question: When? context: Abai was born in 1845 {sic}."


def test_reading_comprehension_reads_squad_answers_and_numbers() -> None:
    nested = {**QA, "answers": {"text": ["1845"], "answer_start": [17]}}
    assert run("reading-comprehension", {"language": "en", "answers": "answers.text"}, nested)[0].target == "1845"
    assert run("reading-comprehension", {"language": "en"}, {**QA, "answer": 1845})[0].target == "1845"


@pytest.mark.parametrize("template", ["{question}", "{question} {context} {title}", "{question.x} {context}", "{"])
def test_a_template_must_name_question_and_context(template: str) -> None:
    with pytest.raises(ConfigError, match="template"):
        build_task("reading-comprehension", {"language": "en", "template": template})


def test_text_to_text_needs_no_source_language() -> None:
    (example,) = run("text-to-text", {"target_language": "mn"}, {"source": " a ", "target": "b"})
    assert example == Example("a", "b", None, "mn", ("b",), "text-to-text")


def test_empty_sources_and_targets_are_skipped_and_counted() -> None:
    task = build_task("translation", FIXED)
    texts = [("a", "б"), ("", "б"), ("  ", "б"), ("a", None), ("c", "д")]
    kept = list(task.examples({"src": source, "tgt": target} for source, target in texts))
    assert [example.source for example in kept] == ["a", "c"]
    assert task.counts == {"records": 5, "examples": 2, "empty source": 2, "empty target": 1}


def test_a_question_without_context_is_an_empty_source() -> None:
    task = build_task("reading-comprehension", {"language": "en"})
    assert list(task.examples([{**QA, "context": ""}, {**QA, "answer": []}])) == []
    assert task.counts == {"records": 2, "empty source": 1, "empty target": 1}


def test_examples_stream() -> None:
    def endless() -> Iterator[dict[str, str]]:
        while True:
            yield PAIR

    assert next(build_task("translation", FIXED).examples(endless())).source == "hello"


def test_a_missing_field_names_record_columns_and_close_match() -> None:
    with pytest.raises(DataError) as caught:
        run("translation", FIXED, PAIR, {"src": "x", "target": "y", "tgtt": "z"})
    message = str(caught.value)
    assert "corpus.jsonl, record 2" in message
    assert "no field 'tgt'" in message
    assert "src, target, tgtt" in message
    assert "did you mean 'tgtt'" in message


def test_a_missing_nested_field_suggests_the_nested_name() -> None:
    with pytest.raises(DataError, match=r"did you mean 'translation\.kk'"):
        run("translation", {**FIXED, "target": "translation.kaz"}, {"src": "a", "translation": {"kk": "б"}})


@pytest.mark.parametrize("value", [["two", "texts"], {"text": "x"}, True])
def test_a_source_that_is_not_text_is_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"record 1: field 'src' holds a (list|dict|bool), not text"):
        run("translation", FIXED, {**PAIR, "src": value})


def test_an_unknown_language_in_a_record_names_the_record() -> None:
    with pytest.raises(LanguageError, match=r"corpus\.jsonl, record 1"):
        run("translation", FROM_FIELDS, {**PAIR, "tgt_lang": "qqqq-nonsense"})
    with pytest.raises(DataError, match=r"record 1: field 'tgt_lang' names no language"):
        run("translation", FROM_FIELDS, {**PAIR, "tgt_lang": None})


def test_an_unknown_fixed_language_is_refused_before_any_record() -> None:
    with pytest.raises(LanguageError, match="translation task, target_language"):
        build_task("translation", {**FIXED, "target_language": "Klingonese"})


@pytest.mark.parametrize(
    ("name", "mapping", "says"),
    [
        ("translation", FIELDS, "exactly one of"),
        ("translation", {**FIXED, "target_language_field": "tgt_lang"}, "exactly one of target_language"),
        ("translation", {**FIELDS, "target_language": "kk"}, "exactly one of source_language"),
        ("text-to-text", {}, "exactly one of target_language"),
        ("summarisation", {}, "exactly one of language"),
        ("summarisation", {"language": "bo", "docment": "x"}, "docment.*\n.*document"),
        ("translation", {**FIXED, "directions": "sideways"}, "directions"),
        ("translatoin", {}, "did you mean 'translation'"),
    ],
)
def test_a_wrong_mapping_says_what_is_wrong(name: str, mapping: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)recipe\.yaml.*{says}"):
        build_task(name, mapping, where="recipe.yaml")


SHARED = Path(os.environ.get("ENC2GEN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.parametrize(
    ("file", "name", "mapping"),
    [
        ("parallel/kk-en.ntrex", "translation", FROM_FIELDS),
        ("headlines/ug", "summarisation", {"language": "ug"}),
        ("qa/kk.kazqad", "reading-comprehension", {"language": "kk", "answers": "answers"}),
        ("qa/yo-en.afriqa", "reading-comprehension", {"language": "yo", "target_language": "en"}),
    ],
)
def test_real_corpora_map_without_loss(file: str, name: str, mapping: dict) -> None:
    path = SHARED / f"{file}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    task = build_task(name, mapping)
    examples = list(task.examples(records))
    assert len(examples) == task.counts["examples"] >= 0.99 * len(records)
    assert all(example.references[0] == example.target for example in examples)


def test_the_empty_cell_of_a_table_is_no_text() -> None:
    task = build_task("translation", {"source_language": "en", "target_language": "kk"})
    records = [{"source": "hello", "target": math.nan}, {"source": "one", "target": "бір"}]
    assert [example.target for example in task.examples(records)] == ["бір"]
    assert task.counts["empty target"] == 1


def test_half_of_an_emoji_is_named_with_its_record() -> None:
    task = build_task("translation", {"source_language": "en", "target_language": "kk"})
    records = [{"source": "hello", "target": json.loads('"cut \\ud83d"')}]
    with pytest.raises(DataError, match=r"pairs\.jsonl, record 1.*'target' holds half of a character \(U\+D83D\)"):
        list(task.examples(records, where="pairs.jsonl"))


def test_questions_about_a_text_are_held_out_together() -> None:
    task = build_task("reading-comprehension", {"language": "kk"})
    records = [{"context": "мәтін", "question": question, "answer": "иә"} for question in ("бір?", "екі?")]
    first, second = task.examples(records)
    assert first.source != second.source and first.group == second.group == "мәтін"
