"""Cleaning of one line: markup, mojibake, control characters, Unicode form, white space.

What spells words stays as it is: ZWJ and ZWNJ (Persian, Sinhala, Hindi), the Tibetan tsheg U+0F0B, Mongolian
variation selectors (U+180B-180D, U+180F), vowel separator (U+180E) and narrow no-break space (U+202F), the
zero-width space between words of Khmer, Thai, Lao and Burmese. Quotation marks, ligatures and full-width forms are
not folded either: a generator should write its language as its readers do.
"""

from __future__ import annotations

import re
import unicodedata
from html import unescape
from typing import Literal, NamedTuple

import ftfy
import ftfy.badness
import regex
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from enc2gen.corpora.deduplication import NearDuplicateConfig
from enc2gen.corpora.languages import normalise_language
from enc2gen.corpora.lines import ReadingConfig

DROP_REASONS: dict[str, str] = {
    "encoding": "bytes that are no text in the file's encoding, or U+FFFD: characters are lost",
    "empty": "nothing but white space or control characters",
    "markup": "nothing but markup",
    "too-short": "fewer characters than min_length",
    "too-long": "more characters than max_length, or too long a line to read",
    "few-letters": "mostly digits, punctuation or symbols",
    "repetition": "the same characters or words again and again",
    "wrong-language": "another language or script than the one asked for",
    "contaminated": "in an evaluation set",
    "exact-duplicate": "the same as an earlier line, but for case, punctuation and spaces",
    "near-duplicate": "almost the same as an earlier line",
}
"""Why a line is dropped -> what that means, in the order of the tests; a line counts for its first reason."""

REPAIRS: dict[str, str] = {
    "markup": "HTML tags removed, entities replaced by their characters",
    "mojibake": "text that had been decoded in a wrong encoding decoded again",
    "controls": "control and invisible format characters removed",
    "normalisation": "put into Unicode normalisation form C",
    "whitespace": "runs of white space made one space",
}
"""Kind of repair -> what was done, in order."""


class CleaningConfig(BaseModel):
    """What `enc2gen prepare` does. Numbers are our choice unless a source is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    language: str = Field(..., description="Language of the texts, a BCP 47 tag such as bo or mn-Mong.")
    reading: ReadingConfig = Field(default_factory=ReadingConfig, description="How the sources are read.")
    markup: bool = Field(default=True, description="Remove HTML tags, replace entities.")
    repair: bool = Field(default=True, description="Repair mojibake with ftfy.")
    normalise: bool = Field(default=True, description="Unicode normalisation form C.")
    min_length: int = Field(default=5, ge=1, description="Fewest characters of a line.")
    max_length: int = Field(default=10_000, ge=1, description="Most characters of a line.")
    min_letters: float = Field(
        default=0.3, ge=0, le=1, description="Smallest share of letters in what is not white space."
    )
    max_ngram_share: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="Largest share of one character 5-gram among all of a line; 1 turns it off.",
    )
    max_repeated_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Largest share of trigrams of words that repeat an earlier one; 1 turns it off.",
    )
    filter_language: bool = Field(default=True, description="Drop lines in another language or script.")
    identifier: str = Field(default="fasttext-lid176", description="Language identifier; see LANGUAGE_IDENTIFIERS.")
    duplicates: Literal["near", "exact", "none"] = Field(
        default="near", description="Which duplicates to drop: near and exact ones, exact ones only, none."
    )
    near_duplicates: NearDuplicateConfig = Field(
        default_factory=lambda: NearDuplicateConfig.model_validate({}), description="What a near-duplicate is."
    )
    against: tuple[str, ...] = Field(default=(), description="Evaluation files whose lines must not be in the output.")
    dev_percent: float = Field(default=2.0, ge=0, lt=100, description="Documents that go into dev, in percent.")
    test_percent: float = Field(default=2.0, ge=0, lt=100, description="Documents that go into test, in percent.")
    seed: int = Field(default=0, description="Of the split.")
    shard_lines: int = Field(default=1_000_000, ge=1, description="Most lines of a Parquet shard.")
    shard_megabytes: int = Field(
        default=256, ge=1, description="Most text of a Parquet shard before compression, in MiB."
    )

    @field_validator("language")
    @classmethod
    def _known_language(cls, tag: str) -> str:
        return normalise_language(tag, where="language")

    @model_validator(mode="after")
    def _consistent(self) -> CleaningConfig:
        if self.dev_percent + self.test_percent >= 100:
            raise ValueError("dev_percent and test_percent leave nothing to train on")
        if self.min_length > self.max_length:
            raise ValueError(f"min_length={self.min_length} is more than max_length={self.max_length}")
        return self


class CleanedLine(NamedTuple):
    """A line after cleaning.

    Attributes:
        text: what is left.
        repairs: kinds of repair that changed it, keys of `REPAIRS`.
    """

    text: str
    repairs: tuple[str, ...]


# Everything that changes how a language is written is off; control characters and NFC are done here, because ftfy
# knows no joiners of Mongolian and no switch for single characters.
_FTFY = ftfy.TextFixerConfig(
    unescape_html=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    remove_control_chars=False,
    normalization=None,
    explain=False,
)
# Mojibake holds signs of the single-byte encodings that ftfy knows; ftfy takes long to find that there are none.
_FTFY_SIGNS = re.compile("[\x80-\u04ff\u2010-\u25ff\uf8ff\ufb01\ufb02\ufffd]")
_FTFY_OTHERS = re.compile("[\x1b\ud800-\udfff]")  # terminal escapes, halves of surrogate pairs
# C0 and C1 controls but white space; soft hyphen; invisible format characters that spell nothing (marks of direction,
# word joiner, byte order mark, invisible operators, annotations, tags); noncharacters. Not: ZWNJ, ZWJ, U+180E.
_CONTROLS = regex.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u061c\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e007f]"
)
_WORD_BREAK_SCRIPTS = r"[\p{Khmer}\p{Thai}\p{Lao}\p{Myanmar}]"
_STRAY_ZERO_WIDTH_SPACE = regex.compile(rf"(?<!{_WORD_BREAK_SCRIPTS})\u200b|\u200b(?!{_WORD_BREAK_SCRIPTS})")
# Not U+202F, which joins Mongolian suffixes to their word.
_WHITESPACE = re.compile("[\t-\r\x1c-\x1f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u205f\u3000]+")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# A "<" counts as markup only before the name of an HTML element: "a <b" and "<unk>" are text.
_BLOCKS = (
    "address|article|aside|blockquote|body|br|caption|center|col|colgroup|dd|details|div|dl|dt|fieldset|figcaption|"
    "figure|footer|form|h[1-6]|head|header|hr|html|iframe|legend|li|main|nav|noscript|object|ol|optgroup|option|p|pre|"
    "script|section|select|style|summary|table|tbody|td|template|textarea|tfoot|th|thead|title|tr|ul"
)
_INLINE = (
    "a|abbr|acronym|audio|b|bdi|bdo|big|button|canvas|cite|code|del|dfn|em|embed|font|i|img|input|ins|kbd|label|link|"
    "mark|meta|nobr|o:p|param|q|rp|rt|ruby|s|samp|small|source|span|strike|strong|sub|sup|svg|tt|u|var|video|wbr"
)
# After the name comes the end, or an attribute: <b> and <b class=x> are markup, "<b va c>" is text. A ">" within
# quotation marks does not end a tag; where the marks make no sense, the first one does.
_FLAGS = "async|checked|clear|compact|controls|defer|disabled|hidden|ismap|multiple|noshade|nowrap|readonly|selected"
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"'<>]+)"""
_ATTRIBUTES = rf"(?:(?:\s+[\w:.@-]+\s*=\s*{_VALUE})+\s*|\s+(?:[\w:.@-]+\s*=|(?:{_FLAGS})(?=[\s/>]))[^<>]*)"
_TAG = re.compile(
    rf"</?(?:(?P<block>{_BLOCKS})|{_INLINE})(?:\s*|{_ATTRIBUTES})/?>|(?P<comment><!--)|<!doctype\s[^<>]*>|<\?xml\s[^<>]*>",
    re.IGNORECASE,
)
# What hides the text after it counts only if it ends in the line: else it is named in a text, or the line was cut.
_HIDING = frozenset(("head", "noscript", "script", "style", "template"))
_HIDING_ENDS = re.compile(rf"</({'|'.join(sorted(_HIDING))})\s*>|(-->)", re.IGNORECASE)


def clean_text(text: str, config: CleaningConfig) -> str:
    """Return `text`, one line, without markup, mojibake, control characters and superfluous white space, in NFC."""
    return clean_line(text, config).text


def clean_line(text: str, config: CleaningConfig) -> CleanedLine:
    """Clean like :func:`clean_text`, and say which repairs changed the text."""
    steps = (
        ("markup", _without_markup if config.markup else None),
        ("mojibake", _repaired if config.repair else None),
        ("controls", _without_controls),
        ("normalisation", _normalised if config.normalise else None),
        ("whitespace", _collapsed),
    )
    repairs = []
    for kind, step in steps:
        if step is not None and (changed := step(text)) != text:
            text = changed
            repairs.append(kind)
    return CleanedLine(text, tuple(repairs))


def _without_markup(text: str) -> str:
    # Twice, for markup that was escaped as text ("&lt;p&gt;") as feeds do.
    for _ in range(2):
        if "&" in text:
            text = _ENTITY.sub(lambda entity: unescape(entity[0]), text)
        if "<" not in text or not _TAG.search(text):
            break
        text = _text_of_html(text)
    return text


def _text_of_html(html: str) -> str:
    # No parser of HTML, which would take "<Xalq so'zi>" for an element, and all text after an open <style> for its
    # content: here nothing is left out but tags that are known, and what is hidden from their readers.
    ends: dict[str, list[int]] = {}  # of what hides -> where; the first one last
    for end in _HIDING_ENDS.finditer(html):
        ends.setdefault((end[1] or end[2]).lower(), []).append(end.end())
    for positions in ends.values():
        positions.reverse()
    parts, done, search = [], 0, 0
    while tag := _TAG.search(html, search):
        search = tag.end()
        block = (tag["block"] or "").lower()
        hiding = "-->" if tag["comment"] else block if block in _HIDING and html[tag.start() + 1] != "/" else ""
        if hiding:
            following = ends.get(hiding, [])
            while following and following[-1] < search:
                following.pop()
            if not following:
                continue
            search = following.pop()
        parts.append(html[done : tag.start()])
        # A line without text but with block elements stays apart: "<p>a</p><p>b</p>" is "a b", "<b>a</b>b" is "ab".
        if block and tag.start() > 0:
            parts.append(" ")
        done = search
    return "".join([*parts, html[done:]])


def _repaired(text: str) -> str:
    suspicious = _FTFY_OTHERS.search(text) or (_FTFY_SIGNS.search(text) and ftfy.badness.is_bad(text))
    return ftfy.fix_text(text, _FTFY) if suspicious else text


def _without_controls(text: str) -> str:
    if text.isprintable():  # all of them are not, and this is much faster to find out
        return text
    return _STRAY_ZERO_WIDTH_SPACE.sub("", _CONTROLS.sub("", text))


def _normalised(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _collapsed(text: str) -> str:
    if text.isprintable() and "  " not in text:  # the space is the only white space that counts as printable
        return text.strip(" ")
    return _WHITESPACE.sub(" ", text).strip(" ")
