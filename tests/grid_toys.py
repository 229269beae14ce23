"""A tiny experiment that several test files share, and a runner that carries runs out in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import yaml

from enc2gen.cli import main
from enc2gen.experiments.grid.engines import Command, Outcome
from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.grid.records import RunRecord

LETTERS = "abcdefghij"
CYRILLIC = dict(zip(LETTERS, "абвгдежзий", strict=True))


def write_pairs(path: Path, count: int = 160) -> Path:
    """Pairs whose target is the source in Cyrillic letters."""
    rows = ["en\tkk"]
    for index in range(count):
        word = "".join(LETTERS[(index // 10**place) % 10] for place in range(3))
        rows.append(f"{word}\t{''.join(CYRILLIC[letter] for letter in word)}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def stage(**training: Any) -> dict[str, Any]:
    """A stage of four steps."""
    settings = {
        "max_steps": 4,
        "learning_rate": 1e-3,
        "eval_every": 4,
        "save_every": 2,
        "precision": "fp32",
        "tensorboard": False,
    }
    return {"training": settings | training, "batching": {"max_tokens": 256}}


def definition(encoder: Path, **changes: Any) -> dict[str, Any]:
    """An experiment with one task that pretrains two variants."""
    content: dict[str, Any] = {
        "name": "toy",
        "question": "Does sharing help?",
        "reference": "shared",
        "headline": "chrf++",
        "seeds": 1,
        "recipe": {
            "languages": ["kk"],
            "encoder": {"name": str(encoder), "trim_vocabulary": True},
            "data": {
                "datasets": [
                    {
                        "path": "{data}/pairs.tsv",
                        "fields": {"source": "en", "target": "kk", "source_language": "en", "target_language": "kk"},
                        "dev_percent": 10,
                        "test_percent": 10,
                    }
                ],
                "denoise_targets": True,
                "max_source_length": 32,
                "max_target_length": 32,
            },
            "finetune": stage(),
            "evaluate": {
                "metrics": ["chrf++", "exact-match"],
                "decoding": {"num_beams": 1, "max_new_tokens": 6},
                "resamples": 100,
                "samples": 1,
            },
        },
        "pretraining": {"pretrain": stage()},
        "variants": {"shared": {}, "random": {"system": {"preset": "no-sharing"}}},
    }
    return content | changes


def write_definition(path: Path, content: dict[str, Any]) -> Path:
    """The definition as a file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def finish(run: GridRun, status: int = 0) -> GridRun:
    """The run, recorded as begun and ended now."""
    run.folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord(run)
    record.begin()
    record.add(status, 0.0, 0.0)
    return run


class InProcess:
    """Carries out the command's runs in this process, one after the other; the commands are kept in `started`.

    Args:
        broken: parts of names of runs that end with exit status 1 instead.
    """

    slots = 1

    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        self.broken = broken
        self.started: list[str] = []
        self.interrupted = False
        self._ended: list[tuple[str, Outcome]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, name: str, command: Command) -> None:
        """Carry out a command."""
        self.started.append(name)
        status = 1
        if not any(part in name for part in self.broken):
            main.console.quiet = True
            try:
                main.app(list(command.arguments[2:]), standalone_mode=False)
            finally:
                main.console.quiet = False
            status = 0
        self._ended.append((name, Outcome(status, 1.5, 2.0)))

    def ended(self) -> Iterator[tuple[str, Outcome]]:
        """Everything that was started."""
        ended, self._ended = self._ended, []
        yield from ended

    def interrupt(self) -> None:
        """Remember that it was asked for."""
        self.interrupted = True
