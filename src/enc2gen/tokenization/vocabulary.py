"""Vocabularies cut down to the text in use, without changing how that text is split.

A 250,000-piece vocabulary is most of a small multilingual encoder. A corpus in a few languages uses a few
thousand pieces of it; the rest is memory and softmax time.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from enc2gen.errors import ModelError
from enc2gen.tokenization.tokenizer import adopt_backend, protect_special_tokens

_SUPPORTED = ("Unigram", "WordPiece")
_WORD_START = "▁"  # SentencePiece's space


@dataclass
class TrimmedVocabulary:
    """A smaller tokenizer and where its ids come from.

    Attributes:
        tokenizer: works, saves and loads like any fast tokenizer.
        kept_ids: new id i was old id `kept_ids[i]`: the rows of the embedding to keep, in order.
    """

    tokenizer: PreTrainedTokenizerFast
    kept_ids: list[int]


def trim_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    keep: Iterable[str] = (),
    max_size: int | None = None,
) -> TrimmedVocabulary:
    """Cut a Unigram or WordPiece vocabulary to what `texts` use.

    Kept, in this order of new ids: special and added tokens (language tokens too), then in old order every
    piece that `texts` are split into, `keep`, and every single-character piece of the scripts in `texts`, so
    that unseen text of those scripts can still be spelt. Each text is split into the same pieces as before.

    Args:
        tokenizer: the fast tokenizer to cut; left as it is, but no longer reads text as special tokens.
        texts: all text that must be split as before.
        keep: pieces to keep besides, for example "▁the".
        max_size: fill up to this size with the likeliest other pieces (Unigram: by score; WordPiece: by id,
            which mostly follows frequency) of the scripts seen. What must be kept is kept beyond it, too.
            No filling if None.

    Raises:
        ModelError: the tokenizer is slow, of another kind (BPE), or lacks a piece of `keep`.
    """
    backend = protect_special_tokens(tokenizer)
    state = json.loads(backend.to_str())
    kind = state["model"]["type"]
    if kind not in _SUPPORTED:
        raise ModelError(
            f"the vocabulary of a {kind} tokenizer cannot be trimmed",
            where=tokenizer.name_or_path or None,
            remedy=f"keep the whole vocabulary, or use an encoder with one of: {', '.join(_SUPPORTED)}",
        )
    pieces = _piece_list(state["model"])
    first = _first_ids(tokenizer, state, pieces)
    texts = list(texts)
    used, characters = _usage(backend, texts)
    chosen = used | _ids_of(keep, pieces, tokenizer) | _required(state["model"], pieces, backend, texts)
    scripts = {script for script in map(_script, characters) if script}
    chosen |= {i for i, piece in enumerate(pieces) if _is_spelling(piece, kind, characters, scripts)}
    chosen.difference_update(first)
    if max_size is not None:
        spare = max(0, max_size - len(first) - len(chosen))
        chosen |= set(_likeliest(state["model"], pieces, chosen.union(first), scripts)[:spare])
    kept_ids = [*first, *sorted(chosen)]
    trimmed = Tokenizer.from_str(json.dumps(_rewrite(state, pieces, kept_ids)))
    return TrimmedVocabulary(_wrap(tokenizer, trimmed), kept_ids)


def unknown_rate(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> float:
    """Share (0 to 1) of the texts' non-space characters that the tokenizer can only write as unknown.

    Raises:
        ModelError: the tokenizer is not a fast one.
    """
    backend = protect_special_tokens(tokenizer)
    texts = list(texts)
    unknown = total = 0
    for text, encoding in zip(texts, _encode(backend, texts, offsets=True), strict=True):
        total += _visible(text)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        unknown += sum(_visible(text[start:end]) for i, (start, end) in spans if i == tokenizer.unk_token_id)
    return unknown / total if total else 0.0


def _visible(text: str) -> int:
    return len("".join(text.split()))


def _encode(backend: Tokenizer, texts: list[str], *, offsets: bool = False) -> list[Any]:
    backend.no_truncation()
    backend.no_padding()
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    return encode(texts, add_special_tokens=False)


def _piece_list(model: Mapping[str, Any]) -> list[str]:
    """Pieces of the model (without tokens added later) in id order."""
    if model["type"] == "Unigram":
        return [piece for piece, _ in model["vocab"]]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if [model["vocab"][piece] for piece in pieces] != list(range(len(pieces))):
        raise ModelError("the ids of the vocabulary have gaps", remedy="keep the whole vocabulary")
    return pieces


def _first_ids(tokenizer: PreTrainedTokenizerBase, state: Mapping[str, Any], pieces: Sequence[str]) -> list[int]:
    """Old ids of special and added tokens and of the unknown piece, ascending."""
    model = state["model"]
    unknown = model["unk_id"] if model["type"] == "Unigram" else model["vocab"].get(model["unk_token"])
    found = {token["id"] for token in state["added_tokens"]} | set(tokenizer.all_special_ids)
    found |= set() if unknown is None else {unknown}
    if model.get("byte_fallback"):
        found |= {i for i, piece in enumerate(pieces) if len(piece) == 6 and piece.startswith("<0x")}
    return sorted(found)


def _usage(backend: Tokenizer, texts: list[str]) -> tuple[set[int], set[str]]:
    """Ids that the texts are split into, and the characters of the normalised texts."""
    used = {i for encoding in _encode(backend, texts) for i in encoding.ids}
    normaliser = backend.normalizer
    characters: set[str] = set()
    for text in texts:
        characters.update(normaliser.normalize_str(text) if normaliser else text)
    return used, characters


def _ids_of(keep: Iterable[str], pieces: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    wanted = set(keep)
    found = {piece: i for i, piece in enumerate(pieces) if piece in wanted}
    if missing := sorted(wanted - found.keys() - tokenizer.get_added_vocab().keys()):
        raise ModelError(
            f"the vocabulary has no piece {missing[0]!r} to keep ({len(missing)} missing)",
            remedy=f"pieces that begin a word are written with {_WORD_START!r} in Unigram vocabularies",
        )
    return set(found.values())


def _required(model: Mapping[str, Any], pieces: Sequence[str], backend: Tokenizer, texts: list[str]) -> set[int]:
    """Pieces that need not occur in the split texts but without which texts would be split otherwise."""
    if model["type"] == "Unigram":
        # The score of the unknown piece is derived from the lowest score in the vocabulary. The lone space
        # mark stands before unseen words.
        lowest = min(range(len(pieces)), key=lambda i: model["vocab"][i][1])
        return {lowest, *(i for i, piece in enumerate(pieces) if piece == _WORD_START)}
    # Longest-match splitting that ends in "unknown" took pieces on its way; without them it could succeed.
    vocabulary, prefix = model["vocab"], model["continuing_subword_prefix"]
    normaliser, splitter = backend.normalizer, backend.pre_tokenizer
    words: set[str] = set()
    for text, encoding in zip(texts, _encode(backend, texts), strict=True):
        if vocabulary.get(model["unk_token"]) in encoding.ids:
            text = normaliser.normalize_str(text) if normaliser else text
            words.update(word for word, _ in splitter.pre_tokenize_str(text)) if splitter else words.add(text)
    return {i for word in words for i in _longest_matches(word, vocabulary, prefix)}


def _longest_matches(word: str, vocabulary: Mapping[str, int], prefix: str) -> list[int]:
    """Ids that greedy longest-match splitting takes from the start of `word` until nothing matches."""
    found, start = [], 0
    while start < len(word):
        head = prefix if start else ""
        ends = (end for end in range(len(word), start, -1) if head + word[start:end] in vocabulary)
        if (end := next(ends, None)) is None:
            break
        found.append(vocabulary[head + word[start:end]])
        start = end
    return found


@cache
def _script(character: str) -> str:
    """First word of the Unicode name of a letter, mark or digit: "CYRILLIC", "TIBETAN", "CJK"."""
    if unicodedata.category(character)[0] not in "LMN":
        return ""
    return unicodedata.name(character, "").partition(" ")[0]


def _core(piece: str, kind: str) -> str:
    """`piece` without the mark of its place in the word."""
    return piece.removeprefix("##") if kind == "WordPiece" else piece.removeprefix(_WORD_START)


def _is_spelling(piece: str, kind: str, characters: set[str], scripts: set[str]) -> bool:
    core = _core(piece, kind) or piece
    return len(core) == 1 and (core in characters or _script(core) in scripts)


def _likeliest(model: Mapping[str, Any], pieces: Sequence[str], present: set[int], scripts: set[str]) -> list[int]:
    """Other pieces of the scripts seen, likeliest first."""
    kind = model["type"]
    absent = [i for i in range(len(pieces)) if i not in present]
    found = [i for i in absent if all(_script(c) in scripts for c in _core(pieces[i], kind))]
    return found if kind == "WordPiece" else sorted(found, key=lambda i: -model["vocab"][i][1])


def _rewrite(state: dict[str, Any], pieces: Sequence[str], kept_ids: Sequence[int]) -> dict[str, Any]:
    """The tokenizer's serialised form with only `kept_ids`, renumbered; everything else as it was."""
    new_id = {old: new for new, old in enumerate(kept_ids)}
    added = {token["id"]: token["content"] for token in state["added_tokens"]}
    model = state["model"]
    names = [pieces[i] if i < len(pieces) else added[i] for i in kept_ids]
    if model["type"] == "Unigram":
        scores = [model["vocab"][i][1] if i < len(pieces) else 0.0 for i in kept_ids]
        model["vocab"] = [list(entry) for entry in zip(names, scores, strict=True)]
        model["unk_id"] = None if model["unk_id"] is None else new_id[model["unk_id"]]
    else:
        model["vocab"] = {name: i for i, name in enumerate(names)}
    state["added_tokens"] = [{**token, "id": new_id[token["id"]]} for token in state["added_tokens"]]
    if state["post_processor"]:
        _renumber_processor(state["post_processor"], new_id)
    return {**state, "truncation": None, "padding": None}


def _renumber_processor(processor: dict[str, Any], new_id: Mapping[int, int]) -> None:
    """Renumber, in place, the ids that a post-processor inserts."""
    for part in processor.get("processors", ()):  # a Sequence
        _renumber_processor(part, new_id)
    for field in ("sep", "cls"):  # RobertaProcessing, BertProcessing: [token, id]
        if field in processor:
            processor[field][1] = new_id[processor[field][1]]
    for token in processor.get("special_tokens", {}).values():  # TemplateProcessing
        token["ids"] = [new_id[i] for i in token["ids"]]


def _wrap(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """`backend` with the roles and settings of `tokenizer`."""
    roles = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    named = set(roles.values())
    added = backend.get_added_tokens_decoder()
    extra = [token for _, token in sorted(added.items()) if token.special and token.content not in named]
    trimmed = adopt_backend(
        backend,
        special_tokens={**roles, "extra_special_tokens": extra},
        name_or_path=tokenizer.name_or_path,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        model_input_names=tokenizer.model_input_names,
    )
    protect_special_tokens(trimmed)  # language tokens are pieces of the model now
    return trimmed
