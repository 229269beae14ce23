"""The command line, as a user types it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_run import recipe_content, write_pairs
from typer.testing import CliRunner

from enc2gen import SwcmForConditionalGeneration
from enc2gen.cli.main import app

VERBS = ["run", "prepare", "build", "pretrain", "finetune", "evaluate", "report", "generate", "doctor"]


def enc2gen(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "enc2gen.cli.main", *arguments], input=stdin, capture_output=True, env=environment, timeout=120
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == 0 and "--help" in re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def test_all_verbs_are_listed() -> None:
    output = CliRunner().invoke(app, ["--help"]).output
    assert all(verb in output for verb in VERBS)


@pytest.fixture
def model(encoder_folder: Path, tmp_path: Path) -> Path:
    grown = SwcmForConditionalGeneration.from_encoder(encoder_folder, languages=["en", "kk"], verbose=False)
    grown.generation_config.max_new_tokens = 6
    grown.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_generate_writes_one_line_per_line(model: Path, tmp_path: Path) -> None:
    result = enc2gen("generate", str(model), "--to", "kk", "--from", "en", stdin="abc\n\ndef\r\n".encode())
    assert result.returncode == 0, result.stderr.decode()
    lines = result.stdout.decode().split("\n")
    assert len(lines) == 4 and lines[1] == "" and lines[3] == ""
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("abc\n\ndef", encoding="utf-8")
    assert enc2gen("generate", str(model), "--to", "kk", "--from", "en", "-i", str(source), "-o", str(target)).returncode == 0
    assert target.read_text(encoding="utf-8") == result.stdout.decode()


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["--to", "bo"], b"abc\n", "does not know language 'bo'"),
        (["--to", "xxxxxxxxx"], b"abc\n", "xxxxxxxxx"),
        ([], b"abc\n", "no target language"),
        (["--to", "kk"], b"", "standard input: there is no text"),
        (["--to", "kk"], b"abc\n\xff\xfe\n", "standard input, line 2: byte 4 is not UTF-8"),
        (["--to", "kk", "-i", "nowhere.txt"], b"", "nowhere.txt: there is no such file"),
    ],
)
def test_generate_errors_are_one_message_and_a_status(model: Path, arguments: list[str], stdin: bytes, message: str) -> None:
    result = enc2gen("generate", str(model), *arguments, stdin=stdin)
    text = " ".join(result.stderr.decode().split())
    assert result.returncode == 1 and message in text and "Traceback" not in text and result.stdout == b""


def test_run_and_dry_run(tmp_path: Path, encoder_folder: Path) -> None:
    write_pairs(tmp_path / "pairs.tsv")
    content = recipe_content(tmp_path, encoder_folder)
    del content["systems"]["random_decoder"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    plan = enc2gen("run", str(path), "--dry-run")
    assert plan.returncode == 0 and b"pretrain shared: 6 steps" in plan.stdout and not (tmp_path / "run").exists()
    assert yaml.safe_load(plan.stdout)["finetune"]["training"]["max_steps"] == 6
    result = enc2gen("run", str(path), "--set", "pretrain.training.max_steps=2")
    assert result.returncode == 0, result.stderr.decode()
    assert (tmp_path / "run" / "metrics.json").exists() and (tmp_path / "run" / "model" / "tokenizer.json").exists()
    assert b"Traceback" not in result.stderr


def test_bad_recipe_lists_problems_and_fails(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nlanuages: [kk]\n")
    result = enc2gen("run", str(path))
    text = result.stderr.decode()
    assert result.returncode == 1 and "did you mean 'languages'" in text and "data: Field required" in text


def test_misspelt_option_is_a_usage_error() -> None:
    result = enc2gen("generate", "model", "--two", "kk")
    assert result.returncode == 2 and "No such option" in result.stderr.decode()
