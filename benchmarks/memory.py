"""Peak memory of training against the size of a batch, the full vocabulary: each side alone on the machine, so that it
may take all of its memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.measuring import Side, environment, peak
from benchmarks.training import ours, reference
from benchmarks.workloads import load_pairs

SIDES = {"ours": ours, "reference": reference}
UPDATES = 2  # the first one makes AdamW's moments


def run(question: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure `train_memory` at a quarter, a half and all of `target_tokens`; return the entry of the results file."""
    pairs, origin = load_pairs(options["examples"])
    precision = options["precision"] or "bf16"
    rows: dict[str, dict[str, Any]] = {}
    for share in (4, 2, 1):
        settings = {
            "model": options["model"],
            "trimmed": False,
            "pairs": pairs,
            "precision": precision,
            "compile": False,
            "padding_free": False if options["padded"] else "auto",
            "batches": "by-source",  # whose fullest batch is measured
            "target_tokens": options["target_tokens"] // share,
            "steps": 1,
            "seed": options["seed"],
        }
        peaks: dict[str, int] = {}
        for name, work in SIDES.items():
            with environment(options["threads"], options["device"]), Side(work, settings) as side:
                reports = [side.turn() for _ in range(UPDATES)]
            peaks[name] = peak(reports)
            if name == "ours":
                first = reports[0]
        rows[f"{first['targets']:,.0f} target tokens"] = {
            "ours, GB": peaks["ours"] / 1e9,
            "reference, GB": peaks["reference"] / 1e9,
            "ratio": peaks["ours"] / peaks["reference"],
        }
    return {
        "speedup": None,
        "memory_ratio": rows[list(rows)[-1]]["ratio"],
        "spread": None,
        "limit_fraction": None,
        "rows": rows,
        "setting": f"{options['model']}, vocabulary {first['vocabulary']:,}, {precision}, {UPDATES} updates of one "
        f"batch in a process of its own for each figure; {origin}",
    }
