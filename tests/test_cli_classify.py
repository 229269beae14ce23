"""`enc2gen classify` and `enc2gen generate` with a bridge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from conftest import tiny_tokenizer
from enc2gen import SwcmForConditionalGeneration
from enc2gen.cli import classify as command
from enc2gen.cli.generate import generate_lines
from enc2gen.evaluation.classification import LabelScorer
from enc2gen.generation.blocks import Job
from enc2gen.generation.bridge_generator import BridgeGenerator
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.generator import Generator
from enc2gen.models.bridge.modeling import BridgeForConditionalGeneration

TEXTS = ["ab", "a long text of words", "kk zz"]
LABELS = ["art", "q", "sports"]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
    }
    ids: dict[str, Any] = {"vocab_size": 120, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    model = BridgeForConditionalGeneration.from_parts(
        BertModel(BertConfig(max_position_embeddings=66, **sizes, **ids), add_pooling_layer=False),
        LlamaForCausalLM(LlamaConfig(attn_implementation="eager", **sizes, **(ids | {"vocab_size": 83}))),
        encoder_tokenizer=tiny_tokenizer(),
        llm_tokenizer=tiny_tokenizer(),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp("models") / "bridge"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    return app


def rows(table: str) -> list[list[str]]:
    return [line.split("\t") for line in table.splitlines()]


def test_lines_get_their_likeliest_label(app: typer.Typer, bridge: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    result = CliRunner().invoke(
        app, ["classify", str(bridge), "--input", str(tmp_path / "in.txt"), "--labels", ",".join(LABELS)]
    )
    assert result.exit_code == 0, result.output
    header, *found = rows(result.stdout)
    generator = Generator.from_pretrained(bridge)
    assert isinstance(generator, BridgeGenerator)
    scores = LabelScorer(generator.model, generator.codec, LABELS).log_likelihoods(TEXTS)
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert header == ["text", "label", "probability"]
    assert [(text, label) for text, label, _ in found] == [
        (text, LABELS[index]) for text, index in zip(TEXTS, scores.argmax(1), strict=True)
    ]
    np.testing.assert_allclose([float(share) for *_, share in found], shares.max(1), atol=2e-4)


def test_records_with_labels_print_the_accuracy(app: typer.Typer, bridge: Path, tmp_path: Path) -> None:
    records = [{"sentence": f"{text}\tx\n", "topic": "art"} for text in TEXTS] + [{"sentence": "z", "topic": "odd"}]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.tsv"
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    base = [
        "classify",
        str(bridge),
        "-i",
        str(source),
        "--field",
        "sentence",
        "--labels",
        " art , q",
        "-o",
        str(output),
    ]
    result = CliRunner().invoke(app, [*base, "--gold", "topic"])
    assert result.exit_code == 0, result.output
    found = rows(output.read_text(encoding="utf-8"))[1:]
    assert [row[0] for row in found] == [*(f"{text} x" for text in TEXTS), "z"]  # one row, three columns each
    share = 100 * sum(row[1] == record["topic"] for row, record in zip(found, records, strict=True)) / 4
    assert f"accuracy {share:.2f}" in result.stderr and "no such label to choose: odd" in result.stderr


def test_what_the_model_writes_may_be_no_label(app: typer.Typer, bridge: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    result = CliRunner().invoke(
        app,
        ["classify", str(bridge), "-i", str(tmp_path / "in.txt"), "--labels", "art,q", "--method", "generation"],
    )
    assert result.exit_code == 0, result.output
    assert [row[2] for row in rows(result.stdout)[1:]] == [""] * 3
    assert "none of the labels" in result.stderr


def test_labels_saved_with_the_model_are_the_default(app: typer.Typer, bridge: Path, tmp_path: Path) -> None:
    model = BridgeForConditionalGeneration.from_pretrained(bridge)
    model.config.labels = LABELS
    model.save_pretrained(tmp_path / "labelled")
    result = CliRunner().invoke(app, ["classify", str(tmp_path / "labelled"), "-i", "-"], input="ab\n\n zz\n")
    assert result.exit_code == 0, result.output
    assert len(rows(result.stdout)) == 3 and rows(result.stdout)[1][1] in LABELS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "in.jsonl"], "which labels"),
        (["-i", "in.jsonl", "--labels", "a", "--field", "txt"], "no field 'txt'; there are: text"),
        (["-i", "in.jsonl", "--labels", "a", "--gold", "topic"], "no field 'topic'"),
        (["-i", "empty.jsonl", "--labels", "a"], "record 1: field 'text' is empty"),
        (["-i", "odd.jsonl", "--labels", "a", "--field", "null"], "odd.jsonl, record 1: field 'null' is empty"),
        (["-i", "odd.jsonl", "--labels", "a", "--field", "list"], "record 1: field 'list' holds a list, not text"),
        (["-i", "odd.jsonl", "--labels", "a", "--field", "half"], "record 1: field 'half' holds half of a character"),
        (["-i", "odd.jsonl", "--labels", "a", "--gold", "null"], "odd.jsonl, record 1: field 'null' is empty"),
        (["-i", "-", "--labels", "a", "--field", "x"], "--field: lines have no fields"),
        (["-i", "in.jsonl", "--labels", "a", "-o", "in.jsonl"], "this file is read"),
        (["-i", "in.jsonl", "--labels", "a", "-o", "link.jsonl"], "this file is read"),
        (["-i", "folder", "--labels", "a", "-o", "folder/in.jsonl"], "this file is read"),
        (["-i", "missing.txt", "--labels", "a"], "no such file"),
        (["-i", "in.jsonl", "--labels", "a,a"], "two labels have the same tokens"),
        (["-i", "in.jsonl", "--labels", "a", "-o", "no/such/folder.tsv"], "cannot write"),
    ],
)
def test_wrong_use_is_explained(
    app: typer.Typer,
    bridge: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"text": "ab"}\n', encoding="utf-8")
    Path("empty.jsonl").write_text('{"text": " "}\n', encoding="utf-8")
    Path("odd.jsonl").write_text('{"text": "ab", "null": null, "list": ["a"], "half": "\\ud83d"}\n', encoding="utf-8")
    Path("link.jsonl").symlink_to("in.jsonl")
    Path("folder").mkdir()
    Path("folder", "in.jsonl").write_text('{"text": "ab"}\n', encoding="utf-8")
    result = CliRunner().invoke(app, ["classify", str(bridge), *arguments])
    assert result.exit_code != 0 and message in str(result.exception)
    assert Path("in.jsonl").read_text() == Path("folder", "in.jsonl").read_text() == '{"text": "ab"}\n'


def test_other_models_are_sent_to_generate(app: typer.Typer, encoder_folder: Path, tmp_path: Path) -> None:
    SwcmForConditionalGeneration.from_encoder(encoder_folder, languages=["kk"], verbose=False).save_pretrained(
        tmp_path / "swcm"
    )
    (tmp_path / "in.txt").write_text("ab\n", encoding="utf-8")
    result = CliRunner().invoke(
        app, ["classify", str(tmp_path / "swcm"), "-i", str(tmp_path / "in.txt"), "--labels", "a"]
    )
    assert "this model is no bridge" in str(result.exception)


def test_generate_serves_a_bridge_without_a_language(bridge: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("ab\n\nkk zz\n", encoding="utf-8")
    config = DecodingConfig(num_beams=1, max_new_tokens=4)
    with (tmp_path / "errors").open("w", encoding="utf-8") as stream:
        generate_lines(Job(str(bridge), config=config), tmp_path / "in.txt", tmp_path / "out.txt", Console(file=stream))
    lines = (tmp_path / "out.txt").read_text(encoding="utf-8").split("\n")
    written = Generator.from_pretrained(bridge).generate(["ab", "kk zz"], config=config)
    assert all(written) and lines == [written[0], "", written[1], ""]
    assert (tmp_path / "errors").read_text(encoding="utf-8") == ""
