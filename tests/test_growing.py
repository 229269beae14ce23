"""Growing a decoder: which tensors are copied, tied or random, by name and by value."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)

from conftest import tiny_encoder, tiny_tokenizer
from enc2gen import SwcmForConditionalGeneration
from enc2gen.errors import CheckpointError, ConfigError, LanguageError, ModelError
from enc2gen.models.swcm import growing
from enc2gen.models.swcm.configuration import plan_layers


def grow(encoder: Any, **options: Any) -> SwcmForConditionalGeneration:
    return SwcmForConditionalGeneration.from_encoder(encoder, verbose=False, **options)


ATTENTION = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "out_proj": "attention.output.dense",
}


def expected_copies(custom: int, donor: int) -> dict[str, str]:
    """The paper's table of sources, spelled out here once more and independently of the product."""
    theirs, ours = f"encoder.layer.{donor}", f"decoder.layers.{custom}"
    pairs = {}
    for kind in ("weight", "bias"):
        for attention in ("self_attention", "cross_attention"):
            for part, name in ATTENTION.items():
                pairs[f"{ours}.{attention}.{part}.{kind}"] = f"{theirs}.{name}.{kind}"
            pairs[f"{ours}.{attention}_norm.{kind}"] = f"{theirs}.attention.output.LayerNorm.{kind}"
        for ffn in ("ffn1", "ffn2"):
            pairs[f"{ours}.{ffn}.fc1.{kind}"] = f"{theirs}.intermediate.dense.{kind}"
            pairs[f"{ours}.{ffn}.fc2.{kind}"] = f"{theirs}.output.dense.{kind}"
            pairs[f"{ours}.{ffn}_norm.{kind}"] = f"{theirs}.output.LayerNorm.{kind}"
    return pairs


@pytest.mark.parametrize("kind", ["xlm-roberta", "bert"])
def test_every_copied_tensor_equals_its_source(kind: str) -> None:
    encoder = tiny_encoder(kind, layers=4)
    model = grow(encoder, insert_every=3)
    ours, theirs = dict(model.named_parameters()), dict(encoder.named_parameters())
    assert model.init_report.plan == ["custom:0", "custom:1", "custom:2", "normal", "custom:3"]
    for custom, donor in ((0, 0), (1, 1), (2, 2), (4, 3)):
        for target, source in expected_copies(custom, donor).items():
            assert torch.equal(ours[target], theirs[source]), target
            assert ours[target] is not theirs[source]
    random = {name for name in model.init_report.names("random")}
    assert random and all(name.startswith("decoder.layers.3.") for name in random)


def test_report_names_every_decoder_tensor_once(tmp_path: Path) -> None:
    model = grow(tiny_encoder())
    reported = [tensor.name for tensor in model.init_report.tensors]
    actual = [n for n, _ in model.named_parameters(remove_duplicate=False) if n.startswith(("decoder.", "lm_head."))]
    assert sorted(reported) == sorted(actual)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "init_report.json").read_text())
    assert sum(saved["counts"].values()) == len(actual)
    assert saved["counts"]["copied"] == 4 * 32 + 4  # 32 tensors a custom layer; positions, types, norm weight and bias


def test_encoder_states_equal_transformers(encoder_folder: Path) -> None:
    ids = torch.tensor([[0, 9, 8, 7, 2], [0, 9, 2, 1, 1]])
    mask = (ids != 1).long()
    for kind in ("xlm-roberta", "bert"):
        encoder = tiny_encoder(kind)
        model = grow(encoder)
        with torch.no_grad():
            ours = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
            theirs = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ({}, ["c0", "c1", "c2", "n", "c3", "c4", "c5", "n"]),
        ({"normal_after_last": False}, ["c0", "c1", "c2", "n", "c3", "c4", "c5"]),
        ({"insert_every": None}, ["c0", "c1", "c2", "c3", "c4", "c5"]),
        ({"insert_every": 4}, ["c0", "c1", "c2", "c3", "n", "c4", "c5"]),
        ({"insert_every": 2, "normal_layers": "duplicate"}, ["c0", "c1", "c1", "c2", "c3", "c3", "c4", "c5", "c5"]),
        ({"growth": "deltalm", "insert_every": None}, ["c0+1", "c2+3", "c4+5"]),
        ({"growth": "standard"}, ["n"] * 6),
    ],
)
def test_plans(options: dict[str, Any], plan: list[str]) -> None:
    def name(layer: Any) -> str:
        if layer.first is None:
            return "n"
        return f"c{layer.first}" + ("" if layer.first == layer.second else f"+{layer.second}")

    assert [name(layer) for layer in plan_layers(range(6), **options)] == plan


@pytest.mark.parametrize(
    ("every", "paper", "released"), [(1, 24, 23), (2, 18, 17), (3, 16, 15), (4, 15, 14), (5, 14, 14), (6, 14, 13)]
)
def test_depths_of_twelve_layers_match_paper_and_release(every: int, paper: int, released: int) -> None:
    assert len(plan_layers(range(12), insert_every=every)) == paper
    assert len(plan_layers(range(12), insert_every=every, normal_after_last=False)) == released


def test_cino_base_shape_has_492_million_parameters_on_meta() -> None:
    vocabulary, hidden, ffn, positions = 135_359, 768, 3072, 514
    config = XLMRobertaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    with torch.device("meta"):
        encoder = XLMRobertaModel(config, add_pooling_layer=False)
    model = grow(encoder, normal_after_last=False, tie_lm_head=False)
    assert all(parameter.is_meta for parameter in model.parameters())
    norm = 2 * hidden
    attention = 4 * (hidden * hidden + hidden) + norm
    feed_forward = hidden * ffn + ffn + ffn * hidden + hidden + norm
    embeddings = positions * hidden + hidden + norm  # positions, one type, norm; in encoder and decoder
    words = vocabulary * hidden  # one table for both
    custom, normal = 2 * attention + 2 * feed_forward, 2 * attention + feed_forward
    head = words + vocabulary
    assert (custom, normal) == (14_175_744, 9_451_776)
    total = words + 2 * embeddings + 12 * (attention + feed_forward) + 12 * custom + 3 * normal + head
    assert model.num_parameters() == total == 492_359_615


def test_tied_sharing_stays_equal_after_a_step_and_after_loading(tmp_path: Path) -> None:
    model = grow(tiny_encoder(), sharing="tied", languages=["kk"]).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.randint(4, 100, (2, 6))
    model(input_ids=ids, decoder_input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    for candidate in (model, SwcmForConditionalGeneration.from_pretrained(tmp_path)):
        tensors = dict(candidate.named_parameters(remove_duplicate=False))
        for custom, donor in ((0, 0), (4, 3)):
            for target, source in expected_copies(custom, donor).items():
                assert tensors[target] is tensors[f"encoder.{source}"], target
    query = "encoder.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(dict(model.named_parameters())[query], before[query])
    assert model.num_parameters() < grow(tiny_encoder(), languages=["kk"]).num_parameters()


def test_copies_move_apart_after_a_step() -> None:
    model = grow(tiny_encoder()).train()
    ids = torch.randint(4, 100, (2, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=ids, decoder_input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    tensors = dict(model.named_parameters())
    name = "decoder.layers.0.cross_attention.v_proj.weight"
    assert not torch.equal(tensors[name], tensors["encoder.encoder.layer.0.attention.self.value.weight"])


@pytest.mark.parametrize("left_out", ["self_attention", "cross_attention", "ffn", "norms", "embeddings"])
def test_each_part_can_be_left_out(left_out: str) -> None:
    encoder = tiny_encoder()
    parts = [part for part in ("embeddings", "self_attention", "cross_attention", "ffn", "norms") if part != left_out]
    report = grow(encoder, copy=parts, insert_every=None).init_report
    fresh = set(report.names("random")) | set(report.names("constant")) - {"lm_head.bias"}
    marks = {"norms": ("attention_norm.", "ffn1_norm.", "ffn2_norm."), "embeddings": ("embed_",)}.get(
        left_out, (left_out,)
    )
    assert fresh and all(any(mark in name for mark in marks) for name in fresh)
    assert not any(
        any(mark in t.name for mark in marks) and t.origin == "copied" and "embed_tokens" not in t.name
        for t in report.tensors
    )


@pytest.mark.parametrize("options", [{"copy": ()}, {"copy": ("ffn",)}, {"random_encoder": True}])
def test_the_report_says_what_an_untied_head_is(options: dict[str, Any]) -> None:
    model = grow(tiny_encoder(), tie_lm_head=False, **options)
    assert model.init_report is not None
    origin = next(tensor.origin for tensor in model.init_report.tensors if tensor.name == "lm_head.weight")
    same = torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert (origin, same) == (("random", False) if "random_encoder" in options else ("copied", True))


def test_deltalm_takes_attentions_from_odd_and_even_layers() -> None:
    encoder = tiny_encoder(layers=4)
    tensors = dict(grow(encoder, growth="deltalm", insert_every=None).named_parameters())
    theirs = dict(encoder.named_parameters())
    assert torch.equal(
        tensors["decoder.layers.1.self_attention.q_proj.weight"], theirs["encoder.layer.2.attention.self.query.weight"]
    )
    assert torch.equal(
        tensors["decoder.layers.1.cross_attention.q_proj.weight"], theirs["encoder.layer.3.attention.self.query.weight"]
    )
    assert torch.equal(tensors["decoder.layers.1.ffn2.fc1.weight"], theirs["encoder.layer.3.intermediate.dense.weight"])


def test_layer_subsets_use_the_encoders_numbering_and_leave_the_users_model_alone() -> None:
    encoder = tiny_encoder(layers=6)
    theirs = {name: p.clone() for name, p in encoder.named_parameters()}
    model = grow(encoder, encoder_layers=[0, 2, 5], donor_layers=[2, 5], insert_every=None)
    assert model.config.encoder_config.num_hidden_layers == 3 and len(encoder.encoder.layer) == 6
    assert encoder.config.num_hidden_layers == 6
    tensors = dict(model.named_parameters())
    assert torch.equal(
        tensors["encoder.encoder.layer.2.output.dense.weight"], theirs["encoder.layer.5.output.dense.weight"]
    )
    assert torch.equal(tensors["decoder.layers.0.ffn1.fc2.weight"], theirs["encoder.layer.2.output.dense.weight"])


def test_everything_random_takes_nothing() -> None:
    encoder = tiny_encoder()
    model = grow(encoder, random_encoder=True)
    theirs = {name: value for name, value in encoder.named_parameters() if value.dim() == 2}
    ours = dict(model.get_encoder().named_parameters())
    assert not any(torch.equal(ours[name], value) for name, value in theirs.items())
    assert model.init_report.counts()["copied"] == 0


def test_same_seed_same_random_tensors_and_global_generator_untouched() -> None:
    first, second, other = (grow(tiny_encoder(), seed=seed) for seed in (1, 1, 2))
    name = "decoder.layers.3.ffn.fc1.weight"
    a, b, c = (dict(model.named_parameters())[name] for model in (first, second, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    encoder = tiny_encoder()
    state = torch.get_rng_state()
    grow(encoder)
    assert torch.equal(state, torch.get_rng_state())


def test_unexpected_random_tensor_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = growing.decoder_sources

    def forgetful(config: Any) -> dict[str, str]:
        return {k: v for k, v in real(config).items() if k != "decoder.layers.1.cross_attention.k_proj.weight"}

    monkeypatch.setattr(growing, "decoder_sources", forgetful)
    with pytest.raises(ModelError, match=r"layers\.1\.cross_attention\.k_proj\.weight would stay random"):
        grow(tiny_encoder())


def test_overwritten_copy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "_transfer", lambda *_: None)
    with pytest.raises(ModelError, match="was not taken from"):
        grow(tiny_encoder())


def test_unsupported_encoder_is_refused_with_the_list() -> None:
    encoder = T5EncoderModel(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ModelError, match=r"'t5' cannot donate.*(?s:.)*bert, roberta, xlm-roberta"):
        grow(encoder)


def test_relative_positions_are_refused() -> None:
    from enc2gen.encoders.donor import donor_for

    config = BertConfig()
    config.position_embedding_type = "relative_key"
    with pytest.raises(ModelError, match="relative_key"):
        donor_for(config)


def test_from_folder_adds_languages_to_vocabulary_and_tokenizer(encoder_folder: Path, tmp_path: Path) -> None:
    model = grow(encoder_folder, languages=["kk", "ug"])
    assert model.tokenizer is not None
    assert model.config.language_ids == {tag: model.tokenizer.convert_tokens_to_ids(f"<{tag}>") for tag in ("kk", "ug")}
    model.save_pretrained(tmp_path / "m")
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert loaded.convert_tokens_to_ids("<ug>") == model.config.language_ids["ug"]


def test_masked_lm_checkpoint_and_loaded_task_model_are_welcome(tmp_path: Path) -> None:
    config = tiny_encoder().config
    masked = XLMRobertaForMaskedLM(config)
    masked.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for source in (masked, tmp_path):
        model = grow(source)
        word = model.get_input_embeddings().weight
        assert torch.equal(word, masked.roberta.embeddings.word_embeddings.weight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"insert_every": 0}, ConfigError, "insert_every=0"),
        ({"copy": ["attention"]}, ConfigError, r"copy\.0='attention'(?s:.)*cross_attention"),
        ({"sharing": "teid", "growth": "deltaml"}, ConfigError, r"growth='deltaml'(?s:.)*sharing='teid'"),
        ({"donor_layers": [9]}, ConfigError, r"donor layers \[9\]"),
        ({"encoder_layers": [3, 1]}, ConfigError, "strictly increasing"),
        ({"encoder_layers": [0, 4]}, ConfigError, "0 to 3"),
        ({"growth": "deltalm", "donor_layers": [0, 1, 2]}, ConfigError, "even number"),
        ({"languages": ["klingonish"]}, LanguageError, "klingonish"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grow(tiny_encoder(), **options)


def test_unknown_name_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no encoder can be loaded") as caught:
        grow(str(tmp_path / "nothing"))
    assert "embedded:multilingual-e5-small" in str(caught.value)


def test_truncated_weights_are_refused(encoder_folder: Path) -> None:
    weights = encoder_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        grow(encoder_folder)


def test_tokenizer_larger_than_table_is_refused() -> None:
    with pytest.raises(ModelError, match="embedding table only 40 rows"):
        grow(tiny_encoder(vocabulary=40), tokenizer=tiny_tokenizer())


def test_pre_norm_copies_warn() -> None:
    with pytest.warns(UserWarning, match="lose their meaning"):
        grow(tiny_encoder(), norm_order="pre")


def test_a_narrow_norm_below_the_lm_head_warns() -> None:
    def encoder(gain: float) -> Any:
        made = tiny_encoder()
        with torch.no_grad():
            for layer in made.encoder.layer:
                layer.output.LayerNorm.weight.fill_(gain)
        return made

    with pytest.warns(UserWarning, match=r"gains of about 0\.30, after .* use top_norm='unit', or have a normal layer"):
        grow(encoder(0.3), insert_every=None)
    with pytest.warns(UserWarning, match=r"use top_norm='unit'$"):
        grow(encoder(0.3), insert_every=1, fresh_output="zero")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grow(encoder(0.3), insert_every=None, top_norm="unit")
        grow(encoder(0.3).double(), insert_every=None, top_norm="unit")
        grow(encoder(0.3), insert_every=1)  # a normal layer on top
        grow(encoder(0.3), insert_every=None, copy=["embeddings"])
        grow(encoder(0.6), insert_every=None)


def test_loaded_bert_without_its_tokenizer_grows_with_a_warning() -> None:
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    encoder = BertModel(config)
    with pytest.warns(UserWarning, match="no end token is known"):
        model = grow(encoder, languages=["kk"])
    ids = torch.randint(4, 50, (2, 5))
    assert model.generate(ids, target_language="kk", max_new_tokens=3).shape == (2, 4)
    with pytest.warns(UserWarning), pytest.raises(LanguageError, match=r"(?s)no start token.*decoder_start_token_id"):
        grow(encoder).generate(ids)
