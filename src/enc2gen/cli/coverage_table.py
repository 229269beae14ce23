"""Coverage of a corpus by a tokenizer, on a terminal of 80 columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from enc2gen.corpora.languages import default_script, language_name, script_matches
from enc2gen.tokenization.coverage import COSTLY, GAPS, LOSSY, UNREADABLE, Coverage, CoverageReport, Verdict
from enc2gen.tokenization.round_trip import LOSSES

SMALL_SHARE = 0.005
"""Languages with a smaller share of the characters stand in one line together (our choice)."""
KEEPABLE = {"joiners", "selectors", "invisible", "compatibility"}
"""Kinds of loss that the normalizer is to blame for: `keep_characters` prevents them."""
_CHARACTERS_SHOWN = 5  # our choice
_SCRIPTS_SHOWN = 8  # our choice
_STYLES: dict[Verdict, str] = {"fine": "green", "gaps": "yellow", "costly": "yellow", "unreadable": "bold red"}
_WORDS: dict[Verdict, str] = {
    "fine": "The vocabulary will do.",
    "gaps": "Readable, but some characters are lost.",
    "costly": "Readable, but cut so finely that texts become long: slow to train, slow to write.",
    "unreadable": "The encoder cannot read this, and no generator on it can write it.",
}


def print_coverage(
    report: CoverageReport, console: Console, compare: CoverageReport | None = None, *, corpus: Iterable[str] = ()
) -> None:
    """Print the table, what it means for each language, and the vocabulary.

    Args:
        report: of the tokenizer.
        console: 80 columns are enough.
        compare: of another tokenizer on the same corpus: `report` is "before", `compare` is "after".
        corpus: the corpus as the user named it, for the advice.
    """
    latest = compare or report
    console.print(Text.assemble("Tokenizer  ", (report.tokenizer or "unnamed", "bold")), soft_wrap=True)
    if compare:
        console.print(Text.assemble("       to  ", (compare.tokenizer or "unnamed", "bold")), soft_wrap=True)
    shown = _print_table(report, compare, console, "--json has them")
    for tag in shown:
        _print_findings(tag, latest.languages[tag], console)
    _print_advice([latest.languages[tag] for tag in shown], latest, console, list(corpus))
    _print_vocabulary(report, console)
    if compare:
        _print_vocabulary(compare, console)
    _print_legend(console)


def print_coverage_change(
    before: CoverageReport, after: CoverageReport, console: Console, *, keeps_corpus: bool = False
) -> None:
    """Print how a change of the vocabulary changed the coverage of a corpus, and what is lost still.

    Args:
        before: of the old tokenizer.
        after: of the new tokenizer, on the same corpus.
        console: 80 columns are enough.
        keeps_corpus: whether all characters of the corpus are kept already, so that this is not advised.
    """
    console.print("Coverage of the corpus")
    _print_table(before, after, console, "vocabulary.json has them")
    total = after.total
    if total.losses:
        changed = round((1 - total.round_trip_exact) * total.lines)
        console.print(f"\n{changed:,} of {total.lines:,} lines come back changed. Lost, in lines:", highlight=False)
        _print_losses(total.losses, console)
    if not keeps_corpus and total.round_trip_exact >= before.total.round_trip_exact and KEEPABLE & total.losses.keys():
        console.print("--keep-characters corpus keeps such characters; see --help for the price.", highlight=False)
    console.print()


def _print_table(report: CoverageReport, compare: CoverageReport | None, console: Console, elsewhere: str) -> list[str]:
    """Print the table; returns the languages in it, the larger ones."""
    latest = compare or report
    shown = [tag for tag, row in latest.languages.items() if row.characters >= SMALL_SHARE * latest.total.characters]
    console.print(_table(report, compare, shown))
    rest = [row for tag, row in latest.languages.items() if tag not in shown]
    if rest:
        lines = sum(row.lines for row in rest)
        console.print(
            f"Not shown: {lines:,} lines in {len(rest)} smaller languages or scripts; {elsewhere}.", highlight=False
        )
    return shown


def _table(report: CoverageReport, compare: CoverageReport | None, shown: list[str]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("language", max_width=24)
    if compare:
        table.add_column("")
    for name in ("lines", "unknown", "tokens per", "bytes/\ntoken", "exact"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    parts: list[tuple[str, CoverageReport]] = [("before", report), ("after", compare)] if compare else [("", report)]
    names = [*shown, *(["all"] if len(report.languages) > 1 else [])]
    for tag in names:
        for when, source in parts:
            row = source.total if tag == "all" else source.languages[tag]
            name = "all" if tag == "all" else _name(tag)
            _add_row(table, [name if when != "after" else "", *([when] if compare else [])], row, tag != "all")
    return table


def _add_row(table: Table, head: list[str], row: Coverage, judged: bool) -> None:
    fertility = "-" if row.fertility is None else f"{row.fertility_unit} {row.fertility:.2f}"
    table.add_row(
        *map(Text, head),
        f"{row.lines:,}",
        _percent(row.unknown_rate),
        fertility,
        f"{row.bytes_per_token:.1f}",
        _percent(row.round_trip_exact),
        Text(row.verdict, style=_STYLES[row.verdict]) if judged else "",
    )


def _name(tag: str) -> str:
    if tag.partition("-")[0] == "und":
        return f"no language {tag}"
    return f"{language_name(tag)} {tag}"


def _percent(share: float) -> str:
    """A share in percent; what is not quite 0 or 100 never looks so."""
    percent = 100 * share
    if 0 < percent < 0.01:
        return "<0.01 %"
    if 99.95 <= percent < 100:
        return ">99.9 %"
    return f"{percent:.2f} %" if 0 < percent < 1 else f"{percent:.1f} %"


def _print_findings(tag: str, row: Coverage, console: Console) -> None:
    console.print()
    heading = Text.assemble((_name(tag), "bold"), ": ", (row.verdict, _STYLES[row.verdict]), f". {_WORDS[row.verdict]}")
    console.print(heading)
    facts = [
        f"{_percent(row.unknown_rate)} of the characters are unknown; {_percent(row.small_piece_rate)} of the "
        "tokens are single characters or bytes.",
    ]
    if row.losses:
        facts.append(
            f"{_percent(1 - row.round_trip_exact)} of the lines come back changed, "
            f"{_percent(1 - row.round_trip_normalised)} by more than NFC and white space. Lost, in lines:"
        )
    for fact in facts:
        console.print(Padding(Text(fact), (0, 0, 0, 2)))
    _print_losses(row.losses, console)
    if row.broken_characters:
        console.print(Padding(_characters(row), (0, 0, 0, 2)))


def _print_losses(losses: Mapping[str, int], console: Console) -> None:
    if not losses:
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for kind, count in losses.items():
        table.add_row(f"{count:,}", Text(LOSSES[kind]))
    console.print(Padding(table, (0, 0, 0, 4)))


def _characters(row: Coverage) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("lost most")
    table.add_column("")
    table.add_column("name", overflow="fold")
    table.add_column("times", justify="right")
    table.add_column("unknown", justify="right")
    for broken in row.broken_characters[:_CHARACTERS_SHOWN]:
        table.add_row(
            Text(_visible(broken.character)),
            broken.code_point,
            Text(broken.name),
            f"{broken.count:,}",
            f"{broken.unknown:,}",
        )
    return table


def _visible(character: str) -> str:
    """The character as a terminal can show it: marks on a dotted circle, nothing for what is invisible."""
    category = unicodedata.category(character)
    if category.startswith("M"):
        return f"\u25cc{character}"
    return "" if category[0] in "CZ" else character


def _print_advice(rows: list[Coverage], report: CoverageReport, console: Console, corpus: list[str]) -> None:
    if all(row.verdict == "fine" for row in rows):
        return
    files = " ".join(f"--corpus {name}" for name in corpus if name != "-") or "--corpus FILE"
    fallback = any(row.verdict in ("unreadable", "gaps") for row in rows)
    console.print("\nWhat helps: new pieces for these languages, with")
    command = f"enc2gen vocab extend {report.tokenizer or 'MODEL'} {files} --out DIR"
    console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)
    if fallback:
        console.print("and --byte-fallback, so that rare signs are never unknown.", highlight=False)


def _print_vocabulary(report: CoverageReport, console: Console) -> None:
    share = report.total.pieces_used / max(1, report.vocabulary_size)
    console.print()
    console.print(
        Text(
            f"Vocabulary of {report.tokenizer or 'the tokenizer'}: {report.vocabulary_size:,} pieces, of which this "
            f"corpus uses {report.total.pieces_used:,} ({_percent(share)})."
        )
    )
    scripts = list(report.vocabulary_scripts.items())
    ours = [code for code in _scripts(report) if code not in dict(scripts[:_SCRIPTS_SHOWN])]
    listed = [*scripts[:_SCRIPTS_SHOWN], *((code, report.vocabulary_scripts.get(code, 0)) for code in ours)]
    console.print(Padding(Text("by script: " + ", ".join(f"{code} {count:,}" for code, count in listed)), (0, 0, 0, 2)))


def _scripts(report: CoverageReport) -> list[str]:
    """Scripts of the corpus's larger rows."""
    found = []
    for tag, row in report.languages.items():
        if row.characters < SMALL_SHARE * report.total.characters:
            continue
        wanted = default_script(tag)
        codes = [code for code in report.vocabulary_scripts if script_matches(code, wanted)] or [wanted]
        found += [code for code in codes if code != "Zyyy"]
    return list(dict.fromkeys(found))


def _print_legend(console: Console) -> None:
    limits = ", ".join(f"{limit} a {unit}" for unit, limit in COSTLY.items())
    console.print()
    console.print(
        Text(
            "unknown: share of the characters that the tokenizer can only write as <unk>. tokens per: word; syllable "
            "in Tibetan; character in other scripts without word spaces (where much is unknown, this is too low: a "
            "whole unknown stretch is one token). exact: lines that come back as they were. "
            f"Verdicts: unreadable from {100 * UNREADABLE:g} % unknown; costly above {limits}; gaps from "
            f"{100 * GAPS:g} % unknown, or {100 * LOSSY:g} % of the lines losing joiners, selectors or vowel signs.",
            style="dim",
        )
    )
