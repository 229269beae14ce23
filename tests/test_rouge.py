"""ROUGE against hand-computed values, the `rouge_score` package in English, and a textbook LCS."""

from __future__ import annotations

import random
import time

import pytest

from enc2gen.errors import ConfigError, DataError
from enc2gen.evaluation.rouge import lcs_length, rouge, rouge_units

ONE = pytest.approx

# hypothesis, references, language, variant, (precision, recall, F1), by hand
TABLE = [
    # Lin 2004, section 3.1: S1 "police killed the gunman"; S2 shares police-the-gunman, S3 the-gunman
    ("police kill the gunman", ["police killed the gunman"], "en", "rouge-l", (75, 75, 75)),
    ("the gunman kill police", ["police killed the gunman"], "en", "rouge-l", (50, 50, 50)),
    ("the gunman kill police", ["police killed the gunman"], "en", "rouge-2", (100 / 3, 100 / 3, 100 / 3)),
    ("the the the", ["the cat"], "en", "rouge-1", (100 / 3, 50, 40)),
    ("a b", ["a b c d"], "en", "rouge-1", (100, 50, 200 / 3)),
    ("a b", ["x y", "b a", "a"], "en", "rouge-1", (100, 100, 100)),
    ("a b c", ["c b a", "a b"], "en", "rouge-2", (50, 100, 200 / 3)),
    ("བོད་ཡིག", ["བོད་སྐད་ཡིག"], "bo", "rouge-1", (100, 200 / 3, 80)),
    ("我是人", ["我是女人"], "zh", "rouge-2", (50, 100 / 3, 40)),
    # degenerate: no units on a side, no bigram
    ("", ["a"], None, "rouge-1", (0, 0, 0)),
    ("a", [""], None, "rouge-l", (0, 0, 0)),
    ("", [""], None, "rouge-l", (0, 0, 0)),
    ("сөз", ["сөз"], "kk", "rouge-2", (0, 0, 0)),
    ("?!", ["a"], None, "rouge-2", (0, 0, 0)),
]


@pytest.mark.parametrize(("hypothesis", "references", "language", "variant", "expected"), TABLE)
def test_by_hand(hypothesis, references, language, variant, expected) -> None:  # type: ignore[no-untyped-def]
    score = rouge(hypothesis, references, variant, language=language)
    assert (score.precision, score.recall, score.f1) == tuple(ONE(value) for value in expected)


IDENTICAL = {
    "Tibetan": "བོད་ཡིག་ནི་བོད་ཀྱི་སྐད་ཡིག་ཡིན།",
    "Uyghur": "مەن ئۇيغۇرچە سۆزلەيمەن",
    "Kazakh": "Мен қазақша сөйлеймін",
    "Mongolian": "ᠪᠢ ᠮᠣᠩᠭᠣᠯ ᠬᠡᠯᠡ ᠰᠤᠷᠤᠨ᠎ᠠ",
    "Chinese": "我会说中文和藏语",
}


@pytest.mark.parametrize("text", IDENTICAL.values(), ids=IDENTICAL)
@pytest.mark.parametrize("variant", ["rouge-1", "rouge-2", "rouge-l"])
def test_identical_texts_score_100_where_the_usual_package_gives_0(text: str, variant: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    usual = variant.replace("-", "").replace("rougel", "rougeL")
    theirs = scorer.RougeScorer([usual], use_stemmer=False).score(text, text)[usual]
    assert theirs.fmeasure == 0.0
    assert rouge(text, [text], variant).f1 == 100.0  # type: ignore[arg-type]


def test_english_equals_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    theirs = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    rng = random.Random(0)
    words = ["The", "the", "cat's", "sat,", "on", "mat.", "3.5", "well-known", "A_b", "(end)", "U.S.", "-"]
    for _ in range(200):
        hypothesis = " ".join(rng.choices(words, k=rng.randrange(12)))
        lengths = [rng.randrange(1, 12) for _ in range(rng.randrange(1, 4))]
        references = [" ".join(rng.choices(words, k=length)) for length in lengths]
        expected = theirs.score_multi(references, hypothesis)
        for name, variant in (("rouge1", "rouge-1"), ("rouge2", "rouge-2"), ("rougeL", "rouge-l")):
            ours = rouge(hypothesis, references, variant, language="en")  # type: ignore[arg-type]
            assert ours.f1 == ONE(100 * expected[name].fmeasure), (hypothesis, references, variant)
            if len(references) == 1:
                assert ours.precision == ONE(100 * expected[name].precision)
                assert ours.recall == ONE(100 * expected[name].recall)


def test_lcs_equals_the_textbook_table() -> None:
    def table(first: str, second: str) -> int:
        previous = [0] * (len(second) + 1)
        for a in first:
            current = [0]
            for column, b in enumerate(second):
                current.append(previous[column] + 1 if a == b else max(previous[column + 1], current[-1]))
            previous = current
        return previous[-1]

    rng = random.Random(1)
    for _ in range(500):
        first, second = ("".join(rng.choices("abcd", k=rng.randrange(90))) for _ in range(2))
        assert lcs_length(first, second) == table(first, second)


def test_a_thousand_long_pairs_take_seconds() -> None:
    rng = random.Random(2)
    pairs = [[[f"w{rng.randrange(300)}" for _ in range(200)] for _ in range(2)] for _ in range(1000)]
    start = time.process_time()
    for hypothesis, reference in pairs:
        rouge_units(hypothesis, reference, "rouge-l")
    assert time.process_time() - start < 5.0  # a Python table of 200 x 200 takes far longer


@pytest.mark.parametrize("references", [[], "one string"])
def test_bad_references_are_refused(references) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="non-empty list"):
        rouge("a", references)


def test_unknown_variant_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rouge-3.*\n.*rouge-1, rouge-2, rouge-l"):
        rouge("a", ["a"], "rouge-3")  # type: ignore[arg-type]
