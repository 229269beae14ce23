"""Pretrained encoder-decoders as baselines: built, trained, saved, loaded and generated with by the same machinery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    NllbTokenizer,
    T5Tokenizer,
)

from conftest import LETTERS, tiny_encoder
from enc2gen.data.batching import EncodedExample, collate
from enc2gen.errors import ConfigError, ModelError
from enc2gen.experiments.recipe import load_recipe
from enc2gen.experiments.run import Run
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.generator import Generator
from enc2gen.models.baselines import build_system
from enc2gen.models.pretrained import own_code
from enc2gen.tokenization.layout import TextLayout
from enc2gen.tokenization.tokenizer import TextCodec
from test_run import recipe_content, write_pairs

PIECES = ["▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS[:10])]
SCORED = [(piece, -float(index % 7)) for index, piece in enumerate(PIECES)]
SIZE: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 2,
    "bos_token_id": 0,
}  # fmt: skip


def _mt5() -> tuple[Any, Any]:
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *SCORED], extra_ids=0)
    config = MT5Config(
        vocab_size=len(tokenizer) + 5, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return MT5ForConditionalGeneration(config), tokenizer


def _mbart50() -> tuple[Any, Any]:
    tokenizer = MBart50Tokenizer(vocab=[("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *SCORED], src_lang="en_XX")
    config = MBartConfig(vocab_size=len(tokenizer), decoder_start_token_id=2, forced_eos_token_id=2, **SIZE)
    return MBartForConditionalGeneration(config), tokenizer


def _mbart() -> tuple[Any, Any]:
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    tokenizer = MBartTokenizer(vocab=[*special, *SCORED, ("en_XX", 0.0), ("kk_KZ", 0.0)], src_lang="en_XX")
    start = tokenizer.convert_tokens_to_ids("kk_KZ")
    config = MBartConfig(vocab_size=len(tokenizer), decoder_start_token_id=start, **SIZE)
    return MBartForConditionalGeneration(config), tokenizer


def _nllb() -> tuple[Any, Any]:
    vocabulary = {token: index for index, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", *PIECES))}
    tokenizer = NllbTokenizer(vocab=vocabulary, merges=[("▁", letter) for letter in LETTERS[:10]])
    config = M2M100Config(vocab_size=len(tokenizer), decoder_start_token_id=2, **SIZE)
    return M2M100ForConditionalGeneration(config), tokenizer


KINDS = {"mt5": _mt5, "mbart50": _mbart50, "mbart": _mbart, "nllb": _nllb}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model, tokenizer = KINDS[request.param]()
    model.save_pretrained(tmp_path / request.param)
    tokenizer.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def built(folder: Path, languages: list[str], **options: Any) -> Any:
    return build_system(
        "pretrained", None, tokenizer=None, languages=languages, seed=0, options={"name": str(folder), **options}
    )


def codec_of(model: Any) -> TextCodec:
    layout = TextLayout.of(model.config)
    return TextCodec(model.tokenizer, model.config.languages, max_source_length=20, max_target_length=20, layout=layout)


@pytest.mark.parametrize("folder", ["mbart50", "nllb", "mbart"], indirect=True)
def test_texts_are_laid_out_as_the_models_own_tokenizer_does(folder: Path) -> None:
    model, own = built(folder, ["kk", "en"]), AutoTokenizer.from_pretrained(folder)
    codes = {tag: own_code(own, tag) for tag in ("kk", "en")}
    assert codes in ({"kk": "kk_KZ", "en": "en_XX"}, {"kk": "kaz_Cyrl", "en": "eng_Latn"})
    own.src_lang, own.tgt_lang = codes["en"], codes["kk"]
    expected = own("abc de", text_target="жз бв")
    codec = codec_of(model)
    assert codec.encode_source("abc de", "en") == expected["input_ids"]
    inputs, labels = codec.encode_target("жз бв", "kk")
    made: dict[str, list[int]] = {}  # the decoder inputs that the model makes of labels
    model.model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: made.update(ids=kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    model(input_ids=torch.tensor([[5]]), labels=torch.tensor([expected["labels"]]))
    shifted = made["ids"]
    if folder.name == "mbart":  # its labels end in the language, which its decoder starts from
        assert inputs == shifted[:-1] and labels == expected["labels"][:-1]
    else:
        assert inputs == shifted and labels == [-100, *expected["labels"][1:]]
    assert codec.decode(labels) == "жз бв"
    assert len(model.tokenizer) == len(own), "the vocabulary is as it was"


@pytest.mark.parametrize("folder", ["mt5", "nllb"], indirect=True)
def test_languages_without_a_code_get_tokens_of_our_kind(folder: Path) -> None:
    before = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tag = "tlh" if folder.name == "nllb" else "kk"  # Klingon
    model = built(folder, [tag])
    index = model.config.languages[tag]
    assert model.tokenizer.convert_ids_to_tokens(index) == f"<{tag}>" and index >= len(
        AutoTokenizer.from_pretrained(folder)
    )
    start = model.config.decoder_start_token_id
    codec = codec_of(model)
    inputs, labels = codec.encode_target("ab", tag)
    assert inputs[:2] == [start, index] and labels[0] == -100 and labels[-1] == model.tokenizer.eos_token_id
    assert codec.encode_source("ab", tag) == [index, *codec.encode_text("ab"), model.tokenizer.eos_token_id]
    for mine, theirs in (
        (model.get_input_embeddings(), before.get_input_embeddings()),
        (model.lm_head, before.lm_head),
    ):
        rows = min(index, len(theirs.weight))
        assert torch.equal(mine.weight[:rows], theirs.weight[:rows])
        if index < len(theirs.weight):  # a row that no token had
            assert not torch.equal(mine.weight[index], theirs.weight[index])
        usual = theirs.weight.detach()[:rows].norm(dim=1).mean()
        assert mine.weight[index].detach().norm() == pytest.approx(float(usual), rel=0.7)
    again = built(folder, [tag])
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("folder", [*KINDS], indirect=True)
def test_a_recipe_trains_evaluates_and_writes(folder: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.tsv")
    encoder = tmp_path / "encoder"
    tiny_encoder().save_pretrained(encoder)
    content = recipe_content(tmp_path, encoder)
    del content["pretrain"]
    content["finetune"]["training"] |= {"max_steps": 2, "eval_every": 2}
    content["systems"] = {"base": {"preset": "pretrained", "options": {"name": str(folder), "dropout": 0.0}}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    root = Run(load_recipe(path), Console(quiet=True)).run()
    metrics = json.loads((root / "metrics.json").read_text())
    assert metrics["systems"]["base"]["kk"]["chrf++"]["n"] > 2 and metrics["training"]["base/finetune"]["steps"] == 2
    assert not (root / "encoders").exists(), "its vocabulary is its own"
    assert str(folder.name) in (root / "model" / "README.md").read_text()
    generator = Generator.from_pretrained(root / "model")
    config = DecodingConfig(num_beams=2, max_new_tokens=5)
    assert len(generator.generate(["abc", "d"], target_language="kk", config=config)) == 2
    # what it writes is what the model writes after its own start, in plain transformers
    model, codec = generator.model, generator.codec
    ids = torch.tensor([codec.encode_source("abc", "en")])
    start = torch.tensor([codec.start("kk")])
    expected = model.generate(input_ids=ids, decoder_input_ids=start, num_beams=2, max_new_tokens=5)[0]
    assert expected[: start.shape[1]].tolist() == start[0].tolist()
    written = generator.generate(["abc"], target_language="kk", source_language="en", config=config)
    assert written == [codec.decode(expected[start.shape[1] :].tolist())]
    default = model.generate(input_ids=ids, num_beams=2, max_new_tokens=6)[0]
    assert default[: start.shape[1]].tolist() == start[0].tolist(), "the one language of the recipe is the default"


@pytest.mark.parametrize("folder", ["mbart50"], indirect=True)
def test_another_run_goes_on_from_its_result(folder: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.tsv")
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    content = recipe_content(tmp_path, tmp_path / "encoder")
    content["encoder"] = {"name": str(tmp_path / "encoder")}
    del content["finetune"]  # denoising and translation, with the tokenizer's own mask
    content["pretrain"]["training"] |= {"max_steps": 2}
    content["systems"] = {"base": {"preset": "pretrained", "options": {"name": str(folder)}}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    first = Run(load_recipe(path), Console(quiet=True)).run(["pretrain"]) / "systems" / "base" / "pretrained"
    content |= {"output": str(tmp_path / "second"), "finetune": content.pop("pretrain")}
    content["systems"] = {"more": {"start": str(first)}}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    second = Run(load_recipe(path), Console(quiet=True)).run(["evaluate"]) / "systems" / "more" / "finetuned"
    one, two = (Generator.from_pretrained(model) for model in (first, second))
    assert one.codec.layout == two.codec.layout and one.codec.start("kk") == two.codec.start("kk")
    assert not torch.equal(one.model.lm_head.weight, two.model.lm_head.weight)


@pytest.mark.parametrize("folder", ["nllb"], indirect=True)
def test_the_language_asked_for_is_written(folder: Path) -> None:
    """A model taught to end at once in one language and to go on in the other does so through the generator."""
    model = built(folder, ["kk", "en"], dropout=0.0)
    codec = codec_of(model)
    rows = []
    for language, text in (("kk", "жж"), ("en", "ab")):
        inputs, labels = codec.encode_target(text, language)
        rows.append(EncodedExample(tuple(codec.encode_source("cd", "en")), tuple(inputs), tuple(labels)))
    batch = collate(rows, codec.pad_id).as_model_inputs()
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    generator = Generator(model, model.tokenizer)
    config = DecodingConfig(num_beams=1, max_new_tokens=6)
    for language, text in (("kk", "жж"), ("en", "ab")):
        assert generator.generate(["cd"], target_language=language, source_language="en", config=config) == [text]


def test_codes_of_languages() -> None:
    nllb = _nllb()[1]
    expected = {
        "kk": "kaz_Cyrl", "mn": "khk_Cyrl", "ug": "uig_Arab", "bo": "bod_Tibt", "zh": "zho_Hans", "sw": "swh_Latn",
        "zh-Hant": "zho_Hant", "ar": "arb_Arab", "ha": "hau_Latn", "kk-Arab": None, "mn-Mong": None, "fa": None,
    }  # fmt: skip
    found = {tag: own_code(nllb, tag) for tag in expected}
    assert found | {"fa": None} == expected
    mbart = _mbart50()[1]
    assert [own_code(mbart, tag) for tag in ("kk", "zh", "ug", "mn")] == ["kk_KZ", "zh_CN", None, "mn_MN"]
    assert own_code(_mt5()[1], "kk") is None


def test_what_cannot_be_taken_is_refused(tmp_path: Path, encoder_folder: Path) -> None:
    with pytest.raises(ConfigError, match="needs the option name"):
        build_system("pretrained", None, tokenizer=None, languages=["kk"], seed=0)
    with pytest.raises(ModelError, match="not an encoder-decoder"):
        built(encoder_folder, ["kk"])
    with pytest.raises(ModelError, match="no model can be loaded"):
        built(tmp_path / "nothing", ["kk"])
    with pytest.raises(ConfigError, match="needs an encoder"):
        build_system("swcm", None, tokenizer=None, languages=["kk"], seed=0)
