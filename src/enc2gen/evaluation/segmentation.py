"""Script-aware units of text, on which ROUGE, token F1 and exact match are counted.

Most metric code splits at spaces and keeps `[a-z0-9]`, which leaves nothing of a Tibetan or Uyghur sentence.
Here every run of text is split by its own script: Tibetan at the tsheg, scripts written without word spaces
into characters, everything else into words.
"""

from __future__ import annotations

import unicodedata

import regex

# Scripts written without spaces between words (our choice of list, from The Unicode Standard, chapters 16 to
# 18), as ISO 15924 codes. Tibetan is apart: its tsheg marks syllables. Hans, Hant, Jpan, Hrkt are writing
# systems, not scripts.
_EAST_ASIAN = ("Hani", "Hira", "Kana", "Bopo", "Yiii", "Tang", "Nshu")
_SOUTH_EAST_ASIAN = ("Thai", "Laoo", "Khmr", "Mymr", "Lana", "Talu", "Tale", "Tavt", "Java", "Bali")
_CHARACTER_SCRIPTS = (*_EAST_ASIAN, *_SOUTH_EAST_ASIAN)
HAN_SCRIPTS = frozenset({"Hani", "Hans", "Hant"})
UNSPACED_SCRIPTS = frozenset({*_CHARACTER_SCRIPTS, *HAN_SCRIPTS, "Jpan", "Hrkt", "Tibt"})

# Characters without a script of their own that belong to kana or Han text: iteration and length marks.
_KANA_COMMON = r"\u3006\u3031-\u3035\u303C\u30FC\uFF70"
_CHARACTER_CLASS = "".join(rf"\p{{Script={code}}}" for code in _CHARACTER_SCRIPTS) + _KANA_COMMON
_CHARACTER = rf"[[{_CHARACTER_CLASS}]&&\p{{L}}]"
# Signs that stack the next consonant under the last one (Khmer coeng, Myanmar virama, Tai Tham sakot).
# Whether \X joins them depends on the Unicode version, and a score must not.
_STACKED = r"[\u17D2\u1039\u1A60]\p{L}"
# Vowel signs that Unicode calls letters but that readers of Thai and Lao see as part of the character;
# halfwidth voicing marks.
_LETTER_MARKS = r"\u0E33\u0EB3\uFF9E\uFF9F"
_CLUSTER = rf"{_CHARACTER}(?:{_STACKED}|\p{{M}}|[{_LETTER_MARKS}\u200C\u200D])*+"
_SYLLABLE = r"[\p{Script=Tibt}&&[\p{L}\p{M}\p{N}]]++"
_WORD_CHARACTER = rf"[[\p{{L}}\p{{M}}\p{{N}}]--\p{{Script=Tibt}}--{_CHARACTER}]"
# What may stand inside a word: ZWJ and ZWNJ (Persian, Indic), Mongolian vowel separator, and the narrow
# no-break space that ties a Mongolian suffix to its stem. After a virama a final joiner is part of the
# spelling (Malayalam chillu).
_JOINED = (
    rf"[\u200C\u200D\u180E](?={_WORD_CHARACTER})|(?<=\p{{M}})[\u200C\u200D]"
    r"|(?<=[\p{Script=Mongolian}\u180E])\u202F(?=\p{Script=Mongolian})"
)
# Apostrophe, Hebrew geresh and gershayim, Catalan punt volat: inside a word only, between letters.
_APOSTROPHE = rf"(?<=[\p{{L}}\p{{M}}])['\u05F3\u05F4\u00B7](?=[{_WORD_CHARACTER}&&\p{{L}}])"


def _pattern(joined: str) -> regex.Pattern[str]:
    word = rf"{_WORD_CHARACTER}(?:{_WORD_CHARACTER}|{joined})*+"
    return regex.compile(rf"{_SYLLABLE}|{_CLUSTER}|{word}", regex.VERSION1)


_UNITS = _pattern(f"{_JOINED}|{_APOSTROPHE}")
_UNITS_ENGLISH = _pattern(_JOINED)  # English: as `rouge_score`, where "don't" is two tokens

# Typographic apostrophes read as "'"; invisible characters that carry no text (soft hyphen, direction marks,
# BOM) go.
_FOLDED = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\uff07": "'"} | dict.fromkeys("\u00ad\u061c\u200e\u200f\u2060\ufeff", "")
)
_DOTLESS_I = str.maketrans({"I": "\u0131", "\u0130": "i"})


def _language_subtag(language: str | None) -> str:
    return language.replace("_", "-").split("-")[0].lower() if language else ""


def normalise_text(text: str, language: str | None = None) -> str:
    """Return `text` in NFC, case-folded, with one kind of apostrophe and no invisible formatting characters.

    Turkish and Azerbaijani (`language` "tr", "az") fold a capital I to the dotless i, the dotted one to "i".
    """
    text = unicodedata.normalize("NFC", text).translate(_FOLDED)
    if _language_subtag(language) in {"tr", "az"}:
        text = text.translate(_DOTLESS_I)
    return unicodedata.normalize("NFC", text.casefold())


def segment(text: str, language: str | None = None) -> list[str]:
    """Split `text` into case-folded units, each run by its script; punctuation and symbols are dropped.

    - Tibetan: syllables, which tsheg, shad and every other punctuation separate;
    - Han, kana, Thai, Lao, Khmer, Myanmar and other scripts without word spaces: one character with its
      marks;
    - all others: words of letters, marks and digits. Apostrophes, ZWJ and ZWNJ, the Mongolian vowel separator
      and the Mongolian narrow no-break space stay inside a word; the Ethiopic wordspace separates words.

    Args:
        text: any text; mixed scripts are allowed ("2024年GDP" -> "2024", "年", "gdp").
        language: BCP 47 tag. Only three languages change anything: English splits at apostrophes, as the
            `rouge_score` package does, and Turkish and Azerbaijani have their own case folding.
    """
    pattern = _UNITS_ENGLISH if _language_subtag(language) == "en" else _UNITS
    return pattern.findall(normalise_text(text, language))
