"""Learning curves of an experiment: validation loss against tokens seen, and how many tokens a loss took.

Tokens are source and target tokens of one stage, as the trainer counts them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.recipe import STAGE_NAMES

MEAN = "mean"
"""In the place of a language: the mean over languages."""

Losses = list[tuple[float, dict[str, float]]]
"""(Tokens seen, language -> nats per target token); `MEAN` is among the languages."""


def stage_folders(run: GridRun) -> Iterator[tuple[str, Path]]:
    """(Stage, folder) of each training stage of a run, in order."""
    for stage in STAGE_NAMES:
        if getattr(run.recipe, stage) is not None:
            yield stage, run.folder / "systems" / run.recipe.main_system / stage


def read_losses(path: Path) -> Losses:
    """Validation losses in a trainer's `metrics.jsonl`; empty without the file. A half-written line is skipped.

    A validation record names its update; tokens are those of the training records around it, interpolated.
    """
    tokens: dict[int, float] = {0: 0.0}
    found: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record: dict[str, Any] = json.loads(line)
            if record["kind"] == "train":
                tokens[int(record["step"])] = float(record["tokens"])
            elif record["kind"] == "validation":
                losses = {**record["losses"], MEAN: record["mean"]}
                found[int(record["step"])] = {name: float(value) for name, value in losses.items() if value is not None}
        except (ValueError, KeyError, TypeError):
            continue
    if len(tokens) == 1:
        return []
    steps = sorted(tokens)
    known = [tokens[step] for step in steps]
    # Beyond the last training record the pace goes on: an update takes about as many tokens as those before.
    pace = known[-1] / steps[-1]
    return [
        (float(np.interp(step, steps, known)) + pace * max(0, step - steps[-1]), found[step]) for step in sorted(found)
    ]


def panels(runs: Sequence[GridRun]) -> dict[str, dict[str, dict[int, Losses]]]:
    """Panel ("pretraining", "fine-tuning", "fine-tuning, TASK, SIZE") -> variant -> seed -> losses."""
    found: dict[str, dict[str, dict[int, Losses]]] = {}
    tasks = {(run.task, run.size) for run in runs if run.kind == "task"}
    several = len({task for task, _ in tasks}) > 1
    for run in runs:
        # Variants may share a pretraining run: it is shown for each of them.
        for one in _with_start(run):
            for stage, folder in stage_folders(one):
                if losses := read_losses(folder / "metrics.jsonl"):
                    name = "pretraining" if stage == "pretrain" else "fine-tuning"
                    if one.kind == "task":
                        parts = [name, several and one.task, len(tasks) > 1 and one.size and f"{one.size:,} examples"]
                        name = ", ".join(str(part) for part in parts if part)
                    found.setdefault(name, {}).setdefault(run.variant, {})[run.seed] = losses
    return found


def _with_start(run: GridRun) -> list[GridRun]:
    return [*(_with_start(run.start) if run.start is not None else ()), run]


def tokens_to_reach(losses: Losses, language: str, target: float) -> float | None:
    """Tokens after which the loss of a language first was at `target` or below; None if it never was.

    Linear between two validations. What came before the first one is not known, so its tokens are the least answer.
    """
    before: tuple[float, float] | None = None
    for tokens, values in losses:
        if language not in values:
            continue
        value = values[language]
        if value <= target:
            if before is None or before[1] == value:
                return tokens
            return before[0] + (tokens - before[0]) * (before[1] - target) / (before[1] - value)
        before = (tokens, value)
    return None


def speed(found: Mapping[str, Mapping[str, Mapping[int, Losses]]], reference: str) -> dict[str, Any]:
    """Panel -> variant -> language -> tokens to the reference's best validation loss, as a share of the reference's.

    Each entry has `share`, the mean over seeds (None unless all of them reached that loss), and `seeds`.
    """
    shares: dict[str, Any] = {}
    for panel, variants in found.items():
        for variant in variants if reference in variants else ():
            common = [seed for seed in variants[variant] if seed in variants[reference]]
            if variant == reference or not common:
                continue
            for language in _languages(variants[reference][common[0]]):
                pairs = {seed: (variants[variant][seed], variants[reference][seed]) for seed in common}
                by_seed = {str(seed): _share(own, theirs, language) for seed, (own, theirs) in pairs.items()}
                known = [share for share in by_seed.values() if share is not None]
                mean = float(np.mean(known)) if len(known) == len(by_seed) else None
                entry = {"share": mean, "seeds": by_seed}
                shares.setdefault(panel, {}).setdefault(variant, {})[language] = entry
    return shares


def _languages(losses: Losses) -> list[str]:
    """Languages with a loss; without the mean where that is of one language."""
    names = list(dict.fromkeys(name for _, values in losses for name in values))
    return [name for name in names if name != MEAN] if len(names) == 2 else names


def _share(own: Losses, reference: Losses, language: str) -> float | None:
    values = [loss[language] for _, loss in reference if language in loss]
    if not values:
        return None
    needed, taken = (tokens_to_reach(losses, language, min(values)) for losses in (own, reference))
    return None if needed is None or not taken else needed / taken
