"""What writing one sentence costs when there are 1, 10, 100, ... of them: seconds, and the peak memory of a process
that writes just so many."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.measuring import Side, environment, peak
from benchmarks.writing import load_task, write

NEW_TOKENS = 10  # short outputs: 10,000 of them must not take an hour
REPEATED_BELOW = 100  # sizes that are over so soon that the median of several turns is taken


def run(question: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure `generation_scaling` and return the entry of the results file.

    `memory_ratio` is the peak memory with the most sentences over that with a tenth of them, `linearity` the same of
    the seconds per sentence; both are 1 where cost is linear and memory flat.
    """
    most = options["most"]
    task = load_task(options, most)
    sizes = [size for size in (1, 10, 100, 1_000, 10_000, 100_000) if size < most] + [most]
    precision = options["precision"] or "fp32"
    tokens = min(NEW_TOKENS, options["max_new_tokens"])
    settings = {
        "task": task,
        "model": options["model"],
        "growth": "swcm",
        "trimmed": True,
        "seed": options["seed"],
        "decoding": {"num_beams": 4, "max_new_tokens": tokens, "engine": "native", "precision": precision},
    }
    rows: dict[str, dict[str, Any]] = {}
    for size in sizes:
        with environment(options["threads"], options["device"]), Side(write, settings) as side:
            side.turn({"sentences": 1})  # warm-up
            turns = options["turns"] if size < REPEATED_BELOW else 1
            reports = [side.turn({"sentences": size}) for _ in range(turns)]
        seconds = statistics.median(report["seconds"] for report in reports)
        rows[f"{size:,}"] = {
            "seconds": seconds,
            "milliseconds per sentence": 1000 * seconds / size,
            "peak memory, GB": peak(reports) / 1e9,
        }
    last, before = list(rows.values())[-1], list(rows.values())[-2]
    linearity = last["milliseconds per sentence"] / before["milliseconds per sentence"]
    memory = last["peak memory, GB"] / before["peak memory, GB"]
    return {
        "speedup": None,
        "memory_ratio": memory,
        "spread": None,
        "limit_fraction": None,
        "linearity": linearity,
        "remarks": {f"cost of a sentence with {sizes[-1]:,} over that with {sizes[-2]:,}": f"{linearity:.2f}"},
        "rows": rows,
        "setting": f"{options['model']}, trimmed vocabulary, {precision}, 4 beams, at most {tokens} new tokens; "
        f"{task.origin}; a process for each size",
    }
