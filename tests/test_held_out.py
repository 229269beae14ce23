"""What is held out stays unseen."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from enc2gen.data.held_out import drawn, reading, unseen
from enc2gen.data.tasks import Example
from enc2gen.experiments.bridge.prepare import data_key, parallel_pairs
from enc2gen.experiments.bridge.recipe import PairsSection


def read() -> Iterator[tuple[str, Example]]:
    """Kazakh sources that several splits have, with different English targets."""
    for split, source, target in (
        ("train", "ит", "dog"),
        ("dev", "ит", "hound"),
        ("test", "мысық", "cat"),
        ("dev", "мысық", "tomcat"),
        ("train", "мысық", "kitten"),
        ("train", "құс", "bird"),
        ("train", "құс", "fowl"),
        ("test", "жылқы", "horse"),
    ):
        yield split, Example(source, target, "kk", "en", group=target)
    yield "train", Example("мысық", "chat", "kk", "fr", group="chat")


def test_no_split_has_a_source_that_another_holds_out() -> None:
    told: list[str] = []
    kept = list(unseen(read, {"directions": "reverse"}, where="pairs.tsv", log=told.append))
    assert [(split, example.target) for split, example in kept] == [
        ("dev", "hound"),
        ("test", "cat"),
        ("train", "bird"),
        ("train", "fowl"),
        ("test", "horse"),
        ("train", "chat"),  # into another language: another thing to learn
    ]
    assert told == ["pairs.tsv: 3 examples left out, whose source is held out for dev or test"]
    assert list(unseen(read, {}, where="pairs.tsv", log=told.append)) == list(read()) and len(told) == 1
    # files of dev and test may repeat training sources, whichever way pairs are read
    assert list(unseen(read, {}, where="pairs.tsv", log=told.append, own_files=True)) == kept


def test_pairs_of_bridges_hold_out_what_they_read(tmp_path: Path) -> None:
    words = ["".join("abcdefghij"[int(digit)] for digit in f"{n:03d}") for n in range(200)]
    rows = ["en\tkk", *(f"{word} {form}\tсөз {word}" for word in words for form in ("one", "other"))]
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    fields = {
        "source": "en", "target": "kk", "source_language": "en", "target_language": "kk", "directions": "reverse",
    }  # fmt: skip
    section = PairsSection(source="pairs", path=str(path), fields=fields, test_percent=20)
    sources: dict[str, set[str]] = {"train": set(), "dev": set(), "test": set()}
    told: list[str] = []
    for split, pair in parallel_pairs(section, told.append):
        sources[split].add(pair.source)
    assert len(told) == 1 and told[0].startswith(str(path)) and "examples left out" in told[0]
    assert all(len(found) > 3 for found in sources.values())
    assert not sources["train"] & (sources["dev"] | sources["test"]) and not sources["dev"] & sources["test"]


def test_pairs_of_bridges_that_are_prepared_forwards_are_kept_as_they_are() -> None:
    def key(**fields: str) -> dict[str, Any]:
        both = {"source": "en", "target": "kk", "source_language": "en", "target_language": "kk"}
        section = PairsSection(source="pairs", path="pairs.tsv", fields=both | fields)
        return data_key(SimpleNamespace(task=None, seeds=[0], stages=[SimpleNamespace(name="one", data=[section])]))

    assert "reverse_split" not in key() and "reverse_split" not in key(directions="forward")
    assert key(directions="reverse")["reverse_split"] == key(directions="both")["reverse_split"]


def test_what_is_read_is_source_and_both_languages() -> None:
    assert reading(Example("ит", "dog", "kk", "en")) == ("ит", "kk", "en")


def test_a_limit_draws_from_all_of_a_sorted_corpus() -> None:
    rows = [
        {"source": f"{language} {number:04d}", "language": language} for language in "abcd" for number in range(250)
    ]
    source = itemgetter("source")
    few, more = drawn(rows, 100, source), drawn(rows, 300, source)
    assert len(few) == 100 and len(more) == 300
    assert all(15 <= sum(row["language"] == language for row in few) <= 35 for language in "abcd")
    assert few == sorted(few, key=rows.index), "in their order"
    assert all(row in more for row in few), "the smaller sample is part of the larger one"
    turned = drawn(rows[::-1], 100, source)
    assert sorted(row["source"] for row in turned) == sorted(row["source"] for row in few), "whatever the order"
    assert drawn(rows, None, source) == drawn(rows, 1000, source) == rows
