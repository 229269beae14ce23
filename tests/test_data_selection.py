"""Which examples are read, trained on, validated and measured: limits, vocabulary-only data, the split to score."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from enc2gen.data.batching import source_fingerprint
from enc2gen.errors import ConfigError, DataError
from enc2gen.experiments.bridge.recipe import PairsSection
from enc2gen.experiments.data_config import DatasetConfig
from enc2gen.experiments.evaluate import evaluation_sets
from enc2gen.experiments.prepare import PreparedData, fingerprint
from enc2gen.experiments.recipe import Recipe, load_recipe
from enc2gen.experiments.run import Run
from test_run import recipe_content, write_pairs

Row = tuple[str, str, str]


@pytest.fixture
def content(tmp_path: Path, encoder_folder: Path) -> dict[str, Any]:
    write_pairs(tmp_path / "pairs.tsv")
    return recipe_content(tmp_path, encoder_folder)


def load(tmp_path: Path, content: dict[str, Any], output: str = "run") -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, "output": str(tmp_path / output)}), encoding="utf-8")
    return load_recipe(path)


def run(tmp_path: Path, content: dict[str, Any], *stages: str, output: str = "run") -> Run:
    made = Run(load(tmp_path, content, output), Console(quiet=True))
    made.run(stages)
    return made


def rows(made: Run, split: str) -> list[Row]:
    table = PreparedData(made.workspace.data).examples(split)
    return [(row["source"], row["target"], row["target_language"]) for row in table]


def test_a_pair_is_in_the_same_part_whichever_way_it_is_read(tmp_path: Path, content: dict[str, Any]) -> None:
    dataset = content["data"]["datasets"][0]
    pairs = tmp_path / "pairs.tsv"
    head, *lines = pairs.read_text(encoding="utf-8").splitlines()
    # Every third pair has the target of the one before: one Kazakh text, two English ones.
    for index in range(2, len(lines), 3):
        lines[index] = lines[index].split("\t")[0] + "\t" + lines[index - 1].split("\t")[1]
    pairs.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    made = {}
    for directions, written in (("forward", ["kk"]), ("reverse", ["en"]), ("both", ["kk", "en"])):
        content["languages"], dataset["fields"]["directions"] = written, directions
        made[directions] = run(tmp_path, content, "prepare", output=directions)

    def sources(directions: str, split: str, language: str) -> set[str]:
        return {source for source, _, written in rows(made[directions], split) if written == language}

    def english(split: str) -> set[str]:
        return {target for source, target, _ in rows(made["reverse"], split)}

    for split in ("train", "dev", "test"):
        forward = sources("forward", split, "kk")
        assert english(split) <= forward and len(english(split)) > 0.4 * len(forward)
        assert sorted(rows(made["both"], split)) == sorted(rows(made["forward"], split) + rows(made["reverse"], split))
    test, dev = sources("reverse", "test", "en"), sources("reverse", "dev", "en")
    assert test and dev and not test & dev and not (test | dev) & sources("reverse", "train", "en")
    count = sum(len(rows(made["reverse"], split)) for split in ("train", "dev", "test"))
    assert count < len(lines), "a training pair whose Kazakh text is held out is left out"


def test_train_limit_is_per_direction_nested_and_leaves_the_rest_whole(tmp_path: Path, content: dict[str, Any]) -> None:
    dataset = content["data"]["datasets"][0]
    dataset["fields"]["directions"] = "both"
    content["languages"] = ["kk", "en"]
    whole = run(tmp_path, content, "prepare", output="whole")
    dataset["train_limit"] = 60
    larger = run(tmp_path, content, "prepare", output="larger")
    dataset["train_limit"] = 25
    smaller = run(tmp_path, content, "prepare", output="smaller")

    assert Counter(language for *_, language in rows(smaller, "train")) == {"kk": 25, "en": 25}
    assert Counter(language for *_, language in rows(larger, "train")) == {"kk": 60, "en": 60}
    assert set(rows(smaller, "train")) < set(rows(larger, "train")) < set(rows(whole, "train"))
    into_kk = {(source, target) for source, target, language in rows(smaller, "train") if language == "kk"}
    into_en = {(target, source) for source, target, language in rows(smaller, "train") if language == "en"}
    assert into_kk == into_en, "both directions are of the same pairs"
    assert rows(smaller, "dev") == rows(whole, "dev") and rows(smaller, "test") == rows(whole, "test")
    first = rows(whole, "train")[: len(rows(smaller, "train"))]
    assert rows(smaller, "train") != first, "chosen at random, not the first ones"
    order = [row for row in rows(whole, "train") if row in set(rows(smaller, "train"))]
    assert rows(smaller, "train") == order


def test_a_limit_above_what_there_is_changes_nothing(tmp_path: Path, content: dict[str, Any]) -> None:
    whole = run(tmp_path, content, "prepare", output="whole")
    content["data"]["datasets"][0]["train_limit"] = 10_000
    assert rows(run(tmp_path, content, "prepare", output="limited"), "train") == rows(whole, "train")


def test_dev_limit(tmp_path: Path, content: dict[str, Any]) -> None:
    whole = run(tmp_path, content, "prepare", output="whole")
    content["data"]["datasets"][0]["dev_limit"] = 4
    limited = run(tmp_path, content, "prepare", output="limited")
    assert len(rows(limited, "dev")) == 4 < len(rows(whole, "dev"))
    assert set(rows(limited, "dev")) < set(rows(whole, "dev"))
    assert rows(limited, "train") == rows(whole, "train") and rows(limited, "test") == rows(whole, "test")


def test_data_without_a_stage_give_their_vocabulary_and_languages_only(tmp_path: Path, content: dict[str, Any]) -> None:
    other = tmp_path / "other.tsv"
    letters = "qwertyuiop"
    lines = [f"{letters[index // 10]}{letters[index % 10]}\t{'ө' * (1 + index % 3)}{index}" for index in range(100)]
    other.write_text("en\tmn\n" + "\n".join(lines) + "\n", encoding="utf-8")
    fields = {"source": "en", "target": "mn", "source_language": "en", "target_language": "mn"}
    content["data"]["datasets"].append({"path": str(other), "fields": fields, "stages": []})
    content["languages"] = ["kk", "mn"]
    del content["systems"]["random_decoder"], content["finetune"]
    made = run(tmp_path, content, "pretrain")

    for split in ("dev", "test"):
        assert {language for *_, language in rows(made, split)} == {"kk"}
    summary = made.workspace.read_json(made.workspace.data / "summary.json")
    assert "mn" in summary["languages"] and 60 < summary["counts"]["vocabulary"]["mn"] < 95
    assert summary["counts"]["train"].keys() == {"kk"}
    assert {row["target_language"] for row in PreparedData(made.workspace.data).trained()} == {"kk"}
    pieces = json.loads((made.workspace.encoder("shared", "tokenizer") / "tokenizer.json").read_text(encoding="utf-8"))
    assert any("ө" in piece for piece in made_vocabulary(pieces))
    config = json.loads(made.workspace.system("shared", "pretrained", "config.json").read_text(encoding="utf-8"))
    assert "mn" in config["languages"]
    validation = made.workspace.read_json(made.workspace.system("shared", "pretrain", "result.json"))
    assert validation["best_loss"] is not None
    assert {test.language for test in evaluation_sets(made.recipe, made.workspace)} == {"kk"}


def made_vocabulary(tokenizer: dict[str, Any]) -> list[str]:
    vocabulary = tokenizer["model"]["vocab"]
    return [entry[0] for entry in vocabulary] if isinstance(vocabulary, list) else list(vocabulary)


def test_a_run_of_plain_text_only_trains_but_has_nothing_to_measure(tmp_path: Path, content: dict[str, Any]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"абв гд {index}" for index in range(60)), encoding="utf-8")
    content["data"]["datasets"][0]["stages"] = []
    content["data"]["monolingual"] = [{"path": str(texts), "language": "kk"}]
    content["data"]["denoise_targets"] = False
    del content["systems"]["random_decoder"], content["finetune"]
    made = run(tmp_path, content, "pretrain")
    assert made.workspace.system("shared", "pretrained", "model.safetensors").exists()
    with pytest.raises(DataError, match="no test examples in kk"):
        evaluation_sets(made.recipe, made.workspace)


def test_outputs_are_written_for_the_split_that_is_asked_for(tmp_path: Path, content: dict[str, Any]) -> None:
    del content["systems"]["random_decoder"], content["finetune"]
    content["evaluate"] |= {"split": "dev", "limit": 5}
    made = run(tmp_path, content, "evaluate")
    written = made.workspace.read_lines(made.workspace.system("shared", "hypotheses.jsonl"))
    every = [source for source, *_ in rows(made, "dev")]
    chosen = [line["source"] for line in written]
    assert len(chosen) == 5 < len(every) and chosen == [source for source in every if source in chosen]

    content["evaluate"]["split"] = "test"
    again = run(tmp_path, content, "evaluate")
    written = again.workspace.read_lines(again.workspace.system("shared", "hypotheses.jsonl"))
    every = [source for source, *_ in rows(made, "test")]
    chosen = [line["source"] for line in written]
    assert len(chosen) == 5 < len(every) and chosen == [source for source in every if source in chosen]
    assert again.keys["pretrain-shared"] == made.keys["pretrain-shared"]


def test_data_prepared_for_one_split_is_checked_for_the_other(tmp_path: Path, content: dict[str, Any]) -> None:
    content["data"]["datasets"][0] |= {"test_percent": 0, "dev_percent": 20}
    content["evaluate"]["split"] = "dev"
    run(tmp_path, content, "prepare")
    content["evaluate"]["split"] = "test"
    with pytest.raises(DataError, match="only 0 test examples"):
        run(tmp_path, content, "prepare")


def test_contrastive_alignment_refuses_pairs_that_are_none(tmp_path: Path, content: dict[str, Any]) -> None:
    content["pretrain"] |= {"objectives": ["translation-span-corruption"]}
    content["pretrain"]["mixture"] = {}
    load(tmp_path, content)
    content["systems"]["shared"]["pretrain"] = {"contrastive": {"weight": 1.0}}
    with pytest.raises(ConfigError, match=r"systems\.shared\.pretrain\.contrastive"):
        load(tmp_path, content)


def test_keys_of_stages_change_only_with_what_they_depend_on(tmp_path: Path, content: dict[str, Any]) -> None:
    recipe = load(tmp_path, content)
    old = recipe.data.model_dump(mode="json")
    for name in ("licence", "train_limit", "dev_limit", "dev_split", "test_split"):
        del old["datasets"][0][name]
    assert recipe.data.identity() == old, "data of settings from before these fields are still good"
    content["data"]["datasets"][0]["licence"] = "CC BY 4.0"
    assert load(tmp_path, content).data.identity() == old
    content["data"]["datasets"][0]["train_limit"] = 7
    assert load(tmp_path, content).data.identity() != old
    assert "split" not in recipe.evaluate.identity() and "compile" not in recipe.evaluate.identity()["decoding"]
    content["evaluate"]["split"] = "dev"
    assert load(tmp_path, content).evaluate.identity()["split"] == "dev"


def test_parallel_files_train_and_test_a_run(tmp_path: Path, content: dict[str, Any]) -> None:
    """Each side counts as a file of the data, and splits of its own are read for development and testing."""
    sides = {}
    for split, count in (("train", 8), ("dev", 3), ("test", 2)):
        for language in ("en", "kk"):
            lines = [f"{split} {language} {number}" for number in range(count)]
            (tmp_path / f"{split}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        sides[split] = f"{tmp_path / split}.en|{tmp_path / split}.kk"
    content["data"]["datasets"] = [
        {"path": sides["train"], "dev": sides["dev"], "test": sides["test"], "fields": {
            "source_language": "en", "target_language": "kk"}},
    ]  # fmt: skip
    made = run(tmp_path, content, "prepare")
    assert [(s, t) for s, t, *_ in rows(made, "test")] == [("test en 0", "test kk 0"), ("test en 1", "test kk 1")]
    assert len(rows(made, "train")) == 8 and len(rows(made, "dev")) == 3
    before = made.keys["prepare"]
    (tmp_path / "train.kk").write_text((tmp_path / "train.kk").read_text().replace("7", "9"))
    assert run(tmp_path, content, "prepare").keys["prepare"] != before


def test_built_in_texts_are_known_by_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint("builtin:localisation?languages=kk")
    assert before[0]["packages"].keys() == {"Babel", "pycountry", "Django"} and not fingerprint("hub:o/n")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "99")
    assert fingerprint("builtin:localisation?languages=kk") != before


def test_decoding_that_cannot_be_is_refused_before_training(tmp_path: Path, content: dict[str, Any]) -> None:
    content["evaluate"]["decoding"] = {"precision": "fp16"}
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="fp16 is not for a CPU"):
            run(tmp_path, content, "report")
    content["evaluate"]["decoding"] = {"coverage_penalty": 0.2}
    content["systems"]["warm"] = {"preset": "warm-start"}
    with pytest.raises(ConfigError, match="warm is decoded by transformers, which has no coverage_penalty"):
        run(tmp_path, content, "report")
    assert not list(tmp_path.rglob("finetuned"))


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.tsv"
    corpus.write_text("one", encoding="utf-8")
    first = fingerprint(str(corpus))
    os.utime(corpus, ns=(1, 1))
    assert fingerprint(str(corpus)) == first == fingerprint(str(tmp_path))
    corpus.write_text("two", encoding="utf-8")
    os.utime(corpus, ns=(2, 2))
    assert fingerprint(str(corpus)) != first


def test_files_of_their_own_hold_their_sources_out_of_training(tmp_path: Path, content: dict[str, Any]) -> None:
    pairs = (tmp_path / "pairs.tsv").read_text(encoding="utf-8").splitlines()
    test = tmp_path / "test.tsv"
    test.write_text("\n".join([pairs[0], *pairs[1:21]]) + "\n", encoding="utf-8")
    content["data"]["datasets"][0]["test"] = str(test)
    made = run(tmp_path, content, "prepare")
    held_out = {source for source, _, _ in rows(made, "test")}
    assert len(held_out) == 20 and not held_out & {source for source, _, _ in rows(made, "train")}


def test_built_in_corpora_are_read_whole_unless_told_otherwise() -> None:
    fields = {"source_language_field": "source_language", "target_language_field": "target_language"}
    path = "builtin:localisation?languages=kk"
    assert DatasetConfig(path=path, fields=fields).split == "all"
    assert DatasetConfig(path=path, fields=fields, split="train").split == "train"
    assert DatasetConfig(path=path, fields=fields, dev=path, test=path).split == "train"
    assert DatasetConfig(path="pairs.tsv", fields=fields).split == "train"
    assert PairsSection(source="pairs", path=path, fields=fields).split == "all"


def test_a_run_folder_that_was_moved_holds_the_same_texts(tmp_path: Path, content: dict[str, Any]) -> None:
    made = run(tmp_path, content, "prepare")
    before = source_fingerprint(PreparedData(made.workspace.data).examples("train"))
    other = source_fingerprint(PreparedData(made.workspace.data).examples("dev"))
    shutil.copytree(made.workspace.data, tmp_path / "moved", ignore=shutil.ignore_patterns("cache"))
    assert source_fingerprint(PreparedData(tmp_path / "moved").examples("train")) == before != other


def test_the_empty_cell_of_a_table_is_no_plain_text(tmp_path: Path, content: dict[str, Any]) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": NaN}\n{"text": "бір"}\n', encoding="utf-8")
    content["data"]["monolingual"] = [{"path": str(texts), "language": "kk"}]
    content["data"]["denoise_targets"] = False
    made = run(tmp_path, content, "prepare")
    assert list(PreparedData(made.workspace.data).texts()["text"]) == ["бір"]
    texts.write_text('{"text": ["a", "b"]}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"texts.jsonl, record 1.*holds a list, not text"):
        run(tmp_path, content, "prepare", output="second")
