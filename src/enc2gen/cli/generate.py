"""`enc2gen generate`: lines in, lines out."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from enc2gen.errors import DataError, OutputError
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.generator import Generator


def read_lines(path: Path | None) -> list[str]:
    """Lines of a UTF-8 file, or of standard input.

    Raises:
        DataError: missing, empty or not UTF-8.
    """
    where = str(path) if path else "standard input"
    try:
        raw = path.read_bytes() if path else sys.stdin.buffer.read()
        text = raw.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError("there is no such file", where=where) from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"byte {error.start} is not UTF-8",
            where=f"{where}, line {line}",
            remedy="convert it, for example with iconv -t UTF-8",
        ) from error
    lines = text.split("\n")
    lines = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    if not any(line.strip() for line in lines):
        raise DataError("there is no text", where=where, remedy="give one source a line")
    return lines


def check_writable(path: Path) -> None:
    """Find out before the work, not after it, that `path` cannot be written; an existing file is left as it is."""
    try:
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise OutputError(
            f"cannot write: {error.strerror}", where=str(path), remedy="check folder and rights"
        ) from error


def write_output(text: str, output_file: Path | None) -> None:
    """Write `text` as UTF-8 to a file, or to standard output; `OutputError` if the file cannot be written."""
    if output_file is None:
        sys.stdout.buffer.write(text.encode("utf-8"))
        sys.stdout.flush()
        return
    try:
        output_file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write: {error.strerror}", where=str(output_file), remedy="check space and rights"
        ) from error


def generate_lines(
    model: str,
    target_language: str | None,
    source_language: str | None,
    input_file: Path | None,
    output_file: Path | None,
    config: DecodingConfig,
    seed: int,
    errors: Console,
) -> None:
    """Load `model`, write one output line per input line, in order; an empty line stays empty."""
    lines = read_lines(input_file)
    if output_file is not None:
        check_writable(output_file)
    generator = Generator.from_pretrained(model)
    if generator.source_language(source_language) is None and len(generator.languages) > 1:
        errors.print("note: no --from language; this model was trained with one on every source", highlight=False)
    columns = (TextColumn("writing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=sum(1 for line in lines if line.strip()))
        outputs = generator.generate(
            lines,
            target_language=target_language,
            source_language=source_language,
            config=config,
            seed=seed,
            on_batch=lambda finished: progress.update(task, completed=finished),
        )
    if generator.codec.truncated:
        errors.print(
            f"warning: {generator.codec.truncated} input lines were longer than "
            f"{generator.codec.max_source_length} tokens and were cut",
            highlight=False,
        )
    text = "".join(" ".join(output.split()) + "\n" for output in outputs)
    write_output(text, output_file)
