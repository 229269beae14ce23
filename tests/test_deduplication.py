"""Exact and near duplicates: nothing missed, nothing invented, the same everywhere."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest

from enc2gen.corpora import deduplication
from enc2gen.corpora.deduplication import DuplicateIndex, MinHasher, NearDuplicateConfig, duplicate_form, text_key
from enc2gen.errors import DataError, OutputError

ALPHABETS = {
    "kk": "абвгғдеёжзийкқлмнңоөпрстуұүфхһцчшщъыіьэюя     ",
    "bo": "ཀཁགངཅཆཇཉཏཐདནཔཕབམཙཚཛཝཞཟའཡརལཤསཧཨིེོུྱྲྟྐ་་་་་་་་་",
    "zh": "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种",
}
CONFIG = NearDuplicateConfig()


def sentence(rng: random.Random, script: str, length: int = 120) -> str:
    return "".join(rng.choice(ALPHABETS[script]) for _ in range(length)).strip()


def edited(text: str, share: float, rng: random.Random, script: str) -> str:
    """`text` with `share` of its characters replaced, deleted or doubled up with another one."""
    characters = list(text)
    for place in rng.sample(range(len(text)), round(share * len(text))):
        other = rng.choice(ALPHABETS[script].strip())
        characters[place] = rng.choice([other, "", characters[place] + other])
    return "".join(characters)


def jaccard(first: str, second: str, length: int) -> float:
    """The definition, on the sets themselves."""
    sets = [{f[i : i + length] for i in range(len(f) - length + 1)} for f in map(duplicate_form, (first, second))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def find(
    texts: Sequence[str], folder: Path, *, config: NearDuplicateConfig = CONFIG, batch: int = 1000, order: int = 0
) -> list[tuple[int, str, int]]:
    """Duplicates among the texts, whose ids are their places; added in batches, `order` shuffles these."""
    index = DuplicateIndex(folder / "index", config)
    starts = list(range(0, len(texts), batch))
    random.Random(order).shuffle(starts) if order else None
    for start in starts:
        part = texts[start : start + batch]
        ids = range(start, start + len(part))
        index.add(list(ids), [text_key(text) for text in part], MinHasher(config).signatures(part))
    return list(index.duplicates())


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Сәлем, Әлем!", "сәлем  әлем", True), ("བོད་སྐད།", "བོད་སྐད། ", True), ("བོད་སྐད", "བོདསྐད", False),
        ("می\u200cخواهم", "میخواهم", True), ("e\u0301t\u00e9", "\u00e9te\u0301", True), ("我们。", "我们", True),
        ("12 kg", "13 kg", False), ("a+b", "a-b", False), ("...", "!!!", False), ("a\u00a0b\tc\n", "A B C", True),
        ("", " ", True), ("你好，世界！我来了。", "你好世界我来了", True), ("他 用 Python 写", "他用Python写", True),
        ("今日は、スーパー に行く。", "今日はスーパーに行く", True), ("ผมชอบ กินข้าว", "ผมชอบกินข้าว", True),
        ("ຂ້ອຍ ມັກ", "ຂ້ອຍມັກ", True), ("ខ្ញុំ ទៅ។ ផ្សារ", "ខ្ញុំទៅផ្សារ", True), ("ကျွန်တော် သွား၊ မည်", "ကျွန်တော်သွားမည်", True),
        ("၁၊ ၂", "၁၂", False), ("1、2", "12", False), ("A B 中", "AB中", False), ("한국 사람", "한국사람", False),
    ],
)  # fmt: skip
def test_what_counts_as_the_same_text(first: str, second: str, same: bool) -> None:
    assert (text_key(first) == text_key(second)) is same
    assert len(text_key(first)) == 16


def test_the_earliest_of_exact_duplicates_is_kept(tmp_path: Path) -> None:
    texts = ["Бір жол.", "екі", "бір жол", "Екі!", "үш", "БІР ЖОЛ"]
    expected = [(2, "exact-duplicate", 0), (3, "exact-duplicate", 1), (5, "exact-duplicate", 0)]
    assert find(texts, tmp_path) == expected
    assert find(texts, tmp_path, batch=1, order=3) == expected, "the order of adding must not matter"


@pytest.mark.parametrize("script", ["kk", "bo", "zh"])
def test_near_duplicates_are_found_by_script_and_others_are_not(script: str, tmp_path: Path) -> None:
    rng = random.Random(1)
    originals = [sentence(rng, script) for _ in range(150)]
    near = [edited(text, 0.025, rng, script) for text in originals]
    far = [edited(text, 0.2, rng, script) for text in originals]
    found = {(a, b) for a, kind, b in find(originals + near + far, tmp_path) if kind == "near-duplicate"}
    caught = {(150 + i, i) for i in range(150)} & found
    assert len(caught) >= 147
    assert found <= {(150 + i, i) for i in range(150)}, "20 % of edits is another text"


def test_pairs_far_from_the_threshold_are_decided_as_the_definition_does(tmp_path: Path) -> None:
    rng = random.Random(2)
    pairs = []
    for _ in range(300):
        text = sentence(rng, "kk", 200)
        pairs.append((text, edited(text, rng.uniform(0.0, 0.12), rng, "kk")))
    texts = [text for pair in pairs for text in pair]
    dropped = {line for line, _, _ in find(texts, tmp_path)}
    errors = 4 * (0.75 * 0.25 / 128) ** 0.5  # four standard errors of the estimate
    for place, (first, second) in enumerate(pairs):
        similarity = jaccard(first, second, 3)
        if similarity > 0.9:
            assert 2 * place + 1 in dropped
        elif similarity < 0.75 - errors:
            assert 2 * place + 1 not in dropped


def chain_of(rng: random.Random, links: int) -> list[str]:
    chain = [sentence(rng, "kk", 300)]
    for _ in range(links):
        chain.append(edited(chain[-1], 0.015, rng, "kk"))
    return chain


def test_a_line_is_dropped_only_for_a_kept_line_that_it_is_itself_near(tmp_path: Path) -> None:
    """Each line of the chain is near the one before it; the last one has nothing in common with the first."""
    texts = chain_of(random.Random(4), 60)
    assert jaccard(texts[0], texts[-1], 3) < 0.3 and all(jaccard(a, b, 3) > 0.8 for a, b in pairwise(texts))
    found = find(texts, tmp_path)
    dropped = {line for line, _, _ in found}
    assert 0 not in dropped and 30 < len(dropped) < 57
    errors = 4 * (0.75 * 0.25 / 128) ** 0.5  # four standard errors of the estimate
    for line, kind, kept in found:
        assert kind == "near-duplicate" and kept < line and kept not in dropped
        assert jaccard(texts[line], texts[kept], 3) > 0.75 - errors
    assert find(texts, tmp_path, batch=7, order=2) == found


def test_exact_copies_follow_a_near_duplicate(tmp_path: Path) -> None:
    chain = chain_of(random.Random(4), 3)
    found = find([*chain, chain[3].upper() + "!"], tmp_path)
    assert [(line, kept) for line, _, kept in found] == [(i, 0) for i in range(1, 5)]
    assert [kind for _, kind, _ in found] == ["near-duplicate"] * 3 + ["exact-duplicate"]


def test_short_lines_are_only_compared_exactly(tmp_path: Path) -> None:
    first, second = "Бағасы 100 теңге болды.", "Бағасы 200 теңге болды."
    assert MinHasher(CONFIG).signatures([first, "", "абв" * 100, "\ud800" * 50]) == [()] * 4
    assert find([first, second, first], tmp_path) == [(2, "exact-duplicate", 0)]


def test_many_lines_in_one_bucket_are_one_group(tmp_path: Path) -> None:
    rng = random.Random(5)
    text = sentence(rng, "kk", 400)
    texts = [text] + [edited(text, 0.005, rng, "kk") for _ in range(200)]
    assert {(line, kept) for line, _, kept in find(texts, tmp_path)} == {(i, 0) for i in range(1, 201)}


@pytest.mark.parametrize("fetched", [1, 2, 5, 100])
def test_each_pair_of_a_bucket_is_compared_once_wherever_a_fetch_ends(fetched: int, tmp_path: Path) -> None:
    buckets = [7, 7, 7, 7, 8, 9, 9]
    rows = pa.table(
        {
            "id": pa.array(range(7), pa.int64()),
            "bucket": pa.array(buckets, pa.uint64()),
            "signature": pa.array([b"s" * CONFIG.permutations] * 7, pa.binary()),
        }
    )
    reader = pa.RecordBatchReader.from_batches(rows.schema, rows.to_batches(max_chunksize=fetched))
    found = [pair for a, b in DuplicateIndex(tmp_path / "i")._verified(reader) for pair in zip(a, b, strict=True)]
    expected = [(a, b) for a in range(7) for b in range(a + 1, 7) if buckets[a] == buckets[b]]
    assert sorted(found) == expected


def test_batches_and_small_fetches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(6)
    texts = [sentence(rng, "bo") for _ in range(60)]
    texts += [edited(rng.choice(texts), 0.02, rng, "bo") for _ in range(60)]
    expected = find(texts, tmp_path)
    assert len(expected) > 40
    monkeypatch.setattr(deduplication, "_FETCHED_ROWS", 3)
    assert find(texts, tmp_path, batch=7, order=2) == expected


def test_signatures_are_the_same_in_every_process() -> None:
    rng = random.Random(7)
    texts = [sentence(rng, script) for script in ALPHABETS]
    code = (
        "import json, sys; from enc2gen.corpora.deduplication import *;"
        "print(json.dumps(MinHasher(NearDuplicateConfig()).signatures(json.loads(sys.argv[1]))))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "RAYON_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(texts)], env=environment, capture_output=True, text=True, check=True
    )
    assert [tuple(row) for row in json.loads(run.stdout)] == MinHasher(CONFIG).signatures(texts)
    assert [MinHasher(CONFIG).signatures([text])[0] for text in texts] == MinHasher(CONFIG).signatures(texts)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.75, 0.8, 0.95])
@pytest.mark.parametrize("permutations", [64, 128, 256])
def test_bands_find_pairs_at_the_threshold(threshold: float, permutations: int) -> None:
    config = NearDuplicateConfig(threshold=threshold, permutations=permutations)
    assert config.bands * config.rows <= permutations
    assert 1 - (1 - threshold**config.rows) ** config.bands >= 0.95
    more = config.rows + 1
    assert more > permutations or 1 - (1 - threshold**more) ** (permutations // more) < 0.95, (
        "rows are as many as can be"
    )


def test_another_configuration_and_a_blocked_folder_are_errors(tmp_path: Path) -> None:
    signatures = MinHasher(NearDuplicateConfig(permutations=64)).signatures(["абвгдежзийклмнопрстуфхцчшщъыьэюя"])
    with pytest.raises(DataError, match="another configuration"):
        DuplicateIndex(tmp_path / "index", CONFIG).add([0], [b"k"], signatures)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="index of duplicates"):
        DuplicateIndex(tmp_path / "file" / "index")


def test_an_earlier_index_in_the_folder_is_replaced(tmp_path: Path) -> None:
    DuplicateIndex(tmp_path / "index").add([0, 1], [b"a", b"a"], [(), ()])
    index = DuplicateIndex(tmp_path / "index")
    index.add([0], [b"a"], [()])
    assert list(index.duplicates()) == []
