"""How well a tokenizer covers a corpus: what it cannot write, how finely it splits, what a round trip loses.

Measured per language and script, in one pass over a stream of texts; memory does not grow with the corpus.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import chain
from typing import Any, Literal

import langcodes
from transformers import PreTrainedTokenizerBase

from enc2gen.corpora.language_id import LANGUAGE_IDENTIFIERS, LanguageIdentifier
from enc2gen.corpora.languages import default_script, dominant_script, normalise_language, script_matches
from enc2gen.errors import DataError
from enc2gen.tokenization.inventory import PieceInventory, piece_inventory
from enc2gen.tokenization.round_trip import loss_kinds, normalised
from enc2gen.tokenization.tokenizer import encode_whole, protect_special_tokens
from enc2gen.tokenization.units import count_units
from enc2gen.tokenization.unknown import UnknownText

Verdict = Literal["fine", "gaps", "costly", "unreadable"]

UNREADABLE = 0.05
"""Unknown rate from which text is unreadable: a hole in every third word or so (our choice)."""
GAPS = 0.001
"""Unknown rate from which some letters are missing, as opposed to a rare sign (our choice)."""
LOSSY = 0.01
"""Share of the lines that lose letters or joiners from which that is more than an accident (our choice)."""
COSTLY = {"word": 3.5, "syllable": 2.5, "character": 2.0}
"""Tokens per unit above which texts become long and slow (our choice; English has about 1.3 a word)."""
MAX_CHARACTERS = 100_000  # our choice: longer texts are measured in parts of this length, which bounds memory
_LETTER_LOSSES = ("joiners", "selectors", "marks")  # these change words, other than full-width commas
_BATCH_TEXTS, _BATCH_CHARACTERS = 1000, 500_000  # our choice
_IDENTIFIED_CHARACTERS = 500  # our choice: the beginning tells the language as well as the whole
_BROKEN_LISTED = 20  # our choice

_Group = tuple[str | None, str | None]  # language (None: too short to tell), script (None: no letters)


@dataclass(frozen=True)
class BrokenCharacter:
    """A character that does not survive the round trip, `count` times; `unknown` of these as unknown token."""

    character: str
    code_point: str
    name: str
    count: int
    unknown: int


@dataclass(frozen=True)
class Coverage:
    """How a tokenizer covers the texts of one language in one script, or a whole corpus.

    Attributes:
        lines: texts measured.
        characters: characters in them, white space not counted.
        tokens: tokens they are split into.
        unknown_rate: share (0 to 1) of the characters that become the unknown token, or none at all.
        fertility: tokens per unit; None if there is none, as in punctuation.
        fertility_unit: "word", "syllable" (Tibetan) or "character" (other scripts without word spaces), the
            commonest here; each run of text is counted in the units of its own script.
        tokens_per_character: tokens per character.
        bytes_per_token: UTF-8 bytes of text per token.
        round_trip_exact: share (0 to 1) of the texts that are decoded as they were encoded.
        round_trip_normalised: the same after NFC and with any white space as one space.
        losses: number of texts by kind of loss (see `round_trip.LOSSES`), most first.
        broken_characters: characters most often lost, at most 20.
        small_piece_rate: share (0 to 1) of the tokens that are one character or less.
        pieces_used: different pieces of the vocabulary that occur.
    """

    lines: int
    characters: int
    tokens: int
    unknown_rate: float
    fertility: float | None
    fertility_unit: str
    tokens_per_character: float
    bytes_per_token: float
    round_trip_exact: float
    round_trip_normalised: float
    losses: dict[str, int]
    broken_characters: list[BrokenCharacter]
    small_piece_rate: float
    pieces_used: int

    @property
    def verdict(self) -> Verdict:
        """Whether the vocabulary will do: "unreadable", "costly" and "gaps" call for more pieces."""
        if self.unknown_rate >= UNREADABLE:
            return "unreadable"
        if self.fertility is not None and self.fertility > COSTLY[self.fertility_unit]:
            return "costly"
        lossy = max(self.losses.get(kind, 0) for kind in _LETTER_LOSSES) >= LOSSY * self.lines
        return "gaps" if lossy or self.unknown_rate >= GAPS else "fine"

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class CoverageReport:
    """How a tokenizer covers a corpus.

    Attributes:
        tokenizer: its name or path.
        vocabulary_size: all tokens, special ones included.
        vocabulary_scripts: pieces of the vocabulary by script, most first.
        total: the whole corpus.
        languages: BCP 47 tag -> its texts, most characters first. Text in another script than the tag's own has a
            row of its own: "kk", "kk-Arab".
    """

    tokenizer: str
    vocabulary_size: int
    vocabulary_scripts: dict[str, int]
    total: Coverage
    languages: dict[str, Coverage]

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON: the figures of the whole corpus at the top, `languages` below."""
        return {
            "tokenizer": self.tokenizer,
            **self.total.to_dict(),
            "vocabulary_size": self.vocabulary_size,
            "vocabulary_scripts": self.vocabulary_scripts,
            "languages": {tag: row.to_dict() for tag, row in self.languages.items()},
        }


def coverage(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[tuple[str, str | None]],
    *,
    identifier: LanguageIdentifier | None = None,
) -> CoverageReport:
    """Measure how `tokenizer` covers `texts`.

    Args:
        tokenizer: a fast tokenizer; no longer reads text as special tokens afterwards.
        texts: (text, BCP 47 tag) pairs, read once; where the tag is None, the language is identified. A text too
            short for that counts with the corpus's commonest language of its script. Blank texts are left out.
        identifier: tells the language; lid.176 if None.

    Raises:
        ModelError: the tokenizer is slow, or has no unknown token where it needs one.
        LanguageError: a tag is unknown.
        DataError: there is no text, or one with lone surrogates.
    """
    return compare_coverage([tokenizer], texts, identifier=identifier)[0]


def compare_coverage(
    tokenizers: Sequence[PreTrainedTokenizerBase],
    texts: Iterable[tuple[str, str | None]],
    *,
    identifier: LanguageIdentifier | None = None,
) -> list[CoverageReport]:
    """:func:`coverage` of several tokenizers in one pass over `texts`, which may be a stream."""
    counters = [_Counter(tokenizer) for tokenizer in tokenizers]
    guesses: dict[str, Counter[str]] = defaultdict(Counter)
    identifier = identifier or LANGUAGE_IDENTIFIERS.get("fasttext-lid176")()
    for batch in _batches(texts):
        groups = _groups(batch, identifier, guesses)
        for counter in counters:
            counter.add([text for text, _ in batch], groups)
    if not counters[0].tallies:
        raise DataError("there is no text to measure", remedy="check the file and the field that holds its text")
    return [counter.report(guesses) for counter in counters]


def _batches(texts: Iterable[tuple[str, str | None]]) -> Iterator[list[tuple[str, str | None]]]:
    batch: list[tuple[str, str | None]] = []
    size = 0
    for text, language in texts:
        for start in range(0, len(text), MAX_CHARACTERS):
            part = text[start : start + MAX_CHARACTERS]
            # Tokenizers do not give spaces at an end back, which is no loss where the end is only that of a part.
            part = part.lstrip() if start else part
            part = part.rstrip() if start + MAX_CHARACTERS < len(text) else part
            if not part or part.isspace():
                continue
            batch.append((part, language))
            size += len(part)
            if len(batch) >= _BATCH_TEXTS or size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _groups(
    batch: Sequence[tuple[str, str | None]], identifier: LanguageIdentifier, guesses: dict[str, Counter[str]]
) -> list[_Group]:
    """Group of each text; the guesses for those too short to tell are counted by script in `guesses`."""
    starts = [text[:_IDENTIFIED_CHARACTERS] for text, language in batch if language is None]
    identified = iter(identifier.identify(starts))
    groups: list[_Group] = []
    for text, language in batch:
        if language is not None:
            groups.append((language, dominant_script(text[:_IDENTIFIED_CHARACTERS])))
            continue
        guess = next(identified)
        if guess.script is not None and not guess.conclusive:
            guesses[guess.script][guess.language] += 1
        groups.append((guess.language if guess.conclusive else None, guess.script))
    return groups


@lru_cache(maxsize=4096)
def _tag(language: str, script: str | None) -> str:
    """BCP 47 tag of a language in a script: ("kk", "Cyrl") -> "kk", ("kk", "Arab") -> "kk-Arab"."""
    tag = "und" if language == "und" else normalise_language(language)
    if script is None or script_matches(script, default_script(tag)):
        return tag
    base = langcodes.Language.get(tag).language or "und"
    return f"{base}-{script}" if base == "und" else normalise_language(f"{base}-{script}")


@dataclass
class _Tally:
    """Counts over some texts; every field adds up."""

    lines: int = 0
    characters: int = 0
    bytes: int = 0
    unknown: int = 0
    exact: int = 0
    normalised: int = 0
    units: Counter[str] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)
    unknown_characters: Counter[str] = field(default_factory=Counter)
    changed_characters: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: _Tally) -> _Tally:
        for entry in fields(self):
            value = getattr(self, entry.name)
            value += getattr(other, entry.name)
            setattr(self, entry.name, value)
        return self

    def add(self, text: str, ids: list[int], unknown: Sequence[str], decoded: str) -> None:
        """Count one text; `unknown` are the stretches of it that became the unknown token."""
        self.lines += 1
        self.characters += len("".join(text.split()))
        self.bytes += len(text.encode("utf-8"))
        self.units.update(count_units(text))
        self.tokens.update(ids)
        lost = Counter(chain.from_iterable("".join(stretch.split()) for stretch in unknown))
        self.unknown += lost.total()
        self.unknown_characters.update(lost)
        if text == decoded:
            self.exact += 1
            self.normalised += 1
            return
        self.normalised += normalised(text) == normalised(decoded)
        self.losses.update(loss_kinds(text, decoded, unknown=bool(unknown)))
        changed = Counter(text) - Counter(decoded) - lost
        self.changed_characters.update({c: n for c, n in changed.items() if not c.isspace() or c == "\u202f"})


class _Counter:
    """Tallies of one tokenizer by group."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.backend = protect_special_tokens(tokenizer)  # switches truncation off, too
        self.backend.no_padding()
        self.finder = UnknownText(tokenizer)
        self.unknown_id = self.finder.unknown_id
        self.tallies: dict[_Group, _Tally] = defaultdict(_Tally)

    def add(self, texts: list[str], groups: Sequence[_Group]) -> None:
        encodings = encode_whole(self.backend, texts, offsets=True)
        ids = [encoding.ids for encoding in encodings]
        known = [[i for i in row if i != self.unknown_id] if self.unknown_id in row else row for row in ids]
        decoded = self.backend.decode_batch(known, skip_special_tokens=True)
        for text, group, row, encoding, back in zip(texts, groups, ids, encodings, decoded, strict=True):
            self.tallies[group].add(text, row, self.finder.stretches(text, encoding), back)

    def report(self, guesses: Mapping[str, Counter[str]]) -> CoverageReport:
        inventory = piece_inventory(self.tokenizer)
        total, rows = _Tally(), self._rows(guesses)
        for tally in rows.values():
            total += tally
        ordered = sorted(rows.items(), key=lambda entry: (-entry[1].characters, entry[0]))
        return CoverageReport(
            tokenizer=self.tokenizer.name_or_path,
            vocabulary_size=len(self.tokenizer),
            vocabulary_scripts=inventory.scripts,
            total=self._coverage(total, inventory),
            languages={tag: self._coverage(tally, inventory) for tag, tally in ordered},
        )

    def _rows(self, guesses: Mapping[str, Counter[str]]) -> dict[str, _Tally]:
        """Tallies by tag; texts too short to tell join the commonest language of their script."""
        sizes: dict[str, Counter[str]] = defaultdict(Counter)
        for (language, script), tally in self.tallies.items():
            if language is not None and script is not None:
                sizes[script][language] += tally.characters
        rows: dict[str, _Tally] = defaultdict(_Tally)
        for (language, script), tally in self.tallies.items():
            if language is None and script is not None:
                language = (sizes.get(script) or guesses[script]).most_common(1)[0][0]
            rows[_tag(language or "und", script)] += tally
        return rows

    def _coverage(self, tally: _Tally, inventory: PieceInventory) -> Coverage:
        tokens, units = tally.tokens.total(), tally.units.total()
        small = sum(count for i, count in tally.tokens.items() if i in inventory.small)
        return Coverage(
            lines=tally.lines,
            characters=tally.characters,
            tokens=tokens,
            unknown_rate=tally.unknown / max(1, tally.characters),
            fertility=tokens / units if units else None,
            fertility_unit=tally.units.most_common(1)[0][0] if units else "word",
            tokens_per_character=tokens / max(1, tally.characters),
            bytes_per_token=tally.bytes / max(1, tokens),
            round_trip_exact=tally.exact / tally.lines,
            round_trip_normalised=tally.normalised / tally.lines,
            losses=dict(tally.losses.most_common()),
            broken_characters=self._broken(tally),
            small_piece_rate=small / max(1, tokens),
            pieces_used=len(tally.tokens.keys() - {self.unknown_id}),
        )

    def _broken(self, tally: _Tally) -> list[BrokenCharacter]:
        """The characters most often lost. A word that is unknown as a whole (WordPiece) is lost for some of its
        characters only: those that are unknown alone, if there are any."""
        alone = self.backend.encode_batch(list(tally.unknown_characters), add_special_tokens=False)
        pairs = zip(tally.unknown_characters, alone, strict=True)
        culprits = {c for c, encoding in pairs if self.finder.is_unknown(c, encoding)}
        unknown = Counter({c: n for c, n in tally.unknown_characters.items() if not culprits or c in culprits})
        lost = unknown + tally.changed_characters
        ordered = sorted(lost.items(), key=lambda entry: (-entry[1], entry[0]))[:_BROKEN_LISTED]
        return [
            BrokenCharacter(c, f"U+{ord(c):04X}", unicodedata.name(c, "no name"), n, unknown[c]) for c, n in ordered
        ]
