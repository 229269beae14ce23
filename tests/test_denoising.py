"""Denoising perplexity of held-out text: the right texts, the right sum, the same noise for everyone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from rich.console import Console

from enc2gen.data.noising import NoiseConfig
from enc2gen.errors import DataError
from enc2gen.experiments import findings
from enc2gen.experiments.denoising import held_out_texts, noised_example
from enc2gen.experiments.objectives import DenoisingEncoder
from enc2gen.experiments.prepare import PreparedData
from enc2gen.experiments.recipe import Recipe
from enc2gen.experiments.run import Run
from enc2gen.experiments.systems import codec_for, final_folder, load_system
from test_run import recipe_content, write_pairs


@pytest.fixture
def content(tmp_path: Path, encoder_folder: Path) -> dict[str, Any]:
    write_pairs(tmp_path / "pairs.tsv")
    texts = tmp_path / "texts.txt"
    letters = "абвгдежзий"
    lines = [
        " ".join(letters[(index + step) % 10] + letters[index // 10 % 10] for step in range(2 + index % 5))
        + letters[index // 100]
        for index in range(120)
    ]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = recipe_content(tmp_path, encoder_folder)
    content["data"]["monolingual"] = [{"path": str(texts), "language": "kk", "test_percent": 20}]
    content["data"]["denoise_targets"] = False
    del content["systems"]["random_decoder"], content["finetune"]
    content["evaluate"] |= {"denoising": True, "limit": 12}
    return content


def run(content: dict[str, Any], *stages: str) -> Run:
    made = Run(Recipe(**content), Console(quiet=True))
    made.run(stages)
    return made


def test_held_out_texts_are_trained_on_by_no_stage(content: dict[str, Any]) -> None:
    made = run(content, "prepare")
    data = PreparedData(made.workspace.data)
    trained, held_out = set(data.texts()["text"]), set(data.held_out_texts()["text"])
    assert len(trained | held_out) == 120 and not trained & held_out and 10 < len(held_out) < 40
    measured = [row["text"] for row in held_out_texts(made.recipe, made.workspace)["kk"]]
    assert len(measured) == 12 and measured == [text for text in data.held_out_texts()["text"] if text in measured]
    assert measured != data.held_out_texts()["text"][:12], "drawn from all of them"


def test_a_text_that_is_also_trained_on_is_not_measured(content: dict[str, Any]) -> None:
    made = run(content, "prepare")
    text = held_out_texts(made.recipe, made.workspace)["kk"][0]["text"]
    more = Path(content["output"]).parent / "more.txt"
    more.write_text(f"{text}\n", encoding="utf-8")
    content["data"]["monolingual"].append({"path": str(more), "language": "kk"})
    content["output"] += "-more"
    made = run(content, "prepare")
    assert text in PreparedData(made.workspace.data).held_out_texts()["text"]
    assert text not in [row["text"] for row in held_out_texts(made.recipe, made.workspace)["kk"]]


def test_targets_of_the_evaluated_split_are_measured_where_targets_are_denoised(content: dict[str, Any]) -> None:
    content["data"] |= {"monolingual": [], "denoise_targets": True}
    for split in ("test", "dev"):
        content["evaluate"] |= {"split": split, "limit": None}
        made = run(content, "prepare")
        data = PreparedData(made.workspace.data)
        texts = {row["text"] for row in held_out_texts(made.recipe, made.workspace)["kk"]}
        assert texts == set(data.examples(split)["target"]) and not texts & set(data.texts()["text"])


def test_perplexity_is_that_of_the_model_itself(content: dict[str, Any]) -> None:
    made = run(content, "report")
    folder = final_folder(made.recipe, made.workspace, "shared")
    model = load_system(folder).eval()
    codec = codec_for(made.recipe, folder, model)
    encoder = DenoisingEncoder(codec, NoiseConfig())
    nats, tokens, letters = [], [], []
    for row in held_out_texts(made.recipe, made.workspace)["kk"]:
        example = noised_example(encoder, row)  # one at a time: no padding
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([example.input_ids]), decoder_input_ids=torch.tensor([example.decoder_input_ids])
            ).logits[0]
        chosen = logits.double().log_softmax(-1)[range(len(example.labels)), list(example.labels)]
        nats.append(-chosen.sum().item())
        tokens.append(len(codec.encode_text(row["text"])) + 1)
        letters.append(len(row["text"]))
    metrics = json.loads((made.workspace.root / "metrics.json").read_text(encoding="utf-8"))
    measured = metrics["denoising"]["shared"]["kk"]
    assert measured["nats_per_token"]["value"] == pytest.approx(sum(nats) / sum(tokens), rel=1e-5)
    assert measured["nats_per_character"]["value"] == pytest.approx(sum(nats) / sum(letters), rel=1e-5)
    for end in ("value", "low", "high"):
        assert measured["perplexity"][end] == pytest.approx(math.exp(measured["nats_per_token"][end]))
    # The interval, by a plain bootstrap of our own.
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, 12, 12) for _ in range(4000)]
    samples = [np.take(nats, draw).sum() / np.take(tokens, draw).sum() for draw in draws]
    spread = np.std(samples)
    for end, share in (("low", 0.025), ("high", 0.975)):
        assert measured["nats_per_token"][end] == pytest.approx(np.quantile(samples, share), abs=spread)
    lines = made.workspace.read_lines(made.workspace.system("shared", "denoising.jsonl"))
    assert [line["nats"] for line in lines] == pytest.approx(nats, rel=1e-5)
    assert [line["tokens"] for line in lines] == tokens
    assert "perplexity" in (made.workspace.root / "report.html").read_text(encoding="utf-8")
    assert findings.denoising_rows(metrics)[0]["language"] == "Kazakh"


def test_noise_depends_on_the_text_alone(content: dict[str, Any]) -> None:
    made = run(content, "build")
    folder = made.workspace.system("shared", "initial")
    codec = codec_for(made.recipe, folder, load_system(folder))
    encoder = DenoisingEncoder(codec, NoiseConfig())
    rows = held_out_texts(made.recipe, made.workspace)["kk"]
    forwards = [noised_example(encoder, row) for row in rows]
    assert forwards == [noised_example(encoder, row) for row in reversed(rows)][::-1]
    assert any(codec.tokenizer.mask_token_id in example.input_ids for example in forwards)


def test_without_held_out_text_the_recipe_is_refused(content: dict[str, Any]) -> None:
    del content["data"]["monolingual"][0]["test_percent"]
    with pytest.raises(ValidationError, match="test_percent"):
        Recipe(**content)
    content["data"]["monolingual"][0]["test_percent"] = 1
    Path(content["data"]["monolingual"][0]["path"]).write_text("абв где\n", encoding="utf-8")
    with pytest.raises(DataError, match="no text is held out"):
        run(content, "evaluate")


def test_settings_without_it_keep_their_identity(content: dict[str, Any]) -> None:
    measured = Recipe(**content).evaluate.identity()
    assert {"denoising", "noise"} < measured.keys()
    content["evaluate"]["denoising"] = False
    plain = Recipe(**content).evaluate.identity()
    assert not {"denoising", "noise"} & plain.keys() and yaml.safe_dump(plain)
