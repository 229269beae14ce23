"""One training run, from which extended tokenizers of every size can be built."""

from __future__ import annotations

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from enc2gen.errors import ModelError
from enc2gen.tokenization.coverage import LOSSY
from enc2gen.tokenization.exemption import altered_characters, exempt_characters
from enc2gen.tokenization.merging import Merge, MergeLearner
from enc2gen.tokenization.piece_training import UnigramTrainer, sample_texts, training_units
from enc2gen.tokenization.pieces import (
    BYTE_LEVEL,
    BYTE_PIECE,
    BYTE_PIECES,
    WORD_START,
    first_name,
    is_byte_level,
    merge_pairs,
    piece_list,
    require_kind,
    require_plain_merges,
    wrap_backend,
)
from enc2gen.tokenization.round_trip import LETTER_CONTROLS
from enc2gen.tokenization.tokenizer import protect_special_tokens

# w of the mixture of old and new scores, see `VocabularyGrowth`; our choice. With 4,000 pieces for Kazakh in
# XLM-R's vocabulary, Kazakh takes 1.75 tokens a word for w from 0.5 to 0.01 (1.78 for 0.0001; 1.98 before), while
# 11 % of Russian and 62 % of Kyrgyz sentences are split differently for 0.5, 3 % and 37 % for 0.01.
NEW_SHARE = 0.01
KEEP_CORPUS = "corpus"
"""Instead of characters to keep: all those of the texts."""
_RARE = 2  # with byte fallback, a character gets a piece from this count on; our choice
_SELECTORS = "VARIATION"  # first name of characters that are marks to Unicode but of no script
_NNBSP = "\u202f"  # a space to Unicode, part of the word in Mongolian
# All white space but NNBSP.
_OTHER_SPACES = r"[\t-\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{205f}\x{3000}]+"
_CONTINUATION = range(0x80, 0xC0)  # bytes of a UTF-8 character after its first


class VocabularyGrowth:
    """Learns pieces of new texts and builds tokenizers that have them.

    Unigram scores are log-probabilities p_old of the old training text. The extended model is the mixture
    (1 - w) p_old + w p_new, divided by (1 - w) and with old pieces at their old score: new pieces get
    log(w / (1 - w)) + log p_new. Old pieces therefore compete among themselves as they did, and text in
    which no new piece occurs is split exactly as before.

    Args:
        tokenizer: the fast tokenizer to extend; left as it is, but no longer reads text as special tokens.
        texts: text of the new languages.
        sizes: the sizes that :meth:`build` will be asked for.
        byte_fallback: spell characters without a piece as bytes.
        keep_characters: see :func:`~enc2gen.tokenization.extension.extend_vocabulary`.
        seed: of the sample of the texts that pieces are learnt from.
        max_piece_length: longest new piece in characters.

    Attributes:
        old_size: ids of the old tokenizer; new pieces follow them.
        exempted: characters that the normalizer rewrote and now leaves alone.
        still_altered: characters that were to be kept, but this kind of normalizer cannot leave them alone.

    Raises:
        ModelError: the tokenizer is slow or of another kind, or is to have bytes but cannot.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        sizes: Iterable[int],
        *,
        byte_fallback: bool = False,
        keep_characters: str = "",
        seed: int = 0,
        max_piece_length: int = 16,
    ) -> None:
        self._tokenizer = tokenizer
        state = json.loads(protect_special_tokens(tokenizer).to_str())
        self.kind: str = state["model"]["type"]
        require_kind(self.kind, "extended", tokenizer.name_or_path)
        self._byte_level = self.kind == "BPE" and is_byte_level(state)
        self._check(state["model"], byte_fallback)
        self._pieces = piece_list(state)
        self.old_size = len(self._pieces)
        self._known = set(self._pieces)
        self._control = {token["content"] for token in state["added_tokens"]}
        self._adds_bytes = byte_fallback and not self._byte_level and not state["model"].get("byte_fallback")
        self.exempted, self.still_altered = self._exempt(state, texts, keep_characters)
        named = set() if keep_characters == KEEP_CORPUS else set(keep_characters)
        self._named = sorted(character for character in named - set(self.still_altered) if _is_kept(character))
        self._state = {**state, "truncation": None, "padding": None}
        self._max_length = max_piece_length
        self._learn(texts, sorted(set(sizes)), seed)

    def _check(self, model: dict[str, Any], byte_fallback: bool) -> None:
        where = self._tokenizer.name_or_path or None
        if self.kind == "WordPiece" and byte_fallback:
            remedy = "leave byte fallback out (all characters of the texts get pieces), or use a Unigram or BPE one"
            raise ModelError("WordPiece tokenizers have no byte fallback", where=where, remedy=remedy)
        if self.kind == "BPE":
            require_plain_merges(model, where)

    def _exempt(self, state: dict[str, Any], texts: Sequence[str], keep_characters: str) -> tuple[list[str], list[str]]:
        """Free characters from the normalizer in `state`: those asked for, joiners and the like that the texts are
        spelt with, and scripts that the vocabulary mostly lacks. Returns the freed ones and those that cannot be."""
        seen: set[str] = set().union(*texts)
        wanted = seen if keep_characters == KEEP_CORPUS else set(keep_characters)
        wanted = {character for character in wanted if _is_kept(character)} | _letter_controls(texts)
        if not self._byte_level:
            letters = [c for c in seen if unicodedata.category(c)[0] in "LM"]
            totals = Counter(map(first_name, letters))
            missing = Counter(first_name(c) for c in letters if c not in self._known)
            new = {name for name, count in missing.items() if 2 * count > totals[name] and name != _SELECTORS}
            wanted |= {c for c in seen if first_name(c) in new}
        altered = altered_characters(state["normalizer"], wanted)
        drops = _NNBSP in wanted and not self._byte_level and _drops_nnbsp(state["pre_tokenizer"])
        state["normalizer"] = exempt_characters(state["normalizer"], altered)
        still = set(altered_characters(state["normalizer"], altered))
        if drops and _NNBSP not in still:
            state["pre_tokenizer"] = _without_nnbsp(state["pre_tokenizer"])
            still |= {_NNBSP} if _drops_nnbsp(state["pre_tokenizer"]) else set()
        altered = sorted({*altered, _NNBSP} if drops else altered)
        return [character for character in altered if character not in still], sorted(still)

    def _words(self, texts: Sequence[str]) -> Counter[str]:
        """Pre-tokens -> count."""
        bare = {**self._state, "model": _EMPTY_MODEL, "added_tokens": [], "post_processor": None}
        backend = Tokenizer.from_str(json.dumps(bare))
        normaliser, splitter = backend.normalizer, backend.pre_tokenizer
        words: Counter[str] = Counter()
        for text in texts:
            text = normaliser.normalize_str(text) if normaliser else text
            words.update([word for word, _ in splitter.pre_tokenize_str(text)] if splitter else [text])
        words.pop("", None)
        return words

    def _learn(self, texts: Sequence[str], sizes: list[int], seed: int) -> None:
        sample = sample_texts(texts, seed)
        words = self._words(sample)
        everything = words if len(sample) == len(texts) else self._words(texts)
        self._characters = self._missing_characters(everything)
        largest = sizes[-1] if sizes else 0
        if self.kind == "Unigram":
            units = training_units(words)
            present = set().union(*units)
            present.add(WORD_START)
            old = [p for p in self._pieces if p and p not in self._control and present.issuperset(p)]
            trainer = UnigramTrainer(units, old, self._characters, self._max_length, largest)
            self._unigrams = trainer.shrink(sizes)
        else:
            self._merges = self._learn_merges(words, largest)

    def _missing_characters(self, words: Counter[str]) -> list[str]:
        """Characters (in WordPiece also "##" + character) that must become pieces."""
        if self._byte_level:
            return []
        counts: Counter[str] = Counter()
        for word, count in words.items():
            for character in word:
                counts[character] += count
        falls_back = self._adds_bytes or self._state["model"].get("byte_fallback")
        frequent = {c for c, count in counts.items() if not falls_back or count >= _RARE}
        found = sorted(frequent.union(self._named))
        if self.kind == "WordPiece":
            prefix = self._state["model"]["continuing_subword_prefix"]
            # Punctuation and Chinese are words by themselves, never parts of one.
            inner = {c for word in words if len(word) > 1 for c in word}
            found = [form for c in found for form in (c, prefix + c) if form == c or c in inner or c not in counts]
        return [piece for piece in found if piece not in self._known and (piece == _NNBSP or not piece.isspace())]

    def _learn_merges(self, words: Counter[str], largest: int) -> list[Merge]:
        model = self._state["model"]
        units = words if self._byte_level or self.kind == "WordPiece" else training_units(words)
        with_characters = self._model_with(self._characters, [])
        bare = Tokenizer.from_str(json.dumps({**self._state, "model": with_characters, **_NO_STEPS}))
        names = sorted(units)
        segments: Counter[tuple[str, ...]] = Counter()
        for name, encoding in zip(names, bare.encode_batch(names, add_special_tokens=False), strict=True):
            segments[tuple(encoding.tokens)] += units[name]
        unknown = {model["unk_token"]} if model["unk_token"] else set()
        known = {*self._known, *self._characters}
        common: dict[str, Any] = {"known": known, "max_length": self._max_length}
        barred = {*unknown, *(piece for piece in known if BYTE_PIECE.fullmatch(piece))}
        if self.kind == "WordPiece":
            prefix: str = model["continuing_subword_prefix"]
            learner = MergeLearner(
                segments,
                ranks={},
                barred=barred,
                join=lambda left, right: left + right.removeprefix(prefix),
                length=lambda piece: len(piece.removeprefix(prefix)),
                duplicates=False,
                **common,
            )
        else:
            ranks = {pair: rank for rank, pair in enumerate(merge_pairs(model))}
            forbidden = {*self._control, *BYTE_PIECES, *unknown}
            length = _byte_level_length if self._byte_level else len
            learner = MergeLearner(segments, ranks=ranks, barred=barred, forbidden=forbidden, length=length, **common)
        return learner.learn(largest - len(self._characters))

    def new_pieces(self, size: int) -> list[str]:
        """New pieces of the extension by `size`, in id order: bytes, characters, then the learnt ones."""
        added = [piece for piece in BYTE_PIECES if piece not in self._known] if self._adds_bytes else []
        if self.kind == "Unigram":
            learnt = self._unigrams[size]
            order = sorted(learnt, key=lambda piece: (len(piece) > 1, -learnt[piece], piece))
            return added + order
        merges = self._merges_for(size)
        return added + self._characters + [merge.joined for merge in merges if merge.is_new]

    def _merges_for(self, size: int) -> list[Merge]:
        room, kept = size - len(self._characters), []
        for merge in self._merges:
            if merge.is_new and room <= 0:
                break
            room -= merge.is_new
            kept.append(merge)
        return kept if size > len(self._characters) else []

    def build(self, size: int) -> PreTrainedTokenizerFast:
        """The tokenizer with `size` new pieces (all missing characters at least; bytes come besides)."""
        new = self.new_pieces(size)
        state = dict(self._state)
        merges = [] if self.kind == "Unigram" else self._merges_for(size)
        scores = self._unigrams[size] if self.kind == "Unigram" else {}
        state["model"] = self._model_with(new, merges, scores)
        backend = Tokenizer.from_str(json.dumps(state))
        if self._adds_bytes:
            _decode_bytes(backend, self.kind)
        return wrap_backend(self._tokenizer, backend)

    def _model_with(
        self, new: Sequence[str], merges: Sequence[Merge], scores: dict[str, float] | None = None
    ) -> dict[str, Any]:
        """The serialised model with added tokens and `new` pieces at the ids after the old ones."""
        model = dict(self._state["model"])
        names = [piece or f"<unused-{i}>" for i, piece in enumerate(self._pieces)]  # ids without gaps
        if self.kind == "Unigram":
            scores = scores or {}
            lowest = min(score for _, score in model["vocab"])
            shift = math.log(NEW_SHARE / (1 - NEW_SHARE))
            vocab = [list(entry) for entry in model["vocab"]]
            vocab += [[name, lowest] for name in names[len(vocab) :]]
            # Below the lowest score, the unknown piece would be cheaper than before.
            vocab += [[p, max(lowest, scores[p] + shift) if p in scores else lowest] for p in new]
            model["vocab"] = vocab
        else:
            model["vocab"] = {name: i for i, name in enumerate([*names, *new])}
        if self.kind == "BPE":
            pairs = [*merge_pairs(model), *((merge.left, merge.right) for merge in merges)]
            model["merges"] = [list(pair) for pair in pairs]
        if self._adds_bytes:
            model["byte_fallback"] = True
        return model


_EMPTY_MODEL = json.loads(Tokenizer(BPE()).to_str())["model"]
_NO_STEPS: dict[str, Any] = {
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "added_tokens": [],
}


def _is_kept(character: str) -> bool:
    """Whether a character can be kept at all: spaces part words, and controls serve character maps as tools."""
    return character == _NNBSP or not (character.isspace() or unicodedata.category(character) == "Cc")


def _drops_nnbsp(splitter: dict[str, Any] | None) -> bool:
    """Whether the (serialised) pre-tokenizer drops the narrow no-break space."""
    if splitter is None:
        return False
    bare = {**json.loads(Tokenizer(BPE()).to_str()), "pre_tokenizer": splitter}
    step = Tokenizer.from_str(json.dumps(bare)).pre_tokenizer
    return _NNBSP not in "".join(word for word, _ in step.pre_tokenize_str(f"a{_NNBSP}a"))


def _without_nnbsp(splitter: dict[str, Any]) -> dict[str, Any]:
    """The serialised pre-tokenizer; if it splits at white space, no longer at narrow no-break spaces."""
    if splitter["type"] == "Sequence":
        return {**splitter, "pretokenizers": [_without_nnbsp(step) for step in splitter["pretokenizers"]]}
    if splitter["type"] != "WhitespaceSplit":
        return splitter
    pattern = {"Regex": _OTHER_SPACES}
    return {"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": False}


def _letter_controls(texts: Sequence[str]) -> set[str]:
    """Joiners, selectors and the like in so many texts that their loss is more than an accident (`LOSSY`)."""
    counts = Counter(character for text in texts for character in set(LETTER_CONTROLS.findall(text)))
    return {character for character, count in counts.items() if count >= LOSSY * len(texts)}


def _byte_level_length(piece: str) -> int:
    return sum(BYTE_LEVEL.get(character, 0) not in _CONTINUATION for character in piece)


def _decode_bytes(backend: Tokenizer, kind: str) -> None:
    """Make `backend` write byte pieces as bytes, and read text that spells one as plain text."""
    present = backend.decoder
    steps = [decoders.Fuse()] if present is None else [present]
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), *steps])
    if kind == "Unigram":  # merges never make a byte piece, but Unigram models look all pieces up
        guard = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous")
        splitter = backend.pre_tokenizer
        backend.pre_tokenizer = guard if splitter is None else pre_tokenizers.Sequence([splitter, guard])
