"""`enc2gen shortlist`: the tokens that texts of a language are made of, for quicker decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from enc2gen.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    app.command("shortlist")(shortlist)


def shortlist(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a trained model.", show_default=False)],
    text: Annotated[
        list[str],
        typer.Option("--text", "-t", help="Language and text file, such as kk=train.kk.txt. Repeatable."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")],
    least: Annotated[int, typer.Option("--least", min=1, help="Occurrences from which a token is taken.")] = 1,
) -> None:
    """List the tokens a language is written with: enc2gen shortlist MODEL --text kk=train.kk.txt -o shortlist.json"""
    from enc2gen.cli.generate import check_apart, read_lines
    from enc2gen.generation.generator import Generator
    from enc2gen.generation.shortlist import Shortlist

    files: dict[str, list[str]] = {}
    for given in text:
        language, equals, path = given.partition("=")
        if not equals or not language:
            raise ConfigError(f"{given!r} names no language", where="--text", remedy="write LANGUAGE=FILE")
        check_apart(output, path)
        files.setdefault(language, []).extend(read_lines(Path(path)))
    generator = Generator.from_pretrained(model)
    texts: dict[str, list[str]] = {}
    for given, lines in files.items():
        known = generator.target_language(given)  # as the model calls it; a bridge says that it has no languages
        texts.setdefault(str(known), []).extend(lines)
    found = Shortlist.from_texts(generator.codec, texts, least=least)
    found.save(output)
    for language, tokens in found.languages.items():
        print(f"{language}: {len(tokens)} of {found.vocabulary} tokens")
