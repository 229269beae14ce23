"""How terms are spelled in tokens: the spellings to ask for, and a rule against all of them.

A token's surface is what it adds to the text, with "▁" in front where it starts a word, whatever the tokenizer's own
mark for that is (SentencePiece's "▁", WordPiece's missing "##", "Ġ" of byte-level BPE).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from enc2gen.errors import DataError
from enc2gen.generation.engine.candidates import Bans, Rule
from enc2gen.generation.engine.constraints import Phrase
from enc2gen.generation.glossary import words_are_spaced
from enc2gen.tokenization.tokenizer import encode_pieces, fast_backend

_START = "▁"
_Banned = Callable[[list[int]], set[int]]


def _nothing(hypothesis: list[int]) -> set[int]:
    """For a term that cannot be spelled, and so cannot be written."""
    return set()


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
        special = set(tokenizer.all_special_ids)
        self._surfaces = {index: "" if index in special else self._surface(piece) for piece, index in vocabulary}
        self._ids: dict[str, list[int]] = defaultdict(list)
        for index, surface in self._surfaces.items():
            if surface:
                self._ids[surface].append(index)
        self._sorted = sorted(self._ids)

    def _surface(self, piece: str) -> str:
        if self._kind == "##":
            return piece[2:] if piece.startswith("##") else _START + piece
        return piece.replace(self._kind, _START) if self._kind else piece

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(encode_pieces(self._backend, [text])[0])

    def _text(self, tokens: Sequence[int]) -> str:
        return "".join(self._surfaces.get(token, "") for token in tokens)

    def phrase(self, term: str) -> Phrase:
        """What to ask for so that `term` is written: as the tokenizer spells it where a word starts, and, in scripts
        without spaces, within other text.

        Raises:
            DataError: the vocabulary cannot spell it.
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
        return Phrase(tuple(known))

    def never(self, terms: Sequence[str]) -> Rule:
        """No output contains any of `terms`, however it is split into tokens.

        Where words are set apart with spaces, a term is forbidden from the start of a word on, longer words that begin
        with its tokens included. In other scripts it is forbidden wherever it occurs.
        """
        rules = [self._spaced(term) if words_are_spaced(term) else self._unspaced(term) for term in terms]

        def rule(hypotheses: list[list[int]]) -> Bans:
            return [set().union(*(one(hypothesis) for one in rules)) for hypothesis in hypotheses]

        return rule

    def _inner(self, term: str) -> str:
        """`term` as surfaces spell it: normalised, without the mark of a word's start in front."""
        tokens = self._tokens(f" {term}") if self._kind == "Ġ" else self._tokens(term)
        return "" if self._unknown in tokens else self._text(tokens).lstrip(_START)

    def _spaced(self, term: str) -> _Banned:
        wanted = self._inner(term)

        def banned(hypothesis: list[int]) -> set[int]:
            found = set(self._ids.get(_START + wanted, ()))
            if not self._in_word(hypothesis[1:]):
                found.update(self._ids.get(wanted, ()))
            written = ""
            for place in range(len(hypothesis) - 1, 0, -1):
                written = self._surfaces.get(hypothesis[place], "") + written
                begun = written.lstrip(_START)
                if len(begun) >= len(wanted):
                    break
                starts = written.startswith(_START) or not self._in_word(hypothesis[1:place])
                if starts and begun and wanted.startswith(begun):
                    found.update(self._ids.get(wanted[len(begun) :], ()))
            return found

        return banned if wanted else _nothing

    def _in_word(self, tokens: Sequence[int]) -> bool:
        """Whether the text so far ends within a word."""
        text = self._surfaces.get(tokens[-1], "") if tokens else ""
        return bool(text) and text[-1].isalnum()

    def _unspaced(self, term: str) -> _Banned:
        wanted = self._inner(term)
        whole = {index for surface, ids in self._ids.items() if wanted and wanted in surface for index in ids}

        def banned(hypothesis: list[int]) -> set[int]:
            found, written = set(whole), ""
            for token in reversed(hypothesis[1:]):
                written = self._surfaces.get(token, "") + written
                if len(written) >= len(wanted):
                    break
            for length in range(1, len(wanted)):
                if written.endswith(wanted[:length]):
                    found.update(self._beginning_with(wanted[length:]))
            return found

        return banned if wanted else _nothing

    def _beginning_with(self, text: str) -> Iterator[int]:
        for place in range(bisect_left(self._sorted, text), len(self._sorted)):
            if not self._sorted[place].startswith(text):
                return
            yield from self._ids[self._sorted[place]]
