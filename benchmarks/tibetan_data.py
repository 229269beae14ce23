"""Lay out ../shared/data as a newcomer would have it: a folder of raw Tibetan text files, and pairs split by document.

    python benchmarks/tibetan_data.py ../shared/data data/tibetan

writes data/tibetan/text/*.txt (raw text, one paragraph a line) and data/tibetan/pairs/{train,dev,test}.jsonl
(English and Tibetan sentences of the 84000 translation memory; manual alignments of at most 160 characters a side;
whole documents are held out). Deterministic: the split is a hash of the document's name.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LONGEST = 160
"""Characters on either side, so that the recipe's 128 tokens hold a pair."""
LINES_PER_FILE = 200


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def split_of(document: str) -> str:
    """`test` for about 12 % and `dev` for about 8 % of the documents (many are short), else `train`."""
    share = int.from_bytes(hashlib.sha256(document.encode()).digest()[:4], "big") / 2**32
    return "test" if share < 0.12 else "dev" if share < 0.2 else "train"


def main() -> None:
    """Write both folders and say what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with mono/ and parallel/")
    parser.add_argument("target", type=Path, help="folder to write")
    arguments = parser.parse_args()
    text, pairs = arguments.target / "text", arguments.target / "pairs"
    for folder in (text, pairs):
        folder.mkdir(parents=True, exist_ok=True)
    paragraphs = [row["text"] for row in rows(arguments.source / "mono" / "bo.jsonl.gz")]
    for start in range(0, len(paragraphs), LINES_PER_FILE):
        name = f"bo-{start // LINES_PER_FILE:03d}.txt"
        (text / name).write_text("\n".join(paragraphs[start : start + LINES_PER_FILE]) + "\n", encoding="utf-8")
    found: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    seen: set[tuple[str, str]] = set()
    skipped: Counter[str] = Counter()
    for row in rows(arguments.source / "parallel" / "bo-en.84000.jsonl.gz"):
        key = (row["tgt"], row["src"])
        reason = (
            "machine-aligned"
            if row["method"] == "v3"
            else "long"
            if max(map(len, key)) > LONGEST
            else "repeated"
            if key in seen
            else None
        )
        if reason:
            skipped[reason] += 1
            continue
        seen.add(key)
        line = json.dumps({"en": row["tgt"], "bo": row["src"], "doc": row["doc"]}, ensure_ascii=False)
        found[split_of(row["doc"])].append(line)
    trained = {json.loads(line)["en"] for line in found["train"]}
    for split in ("dev", "test"):
        kept = [line for line in found[split] if json.loads(line)["en"] not in trained]
        skipped["source also in train"] += len(found[split]) - len(kept)
        found[split] = kept
    for split, lines in found.items():
        (pairs / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(paragraphs):,} paragraphs in {text}")
    print(f"pairs in {pairs}: " + ", ".join(f"{split} {len(lines):,}" for split, lines in found.items()))
    print("left out: " + ", ".join(f"{reason} {count:,}" for reason, count in skipped.items()))


if __name__ == "__main__":
    main()
