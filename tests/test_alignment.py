"""MEXA by its definition, sentences read alike in any batch, correlations as SciPy has them, parallel texts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from conftest import tiny_encoder, tiny_tokenizer
from enc2gen.errors import ConfigError, DataError
from enc2gen.evaluation.alignment import alignment_table, correlation, mexa, mexa_hits, pool_tokens, read_sentences
from enc2gen.evaluation.parallel_texts import language_label, read_parallel_texts

TEXTS = ["a b c", "de", "f g h i j k", "l", "mn op qr"]


def states(seed: int, layers: int = 3, n: int = 12, hidden: int = 6) -> Tensor:
    return torch.randn(layers, n, hidden, generator=torch.Generator().manual_seed(seed))


def by_definition(english: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The equation of 2410.05873 for one layer, with loops."""
    n = len(english)
    count = 0
    for i in range(n):
        own = english[i] @ other[i] / np.linalg.norm(english[i]) / np.linalg.norm(other[i])
        rivals = []
        for j in range(n):
            if j != i:
                rivals.append(english[i] @ other[j] / np.linalg.norm(english[i]) / np.linalg.norm(other[j]))
                rivals.append(english[j] @ other[i] / np.linalg.norm(english[j]) / np.linalg.norm(other[i]))
        count += own > max(rivals)
    return count / n


def test_mexa_is_the_equation() -> None:
    english = states(0)
    other = english + 0.8 * states(1)
    expected = [by_definition(e, o) for e, o in zip(english.double().numpy(), other.double().numpy(), strict=True)]
    assert 0.2 < np.mean(expected) < 1.0
    assert mexa(english, other).tolist() == pytest.approx(expected)


def test_both_directions_must_hold() -> None:
    """Every English sentence is nearest to its own translation, but a hub among the translations is nearest to all."""
    english = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    other = torch.tensor([[[1.0, 0.9, 0.0], [0.0, 0.5, 3.0]]])
    assert mexa_hits(english, other)[0].tolist() == [True, False]
    assert mexa_hits(other, english)[0].tolist() == [True, False]


def test_equal_sentences_do_not_count() -> None:
    english, doubled = states(0), states(0)
    doubled[:, 3] = doubled[:, 7]
    for first, second in ((english, doubled), (doubled, english)):
        hits = mexa_hits(first, second)
        assert not hits[:, [3, 7]].any() and hits.sum() == 3 * 10


def test_scale_does_not_matter_and_centring_undoes_a_language_direction() -> None:
    english = states(0)
    other = english + 0.5 * states(1)
    assert torch.equal(mexa(english, 7.0 * other), mexa(english, other))
    shifted = other + 50.0 * torch.ones(6)
    assert (mexa(english, shifted) < 0.5 * mexa(english, other)).all()
    assert torch.equal(mexa(english, shifted, centre=True), mexa(english, other, centre=True))


@pytest.mark.parametrize(("first", "second"), [((3, 4, 6), (3, 5, 6)), ((3, 1, 6), (3, 1, 6)), ((4, 6), (4, 6))])
def test_states_that_are_not_parallel(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"parallel sentences"):
        mexa(torch.zeros(first), torch.zeros(second))


def test_pooling() -> None:
    values = torch.tensor([[[[1.0], [2.0], [6.0], [100.0]]]])
    right, left = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 1, 1, 1]])
    assert pool_tokens(values, right).item() == pytest.approx(3.0)
    assert pool_tokens(values, right, "weighted").item() == pytest.approx((1 + 2 * 2 + 3 * 6) / 6)
    assert pool_tokens(values, left, "weighted").item() == pytest.approx((2 + 2 * 6 + 3 * 100) / 6)


@pytest.mark.parametrize("pooling", ["mean", "weighted"])
def test_sentences_are_read_alike_in_any_batch_and_keep_their_order(pooling: Any) -> None:
    encoder, tokenizer = tiny_encoder(), tiny_tokenizer()
    together = read_sentences(encoder, tokenizer, TEXTS, pooling=pooling).states
    assert together.shape == (5, len(TEXTS), 24)
    for index, text in enumerate(TEXTS):
        alone = read_sentences(encoder, tokenizer, [text], pooling=pooling).states[:, 0]
        assert torch.allclose(together[:, index], alone, atol=1e-5)
    ids = torch.tensor([tokenizer(TEXTS[2])["input_ids"]])
    with torch.no_grad():
        last = encoder(ids).last_hidden_state[0]
    weights = torch.ones(len(last)) if pooling == "mean" else torch.arange(1.0, len(last) + 1)
    assert torch.allclose(together[-1, 2], (weights[:, None] * last).sum(0) / weights.sum(), atol=1e-5)


def test_what_is_read_is_counted() -> None:
    encoder, tokenizer = tiny_encoder(), tiny_tokenizer()
    reading = read_sentences(encoder, tokenizer, ["b", "c " * 90], max_length=20)
    assert reading.truncated == 1
    cut = read_sentences(encoder, tokenizer, ["c" + " c" * 17])  # the same 20 tokens, </s> at the end of both
    assert torch.allclose(reading.states[:, 1], cut.states[:, 0], atol=1e-5)
    assert read_sentences(encoder, tokenizer, ["a\u0f40"]).unknown == pytest.approx(50.0)
    # A text that spells a special token is text: the tiny vocabulary does not know "<".
    assert read_sentences(encoder, tokenizer, ["</s>"]).pieces > 1
    templated = read_sentences(encoder, tokenizer, ["b"], template="a {text}")
    assert torch.equal(templated.states, read_sentences(encoder, tokenizer, ["a b"]).states)
    with pytest.raises(ConfigError, match="no place for the sentence"):
        read_sentences(encoder, tokenizer, ["a"], template="query:")
    with pytest.raises(DataError, match="no sentence"):
        read_sentences(encoder, tokenizer, [])


def test_table_is_sorted_and_consistent() -> None:
    encoder, tokenizer = tiny_encoder(), tiny_tokenizer()
    texts = {"en": TEXTS, "far": TEXTS[::-1], "same": list(TEXTS)}
    seen: list[str] = []
    table = alignment_table(encoder, tokenizer, texts, "en", progress=seen.append)
    assert sorted(seen) == ["en", "far", "same"]
    assert [row.language for row in table.languages] == ["same", "far"]
    same, far = table.languages
    assert same.layers == (100.0,) * 5 and (same.low, same.high, same.mean) == (100.0, 100.0, 100.0)
    assert same.best_layer == 4  # the upper one of equals
    reversed_states = read_sentences(encoder, tokenizer, TEXTS[::-1]).states
    expected = 100 * mexa(read_sentences(encoder, tokenizer, TEXTS).states, reversed_states)
    assert far.layers == pytest.approx(expected.tolist())
    assert far.low <= far.last <= far.high
    assert table.chance == pytest.approx(100 / 9) and table.num_layers == 4
    assert json.loads(json.dumps(table.to_dict()))["languages"][0]["best"] == 100.0
    with pytest.raises(DataError, match="different numbers"):
        alignment_table(encoder, tokenizer, {"en": TEXTS, "xx": TEXTS[:2]}, "en")
    with pytest.raises(DataError, match="cannot align"):
        alignment_table(encoder, tokenizer, {"en": TEXTS}, "en")


def test_correlation_is_scipys_and_its_interval_covers_the_true_one() -> None:
    rng = np.random.default_rng(0)
    names = [f"l{index}" for index in range(30)]
    scores = dict(zip(names, rng.normal(size=30).round(1), strict=True))  # rounded: ties
    accuracies = {name: value + rng.normal() for name, value in scores.items()} | {"other": 3.0}
    found = correlation(scores, accuracies)
    x, y = [scores[name] for name in names], [accuracies[name] for name in names]
    assert found.n == 30
    assert found.pearson == pytest.approx(pearsonr(x, y).statistic)
    assert found.spearman == pytest.approx(spearmanr(x, y).statistic)
    covered = 0
    for trial in range(100):
        draw = np.random.default_rng(trial).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=40)
        first, second = ({str(i): float(v) for i, v in enumerate(column)} for column in draw.T)
        result = correlation(first, second, resamples=300)
        covered += result.pearson_low <= 0.6 <= result.pearson_high
    assert 85 <= covered <= 99


@pytest.mark.parametrize("scores", [{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0, "c": 1.0}])
def test_no_correlation(scores: dict[str, float]) -> None:
    with pytest.raises(DataError, match="no correlation"):
        correlation(scores, {"a": 1.0, "b": 2.0, "c": 4.0})


# Parallel texts


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    for language, order in (("eng_Latn", range(9)), ("kaz_Cyrl", range(8, -1, -1)), ("uig_Arab", range(1, 9))):
        records = [{"id": i, "text": f"{language} {i}"} for i in order]
        write(root / language / "train.jsonl.gz", records[:5])
        write(root / language / "test.jsonl.gz", records[5:])
    return root


def test_folder_of_languages(folder: Path) -> None:
    found = read_parallel_texts(folder)
    assert found.english == "eng_Latn" and found.available == 8
    assert list(found.texts) == ["eng_Latn", "kaz_Cyrl", "uig_Arab"]
    for index, sentence in enumerate(found.texts["eng_Latn"]):
        assert found.texts["kaz_Cyrl"][index].split()[1] == sentence.split()[1]
    two = read_parallel_texts(folder, languages=["kk"])
    assert list(two.texts) == ["eng_Latn", "kaz_Cyrl"] and two.available == 9
    sample = read_parallel_texts(folder, limit=4, seed=1).texts["uig_Arab"]
    assert len(set(sample)) == 4 and sample != read_parallel_texts(folder, limit=4, seed=2).texts["uig_Arab"]


def test_lines_are_parallel_where_there_are_no_ids(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
    (tmp_path / "kk.txt").write_text("бір\nекі\nүш\n", encoding="utf-8")
    assert read_parallel_texts(tmp_path).texts == {"en": ["one", "two", "three"], "kk": ["бір", "екі", "үш"]}


@pytest.mark.parametrize(
    "records",
    [
        [{"src": a, "tgt": b, "src_lang": "ug", "tgt_lang": "en"} for a, b in (("x", "one"), ("y", "two"))],
        [{"id": i, "en": b, "ug": a} for i, (a, b) in enumerate((("x", "one"), ("y", "two")))],
        [{"id": i, "language": t, "text": w[i]} for t, w in (("ug", "xy"), ("en", ("one", "two"))) for i in (0, 1)],
    ],
)
def test_one_file_in_each_form(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    write(tmp_path / "pairs.jsonl.gz", records)
    assert read_parallel_texts(tmp_path / "pairs.jsonl.gz").texts == {"en": ["one", "two"], "ug": ["x", "y"]}


def test_other_fields_are_no_languages_although_their_names_are_tags(tmp_path: Path) -> None:
    """url is Urali, doc Northern Dong, num Niuafo'ou, dev Domung; id_ID is Indonesian."""
    languages = {"en": "one", "kk": "бір", "id_ID": "satu", "min": "ciek"}
    other = {"URL": "x.kz", "doc_id": "d", "Key": "k", "set": "a", "num": 1, "tag": None, "dev": True}
    records = [{"id": i, **other, **{name: f"{text} {i}" for name, text in languages.items()}} for i in range(3)]
    write(tmp_path / "pairs.jsonl.gz", records)
    assert list(read_parallel_texts(tmp_path / "pairs.jsonl.gz").texts) == list(languages)
    # Any field can be named, and what is not named need not be text.
    more = [{**record, "url": record["kk"], "xho": 5} for record in records]
    write(tmp_path / "more.jsonl.gz", more)
    assert list(read_parallel_texts(tmp_path / "more.jsonl.gz", languages=["url", "kk"]).texts) == ["en", "url", "kk"]
    with pytest.raises(DataError, match="field 'xho' holds a int"):
        read_parallel_texts(tmp_path / "more.jsonl.gz")
    with pytest.raises(DataError, match="field 'xho' holds a int"):
        read_parallel_texts(tmp_path / "more.jsonl.gz", languages=["xho"])


def test_two_files_of_one_language_are_refused(tmp_path: Path) -> None:
    for name in ("en.txt", "kk.txt"):
        (tmp_path / name).write_text("a\nb\n", encoding="utf-8")
    (tmp_path / "kk.jsonl").write_text('{"id": 1, "text": "c"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"kk\.jsonl and kk\.txt are both named after language 'kk'[\s\S]*keep one"):
        read_parallel_texts(tmp_path)


def test_what_is_wrong_with_a_corpus_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no language 'fr'") as told:
        read_parallel_texts(folder, languages=["fr"])
    assert "kaz_Cyrl" in str(told.value)
    write(folder / "fra_Latn" / "test.jsonl.gz", [{"id": 77, "text": "un"}])
    with pytest.raises(DataError, match="fra_Latn shares 0"):
        read_parallel_texts(folder)
    write(folder / "kaz_Cyrl" / "dev.jsonl.gz", [{"id": 1, "text": "another"}])
    with pytest.raises(DataError, match="id 1 has two texts"):
        read_parallel_texts(folder, languages=["kk"])
    (tmp_path / "kk.txt").write_text("бір\n", encoding="utf-8")
    write(tmp_path / "only" / "kk.jsonl.gz", [{"id": 1, "text": "бір"}])
    with pytest.raises(DataError, match="no English"):
        read_parallel_texts(tmp_path / "only")
    write(tmp_path / "bare.jsonl.gz", [{"title": "x"}])
    with pytest.raises(DataError, match="texts of two languages"):
        read_parallel_texts(tmp_path / "bare.jsonl.gz")


@pytest.mark.parametrize(
    ("name", "label"),
    [("kaz_Cyrl", "Kazakh"), ("zho_Hant", "Chinese (Traditional)"), ("swh_Latn", "Swahili"), ("all 3", "all 3")],
)
def test_language_labels(name: str, label: str) -> None:
    assert language_label(name) == label
