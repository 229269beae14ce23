"""The built-in corpus: strings of installed packages' catalogues, and its split."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections import Counter
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enc2gen.corpora.builtin import (
    Pair,
    available_languages,
    group_references,
    localisation_pairs,
    localisation_records,
    split_key,
    split_of,
)
from enc2gen.corpora.languages import (
    PLACEHOLDER,
    default_script,
    dominant_script,
    natural_text,
    script_matches,
)
from enc2gen.errors import ConfigError, DataError, LanguageError

pytest.importorskip("babel")
pytest.importorskip("pycountry")
pytest.importorskip("django")

LANGUAGES = ["kk", "ug", "mn", "zh", "ky", "uz", "tr", "si", "ta", "am", "sw", "km"]


@lru_cache
def _pairs(language: str) -> list[Pair]:
    return localisation_pairs([language])


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_thousands_of_clean_pairs(language: str) -> None:
    pairs = _pairs(language)
    assert 2400 <= len(pairs) <= 9000
    assert len({(pair.source, pair.target) for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.source != pair.target
        assert pair.target == unicodedata.normalize("NFC", " ".join(pair.target.split())) != ""
        assert script_matches(dominant_script(natural_text(pair.target)), default_script(language)), pair
        assert Counter(PLACEHOLDER.findall(pair.source)) == Counter(PLACEHOLDER.findall(pair.target)), pair
    assert max(Counter(pair.origin for pair in pairs).values()) <= 2000


def test_known_translations_are_there() -> None:
    kazakh = {(pair.source, pair.target): pair.origin for pair in _pairs("kk")}
    assert kazakh["Beirut", "Бейрут"] == "babel/time_zones"
    assert kazakh["Kazakhstan", "Қазақстан"] == "babel/territories"
    assert ("{0} minutes", "{0} минут") in kazakh
    assert ("Monday", "дүйсенбі") in kazakh
    assert kazakh["Today", "Бүгін"].startswith("django/")
    assert any(origin.startswith("pycountry/") for origin in kazakh.values())


def test_placeholders_survive() -> None:
    assert sum("%(" in pair.source for pair in _pairs("ug")) >= 50


def test_the_catalogue_of_the_requested_script_is_read() -> None:
    simplified = {pair.source: pair.target for pair in _pairs("zh")}
    traditional = {pair.source: pair.target for pair in localisation_pairs(["zh-Hant"])}
    assert simplified["Armenian"] != traditional["Armenian"]
    assert simplified["Thursday"] == "星期四"
    differing = [source for source in simplified if traditional.get(source, simplified[source]) != simplified[source]]
    assert len(differing) > 1000


def test_each_package_is_read_in_the_requested_script() -> None:
    for tag in ("sr", "sr-Latn"):
        packages = {pair.origin.split("/")[0] for pair in localisation_pairs([tag])}
        assert packages == {"babel", "django", "pycountry"}


def test_a_territory_implies_the_script_of_its_catalogues() -> None:
    def targets(tag: str) -> dict[tuple[str, str], str]:  # Babel alone has catalogues of both scripts for Macao
        found = localisation_pairs([tag])
        return {(p.origin, p.source): p.target for p in found if p.origin.startswith("babel/")}

    macao, simplified, traditional = targets("zh-MO"), targets("zh"), targets("zh-Hant")
    telling = [k for k in macao if k in simplified and k in traditional and simplified[k] != traditional[k]]
    agree = sum(macao[k] == traditional[k] for k in telling) - sum(macao[k] == simplified[k] for k in telling)
    assert agree > len(telling) / 2 > 100


def test_pairs_are_sorted_and_the_same_every_time_whatever_else_is_asked_for() -> None:
    both = localisation_pairs(["ug", "kk-Cyrl", "KK"])
    assert both == localisation_pairs(["kk", "ug"])
    assert [pair for pair in both if pair.target_language == "kk"] == _pairs("kk")
    assert [(p.target_language, p.source, p.target) for p in both] == sorted(
        (p.target_language, p.source, p.target) for p in both
    )


def test_two_languages_take_less_than_three_seconds() -> None:
    started = time.perf_counter()
    localisation_pairs(["kk", "ug"])
    assert time.perf_counter() - started < 3


def test_the_cap_keeps_the_same_sources_in_every_language() -> None:
    capped = localisation_pairs(["kk", "am"], max_per_origin=100)
    assert max(Counter((pair.target_language, pair.origin) for pair in capped).values()) == 100
    every = {(p.target_language, p.source, p.target) for p in localisation_pairs(["kk", "am"])}
    assert {(p.target_language, p.source, p.target) for p in capped} < every
    territories = {
        tag: {p.source for p in capped if p.target_language == tag and p.origin == "babel/territories"}
        for tag in ("kk", "am")
    }
    assert len(territories["kk"] & territories["am"]) > 80


def test_references_of_one_source_are_grouped() -> None:
    groups = group_references(_pairs("kk"))
    assert sum(map(len, groups.values())) == len(_pairs("kk"))
    several = {key: targets for key, targets in groups.items() if len(targets) > 1}
    assert several
    assert all(targets == tuple(sorted(set(targets))) for targets in several.values())


def test_no_test_source_is_in_training_in_any_language() -> None:
    split: dict[str, set[str]] = {}
    for name in ("train", "dev", "test"):
        split[name] = {split_key(r["source"]) for r in localisation_records(["kk", "ug", "ta"], split=name)}
        assert split[name]
    assert not split["train"] & split["test"]
    assert not split["train"] & split["dev"]
    assert not split["dev"] & split["test"]


def test_records_of_the_splits_make_up_the_corpus() -> None:
    records = {name: list(localisation_records(["kk"], split=name)) for name in ("train", "dev", "test", "all")}
    assert len(records["all"]) == len(_pairs("kk"))
    sources = [record["source"] for record in records["test"]]
    assert len(set(sources)) == len(sources), "a test source counts once"
    assert all(record["target"] in record["references"] for record in records["test"])
    found = {r["source"] for name in ("train", "dev", "test") for r in records[name]}
    assert found == {record["source"] for record in records["all"]}


@pytest.mark.parametrize(
    "variants",
    [
        ["Delete", "delete", "Delete?", "  DELETE 2 "],
        ["{0} minute", "{0} minutes", "minutes", "Minute"],
        ["{0} inch", "{0} inches"],
        ["in {0} century", "in {0} centuries"],
        ["São Tomé", "Sao Tome"],
        ["%(name)s: error", "Error!"],
    ],
)
def test_near_duplicates_share_a_split(variants: list[str]) -> None:
    assert len({split_key(variant) for variant in variants}) == 1
    assert len({split_of(variant) for variant in variants}) == 1


def test_different_strings_have_different_keys() -> None:
    assert len({split_key(text) for text in ("Delete", "Deleted file", "Save", "January", "°", "+")}) == 6


@given(st.text(), st.integers(0, 49), st.integers(0, 50))
def test_split_is_a_function_of_the_key_and_ignores_case_and_punctuation(text: str, dev: int, test: int) -> None:
    first = split_of(text, dev_percent=dev, test_percent=test)
    assert first in ("train", "dev", "test")
    assert first == split_of(text, dev_percent=dev, test_percent=test)
    if any(map(str.isalpha, text)) and text.isascii() and "%" not in text and "{" not in text:
        assert first == split_of(f"{text.upper()} 7!", dev_percent=dev, test_percent=test)


def test_split_shares_follow_the_percentages_and_a_larger_test_share_only_grows() -> None:
    words = [f"word {chr(97 + i // 26 % 26)}{chr(97 + i % 26)}{chr(97 + i // 676)}q" for i in range(6000)]
    counts = Counter(split_of(word, dev_percent=10, test_percent=20) for word in words)
    assert abs(counts["test"] / 6000 - 0.2) < 0.03
    assert abs(counts["dev"] / 6000 - 0.1) < 0.03
    small = {word for word in words if split_of(word) == "test"}
    assert small < {word for word in words if split_of(word, test_percent=20) == "test"}


@pytest.mark.parametrize(("dev", "test"), [(-1, 5), (50, 50), (0, 100)])
def test_split_percentages_must_leave_training_data(dev: int, test: int) -> None:
    with pytest.raises(ConfigError, match="no training data"):
        split_of("a", dev_percent=dev, test_percent=test)


@pytest.mark.parametrize(("module", "package"), [("babel", "Babel"), ("pycountry", "pycountry"), ("django", "Django")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=package) as caught:
        localisation_pairs(["kk"])
    assert 'pip install "enc2gen[demo]"' in str(caught.value)


@pytest.mark.parametrize("language", ["ii", "tlh", "en", "kk-Latn"])
def test_a_language_with_too_few_strings_lists_those_that_have_enough(language: str) -> None:
    with pytest.raises(DataError, match=r"only \d+ strings") as caught:
        localisation_pairs([language])
    listed = str(caught.value.remedy)
    assert " kk," in listed and " ug," in listed and "zh-Hant" in listed


def test_every_available_language_is_loadable_by_its_tag() -> None:
    available = available_languages()
    assert set(LANGUAGES) <= set(available)
    assert "en" not in available
    for tag in available[::15]:
        assert localisation_pairs([tag])


def test_bad_arguments() -> None:
    with pytest.raises(LanguageError, match="did you mean 'kk'"):
        localisation_pairs(["kazakh"])
    with pytest.raises(ConfigError, match="no language"):
        localisation_pairs([])
    with pytest.raises(ConfigError, match="max_per_origin"):
        localisation_pairs(["kk"], max_per_origin=0)
    with pytest.raises(ConfigError, match="train, dev, test, all"):
        list(localisation_records(["kk"], split="validation"))
