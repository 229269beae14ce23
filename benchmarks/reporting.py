"""The results file and the tables made of it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from enc2gen.experiments.provenance import gpu, processor

RESULTS = Path(__file__).parent / "results" / "latest.json"
PACKAGES = ("torch", "transformers", "ctranslate2", "accelerate", "enc2gen")

TITLES = {
    "train_full_vocabulary": "Training, full vocabulary: against EncoderDecoderModel + Seq2SeqTrainer",
    "train_memory": "Memory of training, full vocabulary: against EncoderDecoderModel + Seq2SeqTrainer",
    "train_trimmed": "Training, trimmed vocabulary: against EncoderDecoderModel + Seq2SeqTrainer",
    "beam4": "Beam search with 4 beams: against transformers' generate on the same weights",
    "beam4_int8": "Beam search with 4 beams in int8: against transformers' generate in fp32 on the same weights",
    "ctranslate2_int8": "int8 on CPU: against CTranslate2 on an encoder-decoder of equal shape",
    "generation_scaling": "Cost of writing from one sentence to many",
    "faults": "Random kills while training",
}


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """Question -> entry; empty where nothing was measured yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def store(question: str, entry: Mapping[str, Any], path: Path = RESULTS) -> None:
    """Put an entry into the results file, in one step; those of other questions stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {**read_results(path), question: dict(entry)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def described(entry: Mapping[str, Any], *, command: str, seed: int, threads: int) -> dict[str, Any]:
    """The entry with when, where and how it was measured."""
    return {
        **entry,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": processor(), "threads": threads, "cores": os.cpu_count(), "gpu": gpu()},
        "command": command,
        "seed": seed,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def markdown(question: str, entry: Mapping[str, Any]) -> str:
    """An entry as a table, with a line on how it was measured above and the profile below."""
    name, _, model = question.partition("@")
    lines = [f"### {TITLES[name]}{f' ({model})' if model else ''}", "", _summary(entry), ""]
    rows: Mapping[str, Mapping[str, Any]] = entry["rows"]
    columns = list(rows)
    lines += [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    labels = dict.fromkeys(label for row in rows.values() for label in row)
    lines += [f"| {label} | {' | '.join(_cell(rows[c].get(label)) for c in columns)} |" for label in labels]
    for side, operations in entry.get("profile", {}).items():
        share = ", ".join(f"{operation} {part:.0%}" for operation, part in operations if part >= 0.02)
        lines += ["", f"Time of {side} by operation, profiled: {share}."]
    machine, versions = entry["machine"], entry["versions"]
    on = machine["gpu"] or f"{machine['processor']}, {machine['threads']} thread(s) of {machine['cores']} cores"
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    lines += ["", f"{entry['setting']}. {on}; {packages}; {entry['date'][:10]}; `{entry['command']}`"]
    return "\n".join(lines)


def _summary(entry: Mapping[str, Any]) -> str:
    parts = []
    if entry["speedup"] is not None:
        parts.append(f"**{entry['speedup']:.2f} times** as fast (spread over turns {entry['spread']:.0%})")
    if entry["memory_ratio"] is not None:
        parts.append(f"**{entry['memory_ratio']:.2f} times** the memory")
    if entry["limit_fraction"] is not None:
        parts.append(f"{entry['limit_fraction']:.0%} of the matrix-product rate")
    parts += [f"{label}: {value}" for label, value in entry.get("remarks", {}).items()]
    return "; ".join(parts) + "."


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
