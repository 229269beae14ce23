"""Recipes that extend the vocabulary and adapt the encoder before a decoder grows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from enc2gen.encoders.loading import load_encoder, load_tokenizer
from enc2gen.errors import ConfigError
from enc2gen.experiments import encoders
from enc2gen.experiments.encoder_config import EncoderConfig, ExtensionConfig
from enc2gen.experiments.recipe import load_recipe
from enc2gen.experiments.run import Run
from enc2gen.models.embedding_init import InitialisationConfig
from enc2gen.models.surgery import load_for_surgery
from enc2gen.tokenization.extension import extend_vocabulary
from enc2gen.tokenization.vocabulary import unknown_rate
from test_run import console, load, recipe_content, write_pairs
from test_surgery import TIBETAN as TIBETAN_TEXTS
from test_surgery import masked_model

TIBETAN = str.maketrans("абвгдежзий", "ཀཁགངཅཆཇཉཏཐ")


@pytest.fixture
def content(tmp_path: Path, encoder_folder: Path) -> dict[str, Any]:
    pairs = write_pairs(tmp_path / "pairs.tsv")
    pairs.write_text(pairs.read_text(encoding="utf-8").translate(TIBETAN).replace("\tkk", "\tbo"), encoding="utf-8")
    made = recipe_content(tmp_path, encoder_folder)
    training = made["pretrain"]["training"]
    made["languages"] = ["bo"]
    made["data"]["datasets"][0]["fields"] = {
        "source": "en",
        "target": "bo",
        "source_language": "en",
        "target_language": "bo",
    }
    made["encoder"] |= {
        "extend_vocabulary": {"size": 20, "initialisation": {"method": "random"}},
        "adapt": {"embeddings_only": training, "training": training, "max_length": 32},
    }
    made["systems"] = {
        "extended": {},
        "focus_rows": {"encoder": {"extend_vocabulary": {"initialisation": {"method": "focus"}}}},
        "other_decoder": {"preset": "random-decoder"},
        "not_extended": {"encoder": {"extend_vocabulary": None, "adapt": None, "unknown_limit": 1.0}},
    }
    made["pretrain"] = None
    return made


def test_new_script_from_text_to_scores(tmp_path: Path, content: dict[str, Any]) -> None:
    recipe = load(tmp_path, content)
    assert recipe.variant("other_decoder") == "extended"
    root = Run(recipe, console()).run()
    metrics = json.loads((root / "metrics.json").read_text(encoding="utf-8"))
    record = metrics["encoders"]["extended"]
    assert record["unknown_rate_before"]["bo"] == 1.0 and record["unknown_rate"]["bo"] == 0.0
    assert record["adapted"]["after"] < record["adapted"]["before"]
    assert metrics["encoders"]["not_extended"]["unknown_rate"]["bo"] == 1.0
    assert set(metrics["paired"]["bo"]) == {"focus_rows", "other_decoder", "not_extended"}
    page = (root / "report.html").read_text(encoding="utf-8")
    assert "What the encoders can read" in page and "sentence by sentence" in page
    assert unknown_rate(load_tokenizer(root / "model"), ["ཀཁག"]) == 0.0
    # Systems with equal encoder settings share one prepared encoder; the others have their own.
    assert sorted(path.name for path in (root / "encoders").iterdir()) == ["extended", "focus_rows", "not_extended"]


def test_the_grown_model_holds_the_adapted_encoder(tmp_path: Path, content: dict[str, Any]) -> None:
    content["systems"] = {"extended": {"options": {"donor_layers": [1]}}}
    content["encoder"]["layers"] = [1]
    root = Run(load(tmp_path, content), console()).run(["build"])
    adapted = load_encoder(root / "encoders" / "extended" / "adaptation" / "encoder")
    start = load_encoder(root / "encoders" / "extended" / "start")
    from enc2gen import SwcmForConditionalGeneration

    model = SwcmForConditionalGeneration.from_pretrained(root / "systems" / "extended" / "initial")
    name = "encoder.layer.0.output.dense.weight"
    grown = model.encoder.state_dict()[name]
    assert torch.equal(grown, adapted.state_dict()[name]) and not torch.equal(grown, start.state_dict()[name])
    assert model.config.plan[0].first == 0 and len(model.encoder.encoder.layer) == 1


def test_a_change_of_the_adaptation_keeps_the_vocabulary(tmp_path: Path, content: dict[str, Any]) -> None:
    content["systems"] = {"extended": {}}
    Run(load(tmp_path, content), console()).run(["adapt"])
    root = tmp_path / "run"
    written = (root / "encoders" / "extended" / "vocabulary.json").stat().st_mtime_ns
    content["encoder"]["adapt"]["alpha"] = 0.5
    Run(load(tmp_path, content), console(), overwrite=True).run(["adapt"])
    assert (root / "encoders" / "extended" / "vocabulary.json").stat().st_mtime_ns == written


def test_settings_of_one_system_are_checked(tmp_path: Path, content: dict[str, Any]) -> None:
    content["systems"]["extended"] = {"encoder": {"extend_vocabulary": {"sise": 4}}}
    with pytest.raises(ConfigError, match=r"systems\.extended\.encoder\.extend_vocabulary\.sise.*size"):
        load(tmp_path, content)


def test_settings_reach_into_lists(tmp_path: Path, content: dict[str, Any]) -> None:
    load(tmp_path, content)
    changed = load_recipe(tmp_path / "recipe.yaml", ["data.datasets.0.dev_percent=20"])
    assert changed.data.datasets[0].dev_percent == 20
    with pytest.raises(ConfigError, match="counted from 0"):
        load_recipe(tmp_path / "recipe.yaml", ["data.datasets.7.dev_percent=20"])


@dataclass
class Rows:
    """Prepared data of texts with their languages, in the order given."""

    texts_of: list[tuple[str, str]]

    def examples(self, split: str) -> list[dict[str, str]]:
        return [
            {"source": text, "source_language": tag, "target": text, "target_language": tag}
            for text, tag in self.texts_of
        ]

    def texts(self) -> list[dict[str, str]]:
        return []


def test_sizes_are_chosen_on_the_first_texts_of_every_language() -> None:
    data: Any = Rows([(f"བོད {i}", "bo") for i in range(400)] + [(f"a {i}", "ka") for i in range(400)])
    chosen = encoders._first_of_each(data, {"bo", "ka"})
    assert chosen == [f"བོད {i}" for i in range(300)] + [f"a {i}" for i in range(300)]
    assert encoders._first_of_each(data, {"ka"}) == [f"a {i}" for i in range(300)]


def test_new_pieces_get_output_rows_of_their_own_where_the_head_is_not_tied(tmp_path: Path) -> None:
    model, tokenizer = masked_model("xlm-roberta", tied=False)
    model.save_pretrained(tmp_path / "old")
    tokenizer.save_pretrained(tmp_path / "old")
    extension = ExtensionConfig(size=8, initialisation=InitialisationConfig(method="mean"))
    config = EncoderConfig(name=str(tmp_path / "old"), extend_vocabulary=extension)
    recipe: Any = SimpleNamespace(languages=["bo"], seed=0)
    data: Any = Rows([(text, "bo") for text in TIBETAN_TEXTS])
    extended = extend_vocabulary(tokenizer, TIBETAN_TEXTS, size=8)
    encoders._save_start(recipe, config, data, tokenizer, None, extended, tmp_path / "new", print)
    made, _ = load_for_surgery(tmp_path / "new")
    new = made.get_output_embeddings().weight[-len(extended.pieces) :]
    assert len(extended.pieces) > 2 and len({tuple(row.tolist()) for row in new}) > 2
    assert not torch.equal(new, made.get_input_embeddings().weight[-len(extended.pieces) :])
