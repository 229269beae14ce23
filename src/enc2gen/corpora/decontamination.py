"""Which lines are in an evaluation set: a model that was trained on them would be measured on what it has seen.

A line is contaminated if it equals an evaluation text but for case, punctuation and spaces, or if the two share half
of the character n-grams of the shorter one: a test sentence inside a paragraph, a sentence of a test paragraph, a
slightly edited copy. GPT-3 counts any common 13-gram of words (arXiv 2005.14165, appendix C); words need spaces, which
Tibetan and Chinese lack, and one common phrase is no leak, so the n-grams here are of characters and a share decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enc2gen.corpora.deduplication import duplicate_form, form_key, is_han, text_key
from enc2gen.corpora.readers import read_records
from enc2gen.errors import DataError

__all__ = ["EvaluationIndex"]

NGRAM_LENGTH = 20
NGRAM_LENGTH_HAN = 10
"""Characters of an n-gram, about three words or six Tibetan syllables; and of mostly Chinese text (our choice)."""
MIN_SHARE = 0.5
"""Share of the shorter text's n-grams that the longer one must hold (our choice)."""
MIN_NGRAMS = 10
"""Shorter texts are only compared as wholes: their few n-grams may be common phrases (our choice)."""
MIN_CHARACTERS = 12
MIN_CHARACTERS_HAN = 6
"""Shorter evaluation texts are left out: labels, names, language codes (our choice)."""
_BATCH_CHARACTERS = 2_000_000  # our choice: hashed at once, at about 40 bytes a character
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd; polynomial hash modulo 2^64
_MIX = np.uint64(0xBF58476D1CE4E5B9)  # SplitMix64


@dataclass(frozen=True)
class EvaluationIndex:
    """Digests of evaluation texts; small enough to be sent to every worker (16 bytes per character of them).

    Attributes:
        keys: :func:`text_key` of every text.
        hashes: hashes of all n-grams, ascending, `[entries]`.
        owners: the text that each n-gram is from, `[entries]`.
        sizes: number of different n-grams of each text, `[texts]`.
    """

    keys: frozenset[bytes]
    hashes: npt.NDArray[np.uint64]
    owners: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    @classmethod
    def from_files(cls, paths: Sequence[str | Path], fields: Sequence[str] | None = None) -> EvaluationIndex:
        """Read evaluation sets: files, folders or anything else that :func:`read_records` takes.

        Args:
            paths: where the sets are.
            fields: the fields that hold text; None for all of them, lists of texts included.

        Raises:
            DataError: a set cannot be read, lacks a field, or holds no text of at least 12 (Chinese: 6) characters.
        """
        texts: list[str] = []
        for path in paths:
            found = [text for record in read_records(path, columns=fields) for text in _texts(record.values())]
            kept = [text for text in found if _long_enough(text)]
            if not kept:
                raise DataError(
                    f"the evaluation set holds no text of at least {MIN_CHARACTERS} characters",
                    where=str(path),
                    remedy="check that it is the file you meant",
                )
            texts += kept
        return cls.from_texts(texts)

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> EvaluationIndex:
        """Index the texts, each once."""
        unique = {text_key(text): duplicate_form(text) for text in texts}
        hashes, owners = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.int64)]
        for first, found, lines in _ngrams(list(unique.values())):
            pairs = np.unique(np.stack([lines.astype(np.uint64), found]), axis=1)  # each n-gram once per text
            hashes.append(pairs[1])
            owners.append(pairs[0].astype(np.int64) + first)
        all_hashes, all_owners = np.concatenate(hashes), np.concatenate(owners)
        order = np.argsort(all_hashes, kind="stable")
        sizes = np.bincount(all_owners, minlength=len(unique))
        return cls(frozenset(unique), all_hashes[order], all_owners[order], sizes)

    def contaminated(self, texts: Sequence[str]) -> list[bool]:
        """Return for each text whether it is in an evaluation set."""
        return self.contaminated_forms([duplicate_form(text) for text in texts])

    def contaminated_forms(self, forms: Sequence[str]) -> list[bool]:
        """Return the same for the texts with these :func:`duplicate_form`."""
        result = np.array([form_key(form) in self.keys for form in forms], dtype=bool)
        suspects: list[int] = []
        for first, hashes, lines in _ngrams(forms):
            suspects += (first + np.unique(lines[self._known(hashes)])).tolist()
        for line in suspects:
            result[line] |= self._overlaps(forms[line])
        return result.tolist()

    def _known(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        if not len(self.hashes):
            return np.zeros(len(hashes), dtype=bool)
        place = np.searchsorted(self.hashes, hashes)
        return self.hashes[np.minimum(place, len(self.hashes) - 1)] == hashes

    def _overlaps(self, form: str) -> bool:
        """Whether the form and one evaluation text share half of the n-grams of the shorter one."""
        hashes = np.unique(next(_ngrams([form]))[1])
        start = np.searchsorted(self.hashes, hashes, side="left")
        end = np.searchsorted(self.hashes, hashes, side="right")
        owners = [self.owners[first:last] for first, last in zip(start, end, strict=True) if last > first]
        texts, shared = np.unique(np.concatenate(owners), return_counts=True)
        smaller = np.minimum(len(hashes), self.sizes[texts])
        return bool(np.any((shared >= MIN_SHARE * smaller) & (smaller >= MIN_NGRAMS)))


def _texts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _texts(value.values())
        elif isinstance(value, list | tuple):
            yield from _texts(value)


def _long_enough(text: str) -> bool:
    form = duplicate_form(text)
    return len(form) >= (MIN_CHARACTERS_HAN if is_han(form) else MIN_CHARACTERS)


def _ngrams(forms: Sequence[str]) -> Iterator[tuple[int, npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
    """Yield, batch by batch: number of the first form, n-gram hashes, the form of each counted from the first."""
    first = 0
    while first < len(forms):
        last, characters = first, 0
        while last < len(forms) and (last == first or characters + len(forms[last]) <= _BATCH_CHARACTERS):
            characters += len(forms[last])
            last += 1
        batch = forms[first:last]
        lengths = np.array([NGRAM_LENGTH_HAN if is_han(form) else NGRAM_LENGTH for form in batch])
        hashes, lines = zip(*(_hashed(batch, lengths, length) for length in set(lengths.tolist())), strict=True)
        yield first, np.concatenate(hashes), np.concatenate(lines)
        first = last


def _hashed(
    forms: Sequence[str], lengths: npt.NDArray[np.int64], length: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Return the hashes of the n-grams of the forms whose n-gram length is `length`, and the form of each."""
    chosen = [index for index in np.flatnonzero(lengths == length).tolist() if len(forms[index]) >= length]
    joined = "".join(forms[index] for index in chosen)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    if not len(codes):
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    owners = np.repeat(np.array(chosen), [len(forms[index]) for index in chosen])
    count = len(codes) - length + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        hashes = hashes * _BASE + codes[offset : offset + count]  # modulo 2^64
    hashes = (hashes ^ (hashes >> np.uint64(32))) * _MIX
    hashes ^= hashes >> np.uint64(29)
    inside = owners[:count] == owners[length - 1 :]  # not across the end of a form
    return hashes[inside], owners[:count][inside]
