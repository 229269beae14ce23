"""`enc2gen classify`: texts in, labels out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from enc2gen.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from enc2gen.evaluation.classification import Classification
    from enc2gen.generation.bridge_generator import BridgeGenerator

_TEXT_FIELD = "text"
_HEADER = ("text", "label", "probability")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("classify")(classify)


def classify(
    model: Annotated[str, typer.Argument(help="Folder of a trained bridge.", show_default=False)],
    input_file: Annotated[
        str,
        typer.Option("--input", "-i", help="Texts: a file of lines, JSONL, TSV, CSV or Parquet; - for standard input."),
    ],
    labels: Annotated[
        str | None, typer.Option("--labels", help="Labels, parted by commas; else those the model was trained on.")
    ] = None,
    field: Annotated[
        str | None, typer.Option("--field", help="Field that holds the text.", show_default=_TEXT_FIELD)
    ] = None,
    gold: Annotated[
        str | None, typer.Option("--gold", help="Field that holds the right label: the accuracy is printed.")
    ] = None,
    method: Annotated[
        Literal["likelihood", "generation"],
        typer.Option("--method", help="The likeliest label, or what the model writes, which may be none of them."),
    ] = "likelihood",
    output_file: Annotated[
        Path | None, typer.Option("--output", "-o", help="TSV file to write; else standard output.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts read at once.")] = 32,
) -> None:
    """Label texts with a bridge: enc2gen classify MODEL --input texts.txt --labels sports,politics

    Writes a table with a header, one row per text: text, label, probability of the label among the labels.
    """
    from enc2gen.cli.generate import check_apart, check_writable
    from enc2gen.corpora.readers import source_sides
    from enc2gen.evaluation.classification import classify as label_texts

    errors = Console(stderr=True)
    check_apart(output_file, *source_sides(input_file))
    texts, gold_labels = _read(input_file, field, gold)
    if output_file is not None:
        check_writable(output_file)
    generator = _load(model)
    chosen = _labels(labels, generator, model)
    with _progress(errors) as progress:
        task = progress.add_task("", total=len(texts))
        result = label_texts(
            generator.model,
            generator.codec,
            texts,
            chosen,
            method=method,
            batch_size=batch_size,
            on_batch=lambda finished: progress.update(task, completed=finished),
        )
    _write(texts, result, output_file)
    _tell(result, gold_labels, generator, errors)


def _load(model: str) -> BridgeGenerator:
    from enc2gen.generation.bridge_generator import BridgeGenerator
    from enc2gen.generation.generator import Generator

    generator = Generator.from_pretrained(model)
    if not isinstance(generator, BridgeGenerator):
        raise ModelError("this model is no bridge", where=model, remedy="use `enc2gen generate` for it")
    return generator


def _read(source: str, field: str | None, gold: str | None) -> tuple[list[str], list[str]]:
    """Texts and, if asked for, their right labels."""
    if source == "-":
        from enc2gen.cli.generate import read_lines

        for option, name in (("--field", field), ("--gold", gold)):
            if name is not None:
                raise ConfigError("lines have no fields", where=option, remedy="give a JSONL, TSV or CSV file")
        return [line for line in read_lines(None) if line.strip()], []
    from enc2gen.corpora.readers import read_records

    texts: list[str] = []
    right: list[str] = []
    for number, record in enumerate(read_records(source), 1):
        for name, option, values in ((field or _TEXT_FIELD, "--field", texts), (gold, "--gold", right)):
            if name is None:
                continue
            if name not in record:
                raise DataError(
                    f"no field {name!r}; there are: {', '.join(map(str, record)) or 'none'}",
                    where=f"{source}, record {number}",
                    remedy="name the field that holds the text with --field, that with the label with --gold",
                )
            values.append(_text(record[name], name, option, f"{source}, record {number}"))
    if not texts:
        raise DataError("there is no text", where=source, remedy="give at least one text")
    return texts, right


def _text(value: Any, field: str, option: str, where: str) -> str:
    from enc2gen.corpora.text_values import as_text, check_whole

    text = as_text(value, field, where=where, remedy=f"name a field of text with {option}")
    if not text.strip():
        raise DataError(f"field {field!r} is empty", where=where, remedy="fill it, or remove the record")
    return check_whole(text, field, where=where)


def _labels(given: str | None, generator: BridgeGenerator, model: str) -> list[str]:
    known = list(getattr(generator.model.config, "labels", None) or [])
    labels = [label.strip() for label in given.split(",") if label.strip()] if given is not None else known
    if not labels:
        raise ConfigError(
            "which labels are there to choose from?",
            where=model,
            remedy="name them as the bridge was trained to write them: --labels sports,politics,travel",
        )
    return labels


def _progress(errors: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("labelling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)


def _write(texts: list[str], result: Classification, output_file: Path | None) -> None:
    rows = [_HEADER]
    shares = result.probabilities
    for index, (text, label) in enumerate(zip(texts, result.predictions, strict=True)):
        share = "" if shares is None else f"{shares[index].max():.4f}"
        rows.append((" ".join(text.split()), " ".join(label.split()), share))
    table = "".join("\t".join(row) + "\n" for row in rows)
    from enc2gen.cli.generate import write_output

    write_output(table, output_file)


def _tell(result: Classification, gold: list[str], generator: BridgeGenerator, errors: Console) -> None:
    """What is worth knowing beside the table, on standard error."""
    if generator.codec.truncated:
        errors.print(
            f"warning: {generator.codec.truncated} texts were longer than "
            f"{generator.codec.max_source_length} tokens and were cut",
            highlight=False,
        )
    if result.log_likelihoods is None:
        others = sum(label not in result.labels for label in result.predictions)
        if others:
            errors.print(f"note: {others} outputs are none of the labels", highlight=False)
    if gold:
        from enc2gen.evaluation.accuracy import accuracy, correctness

        score = accuracy(correctness(result.predictions, gold))
        errors.print(f"{score}  ({score.n} texts)", highlight=False, markup=False)
        if unknown := sorted(set(gold) - set(result.labels)):
            errors.print(f"warning: no such label to choose: {', '.join(unknown[:5])}", highlight=False, markup=False)
