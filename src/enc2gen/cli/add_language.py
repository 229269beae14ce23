"""`enc2gen add-language`: one more language for a trained generator."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from enc2gen.cli.vocab import (
    ByteFallback,
    Dev,
    Fields,
    Init,
    KeepCharacters,
    Out,
    Overwrite,
    PairFields,
    Pairs,
    Rank,
    Seed,
    Vectors,
)
from enc2gen.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from enc2gen.data.tasks import Example
    from enc2gen.models.surgery import AddedLanguage

CHECK_EXAMPLES = 500
"""Most examples a language's loss is measured on (our choice)."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("add-language")(add_language)


def add_language(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a trained generator.", show_default=False)],
    language: Annotated[str, typer.Option("--lang", help="The new language, a BCP 47 tag.", show_default=False)],
    out: Out,
    like: Annotated[
        str | None, typer.Option("--like", help="Related language to start from; the mean of all by default.")
    ] = None,
    corpus: Annotated[
        list[str] | None, typer.Option("--corpus", "-c", help="Text in the new language. Repeatable.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Number of new pieces, or auto; no new pieces by default.")
    ] = None,
    init: Init = "focus",
    check: Annotated[
        list[str] | None,
        typer.Option("--check", help="LANG=FILE: measure this old language's loss before and after. Repeatable."),
    ] = None,
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
    """Add a language to a generator and show that the old ones are kept: --check kk=dev.jsonl"""
    from enc2gen.cli import model_folder as folder
    from enc2gen.models import surgery

    folder.check_output(out, model, overwrite)
    number = _parse_size(size, bool(pairs or byte_fallback or keep_characters or rank or vectors or dev))
    config = folder.initialisation(init, rank, vectors)
    texts, held_out = (folder.read_texts(given, field or ()) if given else [] for given in (corpus, dev))
    bridge = folder.read_pairs(pairs or (), pair_fields)
    loaded, tokenizer = surgery.load_for_surgery(model)
    added = surgery.add_language(
        loaded,
        tokenizer,
        language,
        [text for text, _ in texts],
        like=like,
        size=number,
        initialisation=config,
        checks=_read_checks(check or [], loaded),
        pairs=bridge,
        dev_texts=[text for text, _ in held_out],
        byte_fallback=byte_fallback,
        keep_characters=keep_characters,
        seed=seed,
    )
    settings = config.model_dump(mode="json") if added.change else None
    folder.write_model(out, loaded, added.tokenizer, _record(added, model, seed, settings), texts)
    _print(Console(), added, out, keeps_corpus=keep_characters == "corpus")


def _parse_size(size: str | None, has_options: bool) -> int | Literal["auto"] | None:
    from enc2gen.cli.model_folder import parse_size

    if size is None and has_options:
        raise ConfigError(
            "--pairs, --byte-fallback, --keep-characters, --rank, --vectors and --dev are about new pieces, and there "
            "are none",
            where="--size",
            remedy="add --size auto",
        )
    return None if size is None else parse_size(size)


def _read_checks(given: list[str], model: PreTrainedModel) -> dict[str, list[Example]]:
    """`LANG=FILE` options as examples by language; several files of one language are joined."""
    from itertools import islice

    from enc2gen.corpora.readers import read_records
    from enc2gen.models.surgery import check_examples

    checks: dict[str, list[Example]] = {}
    for option in given:
        tag, equals, file = option.partition("=")
        if not (tag and equals and file):
            raise ConfigError(f"{option!r} is not LANG=FILE", where="--check", remedy="write for example kk=dev.jsonl")
        examples = check_examples(islice(read_records(file), CHECK_EXAMPLES), tag, model)
        checks.setdefault(examples[0].target_language, []).extend(examples)
    return checks


def _record(added: AddedLanguage, model: str, seed: int, initialisation: dict[str, Any] | None) -> dict[str, Any]:
    from enc2gen.cli.model_folder import change_record, coverage_record

    return {
        "operation": "add-language",
        "model": model,
        "language": added.language,
        "token_id": added.token_id,
        "like": added.like,
        "seed": seed,
        "initialisation": initialisation,
        **(coverage_record(added.coverage) if added.coverage else {"coverage": None}),
        "losses_bits_per_character": [asdict(loss) for loss in added.losses],
        "extension": change_record(added.change) if added.change else None,
    }


def _print(console: Console, added: AddedLanguage, out: Path, *, keeps_corpus: bool) -> None:
    from enc2gen.cli.coverage_table import print_coverage_change
    from enc2gen.cli.model_folder import plain_table, print_sizes
    from enc2gen.cli.vocab import print_kept_characters, print_trials
    from enc2gen.corpora.languages import language_name

    if added.change:
        print_trials(console, added.change.trials)
        print_sizes(console, added.change.before, added.change.after)
        print_kept_characters(console, added.change)
    if added.coverage:
        print_coverage_change(*added.coverage, console, keeps_corpus=keeps_corpus or not added.change)
    if added.losses:
        console.print("Old languages: bits per character")
        table = plain_table("language", "examples", "before", "after", "change")
        for loss in added.losses:
            change = f"{loss.after - loss.before:+.4f}"
            table.add_row(
                f"{language_name(loss.language)} {loss.language}",
                f"{loss.examples:,}",
                f"{loss.before:.4f}",
                f"{loss.after:.4f}",
                change,
            )
        console.print(table)
        console.print()
        if skipped := sum(loss.skipped for loss in added.losses):
            console.print(f"{skipped:,} examples are longer than the model's positions and were left out")
    like = f"the row of {added.like}" if added.like else "the mean row of all languages"
    lines = [f"{language_name(added.language)} is <{added.language}>, id {added.token_id}, with {like}."]
    lines += [
        f"Written: {out}",
        f"It cannot write {language_name(added.language)} yet. Next: train it, in a recipe with",
        f"  languages: [..., {added.language}]",
        "  systems:",
        "    shared:",
        f"      start: {out}",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
