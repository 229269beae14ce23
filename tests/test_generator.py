"""Text in, text out."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import tiny_tokenizer
from enc2gen import SwcmForConditionalGeneration
from enc2gen.errors import CheckpointError, LanguageError, ModelError
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.generator import Generator


@pytest.fixture
def saved(encoder_folder: Path, tmp_path: Path) -> Path:
    model = SwcmForConditionalGeneration.from_encoder(encoder_folder, languages=["en", "kk", "ug"], verbose=False)
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


TEXTS = ["abc", "", "a long text of many words", "zz", "  "]


def test_outputs_keep_the_order_and_do_not_depend_on_batching(saved: Path) -> None:
    generator = Generator.from_pretrained(saved)
    runs = [
        generator.generate(
            TEXTS, target_language="kk", source_language="en", config=DecodingConfig(batch_size=size, num_beams=3)
        )
        for size in (1, 2, 32)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][1] == runs[0][4] == "" and len(runs[0]) == 5


def test_languages_and_settings_reach_the_model(saved: Path) -> None:
    generator = Generator.from_pretrained(saved)
    kk = generator.generate(["abc"], target_language="kk")
    short = generator.generate(["abc"], target_language="kk", config=DecodingConfig(max_new_tokens=1))
    assert len(short[0]) < len(kk[0])
    samples = [
        generator.generate(
            ["abc"] * 3, target_language="kk", config=DecodingConfig(num_beams=1, do_sample=True), seed=s
        )
        for s in (1, 1, 2)
    ]
    assert samples[0] == samples[1] != samples[2]


def test_unknown_and_missing_languages(saved: Path) -> None:
    generator = Generator.from_pretrained(saved)
    with pytest.raises(LanguageError, match=r"language 'bo'(?s:.)*en, kk, ug"):
        generator.generate(["abc"], target_language="bo")
    with pytest.raises(LanguageError, match="no target language"):
        generator.generate(["abc"])


def test_foreign_and_truncated_models_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        Generator.from_pretrained(tmp_path / "nowhere" / "at" / "all")
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="no generator can be loaded"):
        Generator.from_pretrained(saved)
    (saved / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError):
        Generator.from_pretrained(saved)


def test_foreign_tokenizer_is_refused(saved: Path) -> None:
    model = SwcmForConditionalGeneration.from_pretrained(saved)
    with pytest.raises(ModelError, match="does not know the language token"):
        Generator(model, tiny_tokenizer())


def test_slow_tokenizers_are_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from enc2gen.encoders import loading

    slow = SimpleNamespace(is_fast=False)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda name: slow)
    with pytest.raises(ModelError, match=r"(?s)not a fast tokenizer.*tokenizer\.json"):
        loading.load_tokenizer(saved)


def test_text_longer_than_the_positions_is_cut_and_counted(saved: Path) -> None:
    generator = Generator.from_pretrained(saved)
    assert len(generator.generate(["a b c d " * 50], target_language="kk", source_language="en")) == 1
    assert generator.codec.truncated == 1 and generator.codec.max_source_length == 64
