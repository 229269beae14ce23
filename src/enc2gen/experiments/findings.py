"""What a run has shown: verdicts, sample outputs and plain-language terms, for the report and the terminal alike."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from enc2gen.corpora.languages import language_name
from enc2gen.errors import CheckpointError
from enc2gen.experiments.recipe import Recipe
from enc2gen.experiments.workspace import Workspace

LONGEST_EXAMPLE = 80
"""Characters of a test source that still serves as an example on a command line (our choice)."""

METRIC_LABELS = {
    "chrf++": "chrF++",
    "bleu": "BLEU",
    "exact-match": "exact match",
    "off-target": "off-target",
    "rouge-1": "ROUGE-1",
    "rouge-2": "ROUGE-2",
    "rouge-l": "ROUGE-L",
    "token-f1": "token F1",
}

FLOOR_LABELS = {"copy_source": "copied source", "best_constant": "best constant string"}
"""Systems without a model -> what they are called in tables and pictures."""

METRIC_TERMS = {
    "chrf++": "overlap of letter sequences and words with the reference: 0 is nothing in common, 100 is the same text.",
    "bleu": "overlap of sequences of one to four words with the reference, 0 to 100; harsh on short texts.",
    "exact-match": "percent of outputs that equal a reference, case and punctuation aside.",
    "off-target": "percent of outputs that are not in the requested language, as an automatic identifier judges.",
    "rouge-1": "overlap of single words (syllables or characters where a script has no spaces) with the reference.",
    "rouge-2": "overlap of pairs of neighbouring words with the reference.",
    "rouge-l": "longest sequence of words that output and reference share in order, gaps allowed.",
    "token-f1": "balance of how many output words are right and how many right words are there.",
}

SYSTEM_TERMS = {
    "swcm": "its decoder starts as a copy of the encoder's own weights, with some new layers between (XLM-SWCM).",
    "swcm-tied": "its decoder is made of the encoder's own weights, which stay shared during training.",
    "deltalm": "its decoder takes turns in copying odd and even encoder layers (DeltaLM).",
    "random-decoder": "the same encoder with a standard decoder that starts from random weights.",
    "random-decoder-post-norm": "the same encoder with a random decoder in the encoder's own norm order.",
    "no-sharing": "the layers of the full model, but all of them start from random weights.",
    "base-a": "the decoder copied from the encoder, without new layers between.",
    "base-b": "the decoder copied from the encoder, with duplicates in the place of new layers.",
    "all-random": "nothing pretrained at all: encoder and decoder start from random weights.",
    "mbart-shaped": "an encoder-decoder of equal size that starts from random weights throughout (mBART's layers).",
    "warm-start": "the EncoderDecoderModel of transformers: the encoder twice, the link between them random.",
    "pretrained": "an encoder-decoder that others have pretrained as a whole.",
    "copy_source": "no model: the source text is handed back as it is.",
    "best_constant": "no model: one and the same string for every source, the best one found on the test set itself.",
}


@dataclass(frozen=True)
class Verdict:
    """How the main system compares with another one in one language.

    Attributes:
        system: the main system.
        other: the system it is compared with.
        metric: name of the metric.
        difference: value of `system` minus value of `other`, in points of the metric.
        better: whether `system` has the better value; for error rates that is the lower one.
        apart: whether the two 95 % intervals do not even touch.
    """

    system: str
    other: str
    metric: str
    difference: float
    better: bool
    apart: bool


def headline_metric(metrics: Mapping[str, Any]) -> str:
    """The metric that verdicts are about: chrF++, or the recipe's first where that was not computed."""
    names = list(metrics["higher_is_better"])
    return "chrf++" if "chrf++" in names or not names else names[0]


def compare(metrics: Mapping[str, Any], language: str, metric: str = "chrf++") -> list[Verdict]:
    """Compare the main system (the first of `metrics["systems"]`) with every other one.

    Systems without a value of this metric in this language are left out.
    """
    systems = metrics["systems"]
    main = next(iter(systems))
    own = _score(systems, main, language, metric)
    if own is None:
        return []
    sign = 1 if metrics["higher_is_better"].get(metric, True) else -1
    verdicts = []
    for other in systems:
        score = _score(systems, other, language, metric)
        if other == main or score is None:
            continue
        difference = own["value"] - score["value"]
        apart = own["low"] > score["high"] or own["high"] < score["low"]
        verdicts.append(Verdict(main, other, metric, difference, sign * difference > 0, apart))
    return verdicts


def _score(systems: Mapping[str, Any], system: str, language: str, metric: str) -> Mapping[str, Any] | None:
    return systems[system].get(language, {}).get(metric)


def languages_of(recipe: Recipe, metrics: Mapping[str, Any]) -> list[str]:
    """Languages that were measured, in the recipe's order."""
    return [tag for tag in recipe.languages if any(tag in scores for scores in metrics["systems"].values())]


def verdict_sentence(metrics: Mapping[str, Any], language: str) -> str:
    """One sentence that says whether the main system beats each other system, true of the figures."""
    metric = headline_metric(metrics)
    systems, label = metrics["systems"], METRIC_LABELS.get(metric, metric)
    main = next(iter(systems))
    if _score(systems, main, language, metric) is None:
        return f"Nothing can be said: {label} of {main} could not be measured."
    verdicts = compare(metrics, language, metric)
    if not verdicts:
        return f"Nothing can be said: there is no other system with {label} to compare {main} with."
    won = [v for v in verdicts if v.better and v.apart]
    ahead = [v for v in verdicts if v.better and not v.apart]
    level = [v for v in verdicts if v.difference == 0]
    lost = [v for v in verdicts if not v.better and v.difference != 0]
    parts = [f"{main} beats {_listed(won)} in {label}, with 95 % intervals apart"] if won else []
    paired = metrics.get("paired", {}).get(language, {})
    sure = [v for v in ahead if v.other in paired and _excludes_zero(paired[v.other])]
    ahead = [v for v in ahead if v not in sure]
    if sure:
        parts.append(
            f"{main} is ahead of {_listed(sure)} in {label}: the intervals overlap, but that of the difference, "
            "sentence by sentence, does not contain 0"
        )
    if ahead:
        parts.append(
            f"{main} is ahead of {_listed(ahead)} in {label}, but the intervals overlap, so this may be chance"
        )
    if level:
        parts.append(f"{main} is level with {', '.join(v.other for v in level)} in {label}")
    for apart, note in ((True, "with intervals apart"), (False, "but the intervals overlap")):
        better = [v for v in lost if v.apart is apart]
        if better:
            parts.append(
                f"{_listed(better)} {'is' if len(better) == 1 else 'are'} better than {main} in {label}, {note}"
            )
    missing = [name for name in systems if name != main and name not in {v.other for v in verdicts}]
    head = "Yes" if len(won) == len(verdicts) + len(missing) else "Only in part" if won else "No"
    tail = f" Not comparable, for lack of a value: {', '.join(missing)}." if missing else ""
    return f"{head}: {'; '.join(parts)}.{tail}"


def _excludes_zero(difference: Mapping[str, Any]) -> bool:
    return difference["low"] > 0 or difference["high"] < 0


def _listed(verdicts: Sequence[Verdict]) -> str:
    named = [f"{v.other} (by {_points(abs(v.difference))})" for v in verdicts]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def _points(difference: float) -> str:
    return f"{difference:.1f}" if difference >= 0.05 else "less than 0.1"


def source_reading(metrics: Mapping[str, Any], system: str, language: str) -> str:
    """Whether outputs depend on their sources: "yes" if chrF++ lies above that of permuted outputs, intervals apart."""
    score = _score(metrics["systems"], system, language, "chrf++")
    permuted = metrics["source_use"][system][language].get("permuted_chrf++")
    if score is None or permuted is None:
        return "not measured"
    return "yes" if score["low"] > permuted["high"] else "not shown"


def left_out_of_losses(metrics: Mapping[str, Any], tags: Sequence[str]) -> list[str]:
    """A sentence for each language of `tags` with test examples that the losses of the source control are not of."""
    systems = metrics.get("source_use", {}).values()
    counts = {tag: max((by.get(tag, {}).get("left_out", 0) for by in systems), default=0) for tag in tags}
    return [
        f"Losses in {language_name(tag)} are without {count:,} examples: no other source of their language can be "
        "given to them."
        for tag, count in counts.items()
        if count
    ]


@dataclass(frozen=True)
class Sample:
    """One test sentence with what each system wrote for it."""

    source: str
    references: tuple[str, ...]
    outputs: Mapping[str, str]

    def is_reference(self, system: str) -> bool:
        """Whether the output equals a reference, case aside."""
        output = self.outputs.get(system, "").strip().casefold()
        return bool(output) and output in {text.strip().casefold() for text in self.references}


def read_outputs(recipe: Recipe, workspace: Workspace) -> dict[str, list[Sample]]:
    """Every test sentence by language, in the order of the main system's outputs.

    Raises:
        CheckpointError: a line of `hypotheses.jsonl` is damaged.
    """
    samples: dict[str, dict[tuple[str, tuple[str, ...]], dict[str, str]]] = {}
    for system in recipe.systems:
        path = workspace.system(system, "hypotheses.jsonl")
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                key, text = (row["source"], tuple(row["references"])), row["hypothesis"]
                samples.setdefault(row["language"], {}).setdefault(key, {})[system] = text
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"an output of the run is damaged ({type(error).__name__}: {error})",
                    where=f"{path}, line {number}",
                    remedy=f"remove {workspace.root / 'stages' / f'evaluate-{system}.json'} and run again",
                ) from error
    return {
        tag: [Sample(source, references, outputs) for (source, references), outputs in samples[tag].items()]
        for tag in recipe.languages
        if tag in samples
    }


def choose_samples(outputs: Mapping[str, Sequence[Sample]], count: int, seed: int) -> dict[str, list[Sample]]:
    """`count` sentences in all, spread evenly over the languages, drawn at random: never picked by quality."""
    chosen = {}
    for index, (tag, samples) in enumerate(outputs.items()):
        share = count // len(outputs) + (index < count % len(outputs))
        order = np.random.default_rng([seed, index]).permutation(len(samples))[:share]
        if len(order):
            chosen[tag] = [samples[place] for place in sorted(order.tolist())]
    return chosen


def command_name() -> str:
    """How this installation's command is called from here: `enc2gen` where it is on the path, else its file."""
    if shutil.which("enc2gen"):
        return "enc2gen"
    script = Path(sys.executable).with_name("enc2gen")
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m enc2gen.cli.main"
    here = Path.cwd()
    return shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))


def generate_command(recipe: Recipe, workspace: Workspace, outputs: Mapping[str, Sequence[Sample]]) -> str:
    """A command that generates with the run's model, ready to paste, with a short real test source."""
    language = recipe.languages[0]
    model = shlex.quote(str(workspace.root / "model"))
    generate = f"{command_name()} generate {model} --to {language}"
    sources = [sample.source for sample in outputs.get(language, ())]
    usable = [s for s in sources if s == s.strip() and "\n" not in s and "\\" not in s and s[:1] not in ("", "-")]
    short = [source for source in usable if len(source) <= LONGEST_EXAMPLE]
    if not short:
        return f"{generate} --input FILE_WITH_ONE_TEXT_A_LINE"
    # Words and spaces only, of the length of a short phrase, read best; the text itself breaks ties.
    best = min(short, key=lambda s: (re.fullmatch(r"[^\W\d_]+( [^\W\d_]+)+", s) is None, abs(len(s) - 14), s))
    # Double quotes are what most people type; they are safe around text without special characters.
    quoted = f'"{best}"' if re.fullmatch(r"[\w ]+", best) else shlex.quote(best)
    return f"echo {quoted} | {generate}"


def grows_from(recipe: Recipe, system: str, variant: str) -> bool:
    """Whether `system` grew out of the prepared encoder `variant`."""
    return recipe.grows(system) and recipe.variant(system) == variant


def language_heading(metrics: Mapping[str, Any], language: str) -> str:
    """`Kazakh (kk), 443 test sentences`, or development sentences where `metrics["split"]` is dev."""
    counts = {
        score["n"]
        for scores in metrics["systems"].values()
        for score in scores.get(language, {}).values()
        if isinstance(score, Mapping) and "n" in score
    }
    title = f"{language_name(language)} ({language})"
    split = "development" if metrics.get("split") == "dev" else "test"
    return f"{title}, {max(counts):,} {split} sentences" if counts else title


def denoising_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the denoising table, language by language: system and what was measured; none if nothing was."""
    measured: Mapping[str, Any] = metrics.get("denoising", {})
    tags = dict.fromkeys(tag for by_language in measured.values() for tag in by_language)
    return [
        {"tag": tag, "language": language_name(tag), "system": system, **by_language[tag]}
        for tag in tags
        for system, by_language in measured.items()
        if tag in by_language
    ]


def duration(seconds: float) -> str:
    """`7 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 1 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"


def durations(recipe: Recipe, metrics: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Stage and seconds, in order; stages of systems that the recipe no longer has are left out."""
    measured: Mapping[str, float] = metrics.get("seconds", {})
    rows = [("prepare", measured["prepare"])] if "prepare" in measured else []
    for stage in ("vocabulary", "adapt", "build", "pretrain", "finetune", "evaluate"):
        for name in (*recipe.systems, *(("floors",) if stage == "evaluate" else ())):
            seconds = measured.get(f"{stage}-{name}")
            # A resumed stage only timed its last part; the trainer knows the whole.
            seconds = metrics.get("training", {}).get(f"{name}/{stage}", {}).get("seconds", seconds)
            if seconds is not None:
                rows.append((f"{stage} {name}", seconds))
    return rows
