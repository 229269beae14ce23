"""The units of writing that tokens are counted against: words, Tibetan syllables, or characters."""

from __future__ import annotations

from collections import Counter

import regex

# Scripts written without spaces between words (The Unicode Standard, chapters 16 to 18), as ISO 15924 codes;
# Tibetan is apart, for its tsheg marks syllables.
_UNSPACED = (
    "Hani", "Hira", "Kana", "Bopo", "Yiii", "Thai", "Laoo", "Khmr", "Mymr", "Lana", "Talu", "Tale", "Tavt", "Java",
    "Bali",
)  # fmt: skip
_SYLLABLE = r"[\p{Script=Tibt}&&[\p{L}\p{M}\p{N}]]++"
_LETTER = "[[" + "".join(rf"\p{{Script={code}}}" for code in _UNSPACED) + r"\u30FC]&&\p{L}]"
# A letter with its marks; the stacked consonants of Khmer, Burmese and Tai Tham (after coeng, virama, sakot), and
# the vowel signs of Thai and Lao that Unicode calls letters, belong to it.
_CHARACTER = rf"{_LETTER}(?:[\u17D2\u1039\u1A60]\p{{L}}|\p{{M}}|[\u0E33\u0EB3\u200C\u200D])*+"
# NNBSP (U+202F) ties a Mongolian suffix to its word; the Ethiopic wordspace (U+1361) separates words.
_WORD = rf"[^[\s--\u202F]\u1361\p{{Script=Tibt}}{_LETTER}]++"
_UNITS = regex.compile(rf"(?P<syllable>{_SYLLABLE})|(?P<character>{_CHARACTER})|(?P<word>{_WORD})", regex.VERSION1)
_SPELT = regex.compile(r"[\p{L}\p{N}]")


def count_units(text: str) -> Counter[str]:
    """Number of units by kind, each run of `text` by its own script.

    - "syllable": Tibetan, between tsheg, shad and spaces;
    - "character": scripts without word spaces (Han, kana, Thai, Lao, Khmer, Burmese, ...), a letter with its marks;
    - "word": everything else between spaces that has a letter or a digit.
    """
    kinds: Counter[str] = Counter()
    for syllable, character, word in _UNITS.findall(text):
        if syllable:
            kinds["syllable"] += 1
        elif character:
            kinds["character"] += 1
        elif _SPELT.search(word):
            kinds["word"] += 1
    return kinds
