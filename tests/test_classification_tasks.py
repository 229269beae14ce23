"""Classification data: where it is found, how it becomes text and label, and what is said when it does not."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from enc2gen.corpora.readers import Record
from enc2gen.data import classification
from enc2gen.data.classification import (
    CLASSIFICATION_TASKS,
    LabelledText,
    balanced,
    build_classification_task,
    label_names,
    script_of,
)
from enc2gen.data.language_files import language_file, own_splits
from enc2gen.errors import ConfigError, DataError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "sib200"


@pytest.fixture
def sib200(tmp_path: Path) -> Path:
    """Three languages in the layout of SIB-200: Kazakh's dev set is called validation."""
    rows = [{"id": 7, "text": "goal!", "label": "sports"}, {"id": 3, "text": "a pill", "label": "health"}]
    for language, split in [
        ("eng_Latn", "train"),
        ("eng_Latn", "dev"),
        ("kaz_Cyrl", "validation"),
        ("uig_Arab", "dev"),
    ]:
        file = tmp_path / language / f"{split}.jsonl.gz"
        file.parent.mkdir(exist_ok=True)
        with gzip.open(file, "wt", encoding="utf-8") as out:
            out.writelines(json.dumps({**row, "text": f"{language} {row['text']}"}) + "\n" for row in rows)
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Record]], list[tuple[str, str]]]:
    """Stands in for the Hub: serves the records given and notes what was asked for."""

    def serve(records: list[Record]) -> list[tuple[str, str]]:
        asked: list[tuple[str, str]] = []

        def read(source: str, *, split: str) -> Iterator[Record]:
            asked.append((source, split))
            return iter(records)

        monkeypatch.setattr(classification, "read_records", read)
        return asked

    return serve


def test_a_folder_per_language_is_read(sib200: Path) -> None:
    task = CLASSIFICATION_TASKS.get("sib200")
    assert task.available_languages(sib200) == ["eng_Latn", "kaz_Cyrl", "uig_Arab"]
    assert task.load("eng_Latn", "train", sib200) == [
        LabelledText("eng_Latn goal!", "sports", "eng_Latn", "7"),
        LabelledText("eng_Latn a pill", "health", "eng_Latn", "3"),
    ]
    for split in ("dev", "validation"):
        assert [item.text for item in task.load("kaz_Cyrl", split, sib200)] == ["kaz_Cyrl goal!", "kaz_Cyrl a pill"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the SIB-200 folder ../shared/data/sib200")
def test_the_real_sib200_is_parallel_and_complete() -> None:
    task = CLASSIFICATION_TASKS.get("sib200")
    assert {"eng_Latn", "kaz_Cyrl", "bod_Tibt"} <= set(task.available_languages(SHARED))
    english, kazakh = (task.load(language, "test", SHARED) for language in ("eng_Latn", "kaz_Cyrl"))
    assert len(english) == 204
    assert {item.id: item.label for item in english} == {item.id: item.label for item in kazakh}
    assert set(label_names(english)) == set(task.labels)


@pytest.mark.parametrize(
    ("asked", "near"), [("kk", "'kaz_Cyrl'"), ("eng_latn", "'eng_Latn'"), ("uyghur_Arab", "'uig_Arab'")]
)
def test_a_language_that_is_not_there_is_answered_with_near_names(sib200: Path, asked: str, near: str) -> None:
    with pytest.raises(DataError, match=f"no data of language '{asked}'(.|\n)*did you mean {near}"):
        CLASSIFICATION_TASKS.get("sib200").load(asked, "dev", sib200)


def test_a_split_that_is_not_there_names_the_files(sib200: Path) -> None:
    with pytest.raises(DataError, match=r"no file of split 'test'(.|\n)*dev.jsonl.gz, train.jsonl.gz"):
        CLASSIFICATION_TASKS.get("sib200").load("eng_Latn", "test", sib200)
    with pytest.raises(ConfigError, match="unknown split 'tset'"):
        CLASSIFICATION_TASKS.get("sib200").load("eng_Latn", "tset", sib200)


@pytest.mark.parametrize(
    ("name", "language", "record", "text", "label", "source", "split"),
    [
        ("sib200", "kaz_Cyrl", {"index_id": 1, "category": 6, "text": "T"}, "T", "geography",
         "hub:Davlan/sib200:kaz_Cyrl", "validation"),
        ("sib200", "kaz_Cyrl", {"index_id": 1, "category": "travel", "text": "T"}, "T", "travel",
         "hub:Davlan/sib200:kaz_Cyrl", "validation"),
        ("xnli", "sw", {"premise": "P", "hypothesis": "{H}", "label": 2},
         "Premise: P Hypothesis: {H} Label: ", "Contradiction", "hub:facebook/xnli:sw", "validation"),
        ("xnli", "sw", {"premise": "P", "hypothesis": "H", "label": "entailment"},
         "Premise: P Hypothesis: H Label: ", "Entailment", "hub:facebook/xnli:sw", "validation"),
        ("indicxnli", "bn", {"premise": "P", "hypothesis": "H", "label": 1},
         "Premise: P Hypothesis: H Label: ", "Neutral", "hub:Divyanshu/indicxnli:bn", "validation"),
        ("indicxnli", "en", {"premise": "P", "hypothesis": "H", "label": 1},
         "Premise: P Hypothesis: H Label: ", "Neutral", "hub:facebook/xnli:en", "validation"),
        ("sinhala-news", "si", {"sentence": "S", "label": "Science"}, "News Sentence: S Category: ", "Science",
         "hub:Themira/en_si_news_classification_with_label_name:dev_si", "train"),
        ("amazon-reviews", "ja", {"id": "ja_1", "text": "R", "label": 0, "label_text": "0"},
         "Review: R Label: ", "Very Negative", "hub:mteb/amazon_reviews_multi:ja", "validation"),
    ],
)  # fmt: skip
def test_published_tasks(
    hub: Any, name: str, language: str, record: Record, text: str, label: str, source: str, split: str
) -> None:
    asked = hub([record])
    (item,) = CLASSIFICATION_TASKS.get(name).load(language, "dev")
    assert (item.text, item.label, item.language) == (text, label, language)
    assert asked == [(source, split)]


def test_the_hub_has_its_own_languages_and_other_names_of_it_can_be_given(hub: Any) -> None:
    asked = hub([{"premise": "P", "hypothesis": "H", "label": 0}])
    with pytest.raises(DataError, match="did you mean 'sw'"):
        CLASSIFICATION_TASKS.get("xnli").load("swh_Latn", "test")
    CLASSIFICATION_TASKS.get("xnli").load("yo", "test", "someone/xnli-more")
    CLASSIFICATION_TASKS.get("xnli").load("yo", "test", "hub:someone/xnli-more:all_{language}")
    CLASSIFICATION_TASKS.get("indicxnli").load("en", "test", "someone/xnli-more")
    CLASSIFICATION_TASKS.get("indicxnli").load("en", "test", "hub:Divyanshu/indicxnli")
    sources = ["someone/xnli-more:yo", "someone/xnli-more:all_yo", "someone/xnli-more:en", "facebook/xnli:en"]
    assert [source for source, _ in asked] == [f"hub:{source}" for source in sources]


def test_names_of_splits_can_be_set_for_a_data_set_without_configurations(hub: Any) -> None:
    asked = hub([{"sentence": "S", "label": "Science"}])
    options = {"hub_config": None, "splits": {"test": "test_{language}"}}
    build_classification_task("sinhala-news", options).load("si", "test")
    assert asked == [("hub:Themira/en_si_news_classification_with_label_name", "test_si")]


def test_options_leave_a_task_of_its_own_kind_what_it_is() -> None:
    from enc2gen.data.name_kinds import NameKinds

    task = build_classification_task("name-kinds", {"template": "name: {text}"})
    assert isinstance(task, NameKinds) and task.template == "name: {text}"


def test_without_a_network_the_hub_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"Davlan/sib200"):
        CLASSIFICATION_TASKS.get("sib200").load("eng_Latn", "test")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("mine.tsv", "class\tsentence\ngood\tA fine day\n3\tA bad day\n"),
        ("mine.csv", "sentence,class\nA fine day,good\nA bad day,3\n"),
        ("mine.jsonl", '{"sentence": "A fine day", "class": "good"}\n{"sentence": "A bad day", "class": 3}\n'),
    ],
)
def test_a_users_own_file(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    task = build_classification_task("tsv", {"template": "It says: {sentence}", "label_fields": ["class"]})
    items = task.load("en", "train", tmp_path / file)
    assert [(item.text, item.label, item.id) for item in items] == [
        ("It says: A fine day", "good", "1"),
        ("It says: A bad day", "3", "2"),
    ]
    assert label_names(items) == ("3", "good")


def test_files_named_by_language_and_split(tmp_path: Path) -> None:
    for language in ("en", "kk"):
        (tmp_path / f"data.{language}").mkdir()
        (tmp_path / f"data.{language}" / "test.tsv").write_text(f"text\tlabel\n{language} text\ta\n", encoding="utf-8")
    path = str(tmp_path / "data.{language}" / "{split}.tsv")
    task = CLASSIFICATION_TASKS.get("tsv")
    assert task.load("kk", "test", path)[0].text == "kk text"
    assert task.available_languages(path) == ["en", "kk"]
    with pytest.raises(DataError, match="did you mean 'kk'"):
        task.load("kaz", "test", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "txt\tlabel\nA\tsports\n",
            "record 1: missing column 'text'(.|\n)*did you mean 'txt'(.|\n)*columns: txt, label",
        ),
        ("text\ttopic\nA\tsports\n", "missing column 'label' or 'category'"),
        ("text\tlabel\nA\tsports\nB\tsport\n", "record 2: unknown label 'sport'(.|\n)*did you mean 'sports'"),
        ("text\tlabel\nA\t7\n", "unknown label '7'"),
        ("text\tlabel\nA\tsports\n\tsports\n", "record 2: field 'text' is empty"),
        ("text\tlabel\nA\t\n", "record 1: the label is empty"),
        ("", "the file is empty"),
        ("text\tlabel\n", "no records"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mine.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        CLASSIFICATION_TASKS.get("sib200").load("en", "train", tmp_path / "mine.tsv")


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        CLASSIFICATION_TASKS.get("sib200").load("en", "train", tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"no data of its own(.|\n)*give the path"):
        CLASSIFICATION_TASKS.get("tsv").load("en", "train")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sib20", {}, "did you mean 'sib200'"),
        ("tsv", {"label": "class"}, "label: Extra inputs(.|\n)*options: name, template, label_fields"),
        ("tsv", {"template": "no field"}, "must name text fields"),
        ("tsv", {"template": "{text"}, "braces do not match"),
    ],
)
def test_options_that_cannot_work(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_classification_task(name, options)


def test_limiting_takes_the_first_of_each_label_in_a_shuffled_order() -> None:
    items = [LabelledText(f"t{i}", "a" if i % 3 else "b", "en", str(i)) for i in range(60)]
    chosen = balanced(items, 20)
    assert Counter(item.label for item in chosen) == {"a": 10, "b": 10}
    assert {item.id for item in chosen if item.label == "b"} == {str(3 * i) for i in range(10)}
    assert chosen == balanced(items, 20) != balanced(items, 20, seed=1)
    assert [item.label for item in chosen] != sorted(item.label for item in chosen)


@pytest.mark.parametrize(
    ("language", "script"),
    [("uig_Arab", "Arab"), ("zho_Hant", "Hant"), ("eng_Latn", "Latn"), ("si", "Sinh"), ("kk", "Cyrl"), ("?", "Zyyy")],
)
def test_scripts_of_languages_as_data_sets_name_them(language: str, script: str) -> None:
    assert script_of(language) == script


def test_a_cell_without_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": NaN, "label": "science/technology"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="field 'text' is empty"):
        CLASSIFICATION_TASKS.get("sib200").load("kaz_Cyrl", "train", path)


def test_a_split_in_a_file_name_may_be_called_validation(tmp_path: Path) -> None:
    for name in ("kk.train.tsv", "kk.valid.tsv"):
        (tmp_path / name).write_text("text\tlabel\nбір\tsports\n", encoding="utf-8")
    pattern = tmp_path / "{language}.{split}.tsv"
    assert language_file(pattern, "kk", "dev") == tmp_path / "kk.valid.tsv"
    assert own_splits(pattern, "kk") == {"train", "dev"}
    with pytest.raises(DataError, match=r"kk\.test\.tsv: no file of split 'test' of language 'kk'"):
        language_file(pattern, "kk", "test")
    with pytest.raises(DataError, match=r"(?s)no data of language 'ug'.*available: kk"):
        language_file(pattern, "ug", "train")
