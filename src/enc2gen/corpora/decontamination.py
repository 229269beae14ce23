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
from enc2gen.corpora.readers import Record, read_records, source_names, source_sides
from enc2gen.errors import DataError

__all__ = ["EvaluationIndex"]

NGRAM_LENGTH_HAN = 10
NGRAM_LENGTH = 2 * NGRAM_LENGTH_HAN
"""Characters of an n-gram, about three words or six Tibetan syllables; half of it for East Asian text (our choice)."""
MIN_SHARE = 0.5
"""Share of the shorter text's n-grams that the longer one must hold (our choice)."""
MIN_NGRAMS = 10
"""Shorter texts are only compared as wholes: their few n-grams may be common phrases (our choice)."""
MIN_CHARACTERS = 12
MIN_CHARACTERS_HAN = 6
"""Shorter evaluation texts are left out: labels, names, language codes (our choice)."""
_EVALUATION_SPLITS = ("val", "dev", "test", "eval")  # as names of splits begin on the Hub: validation, devtest
_BATCH_CHARACTERS = 1_000_000  # our choice: hashed at once, at about 60 bytes a character
_EAST_ASIAN = ((0x3005, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))  # blocks of kana and Chinese characters
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd; polynomial hash modulo 2^64
_SHIFT = np.uint64(pow(int(_BASE), NGRAM_LENGTH_HAN, 2**64))
_MIX = np.uint64(0xBF58476D1CE4E5B9)  # SplitMix64


@dataclass(frozen=True)
class EvaluationIndex:
    """Digests of evaluation texts; small enough to be sent to every worker (16 bytes per character of them, 32 of East
    Asian ones).

    All texts have long n-grams; those with any Chinese character or kana, short ones as well. A Chinese sentence with
    Latin names so has n-grams in common with the passage around it, whichever script most letters of the two are in.

    Attributes:
        keys: :func:`text_key` of every text.
        hashes: hashes of all n-grams, ascending, `[entries]`.
        owners: the text that each n-gram is from, twice its number, and one more if it is a short one, `[entries]`.
        sizes: number of different n-grams of each owner, `[2 * texts]`.
    """

    keys: frozenset[bytes]
    hashes: npt.NDArray[np.uint64]
    owners: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    @classmethod
    def from_files(cls, paths: Sequence[str | Path], fields: Sequence[str] | None = None) -> EvaluationIndex:
        """Read evaluation sets: files, folders or anything else that :func:`read_records` takes.

        Of a built-in corpus all splits are read, of a Hub data set those for evaluation: validation, dev, test.

        Args:
            paths: where the sets are.
            fields: the fields that hold text; None for all of them, lists of texts included.

        Raises:
            DataError: a set cannot be read, lacks a field, holds no text of at least 12 (Chinese: 6) characters, or is
                a Hub data set without a split for evaluation.
        """
        texts: list[str] = []
        for path in paths:
            found = [text for record in _records(path, fields) for text in _texts(record.values())]
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
        for first, found, kinds in _ngrams(list(unique.values())):
            pairs = np.unique(np.stack([kinds.astype(np.uint64), found]), axis=1)  # each n-gram once per text
            hashes.append(pairs[1])
            owners.append(pairs[0].astype(np.int64) + 2 * first)
        all_hashes, all_owners = np.concatenate(hashes), np.concatenate(owners)
        order = np.argsort(all_hashes, kind="stable")
        sizes = np.bincount(all_owners, minlength=2 * len(unique))
        return cls(frozenset(unique), all_hashes[order], all_owners[order], sizes)

    def contaminated(self, texts: Sequence[str]) -> list[bool]:
        """Return for each text whether it is in an evaluation set."""
        return self.contaminated_forms([duplicate_form(text) for text in texts])

    def contaminated_forms(self, forms: Sequence[str]) -> list[bool]:
        """Return the same for the texts with these :func:`duplicate_form`."""
        result = np.array([form_key(form) in self.keys for form in forms], dtype=bool)
        suspects: list[int] = []
        for first, hashes, kinds in _ngrams(forms):
            suspects += (first + np.unique(kinds[self._known(hashes)] // 2)).tolist()
        for line in suspects:
            result[line] |= self._overlaps(forms[line])
        return result.tolist()

    def _known(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        if not len(self.hashes):
            return np.zeros(len(hashes), dtype=bool)
        place = np.searchsorted(self.hashes, hashes)
        return self.hashes[np.minimum(place, len(self.hashes) - 1)] == hashes

    def _overlaps(self, form: str) -> bool:
        """Whether the form and one evaluation text share half of the long, or of the short, n-grams of the shorter."""
        _, found, kinds = next(_ngrams([form]))
        counts = np.array([len(np.unique(found[kinds == kind])) for kind in (0, 1)])
        hashes = np.unique(found)
        start = np.searchsorted(self.hashes, hashes, side="left")
        end = np.searchsorted(self.hashes, hashes, side="right")
        owners = [self.owners[first:last] for first, last in zip(start, end, strict=True) if last > first]
        texts, shared = np.unique(np.concatenate(owners), return_counts=True)
        smaller = np.minimum(counts[texts % 2], self.sizes[texts])
        return bool(np.any((shared >= MIN_SHARE * smaller) & (smaller >= MIN_NGRAMS)))


def _records(path: str | Path, fields: Sequence[str] | None) -> Iterator[Record]:
    """The records of an evaluation set; not those that are there to train on, which `read_records` would take."""
    sides = source_sides(path)
    data_sets = [name for side in sides if (name := _hub_name(side))]
    if str(path).startswith("builtin:"):
        yield from read_records(path, split="all", columns=fields)
    elif not data_sets:
        yield from read_records(path, columns=fields)
    elif len(sides) > 1:  # each has its own splits, and texts need not be paired to be compared
        for side in sides:
            yield from _records(side, fields)
    else:
        for split in _evaluation_splits(data_sets[0]):
            yield from read_records(path, split=split, columns=fields)


def _hub_name(source: str) -> str:
    """`owner/name[:config]` if the source is a whole data set on the Hub, else nothing."""
    [name, *more] = source_names(source, "train")
    whole = not more and name.startswith("hub:") and name.endswith(" train")
    return name.removeprefix("hub:").removesuffix(" train") if whole else ""


def _evaluation_splits(data_set: str) -> list[str]:
    import datasets

    name, _, config = data_set.partition(":")
    try:
        splits = datasets.get_dataset_split_names(name, config or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"its splits cannot be read: {error}",
            where=f"Hub dataset {data_set}",
            remedy="check name and configuration (owner/name:config) on https://huggingface.co/datasets, the network, "
            "and that HF_HUB_OFFLINE is not set; or give a file. If a file or folder was meant: there is none",
        ) from error
    found = [split for split in splits if split.lower().startswith(_EVALUATION_SPLITS)]
    if not found:
        raise DataError(
            f"it has no split for evaluation, only {', '.join(splits) or 'none at all'}",
            where=f"Hub dataset {data_set}",
            remedy=f"if lines of it must not be in the corpus, name its file: hub:{name}/FILE "
            f"(see https://huggingface.co/datasets/{name}/tree/main)",
        )
    return found


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
    """Yield, batch by batch: number of the first form, n-gram hashes, and the kind of each.

    The kind is twice the number of its form, counted from the first, and one more if it is a short n-gram.
    """
    first = 0
    while first < len(forms):
        last, characters = first, 0
        while last < len(forms) and (last == first or characters + len(forms[last]) <= _BATCH_CHARACTERS):
            characters += len(forms[last])
            last += 1
        yield first, *_hashed(forms[first:last])
        first = last


def _hashed(forms: Sequence[str]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Return the hashes of the n-grams of the forms, and the kind of each, as :func:`_ngrams` says."""
    codes = np.frombuffer("".join(forms).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    owners = np.repeat(np.arange(len(forms)), [len(form) for form in forms])
    has_short = np.zeros(len(forms), dtype=bool)
    for start, end in _EAST_ASIAN:
        has_short[owners[(codes >= start) & (codes <= end)]] = True
    short, long = NGRAM_LENGTH_HAN, NGRAM_LENGTH
    if len(codes) < short:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    hashes = np.zeros(len(codes) - short + 1, dtype=np.uint64)
    for offset in range(short):
        hashes = hashes * _BASE + codes[offset : offset + len(hashes)]  # modulo 2^64
    count = max(0, len(codes) - long + 1)
    both = hashes[:count] * _SHIFT + hashes[long - short :][:count]  # a long n-gram is two short ones
    inside = owners[:count] == owners[long - 1 :][:count]  # not across the end of a form
    short_inside = (owners[: len(hashes)] == owners[short - 1 :]) & has_short[owners[: len(hashes)]]
    return (
        _mixed(np.concatenate([both[inside], hashes[short_inside]])),
        np.concatenate([2 * owners[:count][inside], 2 * owners[: len(hashes)][short_inside] + 1]),
    )


def _mixed(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spread the hashes over all bits."""
    hashes = (hashes ^ (hashes >> np.uint64(32))) * _MIX
    return hashes ^ (hashes >> np.uint64(29))
