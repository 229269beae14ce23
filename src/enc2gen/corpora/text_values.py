"""What a record's field holds, as text."""

from __future__ import annotations

import math
from typing import Any

from enc2gen.errors import DataError


def as_text(value: Any, field: str, *, where: str, remedy: str) -> str:
    """The text of a field's value, as it is; empty for null and for NaN, which tables have for an empty cell.

    Numbers are text, too: untyped readers of TSV and CSV turn the answer "1984" into one.

    Raises:
        DataError: the value is no text; says `where`, and the `remedy`.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"field {field!r} holds a {type(value).__name__}, not text", where=where, remedy=remedy)


def well_formed(text: str) -> str:
    """The text with "?" for each half of a character (a lone surrogate), so that it can be written as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def check_whole(text: str, field: str, *, where: str) -> str:
    """The text, if it can be written as UTF-8.

    Raises:
        DataError: it holds half of a character (a lone surrogate), as JSON has it where an emoji was cut in two.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"field {field!r} holds half of a character (U+{ord(text[error.start]):04X})",
            where=where,
            remedy="the text was cut within an emoji or a rare character: remove that half, or leave the record out",
        ) from error
    return text
