"""The results of a run, in the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from enc2gen.corpora.languages import language_name
from enc2gen.experiments import findings
from enc2gen.experiments.findings import METRIC_LABELS, Sample
from enc2gen.experiments.recipe import Recipe
from enc2gen.experiments.workspace import Workspace

NAME_WIDTH, CELL_WIDTH = 20, 15
"""Characters for a system's name, and for one score with the space around it."""
LONGEST_TEXT = 400
"""Characters of a sample text that are shown (our choice; the report shows all)."""


def print_results(recipe: Recipe, workspace: Workspace, metrics: Mapping[str, Any], console: Console) -> None:
    """Print scores, source use, sample outputs, verdicts, and where to go on; made for 80 columns or more."""
    outputs = findings.read_outputs(recipe, workspace)
    tags = findings.languages_of(recipe, metrics)
    for tag in tags:
        _print_scores(metrics, tag, console)
    _print_paired(metrics, console)
    _print_source_use(metrics, tags, console)
    _print_denoising(metrics, console)
    chosen = findings.choose_samples(outputs, recipe.evaluate.samples, recipe.seed)
    _print_samples(chosen, recipe, console)
    for tag in tags:
        _heading(f"{language_name(tag)}: does {recipe.main_system} win?", console)
        answer, colon, reason = findings.verdict_sentence(metrics, tag).partition(": ")
        style = {"Yes": "bold green", "No": "bold red"}.get(answer, "bold yellow")
        console.print(Padding(Text.assemble((answer, style), colon, reason), (0, 2)))
    _heading("Where everything lies", console)
    width = len(f"{workspace.root / 'metrics.json'}")
    for name, what in (
        ("report.html", "the report, for a browser"),
        ("metrics.json", "all figures"),
        ("model", "the model"),
    ):
        _line(Text.assemble("  ", (f"{workspace.root / name}".ljust(width), "bold"), f"  {what}"), console)
    _heading("Generate with the model just made", console)
    _line(Text(f"  {findings.generate_command(recipe, workspace, outputs)}", style="bold cyan"), console)


def _heading(text: str, console: Console) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _line(text: Text, console: Console) -> None:
    """A line to copy: never broken, whatever the width."""
    console.print(text, soft_wrap=True)


def _note(text: str, console: Console) -> None:
    console.print(Padding(Text(plain(text), style="dim"), (0, 2)))


def plain(text: str) -> str:
    """`text` on one line and without control characters, which could command the terminal."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())


def _print_scores(metrics: Mapping[str, Any], tag: str, console: Console) -> None:
    names = list(metrics["higher_is_better"])
    per_table = max(1, (console.width - NAME_WIDTH) // CELL_WIDTH)
    _heading(findings.language_heading(metrics, tag), console)
    for start in range(0, len(names), per_table):
        console.print(_score_table(metrics, tag, names[start : start + per_table]))
    _note("Below each value its 95 % interval. ↑ higher is better, ↓ lower is better; the best is bold.", console)
    for system, scores in metrics["systems"].items():
        if "text" in scores.get(tag, {}):
            _note(f"{system} always writes: {scores[tag]['text']}", console)


def _score_table(metrics: Mapping[str, Any], tag: str, names: Sequence[str]) -> Table:
    systems, higher = metrics["systems"], metrics["higher_is_better"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("system", max_width=NAME_WIDTH - 2, overflow="fold")
    for name in names:
        label = METRIC_LABELS.get(name, name)
        table.add_column(Text(f"{label} {'↑' if higher[name] else '↓'}"), justify="right", max_width=CELL_WIDTH - 2)
    best = {}
    for name in names:
        scores = [systems[system].get(tag, {}).get(name) for system in systems]
        values = [score["value"] for score in scores if score is not None]
        best[name] = (max if higher[name] else min)(values) if values else None
    for system in systems:
        scores = systems[system].get(tag, {})
        table.add_row(Text(system), *(_score_cell(scores.get(name), best[name]) for name in names))
    return table


def _score_cell(score: Mapping[str, Any] | None, best: float | None) -> Text:
    if score is None:
        return Text("not measurable", style="dim")
    value = (f"{score['value']:.1f}", "bold green" if score["value"] == best else "")
    return Text.assemble(value, "\n", (f"{score['low']:.1f} - {score['high']:.1f}", "dim"))


def _print_paired(metrics: Mapping[str, Any], console: Console) -> None:
    rows = [(tag, system, row) for tag, others in metrics.get("paired", {}).items() for system, row in others.items()]
    if not rows:
        return
    main, label = next(iter(metrics["systems"])), METRIC_LABELS.get(rows[0][2]["metric"], rows[0][2]["metric"])
    _heading(f"{main} against the others, sentence by sentence", console)
    for tag, system, row in rows:
        interval = f"[{row['low']:+.1f}, {row['high']:+.1f}]"
        console.print(Padding(Text(f"{tag}  {row['value']:+.1f} {label} over {system}  {interval}"), (0, 2)))
    _note("In brackets the paired 95 % bootstrap interval of the difference.", console)


def _print_source_use(metrics: Mapping[str, Any], tags: Sequence[str], console: Console) -> None:
    use = metrics.get("source_use", {})
    if not any(tag in use[system] for system in use for tag in tags):
        return
    _heading("Do the outputs depend on their sources?", console)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("system", max_width=NAME_WIDTH - 4, overflow="fold")
    for label in ("loss", "loss,\nshuffled", "gain", "chrF++", "chrF++,\npermuted", "distinct\noutputs"):
        table.add_column(label, justify="right")
    for tag in tags:
        for system in use:
            if tag in use[system]:
                table.add_row(tag, Text(system), *_source_cells(metrics, system, tag))
    console.print(table)
    _note(
        "Loss in nats per target token, with the true source and with that of another sentence; the gain is what "
        "the true source saves. Permuted: each output scored against another sentence. A system that ignores its "
        "sources gains nothing, loses nothing when permuted, and writes few distinct outputs.",
        console,
    )
    for sentence in findings.left_out_of_losses(metrics, tags):
        _note(sentence, console)


def _print_denoising(metrics: Mapping[str, Any], console: Console) -> None:
    rows = findings.denoising_rows(metrics)
    if not rows:
        return
    _heading("Repairing damaged text: perplexity of held-out text", console)
    for row in rows:
        score = row["perplexity"]
        interval = f"[{score['low']:.3g}, {score['high']:.3g}]"
        figures = f"{score['value']:.3g} {interval}, {row['nats_per_character']['value']:.3g} nats per character"
        console.print(Padding(Text(f"{row['tag']}  {row['system']}  {figures}, {score['n']:,} texts"), (0, 2)))
    _note("Lower is better. Perplexities compare systems of one vocabulary, nats per character any two.", console)


def _source_cells(metrics: Mapping[str, Any], system: str, tag: str) -> list[str]:
    use, score = metrics["source_use"][system][tag], metrics["systems"][system].get(tag, {}).get("chrf++")
    losses = [use.get(name) for name in ("loss", "shuffled_loss", "gain")]
    values = [None if found is None else found["value"] for found in (score, use.get("permuted_chrf++"))]
    return [
        *("-" if loss is None else f"{loss:.2f}" for loss in losses),
        *("-" if value is None else f"{value:.1f}" for value in values),
        f"{use['distinct_outputs']:,} of {use['outputs']:,}",
    ]


def _print_samples(chosen: Mapping[str, Sequence[Sample]], recipe: Recipe, console: Console) -> None:
    for tag, samples in chosen.items():
        _heading(
            f"{language_name(tag)}: outputs of {recipe.main_system}, drawn at random (seed {recipe.seed})", console
        )
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(overflow="fold")
        for sample in samples:
            output = sample.outputs.get(recipe.main_system, "")
            style = "bold green" if sample.is_reference(recipe.main_system) else "bold"
            grid.add_row("")
            grid.add_row("  source", _shortened(sample.source))
            grid.add_row("  reference", _shortened(" / ".join(sample.references)))
            grid.add_row("  output", _shortened(output, style) if output.strip() else Text("(empty)", style="dim"))
        console.print(grid)


def _shortened(text: str, style: str = "") -> Text:
    text = plain(text)
    return Text(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …", style=style)
