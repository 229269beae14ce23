"""What is held out stays unseen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from enc2gen.data.held_out import reading, unseen
from enc2gen.data.tasks import Example
from enc2gen.experiments.bridge.prepare import parallel_pairs
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
    told: list[int] = []
    kept = list(unseen(read, {"directions": "reverse"}, told.append))
    assert [(split, example.target) for split, example in kept] == [
        ("dev", "hound"),
        ("test", "cat"),
        ("train", "bird"),
        ("train", "fowl"),
        ("test", "horse"),
        ("train", "chat"),  # into another language: another thing to learn
    ]
    assert told == [3]
    assert list(unseen(read, {}, told.append)) == list(read()) and told == [3]


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
    for split, pair in parallel_pairs(section):
        sources[split].add(pair.source)
    assert all(len(found) > 3 for found in sources.values())
    assert not sources["train"] & (sources["dev"] | sources["test"]) and not sources["dev"] & sources["test"]


def test_what_is_read_is_source_and_both_languages() -> None:
    assert reading(Example("ит", "dog", "kk", "en")) == ("ит", "kk", "en")
