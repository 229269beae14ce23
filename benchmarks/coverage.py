"""What `vocab extend` does for the coverage of seven languages, on text that the pieces were not learnt from.

    python benchmarks/coverage.py ../shared/data --size 2000 --limit 2000     # docs/results/new-script-tibetan.md

Text: mono/LANG.jsonl.gz where there is one, every tenth line of it for the test (a paragraph a line), else the train
and test sentences of sib200. Per language, `extend_vocabulary(size=2000)` on the training text, as `enc2gen vocab
extend MODEL --corpus TRAIN --size 2000` does, then what `enc2gen tokenizer-report` measures on the test text.
Seconds: processor time of the extension alone. Deterministic but for the seconds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

from enc2gen.cli.tokenizer_report import read_tokenizer
from enc2gen.corpora.languages import language_name
from enc2gen.tokenization.coverage import Coverage, compare_coverage
from enc2gen.tokenization.extension import extend_vocabulary

LANGUAGES = {"bo": "bod_Tibt", "ug": "uig_Arab", "kk": "kaz_Cyrl", "mn": "khk_Cyrl", "si": "sin_Sinh",
             "am": "amh_Ethi", "km": "khm_Khmr"}  # fmt: skip
MODEL = "embedded:multilingual-e5-small"


def texts(path: Path) -> list[str]:
    """Texts of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def split(data: Path, tag: str, limit: int) -> tuple[list[str], list[str], str]:
    """Training and test texts of a language, and where they are from."""
    path = data / "mono" / f"{tag}.jsonl.gz"
    if path.is_file():
        found = texts(path)[:limit]
        return [t for i, t in enumerate(found) if i % 10], found[::10], "mono"
    folder = data / "sib200" / LANGUAGES[tag]
    return texts(folder / "train.jsonl.gz"), texts(folder / "test.jsonl.gz"), "sib200"


def row(name: str, source: str, lines: str, row: Coverage, seconds: str) -> str:
    """One line of the table."""
    cells = [name, source, lines, f"{100 * row.unknown_rate:.2f} %", f"{row.fertility:.2f} a {row.fertility_unit}"]
    cells += [f"{100 * row.round_trip_exact:.1f} %", f"{100 * row.round_trip_normalised:.1f} %", seconds]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure every language and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with mono/ and sib200/")
    parser.add_argument("--out", type=Path, help="Markdown file to write; otherwise printed only")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--size", type=int, default=2000)
    parser.add_argument("--limit", type=int, default=10**9, help="first N lines of a mono file")
    parser.add_argument("--keep-characters", default="")
    arguments = parser.parse_args()
    columns = ["language", "text", "lines", "unknown", "tokens", "exact", "exact but for NFC and spaces", "seconds"]
    table = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for tag in LANGUAGES:
        train, test, source = split(arguments.data, tag, arguments.limit)
        old = read_tokenizer(arguments.model)
        start = time.process_time()
        new = extend_vocabulary(old, train, size=arguments.size, keep_characters=arguments.keep_characters).tokenizer
        seconds = time.process_time() - start
        before, after = (r.total for r in compare_coverage([old, new], [(text, tag) for text in test]))
        counts = f"{len(train):,} + {len(test):,}"
        table.append(row(f"{language_name(tag)} before", source, counts, before, ""))
        table.append(row(f"{language_name(tag)} after", "", "", after, f"{seconds:.0f}"))
        print("\n".join(table[-2:]), flush=True)
    options = f" --limit {arguments.limit}" if arguments.limit < 10**9 else ""
    options += f" --keep-characters {arguments.keep_characters}" if arguments.keep_characters else ""
    command = f"python benchmarks/coverage.py ../shared/data --size {arguments.size}{options}"
    text = f"`{command}`\n\n" + "\n".join(table) + "\n"
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
