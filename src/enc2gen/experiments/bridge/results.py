"""What a bridge run has measured, in one mapping: accuracies with intervals, paired differences, transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from enc2gen import __version__
from enc2gen.data.classification import script_of
from enc2gen.errors import DataError
from enc2gen.evaluation.accuracy import accuracy, macro_accuracy, macro_difference
from enc2gen.evaluation.alignment import correlation
from enc2gen.experiments.bridge.analysis import read_alignment
from enc2gen.experiments.bridge.evaluate import is_parallel, test_texts
from enc2gen.experiments.bridge.prepare import PreparedBridgeData
from enc2gen.experiments.bridge.recipe import BridgeRecipe
from enc2gen.experiments.bridge.systems import Step
from enc2gen.experiments.findings import Sample, choose_samples
from enc2gen.experiments.provenance import machine
from enc2gen.experiments.recipe import digest
from enc2gen.experiments.workspace import Workspace

SAMPLES = 5
"""Pairs of each language pair that are shown with what was written for them (our choice)."""

Correct = dict[str, list[list[int]]]
"""Language -> `[seeds, items]`, 1 for a right answer."""


def collect(
    recipe: BridgeRecipe,
    workspace: Workspace,
    last: Mapping[str, Sequence[tuple[int, Step]]],
    search: Mapping[str, Mapping[str, float | None]],
) -> dict[str, Any]:
    """What `results.json` holds.

    Args:
        last: bridge -> (seed, last step) of every seed.
        search: bridge -> learning rate -> development loss; None where training diverged.
    """
    data = PreparedBridgeData(workspace)
    summary, tests = data.summary, test_texts(recipe, data)
    averages = _Averages(recipe, is_parallel(tests) if tests else False)
    bridges = {name: _bridge(recipe, workspace, steps, averages) for name, steps in last.items()}
    controls = {name: _control(workspace, name, averages) for name in recipe.evaluate.controls}
    results: dict[str, Any] = {
        "recipe": recipe.name,
        "description": recipe.description,
        "recipe_hash": digest(recipe.model_dump(mode="json", exclude={"output"})),
        "enc2gen": __version__,
        "machine": machine(),
        "encoder": recipe.encoder.name,
        "llm": recipe.llm.name,
        "seeds": recipe.seeds,
        "method": recipe.evaluate.methods[0],
        "labels": summary["labels"],
        "languages": summary["languages"],
        "train_languages": summary["train_languages"],
        "scripts": {language: script_of(language) for language in summary["languages"]},
        "parallel": averages.parallel,
        "reference": recipe.reference,
        "bridges": bridges,
        "controls": controls,
        "search": {name: dict(losses) for name, losses in search.items()},
        "seconds": workspace.seconds(),
    }
    results["paired"] = _paired(recipe, results, averages, results["method"])
    results["paired_by"] = {
        method: _paired(recipe, results, averages, method) for method in recipe.evaluate.methods[1:] if tests
    }
    results["alignment"] = _alignment(recipe, workspace, results)
    results["samples"] = _samples(workspace, last, recipe.seeds[0])
    return results


class _Averages:
    """Accuracies of one system: per language, per script, on average over the languages that were not trained on."""

    def __init__(self, recipe: BridgeRecipe, parallel: bool) -> None:
        self.trained = recipe.task.train_languages if recipe.task else []
        self.parallel = parallel
        self.options: dict[str, Any] = {"resamples": recipe.evaluate.resamples, "seed": recipe.seeds[0]}

    def groups(self, correct: Correct) -> dict[str, Correct]:
        """Sets of languages that are averaged over: all but the trained ones, without Latin letters, each script."""
        other = {language: rows for language, rows in correct.items() if language not in self.trained}
        found = {"transfer": other, "non-Latin": {k: v for k, v in other.items() if script_of(k) != "Latn"}}
        for language, rows in other.items():
            found.setdefault(script_of(language), {})[language] = rows
        return {name: group for name, group in found.items() if group}

    def of(self, correct: Correct) -> dict[str, Any]:
        """Everything said about one system."""
        if not correct:
            return {}
        trained = {language: rows for language, rows in correct.items() if language in self.trained}
        groups = {
            name: _score(macro_accuracy(group, parallel=self.parallel, **self.options))
            for name, group in self.groups(correct).items()
        }
        at_home = _score(macro_accuracy(trained, parallel=self.parallel, **self.options)) if trained else None
        mean = groups.get("transfer")
        share = 100 * mean["value"] / at_home["value"] if mean and at_home and at_home["value"] else None
        return {
            "languages": {k: _score(accuracy(rows, **self.options)) | {"correct": rows} for k, rows in correct.items()},
            "trained": at_home,
            "groups": groups,
            "transferred_share": share,
        }

    def difference(self, first: Correct, second: Correct) -> dict[str, Any]:
        """Paired difference of two systems, for every group of languages and every language."""
        options = {"parallel": self.parallel, **self.options}
        groups, others = self.groups(first), self.groups(second)
        return {
            "groups": {name: asdict(macro_difference(groups[name], others[name], **options)) for name in groups},
            "languages": {k: asdict(macro_difference({k: first[k]}, {k: second[k]}, **self.options)) for k in first},
        }


def _score(score: Any) -> dict[str, Any]:
    return {"value": score.value, "low": score.low, "high": score.high, "n": score.n}


def _bridge(
    recipe: BridgeRecipe, workspace: Workspace, steps: Sequence[tuple[int, Step]], averages: _Averages
) -> dict[str, Any]:
    measured = {seed: workspace.read_json(step.folder(workspace) / "scores.json") for seed, step in steps}
    trained = {
        str(seed): {part.stage.name: workspace.read_json(part.folder(workspace) / "result.json") for part in step.chain}
        for seed, step in steps
    }
    first = next(iter(trained.values()))
    correct: dict[str, Correct] = {}
    for scores in measured.values():
        for method, by_language in scores["classification"].items():
            for language, row in by_language.items():
                correct.setdefault(method, {}).setdefault(language, []).append(row)
    last_stage = list(first)[-1]
    return {
        "seeds": [seed for seed, _ in steps],
        "parameters": first[last_stage]["parameters"],
        "learning_rate": first[last_stage]["learning_rate"],
        "training": trained,
        "accuracy": {method: averages.of(found) for method, found in correct.items()},
        "pairs": _pairs([scores["pairs"] for scores in measured.values()]),
    }


def _pairs(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Group -> metric -> mean over seeds, its range, mean of the intervals' ends, and each seed's score."""
    found: dict[str, Any] = {}
    for group in measured[0] if measured else ():
        for metric in measured[0][group]:
            scores = [scores[group][metric] for scores in measured if scores[group][metric] is not None]
            values = [score["value"] for score in scores]
            found.setdefault(group, {})[metric] = (
                {key: float(np.mean([score[key] for score in scores])) for key in ("value", "low", "high")}
                | {"least": min(values), "most": max(values), "seeds": scores}
                if scores
                else None
            )
    return found


def _control(workspace: Workspace, name: str, averages: _Averages) -> dict[str, Any]:
    scores = workspace.read_json(workspace.root / "controls" / f"{name}.json")
    correct = {language: [row] for language, row in scores["classification"].items()}
    return {
        "settings": scores["settings"],
        "accuracy": averages.of(correct),
        "pairs": _pairs([scores["pairs"]]),
    }


def _samples(
    workspace: Workspace, last: Mapping[str, Sequence[tuple[int, Step]]], seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Group -> a few tested pairs, drawn at random, with what each bridge wrote for them with its first seed."""
    found: dict[str, dict[tuple[str, tuple[str, ...]], dict[str, str]]] = {}
    for bridge, steps in last.items():
        path = steps[0][1].folder(workspace) / "outputs.jsonl"
        for row in workspace.read_lines(path):
            key = (row["source"], tuple(row["references"]) or (row["target"],))
            found.setdefault(row["group"], {}).setdefault(key, {})[bridge] = row["output"]
    outputs = {
        group: [Sample(source, references, written) for (source, references), written in pairs.items()]
        for group, pairs in found.items()
    }
    chosen = choose_samples(outputs, SAMPLES * len(outputs), seed)
    return {group: [asdict(sample) for sample in samples] for group, samples in chosen.items()}


def correct_of(results: Mapping[str, Any], system: str, method: str | None = None) -> Correct:
    """Correctness of a bridge by a method, the first if None, or of a control; empty without classification."""
    if system in results["bridges"]:
        found = results["bridges"][system]["accuracy"].get(method or results["method"], {})
    else:
        found = results["controls"][system]["accuracy"]
    return {language: entry["correct"] for language, entry in found.get("languages", {}).items()}


def _paired(recipe: BridgeRecipe, results: Mapping[str, Any], averages: _Averages, method: str) -> dict[str, Any]:
    """Bridge -> other system -> difference (bridge minus other), for the reference bridge and each control."""
    others = [*([recipe.reference] if recipe.reference else []), *results["controls"]]
    found: dict[str, Any] = {}
    for bridge in results["bridges"]:
        own = correct_of(results, bridge, method)
        for other in others if own else ():
            if other != bridge and (theirs := correct_of(results, other, method)):
                found.setdefault(bridge, {})[other] = averages.difference(own, theirs)
    return found


def _alignment(recipe: BridgeRecipe, workspace: Workspace, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """MEXA, and its correlation with the accuracy of every bridge and of the probe over languages.

    `correlation` takes the mean over layers, which tells the languages of a well aligned encoder apart;
    `correlation_best` the best layer, which is near 100 for most of them.
    """
    table = read_alignment(recipe, workspace)
    if table is None:
        return None
    return {
        "table": table.to_dict(),
        "correlation": _correlations(results, {row.language: row.mean for row in table.languages}),
        "correlation_best": _correlations(results, {row.language: row.best for row in table.languages}),
    }


def _correlations(results: Mapping[str, Any], scores: Mapping[str, float]) -> dict[str, Any]:
    """System -> correlation of `scores` with its accuracies; None with too few languages, or all alike."""
    found: dict[str, Any] = {}
    for system in [*results["bridges"], *(name for name in results["controls"] if name == "probe")]:
        accuracies = {language: 100 * float(np.mean(rows)) for language, rows in correct_of(results, system).items()}
        try:
            found[system] = asdict(correlation(scores, accuracies))
        except DataError:
            found[system] = None
    return found
