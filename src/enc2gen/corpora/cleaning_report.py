"""What a cleaning run read, kept, repaired and dropped, why, and with examples: counted, merged, shown."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from enc2gen.corpora.languages import language_name
from enc2gen.corpora.report_pages import html_environment, replace_text, writing_report
from enc2gen.errors import DataError, LanguageError

__all__ = [
    "UNKNOWN_LANGUAGE",
    "CleaningStats",
    "Example",
    "print_cleaning_report",
    "visible_controls",
    "write_cleaning_report",
]

EXAMPLES_PER_REASON = 5
EXAMPLE_LENGTH = 300
"""How many examples are kept, and how many characters of each (our choice: the report stays small)."""
UNKNOWN_LANGUAGE = "und"
"""The language of a line that was dropped before it was identified."""
_VERSION = 1
# Format characters (category Cf) that spell words: ZWNJ, ZWJ, Mongolian vowel separator. Shown as they are.
_SPELLING = frozenset("\u200c\u200d\u180e")


@dataclass(frozen=True)
class Example:
    """A line that was dropped or repaired, cut to `EXAMPLE_LENGTH` characters.

    Attributes:
        text: the line as it was read.
        source: the file it comes from.
        detail: what the reason rests on, for example "ru 0.98" or "of line 12"; may be empty.
        after: the line after a repair; None for a dropped line.
    """

    text: str
    source: str = ""
    detail: str = ""
    after: str | None = None


def _by_language() -> dict[str, Counter[str]]:
    return {}


@dataclass
class CleaningStats:
    """Counts of a cleaning run, or of one chunk of it; :meth:`merge` adds chunks up.

    Every line read is kept or dropped: `read == sum(kept) + sum(dropped)` once a run is complete.

    Attributes:
        read: lines read.
        kept: language -> lines kept.
        dropped: reason -> language -> lines dropped.
        repaired: kind of repair -> language -> lines changed by it; a line may be counted under several.
        examples: reason or kind of repair -> the first few lines of it.
        characters_read: characters of all lines read.
        characters_kept: characters of the lines kept, after cleaning.
        documents: documents kept.
        splits: split -> lines.
        split_documents: split -> documents.
        seconds: wall-clock time; not added up by :meth:`merge`, for chunks run side by side.
    """

    read: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=_by_language)
    repaired: dict[str, Counter[str]] = field(default_factory=_by_language)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    characters_read: int = 0
    characters_kept: int = 0
    documents: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    split_documents: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add_read(self, text: str) -> None:
        """Count a line as read."""
        self.read += 1
        self.characters_read += len(text)

    def add_kept(self, text: str, language: str = UNKNOWN_LANGUAGE) -> None:
        """Count a line, given after cleaning, as kept."""
        self.kept[language] += 1
        self.characters_kept += len(text)

    def add_dropped(
        self, reason: str, text: str, language: str = UNKNOWN_LANGUAGE, *, source: str = "", detail: str = ""
    ) -> None:
        """Count a line as dropped for `reason`, and remember it if it is among the first."""
        self.dropped.setdefault(reason, Counter())[language] += 1
        self._add_example(reason, Example(text[:EXAMPLE_LENGTH], source, detail))

    def add_repaired(
        self, kind: str, before: str, after: str, language: str = UNKNOWN_LANGUAGE, *, source: str = ""
    ) -> None:
        """Count a line as repaired, and remember it if it is among the first."""
        self.repaired.setdefault(kind, Counter())[language] += 1
        self._add_example(kind, Example(before[:EXAMPLE_LENGTH], source, after=after[:EXAMPLE_LENGTH]))

    def _add_example(self, reason: str, example: Example) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES_PER_REASON:
            examples.append(example)

    def merge(self, other: CleaningStats) -> None:
        """Add the counts of the chunk that follows; examples of the earlier chunks are preferred."""
        self.read += other.read
        self.characters_read += other.characters_read
        self.characters_kept += other.characters_kept
        self.documents += other.documents
        for mine, theirs in (
            (self.kept, other.kept),
            (self.splits, other.splits),
            (self.split_documents, other.split_documents),
        ):
            mine.update(theirs)
        for counts, others in ((self.dropped, other.dropped), (self.repaired, other.repaired)):
            for reason, languages in others.items():
                counts.setdefault(reason, Counter()).update(languages)
        for reason, examples in other.examples.items():
            for example in examples:
                self._add_example(reason, example)

    @property
    def total_kept(self) -> int:
        """Lines kept, in all languages."""
        return self.kept.total()

    @property
    def total_dropped(self) -> int:
        """Lines dropped, for all reasons."""
        return sum(languages.total() for languages in self.dropped.values())

    @property
    def lines_per_second(self) -> float:
        """Lines read per second of wall-clock time; 0 if no time was measured."""
        return self.read / self.seconds if self.seconds > 0 else 0.0

    def languages(self) -> list[str]:
        """The languages of kept and dropped lines, the most frequent first."""
        total = Counter(self.kept)
        for languages in self.dropped.values():
            total.update(languages)
        return sorted(total, key=lambda language: (-total[language], language))

    def dropped_in(self, language: str) -> int:
        """Lines of `language` that were dropped."""
        return sum(languages[language] for languages in self.dropped.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and numbers, from which :meth:`from_json` builds an equal object."""
        derived = {
            "total_kept": self.total_kept,
            "total_dropped": self.total_dropped,
            "lines_per_second": round(self.lines_per_second, 1),
        }
        # Not dataclasses.asdict: it rebuilds a Counter from its pairs, which counts the pairs.
        values = {"version": _VERSION, **derived, **vars(self)}
        values["examples"] = {key: [asdict(example) for example in found] for key, found in self.examples.items()}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CleaningStats:
        """Build the object that :meth:`to_json` was called on.

        Raises:
            DataError: the values are not those of a cleaning report of this version.
        """
        if not isinstance(values, Mapping) or values.get("version") != _VERSION:
            raise DataError("this is no cleaning report of this version", remedy="run `enc2gen prepare` again")
        try:
            return cls(
                read=values["read"],
                kept=Counter(values["kept"]),
                dropped={reason: Counter(languages) for reason, languages in values["dropped"].items()},
                repaired={kind: Counter(languages) for kind, languages in values["repaired"].items()},
                examples={key: [Example(**entry) for entry in found] for key, found in values["examples"].items()},
                characters_read=values["characters_read"],
                characters_kept=values["characters_kept"],
                documents=values["documents"],
                splits=Counter(values["splits"]),
                split_documents=Counter(values["split_documents"]),
                seconds=values["seconds"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"the cleaning report is damaged: {error}", remedy="run `enc2gen prepare` again") from error


def write_cleaning_report(
    stats: CleaningStats,
    folder: Path,
    reasons: Mapping[str, str],
    *,
    repairs: Mapping[str, str] | None = None,
    title: str = "Cleaning",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write `report.html`, one page without anything from outside, and `report.json`.

    Args:
        stats: the counts of the whole run.
        folder: where to write; made if missing.
        reasons: drop reason -> its explanation, in the order in which lines are tested.
        repairs: kind of repair -> its explanation.
        title: heading of the page.
        settings: the configuration, shown as JSON.

    Returns:
        The path of `report.html`.

    Raises:
        OutputError: the folder cannot be written.
    """
    page = _environment().get_template("cleaning.html.j2").render(_context(stats, reasons, repairs, title, settings))
    report = json.dumps(stats.to_json(), ensure_ascii=False, indent=2) + "\n"
    path = folder / "report.html"
    with writing_report(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in ((folder / "report.json", report), (path, page)):
            replace_text(file, content)
    return path


def print_cleaning_report(stats: CleaningStats, console: Console, reasons: Mapping[str, str]) -> None:
    """Print what was kept and dropped, by reason, language and split; made for 80 columns or more.

    Args:
        stats: the counts of the whole run.
        console: where to print.
        reasons: drop reason -> its explanation, in the order in which lines are tested.
    """
    speed = f", {stats.lines_per_second:,.0f} lines/s" if stats.seconds > 0 else ""
    console.print(
        Text.assemble(
            (f"{stats.total_kept:,}", "bold"),
            f" of {stats.read:,} lines kept ({_share(stats.total_kept, stats.read)}), {stats.documents:,} documents",
            speed,
        )
    )
    if stats.dropped:
        console.print()
        console.print(_reasons_table(stats, reasons))
    console.print()
    console.print(_languages_table(stats))
    if stats.splits:
        splits = ", ".join(f"{name} {lines:,}" for name, lines in stats.splits.items())
        console.print(f"\nLines per split: {splits}")


def _reasons_table(stats: CleaningStats, reasons: Mapping[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("dropped because", style="bold", no_wrap=True)
    table.add_column("lines", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("that is")
    for reason in _ordered(stats.dropped, reasons):
        lines = stats.dropped[reason].total()
        table.add_row(reason, f"{lines:,}", _share(lines, stats.read), reasons.get(reason, ""))
    return table


def _languages_table(stats: CleaningStats) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("language", style="bold", overflow="fold")
    for column in ("read", "kept", "dropped", "kept, share"):
        table.add_column(column, justify="right", no_wrap=True)
    for language in stats.languages():
        kept, dropped = stats.kept[language], stats.dropped_in(language)
        share = _share(kept, kept + dropped)
        table.add_row(_language_label(language), f"{kept + dropped:,}", f"{kept:,}", f"{dropped:,}", share)
    return table


def visible_controls(text: str) -> Markup:
    """Return `text` as HTML in which every character that cannot be seen or turns the reading direction is marked.

    Control characters become their Unicode pictures (U+0007 -> "␇") or their number; so do other format
    characters than ZWJ, ZWNJ and the Mongolian vowel separator, and characters that Unicode does not assign.
    """
    return Markup("").join(
        Markup('<span class="control" title="{}">{}</span>').format(f"U+{ord(char):04X}", sign)
        if (sign := _control_sign(char))
        else escape(char)
        for char in text
    )


def _control_sign(char: str) -> str | None:
    code = ord(char)
    if unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} or char in _SPELLING:
        return None
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"U+{code:04X}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _ordered(found: Iterable[str], known: Mapping[str, str]) -> list[str]:
    """The keys of `found`: those of `known` in its order, then the others by name."""
    present = set(found)
    return [key for key in known if key in present] + sorted(present - set(known))


def _language_label(language: str) -> str:
    if language == UNKNOWN_LANGUAGE:
        return "not identified"
    try:
        return f"{language_name(language)} ({language})"
    except (LanguageError, ValueError):
        return language


def _environment() -> Environment:
    environment = html_environment("enc2gen.corpora")
    environment.filters["thousands"] = lambda value: f"{value:,.0f}"
    environment.filters["visible"] = visible_controls
    environment.filters["language"] = _language_label
    environment.globals["share"] = _share
    return environment


def _context(
    stats: CleaningStats,
    reasons: Mapping[str, str],
    repairs: Mapping[str, str] | None,
    title: str,
    settings: Mapping[str, Any] | None,
) -> dict[str, Any]:
    return {
        "title": title,
        "stats": stats,
        "dropped": [_row(stats, reason, stats.dropped, reasons) for reason in _ordered(stats.dropped, reasons)],
        "repaired": [
            _row(stats, kind, stats.repaired, repairs or {}) for kind in _ordered(stats.repaired, repairs or {})
        ],
        "settings": json.dumps(settings, ensure_ascii=False, indent=2, default=str) if settings else None,
    }


def _row(
    stats: CleaningStats, name: str, counts: Mapping[str, Counter[str]], terms: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "name": name,
        "term": terms.get(name, ""),
        "lines": counts[name].total(),
        "languages": counts[name].most_common(),
        "examples": stats.examples.get(name, []),
    }
