"""Recipes: every shipped one loads, and every mistake is reported at once, with file and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from enc2gen.errors import ConfigError
from enc2gen.experiments.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if not path.name.startswith("bridge-"))


def content() -> dict[str, Any]:
    return {
        "name": "tiny",
        "languages": ["kk"],
        "encoder": {"name": "some/encoder"},
        "data": {
            "datasets": [
                {"path": "x.tsv", "task": "translation", "fields": {"source_language": "en", "target_language": "kk"}}
            ]
        },
        "systems": {"shared": {"preset": "swcm"}},
        "finetune": {"training": {"max_steps": 10}},
    }


def write(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path).systems


def test_there_are_recipes() -> None:
    assert {"quickstart.yaml"} <= {path.name for path in RECIPES}


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    value = content()
    value["lanuages"] = value.pop("languages")
    value["encoder"]["nme"] = "x"
    value["finetune"]["training"] = {"max_step": 10, "learning_rate": -1}
    value["data"]["datasets"][0]["fields"] = {"source_languag": "en", "target_language": "kk"}
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, value))
    message = str(caught.value)
    assert "recipe.yaml" in message
    for fragment in (
        "lanuages: unknown field, did you mean 'languages'?",
        "languages: Field required",
        "encoder.nme: unknown field, did you mean 'name'?",
        "finetune.training.max_step: unknown field, did you mean 'max_steps'?",
        "finetune.training.learning_rate",
        "data.datasets.0",
        "source_languag",
    ):
        assert fragment in message, fragment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"languages": ["klingonish"]}, "klingonish"),
        ({"systems": {"x": {"preset": "swmc"}}}, "did you mean 'swcm'"),
        ({"systems": {"x": {"options": {"insert_evry": 3}}}}, "insert_evry=3: Extra inputs"),
        ({"systems": {"x": {"options": {"sharing": "teid"}}}}, "sharing='teid'"),
        ({"systems": {"copy_source": {}}}, "and not copy_source"),
        ({"systems": {"../x": {}}}, "use letters"),
        ({"finetune": {"training": {"max_steps": 9, "seed": 3}}}, r"finetune\.training\.seed"),
        ({"finetune": {"training": {"max_steps": 9}, "batching": {"max_tokens": 100}}}, "one example can take 512"),
        ({"systems": {"x": {"preset": "warm-start", "options": {"insert_every": 3}}}}, "does not take insert_every"),
        ({"systems": {"x": {"pretrain": {"max_steps": 3}}}}, "no pretrain section"),
        ({"systems": {"x": {"finetune": {"max_stps": 3}}}}, "systems.x.finetune"),
        ({"finetune": None}, "trains nothing"),
        ({"evaluate": {"metrics": ["chrf"]}}, r"did you mean 'chrf\+\+'"),
        ({"name": "a/b"}, "name"),
        ({False: 1, 2024: 2}, "the name False is no text(?s:.)*the name 2024 is no text .*remove or quote it"),
        ({"encoder": {"name": "x", True: 1}}, "encoder.*the name True is no text"),
    ],
)
def test_each_mistake_has_a_message(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, content() | change))


def test_overrides_replace_values_and_languages_are_normalised(tmp_path: Path) -> None:
    path = write(tmp_path, content())
    recipe = load_recipe(path, ["finetune.training.max_steps=3", "output=elsewhere"], languages=["UG", "zh_Hant"])
    assert recipe.finetune is not None and recipe.finetune.training.max_steps == 3
    assert recipe.folder == Path("elsewhere") and recipe.languages == ["ug", "zh-Hant"]


@pytest.mark.parametrize("override", ["max_steps", "name.x.y=3", "=3"])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load_recipe(write(tmp_path, content()), [override])


def test_system_settings_win_over_the_stage_and_the_seed_is_the_recipes(tmp_path: Path) -> None:
    value = content() | {"seed": 7, "systems": {"a": {}, "b": {"finetune": {"learning_rate": 0.5}}}}
    recipe = load_recipe(write(tmp_path, value))
    a, b = recipe.training("a", "finetune"), recipe.training("b", "finetune")
    assert a is not None and b is not None
    assert (a.seed, b.seed) == (7, 7) and b.learning_rate == 0.5 and a.learning_rate == 1e-4


@pytest.mark.parametrize("stage", ["embeddings_only", "training"])
def test_a_seed_that_would_do_nothing_is_refused(tmp_path: Path, stage: str) -> None:
    value = content()
    value["encoder"] = {**value["encoder"], "adapt": {stage: {"max_steps": 1, "seed": 3}}}
    with pytest.raises(ConfigError, match=f"adapt.{stage}.seed: the recipe's own seed is used"):
        load_recipe(write(tmp_path, value))
    del value["encoder"]["adapt"][stage]["seed"]
    load_recipe(write(tmp_path, value))


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "\xff"])
def test_unreadable_recipes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load_recipe(path)


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path / "nothing.yaml")


def test_the_reference_in_the_docs_is_up_to_date() -> None:
    from enc2gen.experiments.reference import reference

    written = (ROOT / "docs" / "recipe-reference.md").read_text(encoding="utf-8")
    assert written == reference(), "run python -m enc2gen.experiments.reference > docs/recipe-reference.md"
