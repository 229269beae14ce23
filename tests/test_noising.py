"""Noise: rates and distributions match their configuration, and nothing is lost but what was masked."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from enc2gen.data.noising import Denoiser, NoiseConfig, split_sentences, word_starts
from enc2gen.errors import ConfigError, DataError

MASK = 10**6


def denoiser(**config: object) -> Denoiser:
    return Denoiser(NoiseConfig(**config), MASK)


def spans_of(noised: list[int], length: int) -> list[int]:
    """Lengths of the masked spans of range(length), read off the noised ids alone."""
    spans, expected, after_mask = [], 0, False
    for piece in [*noised, length]:
        if piece == MASK:
            assert not after_mask, "two mask tokens in a row"
            after_mask = True
            continue
        if after_mask:
            spans.append(piece - expected)
        else:
            assert piece == expected, "a piece vanished without a mask token"
        expected, after_mask = piece + 1, False
    return spans


def test_the_defaults_are_mbarts() -> None:
    assert NoiseConfig() == NoiseConfig(mask_ratio=0.35, poisson_lambda=3.5, permute_sentences=True)


@pytest.mark.parametrize("ratio", [0.15, 0.35, 0.6])
@pytest.mark.parametrize("length", [4, 7, 40])
def test_the_masked_share_is_the_rate_for_short_and_long_texts(ratio: float, length: int) -> None:
    noiser = denoiser(mask_ratio=ratio, permute_sentences=False)
    rng = np.random.default_rng(0)
    trials = 3000
    visible = sum(piece != MASK for _ in range(trials) for piece in noiser.noise([range(length)], rng))
    # Stochastic rounding of ratio * length has a standard deviation of at most half a word a text.
    tolerance = 4 * 0.5 / (length * math.sqrt(trials))
    assert 1 - visible / (trials * length) == pytest.approx(ratio, abs=tolerance)


@pytest.mark.parametrize("rate", [1.0, 3.5])
def test_span_lengths_are_poisson(rate: float) -> None:
    noiser = denoiser(poisson_lambda=rate)
    rng = np.random.default_rng(1)
    length = 20_000  # so long that the one span cut to fit the budget does not matter
    spans = [span for _ in range(3) for span in spans_of(noiser.noise([range(length)], rng), length)]
    assert np.mean(spans) == pytest.approx(rate, rel=0.05)
    assert np.var(spans) == pytest.approx(rate, rel=0.1)
    counts = Counter(min(span, 9) for span in spans)
    expected = [math.exp(-rate) * rate**k / math.factorial(k) for k in range(9)]
    expected.append(1 - sum(expected))
    bins = [(counts[k], len(spans) * p) for k, p in enumerate(expected) if len(spans) * p >= 5]
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in bins)
    assert statistic < 27.9  # 99.9 % quantile of chi-square with 9 degrees of freedom
    assert counts[0] > 0  # spans of length 0 do insert a mask token


def test_spans_are_spread_evenly_over_the_text() -> None:
    rng = np.random.default_rng(2)
    hidden = np.zeros(20)
    trials = 4000
    for _ in range(trials):
        visible = [piece for piece in denoiser(permute_sentences=False).noise([range(20)], rng) if piece != MASK]
        hidden += 1
        hidden[visible] -= 1
    shares = hidden / trials
    assert shares.mean() == pytest.approx(0.35, abs=0.005)
    # A word next to an end lies in fewer possible spans; all others are alike, and so are the two ends.
    assert shares[3:-3] == pytest.approx(shares[3:-3].mean(), abs=0.04)
    assert shares == pytest.approx(shares[::-1], abs=0.04)


sentences_strategy = st.lists(st.integers(0, 12), max_size=8)


def numbered(lengths: list[int]) -> list[list[int]]:
    """Sentences of the given lengths whose pieces are all different."""
    starts = np.cumsum([0, *lengths])
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]


@settings(max_examples=300, deadline=None)
@given(sentences_strategy, st.floats(0, 0.99), st.floats(0.1, 8), st.booleans(), st.integers(0, 2**32))
def test_nothing_is_duplicated_and_sentences_stay_together(
    lengths: list[int], ratio: float, rate: float, permute: bool, seed: int
) -> None:
    sentences = numbered(lengths)
    sizes = dict(mask_ratio=ratio, poisson_lambda=rate, permute_sentences=permute)
    noised = denoiser(**sizes).noise(sentences, np.random.default_rng(seed))
    visible = [piece for piece in noised if piece != MASK]
    total = sum(lengths)
    assert len(set(visible)) == len(visible)
    assert set(visible) <= set(range(total))
    assert total == 0 or visible  # something stays visible
    masked = total - len(visible)
    assert min(math.floor(ratio * total), total - 1) <= masked <= math.ceil(ratio * total)
    assert masked == 0 or MASK in noised
    assert masked or MASK not in noised
    of = {piece: index for index, sentence in enumerate(sentences) for piece in sentence}
    runs = [index for i, index in enumerate(of[p] for p in visible) if i == 0 or index != of[visible[i - 1]]]
    assert len(set(runs)) == len(runs)  # a sentence's pieces are contiguous and ...
    assert all(a < b for a, b in pairwise(visible) if of[a] == of[b])  # in order
    if not permute:
        assert visible == sorted(visible)


@given(sentences_strategy, st.integers(0, 100))
def test_no_noise_is_the_identity(lengths: list[int], seed: int) -> None:
    noiser = denoiser(mask_ratio=0.0, permute_sentences=False)
    assert noiser.noise(numbered(lengths), np.random.default_rng(seed)) == list(range(sum(lengths)))


def test_sentence_orders_are_equally_likely() -> None:
    rng = np.random.default_rng(3)
    noiser = denoiser(mask_ratio=0.0)
    orders = Counter(tuple(noiser.noise([[0], [1], [2]], rng)) for _ in range(6000))
    assert len(orders) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in orders.values()) < 20.5  # 99.9 %, 5 degrees


@pytest.mark.parametrize(("length", "share"), [(1, 0.0), (2, 0.7), (3, 1.05)])
def test_very_short_texts(length: int, share: float) -> None:
    rng = np.random.default_rng(4)
    noiser = denoiser()
    masked = []
    for _ in range(4000):
        noised = noiser.noise([range(length)], rng)
        masked.append(length - sum(piece != MASK for piece in noised))
    assert max(masked) < length
    assert np.mean(masked) == pytest.approx(share, abs=0.04)


def test_whole_words_are_masked_together_and_counted_as_words() -> None:
    # 60 words of 1, 2, ..., 5, 1, ... pieces; piece = 10 * word + place.
    words = [[10 * word + place for place in range(word % 5 + 1)] for word in range(60)]
    pieces = [piece for word in words for piece in word]
    starts = [piece % 10 == 0 for piece in pieces]
    rng = np.random.default_rng(5)
    noiser = denoiser(permute_sentences=False)
    for _ in range(200):
        visible = [piece for piece in noiser.noise([pieces], rng, [starts]) if piece != MASK]
        kept = {piece // 10 for piece in visible}
        assert visible == [piece for word in words for piece in word if piece // 10 in kept]
        assert len(kept) == 60 - 21


def test_the_same_generator_state_gives_the_same_noise() -> None:
    texts = [list(range(30)), list(range(30, 50))]
    first, again, other = (denoiser().noise(texts, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(DataError, match="2 entries for a sentence of 3"):
        denoiser().noise([[1, 2, 3]], np.random.default_rng(0), [[True, False]])
    with pytest.raises(ConfigError, match="mask token"):
        Denoiser(NoiseConfig(), -1)
    for config in ({"mask_ratio": 1.0}, {"mask_ratio": -0.1}, {"poisson_lambda": 0}, {"mask_rate": 0.3}):
        with pytest.raises(ValidationError):
            NoiseConfig(**config)


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["▁Қаз", "ақ", "стан", "▁тілі", "."], ["▁Қазақстан", "▁тілі."]),
        (["Қаз", "##ақ", "тілі"], ["Қаз##ақ", "тілі"]),
        (["Hel", "lo", "Ġwor", "ld"], ["Hello", "Ġworld"]),
        (["▁中国", "人民", "银行"], ["▁中国", "人民", "银行"]),
        (["▁བོད་", "ཡིག", "་", "གསར", "།"], ["▁བོད་", "ཡིག་", "གསར།"]),
        (["▁ភាសា", "ខ្មែរ"], ["▁ភាសា", "ខ្មែរ"]),
        (["▁issue", "##", "3"], ["▁issue##3"]),
        (["Ġ", "##anni", "mar", "id"], ["Ġ##anni", "mar", "id"]),  # a letter of Maltese, in WordPiece
        (["##", "ĠTit", "le"], ["##", "ĠTitle"]),  # a heading of Markdown, in byte-level BPE
        ([], []),
    ],
)
def test_word_starts(pieces: list[str], words: list[str]) -> None:
    starts = word_starts(pieces)
    assert len(starts) == len(pieces)
    found: list[str] = []
    for piece, start in zip(pieces, starts, strict=True):
        if start:
            found.append("")
        found[-1] += piece
    assert found == words


@pytest.mark.parametrize(
    ("language", "sentences"),
    [
        ("kk", ["Ол келді.", "Кім?", "3.5 млн т.б. және жыл!", "Соңы"]),
        ("en", ["See example.org now.", 'He said "go."', "A. Smith went…", "What?!", "End."]),
        ("uz", ["1. Kirish.", "Bu 2019.", "Keyin."]),
        ("bo", ["བཀྲ་ཤིས་བདེ་ལེགས།", "ང་བོད་པ་ཡིན། །", "ཡིན་ནོ༎", "གཅིག", "གཉིས།"]),
        ("ug", ["ئۇ كەلدى.", "كىم كەلدى؟", "ياخشى!"]),
        ("ur", ["وہ آیا۔", "کون؟", "ہاں"]),
        ("am", ["ሰላም ነው።", "ማን ነህ፧", "ሄደ፡፡", "ደህና ሁን።"]),
        ("km", ["ខ្ញុំទៅ។", "អ្នកមក៕"]),
        ("hi", ["वह आया।", "कौन?", "हाँ॥"]),
        ("mn-Mong", ["ᠮᠣᠩᠭᠣᠯ᠃", "ᠬᠡᠯᠡ᠃"]),
        ("my", ["သူလာသည်။", "ကောင်းတယ်။"]),
        ("hy", ["Նա եկավ։", "Լավ։"]),
        ("el", ["Ποιος;", "Εγώ."]),
    ],
)
def test_sentences_of_many_scripts(language: str, sentences: list[str]) -> None:
    assert split_sentences(" ".join(sentences), language) == sentences


def test_chinese_and_khmer_need_no_space_and_closing_quotes_stay() -> None:
    chinese = ["他说：“你好！”", "真的？！", "3.5元。", "好!", "完"]
    assert split_sentences("".join(chinese), "zh") == chinese
    khmer = ["ខ្ញុំទៅ។", "អ្នកមក។"]
    assert split_sentences("".join(khmer), "km") == khmer


def test_line_ends_split_and_empty_text_has_no_sentence() -> None:
    assert split_sentences("ไทย\n\n ภาษา \n", "th") == ["ไทย", "ภาษา"]
    assert split_sentences("One. two\nthree", "en") == ["One. two", "three"]
    assert split_sentences("Really?\nyes", "en") == ["Really?", "yes"]
    assert split_sentences(" \n ", "en") == []


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet=st.sampled_from("aB1 .!?…\n\"')]།༎ག་。！」؟۔።፡។।᠃;"), max_size=40),
    st.sampled_from(["en", "zh", "bo", "am", "ug", "el"]),
)
def test_splitting_loses_nothing_but_white_space(text: str, language: str) -> None:
    sentences = split_sentences(text, language)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() != "" for sentence in sentences)


def test_word_starts_of_too_few_sentences_are_refused() -> None:
    with pytest.raises(DataError, match="1 sentences instead of 2"):
        Denoiser(NoiseConfig(), mask_token_id=9).noise([[1], [2]], np.random.default_rng(0), [[True]])
