"""What pieces spell, whatever a tokenizer's notation, and how an old tokenizer splits a new piece."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from enc2gen.tokenization.tokenizer import fast_backend

Notation = Literal["space mark", "continuation", "bytes"]

_SPACE = "▁"  # SentencePiece's space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # pieces of byte fallback


class PieceForm(NamedTuple):
    """What a piece spells: its text without marks, and whether it begins a word.

    Byte-level pieces may spell parts of characters: such bytes are lone surrogates in the text, as Python's error
    handler "surrogateescape" makes them, so that every text says which bytes it is.
    """

    text: str
    starts_word: bool


def piece_forms(tokenizer: PreTrainedTokenizerBase) -> list[PieceForm | None]:
    """Form of every id; None for added and special tokens, bytes, and ids without a piece."""
    backend = fast_backend(tokenizer)
    how, inside = notation(backend), _continuation(backend)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    special = {*backend.get_added_tokens_decoder(), *tokenizer.all_special_ids, tokenizer.unk_token_id}
    forms: list[PieceForm | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for piece, index in vocabulary.items():
        if index not in special and not _BYTE.fullmatch(piece):
            forms[index] = _form(piece, how, inside)
    return forms


def _continuation(backend: Tokenizer) -> str:
    """WordPiece's mark of a piece inside a word, mostly "##"; "" for other kinds."""
    mark: str = getattr(backend.model, "continuing_subword_prefix", None) or ""
    return mark if type(backend.model).__name__ == "WordPiece" else ""


def notation(backend: Tokenizer) -> Notation:
    """How the tokenizer's pieces say where words begin."""
    if type(backend.model).__name__ == "WordPiece":
        return "continuation"
    parts = [part.__getstate__() for part in (backend.pre_tokenizer, backend.decoder) if part is not None]
    return "bytes" if any(b"ByteLevel" in part for part in parts) else "space mark"


@cache
def _byte_letters() -> dict[str, int]:
    """GPT-2's printable letters of the 256 bytes: letter -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _form(piece: str, how: Notation, mark: str) -> PieceForm:
    if how == "continuation":
        inside = bool(mark) and piece.startswith(mark) and len(piece) > len(mark)
        return PieceForm(piece.removeprefix(mark) if inside else piece, not inside)
    if how == "bytes":
        letters = _byte_letters()
        if all(letter in letters for letter in piece):
            piece = bytes(letters[letter] for letter in piece).decode("utf-8", errors="surrogateescape")
        return PieceForm(piece[1:], True) if piece.startswith(" ") else PieceForm(piece, False)
    return PieceForm(piece[1:], True) if piece.startswith(_SPACE) else PieceForm(piece, False)


def find_overlap(
    wanted: Mapping[int, PieceForm], old_forms: Sequence[PieceForm | None], *, fuzzy: bool
) -> dict[int, int]:
    """New ids whose piece is an old one: new id -> old id.

    Tried in turn, the lowest old id first: the same form; and if `fuzzy`, the same up to NFKC and letter case, then
    also up to the word start. Forms with parts of characters are only ever the same: their bytes have no letter case.
    """
    views = [_exact, _folded, _bare] if fuzzy else [_exact]
    found: dict[int, int] = {}
    for view in views:
        comparable = _has_text if view is _exact else _has_whole_text
        known: dict[Any, int] = {}
        for index, form in enumerate(old_forms):
            if form is not None and comparable(form):
                known.setdefault(view(form), index)
        for index, form in wanted.items():
            if index not in found and comparable(form) and (old := known.get(view(form))) is not None:
                found[index] = old
    return found


def _has_text(form: PieceForm) -> bool:
    return bool(form.text)


def _has_whole_text(form: PieceForm) -> bool:
    return bool(form.text) and not any(map(_is_byte, form.text))


def _is_byte(letter: str) -> bool:
    return "\ud800" <= letter <= "\udfff"


def _exact(form: PieceForm) -> PieceForm:
    return form


def _folded(form: PieceForm) -> tuple[str, bool]:
    return _bare(form), form.starts_word


def _bare(form: PieceForm) -> str:
    return unicodedata.normalize("NFKC", form.text).casefold()


class Splitter:
    """Splits the text of new pieces into the pieces of the old tokenizer.

    Args:
        tokenizer: the old tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = fast_backend(tokenizer)
        self._how, self._continuation = notation(self._backend), _continuation(self._backend)
        self._forms = piece_forms(tokenizer)
        self._vocabulary = self._backend.get_vocab(with_added_tokens=False)

    def split(self, form: PieceForm) -> list[int]:
        """Old ids that spell `form`; parts that the old tokenizer cannot spell and lone space marks are left out."""
        if self._how == "continuation":
            ids = self._longest_matches(form)
        else:
            text = (" " if form.starts_word else "") + form.text
            if self._how == "bytes":
                names = {byte: letter for letter, byte in _byte_letters().items()}
                text = "".join(names[byte] for byte in text.encode("utf-8", errors="surrogateescape"))
            text = "".join(letter for letter in text if not _is_byte(letter))
            ids = [token.id for token in self._backend.model.tokenize(text.replace(" ", _SPACE))]
        spelt = ((index, self._forms[index]) for index in ids if index < len(self._forms))
        return [index for index, found in spelt if found is not None and found.text]

    def _longest_matches(self, form: PieceForm) -> list[int]:
        """Greedy longest matches from the left, as WordPiece splits, but past characters that nothing spells."""
        ids, start, text = [], 0, form.text
        while start < len(text):
            mark = "" if form.starts_word and not start else self._continuation
            ends = (end for end in range(len(text), start, -1) if mark + text[start:end] in self._vocabulary)
            end = next(ends, None)
            if end is not None:
                ids.append(self._vocabulary[mark + text[start:end]])
            start = end or start + 1
        return ids
