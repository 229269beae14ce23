"""`enc2gen vocab trim|extend`: another vocabulary for a model, in a new folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from enc2gen.tokenization.vocabulary_size import SizeTrial

vocab_app = typer.Typer(help="Trim or extend the vocabulary of an encoder or a generator.", no_args_is_help=True)

Model = Annotated[
    str,
    typer.Argument(
        help="Folder or Hub name of a generator or an encoder, or embedded:multilingual-e5-small.", show_default=False
    ),
]
Corpus = Annotated[
    list[str],
    typer.Option("--corpus", "-c", help="File, folder or prepared folder with text. Repeatable.", show_default=False),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)]
Fields = Annotated[
    list[str] | None,
    typer.Option("--field", help="Field with text. Repeatable. Default: text, or else source and target."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model in the folder.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")]
Init = Annotated[str, typer.Option("--init", help="How new pieces get their rows: random, mean, lexical, focus, ofa.")]
Pairs = Annotated[
    list[str] | None,
    typer.Option("--pairs", help="File with source and target that share a meaning: a bridge between scripts."),
]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="Rank of factorised methods.")]
Vectors = Annotated[
    Path | None, typer.Option("--vectors", help="Word vectors to use instead of vectors learnt from the corpus.")
]
Dev = Annotated[
    list[str] | None, typer.Option("--dev", help="Held-out text for --size auto; a part of the corpus by default.")
]
ByteFallback = Annotated[bool, typer.Option("--byte-fallback", help="Add the 256 bytes: nothing is unknown any more.")]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.add_typer(vocab_app, name="vocab")


@vocab_app.command()
def trim(
    model: Model,
    corpus: Corpus,
    out: Out,
    keep_language: Annotated[
        list[str] | None,
        typer.Option("--keep-language", help="Language a generator shall still write. Repeatable. Default: all."),
    ] = None,
    max_size: Annotated[
        int | None, typer.Option("--max-size", min=1, help="Fill up to this size with likely pieces of these scripts.")
    ] = None,
    field: Fields = None,
    overwrite: Overwrite = False,
) -> None:
    """Cut a vocabulary to what the corpora use; what the model computes on them stays the same."""
    from enc2gen.cli import model_folder as folder
    from enc2gen.models.surgery import load_for_surgery, trim_model
    from enc2gen.tokenization.coverage import compare_coverage

    folder.check_output(out, model, overwrite)
    texts = folder.read_texts(corpus, field or ())
    loaded, tokenizer = load_for_surgery(model)
    change = trim_model(
        loaded, tokenizer, [text for text, _ in texts], keep_languages=keep_language or None, max_size=max_size
    )
    record: dict[str, Any] = {"operation": "trim", "model": model, "max_size": max_size}
    record["keep_languages"] = keep_language or None
    reports = compare_coverage([tokenizer, change.tokenizer], texts)
    record |= {**folder.coverage_record(reports), **folder.change_record(change)}
    folder.write_model(out, loaded, change.tokenizer, record, texts)
    console = Console()
    folder.print_sizes(console, change.before, change.after)
    folder.print_coverage_change(console, reports)
    console.print(f"Written: {out}", highlight=False, markup=False, soft_wrap=True)


@vocab_app.command()
def extend(
    model: Model,
    corpus: Corpus,
    out: Out,
    size: Annotated[str, typer.Option("--size", help="Number of new pieces, or auto: fewest bits per character.")] = (
        "auto"
    ),
    init: Init = "focus",
    pairs: Pairs = None,
    byte_fallback: ByteFallback = False,
    rank: Rank = None,
    vectors: Vectors = None,
    dev: Dev = None,
    field: Fields = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Add pieces for the corpora's language; old pieces keep their rows."""
    from enc2gen.cli import model_folder as folder
    from enc2gen.models.surgery import extend_model, load_for_surgery
    from enc2gen.tokenization.coverage import compare_coverage

    folder.check_output(out, model, overwrite)
    number, config = folder.parse_size(size), folder.initialisation(init, rank, vectors)
    texts = folder.read_texts(corpus, field or ())
    bridge, held_out = folder.read_pairs(pairs or ()), folder.read_texts(dev, field or ()) if dev else []
    loaded, tokenizer = load_for_surgery(model)
    change = extend_model(
        loaded,
        tokenizer,
        [text for text, _ in texts],
        number,
        config,
        dev_texts=[text for text, _ in held_out],
        pairs=bridge,
        byte_fallback=byte_fallback,
        seed=seed,
    )
    record: dict[str, Any] = {"operation": "extend", "model": model, "initialisation": config.model_dump(mode="json")}
    record |= {"seed": seed, "byte_fallback": byte_fallback, "pairs": len(bridge)}
    reports = compare_coverage([tokenizer, change.tokenizer], texts)
    record |= {**folder.coverage_record(reports), **folder.change_record(change)}
    folder.write_model(out, loaded, change.tokenizer, record, texts)
    console = Console()
    print_trials(console, change.trials)
    folder.print_sizes(console, change.before, change.after)
    folder.print_coverage_change(console, reports)
    console.print(f"{len(change.pieces):,} new pieces. Written: {out}", highlight=False, markup=False, soft_wrap=True)


def print_trials(console: Console, trials: list[SizeTrial]) -> None:
    """The sizes that were tried for `--size auto`; nothing if there are none."""
    if not trials:
        return
    best = min(trial.bits_per_character for trial in trials)
    table = Table(title="Sizes tried on held-out text", title_justify="left")
    for column in ("new pieces", "bits per character", "unknown", "fertility"):
        table.add_column(column, justify="right")
    for trial in trials:
        table.add_row(
            f"{trial.pieces:,}",
            f"{trial.bits_per_character:.4f}",
            f"{100 * trial.unknown_rate:.2f} %",
            f"{trial.fertility:.2f}",
            style="bold" if trial.bits_per_character == best else None,
        )
    console.print(table)
