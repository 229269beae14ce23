"""Language tags (BCP 47) and scripts (ISO 15924): the one place that decides how a language is spelt.

Tags go through `langcodes`, which knows the IANA registry and the CLDR likely-subtags table. Scripts of
characters are the Unicode property Script. The two differ for East Asia: a language is written in Hans, Hant,
Jpan or Kore, a character belongs to Hani, Hira, Kana or Hang; :func:`script_matches` knows both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

import langcodes
import regex
from langcodes.tag_parser import LanguageTagError

from enc2gen.errors import LanguageError

# Every script of Unicode 15 but Common and Inherited.
_UNICODE_SCRIPTS = """
    Adlm Aghb Ahom Arab Armi Armn Avst Bali Bamu Bass Batk Beng Bhks Bopo Brah Brai Bugi Buhd Cakm Cans
    Cari Cham Cher Chrs Copt Cpmn Cprt Cyrl Deva Diak Dogr Dsrt Dupl Egyp Elba Elym Ethi Geor Glag Gong
    Gonm Goth Gran Grek Gujr Guru Hang Hani Hano Hatr Hebr Hira Hluw Hmng Hmnp Hung Ital Java Kali Kana
    Kawi Khar Khmr Khoj Kits Knda Kthi Lana Laoo Latn Lepc Limb Lina Linb Lisu Lyci Lydi Mahj Maka Mand
    Mani Marc Medf Mend Merc Mero Mlym Modi Mong Mroo Mtei Mult Mymr Nagm Nand Narb Nbat Newa Nkoo Nshu
    Ogam Olck Orkh Orya Osge Osma Ougr Palm Pauc Perm Phag Phli Phlp Phnx Plrd Prti Rjng Rohg Runr Samr
    Sarb Saur Sgnw Shaw Shrd Sidd Sind Sinh Sogd Sogo Sora Soyo Sund Sylo Syrc Tagb Takr Tale Talu Taml
    Tang Tavt Telu Tfng Tglg Thaa Thai Tibt Tirh Tnsa Toto Ugar Vaii Vith Wara Wcho Xpeo Xsux Yezi Yiii
    Zanb
"""

_WRITING_SYSTEM_SCRIPTS = {
    "Hans": frozenset({"Hani", "Bopo"}),
    "Hant": frozenset({"Hani", "Bopo"}),
    "Jpan": frozenset({"Hani", "Hira", "Kana"}),
    "Kore": frozenset({"Hang", "Hani"}),
}

PLACEHOLDER = re.compile(r"%\(\w+\)[#0+-]*[\d.]*[a-zA-Z]|%[#0+-]*[\d.]*[sdifrxc]\b|\{[^{}]*\}")
"""What programs fill in: `%(name)s`, `%d`, `{0}`."""
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>|https?://\S+")

# Where the likely-subtags table repeats the macro-language: South Azerbaijani is in Arabic script.
_SCRIPT_CORRECTIONS = {"azb": "Arab"}
# Tags that BCP 47 allows but that name no language to write in.
_NO_LANGUAGE = frozenset({"und", "mul", "mis", "zxx"})
_REMEDY = 'give a BCP 47 tag such as "kk", "ug", "zh-Hant" or "mn-Mong"'


def normalise_language(tag: str, *, where: str | None = None) -> str:
    """Return the canonical BCP 47 spelling of `tag`: "KK" -> "kk", "kaz" -> "kk", "zh_Hant" -> "zh-Hant".

    A script that the language is written in anyway is dropped ("kk-Cyrl" -> "kk", "uig_Arab" -> "ug"), but where a
    region is named, too ("zh-Hant-TW").

    Raises:
        LanguageError: `tag` names no language; the remedy suggests one if `tag` looks like a language's name.
    """
    cleaned = tag.strip().replace("_", "-")
    try:
        standard = langcodes.standardize_tag(cleaned)
        valid = langcodes.tag_is_valid(cleaned)
    except LanguageTagError:
        standard, valid = "", False
    language = langcodes.Language.get(standard).language if valid else None
    if language is None or language in _NO_LANGUAGE or language.startswith("x-"):
        raise LanguageError(f"unknown language tag {tag!r}", where=where, remedy=_suggestion(cleaned))
    alone, _, script = standard.partition("-")  # IANA's registry suppresses a script for some languages only
    usual = default_script(alone)
    return alone if script and script in (usual, "Hang" if usual == "Kore" else usual) else standard


def normalise_languages(tags: Iterable[str], *, where: str | None = None) -> list[str]:
    """Return the canonical tags in the given order, each once; raises like :func:`normalise_language`."""
    return list(dict.fromkeys(normalise_language(tag, where=where) for tag in tags))


def _suggestion(name: str) -> str:
    candidate = name.replace("-", " ").strip()
    if len(candidate) > 3:  # shorter strings match names of unrelated languages by chance
        try:
            found = langcodes.find(candidate).to_tag()
        except LookupError:
            return _REMEDY
        return f"did you mean {found!r} ({language_name(found)})? otherwise {_REMEDY}"
    return _REMEDY


def language_name(tag: str) -> str:
    """Return the English name of a language: "kk" -> "Kazakh", "mn-Mong" -> "Mongolian (Mongolian)"."""
    return langcodes.Language.get(tag).display_name()


@lru_cache(maxsize=1024)
def default_script(tag: str) -> str:
    """Return the ISO 15924 script that `tag` is written in: the one it names, or CLDR's likely one.

    "kk" -> "Cyrl", "kk-Arab" -> "Arab", "zh" -> "Hans", "zh-TW" -> "Hant"; "Zyyy" (undetermined) if CLDR has
    none.
    """
    language = langcodes.Language.get(tag)
    if language.script is None and language.language in _SCRIPT_CORRECTIONS:
        return _SCRIPT_CORRECTIONS[language.language]
    return language.maximize().script or "Zyyy"


@lru_cache(maxsize=1024)
def base_language(tag: str) -> str:
    """Return the language subtag, macro-language for member: "khk" -> "mn", "azj" -> "az", "nb" -> "no"."""
    language = langcodes.Language.get(langcodes.standardize_tag(tag, macro=True)).language or "und"
    return "no" if language == "nb" else language


@lru_cache(maxsize=1)
def _script_pattern() -> regex.Pattern[str]:
    return regex.compile("|".join(rf"(?P<{code}>\p{{Script={code}}})" for code in _UNICODE_SCRIPTS.split()))


@lru_cache(maxsize=65536)
def _script_of_letter(char: str) -> str | None:
    match = _script_pattern().match(char) if char.isalpha() else None
    return match.lastgroup if match else None


def natural_text(text: str) -> str:
    """Return `text` without placeholders, tags and web addresses: their letters belong to no language."""
    return _MARKUP.sub(" ", PLACEHOLDER.sub(" ", text))


def dominant_script(text: str) -> str | None:
    """Return the ISO 15924 script of most letters of `text`, None if it has no letters.

    Chinese text gives "Hani": simplified and traditional characters share one Unicode script. A tie goes to
    the script met first.
    """
    scripts = letters_by_script(text)
    return scripts.most_common(1)[0][0] if scripts else None


def letters_by_script(text: str) -> Counter[str]:
    """Count the letters of each ISO 15924 script in `text`, in the order in which they are met."""
    scripts: Counter[str] = Counter()
    for char, count in Counter(text).items():
        script = _script_of_letter(char)
        if script is not None:
            scripts[script] += count
    return scripts


def script_matches(text_script: str | None, language_script: str) -> bool:
    """Whether text in the Unicode script `text_script` can be in a language written in `language_script`.

    "Hani" matches "Hans", "Hant", "Jpan" and "Kore"; None (text without letters) matches nothing.
    """
    return text_script in _WRITING_SYSTEM_SCRIPTS.get(language_script, {language_script})
