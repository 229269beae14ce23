"""Units of text: by script, run by run, with nothing lost that is a letter or a digit."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enc2gen.evaluation.segmentation import normalise_text, segment

NNBSP, MVS, ZWJ, ZWNJ = "\u202f", "\u180e", "\u200d", "\u200c"

UNITS = [
    # Tibetan: tsheg, non-breaking tsheg, shad and spaces separate; digits stay together
    ("བོད་སྐད་ཡིག།", "bo", ["བོད", "སྐད", "ཡིག"]),
    ("ཀ༌ཁ། །ག", None, ["ཀ", "ཁ", "ག"]),
    ("༡༢ ལོ", "bo", ["༡༢", "ལོ"]),
    # characters with their marks
    ("我们，是。", "zh", ["我", "们", "是"]),
    ("ラーメン々", "ja", ["ラ", "ー", "メ", "ン", "々"]),
    ("ភាសាខ្មែរ", "km", ["ភា", "សា", "ខ្មែ", "រ"]),
    ("น้ำไทย", "th", ["น้ำ", "ไ", "ท", "ย"]),
    ("ນ້ຳລາວ", "lo", ["ນ້ຳ", "ລ", "າ", "ວ"]),
    ("မြန်မာ", "my", ["မြ", "န်", "မာ"]),
    ("သတ္တ", "my", ["သ", "တ္တ"]),
    # words, folded
    ("Қазақ ТІЛІ!", "kk", ["қазақ", "тілі"]),
    ("ئۇيغۇر تىلى، ٣٤", "ug", ["ئۇيغۇر", "تىلى", "٣٤"]),
    ("한국어 문장", "ko", ["한국어", "문장"]),
    ("ሰላም፡ለዓለም።", "am", ["ሰላም", "ለዓለም"]),
    ("Straße STRASSE", "de", ["strasse", "strasse"]),
    ("x-ray_3.5", None, ["x", "ray", "3", "5"]),
    # inside words
    ("don't rock’n’roll 'quoted'", None, ["don't", "rock'n'roll", "quoted"]),
    ("don't", "en", ["don", "t"]),
    ("don't", "en-GB", ["don", "t"]),
    ("oʻzbek", "uz", ["oʻzbek"]),
    ("col·lecció", "ca", ["col·lecció"]),
    (f"ᠮᠣᠩᠭᠣᠯ{NNBSP}ᠤᠨ ᠪᠠᠶᠢᠨ{MVS}ᠠ", "mn-Mong", [f"ᠮᠣᠩᠭᠣᠯ{NNBSP}ᠤᠨ", f"ᠪᠠᠶᠢᠨ{MVS}ᠠ"]),
    (f"1{NNBSP}000", "fr", ["1", "000"]),
    (f"می{ZWNJ}روم", "fa", [f"می{ZWNJ}روم"]),
    (f"ه{ZWJ}ب {ZWJ}ب{ZWNJ} ب", "ar", [f"ه{ZWJ}ب", "ب", "ب"]),
    (f"ක්{ZWJ}ෂ අවන්", "si", [f"ක්{ZWJ}ෂ", "අවන්"]),
    (f"അവന്{ZWJ} പോയി", "ml", [f"അവന്{ZWJ}", "പോയി"]),
    # Turkish i
    ("IĞDIR İzmir", "tr", ["\u0131ğd\u0131r", "izmir"]),
    ("IZMIR", "en", ["izmir"]),
    # mixed scripts
    ("2024年GDP增加", "zh", ["2024", "年", "gdp", "增", "加"]),
    ("iPhone་བོད", None, ["iphone", "བོད"]),
    ("Тайland", None, ["тайland"]),
    # nothing to count
    ("", None, []),
    (" \n\t", None, []),
    ("།༄༅ … ?! 😀", None, []),
]


@pytest.mark.parametrize(("text", "language", "units"), UNITS)
def test_units(text: str, language: str | None, units: list[str]) -> None:
    assert segment(text, language) == [unicodedata.normalize("NFC", unit) for unit in units]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("é", "e\u0301"),
        ("한", "한"),
        ("don’t", "don't"),
        ("co\u00adoperate", "cooperate"),
        ("\ufeffتىل\u200f", "تىل"),
        ("ΟΔΟΣ", "οδος"),
    ],
)
def test_spellings_that_read_the_same_are_the_same(first: str, second: str) -> None:
    assert segment(first) == segment(second) != []


# Code points that this Python's Unicode tables know; the `regex` package may know newer ones.
ASSIGNED = st.characters(exclude_categories=["Cn", "Cs", "Co"])


@given(st.text(ASSIGNED, max_size=40))
def test_units_cover_every_letter_and_digit_in_order(text: str) -> None:
    def kept(string: str) -> str:
        return "".join(char for char in string if unicodedata.category(char)[0] in "LN")

    units = segment(text)
    assert kept("".join(units)) == kept(normalise_text(text))
    assert all(kept(unit) or unicodedata.category(unit[0])[0] == "M" for unit in units)


@given(st.text(alphabet="བོད་སྐ། aь中น้ำ'7\u202f\u200d", max_size=30))
def test_units_are_stable(text: str) -> None:
    """Units joined by spaces are cut into the same units again."""
    units = segment(text)
    assert segment(" ".join(units)) == units
