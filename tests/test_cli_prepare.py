"""`enc2gen prepare`: its two uses, what it prints, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from enc2gen.cli.prepare import cleaning_config, register
from enc2gen.corpora.readers import read_records
from enc2gen.errors import ConfigError, Enc2genError

SENTENCES = [f"Қазақстан Республикасының {number} қаласында ауа райы бүгін өте жақсы болды." for number in range(30)]


@pytest.fixture
def calls() -> list[tuple[Any, ...]]:
    return []


@pytest.fixture
def app(calls: list[tuple[Any, ...]]) -> typer.Typer:
    application = typer.Typer(rich_markup_mode="rich")
    register(application, lambda *arguments: calls.append(arguments))
    application.command("other")(lambda: None)
    return application


def _run(app: typer.Typer, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["prepare", *arguments], env={"COLUMNS": "80", "TERM": "dumb"})


def _error(app: typer.Typer, *arguments: str) -> str:
    result = _run(app, *arguments)
    assert isinstance(result.exception, Enc2genError), result.output
    return str(result.exception)


def _corpus(folder: Path) -> Path:
    path = folder / "corpus.txt"
    path.write_text("\n\n".join([*SENTENCES, "Это предложение написано на русском языке, не на казахском."]) + "\n")
    return path


def test_a_corpus_is_cleaned_with_one_command(app: typer.Typer, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--lang", "KK", "--duplicates", "none", "--test-percent", "30", "--seed", "3", "--workers", "1"]
    result = _run(app, str(_corpus(tmp_path)), "-o", str(output), *options, "--explain")
    assert result.exit_code == 0, result.output
    assert "30 of 61 lines kept" in result.output and "wrong-language" in result.output
    assert f"Corpus in {output}" in result.output and "dropped" in result.output
    kept = [record["text"] for split in ("train", "dev", "test") if (output / split).exists()
            for record in read_records(output / split)]  # fmt: skip
    assert sorted(kept) == sorted(SENTENCES)
    assert json.loads((output / "manifest.json").read_text())["config"]["language"] == "kk"
    dropped = [json.loads(line) for line in (output / "dropped" / "wrong-language.jsonl").open()]
    assert [entry["line"] for entry in dropped] == [61]
    again = _run(app, str(_corpus(tmp_path)), "-o", str(tmp_path / "b"), *options, "-s", "min_length=1000")
    assert "too-short" in str(again.exception) and not (tmp_path / "b").exists()


def test_a_recipe_goes_to_its_own_function(app: typer.Typer, calls: list[tuple[Any, ...]]) -> None:
    assert _run(app, "recipe.yaml").exit_code == 0
    options = ["-l", "kk,ug", "-s", "a.b=1", "-o", "runs/x", "--seed", "3", "--overwrite"]
    assert _run(app, "recipe.YML", *options).exit_code == 0
    assert calls == [
        (Path("recipe.yaml"), None, None, None, None, False),
        (Path("recipe.YML"), "kk,ug", ["a.b=1"], Path("runs/x"), 3, True),
    ]
    assert "--lang is for cleaning a corpus" in _error(app, "recipe.yaml", "--lang", "kk")
    assert "--explain is for cleaning a corpus" in _error(app, "recipe.yaml", "--explain")
    assert len(calls) == 2


def test_help_shows_both_uses(app: typer.Typer) -> None:
    output = _run(app, "--help").output
    assert "enc2gen prepare corpus/ --lang bo --output bo-clean" in output
    assert "enc2gen prepare recipe.yaml" in output


def test_help_says_the_defaults_and_loses_no_brackets(app: typer.Typer) -> None:
    output = " ".join(_run(app, "--help").output.replace("│", " ").split())
    assert "extra ray" in output
    assert "Documents for dev, in percent; else 2." in output and "Documents for test, in percent; else 2." in output


def test_packed_files_that_were_left_out_are_named(app: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    _corpus(tmp_path / "src")
    (tmp_path / "src" / "more.txt.zst").write_bytes(b"x")
    result = _run(app, str(tmp_path / "src"), "--lang", "kk", "-o", str(tmp_path / "out"), "--workers", "1")
    assert result.exit_code == 0, result.output
    assert "1 packed file" in result.output and "more.txt.zst" in result.output.replace("\n", "")


def test_errors_say_what_to_do(app: typer.Typer, tmp_path: Path) -> None:
    corpus = str(_corpus(tmp_path))
    assert "add --lang" in _error(app, corpus, "-o", "x")
    assert "add --output" in _error(app, corpus, "--lang", "kk")
    assert "did you mean 'kk'" in _error(app, corpus, "--lang", "Kazakh", "-o", "x")
    assert "--languages is for recipes" in _error(app, corpus, "--languages", "kk", "-o", "x")
    assert "no such file" in _error(app, str(tmp_path / "gone.txt"), "--lang", "kk", "-o", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_settings_reach_the_configuration_and_all_errors_are_named() -> None:
    given = {"language": "bo", "seed": None}
    config = cleaning_config(given, {"field": "body"}, ["near_duplicates.threshold=0.9", "reading.split=test"])
    assert (config.near_duplicates.threshold, config.reading.split, config.reading.field) == (0.9, "test", "body")
    assert config.seed == 0
    with pytest.raises(ConfigError, match=r"(?s)min_length.*colour"):
        cleaning_config(given, {}, ["min_length=0", "colour=red"])
    with pytest.raises(ConfigError, match="is no setting"):
        cleaning_config(given, {}, ["min_length"])
    with pytest.raises(ConfigError, match="is no setting"):
        cleaning_config(given, {}, ["language.x=1"])
    with pytest.raises(ConfigError, match=r"(?s)--set min_length.*'\[' is no value"):
        cleaning_config(given, {}, ["min_length=["])
    with pytest.raises(ConfigError, match="klingon"):
        cleaning_config(given, {"encoding": "klingon"}, [])
