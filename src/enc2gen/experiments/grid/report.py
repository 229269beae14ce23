"""Report of an experiment: `report.md`, `report.html` and pictures, from `results.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from rich.console import Console
from rich.table import Table as ScreenTable
from rich.text import Text

from enc2gen.corpora.languages import language_name
from enc2gen.corpora.report_pages import html_environment, replace_text, writing_report
from enc2gen.experiments.bridge.figures import save_figure
from enc2gen.experiments.findings import METRIC_LABELS
from enc2gen.experiments.grid.plots import draw_all, headline, label
from enc2gen.experiments.grid.tables import caution, facts, findings, result_tables
from enc2gen.experiments.report_tables import markdown, with_interval

PICTURES = ("scores", "curves", "sizes")
REPORT_FILES = ("report.html", "report.md", *(f"{name}{suffix}" for name in PICTURES for suffix in (".png", ".svg")))

TERMS = {
    "minus …": "difference to the reference cell, on the same seeds and sentences, with its paired 95 % interval.",
    "p": "two-sided p-value of “no difference”, from the same resamples.",
    "gain from the true source": "nats per token that the true source saves over another sentence's; 0 for a system "
    "that ignores its source.",
    "permuted chrF++": "chrF++ when each output is handed to another sentence: what can be had without reading.",
    "distinct outputs": "different texts that were written; few mean that the system repeats itself.",
    "uses its source": "“yes” if chrF++ lies above permuted chrF++ with intervals apart, in every seed.",
    "tokens": "source and target tokens seen in training by one seed, its pretraining included.",
    "core time": "CPU time of one seed, all threads together, its pretraining included.",
    "(best constant string)": "one and the same text for every source, the best one found on the test set itself.",
}


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.md`, `report.html` and the pictures into `folder`; returns the path of `report.html`.

    Args:
        results: what `collect` returned, or the content of a `results.json`.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = folder / "report.html"
    with writing_report(path):
        for name in PICTURES:  # of an earlier report, with other cells
            for suffix in (".png", ".svg"):
                (folder / f"{name}{suffix}").unlink(missing_ok=True)
    pictures = []
    for name, caption, figure in draw_all(results):
        _, svg = save_figure(figure, folder / name)
        text = svg.read_text(encoding="utf-8")
        pictures.append((name, caption, Markup(text[text.index("<svg") :])))
    context = {
        "experiment": results["experiment"],
        "facts": facts(results),
        "findings": findings(results),
        "caution": caution(results),
        "tables": result_tables(results),
        "terms": TERMS,
        "pictures": pictures,
        "definition": yaml.safe_dump(dict(results["experiment"]), sort_keys=False, allow_unicode=True),
    }
    html = html_environment("enc2gen.experiments").get_template("grid.html.j2").render(context)
    with writing_report(path):
        replace_text(folder / "report.md", _markdown(context))
        replace_text(path, html)
    return path


def _markdown(context: Mapping[str, Any]) -> str:
    experiment = context["experiment"]
    lines = [f"# {experiment['name']}", "", f"**{experiment['question']}**", ""]
    lines += [text for part in ("description", "source") if (given := experiment.get(part)) for text in (given, "")]
    lines += [f"- {name}: {value}" for name, value in context["facts"]]
    lines += ["", "## Findings", "", *(f"- {sentence}" for sentence in context["findings"]), "", context["caution"], ""]
    for name, caption, _ in context["pictures"]:
        lines += [f"![{caption}]({name}.png)", "", caption, ""]
    lines += [markdown(table) for table in context["tables"]]
    lines += ["## Terms", "", *(f"- {name}: {term}" for name, term in context["terms"].items()), ""]
    return "\n".join(lines)


def print_results(results: Mapping[str, Any], console: Console) -> None:
    """Scores, differences and findings on the terminal."""
    metric, reference = headline(results), results["experiment"]["reference"]
    name = METRIC_LABELS.get(metric, metric)
    # As `Text`: names are the experiment's, and their square brackets are no markup.
    title = Text(f"{results['experiment']['name']}: {name}", style="bold")
    table = ScreenTable(title=title, title_justify="left")
    for column in ("cell", "language", f"{name}, 95 %", f"minus {label(results, reference)}", "seeds"):
        table.add_column(Text(column), justify="left" if column in ("cell", "language") else "right", overflow="fold")
    for cell, by_language in results["cells"].items():
        for tag, scores in by_language.items():
            if metric in scores:
                pair = results["paired"].get(cell, {}).get(tag)
                signed = f"{pair['value']:+.1f} [{pair['low']:+.1f}, {pair['high']:+.1f}]" if pair else ""
                score = scores[metric]
                row = (cell, language_name(tag), with_interval(score), signed, str(len(score["seeds"])))
                table.add_row(*map(Text, row))
    console.print(table)
    for sentence in [*findings(results), caution(results)]:
        console.print(sentence, highlight=False, markup=False)
