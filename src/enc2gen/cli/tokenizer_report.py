"""`enc2gen tokenizer-report`: can a tokenizer read and write this corpus?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from enc2gen.errors import ConfigError, DataError, LanguageError, ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from enc2gen.corpora.language_id import LanguageIdentifier
    from enc2gen.corpora.readers import Record

STANDARD_INPUT = "-"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("tokenizer-report")(tokenizer_report)


def tokenizer_report(
    tokenizer: Annotated[
        str,
        typer.Argument(help="Hub name, folder, tokenizer.json, or embedded:multilingual-e5-small.", show_default=False),
    ],
    corpus: Annotated[
        list[str],
        typer.Option(
            "--corpus", "-c", help="File, folder, Hub data set, or - for lines on standard input. Repeatable."
        ),
    ],
    compare: Annotated[
        str | None, typer.Option("--compare", help="The tokenizer it was before: shows both, before and after.")
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Field that holds the text.")] = "text",
    language: Annotated[str | None, typer.Option("--lang", "-l", help="Language of all lines, such as bo.")] = None,
    language_field: Annotated[
        str | None,
        typer.Option(
            "--language-field",
            help="Field that holds the language. Default: FIELD_lang, language or lang, else it is identified.",
        ),
    ] = None,
    language_identifier: Annotated[
        str, typer.Option("--language-identifier", help="What tells the language of lines that do not say it.")
    ] = "fasttext-lid176",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Measure the first N lines of each corpus.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report what a tokenizer cannot write, how finely it splits, and what a round trip loses, by language."""
    from enc2gen.corpora.language_id import LANGUAGE_IDENTIFIERS
    from enc2gen.corpora.languages import normalise_language
    from enc2gen.tokenization.coverage import compare_coverage

    if language is not None and language_field is not None:
        raise ConfigError("--lang and --language-field exclude each other", remedy="give one of them")
    if language is not None:
        language = normalise_language(language, where="--lang")
    identifier: LanguageIdentifier = LANGUAGE_IDENTIFIERS.get(language_identifier, where="--language-identifier")()
    names = [tokenizer] if compare is None else [compare, tokenizer]
    streams = [islice(corpus_texts(source, field, language, language_field), limit) for source in _checked(corpus)]
    texts = (pair for stream in streams for pair in stream)
    reports = compare_coverage([read_tokenizer(name) for name in names], texts, identifier=identifier)
    named = dict(zip(("before", "after"), reports, strict=False))
    if as_json:
        content = {key: {**report.to_dict(), "corpus": corpus} for key, report in named.items()}
        print(json.dumps({**content, "corpus": corpus} if compare else content["before"], indent=1))
        return
    from enc2gen.cli.coverage_table import print_coverage

    print_coverage(reports[0], Console(), named.get("after"), corpus=corpus)


def _checked(corpus: Sequence[str]) -> Sequence[str]:
    if list(corpus).count(STANDARD_INPUT) > 1:
        raise ConfigError("standard input can be read once only", where="--corpus", remedy="give - once")
    return corpus


def read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a Hub name, a folder, an `embedded:` name or a `tokenizer.json` file.

    Its `name_or_path` is `name`.

    Raises:
        ModelError: there is none, or only a slow one.
    """
    from enc2gen.encoders.loading import load_tokenizer

    path = Path(name)
    if path.is_file() and not (path.with_name("tokenizer_config.json").is_file() and path.name == "tokenizer.json"):
        loaded = _read_tokenizer_file(path)
    else:
        loaded = load_tokenizer(path.parent if path.is_file() else name)
    loaded.name_or_path = name
    return loaded


def _read_tokenizer_file(path: Path) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer

    from enc2gen.tokenization.tokenizer import adopt_backend

    try:
        backend = Tokenizer.from_file(str(path))
        model: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model"]
    except Exception as error:  # tokenizers raises bare exceptions
        raise ModelError(
            f"not a tokenizer.json of a fast tokenizer ({first_line(error)})",
            where=str(path),
            remedy="load the tokenizer with transformers' AutoTokenizer and save it: save_pretrained(DIR)",
        ) from error
    unknown = model.get("unk_token")
    if isinstance(model.get("unk_id"), int):
        unknown = model["vocab"][model["unk_id"]][0]
    return adopt_backend(backend, special_tokens={"unk_token": unknown} if unknown else {}, name_or_path=str(path))


def corpus_texts(
    source: str, field: str = "text", language: str | None = None, language_field: str | None = None
) -> Iterator[tuple[str, str | None]]:
    """Stream the lines of a source with their languages; None where a line does not say it.

    Args:
        source: whatever `read_records` takes, a folder that `enc2gen prepare` wrote (its train split), or "-" for
            standard input.
        field: field that holds the text; line breaks in it separate lines.
        language: of all lines, in canonical form.
        language_field: field that holds the language; None for `<field>_lang`, "language" or "lang" where a record
            has it and its value is a language tag.

    Raises:
        DataError: the source cannot be read, lacks a field, or the text is none or holds half of a character.
        LanguageError: `language_field` holds no language tag.
    """
    from enc2gen.corpora.readers import read_records

    if source == STANDARD_INPUT:
        return _lines(_input_records(), "standard input", "text", language, None)
    folder = Path(source)
    prepared = (folder / "manifest.json").is_file() and (folder / "train").is_dir()
    # Opened now, so that a missing file is told before the tokenizer is loaded.
    records = read_records(folder / "train" if prepared else source)
    return _lines(records, source, field, language, language_field)


def _lines(
    records: Iterable[Record], source: str, field: str, language: str | None, language_field: str | None
) -> Iterator[tuple[str, str | None]]:
    from enc2gen.corpora.text_values import check_whole

    for number, record in enumerate(records, 1):
        missing = [name for name in (field, language_field) if name is not None and name not in record]
        if missing:
            raise DataError(
                f"no field {missing[0]!r} in record {number}; there are: {', '.join(map(str, record)) or 'none'}",
                where=source,
                remedy="name the field that holds the text with --field, that of the language with --language-field",
            )
        text = record[field]
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(
                f"field {field!r} of record {number} holds a {type(text).__name__}, not text",
                where=source,
                remedy="name a field that holds text with --field",
            )
        check_whole(text, field, where=f"{source}, record {number}")
        tag = language or _record_language(record, field, language_field, f"{source}, record {number}")
        # Only "\n" ends a line, as in files of plain text: texts hold U+2028 and the like.
        yield from ((line.removesuffix("\r"), tag) for line in text.split("\n") if line.strip())


def _record_language(record: Record, field: str, language_field: str | None, where: str) -> str | None:
    from enc2gen.corpora.languages import normalise_language

    if language_field is not None:
        return normalise_language(str(record[language_field]), where=where)
    for name in (f"{field}_lang", "language", "lang"):
        if isinstance(value := record.get(name), str):
            try:
                return normalise_language(value)
            except LanguageError:  # a field of the same name for something else
                return None
    return None


def _input_records() -> Iterator[Record]:
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"byte {error.start + 1} is not UTF-8",
                where=f"standard input, line {number}",
                remedy="convert it, for example with iconv -t UTF-8",
            ) from error
        yield {"text": line.rstrip("\r\n")}
