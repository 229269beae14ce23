"""What a fast tokenizer's serialised form says about its pieces, and tokenizers made from changed forms."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from enc2gen.errors import ModelError
from enc2gen.tokenization.tokenizer import adopt_backend, protect_special_tokens

WORD_START = "▁"  # SentencePiece's space
KINDS = ("Unigram", "BPE", "WordPiece")
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def first_name(character: str) -> str:
    """First word of the Unicode name: "CYRILLIC", "TIBETAN", "CJK", "DIGIT"; "" if unnamed."""
    return unicodedata.name(character, "").partition(" ")[0]


@cache
def script(character: str) -> str:
    """Script of a letter, mark or digit, by the first word of its name; "" for other characters."""
    return first_name(character) if unicodedata.category(character)[0] in "LMN" else ""


def require_kind(kind: str, action: str, name: str | None) -> None:
    """Raise `ModelError` unless vocabularies of this model kind can be changed."""
    if kind not in KINDS:
        raise ModelError(
            f"the vocabulary of a {kind} tokenizer cannot be {action}",
            where=name or None,
            remedy=f"keep its vocabulary, or use an encoder whose tokenizer is one of: {', '.join(KINDS)}",
        )


def piece_list(state: Mapping[str, Any]) -> list[str]:
    """Pieces and added tokens in id order; an id that nothing has is "" (byte-pair vocabularies have gaps)."""
    model = state["model"]
    if model["type"] == "Unigram":
        names = {i: piece for i, (piece, _) in enumerate(model["vocab"])}
    else:
        names = {i: piece for piece, i in model["vocab"].items()}
    names |= {token["id"]: token["content"] for token in state["added_tokens"]}
    return [names.get(i, "") for i in range(max(names, default=-1) + 1)]


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges of a byte-pair model, however they are written ("a b" or ["a", "b"])."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return [(left, right) for left, right in pairs]


def require_plain_merges(model: Mapping[str, Any], name: str | None) -> None:
    """Raise `ModelError` for byte-pair models that mark word ends or parts ("low</w>"), as those of CLIP do."""
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise ModelError(
            "a BPE vocabulary with marks on word parts cannot be changed",
            where=name,
            remedy="keep its vocabulary, or use an encoder with byte-level or SentencePiece BPE",
        )


def is_byte_level(state: Mapping[str, Any]) -> bool:
    """Whether the pre-tokenizer or normalizer writes text as bytes (GPT-2, RoBERTa, Llama 3)."""
    steps = [state["pre_tokenizer"] or {}, state["normalizer"] or {}]
    while steps:
        step = steps.pop()
        if step.get("type") == "ByteLevel":
            return True
        steps += [*step.get("pretokenizers", ()), *step.get("normalizers", ())]
    return False


def _byte_alphabet() -> dict[str, int]:
    """Character of the byte-level alphabet -> byte: printable Latin-1 stands for itself, the rest follows 255."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


BYTE_LEVEL = _byte_alphabet()


def byte_level_text(piece: str) -> str:
    """Text of a byte-level piece; "" if it is no whole characters."""
    try:
        return bytes(BYTE_LEVEL[character] for character in piece).decode()
    except (KeyError, UnicodeDecodeError):
        return ""


def wrap_backend(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """`backend` with the roles and settings of `tokenizer`."""
    roles = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    named = set(roles.values())
    added = backend.get_added_tokens_decoder()
    extra = [token for _, token in sorted(added.items()) if token.special and token.content not in named]
    wrapped = adopt_backend(
        backend,
        special_tokens={**roles, "extra_special_tokens": extra},
        name_or_path=tokenizer.name_or_path,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        model_input_names=tokenizer.model_input_names,
    )
    protect_special_tokens(wrapped)  # language tokens are pieces of the model now
    return wrapped
