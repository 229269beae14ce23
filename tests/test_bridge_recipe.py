"""Bridge recipes: every shipped one is valid and its bridges can be built; mistakes are named, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import MT5Config, MT5EncoderModel, XLMRobertaConfig, XLMRobertaModel
from typer.testing import CliRunner

from conftest import tiny_tokenizer
from enc2gen.errors import ConfigError
from enc2gen.experiments.bridge.recipe import load_bridge_recipe
from enc2gen.experiments.bridge.systems import Parts, steps
from enc2gen.experiments.recipe import load_recipe
from test_bridge_run import tiny_llm

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("bridge-*.yaml"))


def content() -> dict[str, Any]:
    return {
        "kind": "bridge",
        "name": "tiny",
        "encoder": {"name": "some/encoder"},
        "llm": {"name": "some/llm"},
        "bridges": {"last": {}, "global": {"fusion": "global"}},
        "task": {"name": "sib200"},
        "stages": [{"name": "task", "data": [{"source": "task"}], "training": {"max_steps": 10}}],
    }


def write(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return path


def test_all_recipes_are_there() -> None:
    published = ["langbridge", "global-softmax", "transformer-softmax", "layalign", "mindmerger", "lingualift"]
    names = [*published, "merlin", "llink", "quickstart", "sib200"]
    assert {f"bridge-{name}.yaml" for name in names} == {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_plan(path: Path) -> None:
    from enc2gen.cli.main import app

    result = CliRunner().invoke(app, ["run", str(path), "--dry-run"])
    assert result.exit_code == 0, result.output
    recipe = load_bridge_recipe(path)
    for name in recipe.bridges:
        assert f"# bridge {name}: " in result.output


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_bridges_of_every_recipe_write_on_tiny_models_of_its_architectures(tmp_path: Path, path: Path) -> None:
    recipe = load_bridge_recipe(path)
    torch.manual_seed(0)
    if "mt5" in recipe.encoder.name:
        encoder: Any = MT5EncoderModel(
            MT5Config(vocab_size=120, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4, pad_token_id=1)
        )
    else:
        encoder = XLMRobertaModel(
            XLMRobertaConfig(
                vocab_size=120,
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=24,
                max_position_embeddings=514,
                pad_token_id=1,
            ),
            add_pooling_layer=False,
        )
    for name, model in (("encoder", encoder.eval()), ("llm", tiny_llm())):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    settings = [f"encoder.name={tmp_path / 'encoder'}", f"llm.name={tmp_path / 'llm'}", "llm.dtype=float32"]
    recipe = load_bridge_recipe(path, settings)
    parts = Parts(recipe)
    for name in recipe.bridges:
        step = steps(recipe, name, recipe.seeds[0], None)[-1]
        model = parts.model(name, 0, [recipe.tuning(name, part.stage) for part in step.chain])
        codec = parts.codec(model, recipe.prompt(name)[0])
        if recipe.hidden_states(name).normalise == "standardise":
            ids = torch.tensor(codec.encode_sources(["abc def"]))
            model.fit_states([(ids, torch.ones_like(ids))])
        example = codec.encode_pair("abc", "def")
        rows = {"input_ids": example.input_ids, "decoder_input_ids": example.decoder_input_ids}
        output = model(**{key: torch.tensor([row]) for key, row in rows.items()}, labels=torch.tensor([example.labels]))
        assert torch.isfinite(output.loss) and output.logits.shape[1] == len(example.labels)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    value = content()
    value["encoder"]["nme"] = "x"
    value["bridges"]["global"] = {"fusion": "globl"}
    value["stages"][0]["training"] = {"max_step": 10}
    value["stages"][0]["data"] = [{"source": "tsk"}]
    with pytest.raises(ConfigError) as caught:
        load_bridge_recipe(write(tmp_path, value))
    for fragment in (
        "recipe.yaml",
        "encoder.nme: unknown field, did you mean 'name'?",
        "did you mean 'global'",
        "max_step: unknown field, did you mean 'max_steps'?",
        "'task'",
    ):
        assert fragment in str(caught.value), fragment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bridges": {"x": {"fusion_options": {"temprature": "plain"}}}}, "temprature"),
        ({"bridges": {"x": {"mapper": "slots", "mapper_options": {"slots": 0}}}}, "slots"),
        ({"bridges": {"probe": {}}}, "and not majority, probe"),
        ({"bridges": {"../x": {}}}, "use letters"),
        ({"bridges": {"x": {"stages": ["pretrain"]}}}, r"bridges\.x\.stages: \['pretrain'\]; stages: task"),
        ({"bridges": {"x": {"training": {"learning_rte": 1}}}}, r"bridges\.x\.training\.learning_rte"),
        ({"bridges": {"x": {"training": {"seed": 1}}}}, r"bridges\.x\.training\.seed: use seeds"),
        ({"bridges": {"x": {"tuning": {"bridge": False}}}}, "nothing learns"),
        ({"bridges": {"x": {"aligner": {"with": 3}}}}, "with"),
        ({"seeds": [1, 1]}, "different"),
        ({"task": None}, "no task section"),
        ({"search": {"learning_rates": [0.1, -1]}}, "above 0"),
        ({"search": {"learning_rates": [0.1], "stage": "tsk"}}, "'tsk'; stages: task"),
        ({"evaluate": {"reference": "mean"}}, "'mean'; bridges: last, global"),
        ({"evaluate": {"metrics": ["chrf"]}}, r"did you mean 'chrf\+\+'"),
        ({"encoder": {"name": "x", "template": "query:"}}, r"must contain \{text\}"),
    ],
)
def test_each_mistake_has_a_message(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_bridge_recipe(write(tmp_path, content() | change))


def test_the_source_text_reaches_the_llm_only_if_that_is_said_twice(tmp_path: Path) -> None:
    value = content()
    value["stages"][0]["prompt"] = "Text: {source}"
    with pytest.raises(ConfigError, match="prompt_with_source"):
        load_bridge_recipe(write(tmp_path, value))
    value["stages"][0]["prompt_with_source"] = True
    assert load_bridge_recipe(write(tmp_path, value)).prompt("last") == ("Text: {source}", True)


def test_own_settings_win_and_seed_and_searched_rate_are_set(tmp_path: Path) -> None:
    value = content() | {"seeds": [3, 4], "search": {"learning_rates": [0.1, 0.2]}}
    value["bridges"] = {"a": {"training": {"max_steps": 7}}, "b": {"learning_rates": [0.5]}, "c": {"seeds": [9]}}
    value["bridges"]["d"] = {"training": {"learning_rate": 0.3}}
    recipe = load_bridge_recipe(write(tmp_path, value), ["stages.0.training.warmup=0"], languages=["kaz_Cyrl"])
    training = recipe.training("a", recipe.stages[0], 4, 0.2)
    assert (training.max_steps, training.seed, training.learning_rate, training.warmup) == (7, 4, 0.2, 0)
    assert (
        recipe.searched("a") == ("task", [0.1, 0.2])
        and recipe.searched("b") == ("task", [0.5])
        and recipe.searched("d") is None
    )
    assert recipe.seeds_of("a") == [3, 4] and recipe.seeds_of("c") == [9]
    assert recipe.task is not None and recipe.task.languages == ["kaz_Cyrl"]


def test_steps_before_the_searched_stage_are_shared_by_all_rates(tmp_path: Path) -> None:
    value = content() | {"search": {"learning_rates": [0.1, 0.2]}}
    value["stages"] = [{**value["stages"][0], "name": "first"}, value["stages"][0]]
    recipe = load_bridge_recipe(write(tmp_path, value))
    low, high = (steps(recipe, "last", 0, rate) for rate in (0.1, 0.2))
    assert low[0] == high[0] and low[0].name == "train-last-seed0-first"
    assert (low[1].name, high[1].name) == ("train-last-seed0-task-lr0.1", "train-last-seed0-task-lr0.2")


def test_a_bridge_recipe_is_refused_where_others_are_wanted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)bridge recipe.*enc2gen run"):
        load_recipe(write(tmp_path, content()))


def test_only_is_for_bridge_recipes() -> None:
    from enc2gen.cli.main import app

    result = CliRunner().invoke(app, ["run", str(ROOT / "recipes" / "quickstart.yaml"), "--only", "last", "--dry-run"])
    assert isinstance(result.exception, ConfigError) and "--only" in str(result.exception)
