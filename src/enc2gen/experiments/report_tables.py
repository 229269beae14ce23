"""Tables of reports: their form, their Markdown, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "\N{EN DASH}"

Table = dict[str, Any]
"""`title`, `note`, `header` and `rows` of text; `long`: too long for a terminal; `texts`: cells are texts."""


def markdown(table: Table) -> str:
    """The table with its title and note."""
    lines = [f"## {table['title']}", "", *([table["note"], ""] if table["note"] else [])]
    lines.append("| " + " | ".join(_escaped(table["header"])) + " |")
    lines.append("| --- |" + (" --- |" if table.get("texts") else " ---: |") * (len(table["header"]) - 1))
    lines += ["| " + " | ".join(_escaped(row)) + " |" for row in table["rows"]]
    return "\n".join([*lines, ""])


def _escaped(cells: Sequence[str]) -> list[str]:
    return [" ".join(cell.replace("|", "\\|").replace("<", "&lt;").split()) for cell in cells]


def points(value: float | None) -> str:
    """`31.4`."""
    return NOTHING if value is None else f"{value:.1f}"


def with_interval(score: Mapping[str, Any] | None) -> str:
    """`31.4 [29.9, 33.0]`."""
    return NOTHING if score is None else f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def signed(difference: Mapping[str, Any] | None) -> str:
    """`+1.4 [-0.2, +3.0]`."""
    if difference is None:
        return NOTHING
    return f"{difference['value']:+.1f} [{difference['low']:+.1f}, {difference['high']:+.1f}]"
