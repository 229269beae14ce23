"""The question `faults`: benchmarks/faults.py in a process of its own, and what it found as an entry of the results."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measuring import SideError, environment

SCRIPT = Path(__file__).with_name("faults.py")


def run(question: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Kill `kills` runs at random moments and return the entry of the results file."""
    with tempfile.TemporaryDirectory() as folder, environment(options["threads"], "cpu"):
        output = Path(folder) / "faults.json"
        command = [sys.executable, str(SCRIPT), "--kills", str(options["kills"]), "--seed", str(options["seed"])]
        done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)
        if not output.is_file():
            raise SideError(f"faults.py ended with {done.returncode}:\n{done.stderr}")
        found = json.loads(output.read_text(encoding="utf-8"))
    plain = {name: value for name, value in found.items() if isinstance(value, int | float | str)}
    rows = {name.replace("_", " "): value for name, value in plain.items()}
    return {
        "speedup": None,
        "memory_ratio": None,
        "spread": None,
        "limit_fraction": None,
        **plain,
        "remarks": {
            "runs that ended bit for bit as the undisturbed one": f"{found['identical']} of {found['kills']}",
            "unreadable states": str(found["unreadable"]),
        },
        "rows": {"value": rows},
        "setting": "a tiny model; see benchmarks/faults.py",
    }
