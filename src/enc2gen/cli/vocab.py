"""`enc2gen vocab trim|extend`: another vocabulary for a model, in a new folder."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

if TYPE_CHECKING:
    from enc2gen.models.surgery import VocabularyChange
    from enc2gen.tokenization.vocabulary_size import SizeTrial

_CHARACTERS_SHOWN = 30
"""Most kept characters that are listed (our choice)."""

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
    typer.Option(
        "--pairs",
        help="File of translated pairs: the link from a new script to known ones, for focus, ofa. Repeatable.",
    ),
]
PairFields = Annotated[
    str | None, typer.Option("--pair-fields", help="The two fields of --pairs, as en,bo. Default: source,target.")
]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="Rank of factorised methods.")]
Vectors = Annotated[
    Path | None, typer.Option("--vectors", help="Word vectors to use instead of vectors learnt from the corpus.")
]
Dev = Annotated[
    list[str] | None, typer.Option("--dev", help="Held-out text for --size auto; a part of the corpus by default.")
]
KeepCharacters = Annotated[
    str,
    typer.Option(
        "--keep-characters",
        help="Characters that the tokenizer shall no longer rewrite, as …①, or corpus: all those of the corpus. The "
        "price: text of old languages that has them is split otherwise than before.",
    ),
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
    from enc2gen.cli.coverage_table import print_coverage_change
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
    print_coverage_change(reports[0], reports[1], console, keeps_corpus=True)
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
    pair_fields: PairFields = None,
    byte_fallback: ByteFallback = False,
    keep_characters: KeepCharacters = "",
    rank: Rank = None,
    vectors: Vectors = None,
    dev: Dev = None,
    field: Fields = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Add pieces for the corpora's language; old pieces keep their rows."""
    from enc2gen.cli import model_folder as folder
    from enc2gen.cli.coverage_table import print_coverage_change
    from enc2gen.models.surgery import extend_model, load_for_surgery
    from enc2gen.tokenization.coverage import compare_coverage

    folder.check_output(out, model, overwrite)
    number, config = folder.parse_size(size), folder.initialisation(init, rank, vectors)
    texts = folder.read_texts(corpus, field or ())
    bridge, held_out = folder.read_pairs(pairs or (), pair_fields), folder.read_texts(dev, field or ()) if dev else []
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
        keep_characters=keep_characters,
        seed=seed,
    )
    record: dict[str, Any] = {"operation": "extend", "model": model, "initialisation": config.model_dump(mode="json")}
    record |= {"seed": seed, "byte_fallback": byte_fallback, "pairs": len(bridge)}
    record["keep_characters"] = keep_characters
    reports = compare_coverage([tokenizer, change.tokenizer], texts)
    record |= {**folder.coverage_record(reports), **folder.change_record(change)}
    folder.write_model(out, loaded, change.tokenizer, record, texts)
    console = Console()
    print_trials(console, change.trials)
    folder.print_sizes(console, change.before, change.after)
    print_kept_characters(console, change)
    print_coverage_change(reports[0], reports[1], console, keeps_corpus=keep_characters == "corpus")
    spare = change.before.rows - (len(change.origins) - change.origins.count(None))
    gone = f"; {spare:,} rows that had no token are gone" if spare else ""
    said = f"{len(change.pieces):,} new pieces{gone}. Written: {out}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)


def print_trials(console: Console, trials: list[SizeTrial]) -> None:
    """The sizes that were tried for `--size auto`; nothing if there are none."""
    if not trials:
        return
    from enc2gen.cli.model_folder import plain_table
    from enc2gen.tokenization.vocabulary_size import TOLERANCE, smallest_good

    chosen = smallest_good(trials)
    table = plain_table("held-out text", "new pieces", "bits per character", "unknown", "tokens per word")
    for trial in trials:
        table.add_row(
            "chosen" if trial.size == chosen else "",
            f"{trial.pieces:,}",
            f"{trial.bits_per_character:.4f}",
            f"{100 * trial.unknown_rate:.2f} %",
            f"{trial.fertility:.2f}",
            style="bold" if trial.size == chosen else None,
        )
    console.print(table)
    console.print(f"Chosen: the smallest within {100 * TOLERANCE:g} % of the fewest bits.\n", highlight=False)


def print_kept_characters(console: Console, change: VocabularyChange) -> None:
    """Characters that are no longer rewritten, and those that are although they were to be kept."""
    for title, characters in (
        ("No longer rewritten by the tokenizer:", change.kept_characters),
        ("To be kept, but this kind of tokenizer rewrites them still:", change.still_altered),
    ):
        if characters:
            names = [_shown(character) for character in characters[:_CHARACTERS_SHOWN]]
            more = len(characters) - len(names)
            console.print(title, highlight=False)
            text = ", ".join(names) + (f" and {more:,} more (vocabulary.json has them)" if more else "")
            console.print(Padding(Text(text), (0, 0, 0, 2)))
            console.print()


def _shown(character: str) -> str:
    """A character as a terminal can show it, with its code point where it cannot."""
    category = unicodedata.category(character)
    if category[0] in "CZ":
        return f"U+{ord(character):04X} {unicodedata.name(character, '')}".rstrip()
    return f"\u25cc{character}" if category[0] == "M" else character
