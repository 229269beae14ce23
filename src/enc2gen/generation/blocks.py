"""Long inputs in blocks: each is written by itself and kept when it is finished, so that what was done is not lost.

What is written of a line depends on the settings, its block and its number in the input, not on who writes the block,
or when: an interrupted run that goes on, several workers and one process give the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from enc2gen import __version__
from enc2gen.errors import OutputError
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.generator import Generator, Request
from enc2gen.generation.glossary import Glossary
from enc2gen.generation.outputs import Output
from enc2gen.generation.shortlist import Shortlist
from enc2gen.locking import locked_folder
from enc2gen.training.checkpoint import write_json

BLOCK_LINES = 512
"""Least lines of a block (our choice): enough for batches of equal length, few enough to be lost."""
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Job:
    """What is done with every block of an input.

    Attributes:
        model: folder or Hub name of a trained model.
        target_language, source_language: as in `Generator.generate`; the others too.
        n: outputs of each line.
        scored: whether their scores are wanted, or several outputs (only the native engine has them).
        shortlist: tokens to be written, by language.
    """

    model: str
    target_language: str | None = None
    source_language: str | None = None
    config: DecodingConfig = field(default_factory=DecodingConfig)
    seed: int = 0
    glossary: Glossary | None = None
    n: int = 1
    scored: bool = False
    shortlist: Shortlist | None = None

    def load(self) -> Generator:
        """The generator; errors as of `Generator.from_pretrained`."""
        return Generator.from_pretrained(self.model, shortlist=self.shortlist)

    def request(self, first_line: int = 0) -> Request:
        """What a generator is asked for, for lines from `first_line` on."""
        scored = self.scored or self.n > 1
        return Request(
            self.target_language,
            self.source_language,
            self.config,
            self.seed,
            self.glossary,
            self.n,
            scored,
            first_line,
        )

    def blocks(self, lines: Sequence[str]) -> list[Block]:
        """Cut the input into blocks of whole batches."""
        size = self.config.batch_size * max(1, BLOCK_LINES // self.config.batch_size)
        starts = range(0, len(lines), size)
        return [Block(index, start, list(lines[start : start + size])) for index, start in enumerate(starts)]

    def identity(self, lines: Sequence[str]) -> dict[str, Any]:
        """Everything that the output depends on, as JSON: settings, version, and digests of model and input."""
        identity: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.glossary is not None:
            identity["glossary"] = _digest(repr(self.glossary.entries))
        if self.shortlist is not None:
            identity["shortlist"] = _digest(repr((self.shortlist.vocabulary, sorted(self.shortlist.languages.items()))))
        identity["config"] = self.config.model_dump(mode="json")
        identity["model"] = model_digest(self.model)
        identity["input"] = _digest("\n".join(lines))
        return {**identity, "block_lines": BLOCK_LINES, "enc2gen": __version__}


@dataclass(frozen=True)
class Block:
    """Lines `first_line`, `first_line + 1`, ... of the input; the first line of all has number 0."""

    index: int
    first_line: int
    texts: list[str]

    @property
    def present(self) -> int:
        """Lines with text."""
        return sum(1 for text in self.texts if text.strip())


@dataclass(frozen=True)
class WrittenBlock:
    """What was written of a block.

    Attributes:
        outputs: of every line, the best first.
        truncated: lines that were longer than `max_source_length` tokens and were cut.
    """

    index: int
    outputs: list[list[Output]]
    truncated: int
    max_source_length: int

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> WrittenBlock:
        """Inverse of :meth:`to_json`; `ValueError`, `TypeError` or `KeyError` for something else."""
        outputs = [
            [Output(**{**output, "unmet": tuple(output["unmet"])}) for output in several]
            for several in value["outputs"]
        ]
        return cls(int(value["index"]), outputs, int(value["truncated"]), int(value["max_source_length"]))


def check_blocks(generator: Generator, job: Job, blocks: Sequence[Block]) -> None:
    """Say before any block is written what would stop a later one; errors as of `Generator.check`.

    Blocks that were finished before could not be used with the glossary that repairs it.
    """
    generator.check((text for block in blocks for text in block.texts), job.request())


def write_block(
    generator: Generator, job: Job, block: Block, on_batch: Callable[[int], None] | None = None
) -> WrittenBlock:
    """Write the outputs of one block; errors as of `Generator.generate`."""
    before = generator.codec.truncated
    outputs = generator.write(block.texts, job.request(block.first_line), on_batch)
    codec = generator.codec
    return WrittenBlock(block.index, outputs, codec.truncated - before, codec.max_source_length)


@dataclass
class Tally:
    """What whoever reads the outputs should know of them.

    Attributes:
        truncated: lines that were longer than `max_source_length` tokens and were cut.
        unended: lines whose best output was cut at the longest length, as far as the engine knows it.
        unmet: lines whose best output lacks a required term.
    """

    truncated: int = 0
    max_source_length: int = 0
    unended: int = 0
    unmet: int = 0

    def add(self, written: WrittenBlock) -> None:
        """Count in a block."""
        self.truncated += written.truncated
        self.max_source_length = written.max_source_length
        self.unended += sum(not several[0].ended for several in written.outputs)
        self.unmet += sum(bool(several[0].unmet) for several in written.outputs)


class FinishedBlocks:
    """The folder of finished blocks beside an output file: `out.txt.parts` beside `out.txt`.

    Args:
        output: the file that they become.
        identity: of the job and its input; blocks of another one are never mixed in.

    Raises:
        OutputError: the folder holds finished blocks of another job, is in use, or cannot be written.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.output = Path(os.path.realpath(output))  # a link stays a link
        self.folder = self.output.with_name(f"{self.output.name}.parts")
        self._identity = dict(identity)

    @contextmanager
    def held(self) -> Iterator[FinishedBlocks]:
        """Make the folder and keep other processes out of it; an empty one is removed at the end."""
        with locked_folder(self.folder):
            try:
                with self._writing():
                    self._claim()
                yield self
            finally:
                if self.folder.is_dir() and not any(self.folder.glob("block-*.json")):
                    shutil.rmtree(self.folder, ignore_errors=True)

    def _claim(self) -> None:
        file = self.folder / _SETTINGS
        try:
            made = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            made = None
        if made != self._identity:
            if any(self.folder.glob("block-*.json")):
                raise OutputError(
                    f"it holds part of an output made with other settings ({_differences(made, self._identity)})",
                    where=str(self.folder),
                    remedy="go back to those settings to finish it, or delete the folder to start again",
                )
            write_json(file, self._identity)

    def read(self, block: Block) -> WrittenBlock | None:
        """What was written of `block`, if it is finished."""
        try:
            written = WrittenBlock.from_json(json.loads(self._path(block.index).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return written if len(written.outputs) == len(block.texts) else None

    def add(self, written: WrittenBlock) -> None:
        """Keep a finished block: whoever reads it sees all of it or nothing."""
        with self._writing():
            write_json(self._path(written.index), written.to_json())

    def join(self, blocks: Sequence[Block], text_of: Callable[[WrittenBlock], str]) -> None:
        """Write the output file at once, from all blocks in order, and remove their folder."""
        temporary = self.output.with_name(f".tmp-{self.output.name}")
        with self._writing():
            try:
                with temporary.open("w", encoding="utf-8", newline="") as file:
                    for block in blocks:
                        written = self.read(block)
                        if written is None:
                            raise OutputError("a finished block is gone", where=str(self._path(block.index)))
                        file.write(text_of(written))
                    file.flush()
                    os.fsync(file.fileno())
                if self.output.exists():
                    shutil.copymode(self.output, temporary)
                temporary.replace(self.output)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:08d}.json"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(
                f"cannot write: {error.strerror or error}",
                where=str(self.folder),
                remedy="free space or check rights, then run again: finished blocks are kept",
            ) from error


def model_digest(model: str) -> str:
    """SHA-256 over names and contents of the files of a model folder; a Hub name stands for itself."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _differences(made: object, wanted: Mapping[str, Any]) -> str:
    """What differs between two identities, values in words where they are no digests."""
    if not isinstance(made, dict):
        return "which ones cannot be read any more"
    then, now = ({**identity, **identity.get("config", {})} for identity in (made, wanted))
    changed = []
    for name in sorted({*then, *now} - {"config"}):
        old, new = then.get(name), now.get(name)
        if old != new:
            digests = name in ("model", "input", "glossary", "shortlist")
            changed.append(f"another {name}" if digests else f"{name} {old!r} then, {new!r} now")
    return "; ".join(changed)
