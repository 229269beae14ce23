"""What all HTML reports have in common: how templates are read, and that a page is written whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from enc2gen.errors import OutputError


def html_environment(package: str) -> Environment:
    """Templates in `templates/` of `package`: everything is escaped, and an unknown name is an error.

    The filter `with_code` sets what stands between backticks as code.
    """
    environment = Environment(
        loader=PackageLoader(package, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["with_code"] = _with_code
    return environment


def _with_code(text: str) -> Markup:
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


@contextmanager
def writing_report(where: Path) -> Iterator[None]:
    """Errors of writing a report become `OutputError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"the report cannot be written: {reason}", where=str(where), remedy="check space and rights"
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Put `text` into the file at `path`: a reader sees the old file or the new one. May raise `OSError`.

    Half of a surrogate pair cannot be encoded; it is written as "?" rather than lost with the report.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)
