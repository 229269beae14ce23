"""What pretraining may train on, and what it has to read, of the data that its tasks are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from enc2gen.errors import ConfigError
from enc2gen.experiments.grid.definition import load_experiment
from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.grid.planning import Planner
from grid_toys import definition, stage, write_definition

FIELDS = {"source": "en", "target": "kk", "source_language": "en", "target_language": "kk"}
STRINGS = {"source_language_field": "source_language", "target_language_field": "target_language"}


def pairs(path: str = "pairs.tsv", **changes: Any) -> dict[str, Any]:
    return {"path": path, "fields": FIELDS, "dev_percent": 5, "test_percent": 10, **changes}


def strings(languages: str, **changes: Any) -> dict[str, Any]:
    path = f"builtin:localisation?languages={languages}"
    return {**pairs(path), "fields": STRINGS, "split": "all", **changes}


def plan(
    tmp_path: Path, before: dict[str, Any], task: dict[str, Any], *, trains: bool = True, **encoder: Any
) -> list[GridRun]:
    """The runs of an experiment whose pretraining reads the data set `before`, its task the data set `task`."""
    content = definition(Path("encoder"), variants={"shared": {} if trains else {"pretraining": False}})
    content["recipe"] = {**content["recipe"], "encoder": {"name": "encoder", **encoder}, "languages": ["kk", "ug"]}
    content["pretraining"] = {"pretrain": stage(), "data": {"datasets": [before]}}
    content["tasks"] = {"short": {"data": {"datasets": [task]}}}
    path = write_definition(tmp_path / "toy.yaml", content)
    return Planner(load_experiment(str(path))[0], tmp_path / "out").runs({})


@pytest.mark.parametrize(
    ("before", "task"),
    [
        (pairs(test_percent=5), pairs()),
        (pairs(), pairs(dev_percent=8)),
        (pairs(test="held-out.tsv"), pairs()),
        (pairs(dev="dev.tsv"), pairs()),
        (pairs("./pairs.tsv", test_percent=5), pairs()),
        (strings("{languages}", test_percent=5), strings("ug,mn")),
        (pairs("held-out.tsv"), pairs(test="held-out.tsv")),
        (pairs("held-out.tsv"), pairs(dev="held-out.tsv")),
        (pairs("c.en | c.kk", test_percent=5), pairs("c.en|c.kk")),
        (pairs("t.kk|t.en"), pairs(test="t.en|t.kk")),
        (pairs("hub:o/n/f.jsonl"), pairs(test="hub:o/n/f.jsonl")),
        (pairs("hub:o/n:kk", split="test"), pairs(test="hub:o/n:kk")),
        (pairs("o/n"), pairs("hub:o/n", dev_percent=8)),
        (pairs(str(Path("pairs.tsv").resolve()), test_percent=5), pairs()),
    ],
)
def test_pretraining_on_what_a_task_holds_out_is_refused(
    tmp_path: Path, before: dict[str, Any], task: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="pretraining trains on") as error:
        plan(tmp_path, before, task)
    said = str(error.value)
    assert "toy: shared" in said and "pretraining: data.datasets[0]" in said
    assert "test_percent" in said or "stages: []" in said
    assert len(plan(tmp_path, {**before, "stages": []}, task)) == 2, "it may be read for the vocabulary"
    assert len(plan(tmp_path, before, task, trains=False)) == 2, "and where nothing is pretrained"


@pytest.mark.parametrize(
    ("before", "task"),
    [
        (pairs(), pairs()),
        (pairs(test_percent=20), pairs()),
        (pairs(dev_percent=10), pairs()),
        (pairs(), pairs(dev_percent=0)),
        (pairs(test="held-out.tsv"), pairs(test="held-out.tsv")),
        (pairs("other.tsv", test_percent=1), pairs()),
        (strings("zh", test_percent=1), strings("kk")),
        (pairs("hub:owner/name", split="train", test_percent=1), pairs("hub:owner/name", split="test")),
        (pairs(test_percent=1), pairs(stages=[])),
    ],
)
def test_pretraining_on_anything_else_is_not(tmp_path: Path, before: dict[str, Any], task: dict[str, Any]) -> None:
    assert len(plan(tmp_path, before, task)) == 2


@pytest.mark.parametrize("text", ["pairs.tsv", "./pairs.tsv", "held-out.tsv"])
def test_what_a_task_holds_out_is_not_denoised(tmp_path: Path, text: str) -> None:
    """Plain text for pretraining is held out by another hash, if at all."""
    content = definition(Path("encoder"), variants={"shared": {}})
    content["recipe"] = {**content["recipe"], "encoder": {"name": "encoder"}}
    content["pretraining"] = {
        "pretrain": stage(),
        "data": {"datasets": [pairs()], "monolingual": [{"path": text, "field": "kk", "language": "kk"}]},
    }
    task = pairs() if "pairs" in text else pairs(test="held-out.tsv", dev_percent=0)
    content["tasks"] = {"short": {"data": {"datasets": [task]}}}
    path = write_definition(tmp_path / "toy.yaml", content)
    with pytest.raises(ConfigError, match=r"data\.monolingual\[0\][\s\S]*denoise_targets"):
        Planner(load_experiment(str(path))[0], tmp_path / "out").runs({})
    content["pretraining"]["data"]["monolingual"][0]["path"] = "other.txt"
    content["pretraining"]["data"]["datasets"] = [{**task}]
    path = write_definition(tmp_path / "toy.yaml", content)
    assert Planner(load_experiment(str(path))[0], tmp_path / "out").runs({})


@pytest.mark.parametrize("encoder", [{"trim_vocabulary": True}, {"extend_vocabulary": {"size": 10}}])
def test_a_vocabulary_is_made_of_the_texts_of_all_tasks(tmp_path: Path, encoder: dict[str, Any]) -> None:
    for trains in (True, False):
        with pytest.raises(ConfigError, match=r"other\.tsv \(data\.datasets\[0\] of the task\)") as error:
            plan(tmp_path, pairs(), pairs("other.tsv"), trains=trains, **encoder)
        assert "toy: shared" in str(error.value) and "list it there with `stages: []`" in str(error.value)
    with pytest.raises(ConfigError, match="languages=kk,mn"):
        plan(tmp_path, strings("{languages}"), strings("kk,mn"), **encoder)
    assert plan(tmp_path, strings("{languages}"), strings("ug"), **encoder)
    assert plan(tmp_path, pairs("other.tsv", stages=[]), pairs("other.tsv"), **encoder)
    assert plan(tmp_path, pairs(), pairs("other.tsv")), "the encoder's own vocabulary knows all texts"
