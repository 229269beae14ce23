"""Glossaries: which terms are asked for, how they are spelled, and that outputs keep to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import tiny_tokenizer
from enc2gen import DecodingConfig, Generator, SwcmForConditionalGeneration
from enc2gen.cli.generate import generate_lines
from enc2gen.errors import ConfigError, DataError, Enc2genError
from enc2gen.generation import blocks, scaling
from enc2gen.generation.blocks import Job
from enc2gen.generation.glossary import Entry, Glossary, Terms
from enc2gen.generation.scaling import generate_to_file, write_on_ray
from enc2gen.generation.shortlist import Shortlist
from enc2gen.generation.spelling import Spelling

GLOSSARY = "new york\tнью йорк\nyork\tйорк\ncat\tкот\ncat\tпёс\tforbidden\n\n北京\tпекин\n"


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_terms_count_where_they_occur(tmp_path: Path) -> None:
    glossary = Glossary.from_file(written(tmp_path / "terms.tsv", GLOSSARY)).with_forbidden(["зря"])
    assert glossary.terms("A Cat, in New  York.") == Terms(("нью йорк", "кот"), ("пёс", "зря"))
    assert glossary.terms("York and new york") == Terms(("нью йорк", "йорк"), ("зря",))
    assert glossary.terms("concatenate cats; Yorkshire") == Terms((), ("зря",))
    assert glossary.terms("我住在北京市").required == ("пекин",)


def required(source: str, *terms: str) -> tuple[str, ...]:
    """Which of `terms` count in a source."""
    return Glossary([Entry(term, term) for term in terms]).terms(source).required


@pytest.mark.parametrize(("term", "longer"), [("का", "काम करो"), ("கா", "காலம்"), ("කා", "කාලය"), ("cat", "catalog")])
def test_a_vowel_sign_does_not_end_a_word(term: str, longer: str) -> None:
    assert required(longer, term) == () and required(f"({term}) {longer}", term) == (term,)


def test_terms_that_differ_in_capitals_are_told_apart() -> None:
    glossary = Glossary(
        [Entry("Polish", "поляк"), Entry("polish", "жылтырату"), Entry("Cat", "а"), Entry("cat", "b", True)]
    )
    assert glossary.terms("please polish it, the cat sat") == Terms(("жылтырату",), ("b",))
    assert glossary.terms("Polish, polish  Cat") == Terms(("поляк", "жылтырату", "а"))
    assert glossary.terms("POLISH") == Terms(("поляк", "жылтырату"))
    assert required("Istanbul, İstanbul", "istanbul") == required("İstanbul", "istanbul") == ("istanbul",)


def test_a_term_does_not_go_on_across_a_longer_one() -> None:
    assert required("a big New York city", "New York", "big city") == ("New York",)
    assert required("a big city", "New York", "big city") == ("big city",)
    assert required("我住北京市", "北京", "住 市") == ("北京",)


@pytest.mark.parametrize(("source", "term"), [("un e\u0301le\u0300ve.", "Élève"), ("un élève.", "E\u0301le\u0300ve")])
def test_accents_are_the_same_however_they_are_encoded(source: str, term: str) -> None:
    assert required(source, term) == (term,)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    glossary = Glossary.from_file(written(tmp_path / "terms.tsv", "a\u2028b\tx\u0085y\r\nc\td\r\n"))
    assert glossary.entries == (Entry("a b", "x y"), Entry("c", "d"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat кот\n", r"terms\.tsv, line 1: 1 columns(?s:.)*tab"),
        ("a\tb\ncat\t \n", "line 2: the target term is empty"),
        ("\tb\n", "the source term is empty"),
        ("a\tb\tnever\n", "'never' in the third column"),
        ("\n", "there is no term"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Glossary.from_file(written(tmp_path / "terms.tsv", content))
    with pytest.raises(DataError, match="cannot be read"):
        Glossary.from_file(tmp_path / "nothing.tsv")


def banned(tokenizer: PreTrainedTokenizerFast, term: str, *pieces: str) -> set[str]:
    """Pieces that must not follow `pieces`."""
    start = [0, *tokenizer.convert_tokens_to_ids(list(pieces))]
    (found,) = Spelling(tokenizer).never([term])([start])
    return set(tokenizer.convert_ids_to_tokens(sorted(found)))


def test_every_way_to_split_a_forbidden_term_is_forbidden() -> None:
    pieces = tiny_tokenizer()
    assert banned(pieces, "cat", "▁c", "a") == banned(pieces, "cat", "▁", "c", "a") == {"t"}
    assert banned(pieces, "cat", "▁c") == banned(pieces, "cat", "t", "a") == set()
    assert banned(pieces, "cat", "a", "c", "a") == set()  # within a word
    assert banned(pieces, "a") == {"▁a", "a"} and banned(pieces, "a", "▁b") == {"▁a"}
    assert banned(pieces, "a b", "▁a", "▁") == {"b", "▁b"}, "two spaces are one in the file that is written"
    assert banned(pieces, "a b", "▁a") == {"▁b"}


def unigram(*pieces: str, falls_back: bool = False) -> PreTrainedTokenizerFast:
    """A SentencePiece tokenizer of these pieces, and of the 256 bytes on request."""
    chosen = ["<unk>", "<s>", *pieces, *(f"<0x{byte:02X}>" for byte in range(256 if falls_back else 0))]
    scored = [(piece, -float(place)) for place, piece in enumerate(chosen)]
    backend = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=falls_back))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.ByteFallback(), decoders.Fuse()] if falls_back else []
    backend.decoder = decoders.Sequence([*steps, decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def test_a_word_goes_on_after_a_vowel_sign() -> None:
    pieces = unigram("▁का", "का", "▁इला", "▁मौ", "▁", "ा", "क", "▁क", ",")
    assert banned(pieces, "का", "▁इला") == banned(pieces, "का", "▁मौ") == {"▁का"}
    assert banned(pieces, "का", "▁इला", "क") == {"▁का"} and banned(pieces, "का", "▁इला", "▁क") == {"▁का", "ा"}
    assert banned(pieces, "का", "▁इला", ",") == {"▁का", "का"}


def test_a_term_may_begin_and_end_within_a_piece() -> None:
    pieces = unigram(
        "▁", "▁cat", "▁(ca", "▁(cat", "▁-(cat,", "t", "t.", "ts", "(cats", "x(cat", "xcat", "cat", "%", "5%"
    )
    always = {"▁cat", "▁(cat", "▁-(cat,", "x(cat"}
    assert banned(pieces, "cat") == {*always, "cat"} and banned(pieces, "cat", "xcat") == always
    assert banned(pieces, "cat", "▁(ca") == {*always, "t", "t."}
    assert banned(pieces, "%", "xcat") == {"%", "5%"}, "it is forbidden after a word, too"


def test_bytes_spell_forbidden_terms_too() -> None:
    pieces = unigram("▁", "▁к", "о", "т", falls_back=True)
    assert banned(pieces, "кот", "▁к", "о") == banned(pieces, "кот", "▁", "<0xD0>", "<0xBA>", "о") == {"т"}
    assert banned(pieces, "кот", "▁к", "о", "<0xD1>") == {"<0x82>"} and banned(pieces, "кот", "▁к", "<0xD1>") == set()
    assert banned(pieces, "漢", "▁", "<0xE6>", "<0xBC>") == {"<0xA2>"}


def subwords(kind: str) -> PreTrainedTokenizerFast:
    """A WordPiece or a byte-level tokenizer."""
    if kind == "wordpiece":
        vocabulary = {
            piece: i for i, piece in enumerate(["[UNK]", "ca", "##t", "cat", "##cat", "t", "##ca", "s", "##s"])
        }
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    else:
        vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "c", "a", "t", "Ġ", "ca", "Ġca", "Ġcat", "s", "Ð°"])}
        merges = [("c", "a"), ("Ġ", "ca"), ("Ġca", "t")]
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="[UNK]"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def test_other_tokenizers_are_spelled_too() -> None:
    words, units = subwords("wordpiece"), subwords("bytes")
    assert banned(words, "cat", "s") == {"cat"} and banned(words, "cat", "ca") == {"cat", "##t"}
    assert banned(words, "cat", "s", "##ca") == {"cat"}
    assert banned(units, "cat") == {"Ġcat"} and banned(units, "cat", "Ġca") == banned(units, "cat", "ca") == {
        "Ġcat",
        "t",
    }
    assert banned(units, "cat", "Ġ", "c", "a") == {"Ġcat", "t"} and banned(units, "cat", "s", "ca") == {"Ġcat"}
    assert banned(units, "a") == {"a"} and banned(units, "a", "Ð°") == set(), "Ð° is the Cyrillic а, within a word"
    (spelled,) = Spelling(units).phrase("cat").spellings
    assert units.convert_ids_to_tokens(list(spelled)) == ["Ġcat"]


def test_scripts_without_spaces_have_terms_anywhere() -> None:
    pieces = ["<unk>", "▁", "北", "京", "北京", "市", "京市", "▁北京市", "<s>"]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    assert banned(tokenizer, "北京", "市") == {"北京", "▁北京市"}
    assert banned(tokenizer, "北京", "市", "北") == {"北京", "▁北京市", "京", "京市"}
    with pytest.raises(DataError, match="cannot spell '上海'"):
        Spelling(tokenizer).phrase("上海")


@pytest.fixture
def generator(encoder_folder: Path) -> Generator:
    model = SwcmForConditionalGeneration.from_encoder(encoder_folder, languages=["en", "kk"], verbose=False)
    model.generation_config.max_new_tokens = 16
    model.save_pretrained(encoder_folder.parent / "model")
    return Generator.from_pretrained(encoder_folder.parent / "model")


SOURCES = ["a cat in new york", "nothing", "york", ""]


def test_outputs_keep_to_the_glossary(generator: Generator, tmp_path: Path) -> None:
    glossary = Glossary.from_file(written(tmp_path / "terms.tsv", GLOSSARY.replace("пёс", "пес")))
    plain = generator.generate_n_best(SOURCES, 2, target_language="kk")
    held = generator.generate_n_best(SOURCES, 2, target_language="kk", glossary=glossary)
    assert [output.text for output in held[1]] == [output.text for output in plain[1]] and held[3][0].text == ""
    for output in held[0]:
        assert "нью йорк" in output.text and "кот" in output.text and output.unmet == ()
    assert all("йорк" in output.text for output in held[2])
    assert generator.generate(SOURCES, target_language="kk", glossary=glossary) == [found[0].text for found in held]
    short = DecodingConfig(max_new_tokens=4)
    cut = generator.generate_n_best(SOURCES[:1], target_language="kk", glossary=glossary, config=short)[0][0]
    assert "кот" in cut.text and cut.unmet == ("нью йорк",) and not cut.ended


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 1}, {"num_beams": 1, "do_sample": True}])
def test_forbidden_terms_are_not_written(generator: Generator, settings: dict[str, int]) -> None:
    config = DecodingConfig(**settings)  # type: ignore[arg-type]
    texts = ["abc", "de fg", "h"]
    plain = generator.generate(texts, target_language="kk", config=config, seed=1)
    words = [text.split()[0][:3] for text in plain]
    glossary = Glossary([Entry("", word, forbidden=True) for word in words])
    held = generator.generate(texts, target_language="kk", config=config, seed=1, glossary=glossary)
    assert not any(word.startswith(tuple(words)) for text in held for word in text.split())


def test_required_terms_need_beams(generator: Generator) -> None:
    glossary = Glossary([Entry("cat", "кот")])
    with pytest.raises(ConfigError, match=r"requires 'кот'(?s:.)*num_beams"):
        generator.generate(["cat"], target_language="kk", glossary=glossary, config=DecodingConfig(num_beams=1))
    with pytest.raises(ConfigError, match="leave out glossary"):
        generator.generate(
            ["cat"], target_language="kk", glossary=glossary, config=DecodingConfig(engine="transformers")
        )


def test_a_required_term_that_a_forbidden_one_rules_out_is_left_out(generator: Generator) -> None:
    glossary = Glossary([Entry("cat", "ко", forbidden=True), Entry("kitten", "кот"), Entry("kitten", "һ")])
    only = Glossary([*glossary.entries[:1], *glossary.entries[2:]])
    outputs = [
        generator.generate_n_best(["cat kitten", "kitten"], target_language="kk", glossary=one)
        for one in (glossary, only)
    ]
    assert outputs[0][0][0].text == outputs[1][0][0].text and outputs[0][0][0].unmet == ("кот",)
    assert "кот" in outputs[0][1][0].text and outputs[0][1][0].unmet == ()


def test_a_shortlist_has_the_tokens_of_required_terms(generator: Generator) -> None:
    ids = generator.tokenizer.convert_tokens_to_ids
    glossary = Glossary([Entry("cat", "ко")])
    for tokens, spelled in ((["▁", "к", "о"], True), (["▁", "к"], False)):
        shortlist = Shortlist(len(generator.tokenizer), {"kk": [2, *ids(tokens)]})
        limited = Generator(generator.model, generator.tokenizer, shortlist=shortlist)
        if spelled:
            assert "ко" in limited.generate(["cat"], target_language="kk", glossary=glossary)[0]
        else:
            with pytest.raises(DataError, match=r"shortlist lacks tokens of 'ко'(?s:.)*enc2gen shortlist"):
                limited.generate(["cat"], target_language="kk", glossary=glossary)


LINES = ["abc"] * 5 + ["cat"]
FAST = DecodingConfig(num_beams=2, max_new_tokens=3, batch_size=2)


@pytest.mark.parametrize(
    ("target", "changes", "kind", "message"),
    [
        ("漢", {}, DataError, "cannot spell '漢'"),
        ("к", {"num_beams": 1}, ConfigError, "requires 'к'"),
        ("к", {"coverage_penalty": 0.1}, ConfigError, "without coverage_penalty"),
    ],
)
def test_a_glossary_that_cannot_be_kept_to_is_refused_before_anything_is_written(
    generator: Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    changes: dict[str, float],
    kind: type[Enc2genError],
    message: str,
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_LINES", 2)
    output, config = tmp_path / "out.txt", FAST.model_copy(update=changes)
    wrong = Job(str(tmp_path / "model"), "kk", "en", config, glossary=Glossary([Entry("cat", target)]))
    seen: list[int] = []
    with pytest.raises(kind, match=message):
        generate_to_file(wrong, LINES, output, on_progress=seen.append)
    assert not any(seen) and not (tmp_path / "out.txt.parts").exists()
    with pytest.raises(kind, match=message):
        generator.generate(LINES, target_language="kk", config=config, glossary=wrong.glossary, on_batch=seen.append)
    assert not any(seen)
    right = Job(str(tmp_path / "model"), "kk", "en", FAST, glossary=Glossary([Entry("cat", "к")]))
    generate_to_file(right, LINES, output, on_progress=seen.append)
    assert "к" in output.read_text(encoding="utf-8").splitlines()[-1] and seen[-1] == 6


def test_a_cluster_is_not_started_for_a_glossary_that_cannot_be_kept_to(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def session(workers: Sequence[object]) -> None:
        raise AssertionError("the cluster is started")

    monkeypatch.setattr(scaling, "ray_session", session)
    job = Job(str(tmp_path / "model"), "kk", "en", FAST, glossary=Glossary([Entry("cat", "漢")]))
    with pytest.raises(DataError, match="cannot spell '漢'"):
        list(write_on_ray(job, job.blocks(LINES), 2, lambda done: None))


@pytest.mark.parametrize("to_file", [True, False])
def test_missing_terms_and_cut_outputs_are_told_of(generator: Generator, tmp_path: Path, to_file: bool) -> None:
    source, said = tmp_path / "in.txt", StringIO()
    source.write_text("cat\n\ncat\n", encoding="utf-8")
    short = FAST.model_copy(update={"max_new_tokens": 2})
    job = Job(str(tmp_path / "model"), "kk", "en", short, glossary=Glossary([Entry("cat", "кот")]))
    generate_lines(job, source, tmp_path / "out.txt" if to_file else None, Console(file=said, width=200))
    assert said.getvalue().splitlines() == [
        "warning: 2 lines with an output cut at the longest length (--max-new-tokens)",
        "warning: 2 lines with an output that lacks a required term; --json names it",
    ]
    long = replace(job, config=FAST.model_copy(update={"max_new_tokens": 40}))
    told = StringIO()
    generate_lines(long, source, tmp_path / "long.txt" if to_file else None, Console(file=told, width=200))
    assert "required" not in told.getvalue()
