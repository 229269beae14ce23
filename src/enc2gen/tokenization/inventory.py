"""What is in a vocabulary: the text of each piece, its script, and whether it is less than a piece of a word."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerBase

from enc2gen.corpora.languages import dominant_script
from enc2gen.tokenization.tokenizer import fast_backend

_WORD_START = "▁"  # SentencePiece's space


@dataclass(frozen=True)
class PieceInventory:
    """The pieces of a tokenizer.

    Attributes:
        texts: id -> text of the piece without the mark of its place in the word; None for a byte or a part of a
            character. Special and added tokens are not in it.
    """

    texts: dict[int, str | None]

    @cached_property
    def small(self) -> frozenset[int]:
        """Ids of pieces of one character or less: bytes and the bare space mark too."""
        return frozenset(i for i, text in self.texts.items() if text is None or len(text) <= 1)

    @cached_property
    def scripts(self) -> dict[str, int]:
        """Number of pieces by script (ISO 15924) of their first letter, most first; "bytes" for bytes and parts of
        characters, "none" for digits, signs and marks."""
        texts = self.texts.values()
        letters = Counter("bytes" if text is None else next(filter(str.isalpha, text), "") for text in texts)
        scripts: Counter[str] = Counter()
        for letter, count in letters.items():
            scripts[letter if letter == "bytes" else dominant_script(letter) or "none"] += count
        return dict(scripts.most_common())


def piece_inventory(tokenizer: PreTrainedTokenizerBase) -> PieceInventory:
    """Look into the vocabulary of a fast tokenizer of any kind (Unigram, BPE, byte-level BPE, WordPiece, WordLevel).

    Raises:
        ModelError: the tokenizer is slow.
    """
    backend = fast_backend(tokenizer)
    left_out = {*tokenizer.all_special_ids, *backend.get_added_tokens_decoder()}
    byte_level = _is_byte_level(backend)
    prefix = getattr(backend.model, "continuing_subword_prefix", None) or ""
    suffix = getattr(backend.model, "end_of_word_suffix", None) or ""
    vocabulary = backend.get_vocab(with_added_tokens=False)
    pieces = ((piece, i) for piece, i in vocabulary.items() if i not in left_out)
    if byte_level:
        decode = decoders.ByteLevel().decode
        return PieceInventory({i: _whole(decode([piece]).removeprefix(" ")) for piece, i in pieces})
    return PieceInventory({i: _text(piece, prefix, suffix) for piece, i in pieces})


def _is_byte_level(backend: Tokenizer) -> bool:
    parts = (part.__getstate__() for part in (backend.decoder, backend.pre_tokenizer) if part is not None)
    return any(b'"ByteLevel"' in state for state in parts)


def _whole(text: str) -> str | None:
    return None if "\ufffd" in text else text


def _text(piece: str, prefix: str, suffix: str) -> str | None:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return None  # byte fallback
    return piece.removeprefix(_WORD_START).removeprefix(prefix).removesuffix(suffix)
