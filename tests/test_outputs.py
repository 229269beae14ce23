"""n-best outputs, minimum Bayes risk, shortlists, and their command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics import CHRF
from typer.testing import CliRunner

from enc2gen import DecodingConfig, Generator, SwcmForConditionalGeneration
from enc2gen.cli.main import app
from enc2gen.errors import ConfigError, DataError, LanguageError, ModelError
from enc2gen.generation.mbr import pairwise_chrf, rank_by_utility
from enc2gen.generation.outputs import Output
from enc2gen.generation.shortlist import Shortlist

TEXTS = ["abc", "", "de fg h"]


@pytest.fixture
def saved(encoder_folder: Path, tmp_path: Path) -> Path:
    model = SwcmForConditionalGeneration.from_encoder(encoder_folder, languages=["en", "kk"], verbose=False)
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def generator(saved: Path) -> Generator:
    return Generator.from_pretrained(saved)


def test_n_best_of_beams_and_samples(generator: Generator) -> None:
    found = generator.generate_n_best(TEXTS, 3, target_language="kk", config=DecodingConfig(num_beams=4))
    assert [len(outputs) for outputs in found] == [3, 1, 3] and found[1][0].text == ""
    for outputs in (found[0], found[2]):
        scores = [output.score for output in outputs]
        assert scores == sorted(scores, reverse=True) and scores[0] < 0 and len({o.text for o in outputs}) == 3
    assert [o[0].text for o in found] == generator.generate(TEXTS, target_language="kk")
    config = DecodingConfig(num_beams=1, do_sample=True)
    drawn = generator.generate_n_best(TEXTS, 5, target_language="kk", config=config, seed=3)
    assert len(drawn[0]) == 5 and all(output.score < 0 for output in drawn[0])
    diverse = DecodingConfig(num_beams=3, beam_groups=3, diversity_penalty=2.0)
    groups = generator.generate_n_best(TEXTS, 3, target_language="kk", config=diverse)[0]
    assert len({output.text[:1] for output in groups}) > len({output.text[:1] for output in found[0]})


def test_what_cannot_be_asked_for_is_said(generator: Generator) -> None:
    with pytest.raises(ConfigError, match=r"5 outputs of 4 beams(?s:.)*num_beams of 5"):
        generator.generate_n_best(["a"], 5, target_language="kk")
    with pytest.raises(ConfigError, match=r"leave out scores \(--json, --n-best, generate_n_best\)"):
        generator.generate_n_best(["a"], 2, target_language="kk", config=DecodingConfig(engine="transformers"))
    with pytest.raises(ValueError, match="transformers has no mbr_samples, draft_tokens"):
        DecodingConfig(engine="transformers", mbr_samples=4, draft_tokens=2, num_beams=1)
    with pytest.raises(ConfigError, match="mbr_samples"):
        DecodingConfig(mbr_samples=4).arguments()
    for wrong in (
        {"num_beams": 4, "beam_groups": 3, "diversity_penalty": 1.0},
        {"diversity_penalty": 1.0},
        {"mbr_samples": 1},
        {"draft_tokens": 3},
    ):
        with pytest.raises(ValueError):
            DecodingConfig(**wrong)  # type: ignore[arg-type]


def test_seeds_that_cannot_be_are_refused(generator: Generator, saved: Path) -> None:
    config = DecodingConfig(num_beams=1, do_sample=True)
    for seed in (-1, 2**63):
        with pytest.raises(ConfigError, match=f"seed: the seed is {seed}"):
            generator.generate(["a"], target_language="kk", config=config, seed=seed)
    generator.generate(["a"], target_language="kk", config=config, seed=2**63 - 1)
    result = CliRunner().invoke(app, ["generate", str(saved), "--to", "kk", "--sample", "--seed", "-1"], input="a\n")
    assert result.exit_code == 2 and "--seed" in result.output


@pytest.mark.parametrize("draft", [0, 2])
def test_greedy_scores_are_divided_by_length_as_those_of_beams(generator: Generator, draft: int) -> None:
    def written(**settings: Any) -> Output:
        config = DecodingConfig(max_new_tokens=6, **settings)
        return generator.generate_n_best(["abc de"], 1, target_language="kk", config=config)[0][0]

    greedy, total = written(num_beams=1, draft_tokens=draft), written(num_beams=1, length_penalty=0, draft_tokens=draft)
    assert not greedy.ended and greedy.text == total.text and total.score < -3
    assert greedy.score == pytest.approx(total.score / 6)
    # With the same penalty, a search that finds the same text tells the same score.
    everything = [
        one
        for one in generator.generate_n_best(
            ["abc de"], 40, target_language="kk", config=DecodingConfig(max_new_tokens=6, num_beams=40)
        )[0]
        if one.text == greedy.text
    ]
    assert everything and everything[0].score == pytest.approx(greedy.score, abs=1e-4)


SAMPLES = ["the cat sat", "a cat sat down", "", "the cat sat", "ab", "кот сидел", "the  cat sat!", "a"]


def test_the_chosen_sample_has_the_highest_mean_chrf() -> None:
    metric = CHRF()
    pairs = [[metric.sentence_score(one, [other]).score for other in SAMPLES] for one in SAMPLES]
    assert pairwise_chrf(SAMPLES).tolist() == [pytest.approx(row, abs=1e-6) for row in pairs]
    means = [(sum(row) - row[index]) / (len(SAMPLES) - 1) for index, row in enumerate(pairs)]
    ranked = rank_by_utility(SAMPLES)
    assert dict(ranked) == pytest.approx({i: mean for i, mean in enumerate(means) if i != 3}, abs=1e-6)
    assert ranked[0][0] == means.index(max(means)) == 6
    assert rank_by_utility(["abcd", "abce", "xyz", "xyz", "xyz"])[0][0] == 2  # duplicates count
    assert rank_by_utility(["x"]) == [(0, 0.0)]


def test_mbr_draws_and_chooses(generator: Generator) -> None:
    config = DecodingConfig(mbr_samples=6, temperature=0.8, epsilon=0.002)
    drawn = DecodingConfig(num_beams=1, do_sample=True, temperature=0.8, epsilon=0.002)
    samples = generator.generate_n_best(TEXTS, 6, target_language="kk", config=drawn, seed=4)
    found = generator.generate_n_best(TEXTS, 2, target_language="kk", config=config, seed=4)
    for row in (0, 2):
        place, utility = rank_by_utility([output.text for output in samples[row]])[0]
        assert (found[row][0].text, found[row][0].score) == (samples[row][place].text, pytest.approx(utility))
    assert generator.generate(TEXTS, target_language="kk", config=config, seed=4) == [o[0].text for o in found]


def test_a_shortlist_with_all_that_is_written_changes_no_output(saved: Path, tmp_path: Path) -> None:
    plain = Generator.from_pretrained(saved)
    config = DecodingConfig(num_beams=1)
    wanted = plain.generate(TEXTS, target_language="kk", config=config)
    whole = Shortlist.from_texts(plain.codec, {"kk": [*wanted, "abcdefgh"]})
    whole.save(tmp_path / "list.json")
    loaded = Shortlist.load(tmp_path / "list.json")
    assert loaded.languages == whole.languages and len(loaded.of("kk")) < loaded.vocabulary - 30
    limited = Generator.from_pretrained(saved, shortlist=loaded)
    assert limited.generate(TEXTS, target_language="kk", config=config) == wanted
    every = Shortlist(whole.vocabulary, {"kk": range(whole.vocabulary)})
    beams = Generator.from_pretrained(saved, shortlist=every).generate(TEXTS, target_language="kk")
    assert beams == plain.generate(TEXTS, target_language="kk")
    few = Shortlist(whole.vocabulary, {"kk": [2, *plain.codec.encode_text("xyz")]})
    assert set("".join(Generator.from_pretrained(saved, shortlist=few).generate(TEXTS, target_language="kk"))) <= set(
        "xyz "
    )
    with pytest.raises(LanguageError, match="no tokens for 'en'"):
        limited.generate(TEXTS, target_language="en")


def test_shortlists_that_do_not_fit_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="token 120 is outside"):
        Shortlist(120, {"kk": [5, 120]})
    with pytest.raises(ModelError, match="vocabulary of 120 tokens"):
        Generator.from_pretrained(saved, shortlist=Shortlist(120, {"kk": [5]}))
    (tmp_path / "x.json").write_text('{"kind": "enc2gen shortlist", "vocabulary": 9, "languages": {"kk": ["a"]}}')
    for path, message in ((tmp_path / "x.json", "not a shortlist"), (tmp_path / "none.json", "no such file")):
        with pytest.raises(DataError, match=message):
            Shortlist.load(path)


def test_the_command_writes_what_is_asked_for(saved: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    (tmp_path / "in.txt").write_text("cat a\n\nb\n", encoding="utf-8")
    (tmp_path / "terms.tsv").write_text("cat\tкот\n", encoding="utf-8")
    common = ["generate", str(saved), "--to", "kk", "--from", "en", "-i", str(tmp_path / "in.txt"), "-o"]
    run(*common, str(tmp_path / "a"), "--n-best", "2", "--glossary", str(tmp_path / "terms.tsv"), "--forbid", "х")
    rows = [json.loads(line) for line in (tmp_path / "a").read_text(encoding="utf-8").splitlines()]
    assert [len(row) for row in rows] == [2, 1, 2] and rows[1][0]["text"] == ""
    assert all("кот" in output["text"] and output["unmet"] == [] for output in rows[0])
    run(*common, str(tmp_path / "b"), "--mbr", "3", "--temperature", "0.7", "--epsilon", "0.01")
    assert len((tmp_path / "b").read_text(encoding="utf-8").splitlines()) == 3
    two = ["--text", f"KK={tmp_path / 'in.txt'}", "--text", f"kaz_Cyrl={tmp_path / 'in.txt'}"]  # as --to takes them
    run("shortlist", str(saved), *two, "-o", str(tmp_path / "list.json"))
    assert list(Shortlist.load(tmp_path / "list.json").languages) == ["kk"]
    options = ["--beams", "1", "--draft", "4", "--shortlist", str(tmp_path / "list.json"), "--precision", "fp32"]
    run(*common, str(tmp_path / "c"), *options)
    assert set((tmp_path / "c").read_text(encoding="utf-8")) <= set("abct \n")
    run(
        *common,
        str(tmp_path / "d"),
        "--diverse",
        "1.5",
        "--n-best",
        "4",
        "--coverage-penalty",
        "0.1",
        "--decoder",
        "native",
    )
    with pytest.raises(ConfigError, match="transformers has no precision"):
        run(*common, str(tmp_path / "e"), "--decoder", "transformers", "--precision", "bf16")
