"""One more language for a trained generator: the old ones lose nothing, and that is measured."""
# ruff: noqa: F811 fixtures have the names of what is imported

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from enc2gen import SwcmForConditionalGeneration
from enc2gen.data.tasks import Example
from enc2gen.errors import DataError, LanguageError, ModelError
from enc2gen.generation.generator import Generator
from enc2gen.models.embedding_init import InitialisationConfig
from enc2gen.models.surgery import add_language, check_examples, load_for_surgery
from enc2gen.tokenization.tokenizer import TextCodec
from test_cli import Result, enc2gen  # noqa: F401
from test_surgery import TIBETAN, generator, masked_model

RANDOM = InitialisationConfig(method="random")
PAIRS = [("abc def", "где дом"), ("the dog", "кот"), ("kit", "где где где")]


def examples(tag: str = "kk") -> list[Example]:
    return [Example(source, target, "en", tag) for source, target in PAIRS]


def bits_per_character(model: SwcmForConditionalGeneration, pairs: list[tuple[str, str]], tag: str) -> float:
    """The definition, one example and one token at a time."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    codec = TextCodec(tokenizer, model.config.language_ids, max_source_length=64, max_target_length=64)
    nats = 0.0
    for source, target in pairs:
        ids = torch.tensor([codec.encode_source(source, "en")])
        read, write = codec.encode_target(target, tag)
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([read])).logits[0]
        for position, label in enumerate(write):
            nats -= (logits[position] - logits[position].logsumexp(0))[label].item()
    return nats / math.log(2) / sum(len(target) for _, target in pairs)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_language_starts_from_its_relative_and_old_rows_stay(tied: bool, tmp_path: Path) -> None:
    model = generator(tied=tied)
    before, tokenizer = copy.deepcopy(model), model.tokenizer
    assert tokenizer is not None
    size = len(tokenizer)
    added = add_language(model, tokenizer, "bo", like="kk")
    assert len(tokenizer) == size  # the caller's own is left alone
    assert set(model.config.languages) == {"en", "kk", "ug", "bo"} and added.token_id == model.config.languages["bo"]
    model.save_pretrained(tmp_path)
    loaded, again = load_for_surgery(tmp_path)
    kk = before.language_id("kk")
    for after in (model, loaded):
        rows, old = after.get_input_embeddings().weight, before.get_input_embeddings().weight
        assert torch.equal(rows[:size], old[:size]) and torch.equal(rows[added.token_id], old[kk])
        assert torch.equal(after.lm_head.weight[added.token_id], before.lm_head.weight[kk])
        assert torch.equal(after.lm_head.bias[:size], before.lm_head.bias[:size])
        assert after.lm_head.bias[added.token_id] == before.lm_head.bias[kk]
        assert (after.lm_head.weight is rows) is tied
    writer = Generator(loaded, again)  # type: ignore[arg-type]
    assert writer.generate(["abc"], target_language="bo") == writer.generate(["abc"], target_language="kk")
    assert writer.generate(["abc", "def"], target_language="kk") == Generator(before, tokenizer).generate(
        ["abc", "def"], target_language="kk"
    )


def test_without_a_relative_the_languages_are_averaged() -> None:
    model = generator()
    ids = sorted(model.config.languages.values())
    mean = model.get_input_embeddings().weight[ids].mean(dim=0)
    added = add_language(model, model.tokenizer, "bo")  # type: ignore[arg-type]
    torch.testing.assert_close(model.get_input_embeddings().weight[added.token_id], mean)


def test_spare_rows_of_the_table_are_used() -> None:
    model = generator(spare_rows=10)
    before = model.get_input_embeddings().weight.detach().clone()
    added = add_language(model, model.tokenizer, "bo", like="kk")  # type: ignore[arg-type]
    after = model.get_input_embeddings().weight
    changed = (after != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [added.token_id] and added.token_id == len(added.tokenizer) - 1 < len(before)


def test_losses_are_bits_per_character_of_the_same_examples() -> None:
    model = generator()
    before = copy.deepcopy(model)
    long = Example("abc", "а" * 500, "en", "kk")
    added = add_language(model, model.tokenizer, "bo", checks={"kk": [*examples(), long]})  # type: ignore[arg-type]
    loss = added.losses[0]
    assert (loss.language, loss.examples, loss.skipped) == ("kk", 3, 1)
    assert loss.before == pytest.approx(bits_per_character(before, PAIRS, "kk"), rel=1e-5)
    assert loss.after == pytest.approx(bits_per_character(model, PAIRS, "kk"), rel=1e-5)
    # One more entry of the softmax can only take probability away, and one in a hundred takes little.
    assert loss.before < loss.after < loss.before + 0.2


def test_pieces_are_added_for_the_new_language_and_tested() -> None:
    model = generator(tied=False)
    before, tokenizer = copy.deepcopy(model), model.tokenizer
    assert tokenizer is not None
    added = add_language(
        model, tokenizer, "bo", TIBETAN, size=30, initialisation=RANDOM, checks={"ug": examples("ug")}, seed=1
    )
    assert added.change is not None and added.change.pieces
    assert added.coverage is not None
    was, now = (report.total for report in added.coverage)
    assert was.unknown_rate > 0.9 and now.unknown_rate == 0.0 and now.round_trip_exact == 1.0
    for new, old in enumerate(added.change.origins):
        if old is not None:
            assert torch.equal(model.get_input_embeddings().weight[new], before.get_input_embeddings().weight[old])
    assert added.losses[0].after == pytest.approx(bits_per_character(model, PAIRS, "ug"), rel=1e-5)
    assert Generator(model, added.tokenizer).generate(["abc"], target_language="bo")


def test_a_corpus_without_new_pieces_shows_what_is_missing() -> None:
    model = generator()
    added = add_language(model, model.tokenizer, "bo", TIBETAN)  # type: ignore[arg-type]
    assert added.change is None and added.coverage is not None
    assert all(r.total.round_trip_exact == 0.0 and r.total.unknown_rate > 0.9 for r in added.coverage)


def test_refusals() -> None:
    model = generator()
    tokenizer = model.tokenizer
    assert tokenizer is not None
    with pytest.raises(LanguageError, match="already has language 'kk'"):
        add_language(model, tokenizer, "kaz")
    with pytest.raises(LanguageError, match="no language 'mn'"):
        add_language(model, tokenizer, "bo", like="mn")
    with pytest.raises(LanguageError, match="no language 'mn'"):
        add_language(model, tokenizer, "bo", checks={"mn": examples("mn")})
    with pytest.raises(DataError, match="no text to train new pieces"):
        add_language(model, tokenizer, "bo", size=5)
    with pytest.raises(ModelError, match="trained generator"):
        add_language(*masked_model("bert"), "bo")
    assert set(model.config.languages) == {"en", "kk", "ug"}


def test_checks_take_pairs_and_plain_texts() -> None:
    model = generator()
    model.config.default_source_language = "en"
    pairs = check_examples(
        [{"source": "a", "target": "b", "source_language": "ug"}, {"source": "", "target": "b"}], "kk", model
    )
    assert [(e.source, e.target, e.source_language, e.target_language) for e in pairs] == [("a", "b", "ug", "kk")]
    assert check_examples([{"source": "a", "target": "b"}], "kaz", model)[0].source_language == "en"
    text = check_examples([{"text": "abc"}], "kk", model)[0]
    assert (text.source, text.target, text.source_language, text.target_language) == ("abc", "abc", "kk", "kk")
    with pytest.raises(DataError, match=r"record 1: a record has neither(?s:.)*but: line"):
        check_examples([{"line": "abc"}], "kk", model)
    with pytest.raises(DataError, match="check of kk: there is no text"):
        check_examples([{"text": " "}], "kk", model)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    generator().save_pretrained(tmp_path / "model")
    (tmp_path / "bo.txt").write_text("\n".join(TIBETAN), encoding="utf-8")
    rows = [{"source": source, "target": target, "source_language": "en"} for source, target in PAIRS]
    (tmp_path / "kk.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return tmp_path


def test_command(enc2gen: Callable[..., Result], files: Path) -> None:
    model, out = str(files / "model"), str(files / "new")
    given = ["--lang", "bo", "--like", "ug", "--corpus", str(files / "bo.txt"), "--size", "30", "--init", "random"]
    result = enc2gen("add-language", model, *given, "--check", f"kk={files / 'kk.jsonl'}", "--out", out)
    text = result.stdout.decode()
    assert result.returncode == 0, result.stderr.decode()
    assert "Old languages: bits per character" in text and f"start: {out}" in text and "Tibetan" in text
    record = json.loads((files / "new" / "vocabulary.json").read_text(encoding="utf-8"))
    loss = record["losses_bits_per_character"][0]
    before = SwcmForConditionalGeneration.from_pretrained(model)
    before.tokenizer = load_for_surgery(model)[1]
    assert loss["before"] == pytest.approx(bits_per_character(before, PAIRS, "kk"), rel=1e-5)
    assert record["like"] == "ug" and record["extension"]["new_pieces"]
    assert record["coverage"]["after"]["unknown_rate"] == 0.0 and "tokens per" in text
    assert len(Generator.from_pretrained(out).generate(["abc"], target_language="bo")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lang", "kk"], "already has language 'kk'"),
        (["--lang", "bo", "--like", "mn"], "no language 'mn'"),
        (["--lang", "bo", "--check", "kk"], "'kk' is not LANG=FILE"),
        (["--lang", "bo", "--size", "10"], "no text to train new pieces"),
        (["--lang", "bo", "--byte-fallback"], "are about new pieces, and there are none"),
        (["--lang", "bo", "--size", "ten"], "'ten' is no number of pieces"),
        (["--lang", "klingonish"], "unknown language tag"),
    ],
)
def test_command_errors(
    enc2gen: Callable[..., Result],
    files: Path,
    arguments: list[str],
    message: str,
) -> None:
    result = enc2gen("add-language", str(files / "model"), *arguments, "--out", str(files / "new"))
    text = " ".join(result.stderr.decode().split())
    assert result.returncode == 1 and message in text and "Traceback" not in text
    assert not (files / "new").exists() and sorted(path.name for path in files.iterdir()) == [
        "bo.txt",
        "kk.jsonl",
        "model",
    ]
