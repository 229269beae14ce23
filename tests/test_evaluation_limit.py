"""`evaluate.limit` draws test examples: what it leaves of a small source language, and what the controls make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from enc2gen.data.held_out import limit_rank
from enc2gen.errors import DataError
from enc2gen.experiments import evaluate, findings
from enc2gen.experiments.recipe import load_recipe
from enc2gen.experiments.run import Run
from test_run import recipe_content, write_pairs

DRAWN = ["en", "ru", "en", "en", "ru", "ru", "en"]
"""Source languages of the test examples, in the order in which a limit draws them."""


@pytest.fixture
def content(tmp_path: Path, encoder_folder: Path) -> dict[str, Any]:
    """A recipe with two source languages."""
    pairs = write_pairs(tmp_path / "pairs.tsv").read_text(encoding="utf-8").splitlines()
    made = recipe_content(tmp_path, encoder_folder)
    del made["systems"]["random_decoder"]
    made["data"]["datasets"] = []
    lines = sorted(pairs[101 : 101 + len(DRAWN)], key=lambda line: limit_rank(line.split("\t")[0]))
    for language in ("en", "ru"):
        test = tmp_path / f"test.{language}.tsv"
        own = [line for line, spoken in zip(lines, DRAWN, strict=True) if spoken == language]
        test.write_text("\n".join([pairs[0], *own]) + "\n", encoding="utf-8")
        fields = {"source": "en", "target": "kk", "source_language": language, "target_language": "kk"}
        made["data"]["datasets"].append(
            {"path": str(tmp_path / "pairs.tsv"), "test": str(test), "dev_percent": 10, "fields": fields}
        )
    return made


def run(tmp_path: Path, content: dict[str, Any], stage: str) -> Run:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    made = Run(load_recipe(tmp_path / "recipe.yaml"), Console(quiet=True))
    made.run([stage])
    return made


def test_a_language_of_which_one_example_is_drawn_is_left_out_of_the_losses(
    tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content["evaluate"]["limit"] = 4
    made = run(tmp_path, content, "build")
    monkeypatch.setattr(evaluate, "final_folder", lambda *_: made.workspace.system("shared", "initial"))
    evaluate.evaluate_system(made.recipe, made.workspace, "shared", lambda *_: None)
    use = made.workspace.read_json(made.workspace.system("shared", "scores.json"))["source_use"]["kk"]
    assert (use["outputs"], use["left_out"]) == (4, 1) and use["loss"] > 0 and use["shuffled_loss"] > 0
    assert use["loss"] != use["shuffled_loss"]
    file = made.workspace.system("shared", "hypotheses.jsonl")
    written = file.read_bytes()
    assert written.count(b"\n") == 4

    # What fails after writing, or is stopped there, costs no outputs.
    file.unlink()
    monkeypatch.setattr(evaluate, "source_losses", lambda *_: (_ for _ in ()).throw(DataError("no control")))
    with pytest.raises(DataError, match="no control"):
        evaluate.evaluate_system(made.recipe, made.workspace, "shared", lambda *_: None)
    assert file.read_bytes() == written


def test_a_limit_that_leaves_no_control_is_refused_before_training(tmp_path: Path, content: dict[str, Any]) -> None:
    content["evaluate"]["limit"] = 2
    with pytest.raises(DataError, match=r"evaluate\.limit: of 2 test examples.*'kk'[\s\S]*raise it"):
        run(tmp_path, content, "prepare")
    content["evaluate"]["limit"] = 3
    run(tmp_path, content, "prepare")


def test_what_the_losses_leave_out_is_said() -> None:
    metrics = {"source_use": {"a": {"kk": {"left_out": 1200}, "ug": {"left_out": 0}}, "b": {"kk": {}}}}
    assert findings.left_out_of_losses(metrics, ["kk", "ug", "mn"]) == [
        "Losses in Kazakh are without 1,200 examples: no other source of their language can be given to them."
    ]
    assert findings.left_out_of_losses({}, ["kk"]) == []
