"""Learning new pieces from text: pruning for Unigram vocabularies, merging for BPE and WordPiece.

Both learn on top of the old vocabulary, so that a new piece is one that the old pieces make expensive. One run
gives every size: a Unigram vocabulary is pruned through the sizes, merges are a list that can be cut anywhere.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from enc2gen.tokenization.pieces import WORD_START, first_name

_TRAINING_CHARACTERS = 2_000_000  # larger texts are sampled; our choice, for training in seconds
_SYLLABLE_ENDS = "\u0f0b\u0f0c"  # tsheg: ends a syllable, not a word
_SEEDS_PER_PIECE = 8  # candidates at the start per piece in the end, our choice
_MOST_SEEDS = 40_000  # but no more than this, or twice the pieces: each costs time in every round
_SHRINK = 0.75  # share of candidates that survive a round, as in SentencePiece's trainer
_UNKNOWN = -30.0  # log-probability of a character without a piece, our choice
_UNSEEN = 0.5  # count of a piece that the best split never takes, our choice


def sample_texts(texts: Sequence[str], seed: int, limit: int = _TRAINING_CHARACTERS) -> list[str]:
    """All texts, or a random choice of about `limit` characters, in the order given."""
    if sum(map(len, texts)) <= limit:
        return list(texts)
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    chosen, total = [], 0
    for i in order:
        if total >= limit:
            break
        chosen.append(i)
        total += len(texts[i])
    return [texts[i] for i in sorted(chosen)]


def training_units(words: Mapping[str, int]) -> Counter[str]:
    """Cut pre-tokens (text -> count) into runs of letters of one script, and single other characters.

    Pieces lie within such a run, as in SentencePiece. A space mark belongs to what follows it; marks, joiners
    and the Tibetan tsheg belong to the run, so pieces of several syllables can be learnt.
    """
    runs: dict[str, list[str]] = {}
    shared = [WORD_START]
    characters = sorted({c for word in words for c in word})
    loose = {c: unicodedata.category(c) in ("Mn", "Cf", "Me") for c in characters}
    # Letters first: whether a mark is of a script of its own depends on them.
    for character in sorted(characters, key=loose.__getitem__):
        if character in _SYLLABLE_ENDS:
            runs.setdefault("TIBETAN", []).append(character)
        elif loose[character] and first_name(character) not in runs:
            shared.append(character)
        elif loose[character] or unicodedata.category(character)[0] in "LM":
            runs.setdefault(first_name(character), []).append(character)
    marks = "".join(sorted(map(re.escape, shared[1:])))
    kinds = [f"[{''.join(sorted(map(re.escape, found)))}{marks}]+" for _, found in sorted(runs.items())]
    pattern = re.compile("|".join(rf"{WORD_START}?{kind}" for kind in kinds) + f"|{WORD_START}?.", re.DOTALL)
    if not kinds:
        pattern = re.compile(f"{WORD_START}?.", re.DOTALL)
    units: Counter[str] = Counter()
    for word, count in words.items():
        for unit in pattern.findall(word):
            units[unit] += count
    return units


def seed_pieces(units: Mapping[str, int], max_length: int) -> Counter[str]:
    """Substrings of the units (text -> count), of 2 to `max_length` characters, that occur twice or more.

    Where syllables are marked (tsheg), a substring lies within a syllable or spans whole ones.
    """
    atoms: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for unit, count in units.items():
        parts = re.findall(f"[^{_SYLLABLE_ENDS}]*[{_SYLLABLE_ENDS}]+|[^{_SYLLABLE_ENDS}]+", unit)
        for start, part in enumerate(parts):
            atoms[part] += count
            joined = part
            for following in parts[start + 1 :]:
                joined += following
                if len(joined) > max_length:
                    break
                found[joined] += count
    active = [(atom, count, list(range(len(atom) - 1))) for atom, count in sorted(atoms.items())]
    for length in range(2, max_length + 1):
        level: Counter[str] = Counter()
        for atom, count, starts in active:
            for start in starts:
                level[atom[start : start + length]] += count
        level = Counter({piece: count for piece, count in level.items() if count > 1})
        found.update(level)
        # What a rarer substring starts is as rare.
        active = [
            (atom, count, [i for i in starts if i + length < len(atom) and atom[i : i + length] in level])
            for atom, count, starts in active
        ]
        active = [entry for entry in active if entry[2]]
    return Counter({p: n for p, n in found.items() if n > 1 and unicodedata.category(p[0])[0] != "M"})


class UnigramTrainer:
    """Chooses new pieces for a Unigram vocabulary (Kudo 2018, arXiv 1804.10959, section 3.2) on top of old ones.

    Candidates compete with the old pieces. A round splits the text into its likeliest pieces, sets p(x) to
    the share of x among them, and drops the candidates whose loss is least: count(x) times
    (log p(x) - log p of the likeliest split of x into others). Counts are of best splits, not expected ones.

    Args:
        units: training text -> count, from :func:`training_units`.
        old: the old pieces that can occur in it.
        required: characters that must become pieces, not among `old`.
        max_length: longest new piece in characters.
        largest: new pieces wanted at most, `required` included.
    """

    def __init__(
        self, units: Mapping[str, int], old: Iterable[str], required: Iterable[str], max_length: int, largest: int
    ) -> None:
        self._units = sorted(units)
        self._counts = np.array([units[unit] for unit in self._units], dtype=np.float64)
        self._fixed = [*dict.fromkeys([*old, *sorted(required)])]
        self._required = sorted(required)
        seeds = seed_pieces(units, max_length)
        known = set(self._fixed)
        fresh = [piece for piece in seeds if piece not in known]
        fresh.sort(key=lambda piece: (-seeds[piece] * len(piece), piece))
        wanted = max(0, largest - len(self._required))
        self._candidates = fresh[: max(2 * wanted, min(_SEEDS_PER_PIECE * wanted, _MOST_SEEDS))]
        letters = Counter[str]()
        for unit, count in units.items():
            for character in unit:
                letters[character] += count
        start = {piece: float(seeds[piece] or letters[piece] or _UNSEEN) for piece in self._pieces()}
        self._scores = _log_shares(start)

    def _pieces(self) -> list[str]:
        return [*self._fixed, *self._candidates]

    def shrink(self, sizes: Iterable[int]) -> dict[int, dict[str, float]]:
        """New pieces and their log-probabilities in the new text, for each of `sizes`.

        A size below the number of required characters gives these; one beyond the candidates gives all.
        """
        found = {}
        self._estimate()
        for size in sorted(set(sizes), reverse=True):
            wanted = max(0, size - len(self._required))
            while len(self._candidates) > wanted:
                counts = self._estimate()
                self._prune(counts, max(wanted, int(_SHRINK * len(self._candidates))))
            self._estimate()
            new = [*self._required, *self._candidates]
            found[size] = {piece: self._scores[piece] for piece in new}
        return found

    def _estimate(self) -> dict[str, float]:
        """Count the pieces of the best splits and set their log-probabilities; return the counts."""
        pieces = self._pieces()
        model = Unigram([("<unk>", 0.0), *((piece, self._scores[piece]) for piece in pieces)], unk_id=0)
        encodings = Tokenizer(model).encode_batch_fast(self._units, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        weights = np.repeat(self._counts, [len(found) for found in ids])
        flat = np.fromiter((i for found in ids for i in found), dtype=np.int64, count=len(weights))
        totals = np.bincount(flat, weights=weights, minlength=len(pieces) + 1)[1:]
        counts = dict(zip(pieces, totals.tolist(), strict=True))
        self._scores = _log_shares({piece: count or _UNSEEN for piece, count in counts.items()})
        return counts

    def _prune(self, counts: Mapping[str, float], target: int) -> None:
        def loss(piece: str) -> float:
            return counts[piece] * (self._scores[piece] - self._best_split(piece)) if counts[piece] else 0.0

        losses = {piece: loss(piece) for piece in self._candidates}
        kept = set(sorted(self._candidates, key=lambda x: (-losses[x], x))[:target])
        self._candidates = [piece for piece in self._candidates if piece in kept]

    def _best_split(self, piece: str) -> float:
        """Log-probability of the likeliest split of `piece` into other pieces."""
        scores = self._scores
        best = [0.0] + [-math.inf] * len(piece)
        for end in range(1, len(piece) + 1):
            for start in range(1 if end == len(piece) else 0, end):
                score = scores.get(piece[start:end], _UNKNOWN if end == start + 1 else -math.inf)
                if best[start] + score > best[end]:
                    best[end] = best[start] + score
        return best[-1]


def _log_shares(counts: Mapping[str, float]) -> dict[str, float]:
    total = math.log(sum(counts.values())) if counts else 0.0
    return {piece: math.log(count) - total for piece, count in counts.items()}
