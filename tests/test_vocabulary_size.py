"""The size of an extension follows from what it saves on held-out text."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from enc2gen.errors import ConfigError, DataError
from enc2gen.tokenization.extension import extend_vocabulary
from enc2gen.tokenization.vocabulary_size import TOLERANCE, SizeTrial, choose_size, smallest_good


def unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(Unigram([("<unk>", 0.0), ("▁", -2.0), *((c, -5.0) for c in "abcdefgh")], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def bpe() -> PreTrainedTokenizerFast:
    vocabulary = {c: i for i, c in enumerate(["<unk>", "▁", *"abcdefgh"])}
    backend = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


KINDS = pytest.mark.parametrize("build", [unigram, bpe])


def words_of(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefgh", k=6)) for _ in range(count)]


def lines(words: list[str], count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=8)) for _ in range(count)]


@KINDS
def test_a_language_of_few_words_needs_few_pieces(build) -> None:
    words = words_of(30)
    size, trials = choose_size(build(), lines(words, 300, 1), lines(words, 50, 2), [5, 30, 120, 500])
    assert [trial.size for trial in trials][:3] == [5, 30, 120]
    best = min(trial.bits_per_character for trial in trials)
    chosen = next(trial for trial in trials if trial.size == size)
    assert chosen.bits_per_character <= best * (1 + TOLERANCE)
    assert all(t.bits_per_character > best * (1 + TOLERANCE) for t in trials if t.size < size)
    # 30 equally likely words of 6 letters and a space: log2(30) bits each, for the best split
    entropy = math.log2(30) / 7
    assert best == pytest.approx(entropy, rel=0.15)
    assert trials[0].bits_per_character > 1.5 * best
    assert chosen.fertility < trials[0].fertility


@KINDS
def test_noise_is_not_worth_pieces(build) -> None:
    """Random letters repeat too little for long pieces to pay."""
    noise = lines(words_of(4000), 300, 1)
    size, trials = choose_size(build(), noise, lines(words_of(4000, seed=9), 80, 2), [5, 2000])
    assert size == 5
    assert trials[0].bits_per_character < trials[1].bits_per_character


def test_a_smaller_size_wins_if_it_costs_little_more() -> None:
    costs = {500: 3.0, 1000: 2.02, 2000: 2.009, 4000: 2.0, 8000: 2.4}
    trials = [SizeTrial(size, bits, size, 0.0, 1.0) for size, bits in costs.items()]
    assert smallest_good(trials) == 2000


def test_bits_per_character_by_hand() -> None:
    """Only letters: train "ab" x 1 splits into ▁ a b, dev is "a" + an unseen "h"."""
    size, trials = choose_size(unigram(), ["ab"], ["ah"], [1])
    vocabulary = 10  # nothing is learnt from one word
    start = (1 + 3 / vocabulary) / (3 + 3)  # ▁: seen once of three, three kinds
    known = (1 + start) / (1 + 1)  # a after ▁, its only follower; alone it is as likely as ▁
    unseen = (3 / vocabulary) / (3 + 3) / (1 + 1) / (1 + 1)  # h, neither after a nor after ▁ a
    expected = -(math.log2(start) + math.log2(known) + math.log2(unseen)) / 2
    assert (size, len(trials)) == (1, 1)
    assert trials[0].pieces == 0
    assert trials[0].bits_per_character == pytest.approx(expected)


def test_unknown_characters_are_dear() -> None:
    words = words_of(10)
    _, known = choose_size(unigram(), lines(words, 60, 1), ["abc"], [20])
    _, unknown = choose_size(unigram(), lines(words, 60, 1), ["abж"], [20])
    assert unknown[0].unknown_rate > 0 == known[0].unknown_rate
    assert unknown[0].bits_per_character > known[0].bits_per_character + 17 / 3 - 2


@KINDS
def test_each_size_is_that_of_its_own_extension(build) -> None:
    """Deriving sizes from one run gives what training for that size gives, up to the candidates kept."""
    words = words_of(40)
    text = lines(words, 200, 3)
    _, trials = choose_size(build(), text, lines(words, 20, 4), [20, 60])
    for trial in trials:
        extended = extend_vocabulary(build(), text, size=trial.size)
        assert len(extended.pieces) == trial.pieces
        tokens = Counter(len(extended.tokenizer.tokenize(line)) for line in lines(words, 20, 4))
        mean = sum(n * k for n, k in tokens.items()) / 160
        assert trial.fertility == pytest.approx(mean, rel=0.1)


def test_auto_extends_by_the_chosen_size() -> None:
    words = words_of(30)
    text, dev = lines(words, 200, 1), lines(words, 40, 2)
    size, trials = choose_size(unigram(), text, dev)
    extended = extend_vocabulary(unigram(), text, size="auto", dev_texts=dev)
    assert extended.trials == trials
    assert extended.pieces == extend_vocabulary(unigram(), text, size=size).pieces
    held = extend_vocabulary(unigram(), text, size="auto", seed=1)  # holds lines out by itself
    assert held.trials and held.pieces


def test_sizes_that_the_data_cannot_fill_are_left_out() -> None:
    _, trials = choose_size(bpe(), lines(words_of(5), 30, 1), lines(words_of(5), 9, 2), [10, 10_000, 20_000])
    assert [trial.size for trial in trials] == [10, 10_000]
    assert trials[1].pieces < 100


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="sizes"):
        choose_size(unigram(), ["a"], ["b"], [])
    with pytest.raises(DataError, match="too little text"):
        choose_size(unigram(), ["ab"], [], [5])
