"""Stage `report`: everything a run has shown, in one self-contained HTML file and one picture of its loss curves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from enc2gen.corpora.languages import language_name
from enc2gen.corpora.report_pages import html_environment, replace_text, writing_report
from enc2gen.experiments import findings
from enc2gen.experiments.curves import draw_curves, read_curves, save_png, to_svg
from enc2gen.experiments.findings import METRIC_LABELS, METRIC_TERMS, SYSTEM_TERMS, Verdict, compare
from enc2gen.experiments.recipe import Recipe, as_yaml
from enc2gen.experiments.terminal import print_results
from enc2gen.experiments.workspace import Workspace

__all__ = ["Verdict", "compare", "print_results", "write_report"]

NOTHING = "\N{EN DASH}"
"""In the place of a number that was not measured."""

ORIGIN_TERMS = {
    "copied": "starts with the value of the encoder's weight, then trained on its own",
    "tied": "is the encoder's weight itself, during training too",
    "random": "starts at random",
    "constant": "starts at 0 or 1, as new norms and biases do",
}


def write_report(recipe: Recipe, workspace: Workspace, metrics: Mapping[str, Any]) -> Path:
    """Write `report.html` and, where losses were recorded, `curves.png`.

    Args:
        metrics: what `metrics.json` holds.

    Returns:
        The path of `report.html`.

    Raises:
        OutputError: the folder cannot be written.
        CheckpointError: a file of the run is damaged.
    """
    context = _context(recipe, workspace, metrics)
    picture = workspace.root / "curves.png"
    path = workspace.root / "report.html"
    curves = read_curves(recipe, workspace)
    with writing_report(path):
        picture.unlink(missing_ok=True)  # of an earlier run, with other curves
        if curves:
            figure = draw_curves(curves)
            save_png(figure, picture)
            context["curves"] = Markup(to_svg(figure))
        replace_text(path, _environment().get_template("report.html.j2").render(context))
    return path


def _environment() -> Environment:
    environment = html_environment("enc2gen.experiments")
    environment.filters["points"] = lambda value: NOTHING if value is None else f"{value:.1f}"
    environment.filters["nats"] = lambda value: NOTHING if value is None else f"{value:.2f}"
    environment.filters["thousands"] = lambda value: NOTHING if value is None else f"{value:,.0f}"
    environment.filters["duration"] = lambda value: NOTHING if value is None else findings.duration(value)
    return environment


def _context(recipe: Recipe, workspace: Workspace, metrics: Mapping[str, Any]) -> dict[str, Any]:
    outputs = findings.read_outputs(recipe, workspace)
    durations = findings.durations(recipe, metrics)
    tags = findings.languages_of(recipe, metrics)
    names = list(metrics["higher_is_better"])
    return {
        "recipe": recipe,
        "recipe_yaml": as_yaml(recipe),
        "metrics": metrics,
        "main": recipe.main_system,
        "machine": _machine(metrics.get("machine", {})),
        "language_names": [f"{language_name(tag)} ({tag})" for tag in recipe.languages],
        "durations": durations,
        "total_seconds": sum(seconds for _, seconds in durations),
        "headline": METRIC_LABELS.get(findings.headline_metric(metrics), findings.headline_metric(metrics)),
        "columns": [{"name": name, "label": METRIC_LABELS.get(name, name)} for name in names],
        "metric_terms": [(METRIC_LABELS.get(name, name), METRIC_TERMS[name]) for name in names if name in METRIC_TERMS],
        "system_terms": _system_terms(recipe, metrics),
        "languages": [_language(recipe, metrics, tag) for tag in tags],
        "signatures": _signatures(metrics),
        "paired": _paired(metrics),
        "encoders": _encoders(recipe, metrics),
        "source_use": _source_use(metrics, tags),
        "left_out_of_losses": findings.left_out_of_losses(metrics, tags),
        "denoising": findings.denoising_rows(metrics),
        "samples": findings.choose_samples(outputs, recipe.evaluate.samples, recipe.seed),
        "language_name": language_name,
        "curves": None,
        "smoothed": any(
            section is not None and section.training.label_smoothing > 0
            for section in (recipe.pretrain, recipe.finetune)
        ),
        "origins": _origins(recipe, workspace),
        "origin_terms": ORIGIN_TERMS,
        "command": findings.generate_command(recipe, workspace, outputs),
    }


def _machine(machine: Mapping[str, Any]) -> str:
    cores = machine.get("cores")
    parts = [
        machine.get("processor"),
        f"{cores} core{'' if cores == 1 else 's'}" if cores else None,
        machine.get("gpu") or "no GPU",
    ]
    return ", ".join(part for part in parts if part)


def _system_terms(recipe: Recipe, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each system is, in one sentence; of the best constant, its text per language, too."""
    terms = []
    for name, scores in metrics["systems"].items():
        preset = recipe.systems[name].preset if name in recipe.systems else name
        constants = {tag: entry["text"] for tag, entry in scores.items() if "text" in entry}
        term = SYSTEM_TERMS.get(preset, f"the preset {preset}.")
        options = recipe.systems[name].options if name in recipe.systems else {}
        if options:
            term = f"{term} Its own options: {json.dumps(options, ensure_ascii=False)}."
        own = recipe.systems[name].encoder if name in recipe.systems else {}
        if own:
            term = f"{term} Its encoder's own settings: {json.dumps(own, ensure_ascii=False)}."
        terms.append({"name": name, "term": term, "constants": constants})
    return terms


def _language(recipe: Recipe, metrics: Mapping[str, Any], tag: str) -> dict[str, Any]:
    """Verdict and score table of a language."""
    systems, names = metrics["systems"], metrics["higher_is_better"]
    best, scale = {}, {}
    for name, higher in names.items():
        scores = [entry for system in systems if (entry := systems[system].get(tag, {}).get(name)) is not None]
        values = [score["value"] for score in scores]
        best[name] = (max if higher else min)(values) if values else None
        scale[name] = max([score["high"] for score in scores], default=0) or 100
    rows = []
    for system in systems:
        scores = systems[system].get(tag, {})
        cells = [_cell(scores.get(name), best[name], scale[name]) for name in names]
        rows.append({"system": system, "trained": system in recipe.systems, "cells": cells})
    sentence = findings.verdict_sentence(metrics, tag)
    answer, _, reason = sentence.partition(": ")
    return {
        "tag": tag,
        "name": language_name(tag),
        "heading": findings.language_heading(metrics, tag),
        "answer": answer,
        "reason": reason,
        "rows": rows,
    }


def _cell(score: Mapping[str, Any] | None, best: float | None, scale: float) -> dict[str, Any] | None:
    """A score with its interval as percent of the widest one in the column, for the small bar below."""
    if score is None:
        return None
    start, end = 100 * score["low"] / scale, 100 * score["high"] / scale
    bar = {
        "start": round(start, 1),
        "width": round(max(end - start, 1), 1),
        "dot": round(100 * score["value"] / scale, 1),
    }
    return {**score, "best": score["value"] == best, "bar": bar}


def _signatures(metrics: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Metric -> the different signatures its values were computed with."""
    found: dict[str, dict[str, None]] = {}
    for scores in metrics["systems"].values():
        for by_metric in scores.values():
            for name, score in by_metric.items():
                if isinstance(score, Mapping) and score.get("signature"):
                    found.setdefault(METRIC_LABELS.get(name, name), {})[score["signature"]] = None
    return [(name, list(signatures)) for name, signatures in found.items()]


def _source_use(metrics: Mapping[str, Any], tags: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the source-use table, language by language."""
    rows = []
    for tag in tags:
        for system, by_language in metrics.get("source_use", {}).items():
            if tag in by_language:
                rows.append(
                    {
                        "language": language_name(tag),
                        "system": system,
                        "chrf": metrics["systems"][system].get(tag, {}).get("chrf++"),
                        "permuted": by_language[tag].get("permuted_chrf++"),
                        "reading": findings.source_reading(metrics, system, tag),
                        **{key: by_language[tag].get(key) for key in ("loss", "shuffled_loss", "gain")},
                        **{key: by_language[tag].get(key) for key in ("distinct_outputs", "outputs")},
                    }
                )
    return rows


def _paired(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the paired comparison, language by language."""
    return [
        {"language": language_name(tag), "system": system, **difference}
        for tag, others in metrics.get("paired", {}).items()
        for system, difference in others.items()
    ]


def _encoders(recipe: Recipe, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Vocabulary and adaptation of each encoder, with the systems that grew from it."""
    rows = []
    for variant, record in metrics.get("encoders", {}).items():
        extension = recipe.variants[variant].extend_vocabulary
        after = record["unknown_rate"]
        rows.append(
            {
                **record,
                "systems": [name for name in recipe.systems if findings.grows_from(recipe, name, variant)],
                "initialisation": extension.initialisation.method if extension else NOTHING,
                "unknown": [(tag, record["unknown_rate_before"][tag], rate) for tag, rate in after.items()],
            }
        )
    return rows


def _origins(recipe: Recipe, workspace: Workspace) -> list[dict[str, Any]]:
    """Summary of each system's init report; `report` is None for systems without one."""
    rows = []
    for name in recipe.systems:
        path = workspace.system(name, "initial", "init_report.json")
        report = workspace.read_json(path) if path.exists() else None
        total = sum(report["elements"].values()) if report else 0
        kinds = Counter(layer.partition(":")[0] for layer in report["plan"]) if report else Counter()
        layers = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        rows.append({"system": name, "report": report, "total": total, "layers": layers})
    return rows
