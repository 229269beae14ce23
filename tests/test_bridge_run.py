"""A whole bridge recipe on tiny random halves: search, seeds, cache, sharing, results.json, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import tiny_encoder, tiny_tokenizer
from enc2gen.corpora.builtin import split_of
from enc2gen.data.classification import build_classification_task
from enc2gen.errors import ConfigError, DataError, OutputError, TrainingError
from enc2gen.experiments.bridge import evaluate, sharing
from enc2gen.experiments.bridge.prepare import (
    PreparedBridgeData,
    check_languages,
    data_key,
    language_written,
    prepare,
)
from enc2gen.experiments.bridge.recipe import BridgeRecipe, load_bridge_recipe
from enc2gen.experiments.bridge.run import BridgeRun
from enc2gen.experiments.bridge.systems import Parts
from enc2gen.experiments.prepare import fingerprint
from enc2gen.models.bridge.modeling import BridgeForConditionalGeneration

CYRILLIC = dict(zip("abcdefgh", "абвгдежз", strict=True))


def tiny_llm(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def write_task(folder: Path) -> Path:
    """Words of two kinds in two languages; the kind is the first letter. Item i is a translation of item i."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("dev", 8), ("test", 12)):
        words = ["".join(rng.choice(list("cdefgh"), 3)) for _ in range(count)]
        rows = [("ab"[i % 2] + word, "ab"[i % 2]) for i, word in enumerate(words)]
        for language in ("en", "kk", "mn"):
            lines = ["id\ttext\tlabel"]
            for number, (word, label) in enumerate(rows):
                text = word if language == "en" else "".join(CYRILLIC[letter] for letter in word)
                lines.append(f"{split}{number}\t{text}\t{label}")
            (folder / language).mkdir(parents=True, exist_ok=True)
            (folder / language / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    for name, model in (("encoder", tiny_encoder()), ("llm", tiny_llm())):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    training = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "eval_every": 2,
        "save_every": 2,
        "precision": "fp32",
        "tensorboard": False,
        "progress": False,
    }
    return {
        "kind": "bridge",
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "seeds": [0, 1],
        "encoder": {"name": str(tmp_path / "encoder"), "max_length": 32},
        "llm": {"name": str(tmp_path / "llm")},
        "task": {"name": "tsv", "path": str(write_task(tmp_path / "task")), "train_languages": ["en"]},
        "bridges": {"last": {}, "global": {"fusion": "global"}},
        "stages": [{"name": "task", "data": [{"source": "task"}], "training": training}],
        "search": {"learning_rates": [1e-3, 1e-2]},
        "evaluate": {"methods": ["likelihood", "generation"], "resamples": 100, "batch_size": 8},
        "analysis": {"sentences": 10},
    }


def load(tmp_path: Path, content: dict[str, Any]) -> BridgeRecipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return load_bridge_recipe(path)


def console() -> Console:
    return Console(record=True, width=100, force_terminal=False)


def run(tmp_path: Path, content: dict[str, Any], **options: Any) -> tuple[Path, str]:
    screen = console()
    root = BridgeRun(load(tmp_path, content), screen, **options).run()
    return root, screen.export_text()


def test_a_run_leaves_results_report_and_models_and_is_cached(tmp_path: Path, content: dict[str, Any]) -> None:
    root, _ = run(tmp_path, content)
    results = json.loads((root / "results.json").read_text())
    assert results["languages"] == ["en", "kk", "mn"] and results["parallel"] and results["reference"] == "last"
    for bridge in results["bridges"].values():
        assert bridge["seeds"] == [0, 1] and set(bridge["accuracy"]) == {"likelihood", "generation"}
        kazakh = bridge["accuracy"]["likelihood"]["languages"]["kk"]
        assert np.array(kazakh["correct"]).shape == (2, 12) and set(np.ravel(kazakh["correct"])) <= {0, 1}
        assert kazakh["value"] == pytest.approx(100 * np.mean(kazakh["correct"]))
        assert kazakh["low"] <= kazakh["value"] <= kazakh["high"]
        groups = bridge["accuracy"]["likelihood"]["groups"]
        others = [np.mean(bridge["accuracy"]["likelihood"]["languages"][tag]["correct"]) for tag in ("kk", "mn")]
        assert groups["transfer"]["value"] == pytest.approx(100 * np.mean(others))
        assert groups["non-Latin"] == groups["transfer"] and set(groups) == {"transfer", "non-Latin", "Cyrl"}
    assert results["bridges"]["global"]["parameters"] == results["bridges"]["last"]["parameters"] + 4 + 1
    assert results["bridges"]["last"]["parameters"] == 24 * 16 + 16 + 16
    assert set(results["controls"]) == {"majority", "probe", "llm_alone"}
    assert results["controls"]["majority"]["accuracy"]["languages"]["kk"]["value"] == 50
    assert set(results["paired"]["global"]) == {"last", "majority", "probe", "llm_alone"}
    by_generation = results["paired_by"]["generation"]["global"]["last"]["languages"]["kk"]["value"]
    values = [
        results["bridges"][name]["accuracy"]["generation"]["languages"]["kk"]["value"] for name in ("global", "last")
    ]
    assert by_generation == pytest.approx(values[0] - values[1]) and results["samples"] == {}
    for losses in results["search"].values():
        assert set(losses) == {"0.001", "0.01"}
    assert {"table", "correlation"} <= set(results["alignment"])
    html = (root / "report.html").read_text(encoding="utf-8")
    assert "By language" in html and "<svg" in html and "linear probe" in html
    assert "Accuracy by generation" in html and "By language, by generation" in html
    assert "| Kazakh (kk) |" in (root / "results.md").read_text(encoding="utf-8")
    assert (root / "figures" / "weights-global.png").exists()
    model = BridgeForConditionalGeneration.from_pretrained(root / "models" / "global")
    assert model.config.labels == ["a", "b"] and model.processor is not None
    written = (root / "models" / "global" / "model.safetensors").stat().st_size
    assert written < 4 * 1.2 * results["bridges"]["global"]["parameters"] + 4096, "the halves are saved, too"

    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.safetensors")}
    _, text = run(tmp_path, content)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.safetensors")} == before
    assert text.count("done before, kept") >= 14 and "training" not in text.lower().split("results")[0]


def test_weights_of_tokens_and_alignment_against_accuracy_are_shown(tmp_path: Path, content: dict[str, Any]) -> None:
    del content["search"]
    fusion = {"fusion": "transformer", "fusion_options": {"feed_forward": 16}}
    content |= {"seeds": [0], "bridges": {"last": {}, "tokens": fusion, "global": {"fusion": "global"}}}
    content["evaluate"] |= {"methods": ["likelihood"], "controls": []}
    root, _ = run(tmp_path, content)
    found = json.loads((root / "bridges" / "tokens" / "tokens.json").read_text(encoding="utf-8"))
    assert list(found["texts"]) == ["en", "kk"] and found["layers"] == [1, 2, 3, 4]
    english, kazakh = found["texts"]["en"]["text"], found["texts"]["kk"]["text"]
    assert kazakh == "".join(CYRILLIC[letter] for letter in english), "not a translation"
    for row in found["texts"].values():
        weights = np.array(row["weights"])
        assert weights.shape == (len(row["tokens"]), 4) and weights.sum(axis=1) == pytest.approx(1.0)
        assert np.ptp(weights, axis=0).max() > 1e-4
    assert not (root / "bridges" / "global" / "tokens.json").exists(), "all its tokens have the same weights"
    names = {path.name for path in (root / "figures").glob("*.png")}
    assert {"tokens-tokens-en.png", "tokens-tokens-kk.png", "scatter-last.png", "alignment.png"} <= names
    assert sum(name.startswith("scatter-") for name in names) == 2
    html = (root / "report.html").read_text(encoding="utf-8")
    assert kazakh in html and "tokens, token by token, in Kazakh" in html
    assert "## Layer weights of tokens" in (root / "results.md").read_text(encoding="utf-8")
    results = json.loads((root / "results.json").read_text(encoding="utf-8"))
    assert set(results["alignment"]["correlation"]) == set(results["alignment"]["correlation_best"])


def test_the_search_picks_the_least_loss_and_its_first_seed_is_not_trained_again(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    del content["bridges"]["global"]
    root, text = run(tmp_path, content)
    results = json.loads((root / "results.json").read_text())
    losses = results["search"]["last"]
    best = min(losses, key=losses.get)
    assert results["bridges"]["last"]["learning_rate"] == float(best)
    trained = sorted(p.parent.relative_to(root / "bridges").as_posix() for p in root.rglob("result.json"))
    assert trained == sorted([*(f"last/seed0/task-lr{rate}" for rate in losses), f"last/seed1/task-lr{best}"])
    assert text.count("4 steps, learning rate") == 3


def test_two_processes_share_a_run_and_a_third_collects(tmp_path: Path, content: dict[str, Any]) -> None:
    content["evaluate"] |= {"methods": ["likelihood"], "controls": ["majority"]}
    content["analysis"] = {"mexa": False, "layer_weights": False}
    alone, _ = run(tmp_path, content | {"output": str(tmp_path / "alone")})
    load(tmp_path, content)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    verb = [sys.executable, "-m", "enc2gen.cli.main", "run", str(tmp_path / "recipe.yaml")]
    other = subprocess.Popen(
        [*verb, "--only", "last"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    _, mine = run(tmp_path, content, only=["last:1", "global"])
    outputs = [mine, other.communicate(timeout=120)[0].decode()]
    assert other.returncode == 0, outputs
    assert not (tmp_path / "run" / "results.json").exists()
    trained = sum(output.count("4 steps, learning rate") for output in outputs)
    assert trained == 6, "two rates and one more seed for each of two bridges, each trained once"
    root, text = run(tmp_path, content)
    assert "steps, learning rate" not in text
    found = [json.loads((folder / "results.json").read_text())["bridges"] for folder in (alone, root)]
    for name in ("last", "global"):
        assert found[0][name]["accuracy"] == found[1][name]["accuracy"]


def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from enc2gen.training.trainer import Trainer

    del content["bridges"]["global"], content["search"]
    content |= {"seeds": [0], "analysis": {"mexa": False, "layer_weights": False}}
    content["evaluate"] |= {"controls": []}
    whole, _ = run(tmp_path, content | {"output": str(tmp_path / "whole")})
    real, calls = Trainer._step, {"n": 0}

    def failing(self: Trainer, step: int) -> tuple[float, float]:
        calls["n"] += 1
        if calls["n"] == 4:
            raise KeyboardInterrupt
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, content)
    root, _ = run(tmp_path, content)
    weights = [next((r / "bridges").rglob("weights/model.safetensors")).read_bytes() for r in (whole, root)]
    assert weights[0] == weights[1]


def test_a_unit_that_another_process_holds_is_waited_for(
    tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from enc2gen.locking import locked_folder

    recipe = BridgeRun(load(tmp_path, content), console())
    done: list[str] = []
    units = [sharing.Unit(name, lambda: "key", lambda name=name: done.append(name)) for name in ("first", "second")]  # type: ignore[misc]
    lock = locked_folder(recipe.workspace.root / "locks" / "first")
    lock.__enter__()
    monkeypatch.setattr(sharing.time, "sleep", lambda _: lock.__exit__(None, None, None))
    said: list[str] = []
    sharing.carry_out(lambda: units, recipe.workspace, said.append, lambda _: None)
    assert done == ["second", "first"] and "waiting for another process: first" in said


def test_more_test_languages_repeat_no_training(tmp_path: Path, content: dict[str, Any]) -> None:
    del content["bridges"]["global"], content["search"]
    content |= {"seeds": [0], "analysis": {"mexa": False, "layer_weights": False}}
    content["evaluate"] |= {"controls": []}
    content["task"]["languages"] = ["kk"]
    root, _ = run(tmp_path, content)
    assert json.loads((root / "results.json").read_text())["languages"] == ["en", "kk"]
    content["task"]["languages"] = ["kk", "mn"]
    root, text = run(tmp_path, content)
    assert "steps, learning rate" not in text
    assert json.loads((root / "results.json").read_text())["languages"] == ["en", "kk", "mn"]


def test_changed_settings_do_not_replace_training_unasked(tmp_path: Path, content: dict[str, Any]) -> None:
    del content["bridges"]["global"], content["search"]
    content |= {"seeds": [0], "analysis": {"mexa": False, "layer_weights": False}}
    content["evaluate"] |= {"controls": []}
    root, _ = run(tmp_path, content)
    old = next(root.rglob("weights/model.safetensors")).read_bytes()
    content["bridges"]["last"]["end_vector"] = "random"
    with pytest.raises(OutputError, match="--overwrite"):
        run(tmp_path, content)
    assert next(root.rglob("weights/model.safetensors")).read_bytes() == old
    run(tmp_path, content, overwrite=True)
    assert next(root.rglob("weights/model.safetensors")).read_bytes() != old


def test_a_report_shows_nothing_that_other_settings_left(tmp_path: Path, content: dict[str, Any]) -> None:
    del content["search"]
    fusion = {"fusion": "transformer", "fusion_options": {"feed_forward": 16}}
    content |= {"seeds": [0], "bridges": {"b": fusion}}
    content["evaluate"] |= {"methods": ["likelihood"], "controls": []}
    root, _ = run(tmp_path, content)

    def shown() -> list[bool]:
        html, text = ((root / name).read_text(encoding="utf-8") for name in ("report.html", "results.md"))
        alignment = json.loads((root / "results.json").read_text(encoding="utf-8"))["alignment"] is not None
        assert ("(MEXA)" in html) == alignment
        return [alignment, "Layer weights of b" in text, "layer weights of b" in html, "b, token by token" in html]

    assert shown() == [True, True, True, True]
    tiny_encoder(seed=5).save_pretrained(tmp_path / "encoder")
    bridges: list[dict[str, Any]] = [fusion, {"fusion": "last"}]
    for bridge, analysis in zip(bridges, ({"mexa": False, "layer_weights": False}, {"mexa": True}), strict=True):
        content |= {"bridges": {"b": bridge}, "analysis": {"sentences": 10, **analysis}}
        run(tmp_path, content, overwrite=True)
        assert shown() == [analysis["mexa"], False, False, False]


@pytest.mark.parametrize(
    ("group", "language"),
    [
        ("kk-en", "en"), ("en-zh-Hant", "zh-Hant"), ("en-kk-Arab", "kk-Arab"), ("zh-Hant-TW-en", "en"),
        ("pt-BR-mn-Mong", "mn-Mong"), ("en-es-419", "es-419"), ("en-yue", "yue"), ("None-pt-BR", "pt-BR"),
        ("en-sl-rozaj-biske", "sl-rozaj-biske"), ("sl-rozaj-en-GB", "en-GB"),
    ],
)  # fmt: skip
def test_the_language_written_is_the_whole_tag(group: str, language: str) -> None:
    assert language_written(group) == language


def test_pairs_into_another_script_are_scored_in_their_language(tmp_path: Path, content: dict[str, Any]) -> None:
    lines = ["en\tzh", *(f"{x}{y}\t天{x}氣{y}" for x in "abcdefgh" for y in "abcdef")]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    fields = {"source": "en", "target": "zh", "source_language": "en", "target_language": "zh-Hant"}
    pairs = {"source": "pairs", "path": str(tmp_path / "pairs.tsv"), "fields": fields, "test_percent": 20}
    content["stages"] = [{**content["stages"][0], "data": [pairs]}]
    content |= {"seeds": [0], "bridges": {"last": {}}, "search": None, "task": None}
    content["analysis"] = {"mexa": False, "layer_weights": False}
    content["evaluate"] = {"controls": [], "metrics": ["bleu", "off-target"], "resamples": 100, "limit": 3}
    root, _ = run(tmp_path, content)
    found = json.loads((root / "results.json").read_text())["bridges"]["last"]["pairs"]["en-zh-Hant"]
    assert "tok:zh" in found["bleu"]["seeds"][0]["signature"]
    # scores of the time when only the end of the tag was read are measured again, and nothing is trained again
    key, training = root / "stages" / "evaluate-last-seed0.json", next(root.rglob("result.json")).stat().st_mtime_ns
    assert key.exists()
    old = BridgeRun(load(tmp_path, content), console())
    old.__dict__["_long_tags"] = []
    old_key = next(u.key() for u in old._bridge_units("last", 0) if u.name == "evaluate-last-seed0")
    key.write_text(json.dumps({**json.loads(key.read_text()), "key": old_key}))
    _, text = run(tmp_path, content)
    assert "evaluate-last-seed0: done before" not in text and "prepare: done before" in text
    assert next(root.rglob("result.json")).stat().st_mtime_ns == training


def test_two_stages_pairs_tuning_and_an_aligner(
    tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "src\ten",
        *(f"{''.join(CYRILLIC[c] for c in w)}\t{w}" for w in ("ab" + x + y for x in "cdefgh" for y in "cdefgh")),
    ]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    fields = {"source": "src", "target": "en", "source_language": "kk", "target_language": "en"}
    pairs = {"source": "pairs", "path": str(tmp_path / "pairs.tsv"), "fields": fields, "test_percent": 50}
    # the same pairs as those of another language, which are only tested on
    tested = {
        **pairs,
        "fields": {**fields, "source_language": "mn"},
        "languages": [],
    }
    alignment = {**content["stages"][0], "name": "alignment", "data": [pairs, tested]}
    content["stages"] = [alignment, content["stages"][0]]
    content |= {
        "seeds": [0],
        "bridges": {
            "aligned": {"mapper": "mlp", "aligner": {}, "hidden_states": {"normalise": "standardise"}},
            "tuned": {"tuning": {"encoder": "full", "llm": "full"}, "stages": ["task"]},
            "source": {"stages": ["task"], "prompt": "{source}"},
        },
    }
    del content["search"]
    content["evaluate"] = {"controls": ["llm_alone"], "metrics": ["exact-match"], "resamples": 100, "limit": 5}
    content["evaluate"]["decoding"] = {"num_beams": 2, "no_repeat_ngram_size": 3}
    searches: dict[str, Any] = {}
    real, real_alone = evaluate.BridgeGenerator.generate, evaluate.write_alone

    def generate(self: Any, texts: Any, *, config: Any, **options: Any) -> Any:
        searches["bridge"] = config
        return real(self, texts, config=config, **options)

    def alone(*arguments: Any, decoding: Any, **options: Any) -> Any:
        searches["llm_alone"] = decoding
        return real_alone(*arguments, decoding=decoding, **options)

    monkeypatch.setattr(evaluate.BridgeGenerator, "generate", generate)
    monkeypatch.setattr(evaluate, "write_alone", alone)
    root, _ = run(tmp_path, content)
    assert searches["bridge"] == searches["llm_alone"]  # a comparison is fair if nothing else differs
    assert (searches["bridge"].num_beams, searches["bridge"].max_new_tokens) == (2, 64)
    results = json.loads((root / "results.json").read_text())
    assert set(results["bridges"]["aligned"]["training"]["0"]) == {"alignment", "task"}
    assert set(results["bridges"]["tuned"]["training"]["0"]) == {"task"}
    assert results["bridges"]["aligned"]["pairs"]["kk-en"]["exact-match"]["seeds"][0]["n"] <= 5
    assert results["bridges"]["aligned"]["pairs"]["mn-en"]["exact-match"]["seeds"][0]["n"] == 5
    trained = (root / "data" / "stages" / "alignment" / "train.jsonl").read_text(encoding="utf-8")
    assert '"kk-en"' in trained and '"mn-en"' not in trained
    assert results["controls"]["llm_alone"]["pairs"]["kk-en"]["exact-match"]["value"] == 0
    match = results["bridges"]["aligned"]["pairs"]["mn-en"]["exact-match"]
    assert (match["low"], match["high"]) == (match["seeds"][0]["low"], match["seeds"][0]["high"])
    outputs = (root / "bridges" / "aligned" / "seed0").glob("*/outputs.jsonl")
    rows = [json.loads(line) for path in outputs for line in path.read_text(encoding="utf-8").splitlines()]
    html, text = ((root / name).read_text(encoding="utf-8") for name in ("report.html", "results.md"))
    for group in ("kk-en", "mn-en"):
        assert 0 < len(results["samples"][group]) <= 5 and f"## Sample outputs, {group}" in text
        for sample in results["samples"][group]:
            assert set(sample["outputs"]) == {"aligned", "tuned", "source"}
            mine = (sample["source"], sample["references"][0], sample["outputs"]["aligned"])
            assert mine in [(row["source"], row["target"], row["output"]) for row in rows if row["group"] == group]
            assert f">{sample['source']}<" in html
    encoder = {name: p for name, p in tiny_encoder().named_parameters()}
    tuned = BridgeForConditionalGeneration.from_pretrained(root / "models" / "tuned")
    assert any(not torch.equal(p, encoder[name]) for name, p in tuned.encoder.named_parameters())
    aligned = BridgeForConditionalGeneration.from_pretrained(root / "models" / "aligned")
    assert all(torch.equal(p, encoder[name]) for name, p in aligned.encoder.named_parameters())
    source = BridgeForConditionalGeneration.from_pretrained(root / "models" / "source")
    assert source.config.prompt == "{source}" and source.config.prompt_with_source


def test_a_stage_goes_on_from_the_weights_of_the_one_before(tmp_path: Path, content: dict[str, Any]) -> None:
    first = {**content["stages"][0], "name": "first"}
    second = {**first, "name": "second", "tuning": {"llm": "lora", "lora": {"rank": 2}}}
    second["training"] = {**first["training"], "learning_rate": 1e-12, "warmup": 0}  # it stays where it starts
    content |= {"seeds": [0], "bridges": {"last": {}}, "stages": [first, second]}
    content |= {"search": None, "analysis": {"mexa": False, "layer_weights": False}}
    content["evaluate"] |= {"controls": []}
    root, _ = run(tmp_path, content)
    folder = root / "bridges" / "last" / "seed0"
    before, after = (load_file(folder / stage / "weights" / "model.safetensors") for stage in ("first", "second"))
    recipe = load(tmp_path, content)
    untrained = dict(Parts(recipe).model("last", 0, []).named_parameters())
    assert set(before) == {"end_vector", "mapper.map.weight", "mapper.map.bias"} < set(after)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight)
        assert not torch.allclose(weight, untrained[name], atol=1e-4), "the first stage changed nothing"
    published = BridgeForConditionalGeneration.from_pretrained(root / "models" / "last")
    torch.testing.assert_close(published.mapper.map.weight.data, before["mapper.map.weight"])
    maps = [layer for layer in tiny_llm().model.modules() if isinstance(layer, torch.nn.Linear)]
    updates = sum(2 * (layer.in_features + layer.out_features) for layer in maps)
    counted = {
        stage: json.loads((folder / stage / "result.json").read_text())["parameters"] for stage in ("first", "second")
    }
    assert counted == {"first": 24 * 16 + 16 + 16, "second": 24 * 16 + 16 + 16 + updates}


def test_other_settings_of_measuring_measure_again_and_repeat_no_training(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    content |= {"seeds": [0], "bridges": {"last": {}}, "search": None}
    content["analysis"] = {"mexa": False, "layer_weights": False}
    content["evaluate"] = {"controls": ["majority", "llm_alone"], "resamples": 100}
    root, _ = run(tmp_path, content)
    assert set(json.loads((root / "results.json").read_text())["bridges"]["last"]["accuracy"]) == {"likelihood"}
    content["evaluate"]["methods"] = ["likelihood", "generation"]
    root, text = run(tmp_path, content)
    found = json.loads((root / "results.json").read_text())["bridges"]["last"]["accuracy"]
    assert set(found) == {"likelihood", "generation"} and "steps, learning rate" not in text
    content["evaluate"]["instruction"] = "Which letter comes first? {text}"
    _, text = run(tmp_path, content)
    assert "control-llm_alone: done before" not in text
    for name in ("train-last-seed0-task", "evaluate-last-seed0", "control-majority", "publish-last"):
        assert f"{name}: done before" in text  # they are not asked


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ({"test_percent": 20}, {"test_percent": 20, "dev_percent": 9}, None),
        ({"test_percent": 20}, {"test_percent": 10}, "data.1.*what stages.first.data.0 tests: 20 %.*10 % are held"),
        ({"test_percent": 10}, {"test_percent": 20}, "data.0.*what stages.first.data.1 tests"),
        ({"test_percent": 0}, {"test_percent": 0}, None),
        ({"test_percent": 20}, {"test_percent": 98, "dev_percent": 1, "languages": []}, "data.0.*98 %"),
        ({"test_percent": 20}, {"test_percent": 20, "languages": []}, None),
        ({"test_percent": 20}, {"test_percent": 10, "languages": []}, None),
        ({"test_percent": 5, "languages": []}, {"test_percent": 98, "dev_percent": 1, "languages": []}, None),
        ({"test_percent": 20}, {"test_percent": 0, "path": "{folder}/other.tsv"}, None),
        ({"test_percent": 20}, {"test_percent": 0, "path": "{folder}/../{name}/pairs.tsv"}, "data.1"),
        ({"test_percent": 20}, {"test_percent": 0, "path": "{folder}"}, "data.1"),
        ({"test_percent": 20}, {"source": "code-switched", "field": "en", "languages": ["kk"]}, "data.1.*0 % are held"),
    ],
)  # fmt: skip
def test_no_entry_trains_on_what_another_tests(
    tmp_path: Path, content: dict[str, Any], first: dict[str, Any], second: dict[str, Any], refused: str | None
) -> None:
    rows = [f"{x}{y}\t{x}{y}" for x in "abcdefgh" for y in "abcdefgh"]
    folder = tmp_path / "files"
    folder.mkdir()
    for file, more in (("pairs.tsv", ""), ("other.tsv", "zz")):
        (folder / file).write_text("\n".join(["src\ten", *(row + more for row in rows)]) + "\n", encoding="utf-8")
    fields = {"source": "src", "target": "en", "source_language": "kk", "target_language": "en"}
    entries = []
    for change in (first, second):
        entry = {"source": "pairs", "path": "{folder}/pairs.tsv", **change}
        entry |= {"fields": fields} if entry["source"] == "pairs" else {}
        entries.append({**entry, "path": entry["path"].format(folder=folder, name=folder.name)})
    content["stages"] = [{**content["stages"][0], "name": "first", "data": entries}]
    workspace = BridgeRun(load(tmp_path, content), console()).workspace
    if refused is not None:
        with pytest.raises(ConfigError, match=f"(?s){refused}"):
            prepare(load(tmp_path, content), workspace, print)
        return
    prepare(load(tmp_path, content), workspace, print)
    data = PreparedBridgeData(workspace)
    trained = {pair.target for split in ("train", "dev") for pair in data.pairs("first", split)}
    assert not trained & {pair.target for pair in data.pairs("first", "test")}


@pytest.mark.parametrize(
    ("only", "message"),
    [("lst", "no bridge 'lst'(?s:.)*bridges: last, global"), ("last:7", "no seed '7'(?s:.)*seeds: 0, 1")],
)
def test_only_names_what_there_is(tmp_path: Path, content: dict[str, Any], only: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BridgeRun(load(tmp_path, content), console(), only=[only])


def test_one_file_of_english_texts_is_enough(tmp_path: Path, content: dict[str, Any]) -> None:
    rows = [
        f"{'ab'[i % 2]}{x}{y}\t{'ab'[i % 2]}" for i, (x, y) in enumerate((x, y) for x in "cdefgh" for y in "cdefgh")
    ]
    (tmp_path / "mine.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    content["task"] = {"name": "tsv", "path": str(tmp_path / "mine.tsv"), "train_languages": ["en"], "test_percent": 20}
    content |= {"seeds": [0], "bridges": {"last": {}}, "search": None}
    content["evaluate"] = {"controls": ["majority", "probe"], "resamples": 100}
    content["analysis"] = {"mexa": False, "layer_weights": False}
    root, screen = run(tmp_path, content)
    splits = {
        split: {json.loads(line)["text"] for line in (root / "data" / "task" / f"{split}.jsonl").open(encoding="utf-8")}
        for split in ("train", "dev", "test")
    }
    assert all(splits.values())  # each has some,
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == 36  # and no text is in two
    assert BridgeForConditionalGeneration.from_pretrained(root / "models" / "last").config.labels == ["a", "b"]
    assert json.loads((root / "results.json").read_text())["languages"] == ["en"]
    assert "last" in screen


def small(content: dict[str, Any]) -> dict[str, Any]:
    """One bridge, one seed, nothing to search, one control."""
    content |= {"seeds": [0], "bridges": {"last": {}}, "search": None}
    content["analysis"] = {"mexa": False, "layer_weights": False}
    content["evaluate"] = {"controls": ["majority"], "resamples": 100}
    return content


def test_files_behind_a_pattern_are_read_again_once_they_change(tmp_path: Path, content: dict[str, Any]) -> None:
    small(content)["task"] |= {"path": str(tmp_path / "task" / "{language}" / "{split}.tsv"), "languages": ["kk"]}
    root, _ = run(tmp_path, content)
    before = json.loads((root / "results.json").read_text())["controls"]["majority"]["accuracy"]["languages"]["kk"]
    test = tmp_path / "task" / "kk" / "test.tsv"
    test.write_text(test.read_text(encoding="utf-8").replace("\tb\n", "\ta\n"), encoding="utf-8")
    _, text = run(tmp_path, content)
    after = json.loads((root / "results.json").read_text())["controls"]["majority"]["accuracy"]["languages"]["kk"]
    assert before["value"] == 50 and after["value"] == 100 and "steps, learning rate" not in text
    (tmp_path / "task" / "mn" / "test.tsv").unlink()  # of a language that is not tested
    _, text = run(tmp_path, content)
    assert "prepare: done before, kept" in text
    (tmp_path / "task" / "en" / "train.tsv").unlink()
    with pytest.raises(DataError, match="train"):
        run(tmp_path, content)


def test_what_a_task_is_read_from_is_known_as_ever(tmp_path: Path, content: dict[str, Any]) -> None:
    task = content["task"]
    path = task["path"]
    for name, found in ((path, fingerprint(path)), (f"{path}/en/test.tsv", fingerprint(f"{path}/en/test.tsv"))):
        task["path"] = name
        assert data_key(load(tmp_path, content))["files"] == found != []
    for name in ("hub:owner/name:{language}", "owner/name", None):
        task["path"] = name
        assert data_key(load(tmp_path, content))["files"] == []


@pytest.mark.parametrize(
    ("path", "train", "tested", "refused"),
    [
        ("mine.tsv", ["en"], ["kk", "bo"], "'kk'.*'en'"),
        ("mine.tsv", ["en", "kk"], None, "'kk'.*'en'"),
        ("mine.tsv", ["en"], ["en"], None),
        ("task/en", ["en"], ["kk"], "'kk'.*'en'"),
        ("task/en/{split}.tsv", ["en"], ["kk"], "'kk'.*'en'"),
        ("task/{language}/test.tsv", ["en"], ["kk", "mn"], None),
        ("task", ["en", "mn"], ["kk"], None),
    ],
)
def test_one_file_is_read_in_one_language(
    tmp_path: Path, content: dict[str, Any], path: str, train: list[str], tested: list[str] | None, refused: str | None
) -> None:
    rows = [f"{'ab'[i % 2]}{x}{y}\t{'ab'[i % 2]}" for i, x in enumerate("cdefgh") for y in "abcdefgh"]
    (tmp_path / "mine.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    content["task"] |= {"path": str(tmp_path / path), "train_languages": train, "languages": tested}
    content["task"] |= {"dev_percent": 30, "test_percent": 30}
    recipe = load(tmp_path, content)
    if refused is None:
        assert recipe.task is not None
        check_languages(recipe.task)
        prepare(recipe, BridgeRun(recipe, console()).workspace, print)
        return
    with pytest.raises(DataError, match=f"(?s){refused}.*remedy: .*{{language}}"):
        run(tmp_path, content)


@pytest.mark.parametrize(
    ("split", "remedy"), [("test", "task.test_percent"), ("dev", "task.dev_percent"), ("train", "task.limit")]
)
def test_every_trained_language_has_texts_of_every_split(
    tmp_path: Path, content: dict[str, Any], split: str, remedy: str
) -> None:
    train = tmp_path / "task" / "kk" / "train.tsv"
    content["task"] |= {"train_languages": ["en", "kk"], "dev_percent": 1, "test_percent": 1}
    head, *lines = train.read_text(encoding="utf-8").splitlines()
    if split == "train":
        content["task"]["limit"] = 2  # and there are three labels
        lines = [line.rpartition("\t")[0] + f"\t{label}" for line, label in zip(lines, "xyz" * 8, strict=True)]
    else:
        train.with_name(f"{split}.tsv").unlink()
        lines = [line for line in lines if split_of(line.split("\t")[1], dev_percent=1, test_percent=1) == "train"]
    train.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    recipe = load(tmp_path, content)
    with pytest.raises(DataError, match=f"(?s)no text of language 'kk' is left for {split}.*{remedy}"):
        prepare(recipe, BridgeRun(recipe, console()).workspace, print)


def test_a_search_leaves_out_rates_that_diverge(tmp_path: Path, content: dict[str, Any]) -> None:
    second = {**content["stages"][0], "name": "second"}
    small(content)["stages"] += [second]
    content |= {"seeds": [0, 1], "search": {"learning_rates": [1e-2, 1e30], "stage": "task"}}
    root, text = run(tmp_path, content)
    results = json.loads((root / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["bridges"]["last"]["learning_rate"] == 1e-2
    assert results["search"]["last"]["1e+30"] is None and results["search"]["last"]["0.01"] > 0
    assert "diverged" in (root / "results.md").read_text(encoding="utf-8") and "diverged" in text
    folder = root / "bridges" / "last" / "seed0"
    for stage in ("task", "second"):
        found = json.loads((folder / f"{stage}-lr1e+30" / "result.json").read_text())
        assert found["best_loss"] is None and found["diverged"].startswith("loss")
        assert not (folder / f"{stage}-lr1e+30" / "checkpoints").exists()
    _, text = run(tmp_path, content)
    assert "steps, learning rate" not in text


def test_a_search_in_which_all_rates_diverge_ends_and_so_does_a_given_rate(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    small(content)["search"] = {"learning_rates": [1e29, 1e30]}
    with pytest.raises(
        TrainingError, match=r"(?s)diverged at every learning rate.*1e\+29, 1e\+30.*remedy: search lower"
    ):
        run(tmp_path, content)
    content["search"], content["stages"][0]["training"]["learning_rate"] = None, 1e30
    with pytest.raises(TrainingError, match="loss"):
        run(tmp_path, content)


def test_a_search_needs_development_examples(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "few.tsv").write_text("src\ten\nabc\tcba\nbcd\tdcb\n", encoding="utf-8")
    fields = {"source": "src", "target": "en", "source_language": "kk", "target_language": "en"}
    pairs = {"source": "pairs", "path": str(tmp_path / "few.tsv"), "fields": fields, "test_percent": 0}
    small(content)["stages"][0]["data"] = [{**pairs, "dev_percent": 1}]
    run(tmp_path, content)  # nothing is to be chosen
    content["search"] = {"learning_rates": [0.1, 0.01]}
    with pytest.raises(DataError, match=r"(?s)stages\.task.*no development example.*remedy: .*dev_percent"):
        run(tmp_path, content)
    content["stages"] += [{**content["stages"][0], "name": "behind", "data": [{"source": "task"}]}]
    run(tmp_path, content, overwrite=True)  # the loss of the last stage decides


def test_a_refused_run_leaves_the_recipe_of_the_training_that_is_there(tmp_path: Path, content: dict[str, Any]) -> None:
    root, _ = run(tmp_path, small(content))
    content["bridges"]["last"]["training"] = {"learning_rate": 0.5}
    content["bridges"] = {"more": {"fusion": "mean"}, **content["bridges"]}
    with pytest.raises(OutputError, match="--overwrite"):
        run(tmp_path, content)
    kept = json.loads((root / "recipe.json").read_text())
    assert kept["bridges"]["last"]["training"] == {} and not (root / "bridges" / "more").exists()
    run(tmp_path, content, overwrite=True)
    kept = json.loads((root / "recipe.json").read_text())
    assert kept["bridges"]["last"]["training"] == {"learning_rate": 0.5}


def test_a_report_that_was_removed_is_written_again(tmp_path: Path, content: dict[str, Any]) -> None:
    root, _ = run(tmp_path, small(content))
    for name in ("report.html", "results.md", "results.json"):
        (root / name).unlink()
        _, text = run(tmp_path, content)
        assert (root / name).exists() and "report: done before" not in text and "steps, learning rate" not in text
    _, text = run(tmp_path, content)
    assert "report: done before, kept" in text


def test_a_lexicon_with_other_braces_is_looked_for_by_its_name(tmp_path: Path, content: dict[str, Any]) -> None:
    switched = {"source": "code-switched", "path": "task", "languages": ["kk"]}
    name = str(tmp_path / "{lang}-{language}.tsv")
    content["stages"] = [{**content["stages"][0], "data": [{**switched, "lexicon": name}]}]
    with pytest.raises(DataError, match=r"\{lang\}-kk\.tsv"):
        run(tmp_path, content)
    (tmp_path / "{lang}-kk.tsv").write_text("ac\tас\n", encoding="utf-8")
    names = {Path(entry["file"]).name for entry in data_key(load(tmp_path, content))["files"]}
    assert "{lang}-kk.tsv" in names


def test_a_configuration_on_the_hub_with_other_braces_is_asked_for_by_its_name() -> None:
    options = {"hub": "owner/name", "hub_config": "{lang}-{language}", "splits": {"test": "{x}-{split}"}}
    task = build_classification_task("tsv", options)
    assert task.source("kk", "test") == ("hub:owner/name:{lang}-kk", "{x}-test")


def test_data_prepared_without_a_test_of_a_trained_language_are_refused(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    small(content)["task"] |= {"train_languages": ["en", "kk"], "languages": ["kk"]}
    root, _ = run(tmp_path, content)
    path = root / "data" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "languages": ["en"]}))
    with pytest.raises(DataError, match="no text of language 'kk' is left for test"):
        run(tmp_path, content)


def test_bad_data_and_lengths(tmp_path: Path, content: dict[str, Any]) -> None:
    content["task"]["languages"] = ["kz"]
    with pytest.raises(DataError, match="kz"):
        run(tmp_path, content)
    content["task"]["languages"] = ["kk"]
    content["encoder"]["max_length"] = 65
    with pytest.raises(ConfigError, match=r"max_length(?s:.)*64"):
        run(tmp_path, content)
