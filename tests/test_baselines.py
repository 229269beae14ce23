"""Every system of a comparison is built through one function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from conftest import tiny_encoder, tiny_tokenizer
from enc2gen.errors import ConfigError
from enc2gen.generation.generator import Generator
from enc2gen.models.baselines import PRESETS, build_system


def build(preset: str, **options: object) -> torch.nn.Module:
    return build_system(
        preset,
        tiny_encoder(),
        tokenizer=tiny_tokenizer(),
        languages=["en", "kk"],
        seed=0,
        verbose=False,
        options=options,
    )


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.filterwarnings("ignore:weights copied")
def test_every_preset_trains_saves_loads_and_writes(preset: str, tmp_path: Path) -> None:
    model = build(preset).train()
    ids = torch.randint(4, 90, (2, 6))
    model(input_ids=ids, decoder_input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = [name for name, p in model.named_parameters() if p.grad is None and "pooler" not in name]
    assert not gradients
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with torch.no_grad():
        a, b = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, loaded))
    torch.testing.assert_close(a, b)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        from enc2gen.tokenization.tokenizer import add_language_tokens

        tokenizer = tiny_tokenizer()
        add_language_tokens(tokenizer, ["en", "kk"])
    loaded.generation_config.max_new_tokens = 5
    assert len(Generator(loaded, tokenizer).generate(["abc", "d"], target_language="kk", source_language="en")) == 2


def test_presets_differ_as_the_paper_says() -> None:
    plans = {name: build(name).init_report for name in PRESETS if name != "warm-start"}
    assert plans["swcm"].plan == ["custom:0", "custom:1", "custom:2", "normal", "custom:3"]
    assert plans["base-a"].plan == ["custom:0", "custom:1", "custom:2", "custom:3"]
    assert plans["base-b"].plan == ["custom:0", "custom:1", "custom:2", "custom:2", "custom:3"]
    assert plans["random-decoder"].plan == ["normal"] * 4
    assert plans["no-sharing"].plan == plans["swcm"].plan and plans["no-sharing"].counts()["copied"] == 4
    assert plans["all-random"].counts()["copied"] == 0
    assert plans["swcm-tied"].counts()["tied"] > 100


def test_warm_start_copies_the_encoder_into_both_sides() -> None:
    encoder = tiny_encoder()
    model = build_system("warm-start", encoder, tokenizer=tiny_tokenizer(), languages=["kk"], seed=0)
    state = encoder.state_dict()
    for side in (model.encoder, model.decoder.base_model):
        for name in ("encoder.layer.1.attention.self.query.weight", "encoder.layer.3.output.dense.bias"):
            assert torch.equal(side.state_dict()[name], state[name])
    rows = encoder.get_input_embeddings().weight.shape[0]
    assert torch.equal(
        model.encoder.get_input_embeddings().weight[: rows // 2], encoder.get_input_embeddings().weight[: rows // 2]
    )


def test_unknown_preset_and_options() -> None:
    with pytest.raises(ConfigError, match="did you mean 'swcm'"):
        build("swmc")
    with pytest.raises(ConfigError, match="insert_evry=3: Extra inputs"):
        build("swcm", insert_evry=3)
    with pytest.raises(ConfigError, match="does not take growth"):
        build("warm-start", growth="swcm")
