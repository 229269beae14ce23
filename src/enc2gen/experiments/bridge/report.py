"""Stage `report` of a bridge recipe: tables per language and script as Markdown, HTML and on the terminal; pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from enc2gen.evaluation.layer_weights import weights_html
from enc2gen.experiments.bridge.analysis import read_alignment, read_weights
from enc2gen.experiments.bridge.figures import draw_alignment, draw_language_weights, language_label, save_figure
from enc2gen.experiments.bridge.recipe import BridgeRecipe
from enc2gen.experiments.workspace import Workspace
from enc2gen.training.checkpoint import writing

NOTHING = "\N{EN DASH}"
CONTROL_LABELS = {"majority": "majority class", "probe": "linear probe on the encoder", "llm_alone": "LLM alone"}


def write_report(recipe: BridgeRecipe, workspace: Workspace, results: Mapping[str, Any]) -> Path:
    """Write `results.md`, `report.html` and `figures/`; returns the path of `report.html`.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = workspace.root / "report.html"
    pictures, weights = _pictures(recipe, workspace)
    tables = result_tables(results)
    markdown = "\n".join([f"# {recipe.name}", "", recipe.description, "", *(_markdown(table) for table in tables)])
    environment = Environment(
        loader=PackageLoader("enc2gen.experiments", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("bridge.html.j2").render(
        recipe=recipe,
        recipe_yaml=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        results=results,
        tables=tables,
        pictures=pictures,
        weights=weights,
    )
    with writing(path):
        (workspace.root / "results.md").write_text(markdown, encoding="utf-8", errors="replace")
        path.write_text(html, encoding="utf-8", errors="replace")
    return path


def _pictures(recipe: BridgeRecipe, workspace: Workspace) -> tuple[list[tuple[str, Markup]], list[tuple[str, Markup]]]:
    """Heat maps as (caption, SVG), also saved in `figures/`; and tables of layer weights as (bridge, HTML)."""
    drawn, tables = [], []
    if (table := read_alignment(workspace)) is not None:
        caption = f"Alignment of each language with {language_label(table.english)}, before training (MEXA)"
        drawn.append((caption, draw_alignment(table), "alignment"))
    for name in recipe.bridges:
        if (found := read_weights(workspace, name)) is not None:
            rows, layers = found
            drawn.append((f"Learned layer weights of {name}", draw_language_weights(rows, layers), f"weights-{name}"))
            tables.append((name, Markup(weights_html(rows, layers))))
    pictures = []
    for caption, figure, name in drawn:
        _, svg = save_figure(figure, workspace.root / "figures" / name)
        text = svg.read_text(encoding="utf-8")
        pictures.append((caption, Markup(text[text.index("<svg") :])))
    return pictures, tables


def result_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All tables: `title`, `note`, `header` and `rows` of text."""
    tables = []
    if results["languages"]:
        tables += [_summary(results), _groups(results), _languages(results)]
        if results["alignment"] is not None:
            tables.append(_correlations(results))
    if any(entry["pairs"] for entry in results["bridges"].values()):
        tables.append(_pairs(results))
    if results["search"]:
        tables.append(_search(results))
    return [*tables, _training(results)]


def systems(results: Mapping[str, Any]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Bridges, then controls: name -> (label, its accuracies by the first method); those without any are left out."""
    found = {name: (name, entry["accuracy"].get(results["method"])) for name, entry in results["bridges"].items()}
    found |= {name: (CONTROL_LABELS.get(name, name), entry["accuracy"]) for name, entry in results["controls"].items()}
    return {name: (label, accuracy) for name, (label, accuracy) in found.items() if accuracy}


def _points(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


def _with_interval(score: Mapping[str, Any] | None) -> str:
    return NOTHING if score is None else f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def _summary(results: Mapping[str, Any]) -> dict[str, Any]:
    home = ", ".join(language_label(language) for language in results["train_languages"])
    reference = results["reference"]
    header = ["system", f"{home} (trained)", "other languages", "transferred", "without Latin letters"]
    header += [f"against {reference}"] if reference else []
    rows = []
    for name, (label, accuracy) in systems(results).items():
        groups = accuracy["groups"]
        row = [label, _with_interval(accuracy["trained"]), _with_interval(groups.get("transfer"))]
        share = accuracy["transferred_share"]
        row += [NOTHING if share is None else f"{share:.0f} %", _with_interval(groups.get("non-Latin"))]
        if reference:
            paired = results["paired"].get(name, {}).get(reference, {}).get("groups", {}).get("transfer")
            row.append(NOTHING if paired is None else _signed(paired))
        rows.append(row)
    note = (
        "Accuracy in percent with 95 % intervals (items and seeds resampled). Other languages: mean over all that were "
        "not trained on. Transferred: that mean as a share of the accuracy in the trained language. Against: paired "
        "difference over the other languages, in points."
    )
    return {"title": "Accuracy", "note": note, "header": header, "rows": rows}


def _signed(difference: Mapping[str, Any]) -> str:
    return f"{difference['value']:+.1f} [{difference['low']:+.1f}, {difference['high']:+.1f}]"


def _groups(results: Mapping[str, Any]) -> dict[str, Any]:
    found = systems(results)
    names = sorted(
        {group for _, accuracy in found.values() for group in accuracy["groups"]} - {"transfer", "non-Latin"}
    )
    counts = {name: sum(results["scripts"][tag] == name for tag in _others(results)) for name in names}
    rows = [
        [label, *(_points((accuracy["groups"].get(name) or {}).get("value")) for name in names)]
        for label, accuracy in found.values()
    ]
    header = ["system", *(f"{name} ({counts[name]})" for name in names)]
    return {"title": "By script", "note": "Mean over the languages of each script.", "header": header, "rows": rows}


def _others(results: Mapping[str, Any]) -> list[str]:
    return [language for language in results["languages"] if language not in results["train_languages"]]


def _languages(results: Mapping[str, Any]) -> dict[str, Any]:
    found = systems(results)
    rows = []
    for language in results["languages"]:
        values = [accuracy["languages"].get(language) for _, accuracy in found.values()]
        rows.append([f"{language_label(language)} ({language})", *(_points((v or {}).get("value")) for v in values)])
    first = next(iter(found.values()))[1]["languages"]
    sizes = sorted({entry["n"] for entry in first.values()})
    items = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    header = ["language", *(label for label, _ in found.values())]
    return {"title": "By language", "note": f"{items} test texts a language.", "header": header, "rows": rows}


def _correlations(results: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        [name, *(NOTHING,) * 2]
        if found is None
        else [
            CONTROL_LABELS.get(name, name),
            f"{found['pearson']:.2f} [{found['pearson_low']:.2f}, {found['pearson_high']:.2f}]",
            f"{found['spearman']:.2f} [{found['spearman_low']:.2f}, {found['spearman_high']:.2f}]",
        ]
        for name, found in results["alignment"]["correlation"].items()
    ]
    note = "Does alignment with the trained language, known before training, foretell accuracy? Over languages."
    return {"title": "Alignment and accuracy", "note": note, "header": ["system", "Pearson", "Spearman"], "rows": rows}


def _pairs(results: Mapping[str, Any]) -> dict[str, Any]:
    measured = {name: entry["pairs"] for name, entry in results["bridges"].items()}
    measured |= {CONTROL_LABELS.get(n, n): entry["pairs"] for n, entry in results["controls"].items() if entry["pairs"]}
    groups = {group: list(metrics) for pairs in measured.values() for group, metrics in pairs.items()}
    columns = [(group, metric) for group, metrics in groups.items() for metric in metrics]
    rows = [
        [name, *(_points((pairs.get(group, {}).get(metric) or {}).get("value")) for group, metric in columns)]
        for name, pairs in measured.items()
    ]
    header = ["system", *(f"{group} {metric}" for group, metric in columns)]
    return {"title": "Writing", "note": "Mean over seeds.", "header": header, "rows": rows}


def _search(results: Mapping[str, Any]) -> dict[str, Any]:
    rates = sorted({rate for losses in results["search"].values() for rate in losses}, key=float)
    rows = []
    for name, losses in results["search"].items():
        best = min(losses, key=lambda rate: (losses[rate], float(rate)))
        shown = {rate: f"{loss:.3f}" + (" *" if rate == best else "") for rate, loss in losses.items()}
        rows.append([name, *(shown.get(rate, NOTHING) for rate in rates)])
    note = "Development loss in the trained language, first seed; * is chosen."
    return {"title": "Learning rates", "note": note, "header": ["bridge", *rates], "rows": rows}


def _training(results: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for name, entry in results["bridges"].items():
        runs = [stage for stages in entry["training"].values() for stage in stages.values()]
        seconds = sum(run["seconds"] for run in runs) / len(entry["seeds"])
        rate = f"{entry['learning_rate']:g}"
        rows.append([name, f"{entry['parameters']:,}", rate, str(len(entry["seeds"])), f"{seconds:,.0f}"])
    header = ["bridge", "parameters that learn", "learning rate", "seeds", "seconds a seed"]
    return {"title": "Training", "note": "", "header": header, "rows": rows}


def _markdown(table: Mapping[str, Any]) -> str:
    lines = [f"## {table['title']}", "", *([table["note"], ""] if table["note"] else [])]
    lines.append("| " + " | ".join(table["header"]) + " |")
    lines.append("| --- |" + " ---: |" * (len(table["header"]) - 1))
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table["rows"]]
    return "\n".join([*lines, ""])


def print_results(results: Mapping[str, Any], console: Console) -> None:
    """The tables that fit a terminal."""
    for table in result_tables(results):
        if table["title"] == "By script" or len(table["header"]) > 8:
            continue
        shown = Table(title=table["title"], title_justify="left", title_style="bold", caption_justify="left")
        for number, name in enumerate(table["header"]):
            shown.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
        for row in table["rows"]:
            shown.add_row(*row)
        console.print(shown)
