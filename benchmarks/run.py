"""Answer questions about speed and memory: python -m benchmarks.run QUESTION... (all by default).

Questions: train_full_vocabulary, train_memory, train_trimmed, beam4, beam4_int8, ctranslate2_int8,
generation_scaling, faults.
Prints Markdown and keeps each answer in benchmarks/results/latest.json under the question's name (with @MODEL where it
is not the default model); answers to other questions stay.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.measuring import SideError
from benchmarks.reporting import RESULTS, described, markdown, store

MODULES = {
    "train_full_vocabulary": "training",
    "train_memory": "memory",
    "train_trimmed": "training",
    "beam4": "beams",
    "beam4_int8": "beams",
    "ctranslate2_int8": "ctranslate",
    "generation_scaling": "scaling",
    "faults": "kills",
}
DEFAULT_MODEL = "embedded"
# Numbers of a smoke run: every part works, no figure means anything.
QUICK: dict[str, Any] = {
    "model": "tiny", "turns": 1, "steps": 1, "examples": 40, "target_tokens": 200, "sentences": 8, "max_new_tokens": 6,
    "most": 10, "kills": 1,
}  # fmt: skip
FULL: dict[str, Any] = {
    "model": DEFAULT_MODEL, "turns": 5, "steps": 2, "examples": 1600, "target_tokens": 4000, "sentences": 64,
    "max_new_tokens": 40, "most": 10_000, "kills": 50,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("questions", nargs="*", metavar="QUESTION", help="one or more of the questions; all by default")
    add("--quick", action="store_true", help="smoke run on a tiny model; its figures mean nothing and are not kept")
    add("--model", help="embedded, cino (CINO-base shape), tiny, or the folder of a trained model [embedded]")
    add("--threads", type=int, default=2, help="CPU threads of each side [2]")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU where there is one [auto]")
    add("--precision", choices=("fp32", "bf16", "int8"), help="other than the question's own")
    add("--compile", action="store_true", help="train_trimmed, train_full_vocabulary: our layers by torch.compile")
    add("--padded", action="store_true", help="the same questions: our side keeps padding, too")
    kinds, told = (
        ("product", "by-source"),
        "train_trimmed, train_full_vocabulary: our own, or by source length [product]",
    )
    add("--batches", choices=kinds, default="product", help=told)
    add("--turns", type=int, help="turns of each side that count [5]")
    add("--steps", type=int, help="updates in a turn of training [2]")
    add("--target-tokens", type=int, help="target tokens of a training batch, about [4000]")
    add("--examples", type=int, help="sentence pairs that batches are drawn from [1600]")
    add("--sentences", type=int, help="sentences written in a turn [64]")
    add("--max-new-tokens", type=int, help="longest output [40]")
    add("--language", default="kk", help="language to write [kk]")
    add("--data", help="data/ of a run: its test examples instead of NTREX or built-in text")
    add("--most", type=int, help="generation_scaling: the largest number of sentences [10000]")
    add("--kills", type=int, help="faults: random kills [50]")
    add("--seed", type=int, default=0, help="of weights, order and kills [0]")
    add("--output", type=Path, help="results file [benchmarks/results/latest.json]")
    return made


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command line's settings over those of a full or a quick run."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return {"precision": None, "data": None, "output": None, **(QUICK if arguments.quick else FULL), **given}


def main(words: list[str] | None = None) -> int:
    """Answer the questions; 1 if one could not be answered."""
    words = sys.argv[1:] if words is None else words
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the sides end with this process
    made = parser()
    arguments = made.parse_args(words)
    questions = arguments.questions or list(MODULES)
    if unknown := [question for question in questions if question not in MODULES]:
        made.error(f"unknown question {unknown[0]!r}; choose from {', '.join(MODULES)}")
    options, failed = options_of(arguments), False
    path = options["output"] or (None if arguments.quick else RESULTS)
    for question in questions:
        module = importlib.import_module(f"benchmarks.{MODULES[question]}")
        try:
            found = module.run(question, options)
        except SideError as error:
            print(f"{question}: {error}", file=sys.stderr)
            failed = True
            continue
        command = f"python -m benchmarks.run {shlex.join([question, *_rest(words, questions)])}"
        entry = described(found, command=command, seed=options["seed"], threads=options["threads"])
        marks = [] if options["model"] in (DEFAULT_MODEL, "tiny") else [Path(options["model"]).name]
        marks += found.get("variant", [])
        name = "@".join([question, *(["-".join(marks)] if marks else [])])
        print(markdown(name, entry), end="\n\n", flush=True)
        if path is not None:
            store(name, entry, path)
    return int(failed)


def _rest(words: list[str], questions: list[str]) -> list[str]:
    return [word for word in words if word not in questions]


if __name__ == "__main__":
    sys.exit(main())
