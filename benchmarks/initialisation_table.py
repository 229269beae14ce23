"""Masked-LM loss per initialisation, from runs of benchmarks/initialisation.yaml with several seeds, in Markdown."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev


def main() -> None:
    """Read `encoders/*/adaptation.json` of each run and print mean and standard deviation over the runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, one for each seed")
    runs: list[Path] = parser.parse_args().runs
    found: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        for path in sorted(run.glob("encoders/*/adaptation.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            measured = {"at the start": record["before"], **{f"after {k}": v for k, v in record["stages"].items()}}
            found.setdefault(path.parent.name, []).append(measured)
    columns = list(next(iter(found.values()))[0])
    print(f"| initialisation | seeds | {' | '.join(columns)} |\n| --- | --- |{' --- |' * len(columns)}")
    for name, records in sorted(found.items(), key=lambda item: mean(record[columns[-1]] for record in item[1])):
        cells = []
        for column in columns:
            values = [record[column] for record in records]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        print(f"| {name} | {len(records)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
