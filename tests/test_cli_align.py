"""`enc2gen align` as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import typer

from enc2gen.cli import align as command
from enc2gen.cli.align import expectation, register
from enc2gen.errors import ConfigError, DataError, ModelError, OutputError
from enc2gen.experiments.bridge import figures

Call = Callable[..., str]
SENTENCES = ["a b c", "de f", "g hi jk", "l m", "nop q"]


@pytest.fixture
def align(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command; return what it wrote to standard output."""
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: Any) -> str:
        capsys.readouterr()
        app(["align", *map(str, arguments)], standalone_mode=False)
        return capsys.readouterr().out

    return call


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = {"en": SENTENCES, "kk": SENTENCES, "ug": SENTENCES[::-1], "bo": ["ཀ" * (i + 1) for i in range(5)]}
    (tmp_path / "corpus").mkdir()
    for name, texts in rows.items():
        lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)]
        (tmp_path / "corpus" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "corpus"


def test_table_and_reading(align: Call, encoder_folder: Path, corpus: Path) -> None:
    out = align(encoder_folder, "--corpus", corpus)
    lines = out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    names = [line.split()[0] for line in lines if line.startswith(("Kazakh", "Uyghur", "Tibetan"))]
    assert names[0] == "Kazakh" and len(names) == 3
    assert "close" in next(line for line in lines if line.startswith("Kazakh"))
    assert "unread" in next(line for line in lines if line.startswith("Tibetan"))
    flat = " ".join(out.split())
    assert "nearly whole to 1 of 3 languages" in flat and "it predicts no accuracy" in flat
    assert "does not know the letters of bo" in flat and "By chance 11.1" in flat


def test_json_and_picture(align: Call, encoder_folder: Path, corpus: Path, tmp_path: Path) -> None:
    options = ("--languages", "kk,ug", "--limit", 3, "--template", "a {text}", "--picture", tmp_path / "p.png")
    content = json.loads(align(encoder_folder, "-c", corpus, *options, "--json"))
    assert (content["english"], content["sentences"], content["available"]) == ("en", 3, 5)
    assert content["template"] == "a {text}" and content["num_layers"] == 4
    first = content["languages"][0]
    assert (first["language"], first["expect"], first["layers"]) == ("kk", "close", [100.0] * 5)
    assert (tmp_path / "p.png").exists() and (tmp_path / "p.svg").exists()


def test_a_picture_that_cannot_be_written_costs_no_measurement(
    align: Call, encoder_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "p.svg").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(command, "_measure", lambda *_: pytest.fail("measured before the picture was found impossible"))
        for picture in ("file/p.png", "file/deep/p.png", "p.png"):
            with pytest.raises(OutputError, match=r"not a folder|Is a directory"):
                align(encoder_folder, "-c", corpus, "--picture", tmp_path / picture)
    (tmp_path / "p.svg").rmdir()
    assert not list(tmp_path.glob("p.*"))
    align(encoder_folder, "-c", corpus, "--limit", 3, "--picture", tmp_path / "new" / "folder" / "p.png")
    assert (tmp_path / "new" / "folder" / "p.svg").exists()

    def full(*_: object) -> None:
        raise OutputError("no space")

    monkeypatch.setattr(figures, "save_figure", full)
    out: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text: out.append(text))
    with pytest.raises(OutputError, match="no space"):
        align(encoder_folder, "-c", corpus, "--limit", 3, "--picture", tmp_path / "p.png", "--json")
    assert json.loads(out[0])["sentences"] == 3


@pytest.mark.parametrize(
    ("mean", "unknown", "expected"),
    [(60, 0, "close"), (59.9, 0, "partial"), (30, 9.9, "partial"), (29.9, 0, "weak"), (99, 10, "unread")],
)
def test_expectation(mean: float, unknown: float, expected: str) -> None:
    assert expectation(mean, unknown) == expected


def test_bad_input(align: Call, encoder_folder: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown pooling 'max'"):
        align(encoder_folder, "-c", corpus, "--pooling", "max")
    with pytest.raises(ConfigError, match="gif"):
        align(encoder_folder, "-c", corpus, "--picture", "x.gif")
    with pytest.raises(DataError, match="no language 'fr'"):
        align(encoder_folder, "-c", corpus, "-l", "fr")
    with pytest.raises(ModelError):
        align(tmp_path / "nowhere", "-c", corpus)
    with pytest.raises(Exception, match=r"not in the range|greater than or equal to 0"):
        align(tmp_path / "nowhere", "-c", corpus, "--seed", "-1")


def test_no_progress_of_transformers_is_shown(align: Call, encoder_folder: Path, corpus: Path) -> None:
    transformers.logging.enable_progress_bar()
    align(encoder_folder, "--corpus", corpus)
    assert not transformers.logging.is_progress_bar_enabled()
