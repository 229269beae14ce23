"""Cleaning and filters of single lines: what is repaired, what must stay as it is, what is dropped."""

from __future__ import annotations

import gzip
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
from pydantic import ValidationError

from enc2gen.corpora.cleaning import CleaningConfig, clean_line, clean_text
from enc2gen.corpora.filters import LanguageFilter, _may_repeat, ngram_share, refuse_text, repeated_share, word_units

CONFIG = CleaningConfig(language="bo")
TIBETAN = "བོད་སྐད་ཡིག་ནི་བོད་མི་རིགས་ཀྱི་སྐད་ཡིག་ཡིན།"
MARKUP = ("markup", "whitespace")
MONGOLIAN = "ᠮᠣᠩᠭᠣᠯ ᠬᠡᠯᠡ\u202fᠶᠢᠨ ᠰᠢᠨ\u180eᠡ ᠦᠰᠦᠭ\u180b ᠲᠣᠭᠠ\u180c\u180d\u180f"


@pytest.mark.parametrize(
    "text",
    [
        TIBETAN,
        MONGOLIAN,
        "می\u200cخواهم کتاب‌ها را بخوانم",  # ZWNJ of Persian
        "ශ්\u200dරී ලංකාව",  # ZWJ of Sinhala
        "“curly” ‘quotes’ – ﬁne ligature, ｆｕｌｌ　width".replace("\u3000", " "),
        "ភាសា\u200bខ្មែរ\u200bជា\u200bភាសា",  # zero-width spaces between words of Khmer
        "5 < 6 and a <b, <unk> is a token, x<y",
        "AT&T & R&D; C++ <vector>",
        "Agar a <b va c> d bo'lsa, x<i bo'lsa va i>0",
        "Matn <!-- izoh boshlandi",
        "matnda <style> yoki <script> bezakni beradi",
        "\u0600\u0661\u0662\u06dd",  # Arabic number sign, end of ayah: visible format characters
        "👩\u200d🚀 👍🏽",
        "ＡＢＣ，全角。",
    ],
)
def test_what_spells_words_stays(text: str) -> None:
    assert clean_text(text, CONFIG) == text


@pytest.mark.parametrize(
    ("text", "clean", "repairs"),
    [
        ("<p class='x'>Hello <b>wo</b>rld</p><p>again</p>", "Hello world again", ("markup", "whitespace")),
        ("one<br/>two<!-- three -->", "one two", ("markup",)),
        ("<script>var x = 1;</script>text", "text", ("markup",)),
        ("Bugun <Xalq so'zi> gazetasida <ali@mail.uz><br>", "Bugun <Xalq so'zi> gazetasida <ali@mail.uz>", MARKUP),
        ("HTML da <title> sahifa nomi, <style> esa <p>bezak", "HTML da sahifa nomi, <style> esa bezak", MARKUP),
        ("so <input disabled> <a title='x > y' href=z>it</a > <IMG src='a'b'/>ends", "so it ends", MARKUP),
        ("<STYLE>p {}</STYLE>a<!-- b <!-- c -->d <style> e", "ad <style> e", ("markup",)),
        ("a<script src=x>if (a <b>c) {}</script>d</style>", "a d", MARKUP),
        ("<p>?a=1&copy=2 &amp;lt;b&amp;gt;", "?a=1&copy=2", MARKUP),
        ("a &lt; b &amp;&nbsp;c &#x0F0B; &#3851;", "a < b & c ་ ་", ("markup", "whitespace")),
        ("&lt;p&gt;escaped&lt;/p&gt;", "escaped", ("markup", "whitespace")),
        ("https://x.org/?a=1&copy=2", "https://x.org/?a=1&copy=2", ()),
        ("a\x00b\x07c\u200ed\u2060e\ufefff\u00adg\x81h", "abcdefgh", ("controls",)),
        ("red \x1b[31mtext\x1b[0m", "red text", ("mojibake",)),
        ("  a\t\u00a0 b\u3000\u2028c \r", "a b c", ("whitespace",)),
        ("it\x92s", "it’s", ("mojibake",)),  # Windows-1252 read as Latin-1
        ("a\u200bb", "ab", ("controls",)),
        (unicodedata.normalize("NFD", "йё"), "йё", ("normalisation",)),
        ("\u200b \ufeff", "", ("controls", "whitespace")),
    ],
)
def test_repairs(text: str, clean: str, repairs: tuple[str, ...]) -> None:
    assert clean_line(text, CONFIG) == (clean, repairs)


@pytest.mark.parametrize("wrong", ["latin-1", "cp1251"])
def test_mojibake_of_several_scripts_is_repaired(wrong: str) -> None:
    texts = ["Шла Саша по шоссе и сосала сушку", "Қазақстан Республикасының астанасы"]
    for text in [*texts, TIBETAN, "中华人民共和国的首都是北京"] if wrong == "latin-1" else texts:
        broken = text.encode().decode(wrong, "ignore" if wrong == "cp1251" else "strict")
        if broken.encode(wrong, "ignore") == text.encode():  # cp1251 has no character for one byte
            assert clean_text(broken, CONFIG) == text


def test_switches_turn_repairs_off() -> None:
    off = CleaningConfig(language="bo", markup=False, repair=False, normalise=False)
    text = "<p>Ð¨Ð»Ð° " + unicodedata.normalize("NFD", "й")
    assert clean_text(text, off) == text


def test_cleaning_changes_no_text_twice() -> None:
    generator = random.Random(1)
    alphabet = "aй<>&;p/ lt\u200b\u200d\xa0\u3000\x07Ð\x90་བོད\u0306и"
    for _ in range(2000):
        text = "".join(generator.choices(alphabet, k=generator.randrange(30)))
        once = clean_line(text, CONFIG)
        if "<" not in once.text:  # a control character inside a tag hides it
            assert clean_text(once.text, CONFIG) == once.text, ascii(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TIBETAN, None),
        ("བོད", "too-short"),
        ("བོད་ཡིག་" * 2000, "too-long"),
        ("12345 67890 -- 2024/05/06", "few-letters"),
        ("damaged \ufffd here", "encoding"),
        ("half a pair \ud83d here", "encoding"),
        ("ha" * 40, "repetition"),
        ("buy it now cheap " * 8, "repetition"),
        ("བཀྲ་ཤིས་བདེ་ལེགས་ཞུ་" * 6, "repetition"),
        ("我爱你中国" * 8, "repetition"),
        ("The quick brown fox jumps over the lazy dog near the bank of the old river.", None),
        ("长江是亚洲第一长河，全长约六千三百公里，流经十一个省级行政区，最终注入东海。", None),
    ],
)
def test_filters(text: str, reason: str | None) -> None:
    refusal = refuse_text(text, CONFIG)
    assert (refusal.reason if refusal else None) == reason


def test_units_of_scripts_without_spaces() -> None:
    assert word_units("བོད་སྐད་ཡིག །") == ["བོད", "སྐད", "ཡིག"]
    assert word_units("我爱你 ok") == ["我", "爱", "你", "ok"]
    assert word_units("Қазақ тілі, ана-тілі!") == ["Қазақ", "тілі", "ана", "тілі"]


def test_repetition_measures_against_hand_counts() -> None:
    assert ngram_share("abcdefghijklmnopqrs") == 1 / 15  # 15 different 5-grams
    assert ngram_share("abcde" * 5) == 5 / 21  # 21 5-grams; abcde five times
    assert repeated_share("a b c d e f a b c d e f") == 1 - 6 / 10  # 10 trigrams: 4 occur twice, 2 once
    assert repeated_share("a a a a") == 0  # too short to tell


def test_language_filter_refuses_on_conclusive_evidence_only() -> None:
    texts = [
        TIBETAN,
        "Это предложение написано на русском языке и достаточно длинное.",
        "བོད",
        "12345",
    ]
    refusals = LanguageFilter("bo", "fasttext-lid176").refuse(texts)
    assert [refusal.reason if refusal else None for refusal in refusals] == [
        None,
        "wrong-language",
        None,
        "wrong-language",
    ]
    assert refusals[1] is not None and refusals[1].language == "ru"


def test_a_language_that_the_identifier_does_not_know_is_judged_by_script() -> None:
    unknown = LanguageFilter("dz", "fasttext-lid176")  # Dzongkha, which lid.176 takes for Tibetan
    assert unknown.by_script_only
    assert unknown.refuse([TIBETAN, "English text"])[0] is None
    assert unknown.refuse([TIBETAN, "English text"])[1] is not None


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="nothing to train on"):
        CleaningConfig(language="bo", dev_percent=50, test_percent=50)
    with pytest.raises(ValidationError, match="min_length=9 is more"):
        CleaningConfig(language="bo", min_length=9, max_length=8)
    with pytest.raises(ValueError, match="Tibetan"):
        CleaningConfig(language="tibetan")


def test_real_text_is_left_alone() -> None:
    folder = Path(os.environ.get("ENC2GEN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "mono"
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}")
    for language in ("bo", "ug", "kk"):
        with gzip.open(folder / f"{language}.jsonl.gz", "rt", encoding="utf-8") as file:
            lines = [json.loads(next(file))["text"].split("\n")[0] for _ in range(500)]
        config = CleaningConfig(language=language)
        changed = [line for line in lines if "mojibake" in clean_line(line, config).repairs]
        dropped = [line for line in lines if (refusal := refuse_text(clean_text(line, config), config)) and
                   refusal.reason in ("repetition", "encoding")]  # fmt: skip
        assert not changed
        assert len(dropped) <= 0.01 * len(lines)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("zh", "省委常委、三亚市委书记张琦，副省长王路，省政府秘书长陆志远参加调研座谈。"),  # lid.176: Japanese
        ("zh", "Brown 是 Germantown 地区遭到枪击的四人之一。"),  # more Latin letters than characters
        ("kk", "Бүгінде Жетісу жерінде жетпіс төрт тауарлы сүт фермасы жұмыс істеп тұр."),  # lid.176: Ukrainian
    ],
)
def test_lines_that_the_classifier_mistakes_stay(language: str, text: str) -> None:
    assert LanguageFilter(language, "fasttext-lid176").refuse([text]) == [None]


def test_japanese_is_not_chinese() -> None:
    [refusal] = LanguageFilter("zh", "fasttext-lid176").refuse(
        ["今日は東京の図書館で新しい本を読みました。とても面白かったです。"]
    )
    assert refusal is not None and refusal.language == "ja"


def test_the_quick_test_for_repetition_never_misses_any() -> None:
    generator = random.Random(3)
    for _ in range(3000):
        text = "".join(generator.choices("ab", weights=[9, 1], k=generator.randrange(5, 60)))
        share = generator.choice([0.1, 0.2, 0.35, 0.6])
        assert ngram_share(text) <= share or _may_repeat(text, share)
