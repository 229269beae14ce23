"""Bridge recipes: every shipped one is valid and its bridges can be built; mistakes are named, all at once."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    BertConfig,
    BertModel,
    MT5Config,
    MT5EncoderModel,
    PreTrainedModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)
from typer.testing import CliRunner

from bridge_toys import tiny_bridge
from conftest import tiny_tokenizer
from enc2gen.data.batching import BatchingConfig, EncodedExample
from enc2gen.errors import ConfigError
from enc2gen.experiments.bridge.recipe import load_bridge_recipe
from enc2gen.experiments.bridge.systems import Parts, steps
from enc2gen.experiments.recipe import load_recipe
from enc2gen.models.bridge import BridgeForConditionalGeneration
from enc2gen.training.bridging import TuningConfig, train_bridge
from enc2gen.training.config import TrainingConfig
from enc2gen.training.optim import frozen_names
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
    names = [*published, "merlin", "llink", "quickstart", "sib200", "shortcut", "translation"]
    assert {f"bridge-{name}.yaml" for name in names} == {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_plan(path: Path) -> None:
    from enc2gen.cli.main import app

    result = CliRunner().invoke(app, ["run", str(path), "--dry-run"])
    assert result.exit_code == 0, result.output
    recipe = load_bridge_recipe(path)
    for name in recipe.bridges:
        assert f"# bridge {name}: " in result.output


# What is published of a stage: updates, peak rate, schedule, warm-up, batch, betas, eps, weight decay, clipping,
# tokens of source and target; None: not published. Sources are named at the head of each recipe.
ADAM = ((0.8, 0.999), 1e-8, 3e-7, 1.0)
PUBLISHED: dict[tuple[str, str], tuple[Any, ...]] = {
    ("global-softmax", "task"): (99_000 * 3 // 8, 3e-5, "cosine", 0.05, 8, *ADAM, 200, 200),
    ("transformer-softmax", "task"): (99_000 * 3 // 8, 3e-5, "cosine", 0.05, 8, *ADAM, 200, 200),
    ("langbridge", "task"): (200_000 // 128, 6e-4, "constant", 0, 128, None, None, 0.0, 1.0, 1024, None),
    ("layalign", "translation"): (1_400_000 * 3 // 128, 4e-5, "cosine", 0.05, 128, *ADAM, 200, 200),
    ("layalign", "task"): (15 * 2_490 * 3 // 128, 3e-5, "cosine", 0.05, 128, *ADAM, None, None),
    ("mindmerger", "mapping"): (1_400_000 * 3 // 128, 2e-5, "cosine", 0.05, 128, *ADAM, 200, 200),
    ("mindmerger", "augmentation"): (15 * 2_490 * 3 // 128, 2e-5, "cosine", 0.05, 128, *ADAM, 200, 200),
    ("llink", "projection"): (20_000, 1e-3, "cosine", None, 128, None, None, None, None, None, None),
    ("llink", "instructions"): (None, 1e-4, None, None, None, None, None, None, None, None, None),
}


@pytest.mark.parametrize(("name", "stage"), PUBLISHED)
def test_published_settings_are_kept(name: str, stage: str) -> None:
    recipe = load_bridge_recipe(ROOT / "recipes" / "paper" / f"bridge-{name}.yaml")
    section = next(section for section in recipe.stages if section.name == stage)
    for bridge in recipe.bridges:
        training = recipe.training(bridge, section, recipe.seeds[0])
        batch = (section.batching.max_examples or 0) * training.gradient_accumulation
        found = (
            *(training.max_steps, training.learning_rate, training.schedule, training.warmup, batch),
            *(training.betas, training.eps, training.weight_decay, training.max_grad_norm),
            *(recipe.encoder.max_length, recipe.max_target_length),
        )
        expected = PUBLISHED[name, stage]
        assert found == tuple(ours if wanted is None else wanted for ours, wanted in zip(found, expected, strict=True))
        assert section.batching.max_tokens is None


def test_published_parts_are_kept() -> None:
    recipes = {path.stem.removeprefix("bridge-"): load_bridge_recipe(path) for path in RECIPES}
    langbridge = recipes["langbridge"]
    assert langbridge.bridges["langbridge"].end_vector == "random" and langbridge.seeds == [42]
    assert all(
        stage.tuning == TuningConfig() for stage in langbridge.stages
    )  # MetaMath is tuned: the encoder is frozen
    assert [stage.training.load_best for stage in recipes["layalign"].stages] == [True, False]
    for name in ("layalign", "mindmerger", "merlin"):
        task = recipes[name].task
        assert task is not None and len(task.train_languages) == 15
    for name in ("global-softmax", "transformer-softmax"):
        recipe = recipes[name]
        assert recipe.task is not None and (recipe.task.train_languages, recipe.task.limit) == (["en"], 99_000)
        assert not any(stage.prompt for stage in recipe.stages)  # the LLM reads no source text
        assert recipe.evaluate.methods[0] == "generation" and recipe.evaluate.decoding.num_beams == 1
    second = recipes["llink"].stages[1]
    assert second.training.learning_rate * second.training.new_parameters_lr == pytest.approx(3e-5)
    assert (second.tuning.llm, second.tuning.lora.rank, second.tuning.lora.alpha) == ("lora", 16, 16)
    assert second.training.freeze == tuple(f"mapper.map.{layer}.*" for layer in (0, 3, 4))  # the projector
    assert recipes["merlin"].stages[-1].tuning.lora.dora
    assert recipes["lingualift"].stages[-1].tuning == TuningConfig(bridge=False, llm="full")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "paper").glob("bridge-*.yaml")), ids=lambda path: path.stem)
def test_paper_recipes_say_what_is_published_and_what_is_not(path: Path) -> None:
    head = path.read_text(encoding="utf-8").partition("kind: bridge")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert re.search(r"arXiv \d{4}\.\d{5}", head) and "# Published (" in head
    assert "# Ours" in head and ("# Left out" in head or "# Differences" in head)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tiny random halves: mt5, xlm-roberta, bert (as multilingual-e5) and llm (Llama)."""
    folder = tmp_path_factory.mktemp("halves")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 120, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 514, "pad_token_id": 1}
    t5: dict[str, Any] = {"vocab_size": 120, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 4}
    models: dict[str, PreTrainedModel] = {
        "mt5": MT5EncoderModel(MT5Config(**t5, pad_token_id=1)),
        "xlm-roberta": XLMRobertaModel(XLMRobertaConfig(**sizes), add_pooling_layer=False),
        "bert": BertModel(BertConfig(**sizes), add_pooling_layer=False),
        "llm": tiny_llm(),
    }
    for name, model in models.items():
        model.eval().save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def parts_of(model: BridgeForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_bridges_of_every_recipe_learn_on_tiny_models_of_its_architectures(
    tmp_path: Path, halves: Path, path: Path
) -> None:
    name = load_bridge_recipe(path).encoder.name
    encoder = next((kind for kind in ("mt5", "xlm-roberta") if kind in name), "bert")
    settings = [f"encoder.name={halves / encoder}", f"llm.name={halves / 'llm'}", "llm.dtype=float32"]
    recipe = load_bridge_recipe(path, settings)
    parts = Parts(recipe)
    for bridge in recipe.bridges:
        step = steps(recipe, bridge, recipe.seeds[0], None)[-1]
        model = parts.model(bridge, 0, [recipe.tuning(bridge, part.stage) for part in step.chain])
        codec = parts.codec(model, recipe.prompt(bridge)[0])
        if recipe.hidden_states(bridge).normalise == "standardise":
            ids = torch.tensor(codec.encode_sources(["abc def"]))
            model.fit_states([(ids, torch.ones_like(ids))])
        examples = codec.encode_pairs(["abc", "fed cab"], ["def", "a"])
        before = parts_of(model)
        tuning, own = recipe.tuning(bridge, step.stage), recipe.training(bridge, step.stage, 0).model_dump()
        own |= {"max_steps": 1, "warmup": 0, "gradient_accumulation": 1, "precision": "fp32"}
        config = TrainingConfig(**own | {"progress": False, "tensorboard": False})
        batching = step.stage.batching
        result = train_bridge(model, examples, {"dev": examples}, config, batching, tmp_path / bridge, tuning=tuning)
        assert result.steps == 1 and result.best_loss is not None and math.isfinite(result.best_loss)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        frozen = frozen_names(model, config.freeze)
        wanted = {"mapper", "end_vector"} if tuning.bridge else set()
        wanted |= {"fusion"} if tuning.bridge and model.fusion.trainable else set()
        wanted |= {"aligner"} if tuning.bridge and model.aligner is not None else set()
        wanted |= {half for half in ("encoder", "llm") if getattr(tuning, half) != "frozen"}
        assert {name.partition(".")[0] for name in changed} == wanted, bridge
        assert not changed & frozen


def test_a_rate_of_their_own_for_the_parameters_of_a_bridge(tmp_path: Path) -> None:
    model = tiny_bridge(mapper="slots", mapper_options={"slots": 2, "kind": "linear"})
    before = parts_of(model)
    examples = [EncodedExample((0, 10, 2), (0, 12), (12, 2))]
    training: dict[str, Any] = {"max_steps": 1, "warmup": 0, "weight_decay": 0, "learning_rate": 1e-3}
    config = TrainingConfig(**training, new_parameters_lr=0.25, precision="fp32", progress=False, tensorboard=False)
    batching = BatchingConfig(max_tokens=None, max_examples=1)
    train_bridge(model, examples, {}, config, batching, tmp_path, tuning=TuningConfig(llm="full"))
    # The first update of Adam moves every parameter by its rate, as long as its gradient is not tiny.
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in model.state_dict().items()}
    assert [moved["mapper.map.weight"], moved["end_vector"]] == pytest.approx([2.5e-4] * 2, rel=0.01)
    assert max(change for name, change in moved.items() if name.startswith("llm.")) == pytest.approx(1e-3, rel=0.01)


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
        ({"bridges": {"x": {"seeds": [-1]}}}, r"bridges\.x\.seeds.*whole numbers from 0"),
        ({"bridges": {"x": {"seeds": [1, 1]}}}, r"bridges\.x\.seeds.*different"),
        ({"bridges": {"x": {"learning_rates": [0.1]}}}, r"bridges\.x\.learning_rates.*add search"),
        ({"search": {"learning_rates": [0.1]}, "bridges": {"x": {"learning_rates": [-1, 0.1]}}}, "above 0"),
        ({"search": {"learning_rates": [0.1]}, "bridges": {"x": {"learning_rates": []}}}, r"x\.learning_rates"),
        (
            {
                "search": {"learning_rates": [0.1]},
                "bridges": {"x": {"learning_rates": [0.2], "training": {"learning_rate": 0.3}}},
            },
            r"x\.learning_rates.*leave training\.learning_rate out",
        ),
        ({"search": {"learning_rates": [math.nan, 0.1]}}, "finite"),
        ({"search": {"learning_rates": [math.inf, 0.1]}}, "finite"),
        ({"search": {"learning_rates": [0.1, 0.10000001]}}, "different"),
        ({"task": {"train_languages": ["en", "kk", "en"]}}, r"task\.train_languages.*en twice"),
        ({"evaluate": {"instruction": "Which topic?"}}, r"evaluate\.instruction.*must contain \{text\} once"),
        ({"evaluate": {"translation_instruction": "{text}{text}"}}, r"evaluate\.translation_instruction.*\{text\}"),
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


def test_languages_need_a_task_to_be_tested_in() -> None:
    with pytest.raises(ConfigError, match=r"--languages(?s:.)*no task"):
        load_bridge_recipe(ROOT / "recipes" / "bridge-translation.yaml", languages=["kk"])


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
