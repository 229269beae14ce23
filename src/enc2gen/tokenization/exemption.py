"""Normalizers that leave given characters alone.

The normalizer of a pretrained tokenizer was made for the languages it was trained on. For a script it did not
know it may do harm: XLM-R's character map turns the Tibetan U+0F0C into U+0F0B, and BERT's accent stripping
deletes the vowel signs of every Indic script.
"""

from __future__ import annotations

import base64
import json
import struct
import unicodedata
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import WordPiece

_HAS_LEAF = 1 << 8
_EXTENDED_OFFSET = 1 << 9
_LABEL = (1 << 31) | 0xFF


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
    """Those of `characters` that the (serialised) normalizer rewrites, beyond canonical equivalence and case."""
    if normaliser is None:
        return []
    step = normaliser_of(normaliser)
    found = []
    for character in sorted(set(characters)):
        before = unicodedata.normalize("NFD", f"a{character}a")
        after = unicodedata.normalize("NFD", step.normalize_str(f"a{character}a").replace("▁", " ").strip())
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
        return _serialised(_strip_other_marks(characters))
    if kind == "BertNormalizer":
        if normaliser["clean_text"] and any(unicodedata.category(c)[0] == "C" for c in characters):
            cleaning = [_serialised(step) for step in _clean_other_text(characters)]
            rest = exempt_characters({**normaliser, "clean_text": False}, characters)
            return {"type": "Sequence", "normalizers": [*cleaning, rest]}
        strips = normaliser["lowercase"] if normaliser["strip_accents"] is None else normaliser["strip_accents"]
        if strips and any(unicodedata.category(c) == "Mn" for c in characters):
            # BERT's order: clean, space ideographs, strip accents, lower case.
            first = {**normaliser, "strip_accents": False, "lowercase": False}
            then = [normalizers.NFD(), _strip_other_marks(characters)]
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


def _strip_other_marks(characters: list[str]) -> normalizers.Normalizer:
    kept = "".join(rf"\x{{{ord(c):x}}}" for c in characters)
    return normalizers.Replace(Regex(rf"[\p{{Mn}}&&[^{kept}]]"), "")


def _clean_other_text(characters: list[str]) -> list[normalizers.Normalizer]:
    """BERT's cleaning, but for `characters`: control and format characters vanish, white space becomes spaces."""
    kept = "".join(rf"\x{{{ord(c):x}}}" for c in characters)
    gone = rf"[[\p{{C}}\x{{fffd}}]&&[^{kept}\t\n\r]]"
    return [normalizers.Replace(Regex(gone), ""), normalizers.Replace(Regex(rf"[\s&&[^{kept}]]"), " ")]


def _serialised(step: normalizers.Normalizer) -> dict[str, Any]:
    tokenizer = Tokenizer(WordPiece({"": 0}, unk_token=""))
    tokenizer.normalizer = step
    found: dict[str, Any] = json.loads(tokenizer.to_str())["normalizer"]
    return found
