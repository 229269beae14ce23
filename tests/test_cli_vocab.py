"""`enc2gen vocab trim|extend`, as a user types it."""
# ruff: noqa: F811 fixtures have the names of what is imported

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from enc2gen.cli.model_folder import read_pairs, read_texts
from enc2gen.encoders.loading import load_encoder, load_tokenizer
from enc2gen.errors import DataError
from enc2gen.models.surgery import load_for_surgery
from enc2gen.tokenization.coverage import coverage
from test_cli import Result, enc2gen  # noqa: F401
from test_surgery import TEXTS, TIBETAN, masked_model


@pytest.fixture
def files(tmp_path: Path) -> Path:
    model, tokenizer = masked_model("xlm-roberta")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "bo.txt").write_text("\n".join(TIBETAN), encoding="utf-8")
    return tmp_path


def test_trim(enc2gen: Callable[..., Result], files: Path) -> None:
    model, out = files / "model", files / "small"
    result = enc2gen("vocab", "trim", str(model), "--corpus", str(files / "text.txt"), "--out", str(out))
    assert result.returncode == 0, result.stderr.decode()
    text = result.stdout.decode()
    assert "vocabulary rows" in text and "Coverage of the corpus" in text and max(map(len, text.splitlines())) <= 100
    assert "come back changed" not in text or "--keep-characters" not in text  # trimming cannot keep any
    record = json.loads((out / "vocabulary.json").read_text(encoding="utf-8"))
    (big, tokenizer), (small, trimmed) = load_for_surgery(model), load_for_surgery(out)
    assert record["operation"] == "trim" and record["sizes"]["after"]["rows"] == len(trimmed) < len(tokenizer)
    rows = big.get_input_embeddings().weight
    assert torch.equal(small.get_input_embeddings().weight, rows[record["origins"]])
    assert record["sizes"]["before"]["parameters"] == sum(p.numel() for p in big.parameters())
    assert record["coverage"]["before"]["tokens"] == record["coverage"]["after"]["tokens"]


def test_extend(enc2gen: Callable[..., Result], files: Path) -> None:
    model, out, corpus = str(files / "model"), files / "bigger", str(files / "bo.txt")
    given = ["--corpus", corpus, "--size", "30", "--init", "random", "--seed", "3", "--out", str(out)]
    assert enc2gen("vocab", "extend", model, *given).returncode == 0
    record = json.loads((out / "vocabulary.json").read_text(encoding="utf-8"))
    assert record["seed"] == 3 and record["initialisation"]["method"] == "random" and record["new_pieces"]
    assert record["coverage"]["before"]["unknown_rate"] > 0.9 and record["coverage"]["after"]["unknown_rate"] == 0.0
    report = coverage(load_tokenizer(out), [(line, "bo") for line in TIBETAN]).total
    assert report.round_trip_exact == 1.0 and report.unknown_rate == 0.0
    rows = load_encoder(out).get_input_embeddings().weight
    again = enc2gen("vocab", "extend", model, *given)
    assert again.returncode == 1 and b"not empty" in again.stderr
    assert enc2gen("vocab", "extend", model, *given, "--overwrite").returncode == 0
    assert torch.equal(load_encoder(out).get_input_embeddings().weight, rows)  # the same seed, the same rows
    assert {path.name for path in files.iterdir()} == {"model", "bigger", "text.txt", "bo.txt"}


def test_pairs_name_their_fields(enc2gen: Callable[..., Result], files: Path) -> None:
    rows = [{"en": TEXTS[i % 3], "bo": text, "doc": "d"} for i, text in enumerate(TIBETAN)]
    (files / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = [str(files / "model"), "--corpus", str(files / "bo.txt"), "--size", "30", "--init", "ofa", "--rank", "4"]
    given += ["--out", str(files / "out"), "--pairs", str(files / "pairs.jsonl")]
    refused = enc2gen("vocab", "extend", *given)
    message = " ".join(refused.stderr.decode().split())
    assert refused.returncode == 1 and "no field 'source' in record 1; there are: en, bo, doc" in message
    assert "--pair-fields en,bo" in message and not (files / "out").exists()
    assert enc2gen("vocab", "extend", *given, "--pair-fields", "en, bo").returncode == 0
    assert json.loads((files / "out" / "vocabulary.json").read_text(encoding="utf-8"))["pairs"] == len(rows)


def test_keep_characters(enc2gen: Callable[..., Result], files: Path) -> None:
    lines = ["བོད་ཡིག（①）…" if i == 0 else text for i, text in enumerate(TIBETAN)]
    (files / "bo.txt").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = load_tokenizer(files / "model")
    from enc2gen.tokenization.charsmap import character_map

    table = {"（": "(", "①": "1", "）": ")", "…": "...", "\x01": ""}
    tokenizer.backend_tokenizer.normalizer = character_map(table)
    tokenizer.save_pretrained(files / "model")

    def extend(*options: str) -> tuple[str, float]:
        given = ["--corpus", str(files / "bo.txt"), "--size", "60", "--init", "mean", "--out", str(files / "out")]
        result = enc2gen("vocab", "extend", str(files / "model"), *given, "--overwrite", *options)
        assert result.returncode == 0, result.stderr.decode()
        texts = [(line, "bo") for line in lines]
        return result.stdout.decode(), coverage(load_tokenizer(files / "out"), texts).total.round_trip_exact

    text, exact = extend()
    assert exact < 1 and f"1 of {len(lines)} lines come back changed" in text and "--keep-characters corpus" in text
    text, exact = extend("--keep-characters", "corpus")
    assert exact == 1 and "No longer rewritten" in text and all(character in text for character in "（①）…")
    record = json.loads((files / "out" / "vocabulary.json").read_text(encoding="utf-8"))
    assert set("（①）…") == set(record["kept_characters"]) and record["keep_characters"] == "corpus"


def test_prepared_folders_and_fields(files: Path) -> None:
    from enc2gen.cli.model_folder import read_texts

    prepared = files / "prepared"
    for split in ("train", "test"):
        (prepared / split).mkdir(parents=True)
        table = pyarrow.table({"text": [f"{split} text", " "], "language": ["kk", "kk"]})
        pyarrow.parquet.write_table(table, prepared / split / "part-00000.parquet")
    (prepared / "manifest.json").write_text("{}")
    assert read_texts([str(prepared)]) == [("train text", "kk")]
    pairs = files / "pairs.jsonl"
    pairs.write_text('{"source": "a", "target": "b", "target_language": "ug", "note": "c"}\n', encoding="utf-8")
    assert read_texts([str(pairs)]) == [("a", None), ("b", "ug")]
    assert read_texts([str(pairs)], ["note"]) == [("c", None)]
    with pytest.raises(DataError, match=r"no field 'txt' in record 1; there are: source, target(?s:.)*--field"):
        read_texts([str(pairs)], ["txt"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extend", "{model}", "--corpus", "{bo}", "--init", "focsu"], "did you mean 'focus'"),
        (["extend", "{model}", "--corpus", "{bo}", "--size", "0"], "'0' is no number of pieces"),
        (["extend", "{model}", "--corpus", "{empty}"], "empty"),
        (["extend", "{model}", "--corpus", "{bo}", "--pair-fields", "en,bo"], "no file of pairs"),
        (["extend", "{model}", "--corpus", "{bo}", "--pairs", "{bo}", "--pair-fields", "en"], "not two fields"),
        (["trim", "{model}", "--corpus", "{nowhere}"], "no such file"),
        (["trim", "{nowhere}", "--corpus", "{bo}"], "no model can be loaded"),
        (["trim", "{model}", "--corpus", "{bo}", "--keep-language", "kk"], "only a generator has languages"),
        (["trim", "{mismatched}", "--corpus", "{bo}"], "but the model has only 60"),
    ],
)
def test_errors_are_one_message_and_leave_nothing(
    enc2gen: Callable[..., Result],
    files: Path,
    arguments: list[str],
    message: str,
) -> None:
    from conftest import tiny_encoder

    tiny_encoder(vocabulary=60).save_pretrained(files / "mismatched")
    load_tokenizer(files / "model").save_pretrained(files / "mismatched")
    (files / "empty.txt").write_text("\n \n")
    names = {"model": "model", "bo": "bo.txt", "empty": "empty.txt", "nowhere": "nowhere", "mismatched": "mismatched"}
    given = [value.format(**{name: files / path for name, path in names.items()}) for value in arguments]
    result = enc2gen("vocab", *given, "--out", str(files / "out"))
    text = " ".join(result.stderr.decode().split())
    assert result.returncode == 1 and message in text and "Traceback" not in text
    assert not (files / "out").exists() and not list(files.glob(".*"))


def test_half_a_character_is_named_with_its_record(files: Path) -> None:
    broken = files / "broken.jsonl"
    broken.write_text('{"text": "good"}\n{"text": "bad \\ud83d emoji"}\n')
    with pytest.raises(DataError, match=r"broken\.jsonl, record 2"):
        read_texts([str(broken)])
    broken.write_text('{"source": "a", "target": "\\udc00"}\n')
    with pytest.raises(DataError, match="record 1"):
        read_pairs([str(broken)])


@pytest.mark.parametrize(("value", "tag"), [("kaz_Cyrl", "kk"), ("English", None), ("zxx", None), ("cn", None)])
def test_a_language_field_that_is_no_tag_leaves_the_language_open(files: Path, value: str, tag: str | None) -> None:
    (files / "l.jsonl").write_text(json.dumps({"text": "a b", "language": value}))
    assert read_texts([str(files / "l.jsonl")]) == [("a b", tag)]


def test_outputs_that_are_in_the_way_are_kept(enc2gen: Callable[..., Result], files: Path) -> None:
    model, text = str(files / "model"), str(files / "text.txt")
    (files / "precious").mkdir()
    (files / "precious" / "thesis.txt").write_text("x")
    for out, message in (
        (text, b"this is a file"),
        (model, b"this is the model itself"),
        (str(files / "precious"), b"something else than a model"),
    ):
        result = enc2gen("vocab", "trim", model, "--corpus", text, "--out", out, "--overwrite")
        assert result.returncode == 1 and message in result.stderr
    assert (files / "precious" / "thesis.txt").read_text() == "x" and Path(text).read_text(encoding="utf-8")


def test_a_crash_while_writing_leaves_nothing(
    enc2gen: Callable[..., Result],
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from enc2gen.cli import model_folder

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "_check_saved", fail)
    out = files / "out"
    result = enc2gen("vocab", "trim", str(files / "model"), "--corpus", str(files / "text.txt"), "--out", str(out))
    assert result.returncode == 1 and b"No space left" in result.stderr and not out.exists()
    assert not list(files.glob(".*"))
