"""What is held out stays unseen, whichever way pairs are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from enc2gen.data.tasks import Example

Row = TypeVar("Row")

REVERSE_SPLIT = "by the file's source field"
"""How pairs read in reverse are split; part of what prepared data depend on, where there are any."""

OWN_FILES = "without the sources of dev and test files"
"""What is trained on where dev or test have files of their own; part of what prepared data depend on, where they do."""

BY_CONTEXT = "by the context"
"""How questions are split; part of what prepared data depend on, where there are any."""

DRAWN = "by a hash of their texts"
"""How examples are chosen where there are more than a limit; part of what scores depend on, where there is one."""


def drawn(rows: Sequence[Row], limit: int | None, text: Callable[[Row], str]) -> list[Row]:
    """At most `limit` of these rows, in their order; all if it is None.

    Chosen by a hash of the `text` of each, so that they are a sample whatever the order (corpora are sorted by
    language, domain or alphabet), the same in every run, and those of a smaller limit are among those of a larger one.
    """
    if limit is None or len(rows) <= limit:
        return list(rows)

    ranks = [limit_rank(text(row)) for row in rows]
    return [rows[number] for number in sorted(sorted(range(len(rows)), key=ranks.__getitem__)[:limit])]


def limit_rank(text: str) -> int:
    """A number that orders texts at random, the same in every run: the lowest stay where a limit leaves some out."""
    return int.from_bytes(hashlib.sha256(f"limit {text}".encode("utf-8", "surrogatepass")).digest()[:8], "big")


def how_split(task: str, fields: Mapping[str, Any], *, own_files: bool = False) -> dict[str, str]:
    """What identifies the split of a data set beside its settings; empty if it is by a hash of the source alone.

    Args:
        task: name of the task.
        fields: the task's mapping.
        own_files: dev or test has a file of its own.
    """
    marks = {
        "reverse_split": REVERSE_SPLIT if _read_in_reverse(fields) else None,
        "own_files": OWN_FILES if own_files else None,
        "question_split": BY_CONTEXT if task == "reading-comprehension" else None,
    }
    return {name: mark for name, mark in marks.items() if mark is not None}


def reading(example: Example) -> tuple[str, str | None, str]:
    """What a model is given: the source, its language, and the language to write."""
    return example.source, example.source_language, example.target_language


def unseen(
    read: Callable[[], Iterable[tuple[str, Example]]],
    fields: Mapping[str, Any],
    *,
    where: str,
    log: Callable[[str], None],
    own_files: bool = False,
) -> Iterator[tuple[str, Example]]:
    """Examples with their split ("train", "dev" or "test"), without those whose source another split holds out.

    Pairs that are read in reverse are split by the text that they write, of which one source may have several, and
    files of dev and test may repeat what is trained on: training examples are left out if their source is in dev or
    test, dev examples if it is in test. Other examples are split by their source, and pass unread.

    Args:
        read: reads the examples from the start; called twice if any may be left out.
        fields: the task's mapping.
        where: what is read, for the log.
        log: told how many were left out, if any.
        own_files: dev or test has a file of its own.
    """
    if not (own_files or _read_in_reverse(fields)):
        yield from read()
        return
    places: dict[tuple[str, str | None, str], str] = {}
    for split, example in read():
        if split == "test" or (split == "dev" and places.get(reading(example)) != "test"):
            places[reading(example)] = split
    left_out = 0
    for split, example in read():
        if places.get(reading(example), split) == split:
            yield split, example
        else:
            left_out += 1
    if left_out:
        log(f"{where}: {left_out:,} examples left out, whose source is held out for dev or test")


def _read_in_reverse(fields: Mapping[str, Any]) -> bool:
    """Whether a task's mapping reads pairs from target to source, alone or too."""
    return bool(fields.get("directions", "forward") != "forward")
