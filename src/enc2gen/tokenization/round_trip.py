"""What a text loses between encoding and decoding, in kinds that a linguist can judge."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import regex

LOSSES = {
    "unknown": "characters that the vocabulary cannot write",
    "joiners": "zero-width joiner or non-joiner (ZWJ, ZWNJ): conjuncts and word forms of Indic and Arabic scripts",
    "selectors": "Mongolian vowel separator (MVS), narrow no-break space (NNBSP) or variation selectors",
    "invisible": "other invisible characters: direction marks, soft hyphen, zero-width space, controls",
    "compatibility": "full-width, ligature, superscript and other compatibility characters",
    "nfc": "another spelling of the same characters: the text is not in Unicode normal form C",
    "spaces": "spaces or line breaks: their number, kind or place",
    "case": "capital letters",
    "marks": "accents or vowel signs",
    "other": "something else",
}
"""Kind of loss -> explanation."""

_NNBSP = "\u202f"
_WHITE = rf"[^\S{_NNBSP}]"  # NNBSP ties a Mongolian suffix to its stem: no mere space
# Characters that get lost one by one. Of "invisible": visible format characters (the Arabic number signs) stay out.
LETTER_CONTROLS = regex.compile(rf"[\u200C\u200D\u180B-\u180F{_NNBSP}\uFE00-\uFE0F\U000E0100-\U000E01EF]")
"""Joiners, MVS, NNBSP and variation selectors: invisible, yet words are spelt with them."""
_CLASSES = {
    "joiners": regex.compile(r"[\u200C\u200D]"),
    "selectors": regex.compile(rf"[\u180B-\u180F{_NNBSP}\uFE00-\uFE0F\U000E0100-\U000E01EF]"),
    "invisible": regex.compile(
        r"[[\p{Cf}\p{Cc}]--\s--[\u180E\u200C\u200D]--\p{Prepended_Concatenation_Mark}]", regex.VERSION1
    ),
}
_LOST = regex.compile("|".join(pattern.pattern for pattern in _CLASSES.values()), regex.VERSION1)
_SPACES = regex.compile(rf"{_WHITE}+")
_MARKS = regex.compile(r"\p{Mn}")


def normalised(text: str) -> str:
    """`text` in NFC with each run of white space one space, none at the ends; the narrow no-break space stays."""
    return _SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip(" ")


def loss_kinds(text: str, decoded: str, *, unknown: bool) -> set[str]:
    """Kinds of `LOSSES` between `text` and what came back, `decoded`; empty if they are equal.

    Args:
        unknown: whether a part of `text` became the unknown token. Then only lost characters are told, for what
            else changed cannot be seen.
    """
    if text == decoded:
        return set()
    kinds = {"unknown"} if unknown else set()
    kinds |= {k for k, pattern in _CLASSES.items() if len(pattern.findall(text)) > len(pattern.findall(decoded))}
    if any(_is_compatible(c) and text.count(c) > decoded.count(c) for c in set(text)):
        kinds.add("compatibility")
    return kinds if unknown else kinds | _remaining(_reduced(text), _reduced(decoded), bool(kinds))


def _reduced(text: str) -> str:
    """`text` without the characters of `_CLASSES`, compatibility characters replaced by their plain ones."""
    plain = "".join(unicodedata.normalize("NFKC", c) if _is_compatible(c) else c for c in text)
    return _LOST.sub("", plain.replace(_NNBSP, " "))


def _remaining(text: str, decoded: str, explained: bool) -> set[str]:
    """Kinds of difference that are left in reduced texts: the first form in which both agree but for spaces."""
    for kind, form in _FORMS:
        one, other = form(text), form(decoded)
        if _SPACES.sub("", one) == _SPACES.sub("", other):
            kinds = {kind} if kind else set()
            return kinds | ({"spaces"} if one != other or not (kind or explained) else set())
    return {"other"}


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _folded(text: str) -> str:
    return _nfc(_nfc(text).casefold())


def _unmarked(text: str) -> str:
    return _MARKS.sub("", unicodedata.normalize("NFD", text.casefold()))


_FORMS = (("", str), ("nfc", _nfc), ("case", _folded), ("marks", _unmarked))


@lru_cache(maxsize=65536)
def _is_compatible(character: str) -> bool:
    """Whether Unicode has a plainer form of the character, as of full-width letters; spaces do not count."""
    return unicodedata.decomposition(character).startswith("<") and not character.isspace()
