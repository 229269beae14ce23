"""Glossaries: which terms are asked for, how they are spelled, and that outputs keep to them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import tiny_tokenizer
from enc2gen import DecodingConfig, Generator, SwcmForConditionalGeneration
from enc2gen.errors import ConfigError, DataError
from enc2gen.generation.glossary import Entry, Glossary, Terms
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
    assert banned(pieces, "a b", "▁a", "▁") == {"b"} and banned(pieces, "a b", "▁a") == {"▁b"}


def subwords(kind: str) -> PreTrainedTokenizerFast:
    """A WordPiece or a byte-level tokenizer."""
    if kind == "wordpiece":
        vocabulary = {
            piece: i for i, piece in enumerate(["[UNK]", "ca", "##t", "cat", "##cat", "t", "##ca", "s", "##s"])
        }
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    else:
        vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "c", "a", "t", "Ġ", "ca", "Ġca", "Ġcat", "s"])}
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
