"""The main system against every other one, sentence by sentence: paired bootstrap of the headline metric."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from enc2gen.evaluation.metrics import METRICS
from enc2gen.evaluation.significance import paired_bootstrap
from enc2gen.experiments.findings import read_outputs
from enc2gen.experiments.recipe import Recipe
from enc2gen.experiments.workspace import Workspace


def paired_comparisons(recipe: Recipe, workspace: Workspace) -> dict[str, dict[str, dict[str, Any]]]:
    """Language -> other system -> difference (main minus other), 95 % interval and p-value (Koehn 2004, W04-3250).

    The metric is chrF++, or the recipe's first where that is not computed. Systems without an output for every
    sentence of a language are left out, and so are metrics that cannot be measured in it.
    """
    names = recipe.evaluate.metrics
    if not names:
        return {}
    name = "chrf++" if "chrf++" in names else names[0]
    metric, main = METRICS.get(name), recipe.main_system
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for tag, samples in read_outputs(recipe, workspace).items():
        references = [list(sample.references) for sample in samples]
        statistics = {
            system: metric.statistics([sample.outputs[system] for sample in samples], references, language=tag)
            for system in recipe.systems
            if all(system in sample.outputs for sample in samples)
        }
        own = statistics.pop(main, None)
        if own is None:
            continue
        for system, other in statistics.items():
            if other is not None:
                difference = paired_bootstrap(own, other, resamples=recipe.evaluate.resamples, seed=recipe.seed)
                found.setdefault(tag, {})[system] = {"metric": name, **asdict(difference)}
    return found
