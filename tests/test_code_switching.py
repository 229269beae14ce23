"""Code-switching: which words are replaced, by what, and what stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from enc2gen.data.code_switching import (
    Lexicon,
    builtin_lexicon,
    code_switch,
    code_switched_examples,
    load_lexicon,
)
from enc2gen.errors import ConfigError, DataError, LanguageError

KAZAKH = Lexicon("kk", {"river": ("өзен",), "big": ("үлкен", "зор"), "don't": ("емес",)})


def switch(text: str, rate: float = 1.0, seed: int = 0) -> str:
    return code_switch(text, KAZAKH, rate, np.random.default_rng(seed))


def test_known_words_are_replaced_and_everything_between_them_stays() -> None:
    assert switch("The  River,\n(river) rivers riverside 12 river!") == "The  Өзен,\n(өзен) rivers riverside 12 өзен!"
    assert switch("I don't 'river'") == "I емес 'өзен'"
    assert switch("Бұл өзен no words") == "Бұл өзен no words"
    assert switch("river big", rate=0.0) == "river big"
    assert switch("") == ""


def test_the_rate_is_the_share_of_known_words_and_all_translations_come_up() -> None:
    words = switch("big unknown " * 2000, rate=0.3).split()
    assert words[1::2] == ["unknown"] * 2000
    replaced = [word for word in words[::2] if word != "big"]
    assert 520 < len(replaced) < 680  # 600 expected, standard deviation 20
    assert 0.4 < replaced.count("зор") / len(replaced) < 0.6


def test_one_seed_gives_one_text_and_a_higher_rate_only_adds_words() -> None:
    text = "big river " * 50
    assert switch(text, 0.5) == switch(text, 0.5) != switch(text, 0.5, seed=1)
    low, high = switch(text, 0.3).split(), switch(text, 0.7).split()
    assert all(a == b for a, b in zip(low, high, strict=True) if a not in ("big", "river"))


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="is no share"):
        switch("river", rate)


def test_coverage_is_the_share_of_words() -> None:
    assert KAZAKH.coverage(["The big river", "flows."]) == 0.5
    assert KAZAKH.coverage([]) == 0.0


def test_word_lists_with_tabs_and_in_muses_layout(tmp_path: Path) -> None:
    (tmp_path / "tabs.txt").write_text(
        "River\tөзен\n\nbig\tүлкен\nbig\tзор\nbig\tзор\nriver\tөзен суы\n", encoding="utf-8"
    )
    (tmp_path / "muse.txt").write_text("river өзен\nbig үлкен\n", encoding="utf-8")
    tabs = load_lexicon(tmp_path / "tabs.txt", "kaz")
    assert (tabs.language, tabs.translations) == ("kk", {"river": ("өзен", "өзен суы"), "big": ("үлкен", "зор")})
    assert load_lexicon(tmp_path / "muse.txt", "kk").translations == {"river": ("өзен",), "big": ("үлкен",)}


@pytest.mark.parametrize("line", ["river", "the big river", "a\tb\tc", "river\t"])
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "list.txt").write_text(f"big\tүлкен\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"entry 2: .* is no pair"):
        load_lexicon(tmp_path / "list.txt", "kk")


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no word"):
        Lexicon("kk", {})
    with pytest.raises(DataError, match="no such file"):
        load_lexicon(tmp_path / "nothing.txt", "kk")
    with pytest.raises(LanguageError, match="Kazakhian"):
        builtin_lexicon("Kazakhian")


def test_installed_packages_give_single_words() -> None:
    pytest.importorskip("babel")
    lexicon = builtin_lexicon("kk")
    assert "қаңтар" in lexicon.translations["january"]
    assert len(lexicon.translations) > 300
    assert all(word == word.lower() and len(word.split()) == 1 for word in lexicon.translations)
    assert all(len(t.split()) == 1 for found in lexicon.translations.values() for t in found)


def test_examples_lead_back_to_english_and_skip_what_was_not_switched() -> None:
    uyghur = Lexicon("ug", {"river": ("دەريا",)})
    texts = ["A big house", "No such word", "The river"]
    examples = list(code_switched_examples(texts, [KAZAKH, uyghur], 1.0, seed=0))
    assert [(e.source_language, e.target, e.target_language) for e in examples] == [
        ("kk", "A big house", "en"),
        ("kk", "The river", "en"),
        ("ug", "The river", "en"),
    ]
    assert [e.source for e in examples[1:]] == ["The өзен", "The دەريا"]
    assert {e.group for e in examples} == {"A big house", "The river"}
    assert examples == list(code_switched_examples(texts, [KAZAKH, uyghur], 1.0, seed=0))


def test_examples_depend_on_the_seed_and_on_nothing_else() -> None:
    texts = ["big river big river big river"] * 20

    def sources(seed: int) -> list[str]:
        return [example.source for example in code_switched_examples(texts, [KAZAKH], 0.5, seed)]

    assert sources(1) == sources(1) != sources(2)
    assert len(set(sources(1))) > 10  # each text draws anew
