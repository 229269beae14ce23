"""Data flows one way; no import goes back up."""

from __future__ import annotations

import ast
from pathlib import Path

LAYERS = [
    "errors", "registry", "locking", "corpora", "tokenization", "data", "encoders", "llms", "models", "training",
    "generation", "evaluation", "experiments", "cli",
]  # fmt: skip
SOURCE = Path(__file__).parents[1] / "src" / "enc2gen"


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("enc2gen."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("enc2gen.")}
    return names


def test_no_import_goes_up() -> None:
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        layer = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if layer == "__init__":
            continue
        above = LAYERS[LAYERS.index(layer) + 1 :]
        wrong += [f"{path.relative_to(SOURCE)} imports {name}" for name in sorted(imported(path)) if name in above]
    assert not wrong


def test_files_stay_small() -> None:
    long = [
        str(p.relative_to(SOURCE))
        for p in SOURCE.rglob("*.py")
        if len(p.read_text(encoding="utf-8").splitlines()) > 400
    ]
    assert not long
