"""Vocabularies cut down to the text in use, without changing how that text is split.

A 250,000-piece vocabulary is most of a small multilingual encoder. A corpus in a few languages uses a few
thousand pieces of it; the rest is memory and softmax time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from enc2gen.errors import ModelError
from enc2gen.tokenization.merging import MergeParts
from enc2gen.tokenization.pieces import (
    BYTE_LEVEL,
    BYTE_PIECE,
    WORD_START,
    byte_level_text,
    is_byte_level,
    merge_pairs,
    piece_list,
    require_kind,
    require_plain_merges,
    script,
    wrap_backend,
)
from enc2gen.tokenization.tokenizer import encode_whole, protect_special_tokens
from enc2gen.tokenization.unknown import UnknownText


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
    """Cut a Unigram, BPE or WordPiece vocabulary to what `texts` use.

    Kept, in this order of new ids: special and added tokens (language tokens too), then in old order every
    piece that `texts` are split into, `keep`, and every single-character piece of the scripts in `texts`, so
    that unseen text of those scripts can still be spelt. Of BPE vocabularies also every piece that these are
    merged from, and in byte-level ones every byte. Each text is split into the same pieces as before. Added tokens
    that are read at some places of a text only (whole words, say) come last: they must be no pieces of the model.

    Args:
        tokenizer: the fast tokenizer to cut; left as it is, but no longer reads text as special tokens.
        texts: all text that must be split as before.
        keep: pieces to keep besides, for example "▁the".
        max_size: fill up to this size with the likeliest other pieces (Unigram: by score; others: by id,
            which mostly follows frequency) of the scripts seen. What must be kept is kept beyond it, too.
            No filling if None.

    Raises:
        ModelError: the tokenizer is slow, of another kind, or lacks a piece of `keep`.
    """
    backend = protect_special_tokens(tokenizer)
    state = json.loads(backend.to_str())
    kind = state["model"]["type"]
    require_kind(kind, "trimmed", tokenizer.name_or_path)
    if kind == "BPE":
        require_plain_merges(state["model"], tokenizer.name_or_path or None)
    pieces = piece_list(state)
    first = _first_ids(tokenizer, state)
    texts = list(texts)
    used, characters = _usage(backend, texts)
    chosen = used | _ids_of(keep, pieces, tokenizer) | _required(state, pieces, backend, texts)
    scripts = {name for name in map(script, characters) if name}
    cores = _cores(state, pieces)
    chosen |= {i for i, core in enumerate(cores) if len(core) == 1 and (core in characters or script(core) in scripts)}
    chosen = _with_parts(chosen, state["model"], pieces).difference(first)
    if max_size is not None:
        room = max_size - len(first)
        _fill(chosen, room, _likeliest(state["model"], cores, chosen.union(first), scripts), state["model"], pieces)
    last = _outer_ids(state, backend)
    kept_ids = [*(i for i in first if i not in last), *sorted(chosen), *last]
    trimmed = Tokenizer.from_str(json.dumps(_rewrite(state, pieces, kept_ids, len(last))))
    return TrimmedVocabulary(wrap_backend(tokenizer, trimmed), kept_ids)


def unknown_rate(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> float:
    """Share (0 to 1) of the texts' non-space characters that the tokenizer can only write as unknown, or drops.

    Raises:
        ModelError: the tokenizer is not a fast one, or has no unknown token where it needs one.
        DataError: a text has lone surrogates.
    """
    backend = protect_special_tokens(tokenizer)
    texts, finder = list(texts), UnknownText(tokenizer)
    unknown = total = 0
    for text, encoding in zip(texts, encode_whole(backend, texts, offsets=True), strict=True):
        total += _visible(text)
        unknown += sum(map(_visible, finder.stretches(text, encoding)))
    return unknown / total if total else 0.0


def _visible(text: str) -> int:
    return len("".join(text.split()))


def _first_ids(tokenizer: PreTrainedTokenizerBase, state: Mapping[str, Any]) -> list[int]:
    """Old ids of special and added tokens, of the unknown piece and of what the post-processor inserts, ascending."""
    model = state["model"]
    unknown = model["unk_id"] if model["type"] == "Unigram" else model["vocab"].get(model["unk_token"])
    found = {token["id"] for token in state["added_tokens"]} | set(tokenizer.all_special_ids)
    found |= set() if unknown is None else {unknown}
    return sorted(found | _inserted_ids(state["post_processor"] or {}))


def _inserted_ids(processor: Mapping[str, Any]) -> set[int]:
    """Ids that a post-processor inserts, whether or not they are registered as special tokens."""
    found = {processor[field][1] for field in ("sep", "cls") if field in processor}
    found.update(*(token["ids"] for token in processor.get("special_tokens", {}).values()))
    return found.union(*map(_inserted_ids, processor.get("processors", ())))


def _outer_ids(state: Mapping[str, Any], backend: Tokenizer) -> list[int]:
    """Ids, ascending, of added tokens that are no pieces and must not become any.

    Unigram and WordPiece models look for all their pieces everywhere. An added token that is read only as a whole
    word, before normalisation or at the start of a text would as a piece be found at the other places, too.
    """
    model = state["model"]
    if model["type"] == "BPE":  # no merge makes them
        return []
    known = {piece for piece, _ in model["vocab"]} if model["type"] == "Unigram" else model["vocab"].keys()
    normaliser = backend.normalizer
    found = []
    for token in state["added_tokens"]:
        text = token["content"]
        written = normaliser.normalize_str(text) if normaliser else text
        everywhere = token["normalized"] and not token["single_word"] and (written == text or text not in written)
        if not (token["special"] or everywhere or text in known):
            found.append(token["id"])
    return sorted(found)


def _usage(backend: Tokenizer, texts: list[str]) -> tuple[set[int], set[str]]:
    """Ids that the texts are split into, and the characters of the normalised texts."""
    used = {i for encoding in encode_whole(backend, texts) for i in encoding.ids}
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
            remedy=f"pieces that begin a word are written with {WORD_START!r} in Unigram vocabularies",
        )
    return set(found.values())


def _required(state: Mapping[str, Any], pieces: Sequence[str], backend: Tokenizer, texts: list[str]) -> set[int]:
    """Pieces that need not occur in the split texts but without which texts would be split otherwise."""
    model = state["model"]
    if model["type"] == "WordPiece":
        return _failed_matches(model, backend, texts)
    # Nothing is unknown to bytes.
    falls_back, byte_level = model.get("byte_fallback"), model["type"] == "BPE" and is_byte_level(state)
    found = {i for i, piece in enumerate(pieces) if falls_back and BYTE_PIECE.fullmatch(piece)}
    found |= {i for i, piece in enumerate(pieces) if byte_level and piece in BYTE_LEVEL}
    if model["type"] == "Unigram":
        # The score of the unknown piece is derived from the lowest score in the vocabulary. The lone space
        # mark stands before unseen words.
        found.add(min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1]))
        found.update(i for i, piece in enumerate(pieces) if piece == WORD_START)
    return found


def _failed_matches(model: Mapping[str, Any], backend: Tokenizer, texts: list[str]) -> set[int]:
    """Pieces that words came through before they ended in "unknown".

    Longest-match splitting took them on its way; without them it could succeed.
    """
    vocabulary, prefix = model["vocab"], model["continuing_subword_prefix"]
    normaliser, splitter = backend.normalizer, backend.pre_tokenizer
    words: set[str] = set()
    for text, encoding in zip(texts, encode_whole(backend, texts), strict=True):
        if vocabulary.get(model["unk_token"]) in encoding.ids:
            text = normaliser.normalize_str(text) if normaliser else text
            words.update(word for word, _ in splitter.pre_tokenize_str(text)) if splitter else words.add(text)
    # Longer words are unknown without any match.
    words = {word for word in words if len(word) <= model["max_input_chars_per_word"]}
    longest = max(map(len, vocabulary), default=0)
    return {i for word in words for i in _longest_matches(word, vocabulary, prefix, longest)}


def _longest_matches(word: str, vocabulary: Mapping[str, int], prefix: str, longest: int) -> list[int]:
    """Ids that greedy longest-match splitting takes from the start of `word` until nothing matches.

    No piece has more than `longest` characters.
    """
    found, start = [], 0
    while start < len(word):
        head = prefix if start else ""
        ends = (
            end for end in range(min(len(word), start + longest), start, -1) if head + word[start:end] in vocabulary
        )
        if (end := next(ends, None)) is None:
            break
        found.append(vocabulary[head + word[start:end]])
        start = end
    return found


def _cores(state: Mapping[str, Any], pieces: Sequence[str]) -> list[str]:
    """Text of each piece without the mark of its place in the word; "" if it is not whole characters."""
    kind = state["model"]["type"]
    if kind == "WordPiece":
        prefix = state["model"]["continuing_subword_prefix"]
        return [piece.removeprefix(prefix) or piece for piece in pieces]
    if kind == "BPE" and is_byte_level(state):
        texts = [byte_level_text(piece) for piece in pieces]
        return [text.removeprefix(" ") or text for text in texts]
    return [piece.removeprefix(WORD_START) or piece for piece in pieces]


def _with_parts(chosen: set[int], model: Mapping[str, Any], pieces: Sequence[str]) -> set[int]:
    """`chosen` and, for BPE, the pieces that they are merged from."""
    if model["type"] != "BPE":
        return chosen
    parts = MergeParts(model["vocab"], merge_pairs(model))
    return chosen.union(*(parts.of(pieces[i]) for i in chosen))


def _fill(chosen: set[int], room: int, more: Iterable[int], model: Mapping[str, Any], pieces: Sequence[str]) -> None:
    """Add pieces of `more`, with what they are merged from, to `chosen` until it has `room` ids."""
    parts = MergeParts(model["vocab"], merge_pairs(model)) if model["type"] == "BPE" else None
    for i in more:
        if len(chosen) >= room:
            break
        needed = {i} if parts is None else parts.of(pieces[i]) - chosen
        if len(chosen) + len(needed) <= room:
            chosen |= needed


def _likeliest(model: Mapping[str, Any], cores: Sequence[str], present: set[int], scripts: set[str]) -> list[int]:
    """Other pieces of the scripts seen, likeliest first."""
    absent = [i for i in range(len(cores)) if i not in present]
    found = [i for i in absent if cores[i] and all(script(c) in scripts for c in cores[i])]
    return sorted(found, key=lambda i: -model["vocab"][i][1]) if model["type"] == "Unigram" else found


def _rewrite(state: dict[str, Any], pieces: Sequence[str], kept_ids: Sequence[int], outer: int) -> dict[str, Any]:
    """The tokenizer's serialised form with only `kept_ids`, renumbered; everything else as it was.

    The last `outer` ids are added tokens that are no pieces of the model.
    """
    new_id = {old: new for new, old in enumerate(kept_ids)}
    model = state["model"]
    inner = kept_ids[: len(kept_ids) - outer]
    names = [pieces[i] for i in inner]
    if model["type"] == "Unigram":
        scores = [model["vocab"][i][1] if i < len(model["vocab"]) else 0.0 for i in inner]
        model["vocab"] = [list(entry) for entry in zip(names, scores, strict=True)]
        model["unk_id"] = None if model["unk_id"] is None else new_id[model["unk_id"]]
    else:
        model["vocab"] = {name: i for i, name in enumerate(names)}
    if model["type"] == "BPE":
        # Also merges that no text needs: unseen text is then split more nearly as before.
        merges = merge_pairs(model)
        model["merges"] = [list(m) for m in merges if {*m, "".join(m)} <= model["vocab"].keys()]
    added = [{**token, "id": new_id[token["id"]]} for token in state["added_tokens"]]
    state["added_tokens"] = sorted(added, key=lambda token: token["id"])  # those beyond the model are counted on
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
