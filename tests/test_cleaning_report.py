"""The account of a cleaning run: counts that add up, a page that shows hostile text without running it."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from enc2gen.corpora.cleaning_report import (
    EXAMPLE_LENGTH,
    EXAMPLES_PER_REASON,
    CleaningStats,
    print_cleaning_report,
    visible_controls,
    write_cleaning_report,
)
from enc2gen.errors import DataError, OutputError

REASONS = {"too-short": "fewer letters than the minimum", "wrong-language": "not in the wanted language"}
HOSTILE = '<script>alert("x")</script>\x07\x00 a\u202eb &amp;'


def line_by_line(lines: list[tuple[str, str | None]]) -> CleaningStats:
    """Statistics of Kazakh lines, each with the reason it is dropped for, or None."""
    stats = CleaningStats()
    for text, reason in lines:
        stats.add_read(text)
        if reason is None:
            stats.add_kept(text, "kk")
            stats.documents += 1
            stats.splits["train"] += 1
            stats.split_documents["train"] += 1
        else:
            stats.add_dropped(reason, text, "kk", source="a.txt", detail=f"{len(text)} letters")
    return stats


LINES = [
    (f"жол {i}" * (i % 7), "too-short" if i % 3 == 0 else "wrong-language" if i % 5 == 0 else None) for i in range(90)
]


@pytest.mark.parametrize("cut", [0, 1, 30, 89, 90])
def test_chunks_merge_to_what_one_pass_counts(cut: int) -> None:
    merged = line_by_line(LINES[:cut])
    merged.merge(line_by_line(LINES[cut:]))
    assert merged == line_by_line(LINES)
    assert merged.read == 90 == merged.total_kept + merged.total_dropped
    assert merged.dropped["too-short"]["kk"] == 30
    assert merged.characters_read == sum(len(text) for text, _ in LINES)
    assert len(merged.examples["too-short"]) == EXAMPLES_PER_REASON


def test_merging_leaves_the_other_chunk_alone() -> None:
    first, second = CleaningStats(), line_by_line(LINES)
    first.merge(second)
    first.add_dropped("too-short", "x", "kk")
    assert second == line_by_line(LINES)


def test_examples_stay_short() -> None:
    stats = CleaningStats()
    stats.add_dropped("too-long", "x" * 1_000_000)
    stats.add_repaired("controls", "y" * 1_000_000, "z" * 1_000_000)
    assert [len(e.text) for key in ("too-long", "controls") for e in stats.examples[key]] == [EXAMPLE_LENGTH] * 2
    assert len(stats.examples["controls"][0].after or "") == EXAMPLE_LENGTH


def test_json_round_trip_through_text() -> None:
    stats = line_by_line(LINES)
    stats.add_repaired("controls", "a\x07b", "ab", "kk", source="a.txt")
    stats.seconds = 4.5
    values = json.loads(json.dumps(stats.to_json(), ensure_ascii=False))
    assert CleaningStats.from_json(values) == stats
    assert values["lines_per_second"] == 20.0


@pytest.mark.parametrize("values", [{}, [], {"version": 99}, {"version": 1, "read": 3}])
def test_a_damaged_report_is_refused(values: object) -> None:
    with pytest.raises(DataError, match="cleaning report"):
        CleaningStats.from_json(values)  # type: ignore[arg-type]


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would take them."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_hostile_examples_as_text(tmp_path: Path) -> None:
    stats = line_by_line(LINES)
    stats.add_dropped("markup", HOSTILE, "kk", source="<b>.txt", detail="<i>")
    stats.add_repaired("controls", "a\x85b", "ab", "kk")
    path = write_cleaning_report(stats, tmp_path / "out", REASONS, title="<u>corpus</u>", settings={"markup": "<p>"})
    page = Page(path)
    assert path == tmp_path / "out" / "report.html"
    assert not {"script", "b", "i", "u"} & set(page.tags) and not page.links
    for text in ('<script>alert("x")</script>', "&amp;", "␇␀", "U+202E", "U+0085", "<b>.txt", "<u>corpus</u>"):
        assert text in page.text
    assert not set(page.text) & set("\x00\x07\x85\u202e")
    for reason, term in REASONS.items():
        assert reason in page.text and term in page.text
    assert "30 lines, 33.3 %" in page.text
    assert CleaningStats.from_json(json.loads((path.parent / "report.json").read_text("utf-8"))) == stats


def test_a_lone_surrogate_does_not_lose_the_report(tmp_path: Path) -> None:
    stats = CleaningStats()
    stats.add_dropped("encoding", "a\ud800b")
    assert "U+D800" in Page(write_cleaning_report(stats, tmp_path, {})).text


def test_nothing_read_is_a_page_too(tmp_path: Path) -> None:
    assert "No line was dropped." in Page(write_cleaning_report(CleaningStats(), tmp_path, REASONS)).text


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="the report cannot be written"):
        write_cleaning_report(CleaningStats(), tmp_path / "file", REASONS)


@pytest.mark.parametrize("text", ["བོད་ཡིག།", "ᠮᠣᠩᠭᠣᠯ\u180e\u202fᠤᠨ", "می\u200cخواهم", "ක්\u200dර", "e\u0301 \u00a0"])
def test_spelling_is_not_marked(text: str) -> None:
    assert str(visible_controls(text)) == text


def test_the_tables_fit_eighty_columns_and_say_all() -> None:
    stats = line_by_line(LINES)
    stats.add_dropped("a-reason-of-another-version", "x", "xx-broken-tag-xx")
    stats.add_dropped("too-short", "y")
    stats.seconds = 9.0
    output = io.StringIO()
    reasons = {**REASONS, "too-short": "fewer letters than the minimum " * 5}
    print_cleaning_report(stats, Console(file=output, width=80), reasons)
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    words = ["too-short", "wrong-language", "a-reason-of-another-version", "Kazakh (kk)", "not identified", "34.4 %"]
    for word in [*words, "10 lines/s", "train 48"]:
        assert word in text
