"""The init report: where each decoder tensor of a freshly grown model came from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

Origin = Literal["copied", "tied", "random", "constant"]
REPORT_FILE = "init_report.json"
"""Name of the report beside a saved model."""

ORIGINS: tuple[Origin, ...] = ("copied", "tied", "random", "constant")


@dataclass(frozen=True)
class TensorOrigin:
    """One decoder tensor.

    Attributes:
        name: parameter name in the model.
        origin: `copied` from or `tied` to `source`; `random`; `constant` (a fresh norm's ones, a fresh bias's zeros).
        source: the encoder's parameter, for copied and tied tensors.
        shape: of the tensor.
        note: what else a reader should know, such as rows added for language tokens.
    """

    name: str
    origin: Origin
    shape: tuple[int, ...]
    source: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class InitReport:
    """Origins of all decoder and LM head tensors, and the plan they follow."""

    encoder: str
    plan: list[str]
    tensors: list[TensorOrigin] = field(default_factory=list)
    parameters: int = 0

    def names(self, origin: Origin) -> list[str]:
        """Names of the tensors of one origin."""
        return [tensor.name for tensor in self.tensors if tensor.origin == origin]

    def counts(self) -> dict[str, int]:
        """Number of tensors by origin."""
        return {origin: len(self.names(origin)) for origin in ORIGINS}

    def elements(self) -> dict[str, int]:
        """Number of weights by origin."""
        totals: dict[str, int] = {origin: 0 for origin in ORIGINS}
        for tensor in self.tensors:
            size = 1
            for length in tensor.shape:
                size *= length
            totals[tensor.origin] += size
        return totals

    def to_dict(self) -> dict[str, object]:
        """JSON form."""
        return {
            "encoder": self.encoder,
            "plan": self.plan,
            "parameters": self.parameters,
            "counts": self.counts(),
            "elements": self.elements(),
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> InitReport:
        """Read a saved report."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        tensors = [TensorOrigin(**{**entry, "shape": tuple(entry["shape"])}) for entry in content["tensors"]]
        return cls(content["encoder"], content["plan"], tensors, content["parameters"])

    def summary(self) -> Table:
        """Counts by origin, as a table for the terminal."""
        table = Table(title=f"Decoder grown from {self.encoder}: {len(self.plan)} layers", title_justify="left")
        for column in ("origin", "tensors", "weights", "for example"):
            table.add_column(column, justify="right" if column in ("tensors", "weights") else "left")
        for origin in ORIGINS:
            names = self.names(origin)
            if names:
                tensor = next(t for t in self.tensors if t.name == names[0])
                example = f"{tensor.name} <- {tensor.source}" if tensor.source else tensor.name
                table.add_row(origin, str(len(names)), f"{self.elements()[origin]:,}", example)
        table.caption = f"layers: {' '.join(self.plan)}; {self.parameters:,} parameters in the whole model"
        table.caption_justify = "left"
        return table

    def print(self, console: Console | None = None) -> None:
        """Print the summary (standard error by default, so that piped output stays clean)."""
        (console or Console(stderr=True)).print(self.summary())

    def __str__(self) -> str:
        lines = (f"{t.origin:8s} {t.name}" + (f" <- {t.source}" if t.source else "") for t in self.tensors)
        return "\n".join(lines)
