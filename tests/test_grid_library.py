"""The experiments that come with the package: each plans at each of its scales, and can be extended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from enc2gen.errors import ConfigError
from enc2gen.experiments.findings import duration
from enc2gen.experiments.grid.definition import Experiment, load_experiment, shipped
from enc2gen.experiments.grid.planning import Planner
from enc2gen.experiments.grid.searching import first_values
from enc2gen.experiments.report_tables import signed, with_interval

EVERY = [(name, scale) for name, content in shipped().items() for scale in content.get("scales", {})]


def write(tmp_path: Path, content: dict[str, Any]) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_a_shipped_experiment_plans_valid_recipes(name: str, scale: str) -> None:
    experiment, chosen = load_experiment(name, scale=scale)
    planner = Planner(experiment, Path("out"), Path("corpora"))
    planner.searches()
    runs = [run for run in planner.runs(first_values(planner)) if run.kind == "task"]
    tasks, sizes = max(1, len(experiment.tasks)), max(1, len(experiment.sizes))
    assert chosen == scale
    assert len(runs) == len(experiment.all_variants) * tasks * sizes * len(experiment.seeds)
    for run in runs:
        assert experiment.headline in run.recipe.evaluate.metrics
        assert run.recipe.finetune is not None
        # What a task writes has to be known to the model that it starts from.
        before = run.start.recipe.languages if run.start else run.recipe.languages
        assert set(run.recipe.languages) <= set(before)


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_published_figures_belong_to_variants(name: str, scale: str) -> None:
    experiment: Experiment = load_experiment(name, scale=scale)[0]
    if experiment.published is not None:
        assert set(experiment.published.values) <= set(experiment.all_variants)
        assert experiment.source is not None


def test_no_pretraining_trains_on_what_a_task_is_tested_on() -> None:
    """The share held out of a corpus is a property of its text, and equal wherever the corpus is read."""
    for name, scale in EVERY:
        experiment, _ = load_experiment(name, scale=scale)
        planner = Planner(experiment, Path("out"), Path("corpora"))
        planner.searches()
        for run in planner.runs(first_values(planner)):
            if run.start is None:
                continue
            before = {d.path: d for d in run.start.recipe.data.datasets if "pretrain" in d.stages}
            for own in run.recipe.data.datasets:
                if own.path in before:
                    assert own.test_percent <= before[own.path].test_percent, (name, scale, own.path)


def test_extending_merges_and_null_leaves_a_task_out(tmp_path: Path) -> None:
    own = {
        "extends": "objectives-and-sharing",
        "name": "mine",
        "variants": {"grown": {"label": "all of it"}},
        "scales": {"small": {"tasks": {"headlines": None}}},
    }
    experiment, _ = load_experiment(write(tmp_path, own), scale="small")
    shipped_one, _ = load_experiment("objectives-and-sharing", scale="small")
    assert experiment.name == "mine" and experiment.question == shipped_one.question
    assert set(shipped_one.tasks) - set(experiment.tasks) == {"headlines"}
    assert experiment.variants["grown"].label == "all of it"
    assert set(experiment.variants) == set(shipped_one.variants)


def test_extending_what_is_not_there_names_what_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no shipped definition 'nothing'") as error:
        load_experiment(write(tmp_path, {"extends": "nothing"}))
    assert "objectives-and-sharing" in str(error.value)


def test_another_variant_is_the_reference() -> None:
    assert load_experiment("normal-layers", reference="base-a")[0].reference == "base-a"
    with pytest.raises(ConfigError, match="there is no variant 'base-c'; there are grown, base-a"):
        load_experiment("normal-layers", reference="base-c")


def test_languages_are_replaced_unless_the_experiment_is_about_its_own() -> None:
    experiment, _ = load_experiment("normal-layers", languages=["sw", "ha"])
    runs = Planner(experiment, Path("out")).runs({})
    assert {tuple(run.recipe.languages) for run in runs} == {("sw", "ha")}
    assert load_experiment("normal-layers")[0].recipe["languages"] == ["kk", "ug"]
    with pytest.raises(ConfigError, match=r"certain languages \(tasks.few-alone\)") as error:
        load_experiment("transfer", languages=["sw", "ha"])
    assert error.value.where == "--languages"
    with pytest.raises(ConfigError, match=r"certain languages \(data\)"):
        load_experiment("into-english", languages=["sw"])


def test_a_search_takes_over_from_the_variants_that_are_not_searched() -> None:
    """A run needs the same runs, whichever other variants are carried out."""
    experiment, _ = load_experiment("beyond-paper")
    every = {run.name: run for run in Planner(experiment, Path("out")).searches()}
    assert all(run.variant in ("grown", "length-tuned") for run in every.values())
    alone = {run.name: run for run in Planner(experiment, Path("out"), only=("grown",)).runs({})}
    shared = every.keys() & alone.keys()
    assert {name.partition("-seed")[0] for name in shared} == {"grown-pretraining", "grown-translation"}
    for name in shared:
        assert [need.name for need in every[name].needs] == [need.name for need in alone[name].needs]
        assert every[name].recipe.main_system == alone[name].recipe.main_system == "grown"


@pytest.mark.parametrize("name", ["beyond-paper", "cross-check", "into-english"])
def test_a_variant_alone_has_the_runs_of_the_whole_experiment(name: str) -> None:
    """Else a finished run would be done again, and then count as unfinished in the whole experiment."""
    experiment, _ = load_experiment(name, scale="tiny")

    def plan(only: tuple[str, ...] = ()) -> dict[str, Any]:
        planner = Planner(experiment, Path("out"), Path("corpora"), only)
        runs = [*planner.searches(), *planner.runs(first_values(planner))]
        listed = {run.folder for run in runs}
        assert all(need.folder in listed for run in runs for need in run.needs)
        return {run.name: (run.recipe, [need.name for need in run.needs], run.variant, run.kind) for run in runs}

    every = plan()
    for variant in experiment.all_variants:
        alone = plan((variant,))
        assert alone.items() <= every.items(), variant
        own = {run for run, (*_, of, kind) in every.items() if of == variant and kind == "task"}
        assert own <= alone.keys()


def test_every_shipped_experiment_is_on_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
    for name, content in shipped().items():
        row = f"| `{name}` | {content['question']} |"
        assert row in page, row


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_the_pages_example_with_pretrained_models_plans(tmp_path: Path, scale: str) -> None:
    """Models with their own vocabulary start from no pretraining run, and search what is left: fine-tuning's rate."""
    page = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
    (block,) = (part for part in page.split("```yaml\n") if part.startswith("extends: main-comparison"))
    path = tmp_path / "own.yaml"
    path.write_text(block.partition("```")[0], encoding="utf-8")
    experiment, _ = load_experiment(str(path), scale=scale)
    planner = Planner(experiment, Path("out"), Path("corpora"))
    planner.searches()
    runs = [run for run in planner.runs(first_values(planner)) if run.variant in ("mt5", "mbart", "nllb")]
    assert {run.variant for run in runs if run.kind == "task"} == {"mt5", "mbart", "nllb"}
    assert {run.stage for run in runs if run.kind == "pretrain"} == {"build"}
    assert not any(run.recipe.evaluate.denoising for run in runs if run.variant == "mt5"), "it has no mask token"


RESULTS = Path(__file__).parent.parent / "docs" / "results"


@pytest.mark.parametrize("path", sorted((RESULTS / "data").glob("*.json")), ids=lambda path: path.stem)
def test_a_results_page_has_the_figures_of_its_file_which_can_be_done_again(path: Path) -> None:
    results = json.loads(path.read_text(encoding="utf-8"))
    page = (RESULTS / f"{path.stem}.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for cell, languages in results["cells"].items():
        pairs = results["paired"].get(cell, {})
        figures = [duration(results["costs"][cell]["core_seconds"])]
        figures += [with_interval(scores[results["headline"]]) for scores in languages.values()]
        figures += [signed(pairs[tag]) for tag in languages if tag in pairs]
        assert any(all(figure in row for figure in figures) for row in rows), (cell, figures)
    experiment, _ = load_experiment(str(path))
    words = results["command"].split()
    data = Path(words[words.index("--data") + 1]) if "--data" in words else None
    planner = Planner(experiment, Path("out"), data)
    planner.searches()
    done = _runs(results)
    chosen = {name: tuple(found["chosen"].items()) for name, found in results["search"].items()}
    planned = {run.name for run in planner.runs(chosen)}
    assert done <= planned, "the same runs, by the hash of their settings"


OTHER_REFERENCES = sorted((RESULTS / "data" / "other-references").glob("*.json"))


@pytest.mark.parametrize("path", OTHER_REFERENCES, ids=lambda path: path.stem)
def test_differences_to_another_reference_are_on_the_page_and_of_the_same_runs(path: Path) -> None:
    stem, _, reference = path.stem.partition("--")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert reference not in results["paired"] and reference in results["cells"]
    page = (RESULTS / f"{stem}.md").read_text(encoding="utf-8")
    for cell, languages in results["paired"].items():
        assert any(all(signed(pair) in part for pair in languages.values()) for part in page.split("\n\n")), cell
    whole = json.loads((path.parent.parent / f"{stem}.json").read_text(encoding="utf-8"))
    assert _runs(results) <= _runs(whole)


def _runs(results: dict[str, Any]) -> set[str]:
    return {Path(folder).name for place in results["grid"].values() for folder in place["runs"].values()}
