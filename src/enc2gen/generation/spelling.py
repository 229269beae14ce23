"""How terms are spelled in tokens: the spellings to ask for, and a rule against all of them.

A token's surface is the UTF-8 that it adds to the text, with a space in front where it starts a word, whatever the
tokenizer's own mark for that is (SentencePiece's "▁", WordPiece's missing "##", "Ġ" of byte-level BPE). It may be part
of a character only.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from enc2gen.errors import DataError
from enc2gen.generation.engine.candidates import Rule
from enc2gen.generation.engine.constraints import Phrase
from enc2gen.generation.glossary import words_are_spaced
from enc2gen.tokenization.pieces import BYTE_LEVEL, BYTE_PIECES
from enc2gen.tokenization.tokenizer import encode_pieces, fast_backend

_SPACE = b" "
_CHARACTER = 4
"""Bytes of the longest character."""
_BETWEEN = b"\xff"
"""Between surfaces in one string; it is in no UTF-8, and so in no term."""


class _Forbidden(NamedTuple):
    """A term that must not be written.

    Attributes:
        text: as surfaces spell it.
        at_start: whether it counts where no word goes on before it only.
        at_end: whether it counts within a token where no word goes on after it only.
        anywhere: tokens that contain it, whatever they follow.
    """

    text: bytes
    at_start: bool
    at_end: bool
    anywhere: frozenset[int]


class Spelling:
    """The tokens of one tokenizer as text.

    Args:
        tokenizer: a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = fast_backend(tokenizer)
        self._unknown = tokenizer.unk_token_id
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        kinds = ("▁", "Ġ", "##")
        counts = [sum(piece.startswith(kind) for piece, _ in vocabulary) for kind in kinds]
        self._kind = kinds[max(range(len(kinds)), key=lambda index: counts[index])] if any(counts) else ""
        decoder = self._backend.decoder
        falls_back = decoder is not None and b"ByteFallback" in decoder.__getstate__()
        self._byte_pieces = {piece: bytes([byte]) for byte, piece in enumerate(BYTE_PIECES)} if falls_back else {}
        special = set(tokenizer.all_special_ids)
        self._surfaces = {index: b"" if index in special else self._surface(piece) for piece, index in vocabulary}
        self._ids: dict[bytes, list[int]] = defaultdict(list)
        for index, surface in self._surfaces.items():
            if surface:
                self._ids[surface].append(index)
        self._sorted = sorted(self._ids)
        self._forbidden: dict[str, _Forbidden] = {}
        self._completing: dict[tuple[bytes, bool], frozenset[int]] = {}

    def _surface(self, piece: str) -> bytes:
        if piece in self._byte_pieces:
            return self._byte_pieces[piece]
        if self._kind == "##":
            return (piece[2:] if piece.startswith("##") else f" {piece}").encode()
        if self._kind == "Ġ" and all(letter in BYTE_LEVEL for letter in piece):
            return bytes(BYTE_LEVEL[letter] for letter in piece)
        return (piece.replace(self._kind, " ") if self._kind else piece).encode()

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(encode_pieces(self._backend, [text])[0])

    def phrase(self, term: str, within: Container[int] | None = None) -> Phrase:
        """What to ask for so that `term` is written: as the tokenizer spells it where a word starts, and, in scripts
        without spaces, within other text.

        Args:
            within: tokens of a shortlist; all by default.

        Raises:
            DataError: the vocabulary, or the shortlist, cannot spell it.
        """
        spaced = words_are_spaced(term)
        spellings = {self._tokens(f" {term}")} if self._kind == "Ġ" else {self._tokens(term)}
        if not spaced:
            for before in "。(、།":
                head, whole = self._tokens(before), self._tokens(before + term)
                if whole[: len(head)] == head:
                    spellings.add(whole[len(head) :])
        known = sorted(one for one in spellings if one and self._unknown not in one)
        if not known:
            raise DataError(
                f"the model's vocabulary cannot spell {term!r}",
                where="glossary",
                remedy="leave the term out, or add its characters to the vocabulary: enc2gen vocab",
            )
        written = [one for one in known if within is None or all(token in within for token in one)]
        if not written:
            raise DataError(
                f"the shortlist lacks tokens of {term!r}",
                where="glossary",
                remedy="leave the term out, or build the shortlist from texts that have it: enc2gen shortlist",
            )
        return Phrase(tuple(written))

    def phrase_beside(self, phrase: Phrase, rule: Rule) -> Phrase | None:
        """The spellings of `phrase` that `rule` lets pass; None if there is none."""
        passed = []
        for spelling in phrase.spellings:
            bans = rule([[0, *spelling[:place]] for place in range(len(spelling))])  # 0: any start, it is not read
            if not any(token in banned for token, banned in zip(spelling, bans, strict=True)):
                passed.append(spelling)
        return Phrase(tuple(passed)) if passed else None

    def never(self, terms: Sequence[str]) -> Rule:
        """No output contains any of `terms`, however it is split into tokens.

        Where words are set apart with spaces, a term is forbidden from the start of a word on, longer words that begin
        with its tokens included. In other scripts it is forbidden wherever it occurs.
        """
        anywhere: set[int] = set()
        after_word_end: set[int] = set()
        begun: dict[bytes, list[tuple[bytes, _Forbidden]]] = defaultdict(list)
        for term in map(self._term, terms):
            if not term.text:
                continue  # it cannot be spelled, and so cannot be written
            anywhere |= term.anywhere
            after_word_end |= self._tokens_completing(term.text, term.at_end)
            for length in range(1, len(term.text)):
                begun[term.text[:length]].append((term.text[length:], term))
        longest = max(map(len, begun), default=0)

        def banned(hypothesis: list[int]) -> set[int]:
            text = self._tail(hypothesis[1:], longest + _CHARACTER)
            found = anywhere | (set() if _within_word(text) else after_word_end)
            for place in range(max(0, len(text) - longest), len(text)):
                for rest, term in begun.get(text[place:], ()):
                    if not (term.at_start and _within_word(text[:place])):
                        found |= self._tokens_completing(rest, term.at_end)
                        if text.endswith(_SPACE):  # two spaces are one to whoever reads the text
                            found |= self._tokens_completing(_SPACE + rest, term.at_end)
            return found

        return lambda hypotheses: [banned(hypothesis) for hypothesis in hypotheses]

    def _term(self, term: str) -> _Forbidden:
        """`term` with all that can be found out before anything is written; kept, because sources share terms."""
        if term not in self._forbidden:
            tokens = self._tokens(f" {term}") if self._kind == "Ġ" else self._tokens(term)
            text = b"".join(self._surfaces.get(token, b"") for token in tokens).strip(_SPACE)
            text = b"" if self._unknown in tokens else text
            spaced = words_are_spaced(term)
            at_start, at_end = spaced and _within_word(text, first=True), spaced and _within_word(text)
            anywhere = frozenset(self._tokens_with(text, at_start, at_end) if text else ())
            self._forbidden[term] = _Forbidden(text, at_start, at_end, anywhere)
        return self._forbidden[term]

    def _tail(self, tokens: Sequence[int], least: int) -> bytes:
        """At least so many last bytes of a text, or all; no two spaces between tokens."""
        text = b""
        for token in reversed(tokens):
            surface = self._surfaces.get(token, b"")
            text = surface + (text.lstrip(_SPACE) if surface.endswith(_SPACE) else text)
            if len(text) >= least:
                break
        return text

    @cached_property
    def _joined(self) -> tuple[bytes, list[int]]:
        """All surfaces in one string, in which terms are found quickly, and where each begins."""
        starts, place = [], 0
        for surface in self._sorted:
            starts.append(place)
            place += len(surface) + len(_BETWEEN)
        return _BETWEEN.join(self._sorted), starts

    def _tokens_with(self, text: bytes, at_start: bool, at_end: bool) -> Iterator[int]:
        """Tokens with `text` in them, not at their beginning only where it has to be at the start of a word."""
        joined, starts = self._joined
        place = joined.find(text)
        while place >= 0:
            number = bisect_right(starts, place) - 1
            surface, begin = self._sorted[number], place - starts[number]
            starts_word = begin > 0 and not _within_word(surface[:begin])
            if (starts_word or not at_start) and _ends(surface, begin + len(text), at_end):
                yield from self._ids[surface]
            place = joined.find(text, place + 1)

    def _tokens_completing(self, text: bytes, at_end: bool) -> frozenset[int]:
        """Tokens that begin with `text`; where it has to be at the end of a word, those in which it is."""
        key = text, at_end
        if key not in self._completing:
            found, place = [], bisect_left(self._sorted, text)
            while place < len(self._sorted) and self._sorted[place].startswith(text):
                if _ends(self._sorted[place], len(text), at_end):
                    found += self._ids[self._sorted[place]]
                place += 1
            self._completing[key] = frozenset(found)
        return self._completing[key]


def _ends(surface: bytes, place: int, at_end: bool) -> bool:
    """Whether a term that ends at `place` of a surface counts; with the surface it does, whatever comes next."""
    return not at_end or place == len(surface) or not _within_word(surface[place:], first=True)


def _within_word(text: bytes, *, first: bool = False) -> bool:
    """Whether the last, or first, character of `text` is of a word: a letter, mark (vowel signs, say) or number."""
    near = text[:_CHARACTER] if first else text[-_CHARACTER:]
    characters = near.decode(errors="ignore")
    return bool(characters) and unicodedata.category(characters[0 if first else -1])[0] in "LMN"
