"""`enc2gen generate` as it is typed: its options, and what they come to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from enc2gen.errors import ConfigError

if TYPE_CHECKING:
    from enc2gen.generation.decoding import DecodingConfig
    from enc2gen.generation.glossary import Glossary
    from enc2gen.generation.outputs import Output


class Precision(StrEnum):
    """Arithmetic of the native engine."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"


class Decoder(StrEnum):
    """What decodes."""

    auto = "auto"
    native = "native"
    transformers = "transformers"


_SEARCH, _SAMPLING, _TERMS, _WHERE = "Search", "Sampling", "Terms", "Speed and place"


def _option(*names: str, help: str, panel: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **limits)


Model = Annotated[str, typer.Argument(help="Folder or Hub name of a trained model.", show_default=False)]
To = Annotated[str | None, typer.Option("--to", help="Language to write.")]
From = Annotated[str | None, typer.Option("--from", help="Language of the input.")]
Input = Annotated[Path | None, typer.Option("--input", "-i", help="Text file, one source a line; else standard input.")]
OutputFile = Annotated[Path | None, typer.Option("--output", "-o", help="Text file to write; else standard output.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Write JSON lines: text, score, whether it ended, required terms it lacks.")
]
NBest = Annotated[
    int, typer.Option("--n-best", min=1, help="Outputs for each line as JSON lines, the best first; samples as drawn.")
]
Beams = Annotated[
    int | None, _option("--beams", min=1, help="Beams of the search; 1 is greedy.", panel=_SEARCH, show_default="4")
]
Diverse = Annotated[
    float | None,
    _option("--diverse", min=0.001, help="Keep beams different: strength in nats, such as 0.5.", panel=_SEARCH),
]
LengthPenalty = Annotated[
    float, _option("--length-penalty", help="Scores are divided by length to this power.", panel=_SEARCH)
]
CoveragePenalty = Annotated[
    float, _option("--coverage-penalty", min=0, help="Weight of source tokens without attention.", panel=_SEARCH)
]
Ngram = Annotated[
    int, _option("--no-repeat-ngram-size", min=0, help="No token n-gram of this size twice.", panel=_SEARCH)
]
MaxTokens = Annotated[
    int | None, _option("--max-new-tokens", min=1, help="Instead of the model's limit.", panel=_SEARCH)
]
Sample = Annotated[bool, _option("--sample", help="Sample instead of searching.", panel=_SAMPLING)]
Temperature = Annotated[float, _option("--temperature", min=0.01, help="Of sampling.", panel=_SAMPLING)]
TopP = Annotated[float, _option("--top-p", min=0.01, max=1.0, help="Nucleus of sampling.", panel=_SAMPLING)]
Epsilon = Annotated[
    float, _option("--epsilon", min=0.0, max=0.99, help="Sample no token less probable than this.", panel=_SAMPLING)
]
Mbr = Annotated[
    int, _option("--mbr", min=0, help="Draw so many samples, keep the one most like the others.", panel=_SAMPLING)
]
Seed = Annotated[int, _option("--seed", min=0, help="Of sampling.", panel=_SAMPLING)]
GlossaryFile = Annotated[
    Path | None,
    _option("--glossary", help="TSV: source term, target term; a third column 'forbidden' bans it.", panel=_TERMS),
]
Forbid = Annotated[list[str] | None, _option("--forbid", help="Term not to be written. Repeatable.", panel=_TERMS)]
BatchSize = Annotated[int, _option("--batch-size", min=1, help="Sources decoded at once.", panel=_WHERE)]
PrecisionOption = Annotated[
    Precision, _option("--precision", help="int8 on CPUs, fp16 on GPUs, bf16 on both.", panel=_WHERE)
]
Compile = Annotated[
    bool, _option("--compile", help="Compile the decoder's layers (GPU; the first batches take longer).", panel=_WHERE)
]
ShortlistFile = Annotated[
    Path | None, _option("--shortlist", help="Write its tokens only (enc2gen shortlist).", panel=_WHERE)
]
Draft = Annotated[
    int, _option("--draft", min=0, help="Tokens guessed ahead by copying, with --beams 1; 0: off.", panel=_WHERE)
]
DecoderOption = Annotated[Decoder, _option("--decoder", help="What decodes; native where it can.", panel=_WHERE)]
Engine = Annotated[
    str,
    _option("--engine", help="Who writes: local (this process) or ray (a cluster; needs the extra ray).", panel=_WHERE),
]
Workers = Annotated[
    int | None,
    _option("--workers", min=1, help="Of ray, each with the model; else all GPUs, or cores.", panel=_WHERE),
]


_SAME = (
    "length_penalty",
    "coverage_penalty",
    "no_repeat_ngram_size",
    "max_new_tokens",
    "temperature",
    "top_p",
    "epsilon",
    "batch_size",
)
"""Options that are settings of the same name."""
_consoles: list[Callable[[], Console]] = []


def register(app: typer.Typer, errors: Callable[[], Console]) -> None:
    """Add the verb to the command; `errors` is where its notes go."""
    _consoles[:] = [errors]
    app.command("generate")(generate)


def generate(
    model: Model,
    to: To = None,
    source: From = None,
    input_file: Input = None,
    output_file: OutputFile = None,
    as_json: AsJson = False,
    n_best: NBest = 1,
    beams: Beams = None,
    diverse: Diverse = None,
    length_penalty: LengthPenalty = 1.0,
    coverage_penalty: CoveragePenalty = 0.0,
    no_repeat_ngram_size: Ngram = 0,
    max_new_tokens: MaxTokens = None,
    sample: Sample = False,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    epsilon: Epsilon = 0.0,
    mbr: Mbr = 0,
    seed: Seed = 0,
    glossary: GlossaryFile = None,
    forbid: Forbid = None,
    batch_size: BatchSize = 32,
    precision: PrecisionOption = Precision.auto,
    compile_layers: Compile = False,
    shortlist: ShortlistFile = None,
    draft: Draft = 0,
    decoder: DecoderOption = Decoder.auto,
    engine: Engine = "local",
    workers: Workers = None,
) -> None:
    """Write one output line per input line: enc2gen generate MODEL --to ug < in.txt

    With --output, finished lines are kept: an interrupted command goes on where it was stopped.
    """
    from enc2gen.cli.generate import check_apart, generate_lines
    from enc2gen.generation.blocks import Job
    from enc2gen.generation.scaling import best_line
    from enc2gen.generation.shortlist import Shortlist

    given = locals()
    as_json = as_json or n_best > 1
    _refuse_idle({**given, "as_json": as_json})
    check_apart(output_file, "-" if input_file is None else input_file, glossary, shortlist)
    beams = beams or 4
    groups = {"beam_groups": beams, "diversity_penalty": diverse} if diverse is not None else {}
    config = _config(
        {name: given[name] for name in _SAME} | groups
        | {"num_beams": 1 if sample else beams, "do_sample": sample, "mbr_samples": mbr, "draft_tokens": draft}
        | {"precision": precision.value, "engine": decoder.value, "compile": compile_layers}
    )  # fmt: skip
    tokens = None if shortlist is None else Shortlist.load(shortlist)
    terms = _glossary(glossary, forbid or [])
    job = Job(model, to, source, config, seed, terms, n_best, as_json, tokens)
    text_of = _json_line if as_json else best_line
    generate_lines(job, input_file, output_file, _consoles[0](), engine, workers, text_of)


def _refuse_idle(given: Mapping[str, Any]) -> None:
    """`ConfigError` for options that would do nothing beside the others."""
    drawing = "--sample" if given["sample"] else "--mbr" if given["mbr"] else None
    of_search = {
        "--diverse": given["diverse"] is not None,
        "--length-penalty": given["length_penalty"] != 1,
        "--coverage-penalty": given["coverage_penalty"] != 0,
    }
    if drawing:
        of_search["--beams"] = (given["beams"] or 1) > 1
        _refuse(of_search, "outputs are sampled, not searched", f"leave it out, or leave out {drawing}")
        return
    of_sampling = {
        "--temperature": given["temperature"] != 1,
        "--top-p": given["top_p"] != 1,
        "--epsilon": given["epsilon"] != 0,
    }
    _refuse(of_sampling, "nothing is sampled", "add --sample or --mbr, or leave it out")
    if given["beams"] == 1:
        of_search["--length-penalty"] &= not given["as_json"]  # the scores that are written are divided by it
        _refuse(of_search, "greedy search weighs no outputs", "give --beams 2 or more, or leave it out")


def _refuse(options: Mapping[str, bool], what: str, remedy: str) -> None:
    if given := [name for name, wanted in options.items() if wanted]:
        raise ConfigError(what, where=", ".join(given), remedy=remedy)


def _config(values: dict[str, Any]) -> DecodingConfig:
    from pydantic import ValidationError

    from enc2gen.generation.decoding import DecodingConfig

    try:
        return DecodingConfig(**values)
    except ValidationError as error:
        problems = [problem["msg"].removeprefix("Value error, ") for problem in error.errors()]
        raise ConfigError(
            "; ".join(problems), where="generate", remedy="see `enc2gen generate --help` and docs/decoding.md"
        ) from error


def _glossary(path: Path | None, forbidden: Sequence[str]) -> Glossary | None:
    from enc2gen.generation.glossary import Glossary

    if path is None and not forbidden:
        return None
    if not all(term.strip() for term in forbidden):
        raise ConfigError("the term is empty", where="--forbid", remedy="give a term, or leave it out")
    found = Glossary([]) if path is None else Glossary.from_file(path)
    return found.with_forbidden(forbidden)


def _json_line(outputs: Sequence[Output]) -> str:
    """One line of JSON for an input line: a list of its outputs, the best first."""
    rows = [
        {"text": " ".join(one.text.split()), "score": one.score, "ended": one.ended, "unmet": list(one.unmet)}
        for one in outputs
    ]
    return json.dumps(rows, ensure_ascii=False) + "\n"
