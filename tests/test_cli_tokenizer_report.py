"""`enc2gen tokenizer-report` as a user calls it."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from enc2gen.cli.tokenizer_report import corpus_texts, register
from enc2gen.errors import ConfigError, DataError, LanguageError, ModelError
from test_coverage import unigram, word_level

Call = Callable[..., str]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command; return what it wrote to standard output."""
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: Any, stdin: bytes = b"") -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        app(["tokenizer-report", *map(str, arguments)], standalone_mode=False)
        return capsys.readouterr().out

    return call


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    word_level().save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl.gz"
    records = [
        {"text": "the cat", "language": "en", "title": "sat"},
        {"text": "the dog ran", "language": "eng", "title": "sat"},
        {"text": "не\nне", "language": "ru", "title": None},
    ]
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    return path


def test_json(report: Call, tokenizer_folder: Path, corpus: Path) -> None:
    content = json.loads(report(tokenizer_folder, "--corpus", corpus, "--json"))
    assert content["tokenizer"] == str(tokenizer_folder) and content["corpus"] == [str(corpus)]
    assert content["unknown_rate"] == pytest.approx(6 / 19)
    assert content["fertility"] == 1.0 and content["round_trip_exact"] == 0.75
    assert content["languages"].keys() == {"en", "ru"}
    assert content["languages"]["en"]["unknown_rate"] == pytest.approx(6 / 15)
    assert content["languages"]["ru"]["lines"] == 2  # a line break separates lines


def test_comparison(report: Call, tokenizer_folder: Path, corpus: Path, tmp_path: Path) -> None:
    """The tokenizer named first is the one at issue; the other is what it was before."""
    unigram("thecatdogrnsне").save_pretrained(tmp_path / "letters")
    arguments = (tmp_path / "letters", "--corpus", corpus, "--compare", tokenizer_folder)
    content = json.loads(report(*arguments, "--json"))
    assert content["before"]["unknown_rate"] == pytest.approx(6 / 19)
    assert content["after"]["unknown_rate"] == 0 and content["after"]["fertility"] > 1
    text = report(*arguments)
    assert "before" in text and "after" in text and str(tmp_path / "letters") in text


def test_table_has_80_columns_and_advice(report: Call, tokenizer_folder: Path, corpus: Path) -> None:
    text = report(tokenizer_folder, "--corpus", corpus)
    commands = [line for line in text.splitlines() if "enc2gen vocab extend" in line]
    others = [line for line in text.splitlines() if line not in commands and str(tokenizer_folder) not in line]
    assert max(map(len, others)) <= 80
    assert len(commands) == 1 and f"--corpus {corpus}" in commands[0]
    assert "English en: unreadable" in text and "Russian ru: fine" in text
    assert "LATIN SMALL LETTER" in text and "40.0 %" in text


def test_language_options(report: Call, tokenizer_folder: Path, corpus: Path, tmp_path: Path) -> None:
    def rows(*options: str) -> set[str]:
        content = json.loads(report(tokenizer_folder, "--corpus", corpus, "--json", *options))
        return set(content["languages"])

    assert rows("--lang", "KK") == {"kk", "kk-Latn"}
    assert rows("--language-field", "language") == {"en", "ru"}
    assert rows("--limit", "1") == {"en"}
    assert rows("--field", "title", "--lang", "en") == {"en"}
    with pytest.raises(LanguageError, match="record 1"):
        rows("--language-field", "text")
    with pytest.raises(ConfigError, match="exclude"):
        rows("--lang", "kk", "--language-field", "language")


def test_other_sources(report: Call, tokenizer_folder: Path, corpus: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("the cat\n\nthe cat\n", encoding="utf-8")
    given = report(
        tokenizer_folder, "--corpus", "-", "--json", "--lang", "en", stdin="the cat\r\nthe\u2028dog".encode()
    )
    assert json.loads(given)["lines"] == 2 and json.loads(given)["unknown_rate"] == pytest.approx(3 / 12)
    both = json.loads(report(tokenizer_folder, "--corpus", plain, "--corpus", corpus, "--json"))
    assert both["lines"] == 6 and both["corpus"] == [str(plain), str(corpus)]
    prepared = tmp_path / "prepared"
    for part in ("train", "test"):
        (prepared / part).mkdir(parents=True)
        (prepared / part / "part.txt").write_text("the cat\n" * (1 if part == "train" else 5), encoding="utf-8")
    (prepared / "manifest.json").write_text("{}", encoding="utf-8")
    assert json.loads(report(tokenizer_folder, "--corpus", prepared, "--json"))["lines"] == 1


def test_tokenizer_json_file(report: Call, corpus: Path, tmp_path: Path) -> None:
    for name, tokenizer in (("words", word_level()), ("letters", unigram("thecat"))):
        file = tmp_path / f"{name}.json"
        tokenizer.backend_tokenizer.save(str(file))
        content = json.loads(report(file, "--corpus", corpus, "--json"))
        assert content["tokenizer"] == str(file)
        assert content["languages"]["ru"]["unknown_rate"] == (0 if name == "words" else 1)


def test_errors(report: Call, tokenizer_folder: Path, corpus: Path, tmp_path: Path) -> None:
    empty, blank, latin = tmp_path / "empty.jsonl", tmp_path / "blank.jsonl", tmp_path / "latin.json"
    empty.touch()
    blank.write_text('{"text": " "}\n{"text": null}\n', encoding="utf-8")
    latin.write_text('{"model": 3}', encoding="utf-8")
    cases: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (DataError, "no such file", (tokenizer_folder, "--corpus", tmp_path / "absent.txt")),
        (DataError, "no records|is empty", (tokenizer_folder, "--corpus", empty)),
        (DataError, "no text to measure", (tokenizer_folder, "--corpus", blank)),
        (DataError, r"no field 'sentence'(.|\n)*text, language, title",
         (tokenizer_folder, "--corpus", corpus, "--field", "sentence")),
        (ModelError, "no tokenizer", (tmp_path / "absent", "--corpus", corpus)),
        (ModelError, "tokenizer.json of a fast", (latin, "--corpus", corpus)),
        (LanguageError, "unknown language", (tokenizer_folder, "--corpus", corpus, "--lang", "Tibetann")),
        (ConfigError, "language identifier", (tokenizer_folder, "--corpus", corpus, "--language-identifier", "x")),
        (ConfigError, "once", (tokenizer_folder, "--corpus", "-", "--corpus", "-")),
    ]  # fmt: skip
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            report(*arguments)
    with pytest.raises(DataError, match="standard input, line 2"):
        report(tokenizer_folder, "--corpus", "-", stdin=b"the\n\xff\n")
    with pytest.raises(DataError, match="no text"):
        report(tokenizer_folder, "--corpus", "-")


def test_half_a_character_is_named_with_its_record(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n{"text": "bad \\ud83d emoji"}\n')
    with pytest.raises(DataError, match=r"broken\.jsonl, record 2"):
        list(corpus_texts(str(tmp_path / "broken.jsonl"), language="en"))
