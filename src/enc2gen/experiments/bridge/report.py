"""Stage `report` of a bridge recipe: tables per language and script as Markdown, HTML and on the terminal; pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup
from matplotlib.figure import Figure
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from enc2gen.corpora.report_pages import html_environment, replace_text, writing_report
from enc2gen.evaluation.alignment import AlignmentTable, Correlation
from enc2gen.evaluation.layer_weights import weights_html, weights_markdown
from enc2gen.experiments.bridge.analysis import read_alignment, read_tokens, read_weights
from enc2gen.experiments.bridge.figures import (
    draw_alignment,
    draw_language_weights,
    draw_scatter,
    draw_token_weights,
    language_label,
    save_figure,
)
from enc2gen.experiments.bridge.recipe import BridgeRecipe
from enc2gen.experiments.bridge.tables import best_bridge, result_tables, systems
from enc2gen.experiments.recipe import as_yaml
from enc2gen.experiments.report_tables import markdown
from enc2gen.experiments.workspace import Workspace

Drawn = Iterator[tuple[str, Figure, str]]
"""Caption, picture, and the name of its file."""


def write_report(recipe: BridgeRecipe, workspace: Workspace, results: Mapping[str, Any]) -> Path:
    """Write `results.md`, `report.html` and `figures/`; returns the path of `report.html`.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = workspace.root / "report.html"
    pictures = _pictures(recipe, workspace, results)
    tables = result_tables(results)
    parts = [f"# {recipe.name}", "", recipe.description, "", *map(markdown, tables)]
    html = (
        html_environment("enc2gen.experiments")
        .get_template("bridge.html.j2")
        .render(
            recipe=recipe,
            recipe_yaml=as_yaml(recipe),
            results=results,
            tables=tables,
            pictures=pictures,
            weights=list(_weight_tables(recipe, workspace)),
        )
    )
    text = "\n".join([*parts, *_weight_sections(recipe, workspace)])
    with writing_report(path):
        replace_text(workspace.root / "results.md", text)
        replace_text(path, html)
    return path


def _pictures(recipe: BridgeRecipe, workspace: Workspace, results: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """All pictures as (caption, SVG), also saved in `figures/`."""
    pictures = []
    table = read_alignment(recipe, workspace)
    drawn = [*(_alignment_pictures(results, table) if table is not None else ()), *_weight_pictures(recipe, workspace)]
    for caption, figure, name in drawn:
        _, svg = save_figure(figure, workspace.root / "figures" / name)
        text = svg.read_text(encoding="utf-8")
        pictures.append((caption, Markup(text[text.index("<svg") :])))
    return pictures


def _alignment_pictures(results: Mapping[str, Any], table: AlignmentTable) -> Drawn:
    """Alignment by layer; and against the accuracy of the reference bridge and of the best other one."""
    english = language_label(table.english)
    yield (
        f"Alignment of each language with {english}, before training (MEXA)",
        draw_alignment(table, title=f"Alignment with {english}"),
        "alignment",
    )
    scores = {row.language: row.mean for row in table.languages}
    for bridge in filter(None, (results["reference"], best_bridge(results))):
        _, accuracy = systems(results).get(bridge, ("", {"languages": {}}))
        accuracies = {language: entry["value"] for language, entry in accuracy["languages"].items()}
        if scores.keys() & accuracies.keys():
            found = results["alignment"]["correlation"][bridge]
            figure = draw_scatter(
                scores,
                accuracies,
                Correlation(**found) if found else None,
                x_label=f"alignment with {english} (MEXA, mean over layers, %)",
                y_label=f"accuracy of {bridge} (%)",
                title=f"{bridge}: alignment before training, accuracy after it",
            )
            yield f"Alignment before training, and the accuracy of {bridge} after it", figure, f"scatter-{bridge}"


def _weight_pictures(recipe: BridgeRecipe, workspace: Workspace) -> Drawn:
    """Learned layer weights: of each language; and of each token of a text and its translation."""
    for bridge in recipe.bridges:
        if (found := read_weights(recipe, workspace, bridge)) is not None:
            figure = draw_language_weights(*found, title=f"{bridge}: weight of each layer")
            yield f"Learned layer weights of {bridge}, mean over tokens", figure, f"weights-{bridge}"
        if (tokens := read_tokens(recipe, workspace, bridge)) is not None:
            texts, layers = tokens
            highest = max(float(weights.weights.max()) for weights in texts.values())
            for language, weights in texts.items():
                label = language_label(language)
                title = f"{bridge}: weight of each layer, {label}"
                figure = draw_token_weights(weights, layers, title=title, highest=highest)
                text = f"\u2068{weights.text}\u2069"  # isolated: it may be written from right to left
                yield f"{bridge}, token by token, in {label}: {text}", figure, f"tokens-{bridge}-{language}"


def _weight_tables(recipe: BridgeRecipe, workspace: Workspace) -> Iterator[tuple[str, Markup]]:
    """(Which weights, HTML table of them)."""
    for bridge in recipe.bridges:
        if (found := read_weights(recipe, workspace, bridge)) is not None:
            yield bridge, Markup(weights_html(*found))
        if (tokens := read_tokens(recipe, workspace, bridge)) is not None:
            texts, layers = tokens
            for language, weights in texts.items():
                yield f"{bridge}, token by token, in {language_label(language)}", Markup(weights_html(weights, layers))


def _weight_sections(recipe: BridgeRecipe, workspace: Workspace) -> Iterator[str]:
    """Markdown of the weights by language."""
    for bridge in recipe.bridges:
        if (found := read_weights(recipe, workspace, bridge)) is not None:
            note = "Percent for each layer of the encoder, mean over tokens. Entropy: 1 is a plain mean, 0 one layer."
            yield "\n".join([f"## Layer weights of {bridge}", "", note, "", weights_markdown(*found)])


def print_results(results: Mapping[str, Any], console: Console) -> None:
    """The tables that fit a terminal; wide ones are folded into parts that each begin with the first column."""
    for table in result_tables(results):
        if table.get("texts") or (table.get("long") and (len(table["rows"]) > 20 or len(table["header"]) > 8)):
            continue
        widths = _widths(table)
        for part, columns in enumerate(_fold(widths, console.width)):
            shown = Table(title=None if part else table["title"], title_justify="left", title_style="bold")
            for number in columns:
                justify: Literal["left", "right"] = "right" if number else "left"
                # Left to itself, rich narrows all columns alike and breaks numbers.
                shown.add_column(table["header"][number], justify=justify, overflow="fold", width=widths[number])
            for row in table["rows"]:
                shown.add_row(*(row[number] for number in columns))
            console.print(shown)


def _widths(table: Mapping[str, Any]) -> list[int]:
    """Terminal cells that each column needs: headers break at spaces, the other cells do not."""
    rows = table["rows"]
    return [
        max(cell_len(text) for text in [*name.split(), *(row[number] for row in rows)])
        for number, name in enumerate(table["header"])
    ]


def _fold(widths: Sequence[int], width: int) -> list[list[int]]:
    """Numbers of the columns of each part, the first column in all of them."""
    parts: list[list[int]] = [[0]]
    for column in range(1, len(widths)):
        needed = 1 + sum(widths[number] + 3 for number in [*parts[-1], column])  # cells, their margins and lines
        if len(parts[-1]) > 1 and needed > width:
            parts.append([0])
        parts[-1].append(column)
    return parts
