"""The command line, as a user types it."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from enc2gen import SwcmForConditionalGeneration
from enc2gen.cli import main as command
from enc2gen.cli.generate import check_apart, write_output
from enc2gen.cli.main import app
from enc2gen.errors import ConfigError
from test_run import recipe_content, write_pairs

VERBS = ["run", "prepare", "adapt", "build", "pretrain", "finetune", "evaluate", "report", "generate", "doctor"]


@dataclass
class Result:
    returncode: int
    stdout: bytes
    stderr: bytes


@pytest.fixture
def enc2gen(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Callable[..., Result]:
    """Call the command as a shell would, in this process (a new one would spend its time importing)."""

    def call(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["enc2gen", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setattr(command, "console", Console(width=100, file=sys.stdout))
        monkeypatch.setattr(command, "errors", Console(width=100, file=sys.stderr))
        capfdbinary.readouterr()
        with pytest.raises(SystemExit) as caught:
            command.main()
        sys.stdout.flush()
        output = capfdbinary.readouterr()
        return Result(int(caught.value.code or 0), output.out, output.err)

    return call


def test_large_tensors_get_huge_pages_unless_the_user_says_otherwise(
    enc2gen: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    enc2gen("--version")
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    enc2gen("--version")
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_the_installed_command_runs_as_a_process(tmp_path: Path) -> None:
    environment = os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "enc2gen.cli.main", "generate", str(tmp_path / "no" / "such" / "model"), "--to", "kk"],
        input=b"abc\n", capture_output=True, env=environment, timeout=120,
    )  # fmt: skip
    text = result.stderr.decode()
    assert result.returncode == 1 and "no such model folder" in text and "Traceback" not in text


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


def test_generate_writes_one_line_per_line(enc2gen: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    result = enc2gen("generate", str(model), "--to", "kk", "--from", "en", stdin=b"abc\n\ndef\r\n")
    assert result.returncode == 0, result.stderr.decode()
    lines = result.stdout.decode().split("\n")
    assert len(lines) == 4 and lines[1] == "" and lines[3] == ""
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("abc\n\ndef", encoding="utf-8")
    assert (
        enc2gen("generate", str(model), "--to", "kk", "--from", "en", "-i", str(source), "-o", str(target)).returncode
        == 0
    )
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
        (["--to", "kk", "-i", "/"], b"", "/: cannot read: Is a directory remedy: give a text file"),
    ],
)
def test_generate_errors_are_one_message_and_a_status(
    enc2gen: Callable[..., Result], model: Path, arguments: list[str], stdin: bytes, message: str
) -> None:
    result = enc2gen("generate", str(model), *arguments, stdin=stdin)
    text = " ".join(result.stderr.decode().split())
    assert result.returncode == 1 and message in text and "Traceback" not in text and result.stdout == b""


@pytest.mark.parametrize(
    "command_line",
    [
        "generate nowhere --to kk -i {file} -o {file}",
        "generate nowhere --to kk -i {file} -o {link}",
        "generate nowhere --to kk -i {link} -o {file}",
        "generate nowhere --to kk --glossary {file} -o {file}",
        "shortlist nowhere --text kk={file} -o {file}",
    ],
)
def test_no_command_writes_over_what_it_reads(
    enc2gen: Callable[..., Result], tmp_path: Path, command_line: str
) -> None:
    file, link = tmp_path / "in.txt", tmp_path / "link.txt"
    file.write_text("cat\tcat\n")
    link.symlink_to(file)
    result = enc2gen(*command_line.format(file=file, link=link).split(), stdin=b"abc\n")
    assert result.returncode == 1 and b"this file is read" in result.stderr and b"another file" in result.stderr
    assert file.read_text() == "cat\tcat\n" and link.is_symlink()


def test_standard_input_may_be_the_file_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other = tmp_path / "in.txt", tmp_path / "out.txt"
    file.write_text("abc\n")
    other.write_text("abc\n")
    with file.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        check_apart(other, "-", None, file)
        check_apart(tmp_path / "new.txt", tmp_path)
        check_apart(None, file)
        with pytest.raises(ConfigError, match="this file is read"):
            check_apart(file, "-")


def test_ctrl_c_of_generate_says_what_is_kept(
    enc2gen: Callable[..., Result], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("enc2gen.cli.generate.write_here", interrupted)
    monkeypatch.setattr("enc2gen.cli.generate.generate_to_file", interrupted)
    result = enc2gen("generate", str(model), "--to", "kk", "--from", "en", stdin=b"abc\n")
    assert result.returncode == 130 and result.stderr.decode().strip() == "interrupted"
    result = enc2gen("generate", str(model), "--to", "kk", "-o", str(tmp_path / "out"), stdin=b"abc\n")
    text = " ".join(result.stderr.decode().split())
    assert result.returncode == 130 and "finished lines are kept" in text and "Go on with the same command" in text
    monkeypatch.setattr(command, "_load", interrupted)
    text = enc2gen("prepare", str(tmp_path / "recipe.yaml")).stderr.decode()
    assert "interrupted; finished stages are kept" in text and f"prepare {tmp_path}" in text.replace("\n", "")


def test_run_and_dry_run(enc2gen: Callable[..., Result], tmp_path: Path, encoder_folder: Path) -> None:
    write_pairs(tmp_path / "pairs.tsv")
    content = recipe_content(tmp_path, encoder_folder)
    del content["systems"]["random_decoder"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    early = enc2gen("run", str(path), "--dry-run", "--set", "data.datasets.0.path=later.tsv")
    assert early.returncode == 0 and b"# Not there yet: later.tsv\n" in early.stdout
    plan = enc2gen("run", str(path), "--dry-run")
    assert b"Not there" not in plan.stdout
    assert plan.returncode == 0 and b"pretrain shared: 6 steps" in plan.stdout and not (tmp_path / "run").exists()
    assert yaml.safe_load(plan.stdout)["finetune"]["training"]["max_steps"] == 6
    result = enc2gen("run", str(path), "--set", "pretrain.training.max_steps=2")
    assert result.returncode == 0, result.stderr.decode()
    assert (tmp_path / "run" / "metrics.json").exists() and (tmp_path / "run" / "model" / "tokenizer.json").exists()
    assert b"Traceback" not in result.stderr


def bridge_content() -> dict[str, Any]:
    training = {"max_steps": 1, "learning_rate": 1e-3}
    stages = [{"name": "task", "data": [{"source": "task"}], "training": training}]
    content = {"kind": "bridge", "name": "x", "encoder": {"name": "e"}, "llm": {"name": "l"}, "bridges": {"b": {}}}
    return content | {"stages": stages, "task": {"name": "name-kinds", "train_languages": ["en"]}}


@pytest.mark.parametrize("kind", ["systems", "bridge"])
@pytest.mark.parametrize("folder", ["runs/try #2", "null", "2024", "[a]: b", "қаз 😀", "wide  " * 30 + "name"])
def test_output_is_a_path_to_the_letter(
    enc2gen: Callable[..., Result], tmp_path: Path, encoder_folder: Path, kind: str, folder: str
) -> None:
    content = recipe_content(tmp_path, encoder_folder) if kind == "systems" else bridge_content()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    plan = enc2gen("run", str(tmp_path / "recipe.yaml"), "--dry-run", "--output", folder)
    assert plan.returncode == 0, plan.stderr.decode()
    assert yaml.safe_load(plan.stdout)["output"] == folder


@pytest.mark.parametrize("kind", ["systems", "bridge"])
def test_a_terminal_without_the_characters_gets_messages_with_escapes_and_whole_data(
    tmp_path: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    content = recipe_content(tmp_path, encoder_folder) if kind == "systems" else bridge_content()
    path = tmp_path / "བོད.yaml"
    path.write_text(yaml.safe_dump(content | {"description": "བོད"}, sort_keys=False), encoding="utf-8")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(command, "console", Console(file=sys.stdout))
    monkeypatch.setattr(sys, "argv", ["enc2gen", "run", str(path), "--dry-run"])
    with pytest.raises(SystemExit) as caught:
        command.main()
    sys.stdout.flush()
    plan = raw.getvalue().decode("ascii")
    assert caught.value.code == 0 and r"\u0f56" in plan
    assert yaml.safe_load(plan)["description"] == "བོད"
    write_output("བོད\n", None)
    assert raw.getvalue().endswith("\nབོད\n".encode())


def test_bad_recipe_lists_problems_and_fails(enc2gen: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nlanuages: [kk]\n")
    result = enc2gen("run", str(path))
    text = result.stderr.decode()
    assert result.returncode == 1 and "did you mean 'languages'" in text and "data: Field required" in text


def test_misspelt_option_is_a_usage_error(enc2gen: Callable[..., Result]) -> None:
    result = enc2gen("generate", "model", "--two", "kk")
    assert result.returncode == 2 and "No such option" in result.stderr.decode()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, encoder_folder: Path) -> None:
    write_pairs(tmp_path / "pairs.tsv")
    content = recipe_content(tmp_path, encoder_folder)
    del content["systems"]["random_decoder"], content["pretrain"]
    content["finetune"]["training"] |= {
        "max_steps": 100_000,
        "eval_every": 100_000,
        "save_every": 100_000,
        "log_every": 1,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "enc2gen.cli.main", "run", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    folder = tmp_path / "run" / "systems" / "shared" / "finetune"
    deadline = time.monotonic() + 120
    while not ((folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    text = error.decode()
    assert process.returncode == 130 and "everything is saved" in text and f"run {path}" in text.replace("\n", "")
    assert list((folder / "checkpoints").glob("step-*")) and "Traceback" not in text
