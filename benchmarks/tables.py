"""Write the measured tables into docs/performance.md: python -m benchmarks.tables."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.reporting import RESULTS, TITLES, markdown, read_results

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def tables(results: Path = RESULTS) -> str:
    """All entries of the results file as Markdown, in the order of the questions."""
    found = read_results(results)
    order = {question: place for place, question in enumerate(TITLES)}
    names = sorted(found, key=lambda name: (order[name.partition("@")[0]], name))
    return "\n\n".join(markdown(name, found[name]) for name in names) or "Nothing was measured yet: `make bench`."


def rewrite(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Replace what stands between the two marks of `page`; the rest stays."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{page} has no marked block ({BEGIN} ... {END})")
    page.write_text(f"{before}{BEGIN}\n{tables(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    rewrite()
