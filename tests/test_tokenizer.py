"""Language tokens, encoding and decoding, on Unigram (XLM-R-like) and WordPiece (BERT-like) tokenizers."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram, WordPiece
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from enc2gen.errors import ConfigError, DataError, LanguageError, ModelError
from enc2gen.tokenization.charsmap import character_map, precompiled_charsmap
from enc2gen.tokenization.tokenizer import (
    TextCodec,
    add_language_tokens,
    language_token,
    protect_special_tokens,
)

LETTERS = [*string.ascii_letters, "<", ">", "/", "[", "]", "."]


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """As tokenizers come from a hub: control tokens are pieces of the model, and nothing guards them."""
    pieces = [(t, 0.0) for t in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces += [("▁", -3.0), *((c, -6.0) for c in LETTERS), ("▁the", -4.0), ("▁cat", -5.0)]
    backend = Tokenizer(Unigram([*pieces, ("<mask>", 0.0)], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def wordpiece_tokenizer(*, split_punctuation: bool = True) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    words += [*LETTERS, *(f"##{c}" for c in LETTERS)]
    backend = Tokenizer(WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer() if split_punctuation else pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


def codec(
    tokenizer: PreTrainedTokenizerBase, *, source: int = 32, target: int = 32, overflow: str = "truncate"
) -> TextCodec:
    languages = add_language_tokens(tokenizer, ["kk", "ug"])
    return TextCodec(tokenizer, languages, max_source_length=source, max_target_length=target, overflow=overflow)


KINDS = pytest.mark.parametrize("build", [unigram_tokenizer, wordpiece_tokenizer])


# --- language tokens ---


def test_language_token() -> None:
    assert language_token("kk") == "<kk>"
    assert language_token("zh-Hant") == "<zh-Hant>"


@pytest.mark.parametrize("tag", ["", "s", "/s", "kk>", "k k", "қаз"])
def test_malformed_tags_are_refused(tag: str) -> None:
    with pytest.raises(LanguageError, match="not a language tag"):
        language_token(tag)


@KINDS
def test_language_tokens_are_appended_once(build) -> None:
    tokenizer = build()
    size = len(tokenizer)
    ids = add_language_tokens(tokenizer, ["kk", "ug"])
    assert ids == {"kk": size, "ug": size + 1}
    assert add_language_tokens(tokenizer, ["ug", "mn", "kk"]) == {"ug": size + 1, "mn": size + 2, "kk": size}
    assert len(tokenizer) == size + 3
    assert set(ids.values()) < set(tokenizer.all_special_ids)


def test_an_ordinary_added_token_becomes_a_language_token_that_text_cannot_spell(tmp_path: Path) -> None:
    tokenizer = unigram_tokenizer()
    tokenizer.add_tokens([AddedToken(f"<{name}>", special=False, normalized=False) for name in ("tr", "td")])
    before = tokenizer.get_added_vocab()
    ids = add_language_tokens(tokenizer, ["tr", "kk"])
    assert ids == {"tr": before["<tr>"], "kk": max(before.values()) + 1}
    made = TextCodec(tokenizer, ids, max_source_length=64, max_target_length=64)
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for one in (made, TextCodec(saved, ids, max_source_length=64, max_target_length=64)):
        assert not set(one.encode_text("<tr>cat</tr>")) & set(ids.values())
        assert before["<td>"] in one.encode_text("<td>")
        assert one.decode(one.encode_source("<tr>cat</tr>", "tr")) == "<tr>cat</tr>"


def test_without_an_unknown_token_the_word_none_stays_whole() -> None:
    pieces = [("<pad>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((c, -6.0) for c in LETTERS), ("▁None", -4.0)]
    backend = Tokenizer(Unigram(pieces, unk_id=1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    protected = protect_special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>"))
    assert protected.encode("None <pad>", add_special_tokens=False).tokens == ["▁None", "▁", "<", "p", "a", "d", ">"]


def test_language_token_must_not_take_another_role() -> None:
    with pytest.raises(LanguageError, match=r"<pad>.*pad_token(.|\n)*pad-Latn"):
        add_language_tokens(unigram_tokenizer(), ["kk", "pad"])


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(ModelError, match="fast tokenizer"):
        add_language_tokens(ByT5Tokenizer(), ["kk"])
    with pytest.raises(ModelError, match="fast tokenizer"):
        TextCodec(ByT5Tokenizer(), {}, max_source_length=8, max_target_length=8)


# --- encoding ---


def test_layout_of_sources_and_targets() -> None:
    tokenizer = unigram_tokenizer()
    text = codec(tokenizer)
    kk, ug = text.languages["kk"], text.languages["ug"]
    pieces = tokenizer.convert_tokens_to_ids(["▁the", "▁cat"])
    assert text.encode_text("the cat") == pieces
    assert text.encode_source("the cat", "kk") == [0, kk, *pieces, 2]
    assert text.encode_source("the cat", None) == [0, *pieces, 2]
    assert text.encode_target("the cat", "ug") == ([ug, *pieces], [*pieces, 2])
    assert text.encode_target("", "ug") == ([ug], [2])


def test_bert_tokenizers_start_with_cls_and_end_with_sep() -> None:
    tokenizer = wordpiece_tokenizer()
    text = codec(tokenizer)
    cls, sep = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"])
    pieces = tokenizer.convert_tokens_to_ids(["the", "cat", "##s"])
    assert text.encode_source("the cats", "kk") == [cls, text.languages["kk"], *pieces, sep]
    assert (text.start_id, text.end_id, text.pad_id) == (cls, sep, 0)


@KINDS
def test_batches_equal_single_texts(build) -> None:
    text = codec(build(), source=8, target=5)
    texts = ["the cat", "", "cats", "a b c d e f g h i", "<kk> the"]
    assert text.encode_sources(texts, "kk") == [text.encode_source(t, "kk") for t in texts]
    assert text.encode_targets(texts, "kk") == [text.encode_target(t, "kk") for t in texts]


HOSTILE = ["<s>", "</s>", "<pad>", "<unk>", "<mask>", "<kk>", "a<s>b", "the </s> cat <ug>", "<<s>>"]
HOSTILE += ["<s></s>", "[CLS]", "[SEP]", "[PAD] the", "[MASK]", "[UNK]", "a[SEP]b"]


def unguarded_wordpiece() -> PreTrainedTokenizerFast:
    return wordpiece_tokenizer(split_punctuation=False)


@pytest.mark.parametrize("build", [unigram_tokenizer, wordpiece_tokenizer, unguarded_wordpiece])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_never_becomes_special_tokens(build, hostile: str, tmp_path: Path) -> None:
    tokenizer = build()
    text = codec(tokenizer)
    ids = text.encode_text(hostile)
    assert ids and not set(ids) & set(tokenizer.all_special_ids), tokenizer.convert_ids_to_tokens(ids)
    assert "".join(text.decode(ids).split()) == "".join(hostile.split())
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(hostile, add_special_tokens=False).input_ids == ids
    assert codec(again).encode_text(hostile) == ids


@KINDS
def test_protection_is_idempotent(build) -> None:
    tokenizer = build()
    protect_special_tokens(tokenizer)
    once = tokenizer.backend_tokenizer.to_str()
    protect_special_tokens(tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == once


def test_protection_does_not_pile_up_where_text_is_unknown() -> None:
    backend = Tokenizer(Unigram([("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)], unk_id=2))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    protect_special_tokens(tokenizer)
    once = tokenizer.backend_tokenizer.to_str()
    protect_special_tokens(tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == once
    assert tokenizer("a<s>", add_special_tokens=False).input_ids == [3, 2, 2]


def test_truncation_counts_texts_and_keeps_the_end_token() -> None:
    text = codec(unigram_tokenizer(), source=6, target=4)
    source = text.encode_source("the cat the cat the", "kk")
    assert len(source) == 6 and source[-1] == 2
    inputs, labels = text.encode_target("the cat the cat", "kk")
    assert len(inputs) == len(labels) == 4 and labels[-1] == 2 and inputs[1:] == labels[:-1]
    assert text.encode_source("the cat the", "kk")[-1] == 2
    assert text.truncated == 2


def test_overflow_error_names_length_and_limit() -> None:
    text = codec(unigram_tokenizer(), source=6, target=4, overflow="error")
    assert len(text.encode_source("the cat the", "kk")) == 6
    with pytest.raises(DataError, match="source needs 7 tokens, the limit is 6"):
        text.encode_source("the cat the cat", "kk")
    assert len(text.encode_target("the cat the", "kk")[0]) == 4
    with pytest.raises(DataError, match="target needs 5 tokens, the limit is 4"):
        text.encode_target("the cat the cat", "kk")


def test_settings_of_other_callers_do_not_leak_in() -> None:
    tokenizer = unigram_tokenizer()
    text = codec(tokenizer)
    expected = text.encode_texts(["the cat the cat", "the"])
    tokenizer(["the cat the cat"], truncation=True, max_length=3, padding="max_length", split_special_tokens=False)
    assert text.encode_texts(["the cat the cat", "the"]) == expected
    assert text.encode_text("<kk>") and text.languages["kk"] not in text.encode_text("<kk>")


def test_bad_arguments() -> None:
    tokenizer = unigram_tokenizer()
    with pytest.raises(ConfigError, match="max_source_length"):
        codec(tokenizer, source=3)
    with pytest.raises(ConfigError, match="max_target_length"):
        codec(tokenizer, target=1)
    with pytest.raises(ConfigError, match="overflow"):
        codec(tokenizer, overflow="cut")
    text = codec(tokenizer)
    with pytest.raises(LanguageError, match=r"'mn'(.|\n)*kk, ug"):
        text.encode_source("a", "mn")
    with pytest.raises(DataError, match="cannot be encoded"):
        text.encode_text("a\ud800")
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="no pad token"):
        codec(tokenizer)


# --- decoding ---


@KINDS
def test_decoding_stops_at_the_end_and_drops_special_tokens(build) -> None:
    tokenizer = build()
    text = codec(tokenizer)
    inputs, labels = text.encode_target("the cat", "kk")
    assert text.decode([*inputs, text.end_id, text.pad_id, *inputs]) == "the cat"
    assert text.decode([*labels[:-1], -100, text.end_id, -100]) == "the cat"
    assert text.decode([]) == ""
    assert text.decode([text.end_id, *inputs]) == ""
    assert text.decode_batch([inputs, labels]) == ["the cat", "the cat"]


def test_decoding_keeps_spaces_before_punctuation() -> None:
    text = codec(unigram_tokenizer())
    assert text.decode(text.encode_text("the cat .")) == "the cat ."


# --- character tables ---


def test_character_map_equals_translate() -> None:
    rng = random.Random(5)
    codes = [*range(0x21, 0x7F), *range(0xA1, 0x180), *range(0x400, 0x460), *range(0x4E00, 0x4E40)]
    alphabet = [chr(code) for code in (*codes, *range(0xFF21, 0xFF3B), 0x0D, 0x1F600, 0x10FFFD)]
    for size in (1, 3, 40, 200):
        keys = rng.sample(alphabet, size)
        table = {key: "".join(rng.choices(alphabet, k=rng.randrange(4))) for key in keys}
        table["\x02"] = ""
        normalise = character_map(table).normalize_str
        marks = ["\u0301", "\u200d", "\u0e33", "\u3099", "\U0001f3fb", "\n"]
        for _ in range(300):
            text = "".join(rng.choices([*alphabet, *marks, "\x02", " "], k=12))
            assert normalise(text) == text.translate(str.maketrans(table)), ascii(text)


@pytest.mark.parametrize("table", [{"ab": "c"}, {"\0": "c"}, {"a": "b\0"}, {"": "a"}])
def test_tables_outside_the_format_are_refused(table: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="one character"):
        precompiled_charsmap(table)
