"""`enc2gen align`: which languages may a bridge on this encoder serve? Asked before anything is trained."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from enc2gen.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from enc2gen.evaluation.alignment import AlignmentTable, LanguageAlignment
    from enc2gen.evaluation.parallel_texts import ParallelTexts

TEMPLATES = {"embedded:multilingual-e5-small": "query: {text}"}
"""What an encoder reads instead of the bare text because it was trained so (E5: arXiv 2402.05672)."""
CLOSE, PARTIAL = 60.0, 30.0
"""Means over the layers from which a language counts as close to English, and as partly aligned (our choice)."""
UNREADABLE = 10.0  # per cent of unknown pieces from which the tokenizer is to blame (our choice)
_POOLINGS = ("mean", "weighted")
_PICTURES = (".png", ".svg")
_STYLES = {"close": "green", "partial": "yellow", "weak": "red", "unread": "bold red"}


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("align")(align)


def align(
    encoder: Annotated[
        str, typer.Argument(help="Hub name, folder, or embedded:multilingual-e5-small.", show_default=False)
    ],
    corpus: Annotated[
        str,
        typer.Option(
            "--corpus",
            "-c",
            help="Folder with a folder or file per language (same id = same sentence), or one parallel file.",
        ),
    ],
    languages: Annotated[
        str | None, typer.Option("--languages", "-l", help="Only these, such as kk,ug,bo. Default: all there.")
    ] = None,
    english: Annotated[str | None, typer.Option("--english", help="What English is called in the corpus.")] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=2, help="Sentences, drawn at random; scores fall as it grows.")
    ] = 100,
    template: Annotated[
        str | None,
        typer.Option("--template", help="What the encoder reads; {text} is the sentence. Default: as it was trained."),
    ] = None,
    pooling: Annotated[str, typer.Option("--pooling", help="Of token states: mean, or weighted by position.")] = "mean",
    centre: Annotated[
        bool, typer.Option("--centre", help="Subtract each language's mean first: what a constant shift hides.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Heat map of languages and layers to write, .png and .svg.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sample and the intervals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the scores of every layer.")] = False,
) -> None:
    """Measure how well an encoder aligns each language with English (MEXA), to see which a bridge may serve."""
    from enc2gen.evaluation.parallel_texts import read_parallel_texts

    if pooling not in _POOLINGS:
        raise ConfigError(f"unknown pooling {pooling!r}", where="--pooling", remedy=f"use {' or '.join(_POOLINGS)}")
    if picture is not None:
        _check_picture(picture)
    wanted = [name.strip() for name in (languages or "").split(",") if name.strip()]
    texts = read_parallel_texts(corpus, english=english, languages=wanted, limit=limit, seed=seed)
    table = _measure(encoder, texts, template or TEMPLATES.get(encoder, "{text}"), pooling, centre, seed)
    if as_json:
        content = {"encoder": encoder, "corpus": corpus, "available": texts.available, **table.to_dict()}
        for row in content["languages"]:
            row["expect"] = expectation(row["mean"], row["unknown"])
        print(json.dumps(content, indent=1))
    else:
        print_alignment(table, Console(), encoder=encoder, available=texts.available)
    if picture is not None:  # last: what was measured is told whatever becomes of it
        _draw(table, picture)


def _measure(
    encoder: str, texts: ParallelTexts, template: str, pooling: str, centre: bool, seed: int
) -> AlignmentTable:
    import torch
    import transformers
    from torch import nn

    from enc2gen.encoders.loading import load_tokenizer
    from enc2gen.encoders.reading import encoder_facts, load_reading_encoder
    from enc2gen.evaluation.alignment import MAX_LENGTH, alignment_table

    transformers.logging.disable_progress_bar()  # ours is the only progress shown
    model: nn.Module = load_reading_encoder(encoder)
    model = cast("PreTrainedModel", model.to("cuda" if torch.cuda.is_available() else "cpu"))
    with Console(stderr=True).status("reading") as status:
        return alignment_table(
            model,
            load_tokenizer(encoder),
            texts.texts,
            texts.english,
            template=template,
            pooling="weighted" if pooling == "weighted" else "mean",
            centre=centre,
            max_length=min(MAX_LENGTH, encoder_facts(model).max_positions or MAX_LENGTH),
            seed=seed,
            progress=lambda language: status.update(f"reading {language}"),
        )


def _check_picture(picture: Path) -> None:
    """Find out before the work, not after it, that the picture cannot be written; nothing is made."""
    from enc2gen.cli.generate import check_writable

    if picture.suffix not in _PICTURES:
        raise ConfigError(f"pictures are not written as {picture.suffix!r}", where="--picture", remedy="use .png")
    folder = next(folder for folder in picture.absolute().parents if folder.exists())  # others will be made
    if not folder.is_dir():
        raise OutputError("not a folder", where=str(folder), remedy="name another file with --picture")
    if picture.parent.exists():
        for suffix in _PICTURES:
            check_writable(picture.with_suffix(suffix))
    elif not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError("no right to write there", where=str(folder), remedy="name another file with --picture")


def _draw(table: AlignmentTable, picture: Path) -> None:
    from enc2gen.experiments.bridge.figures import draw_alignment, save_figure

    save_figure(draw_alignment(table), picture)


def expectation(mean: float, unknown: float) -> str:
    """What to expect of a language: "close" to English, "partial", "weak", or "unread" (by the tokenizer)."""
    if unknown >= UNREADABLE:
        return "unread"
    return "close" if mean >= CLOSE else "partial" if mean >= PARTIAL else "weak"


def print_alignment(table: AlignmentTable, console: Console, *, encoder: str, available: int) -> None:
    """Print the table, the language of the highest mean first, and what it means; 80 columns are enough."""
    console.print(Text.assemble("Encoder  ", (encoder, "bold"), f"  reads {table.template!r}"), soft_wrap=True)
    shown = Table(box=None, padding=(0, 1), pad_edge=False)
    shown.add_column("language", no_wrap=True, overflow="ellipsis")
    for name in ("mean", "last", "95 %", "best", "layer", "unknown"):
        shown.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    shown.add_column("expect", no_wrap=True, min_width=7)
    for row in table.languages:
        shown.add_row(*_cells(row))
    console.print(shown)
    for line in readings(table, available):
        console.print(line, highlight=False, markup=False)


def _cells(row: LanguageAlignment) -> list[str | Text]:
    from enc2gen.evaluation.parallel_texts import language_label

    expect = expectation(row.mean, row.unknown)
    label = language_label(row.language)
    return [
        Text(row.language if label == row.language else f"{label} {row.language}"),
        f"{row.mean:.0f}",
        f"{row.last:.0f}",
        f"{row.low:.0f}-{row.high:.0f}",
        f"{row.best:.0f}",
        f"{row.best_layer}",
        f"{row.unknown:.0f} %" if row.unknown >= 0.5 else "",
        Text(expect, style=_STYLES[expect]),
    ]


def readings(table: AlignmentTable, available: int) -> list[str]:
    """What the numbers are, and what they mean, a line each."""
    kinds = [expectation(row.mean, row.unknown) for row in table.languages]
    counts = {kind: kinds.count(kind) for kind in _STYLES}
    centred = ", each language centred" if table.centred else ""
    lines = [
        f"MEXA, in percent: of {table.sentences} sentences ({available} there), those that find their translation in "
        f"{table.english} and are found by it; {table.pooling}-pooled{centred}. By chance {table.chance:.1f}. "
        f"mean: over the {table.num_layers} layers.",
        f"Reading: a bridge trained in English may carry over nearly whole to {counts['close']} of {len(kinds)} "
        f"languages, in part to {counts['partial']}, little to {counts['weak'] + counts['unread']}. This ranks the "
        "languages; it predicts no accuracy, and it does not know which of them the LLM reads already.",
    ]
    falling = [row for row in table.languages if row.best - row.last >= 10.0]
    if len(falling) * 2 > len(table.languages):
        lines.append("For most languages a middle layer is better aligned than the last: let the bridge fuse layers.")
    if unread := [row.language for row in table.languages if row.unknown >= UNREADABLE]:
        lines.append(f"The tokenizer does not know the letters of {', '.join(unread)}: extend it (enc2gen vocab).")
    if cut := sum(row.truncated for row in table.languages):
        lines.append(f"{cut} sentences were too long and cut.")
    return lines
