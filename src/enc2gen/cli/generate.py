"""`enc2gen generate`: lines in, lines out."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoConfig

from enc2gen.errors import ConfigError, DataError, Interrupted, OutputError
from enc2gen.generation.blocks import Job, Tally
from enc2gen.generation.outputs import Output
from enc2gen.generation.scaling import best_line, generate_to_file, write_here


def read_lines(path: Path | None) -> list[str]:
    """Lines of a UTF-8 file, or of standard input.

    Raises:
        DataError: missing, unreadable, empty or not UTF-8.
    """
    where = str(path) if path else "standard input"
    try:
        raw = path.read_bytes() if path else sys.stdin.buffer.read()
        text = raw.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError("there is no such file", where=where) from error
    except OSError as error:  # a folder, say
        raise DataError(f"cannot read: {error.strerror}", where=where, remedy="give a text file") from error
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


def check_apart(output_file: Path | None, *inputs: str | Path | None) -> None:
    """Raise `ConfigError` if writing a file would replace what is read.

    Args:
        output_file: to be written; None for standard output.
        inputs: files, folders or other sources; "-" is standard input, None nothing.
    """
    if output_file is None or not output_file.is_file():
        return
    written = Path(os.path.realpath(output_file))
    for given in inputs:
        if given is None:
            continue
        source = Path(os.path.realpath(given))
        if written.samefile(source) if source.is_file() else _is_read(written, source, str(given)):
            raise ConfigError(
                f"this file is read ({given}), and would be lost",
                where=f"--output {output_file}",
                remedy="write into another file",
            )


def _is_read(written: Path, source: Path, given: str) -> bool:
    """Whether an existing file lies in a folder that is read, or is what comes in as standard input."""
    if source.is_dir():
        return written.is_relative_to(source)
    try:
        return given == "-" and os.path.samestat(os.fstat(sys.stdin.fileno()), written.stat())
    except (OSError, ValueError, AttributeError):  # standard input is no file
        return False


def check_writable(path: Path) -> None:
    """Find out before the work, not after it, that `path` cannot be written; what is there is left as it is."""
    try:
        if _is_stream(path) and not path.is_dir():  # opening a pipe and closing it again would end it for its reader
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        path = Path(os.path.realpath(path))  # a link stays a link, also one to a file that is still to be written
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
    job: Job,
    input_file: Path | None,
    output_file: Path | None,
    errors: Console,
    engine: str = "local",
    workers: int | None = None,
    text_of: Callable[[Sequence[Output]], str] = best_line,
) -> None:
    """Write one output line per input line, in order; an empty line stays empty.

    A file is written by finished blocks, so that an interrupted call goes on where it stopped; `text_of` makes the line
    of a source's outputs.
    """
    _check_engine(engine, workers, output_file)
    lines = read_lines(input_file)
    if output_file is not None:
        check_writable(output_file)
    if job.source_language is None and _needs_source_language(job.model):
        errors.print("note: no --from language; this model was trained with one on every source", highlight=False)
    columns = (TextColumn("writing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=sum(1 for line in lines if line.strip()))

        def on_progress(finished: int) -> None:
            progress.update(task, completed=finished)

        if output_file is None or _is_stream(output_file):
            written = list(write_here(job, job.blocks(lines), None, on_progress))
            tally = Tally()
            for block in written:
                tally.add(block)
        else:
            try:
                tally = generate_to_file(
                    job, lines, output_file, engine=engine, workers=workers, text_of=text_of, on_progress=on_progress
                )
            except KeyboardInterrupt as error:
                raise Interrupted("interrupted; finished lines are kept", where=str(output_file)) from error
            written = []
    for warning in _warnings(tally):
        errors.print(f"warning: {warning}", highlight=False)
    if written:
        write_output("".join(text_of(outputs) for block in written for outputs in block.outputs), output_file)


def _warnings(tally: Tally) -> Iterator[str]:
    if tally.truncated:
        yield f"{_lines(tally.truncated)} longer than {tally.max_source_length} tokens: the rest was not read"
    if tally.unended:
        yield f"{_lines(tally.unended)} with an output cut at the longest length (--max-new-tokens)"
    if tally.unmet:
        yield f"{_lines(tally.unmet)} with an output that lacks a required term; --json names it"


def _lines(count: int) -> str:
    return f"{count} line{'s' if count > 1 else ''}"


def _check_engine(engine: str, workers: int | None, output_file: Path | None) -> None:
    """`ConfigError` for options that would do nothing."""
    if engine == "local":
        if workers is not None:
            raise ConfigError(
                "one process writes here, with all cores or the GPU",
                where="--workers",
                remedy="add --engine ray, or leave it out",
            )
    elif output_file is None or _is_stream(output_file):
        raise ConfigError(f"the engine {engine} writes files", where="--engine", remedy="add --output FILE")


def _is_stream(path: Path) -> bool:
    """Whether `path` is a pipe or a device, which is written to and never replaced."""
    return path.exists() and not path.is_file()


def _needs_source_language(model: str) -> bool:
    """Whether the model was trained with a language on its sources, and has no default one."""
    try:
        config: Any = AutoConfig.from_pretrained(model)
    except (OSError, ValueError):  # it will be explained when the model is loaded
        return False
    languages = getattr(config, "languages", None) or {}
    return len(languages) > 1 and getattr(config, "default_source_language", None) is None
