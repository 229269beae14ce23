"""Normalizers that leave given characters alone.

The normalizer of a pretrained tokenizer was made for the languages it was trained on. For a script it did not
know it may do harm: XLM-R's character map turns the Tibetan U+0F0C into U+0F0B, and BERT's accent stripping
deletes the vowel signs of every Indic script.
"""

from __future__ import annotations

import base64
import json
import struct
import sys
import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import WordPiece

from enc2gen.tokenization.pieces import first_name

_HAS_LEAF = 1 << 8
_EXTENDED_OFFSET = 1 << 9
_LABEL = (1 << 31) | 0xFF
_SHARED_MARK = "COMBINING"  # first name of marks that many scripts use
_KANA_MARK = "COMBINING KATAKANA-HIRAGANA"  # but the two sound marks of Japanese are of one
_SURROGATES = range(0xD800, 0xE000)  # no characters


def without_rules(charsmap: bytes, characters: Iterable[str]) -> bytes:
    """SentencePiece's precompiled character map without its rules for single `characters`."""
    size = struct.unpack_from("<I", charsmap)[0]
    units = list(struct.unpack_from(f"<{size // 4}I", charsmap, 4))
    for character in characters:
        position = 0
        for byte in character.encode():
            unit = units[position]
            offset = (unit >> 10) << ((unit & _EXTENDED_OFFSET) >> 6)
            position ^= offset ^ byte
            if position >= len(units) or units[position] & _LABEL != byte:
                break
        else:
            units[position] &= ~_HAS_LEAF
    return charsmap[:4] + struct.pack(f"<{len(units)}I", *units) + charsmap[4 + size :]


def altered_characters(normaliser: dict[str, Any] | None, characters: Iterable[str]) -> list[str]:
    """Those of `characters` that the (serialised) normalizer rewrites, beyond canonical equivalence and case.

    Spaces put around a character, as BERT does with Chinese ones, do not count.
    """
    if normaliser is None:
        return []
    step = normaliser_of(normaliser)
    found = []
    for character in sorted(set(characters)):
        before = unicodedata.normalize("NFD", f"a{character}a")
        written = step.normalize_str(f"a{character}a").replace("▁", " ")
        # No character to keep is such a space, so one that became a space differs still.
        after = unicodedata.normalize("NFD", written.replace(" ", ""))
        if after not in (before, before.lower()):
            found.append(character)
    return found


def exempt_characters(normaliser: dict[str, Any] | None, characters: list[str]) -> dict[str, Any] | None:
    """The serialised normalizer, changed so that character maps and accent stripping pass `characters` by.

    Compatibility forms (`NFKC`, `NFKD`) cannot be told to; :func:`altered_characters` of the result shows
    what is left.
    """
    if normaliser is None or not characters:
        return normaliser
    kind = normaliser["type"]
    if kind == "Sequence":
        steps = [exempt_characters(step, characters) for step in normaliser["normalizers"]]
        return {**normaliser, "normalizers": steps}
    if kind == "Precompiled":
        charsmap = without_rules(base64.b64decode(normaliser["precompiled_charsmap"]), characters)
        return {**normaliser, "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    if kind == "StripAccents":
        return _serialised(_strip_other_marks(characters, normaliser))
    if kind == "BertNormalizer":
        if normaliser["clean_text"] and any(unicodedata.category(c)[0] == "C" for c in characters):
            cleaning = [_serialised(step) for step in _clean_other_text(characters)]
            rest = exempt_characters({**normaliser, "clean_text": False}, characters)
            return {"type": "Sequence", "normalizers": [*cleaning, rest]}
        strips = normaliser["lowercase"] if normaliser["strip_accents"] is None else normaliser["strip_accents"]
        if strips and any(unicodedata.category(c) == "Mn" for c in _with_own_marks(characters)):
            # BERT's order: clean, space ideographs, strip accents, lower case.
            first = {**normaliser, "strip_accents": False, "lowercase": False}
            strip = {**normaliser, **_BERT_STEPS, "strip_accents": True}
            then = [normalizers.NFD(), _strip_other_marks(characters, strip)]
            last = [normalizers.Lowercase()] if normaliser["lowercase"] else []
            steps = [first, *(_serialised(step) for step in [*then, *last])]
            return {"type": "Sequence", "normalizers": steps}
    return normaliser


def normaliser_of(serialised: dict[str, Any]) -> normalizers.Normalizer:
    """The normalizer that `serialised` (a part of a tokenizer's JSON) describes."""
    state = json.loads(Tokenizer(WordPiece({"": 0}, unk_token="")).to_str())
    found = Tokenizer.from_str(json.dumps({**state, "normalizer": serialised})).normalizer
    assert found is not None
    return found


_BERT_STEPS = {"clean_text": False, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False}


def _strip_other_marks(characters: list[str], strip: dict[str, Any]) -> normalizers.Normalizer:
    """The serialised step `strip`, but for `characters` and the marks that these are decomposed into."""
    gone = _characters_made(json.dumps(strip), "") - set(_with_own_marks(characters))
    return normalizers.Replace(Regex(_character_class(gone)), "")


def _with_own_marks(characters: list[str]) -> list[str]:
    """`characters` and the marks of their script that they are decomposed into.

    Marks of many scripts stay out: with that of "Ё", German "ü" would be written otherwise, too.
    """
    parts = {part for character in characters for part in unicodedata.normalize("NFD", character)[1:]}
    parts |= {part for c in characters if unicodedata.category(c)[0] == "M" for part in unicodedata.normalize("NFD", c)}
    own = {c for c in parts if first_name(c) != _SHARED_MARK or unicodedata.name(c).startswith(_KANA_MARK)}
    return sorted(own.union(characters))


def _clean_other_text(characters: list[str]) -> list[normalizers.Normalizer]:
    """BERT's cleaning, but for `characters`: control and format characters vanish, white space becomes spaces."""
    clean = json.dumps({"type": "BertNormalizer", **_BERT_STEPS, "clean_text": True})
    steps: list[normalizers.Normalizer] = []
    for made in ("", " "):
        found = _characters_made(clean, made).difference(characters)
        steps.append(normalizers.Replace(Regex(_character_class(found)), made))
    return steps


@cache
def _characters_made(step: str, made: str) -> frozenset[str]:
    """Characters that the serialised normalizer `step` turns into `made`, other ones.

    Classes such as \\p{Mn} do not tell: the regular expressions know a newer Unicode than the normalizers.
    """
    normaliser = normaliser_of(json.loads(step))
    everything = [chr(point) for point in range(sys.maxunicode + 1) if point not in _SURROGATES]
    left = set(normaliser.normalize_str("".join(everything)))
    return frozenset(c for c in everything if c not in left and normaliser.normalize_str(c) == made)


def _character_class(characters: Iterable[str]) -> str:
    """A regular expression for any one of `characters`."""
    ranges: list[list[int]] = []
    for point in sorted(map(ord, characters)):
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return "[" + "".join(rf"\x{{{first:x}}}-\x{{{last:x}}}" for first, last in ranges) + "]"


def _serialised(step: normalizers.Normalizer) -> dict[str, Any]:
    tokenizer = Tokenizer(WordPiece({"": 0}, unk_token=""))
    tokenizer.normalizer = step
    found: dict[str, Any] = json.loads(tokenizer.to_str())["normalizer"]
    return found
