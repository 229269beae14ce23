"""What the questions about writing share: texts to write from, a side that writes them, and operations done."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import Turns, synchronise
from benchmarks.workloads import MODELS, Pair, attention_products, build_model, load_pairs, product_rows

if TYPE_CHECKING:
    from enc2gen import Generator

NEVER = -1e4
"""Bias of the end token in models of random weights, so that every output has the full length."""


@dataclass(frozen=True)
class Task:
    """Sources, their references and languages; picklable."""

    sources: list[str]
    references: list[list[str]]
    source_language: str | None
    target_language: str
    origin: str
    pairs: list[Pair]


def load_task(options: Mapping[str, Any], sentences: int) -> Task:
    """`sentences` texts to write from: a run's test examples where `--data` says so, else those of `load_pairs`; again
    from the first where there are fewer."""
    language = options["language"]
    if options["data"]:
        from enc2gen.experiments.prepare import PreparedData

        examples = PreparedData(Path(options["data"])).examples("test")
        rows = [row for row in examples if row["target_language"] == language]
        if not rows:
            raise SystemExit(f"{options['data']} has no test examples in {language}; choose another --language")
        found = [(row["source"], list(row["references"] or [row["target"]])) for row in rows]
        origin, source_language, pairs = "the run's test set", rows[0]["source_language"], []
    else:
        pairs, origin = load_pairs(options["examples"])
        found = [(source, [target]) for source, target, tag in pairs if tag == language]
        source_language = None
        if not found:
            raise SystemExit(f"there is no text in {language}; choose another --language")
    chosen = list(itertools.islice(itertools.cycle(found), sentences))
    return Task([row[0] for row in chosen], [row[1] for row in chosen], source_language, language, origin, pairs)


def make_generator(settings: Mapping[str, Any]) -> Generator:
    """The generator to measure. Random weights are kept from ending their outputs; a trained model ends as it likes."""
    import torch

    from enc2gen import Generator

    task: Task = settings["task"]
    model = build_model(
        settings["model"],
        growth=settings["growth"],
        trimmed=settings["trimmed"],
        pairs=task.pairs,
        seed=settings["seed"],
    )
    if settings["model"] in MODELS:
        with torch.no_grad():
            model.lm_head.bias[model.config.eos_token_id] = NEVER
    if settings.get("converted"):
        model = model.to(torch.bfloat16)
    return Generator(model.to("cuda" if torch.cuda.is_available() else "cpu"), model.tokenizer)


def write(turns: Turns, settings: dict[str, Any]) -> None:
    """Side: write all sources of the task with `settings["decoding"]`, or as many and as the request says.

    A request is a dictionary: `sentences` limits their number, the rest replaces fields of the `DecodingConfig`.
    """
    from enc2gen import DecodingConfig

    task: Task = settings["task"]
    generator = make_generator(settings)
    while True:
        request = dict(turns.next() or {})
        sources = task.sources[: request.pop("sentences", None)]
        config = DecodingConfig(**{**settings["decoding"], **request})
        start = time.perf_counter()
        outputs = generator.generate(
            sources, target_language=task.target_language, source_language=task.source_language, config=config
        )
        synchronise()
        seconds = time.perf_counter() - start
        lengths = _lengths(generator, settings, sources, outputs)
        turns.report(
            seconds=seconds,
            sentences=len(sources),
            tokens=sum(target for _, target in lengths),
            operations=beam_operations(generator.model, lengths, config.num_beams),
            outputs=outputs,
            vocabulary=generator.model.config.vocab_size,
            parameters=generator.model.num_parameters(),
        )


def _lengths(
    generator: Generator, settings: Mapping[str, Any], sources: Sequence[str], outputs: Sequence[str]
) -> list[tuple[int, int]]:
    """Source and target tokens of each output; of a trained model's, the output split again and its end token."""
    encoded = generator.codec.encode_sources(sources, settings["task"].source_language)
    if settings["model"] in MODELS:
        written = [settings["decoding"]["max_new_tokens"]] * len(outputs)
    else:
        written = [len(ids) + 1 for ids in generator.codec.encode_texts(outputs)]
    return [(len(source), target) for source, target in zip(encoded, written, strict=True)]


def beam_operations(model: Any, lengths: Sequence[tuple[int, int]], beams: int) -> float:
    """FLOP that writing takes at the least: sources once, targets once for each beam."""
    per_token = product_rows(model)
    total = 0
    for source, target in lengths:
        encoder = source * per_token["source"] + attention_products(model, source, 0)
        step = per_token["target"] + per_token["head"]
        attention = attention_products(model, source, target) - attention_products(model, source, 0)
        total += encoder + beams * (target * step + attention)
    return 2.0 * total
