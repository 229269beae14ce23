"""Language tags and scripts."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enc2gen.corpora.languages import (
    base_language,
    default_script,
    dominant_script,
    language_name,
    natural_text,
    normalise_language,
    normalise_languages,
    script_matches,
)
from enc2gen.errors import LanguageError


@pytest.mark.parametrize(
    ("tag", "canonical"),
    [
        ("KK", "kk"),
        ("kaz", "kk"),
        (" ug ", "ug"),
        ("zh_Hant", "zh-Hant"),
        ("zh-hans-cn", "zh-Hans-CN"),
        ("kk-Cyrl", "kk"),
        ("uig_Arab", "ug"),
        ("bo-Tibt", "bo"),
        ("zh-Hans", "zh"),
        ("kor_Hang", "ko"),
        ("zh-Hant-TW", "zh-Hant-TW"),
        ("ug-Cyrl", "ug-Cyrl"),
        ("azb-Arab", "azb"),
        ("mn_mong", "mn-Mong"),
        ("iw", "he"),
        ("qaa", "qaa"),
    ],
)
def test_tags_have_one_spelling(tag: str, canonical: str) -> None:
    assert normalise_language(tag) == canonical
    assert normalise_language(canonical) == canonical


@pytest.mark.parametrize("tag", ["xx", "zzz9", "", "und", "mul", "x-foo", "<kk>", "kk-Qxyz", "en_US.UTF-8"])
def test_tags_that_name_no_language_are_refused(tag: str) -> None:
    with pytest.raises(LanguageError, match="unknown language tag") as caught:
        normalise_language(tag, where="recipe.yaml: languages")
    assert repr(tag) in str(caught.value)
    assert "recipe.yaml: languages" in str(caught.value)
    assert "BCP 47" in str(caught.value)


@pytest.mark.parametrize(("name", "tag"), [("kazakh", "kk"), ("Uyghur", "ug"), ("tibetan", "bo"), ("kazahk", "kk")])
def test_a_language_name_gets_its_tag_suggested(name: str, tag: str) -> None:
    with pytest.raises(LanguageError, match=f"did you mean '{tag}'"):
        normalise_language(name)


def test_lists_are_normalised_in_order_and_without_repeats() -> None:
    assert normalise_languages(["ug", "KAZ", "kk-Cyrl", "uig"]) == ["ug", "kk"]


@pytest.mark.parametrize(
    ("tag", "script"),
    [
        ("kk", "Cyrl"), ("kk-Arab", "Arab"), ("ug", "Arab"), ("mn", "Cyrl"), ("mn-Mong", "Mong"),
        ("zh", "Hans"), ("zh-TW", "Hant"), ("bo", "Tibt"), ("am", "Ethi"), ("sw", "Latn"),
        ("azb", "Arab"), ("azb-Latn", "Latn"),
    ],
)  # fmt: skip
def test_default_script(tag: str, script: str) -> None:
    assert default_script(tag) == script


@pytest.mark.parametrize(
    ("tag", "base"),
    [("khk", "mn"), ("azj", "az"), ("nb", "no"), ("cmn", "zh"), ("zh-Hant", "zh"), ("kk", "kk")],
)
def test_macro_languages_are_folded(tag: str, base: str) -> None:
    assert base_language(tag) == base


def test_language_name() -> None:
    assert language_name("kk") == "Kazakh"
    assert language_name("ug") == "Uyghur"


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Қазақ тілі", "Cyrl"), ("ئۇيغۇر", "Arab"), ("བོད་སྐད།", "Tibt"),
        ("ᠮᠣᠩᠭᠣᠯ", "Mong"), ("中文 (Chinese)", "Latn"),
        ("中文，普通话 OK", "Hani"), ("አማርኛ", "Ethi"), ("ភាសាខ្មែរ", "Khmr"), ("12 % – !", None), ("", None),
    ],
)  # fmt: skip
def test_dominant_script(text: str, script: str | None) -> None:
    assert dominant_script(text) == script


_NAMES = {
    "LATIN": "Latn",
    "CYRILLIC": "Cyrl",
    "ARABIC": "Arab",
    "GREEK": "Grek",
    "TIBETAN": "Tibt",
    "THAI": "Thai",
}


@given(st.characters(categories=("Lu", "Ll", "Lo")))
def test_script_of_a_letter_agrees_with_its_unicode_name(char: str) -> None:
    first = unicodedata.name(char, "").split(" ")[0]
    if first in _NAMES:
        assert dominant_script(char) in (
            _NAMES[first],
            None,
        )  # None: shared letters such as the Thai baht's kin


@given(st.text())
def test_dominant_script_ignores_order_and_repetition_of_the_whole(text: str) -> None:
    assert dominant_script(text * 2) == dominant_script(text)


def test_east_asian_writing_systems_match_their_unicode_scripts() -> None:
    assert script_matches("Hani", "Hans") and script_matches("Hani", "Hant") and script_matches("Hira", "Jpan")
    assert script_matches("Cyrl", "Cyrl")
    assert not script_matches("Hira", "Hans")
    assert not script_matches("Latn", "Cyrl")
    assert not script_matches(None, "Latn")


def test_placeholders_and_markup_are_not_language() -> None:
    text = 'Файл %(name)s <a href="x">{0}</a> %d https://example.org/abc'
    assert dominant_script(natural_text(text)) == "Cyrl"
    assert not any("LATIN" in unicodedata.name(char, "") for char in natural_text(text))
