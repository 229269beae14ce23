"""What an experiment's definition becomes: variants, recipes, folders, and what is planned once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from enc2gen.errors import ConfigError
from enc2gen.experiments.grid.definition import load_experiment, shipped
from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.grid.planning import Planner
from enc2gen.experiments.grid.run import resolved
from enc2gen.experiments.grid.searching import choose, first_values
from enc2gen.experiments.recipe import load_recipe
from grid_toys import definition, finish, stage, write_definition, write_pairs

ENCODER = Path("encoder")


def planner(tmp_path: Path, only: tuple[str, ...] = (), folder: str = "out", **changes: Any) -> Planner:
    path = write_definition(tmp_path / "toy.yaml", definition(ENCODER, **changes))
    return Planner(load_experiment(str(path))[0], Path(folder), Path("corpora"), only)


def runs(tmp_path: Path, only: tuple[str, ...] = (), folder: str = "out", **changes: Any) -> list[GridRun]:
    planned = planner(tmp_path, only, folder, **changes)
    planned.searches()
    return planned.runs(first_values(planned))


def cells(planned: list[GridRun], kind: str = "task") -> list[str]:
    return [run.cell for run in planned if run.kind == kind]


def test_every_variant_and_seed_has_a_run_that_starts_from_its_pretraining(tmp_path: Path) -> None:
    planned = runs(tmp_path, seeds=2)
    tasks = [run for run in planned if run.kind == "task"]
    assert [(run.cell, run.seed) for run in tasks] == [("shared", 0), ("shared", 1), ("random", 0), ("random", 1)]
    assert len({run.folder for run in planned}) == 8
    for run in tasks:
        assert run.start is not None and planned.index(run.start) < planned.index(run)
        assert (run.start.variant, run.start.seed, run.start.stage) == (run.variant, run.seed, "pretrain")
        before, recipe = run.start.recipe, run.recipe
        assert recipe.systems[run.variant].start == f"{run.start.folder.as_posix()}/systems/{run.variant}/pretrained"
        assert (before.finetune, recipe.pretrain) == (None, None)
        assert (before.encoder.trim_vocabulary, recipe.encoder.trim_vocabulary) == (True, False)
        assert before.seed == recipe.seed == run.seed
        assert recipe.data.datasets[0].path == "corpora/pairs.tsv"
        assert recipe.folder == run.folder and run.folder.parts[:2] == ("out", "runs")
    assert tasks[2].start is not None and tasks[2].start.recipe.systems["random"].preset == "no-sharing"


def test_a_variant_without_pretraining_starts_from_the_untrained_model_of_the_same_recipe(tmp_path: Path) -> None:
    planned = runs(tmp_path, variants={"shared": {}, "cold": {"pretraining": False}})
    cold = planned[-1]
    assert cold.start is not None and cold.start.stage == "build"
    assert cold.recipe.systems["cold"].start == f"{cold.start.folder.as_posix()}/systems/cold/initial"
    assert cold.start.recipe.data == planned[0].recipe.data  # the same texts decide the vocabulary


def test_a_folder_stands_for_the_settings_and_nothing_else(tmp_path: Path) -> None:
    names = [run.name for run in runs(tmp_path)]
    assert [run.name for run in runs(tmp_path, folder="elsewhere", description="other words")] == names
    written_otherwise = stage(max_steps=4) | {"mixture": {}}
    changed = definition(ENCODER)["recipe"] | {"finetune": written_otherwise}
    assert [run.name for run in runs(tmp_path, recipe=changed)] == names
    longer = [run.name for run in runs(tmp_path, pretraining={"pretrain": stage(max_steps=5)})]
    assert not set(longer) & set(names)  # a task depends on the run it starts from
    recipe = definition(ENCODER)["recipe"]
    other_task = [run.name for run in runs(tmp_path, recipe=recipe | {"finetune": stage(max_steps=5)})]
    assert [old == new for old, new in zip(names, other_task, strict=True)] == [True, False, True, False]


def test_a_note_on_a_licence_leaves_all_runs_as_they_are(tmp_path: Path) -> None:
    content = definition(ENCODER)
    before = [run.name for run in runs(tmp_path)]
    recipe = content["recipe"]
    recipe["data"]["datasets"][0]["licence"] = "CC0"
    after = runs(tmp_path, recipe=recipe)
    assert [run.name for run in after] == before and after[0].recipe.data.datasets[0].licence == "CC0"


def test_factors_multiply_and_their_levels_may_be_called_on_and_off(tmp_path: Path) -> None:
    changes = {
        "variants": {},
        "reference": "sharing=on pretraining=on",
        "factors": yaml.safe_load(
            "{sharing: {on: {}, off: {system: {preset: no-sharing}}}, pretraining: {on: {}, off: {pretraining: false}}}"
        ),
    }
    planned = [run for run in runs(tmp_path, **changes) if run.kind == "task"]
    assert [run.cell for run in planned] == [
        "sharing=on pretraining=on",
        "sharing=on pretraining=off",
        "sharing=off pretraining=on",
        "sharing=off pretraining=off",
    ]
    last = planned[-1]
    assert last.start is not None and last.start.stage == "build"
    assert last.recipe.systems[last.recipe.main_system].preset == "no-sharing"


def test_tasks_and_sizes_share_one_pretraining(tmp_path: Path) -> None:
    tasks = {"short": {}, "long": {"finetune": stage(max_steps=6)}}
    planned = runs(
        tmp_path, tasks=tasks, sizes=[10, 20], variants={"shared": {"tasks": {"long": {"languages": ["en"]}}}}
    )
    assert cells(planned) == ["shared/short/10", "shared/short/20", "shared/long/10", "shared/long/20"]
    assert len(cells(planned, "pretrain")) == 1
    last = planned[-1]
    assert (last.task, last.size, last.recipe.data.datasets[0].train_limit) == ("long", 20, 20)
    assert last.recipe.finetune is not None and last.recipe.finetune.training.max_steps == 6
    assert last.recipe.languages == ["en"] and planned[1].recipe.languages == ["kk"]
    assert planned[0].recipe.data.datasets[0].train_limit is None


def test_equal_training_is_planned_once(tmp_path: Path) -> None:
    beam = {"recipe": {"evaluate": {"decoding": {"num_beams": 3}}}}
    planned = runs(tmp_path, variants={"shared": {}, "beam": beam}, reference="shared")
    assert len(cells(planned, "pretrain")) == 1
    shared, wide = (run for run in planned if run.kind == "task")
    assert wide.same_training is shared and shared.same_training is None
    assert wide.recipe.main_system == "shared" and wide.folder != shared.folder
    assert (shared.recipe.evaluate.decoding.num_beams, wide.recipe.evaluate.decoding.num_beams) == (1, 3)


def test_the_search_is_scored_on_the_development_set_and_its_best_value_is_used_for_every_seed(tmp_path: Path) -> None:
    rates = [1e-3, 2e-3, 3e-3]
    planned = planner(
        tmp_path, folder=str(tmp_path / "out"), seeds=2, search={"finetune.training.learning_rate": rates}
    )
    every = planned.searches()
    searches = [run for run in every if run.kind == "search"]
    for run in every:
        finish(run)
    assert len(searches) == 6 and {run.seed for run in searches} == {0}
    scores = {"shared": [3.0, 9.0, 4.0], "random": [None, None, None]}
    for run, score in zip(searches, scores["shared"] + scores["random"], strict=True):
        assert run.recipe.evaluate.split == "dev" and run.stage == "evaluate"
        if score is not None:
            folder = run.folder / "systems" / run.recipe.main_system
            folder.mkdir(parents=True)
            languages = {"kk": {"chrf++": {"value": score - 1}}, "ug": {"chrf++": {"value": score + 1}}}
            (folder / "scores.json").write_text(json.dumps({"scores": languages}), encoding="utf-8")
    chosen, table = choose(planned, searches)
    setting = "finetune.training.learning_rate"
    assert table["shared"] == {setting: {"0.001": 3.0, "0.002": 9.0, "0.003": 4.0}, "chosen": {setting: 2e-3}}
    final = [run for run in planned.runs(chosen) if run.kind == "task"]
    assert [(run.variant, run.seed) for run in final] == [("shared", 0), ("shared", 1)]  # nothing is known of "random"
    for run in final:
        assert run.recipe.finetune is not None and run.recipe.finetune.training.learning_rate == 2e-3
        assert run.recipe.evaluate.split == "test"
    assert final[0].same_training is searches[1] and final[1].same_training is None
    finish(searches[1], status=1)  # it was tried again, and failed
    assert choose(planned, searches)[1]["shared"][setting]["0.002"] is None


def test_runs_need_only_what_is_planned_with_the_same_choice(tmp_path: Path) -> None:
    setting = "finetune.training.learning_rate"
    beam = {"recipe": {"evaluate": {"decoding": {"num_beams": 3}}}}
    planned = planner(tmp_path, seeds=2, variants={"shared": {}, "beam": beam}, search={setting: [1e-3, 2e-3]})
    searches = planned.searches()
    planned.runs(first_values(planned))  # a look ahead
    found = planned.runs({"shared": ((setting, 2e-3),), "beam": ((setting, 1e-3),)})
    listed = {run.folder for run in [*searches, *found]}
    assert all(need.folder in listed for run in found for need in run.needs)


def test_the_model_that_a_system_goes_on_from_is_part_of_its_training(tmp_path: Path) -> None:
    systems = {name: {"system": {"start": f"models/{name}"}} for name in ("one", "two")}
    recipe = definition(ENCODER)["recipe"] | {"encoder": {"name": str(ENCODER)}}
    for pretraining in (None, {"pretrain": stage()}):
        found = runs(tmp_path, recipe=recipe, variants=systems, reference="one", pretraining=pretraining)
        assert {run.variant for run in found} == {"one", "two"}
        assert all(run.same_training is None for run in found)
        kept = [run for run in found if run.variant == "one"]
        changed = {**systems, "one": {"system": {"start": "models/three"}}}
        again = runs(tmp_path, recipe=recipe, variants=changed, reference="one", pretraining=pretraining)
        assert not {run.name for run in kept} & {run.name for run in again}
        first = [run.recipe.systems["one"].start for run in kept]
        assert first[0] == "models/one" and (pretraining is None or str(first[1]).endswith("systems/one/pretrained"))


@pytest.mark.parametrize("pretraining", [{}, False])
def test_a_pretrained_model_is_pretrained_further_like_any_other(tmp_path: Path, pretraining: Any) -> None:
    given = {"preset": "pretrained", "options": {"name": "google/mt5-small"}}
    other = {"preset": "pretrained", "options": {"name": "google/mt5-base"}}
    variants = {name: {"system": s, "pretraining": pretraining} for name, s in (("small", given), ("base", other))}
    before, task, _, large = runs(tmp_path, variants=variants, reference="small")
    assert before.recipe.systems["small"].whole_model == "google/mt5-small"
    model = "initial" if pretraining is False else "pretrained"
    assert task.recipe.systems["small"].whole_model == f"{before.folder.as_posix()}/systems/small/{model}"
    assert large.same_training is None and large.folder != task.folder


def test_training_settings_of_a_system_are_searched_for_the_task_alone(tmp_path: Path) -> None:
    search = {"system.finetune.learning_rate": [1e-3, 2e-3]}
    found = planner(tmp_path, variants={"shared": {}}, search=search).searches()
    assert [run.kind for run in found] == ["pretrain", "search", "search"]
    rates = [training.learning_rate for run in found if (training := run.recipe.training("shared", "finetune"))]
    assert rates == [1e-3, 2e-3]
    cold = {"shared": {}, "cold": {"pretraining": False}}
    found = planner(tmp_path, variants=cold, search={"system.pretrain.learning_rate": [1e-3, 2e-3]}).searches()
    assert {run.variant for run in found} == {"shared"}


def test_a_setting_that_a_variant_overrides_cannot_be_searched(tmp_path: Path) -> None:
    variants = {"shared": {"system": {"finetune": {"learning_rate": 5e-3}}}}
    search = {"finetune.training.learning_rate": [1e-3, 2e-3]}
    with pytest.raises(ConfigError, match="trains the same model"):
        planner(tmp_path, variants=variants, search=search).searches()
    variants["shared"]["search"] = {"finetune.training.learning_rate": []}  # type: ignore[dict-item]
    assert planner(tmp_path, variants=variants, search=search).searches() == []


def test_settings_of_the_pretraining_are_searched_through_it(tmp_path: Path) -> None:
    found = planner(
        tmp_path,
        search={"pretrain.training.learning_rate": [1e-3, 2e-3]},
        variants={"shared": {}, "cold": {"pretraining": False}},
    ).searches()
    assert [run.kind for run in found] == ["pretrain", "search", "pretrain", "search"]
    rates = [run.recipe.pretrain.training.learning_rate for run in found if run.recipe.pretrain is not None]
    assert rates == [1e-3, 2e-3]


def test_only_names_variants(tmp_path: Path) -> None:
    assert cells(runs(tmp_path, ("random",))) == ["random"]
    with pytest.raises(ConfigError, match="there is no variant other; there are shared, random"):
        planner(tmp_path, ("other",))


def test_paths_need_a_folder_of_data(tmp_path: Path) -> None:
    content = write_definition(tmp_path / "toy.yaml", definition(ENCODER))
    with pytest.raises(ConfigError, match="--data"):
        Planner(load_experiment(str(content))[0], Path("out")).runs({})


def test_a_scale_replaces_what_it_names_and_the_first_is_the_default(tmp_path: Path) -> None:
    scales = {"tiny": {"seeds": [7]}, "small": {"recipe": {"finetune": {"training": {"max_steps": 50}}}}}
    path = str(write_definition(tmp_path / "toy.yaml", definition(ENCODER, scales=scales)))
    tiny, small = load_experiment(path), load_experiment(path, scale="small", seeds=4)
    assert (tiny[0].seeds, tiny[1], small[0].seeds, small[1]) == ([7], "tiny", [0, 1, 2, 3], "small")
    steps = [found.recipe["finetune"]["training"]["max_steps"] for found, _ in (tiny, small)]
    assert steps == [4, 50]
    with pytest.raises(ConfigError, match="no scale 'huge'; it has tiny, small"):
        load_experiment(path, scale="huge")


def test_results_json_is_a_definition_of_the_same_runs(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "variants": {},
        "reference": "sharing=1",
        "factors": {"sharing": {1: {}, 2: {"system": {"preset": "base-a"}}}},
        "scales": {"tiny": {"seeds": 2}},
    }
    path = write_definition(tmp_path / "toy.yaml", definition(ENCODER, **changes))
    experiment, scale = load_experiment(str(path))
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"experiment": resolved(experiment), "scale": scale}), encoding="utf-8")
    again, same_scale = load_experiment(str(results))
    names = [[r.name for r in Planner(e, Path("out"), Path("d")).runs({})] for e in (experiment, again)]
    assert names[0] == names[1] and same_scale == "tiny" and len(names[0]) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "nobody"}, "there is no variant 'nobody'; there are shared, random"),
        ({"factors": {"a": {"b": {}}}}, "give either variants or factors"),
        ({"headline": "chrff"}, "chrf"),
        ({"recipe": {"name": "x"}}, "recipe.name: the experiment itself sets this"),
        ({"variants": {"shared": {}, "a b": {}, "a/b": {}}}, "names must differ"),
        ({"variants": {"shared": {"tasks": {"t": {}}}}}, "there is no task t"),
        ({"variants": {"shared": {"sistem": {}}}}, "did you mean 'system'"),
        ({"pretraining": None, "variants": {"shared": {"pretraining": {"pretrain": {}}}}}, "has no pretraining"),
        ({"seeds": [1, 1]}, "each once"),
        ({"tasks": {"t": {"system": {"preset": "base-a"}}}}, "tasks.t.system: the system is the same"),
        ({"pretraining": {"system": {"preset": "base-a"}}}, "pretraining.system: the system is the same"),
        ({"tasks": {"t": {"encoder": {"dropout": 0.1}}}}, "tasks.t.encoder: tasks start from"),
        (
            {"tasks": {"t": {}}, "variants": {"shared": {"tasks": {"t": {"encoder": {"dropout": 0.1}}}}}},
            "variants.shared.tasks.t.encoder: tasks start from",
        ),
        ({"pretraining": None, "variants": {"shared": {"pretraining": False}}}, "has no pretraining"),
        ({"pretraining": {"finetune": {"training": {"max_stepps": 1}}}}, "pretraining.finetune: pretraining runs only"),
        ({"variants": {"shared": {"pretraining": {"evaluate": {}}}}}, "variants.shared.pretraining.evaluate: pretrain"),
    ],
)
def test_what_is_wrong_with_a_definition_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_definition(tmp_path / "toy.yaml", definition(ENCODER, **changes))
    with pytest.raises(ConfigError) as error:
        load_experiment(str(path))
    assert message in str(error.value)


def test_mistakes_in_a_recipe_are_found_while_planning(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)toy: random.*max_stepps"):
        runs(tmp_path, variants={"shared": {}, "random": {"recipe": {"finetune": {"training": {"max_stepps": 1}}}}})


@pytest.mark.parametrize("search", [{}, {"finetune.training.learning_rate": [1e-3, 2e-3]}])
def test_a_headline_that_is_not_measured_is_refused_before_anything_is_trained(tmp_path: Path, search: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"rouge-l is not measured; evaluate\.metrics has chrf\+\+, exact-match"
    ) as error:
        runs(tmp_path, headline="rouge-l", search=search)
    assert "toy: shared" in str(error.value) and "add rouge-l" in str(error.value)


@pytest.mark.parametrize("data", [None, {}, {"datasets": "pairs.tsv"}, {"datasets": ["pairs.tsv"]}])
def test_sizes_without_data_are_a_mistake_in_the_recipe(tmp_path: Path, data: Any) -> None:
    recipe = definition(ENCODER)["recipe"]
    del recipe["data"]
    with pytest.raises(ConfigError, match="data"):
        runs(tmp_path, recipe=recipe | ({"data": data} if data is not None else {}), pretraining=None, sizes=[5])


@pytest.mark.parametrize("name", ["nothing", "nothing.yaml", "text.json"])
def test_what_is_not_an_experiment_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"there is no experiment|not readable|not the results\.json"):
        load_experiment(name if name == "nothing" else str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "scale"),
    [(name, scale) for name, content in shipped().items() for scale in content.get("scales") or [None]],
)
def test_shipped_experiments_are_valid_at_every_scale(tmp_path: Path, name: str, scale: str | None) -> None:
    experiment, _ = load_experiment(name, scale=scale)
    assert experiment.name == name and experiment.question.endswith("?")
    planned = Planner(experiment, tmp_path, Path("corpora"))
    every = [*planned.searches(), *planned.runs(first_values(planned))]
    assert {run.variant for run in every if run.kind == "task"} == set(experiment.all_variants)
    for run in every:
        if run.kind == "task":
            assert experiment.headline in run.recipe.evaluate.metrics


def test_the_recipe_in_a_folder_is_the_planned_one(tmp_path: Path) -> None:
    from enc2gen.experiments.grid.records import make_ready

    write_pairs(tmp_path / "pairs.tsv")
    run = runs(tmp_path, folder=str(tmp_path / "out"))[0]
    make_ready(run)
    assert load_recipe(run.folder / "recipe.yaml") == run.recipe
