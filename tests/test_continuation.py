"""The continuation task: nothing of a text is lost or repeated, and cuts stand where a reader would make them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enc2gen.data.continuation import split_text
from enc2gen.data.tasks import build_task
from enc2gen.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("text", "language", "share", "expected"),
    [
        ("One two. Three four. Five six.", "en", 0.5, ("One two. Three four.", "Five six.")),
        ("One two. Three four. Five six.", "en", 0.2, ("One two.", "Three four. Five six.")),
        ("one two three four", "en", 0.5, ("one two", "three four")),
        ("བཀྲ་ཤིས་བདེ་ལེགས", "bo", 0.5, ("བཀྲ་ཤིས་", "བདེ་ལེགས")),
        ("བཀྲ་ཤིས། བདེ་ལེགས།", "bo", 0.5, ("བཀྲ་ཤིས།", "བདེ་ལེགས།")),
        ("你好吗我很好", "zh", 0.5, ("你好吗", "我很好")),
        ("a", "en", 0.5, ("a", "")),
        ("", "en", 0.5, ("", "")),
    ],
)
def test_cuts_at_the_unit_nearest_to_the_share(
    text: str, language: str, share: float, expected: tuple[str, str]
) -> None:
    assert split_text(text, language, share) == expected


@given(st.text(min_size=2), st.sampled_from(["en", "bo", "zh", "am"]), st.floats(0.05, 0.95))
def test_both_parts_make_up_the_text(text: str, language: str, share: float) -> None:
    begin, rest = split_text(text, language, share)
    assert "".join((begin + rest).split()) == "".join(text.split())


def test_examples_stay_in_their_document_and_language() -> None:
    task = build_task("continuation", {"language": "bo", "document": "doc"})
    rows = [{"text": "ཀ་ཁ་ག་ང", "doc": "book"}, {"text": "ཅ", "doc": "book"}]
    examples = list(task.examples(rows))
    assert [(e.source, e.target, e.source_language, e.target_language, e.group) for e in examples] == [
        ("ཀ་ཁ་", "ག་ང", "bo", "bo", "book")
    ]
    assert task.counts["empty target"] == 1


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="share"):
        build_task("continuation", {"language": "bo", "share": 1.0})
    with pytest.raises(DataError, match="no field 'text'"):
        list(build_task("continuation", {"language": "bo"}).examples([{"txt": "x"}]))
