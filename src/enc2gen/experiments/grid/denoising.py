"""Held-out denoising of an experiment's cells over seeds, from the runs' `denoising.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from enc2gen.evaluation.across_seeds import paired_difference, score_over_seeds
from enc2gen.evaluation.significance import Floats, Statistics
from enc2gen.experiments.grid.finished import Finished, Texts
from enc2gen.experiments.grid.scoring import BOOTSTRAP_SEED, group

UNITS = {"nats_per_token": "tokens", "perplexity": "tokens", "nats_per_character": "characters"}
"""Measure -> what nats are divided by; perplexity is the exponential of nats per token."""

COMPARED = "nats_per_character"
"""The measure of differences: the one that does not depend on the vocabulary."""


def denoising(done: Mapping[str, Sequence[Finished]], reference: str) -> dict[str, Any]:
    """Cell -> language -> measure -> value, low, high, n and seeds; and `paired`: the difference to the reference cell.

    Lower is better. Cells without held-out texts are left out.
    """
    read = {cell: {one.run.seed: one.denoising for one in found} for cell, found in done.items()}
    references = {group(found): cell for cell, found in done.items() if found[0].run.variant == reference}
    results: dict[str, Any] = {}
    for cell, found in done.items():
        resamples = found[0].run.recipe.evaluate.resamples
        base = references.get(group(found), cell)
        for language in next(iter(read[cell].values())):
            runs = {name: _runs(read[cell], language, name) for name in UNITS}
            if not runs[COMPARED]:
                continue
            entry = results.setdefault(cell, {}).setdefault(language, {})
            for name, by_seed in runs.items():
                score = score_over_seeds(name, by_seed, resamples=resamples, seed=BOOTSTRAP_SEED, highest=None)
                seeds = {str(seed): statistics.value() for seed, statistics in by_seed.items()}
                entry[name] = {"value": score.value, "low": score.low, "high": score.high, "n": score.n, "seeds": seeds}
            theirs = _runs(read[base], language, COMPARED) if base != cell else {}
            if theirs.keys() & runs[COMPARED].keys() and _texts(read[base], language) == _texts(read[cell], language):
                pair = paired_difference(runs[COMPARED], theirs, resamples=resamples, seed=BOOTSTRAP_SEED)
                entry["paired"] = {"metric": COMPARED, **asdict(pair)}
    return results


def _texts(read: Mapping[int, Texts], language: str) -> list[str]:
    return list(next(iter(read.values())).get(language, {}))


def _runs(read: Mapping[int, Texts], language: str, measure: str) -> dict[int, Statistics]:
    """Seed -> statistics of a measure; empty unless all seeds measured the same texts."""
    wanted = _texts(read, language)
    if not wanted or any(list(texts.get(language, {})) != wanted for texts in read.values()):
        return {}
    return {seed: _statistics(list(texts[language].values()), measure) for seed, texts in read.items()}


def _statistics(texts: Sequence[Mapping[str, float]], measure: str) -> Statistics:
    rows = np.array([[text["nats"], text[UNITS[measure]]] for text in texts])

    def ratio(sums: Floats) -> Floats:
        return sums[:, 0] / sums[:, 1]

    def perplexity(sums: Floats) -> Floats:
        return np.asarray(np.exp(np.minimum(ratio(sums), 700.0)))  # the largest float is e^709

    return Statistics(rows, perplexity if measure == "perplexity" else ratio, f"measure:{measure}")
