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


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"pretrained"}))
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
    plans = {name: build(name).init_report for name in PRESETS if name not in ("warm-start", "pretrained")}
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


def test_a_warm_started_decoder_of_some_layers_starts_from_those() -> None:
    encoder = tiny_encoder(layers=6)
    model = build_system(
        "warm-start", encoder, tokenizer=tiny_tokenizer(), languages=["kk"], seed=0,
        options={"encoder_layers": [0, 2, 3, 5], "donor_layers": [2, 5]},
    )  # fmt: skip
    state, below = encoder.state_dict(), model.decoder.base_model.state_dict()
    assert (model.config.encoder.num_hidden_layers, model.config.decoder.num_hidden_layers) == (4, 2)
    assert not any(name.startswith("encoder.layer.2.") for name in below)
    for place, donor in enumerate((2, 5)):
        own, source = f"encoder.layer.{place}.output.dense.weight", f"encoder.layer.{donor}.output.dense.weight"
        assert torch.equal(below[own], state[source])
    assert torch.equal(
        model.encoder.state_dict()["encoder.layer.3.output.dense.bias"], state["encoder.layer.5.output.dense.bias"]
    )
    origins = {tensor.name: tensor for tensor in model.init_report.tensors}
    copied = origins["decoder.roberta.encoder.layer.1.attention.self.query.weight"]
    assert (copied.origin, copied.source) == ("copied", "encoder.layer.3.attention.self.query.weight")
    assert model.init_report.plan == ["encoder:1", "encoder:3"]
    with pytest.raises(ConfigError, match=r"donor layers \[4\] are not among"):
        build("warm-start", encoder_layers=[0, 2], donor_layers=[4])


def test_mbart_shaped_is_mbart_of_the_grown_models_size() -> None:
    encoder = tiny_encoder(layers=6)
    grown, mbart = (
        build_system(name, encoder, tokenizer=tiny_tokenizer(), languages=["kk"], seed=0, verbose=False)
        for name in ("swcm", "mbart-shaped")
    )
    config, shape = mbart.config, encoder.config
    assert config.model_type == "mbart" and config.encoder_layers == config.decoder_layers
    assert (config.d_model, config.encoder_ffn_dim) == (shape.hidden_size, shape.intermediate_size)
    layer = mbart.model.encoder.layers[0].state_dict(), mbart.model.decoder.layers[0].state_dict()
    step = sum(tensor.numel() for part in layer for tensor in part.values())
    assert abs(mbart.num_parameters() - grown.num_parameters()) <= step / 2
    table = mbart.get_input_embeddings().weight
    assert table is mbart.lm_head.weight and table.shape == grown.get_input_embeddings().weight.shape
    assert not torch.equal(table[:100], encoder.get_input_embeddings().weight[:100])
    assert mbart.generation_config.eos_token_id == 2 and mbart.generation_config.forced_eos_token_id is None


def test_mbart_shaped_follows_cuts_depths_and_seeds() -> None:
    def shaped(seed: int = 0, **options: object) -> torch.nn.Module:
        settings = {"tokenizer": tiny_tokenizer(), "languages": ["kk"], "verbose": False, "options": options}
        return build_system("mbart-shaped", tiny_encoder(layers=6), seed=seed, **settings)

    assert shaped(encoder_layers=[0, 5]).config.decoder_layers < shaped().config.decoder_layers
    assert shaped(layers=2).config.encoder_layers == 2
    assert shaped(dropout=0.3).config.dropout == 0.3
    one, same, other = (shaped(seed, layers=1).get_input_embeddings().weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    with pytest.raises(ConfigError, match="layers=0 is not positive"):
        shaped(layers=0)
    with pytest.raises(ConfigError, match="'mbart-shaped' does not take insert_every"):
        shaped(insert_every=2)


def test_sources_are_cut_to_what_mbart_has_positions_for() -> None:
    model = build("mbart-shaped")
    model.generation_config.max_new_tokens = 4
    model.tokenizer.model_max_length = 512  # the model's own limit is the lower one
    writer = Generator(model, model.tokenizer)
    assert writer.codec.max_source_length == 64 == model.config.max_position_embeddings
    assert len(writer.generate(["abc " * 100, "d"], target_language="kk", source_language="en")) == 2


def test_unknown_preset_and_options() -> None:
    with pytest.raises(ConfigError, match="did you mean 'swcm'"):
        build("swmc")
    with pytest.raises(ConfigError, match="insert_evry=3: Extra inputs"):
        build("swcm", insert_evry=3)
    with pytest.raises(ConfigError, match="does not take growth"):
        build("warm-start", growth="swcm")
