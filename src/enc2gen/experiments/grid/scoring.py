"""Scores of an experiment's cells over seeds, and paired differences to the reference, from the runs' outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from enc2gen.evaluation.across_seeds import paired_difference, score_over_seeds
from enc2gen.evaluation.metrics import METRICS
from enc2gen.evaluation.significance import Statistics
from enc2gen.experiments.grid.finished import Finished, Sentence

BOOTSTRAP_SEED = 0
"""Of all draws: cells with equal numbers of seeds and sentences see the same ones."""


def scores_and_differences(
    done: Mapping[str, Sequence[Finished]], headline: str, reference: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores: cell -> language -> metric -> score; and differences: cell -> language -> difference to the reference.

    A cell is compared with the cell of variant `reference` of the same task and size, in the metric `headline`: on the
    seeds and the test sentences that both have.

    Raises:
        ConfigError: runs were scored with different settings.
    """
    scores: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    references = {group(found): found for found in done.values() if found[0].run.variant == reference}
    for cell, found in done.items():
        for language in shared_languages(found):
            for metric in found[0].run.recipe.evaluate.metrics:
                if (score := _score(found, language, metric)) is not None:
                    scores.setdefault(cell, {}).setdefault(language, {})[metric] = score
        base = references.get(group(found), found)
        for language in shared_languages([*found, *base]) if base is not found else ():
            if (difference := _difference(found, base, language, headline)) is not None:
                differences.setdefault(cell, {})[language] = difference
    return scores, differences


def shared_languages(found: Sequence[Finished]) -> list[str]:
    """Languages that all these runs wrote."""
    return [tag for tag in found[0].outputs if all(tag in one.outputs for one in found)]


def group(found: Sequence[Finished]) -> tuple[str | None, int | None]:
    """Task and size of a cell: what it shares with those that it is compared with."""
    return found[0].run.task, found[0].run.size


def _score(found: Sequence[Finished], language: str, metric: str) -> dict[str, Any] | None:
    runs = _by_seed(found, language, metric, _shared_sentences(found, language))
    if not runs:
        return None
    resamples = found[0].run.recipe.evaluate.resamples
    score = score_over_seeds(metric, runs, resamples=resamples, seed=BOOTSTRAP_SEED)
    fields = ("value", "low", "high", "n", "signature")
    by_seed = {str(seed): statistics.value() for seed, statistics in runs.items()}
    return {**{name: getattr(score, name) for name in fields}, "seeds": by_seed}


def _difference(
    found: Sequence[Finished], base: Sequence[Finished], language: str, metric: str
) -> dict[str, Any] | None:
    """This cell minus the reference; None without a common seed or sentence, or where the metric is not measurable."""
    seeds = {one.run.seed for one in found} & {one.run.seed for one in base}
    own, other = ([one for one in runs if one.run.seed in seeds] for runs in (found, base))
    sentences = _shared_sentences([*own, *other], language) if seeds else []
    first, second = (_by_seed(runs, language, metric, sentences) for runs in (own, other))
    if not first or not second:
        return None
    resamples = found[0].run.recipe.evaluate.resamples
    difference = paired_difference(first, second, resamples=resamples, seed=BOOTSTRAP_SEED)
    by_seed = {str(seed): first[seed].value() - second[seed].value() for seed in first}
    left_out = max(len(one.outputs[language]) for one in (*own, *other)) - len(sentences)
    return {"metric": metric, **asdict(difference), "seeds": by_seed, "left_out": left_out}


def _by_seed(
    found: Sequence[Finished], language: str, metric: str, sentences: Sequence[Sentence]
) -> dict[int, Statistics]:
    """Seed -> statistics on `sentences`; empty where the metric cannot be measured, or nothing is to be measured."""
    references = [list(texts) for _, texts in sentences]
    runs = {}
    for one in found if sentences else ():
        hypotheses = _hypotheses(one, language, sentences)
        if (statistics := METRICS.get(metric).statistics(hypotheses, references, language=language)) is not None:
            runs[one.run.seed] = statistics
    return runs if len(runs) == len(found) else {}


def _hypotheses(one: Finished, language: str, sentences: Sequence[Sentence]) -> list[str]:
    """What a run wrote for these sentences, in their order; a repeated sentence has its outputs in turn."""
    written: dict[Sentence, list[str]] = {}
    for sentence, hypothesis in one.outputs[language]:
        written.setdefault(sentence, []).append(hypothesis)
    turn: Counter[Sentence] = Counter()
    hypotheses = []
    for sentence in sentences:
        hypotheses.append(written[sentence][turn[sentence]])
        turn[sentence] += 1
    return hypotheses


def _shared_sentences(found: Sequence[Finished], language: str) -> list[Sentence]:
    """Test sentences that all these runs wrote, in the order of the first: all of them, where there is one test set."""
    counts = [Counter(sentence for sentence, _ in one.outputs[language]) for one in found]
    shared = counts[0]
    for count in counts[1:]:
        shared &= count
    sentences = []
    for sentence, _ in found[0].outputs[language]:
        if shared[sentence] > 0:
            sentences.append(sentence)
            shared[sentence] -= 1
    return sentences
