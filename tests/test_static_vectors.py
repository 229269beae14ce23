"""Static vectors of pieces: translations and words of like contexts lie together; files are read strictly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sparse
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from enc2gen.errors import DataError
from enc2gen.models.static_vectors import (
    StaticVectorsConfig,
    _sampled,
    _truncated_svd,
    _weigh,
    read_static_vectors,
    train_static_vectors,
)

WORDS = ["cat", "dog", "king", "queen", "eats", "rules", "བྱི", "ཁྱི", "རྒྱལ", "rare"]
PIECES = ["<pad>", "<unk>", *(f"▁{word}" for word in WORDS)]
ID = {word: index for index, word in enumerate(WORDS, start=2)}


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(Unigram([(piece, -float(index)) for index, piece in enumerate(PIECES)], unk_id=1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def save(folder: Path, text: str | bytes) -> Path:
    path = folder / "words.vec"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def test_translations_are_nearest_neighbours_without_a_shared_script(words: PreTrainedTokenizerFast) -> None:
    pairs = [("བྱི ཁྱི", "cat dog"), ("བྱི རྒྱལ", "king cat"), ("ཁྱི རྒྱལ", "dog king"), ("བྱི", "cat")] * 3
    vectors = train_static_vectors(words, pairs)
    english = [ID["cat"], ID["dog"], ID["king"]]
    for source, target in (("བྱི", "cat"), ("ཁྱི", "dog"), ("རྒྱལ", "king")):
        found, cosine = vectors.nearest(ID[source], english)[0]
        assert found == ID[target] and cosine > 0.99


def test_words_of_like_windows_are_alike_in_plain_lines(words: PreTrainedTokenizerFast) -> None:
    lines = ["cat eats", "dog eats", "king rules", "queen rules"] * 3
    vectors = train_static_vectors(words, lines)
    nearest = vectors.nearest(ID["cat"], [ID["dog"], ID["king"], ID["queen"]], count=2)
    assert nearest[0][0] == ID["dog"] and nearest[0][1] > 0.99 > 0.5 > nearest[1][1]


def test_the_window_ends_where_it_says_and_never_spans_lines(words: PreTrainedTokenizerFast) -> None:
    config = StaticVectorsConfig(window=1, min_count=1)
    vectors = train_static_vectors(words, ["cat eats", "rules king", "dog eats"], config)
    assert abs(vectors.table[ID["cat"]] @ vectors.table[ID["king"]]) < 1e-5
    with pytest.raises(DataError, match="no two known pieces"):
        train_static_vectors(words, ["cat", "dog"], config)


def test_rare_and_special_pieces_have_no_vector(words: PreTrainedTokenizerFast) -> None:
    vectors = train_static_vectors(words, [*[("བྱི ཀ", "cat"), ("ཁྱི", "dog")] * 3, ("རྒྱལ", "rare")])
    assert vectors.known[[ID["cat"], ID["བྱི"]]].all()
    assert not vectors.known[[0, 1, ID["rare"], ID["queen"]]].any()
    assert not vectors.table[~vectors.known].any()
    np.testing.assert_allclose(np.linalg.norm(vectors.table[vectors.known], axis=1), 1, atol=1e-6)


def test_lines_and_pairs_mix_and_the_same_seed_gives_the_same_vectors(words: PreTrainedTokenizerFast) -> None:
    texts: list[str | tuple[str, str]] = [("བྱི", "cat"), "cat eats", "dog eats", ("ཁྱི", "dog"), "king rules"] * 4
    one, two = (train_static_vectors(words, iter(texts), seed=5) for _ in range(2))
    assert np.array_equal(one.table, two.table)
    assert one.known[[ID["བྱི"], ID["king"]]].all()


def test_max_texts_are_drawn_from_all_texts(words: PreTrainedTokenizerFast) -> None:
    early, late = [("བྱི", "cat")] * 50, [("རྒྱལ", "king")] * 50
    config = StaticVectorsConfig(min_count=1, max_texts=50)
    for texts in (early + late, late + early):
        vectors = train_static_vectors(words, texts, config)
        assert vectors.known[[ID["cat"], ID["king"]]].all()
    again = train_static_vectors(words, iter(late + early), config)
    np.testing.assert_array_equal(vectors.table, again.table)


def test_a_sample_keeps_the_order_and_the_number(words: PreTrainedTokenizerFast) -> None:
    texts = [f"line {number}" for number in range(1000)]
    assert _sampled(texts, 1000, 0) == texts and _sampled(texts, 5000, 0) == texts
    sample = _sampled(texts, 100, 0)
    assert len(set(sample)) == 100 and sorted(sample, key=texts.index) == sample
    assert 30 <= sum(texts.index(text) >= 500 for text in sample) <= 70 and sample != _sampled(texts, 100, 1)


def test_weights_are_positive_pointwise_mutual_information() -> None:
    counts = np.array([[4.0, 0.0], [1.0, 3.0]])
    # p(w,c) / (p(w) p(c)) with smoothing 1: (4/8) / (4/8 * 5/8) = 1.6; (1/8)/(4/8*5/8) = .4 -> 0; (3/8)/(4/8*3/8) = 2
    expected = np.array([[np.log(1.6), 0], [0, np.log(2)]])
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(_weigh(sparse.csr_matrix(counts), 1.0).toarray(), expected, atol=1e-12)


def test_truncated_svd_agrees_with_numpys() -> None:
    generator = np.random.default_rng(0)
    dense = generator.standard_normal((60, 5)) * [9, 7, 5, 4, 3] @ generator.standard_normal((5, 40))
    left, values = _truncated_svd(sparse.csr_matrix(dense), 3, seed=1)
    u, s, _ = np.linalg.svd(dense)
    np.testing.assert_allclose(values, s[:3], rtol=1e-6)
    np.testing.assert_allclose(abs(np.sum(left * u[:, :3], axis=0)), 1, atol=1e-6)


@pytest.mark.parametrize("texts", [[], ["", "  "], [("", "")]])
def test_nothing_to_learn_from_is_refused(words: PreTrainedTokenizerFast, texts: list) -> None:
    with pytest.raises(DataError, match="no two known pieces"):
        train_static_vectors(words, texts)


def test_texts_of_another_kind_are_refused(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"a str or a \(source, target\) pair"):
        train_static_vectors(words, [("a", "b", "c")])  # type: ignore[list-item]


def test_piece_vectors_are_means_of_word_vectors(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    vectors = read_static_vectors(words, save(tmp_path, "3 2\ncat 1 0\ncat dog 0 1\nzzz 9 9\n"))
    np.testing.assert_allclose(vectors.table[ID["cat"]], np.array([1, 1]) / np.sqrt(2), atol=1e-6)
    np.testing.assert_allclose(vectors.table[ID["dog"]], [0, 1], atol=1e-6)
    assert not vectors.known[1]  # the unknown piece, which "zzz" holds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line is not"),
        ("cat 1 0\n", "first line is not"),
        ("1 2\ncat 1\n", "expected a word and 2"),
        ("1 2\ncat 1 x\n", "expected a word and 2"),
        ("1 2\ncat 1 nan\n", "2 finite numbers"),
        ("2 2\ncat 1 0\n", "promises 2 words, the file has 1"),
        ("1 2\nzzz 1 0\n", "no word of the file"),
        (b"1 2\n\xff\xfe 1 0\n", "not UTF-8"),
    ],
)
def test_damaged_files_are_refused(
    words: PreTrainedTokenizerFast, tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_static_vectors(words, save(tmp_path, text))
    with pytest.raises(DataError, match="cannot be read"):
        read_static_vectors(words, tmp_path / "absent.vec")
