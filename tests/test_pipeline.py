"""`prepare_corpus` end to end, on planted defects whose fate is known, and on input that is bad."""

from __future__ import annotations

import gzip
import json
import operator
import os
import random
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from enc2gen.corpora import chunks, engines, pipeline
from enc2gen.corpora.cleaning import CleaningConfig
from enc2gen.corpora.cleaning_report import CleaningStats
from enc2gen.corpora.engines import ENGINES, LocalEngine
from enc2gen.corpora.lines import MAX_LINE_BYTES, Line, ReadingConfig, find_sources, read_lines
from enc2gen.corpora.pipeline import Progress, prepare_corpus, remarks, split_few_documents, split_of_document
from enc2gen.corpora.readers import read_records
from enc2gen.corpora.shards import PreparedCorpus
from enc2gen.errors import ConfigError, DataError, OutputError

_SYLLABLES = re.findall(
    r"\S+",
    "བོད སྐད ཡིག ནི མི རིགས ཀྱི ཡིན ལྷ ས ཆེན པོ རྒྱལ ཁབ དང སློབ གྲྭ དགེ རྒན ཆུ རི ནགས ཚལ གནམ ཉི མ ཟླ བ སྐར འོད ལམ ཁང "
    "དེབ ཀློག འབྲི གཏམ བཤད སྔོན རབས ལོ རྒྱུས དེང དུས གསར འགྱུར ཤེས རིག གཞུང ལུགས བསླབ བྱ སེམས བསམ ལྟ ཉན འགྲོ འོང",
)


def _sentences(count: int, *, syllables: int = 40, seed: int = 1) -> list[str]:
    generator = random.Random(seed)
    return ["་".join(generator.choices(_SYLLABLES, k=syllables)) + "།" for _ in range(count)]


def _write_jsonl(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _texts(folder: Path) -> list[str]:
    return [record["text"] for split in ("train", "dev", "test") if (folder / split).exists()
            for record in read_records(folder / split)]  # fmt: skip


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_LINES", 50)
    monkeypatch.setattr(chunks, "_GROWTH", ())


def _planted(tmp_path: Path) -> tuple[Path, Path, list[str], dict[str, int]]:
    """A corpus with planted defects, evaluation file, texts that must be left, and drops that must be counted."""
    clean = _sentences(240)
    leaked = _sentences(6, seed=2)
    damaged = list(clean)
    for index in range(0, 10):
        damaged[index] = damaged[index].encode().decode("latin-1")
        damaged[10 + index] = f"<p class='x'>{damaged[10 + index]}</p>&nbsp;"
        damaged[20 + index] = "\x07" + damaged[20 + index].replace("་", "\u200e་\x00", 1)
    planted = {
        "exact-duplicate": [text + " །།" for text in clean[:12]],
        "near-duplicate": [text.replace("་", "་བཟང་", 1) for text in clean[30:37]],
        "wrong-language": [
            "Это предложение на русском языке, и оно довольно длинное.",
            "这是一个足够长的中文句子。" * 1,
        ],
        "contaminated": leaked,
        "repetition": ["བཀྲ་ཤིས་" * 20, "hahaha" * 12],
        "few-letters": ["1 2 3 4 5 6 7 8 9", "----------", "2024/05/06 12:00"],
        "too-short": ["ཡིན", "ok"],
        "too-long": ["་".join(_sentences(80, seed=5))],
        "encoding": ["བོད་ཡིག་\ufffd་རེད།"],
        "empty": ["", "   ", "\u200b\x00"],
        "markup": ["<br/><hr>", "<!-- nothing -->"],
    }
    rest = [text for texts in planted.values() for text in texts]
    random.Random(3).shuffle(rest)
    lines = damaged + rest
    records = [{"body": text, "url": f"page-{number // 6}"} for number, text in enumerate(lines)]
    evaluation = _write_jsonl(tmp_path / "eval.jsonl", [{"question": text, "id": "1"} for text in leaked])
    counts = {reason: len(texts) for reason, texts in planted.items()}
    return _write_jsonl(tmp_path / "corpus.jsonl", records), evaluation, clean, counts


def _planted_config(evaluation: Path) -> CleaningConfig:
    return CleaningConfig(
        language="bo",
        reading=ReadingConfig(field="body", document_field="url"),
        against=(str(evaluation),),
        dev_percent=20,
        test_percent=20,
        shard_lines=60,
    )


def test_planted_defects_are_all_found_and_nothing_else_is(tmp_path: Path) -> None:
    corpus, evaluation, clean, counts = _planted(tmp_path)
    output = tmp_path / "out"
    seen: list[Progress] = []
    config = _planted_config(evaluation)
    stats = prepare_corpus([str(corpus)], output, config, workers=1, explain=True, on_progress=seen.append)
    assert {reason: languages.total() for reason, languages in stats.dropped.items()} == counts
    assert sorted(_texts(output)) == sorted(clean)
    assert stats.total_kept == 240 and stats.read == 240 + sum(counts.values())
    assert {kind: languages.total() for kind, languages in stats.repaired.items()}.items() >= {
        ("mojibake", 10),
        ("markup", 10),
    }
    assert stats.repaired["controls"].total() == 10
    # --explain: every dropped line, where it was, and for duplicates which line was kept
    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    for reason, count in counts.items():
        dropped = [json.loads(line) for line in (output / "dropped" / f"{reason}.jsonl").open(encoding="utf-8")]
        assert len(dropped) == count
        for entry in dropped:
            assert entry["source"] == "corpus.jsonl" and entry["reason"] == reason
            if "kept" not in entry:
                assert records[entry["line"] - 1]["body"] == entry["text"]
    exact = [json.loads(line) for line in (output / "dropped" / "exact-duplicate.jsonl").open(encoding="utf-8")]
    assert sorted(entry["kept"]["line"] for entry in exact) == list(range(1, 13))
    assert all(entry["text"].startswith(clean[entry["kept"]["line"] - 1]) for entry in exact)
    # documents are not cut by the split, the shares are about right, the order is the input's
    splits = {split: list(read_records(output / split)) for split in ("train", "dev", "test")}
    documents = {split: {record["document"] for record in records} for split, records in splits.items()}
    assert sum(map(len, documents.values())) == len(set().union(*documents.values())) == stats.documents
    assert 10 <= len(splits["dev"]) <= 100 and 10 <= len(splits["test"]) <= 100
    order = {text: number for number, text in enumerate(clean)}
    assert [order[r["text"]] for r in splits["train"]] == sorted(order[r["text"]] for r in splits["train"])
    assert {r["language"] for r in splits["train"]} == {"bo"}
    assert [p.name for p in sorted((output / "train").iterdir())][:2] == ["part-00000.parquet", "part-00001.parquet"]
    assert all(pq.read_metadata(p).num_rows <= 60 for p in output.rglob("*.parquet"))
    opened = PreparedCorpus.open(output)
    assert opened.splits == dict(stats.splits) == {split: len(records) for split, records in splits.items()}
    assert opened.language == "bo" and list(opened.records("dev")) == splits["dev"]
    assert opened.stats() == stats
    assert {step.phase for step in seen} == {"cleaning", "duplicates", "writing"}
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_workers_chunks_and_engines_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, evaluation, _, _ = _planted(tmp_path)
    config = _planted_config(evaluation)
    prepare_corpus([str(corpus)], tmp_path / "one", config, workers=1, explain=True)
    prepare_corpus([str(corpus)], tmp_path / "two", config, workers=2, explain=True)
    monkeypatch.setattr(chunks, "CHUNK_LINES", 7)
    prepare_corpus([str(corpus)], tmp_path / "small", config, workers=1, explain=True)
    expected = _files(tmp_path / "one")
    assert len(expected) > 3
    assert _files(tmp_path / "two") == expected == _files(tmp_path / "small")
    for path in (tmp_path / "one" / "dropped").iterdir():
        for other in ("two", "small"):
            assert sorted((tmp_path / other / "dropped" / path.name).open()) == sorted(path.open())
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


def test_ray_gives_the_same(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="the extra enc2gen[ray] is not installed")
    corpus, evaluation, _, _ = _planted(tmp_path)
    config = _planted_config(evaluation)
    prepare_corpus([str(corpus)], tmp_path / "local", config, workers=1)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        prepare_corpus([str(corpus)], tmp_path / "ray", config, engine="ray")
        with pytest.raises(DataError, match="no field 'text'"):
            prepare_corpus([str(corpus)], tmp_path / "bad", CleaningConfig(language="bo"), engine="ray")
    finally:
        ray.shutdown()
    assert _files(tmp_path / "ray") == _files(tmp_path / "local")


@pytest.mark.parametrize("kind", [ConnectionError, RuntimeError, ValueError])
def test_a_cluster_that_cannot_be_reached_is_named(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="the extra enc2gen[ray] is not installed")
    corpus, evaluation, _, _ = _planted(tmp_path)

    def refuse(**_: object) -> None:
        raise kind("Failed to connect to Ray cluster at 192.0.2.1:6379\nand how it came about")

    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConfigError, match="Failed to connect") as caught:
        prepare_corpus([str(corpus)], tmp_path / "out", _planted_config(evaluation), engine="ray")
    assert "RAY_ADDRESS=192.0.2.1:6379" in str(caught.value) and "came about" not in str(caught.value)
    assert "RAY_AUTH_MODE" in str(caught.value)


def test_a_stopped_run_never_looks_complete_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, evaluation, _, _ = _planted(tmp_path)
    config = _planted_config(evaluation)
    expected = prepare_corpus([str(corpus)], tmp_path / "whole", config, workers=1)
    real, done = pipeline.clean_chunk, []

    def failing(chunk: chunks.Chunk) -> chunks.ChunkResult:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(chunk.index)
        return real(chunk)

    output = tmp_path / "out"
    monkeypatch.setattr(pipeline, "clean_chunk", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus([str(corpus)], output, config, workers=1)
    assert done == [0, 1, 2]
    assert not list(output.glob("*/part-*.parquet"))
    with pytest.raises(DataError, match="not a complete prepared corpus"):
        PreparedCorpus.open(output)
    monkeypatch.setattr(pipeline, "clean_chunk", lambda chunk: (done.append(chunk.index), real(chunk))[1])
    # the disk is full while the shards are written
    monkeypatch.setattr(pipeline.ShardWriter, "add", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        prepare_corpus([str(corpus)], output, config, workers=1)
    with pytest.raises(DataError, match="not a complete"):
        PreparedCorpus.open(output)
    monkeypatch.undo()
    monkeypatch.setattr(chunks, "CHUNK_LINES", 50)
    monkeypatch.setattr(chunks, "_GROWTH", ())
    assert done == sorted(set(done)) and len(done) == 6  # no chunk was worked on twice
    stats = prepare_corpus([str(corpus)], output, config, workers=1)
    stats.seconds = expected.seconds
    assert stats == expected
    assert _files(output) == _files(tmp_path / "whole")


def test_other_settings_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("\n".join(_sentences(30)), encoding="utf-8")
    output, config = tmp_path / "out", CleaningConfig(language="bo")
    first = prepare_corpus([str(source)], output, config, workers=1)
    manifest = (output / "manifest.json").read_bytes()
    assert prepare_corpus([str(source)], output, config, workers=1) == first  # complete: nothing is done again
    other = CleaningConfig(language="bo", min_length=6)
    with pytest.raises(OutputError, match="min_length: 5 then, 6 now"):
        prepare_corpus([str(source)], output, other, workers=1)
    assert (output / "manifest.json").read_bytes() == manifest
    prepare_corpus([str(source)], output, other, workers=1, overwrite=True)
    assert PreparedCorpus.open(output).manifest["config"]["min_length"] == 6
    source.write_text("\n".join(_sentences(31)), encoding="utf-8")
    with pytest.raises(OutputError, match="other settings or inputs"):
        prepare_corpus([str(source)], output, other, workers=1)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.doc").write_text("precious")
    with pytest.raises(OutputError, match="something else"):
        prepare_corpus([str(source)], foreign, config, workers=1, overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        prepare_corpus([str(source)], source, config, workers=1)
    assert (foreign / "thesis.doc").read_text() == "precious"


def test_a_shard_that_is_cut_off_or_missing_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("\n".join(_sentences(30)), encoding="utf-8")
    prepare_corpus([str(source)], tmp_path / "out", CleaningConfig(language="bo"), workers=1)
    shard = next((tmp_path / "out").glob("*/part-00000.parquet"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match="a shard has"):
        PreparedCorpus.open(tmp_path / "out")
    shard.unlink()
    with pytest.raises(DataError, match=r"(?s)a shard is missing.*--overwrite"):
        PreparedCorpus.open(tmp_path / "out")
    prepare_corpus([str(source)], tmp_path / "out", CleaningConfig(language="bo"), workers=1, overwrite=True)
    assert len(_texts(tmp_path / "out")) == 30


def test_nothing_left_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("Это предложение написано на русском языке, и оно длинное.\n" * 9 + "ok\n", encoding="utf-8")
    config = CleaningConfig(language="bo")
    with pytest.raises(DataError, match=r"(?s)10 lines: 90% are dropped as wrong-language .*ru.*check --lang"):
        prepare_corpus([str(source)], tmp_path / "out", config, workers=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="the dropped lines are in"):
        prepare_corpus([str(source)], tmp_path / "out", config, workers=1, explain=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"dropped"}
    russian = CleaningConfig(language="ru", duplicates="none")
    assert prepare_corpus([str(source)], tmp_path / "out", russian, workers=1).total_kept == 9


def test_messy_files(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = _sentences(8)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + texts[0].encode() + b"\r\n" + texts[1].encode())
    (folder / "b.txt").write_bytes(texts[2].encode("utf-16"))
    (folder / "c.txt").write_bytes(
        texts[3].encode() + b"\n" + "плохая строка".encode("cp1251") + b"\n" + texts[4].encode() + b"\n"
    )
    (folder / "d.txt.gz").write_bytes(gzip.compress(texts[5].replace("་", "\0་", 1).encode()))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "long.txt").write_bytes(
        (texts[6] + "\n").encode() + "ཀ".encode() * MAX_LINE_BYTES + b"\n" + texts[7].encode()
    )
    (folder / "notes.pdf").write_bytes(b"%PDF")
    stats = prepare_corpus([str(folder)], tmp_path / "out", CleaningConfig(language="bo"), workers=1)
    assert sorted(_texts(tmp_path / "out")) == sorted(texts)
    assert {reason: languages.total() for reason, languages in stats.dropped.items()} == {
        "encoding": 1,
        "too-long": 1,
    }
    assert stats.documents == 5
    assert {record["source"] for split in ("train", "dev", "test") for record in
            PreparedCorpus.open(tmp_path / "out").records(split)} == {
        "a.txt", "b.txt", "c.txt", "d.txt.gz", "long.txt"}  # fmt: skip


def test_files_in_another_encoding(tmp_path: Path) -> None:
    text = "Қазір ауа райы жақсы.".replace("Қ", "К").replace("қ", "к")
    for name, encoding in (("a", "cp1251"), ("b", "utf-8"), ("c", "utf-16-le")):
        (tmp_path / f"{name}.txt").write_bytes("\n".join([text] * 3).encode(encoding))
    sources = [str(tmp_path / f"{name}.txt") for name in "abc"]
    with pytest.raises(DataError, match=r"2 of 3 files are not UTF-8: a.txt, c.txt(?s:.*)--encoding"):
        find_sources(sources, ReadingConfig())
    for files, encoding in ((sources[:2], "windows-1251"), (sources[1:], "utf-16-le")):
        config = ReadingConfig(encoding=encoding)
        assert [line.text for line in read_lines(find_sources(files, config), config)] == [text] * 6
    with pytest.raises(ValueError, match="unknown encoding 'klingon'"):
        ReadingConfig(encoding="klingon")


def test_a_huge_line_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        for _ in range(200):
            file.write(b"x" * MAX_LINE_BYTES)
        file.write(b"\nlast\n")
    config = ReadingConfig()
    tracemalloc.start()
    lines = list(read_lines(find_sources([str(path)], config), config))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(line.problem, line.number) for line in lines] == [("too-long", 1), ("", 2)]
    assert peak < 8 * MAX_LINE_BYTES


def test_documents_of_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\nb\n\n\nc\n" + "d\n" * 150)

    def documents(mode: str, sources: list[Path]) -> list[int]:
        config = ReadingConfig.model_validate({"documents": mode})
        lines = read_lines(find_sources([str(source) for source in sources], config), config)
        return list(Counter((line.source, line.document) for line in lines if line.text).values())

    assert documents("block", [path]) == documents("auto", [path]) == [2, 100, 51]
    assert documents("file", [path]) == [153]
    assert documents("line", [path]) == [1] * 153
    many = [tmp_path / f"{number}.txt" for number in range(20)]
    for file in many:
        file.write_text("a\n\nb\n")
    assert documents("auto", many) == [2] * 20


def test_damaged_and_unfit_sources(tmp_path: Path) -> None:
    config = CleaningConfig(language="bo")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(1000).hex().encode())[:-20])
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text('{"text": ["a"]}\n')
    (tmp_path / "typo.jsonl").write_text('{"txt": "a"}\n')
    (tmp_path / "empty.txt").write_text("")
    cases = {
        "cut.txt.gz": "truncated",
        "bad.jsonl": "not valid JSON",
        "list.jsonl": "holds a list, not text",
        "typo.jsonl": "did you mean 'txt'",
        "empty.txt": "all files are empty",
        "gone.txt": "no such file",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            prepare_corpus([str(tmp_path / name)], tmp_path / "out", config, workers=1)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with pytest.raises(DataError, match="no such file"):
        missing = CleaningConfig(language="bo", against=("gone.jsonl",))
        prepare_corpus([str(tmp_path / "bad.jsonl")], tmp_path / "out", missing, workers=1)
    with pytest.raises(ConfigError, match="unknown engine 'rya'"):
        prepare_corpus([str(tmp_path / "bad.jsonl")], tmp_path / "out", config, engine="rya")
    with pytest.raises(ConfigError, match="unknown language identifier"):
        unknown = CleaningConfig(language="bo", identifier="oracle")
        prepare_corpus([str(tmp_path / "bad.jsonl")], tmp_path / "out", unknown)


def test_split_follows_seed_and_shares() -> None:
    config = CleaningConfig(language="bo", dev_percent=10, test_percent=30)
    names = [f"document {number}" for number in range(5000)]
    shares = Counter(split_of_document(name, config) for name in names)
    assert shares["dev"] == pytest.approx(500, abs=80) and shares["test"] == pytest.approx(1500, abs=130)
    other = config.model_copy(update={"seed": 1})
    assert [split_of_document(name, other) for name in names] != [split_of_document(name, config) for name in names]


def test_remarks_on_empty_splits() -> None:
    stats = CleaningStats(documents=3)
    stats.splits.update({"train": 3, "dev": 0, "test": 0})
    found = remarks(stats, CleaningConfig(language="bo", test_percent=0))
    assert len(found) == 1 and "dev is empty: there are only 3 documents" in found[0]


def test_local_engine_keeps_order_and_draws_items_as_needed() -> None:
    drawn = []
    items = (drawn.append(number) or number for number in range(1000))
    results = LocalEngine(2).map(operator.neg, items)
    assert [next(results) for _ in range(5)] == [0, -1, -2, -3, -4]
    assert len(drawn) <= 5 + 4
    results.close()
    assert sorted(ENGINES) == ["local", "ray"]


def test_the_first_chunks_are_small_and_no_line_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    lines = [Line(str(number), "d", "s", number) for number in range(25_000)]
    found = list(chunks.chunked(lines, CleaningConfig(language="bo"), explain=False))
    assert [len(chunk.lines) for chunk in found][:5] == [625, 625, 625, 625, 1250]
    assert max(len(chunk.lines) for chunk in found) <= chunks.CHUNK_LINES
    assert [line for chunk in found for line in chunk.lines] == lines
    assert all(chunk.lines[0].number == chunk.first_id for chunk in found)


def test_a_run_that_failed_at_once_can_be_corrected(tmp_path: Path) -> None:
    corpus = _write_jsonl(tmp_path / "corpus.jsonl", [{"content": text} for text in _sentences(5)])
    with pytest.raises(DataError, match="no field 'text'"):
        prepare_corpus([str(corpus)], tmp_path / "out", CleaningConfig(language="bo"), workers=1)
    config = CleaningConfig(language="bo", reading=ReadingConfig(field="content"))
    assert prepare_corpus([str(corpus)], tmp_path / "out", config, workers=1).total_kept == 5


def test_workers_import_no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENC2GEN_COMMAND", raising=False)
    with engines._light_imports():
        assert os.environ["ENC2GEN_COMMAND"]
    assert "ENC2GEN_COMMAND" not in os.environ
    code = "import sys, enc2gen.corpora.chunks; sys.exit('torch' in sys.modules)"
    with engines._light_imports():
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_few_documents_leave_no_split_empty() -> None:
    config = CleaningConfig(language="bo", dev_percent=5, test_percent=5)
    names = [f"book-{number}.txt" for number in range(54)] * 2
    splits = split_few_documents(names, config)
    assert Counter(splits.values()) == {"train": 48, "dev": 3, "test": 3}
    assert split_few_documents(reversed(names), config) == splits
    assert Counter(split_few_documents("abc", config).values()) == {"train": 1, "dev": 1, "test": 1}
    assert split_few_documents("abc", CleaningConfig(language="bo", dev_percent=0, test_percent=0)).keys() == set("abc")
    assert set(split_few_documents("abc", CleaningConfig(language="bo", dev_percent=0, test_percent=0)).values()) == {
        "train"
    }
    assert split_few_documents("ab", config) == {}
    assert split_few_documents(map(str, range(1001)), config) == {}


def _prepare(sources: list[Path | str], output: Path, *against: Path) -> list[str]:
    config = CleaningConfig(language="bo", filter_language=False, against=tuple(map(str, against)))
    prepare_corpus(list(map(str, sources)), output, config, workers=1)
    return _texts(output)


def test_parallel_sources_that_were_rewritten_are_noticed(tmp_path: Path) -> None:
    for side, seed in (("a", 1), ("b", 2)):
        (tmp_path / f"{side}.txt").write_text("\n".join(_sentences(12, seed=seed)), encoding="utf-8")
    source = f"{tmp_path / 'a.txt'}|{tmp_path / 'b.txt'}"
    config = CleaningConfig(language="bo", filter_language=False, reading=ReadingConfig(field="target"))
    prepare_corpus([source], tmp_path / "out", config, workers=1)
    (tmp_path / "b.txt").write_text("\n".join(_sentences(12, seed=3)), encoding="utf-8")
    with pytest.raises(OutputError):
        prepare_corpus([source], tmp_path / "out", config, workers=1)


def test_evaluation_files_of_one_name_count_each(tmp_path: Path) -> None:
    lines = _sentences(12)
    source = tmp_path / "corpus.txt"
    source.write_text("\n".join(lines), encoding="utf-8")
    tests = tmp_path / "tests"
    for name, text in (("a", "x" * 40), ("b", "y" * 40)):
        (tests / name).mkdir(parents=True)
        (tests / name / "test.txt").write_text(text, encoding="utf-8")
    assert len(_prepare([source], tmp_path / "out", tests)) == 12
    (tests / "a" / "test.txt").write_text("\n".join(lines[:2]), encoding="utf-8")
    with pytest.raises(OutputError):
        _prepare([source], tmp_path / "out", tests)
    # in the same process, too, which keeps an index of the test sets
    assert sorted(_prepare([source], tmp_path / "new", tests)) == sorted(lines[2:])


def test_a_prepared_corpus_is_its_texts_and_nothing_else(tmp_path: Path) -> None:
    lines = _sentences(12)
    (tmp_path / "corpus.txt").write_text("\n".join([*lines, lines[0]]), encoding="utf-8")
    config = CleaningConfig(language="bo", filter_language=False)
    prepare_corpus([str(tmp_path / "corpus.txt")], tmp_path / "one" / "bo", config, workers=1, explain=True)
    assert list((tmp_path / "one" / "bo" / "dropped").iterdir())
    other = _sentences(1, seed=9)[0]
    (tmp_path / "one" / "report.json").write_text(json.dumps({"text": other}), encoding="utf-8")  # not ours
    assert sorted(_prepare([tmp_path / "one"], tmp_path / "two")) == sorted([*lines, other])


def test_links_keep_their_own_names(tmp_path: Path) -> None:
    lines = _sentences(12)
    for number, language in enumerate(("kk", "ug")):
        (tmp_path / "blobs" / language).mkdir(parents=True)
        target = tmp_path / "blobs" / language / "part.txt"
        target.write_text("\n".join(lines[6 * number : 6 * number + 6]), encoding="utf-8")
        (tmp_path / "corpus" / language).mkdir(parents=True)
        (tmp_path / "corpus" / language / "part.txt").symlink_to(target)
    found = find_sources([str(tmp_path / "corpus")], ReadingConfig())
    assert [source.name for source in found] == ["kk/part.txt", "ug/part.txt"]


def test_documents_of_duplicates_alone_take_no_place_in_a_split(tmp_path: Path) -> None:
    lines = _sentences(15)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(10):  # the last five repeat the first five
        first = number % 5 * 3
        (folder / f"{number}.txt").write_text("\n".join(lines[first : first + 3]), encoding="utf-8")
    for seed in range(4):
        config = CleaningConfig(
            language="bo", dev_percent=5, test_percent=5, seed=seed, reading=ReadingConfig(documents="file")
        )
        stats = prepare_corpus([str(folder)], tmp_path / f"out{seed}", config, workers=1)
        assert stats.splits == {"train": 9, "dev": 3, "test": 3}


def test_a_first_line_that_is_too_long_is_dropped_with_a_byte_order_mark_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"a" * MAX_LINE_BYTES + b"tail\nnext\n")
    config = ReadingConfig()
    lines = list(read_lines(find_sources([str(tmp_path / "a.txt")], config), config))
    assert [(line.problem, line.text[:4]) for line in lines] == [("too-long", "aaaa"), ("", "next")]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize(
    "text",
    [
        "བོད་སྐད་ཡིག་ནི་བོད་མི་རིགས་ཀྱི་སྐད་ཡིག་ཡིན།",
        "ئۇيغۇر تىلى تۈركىي تىللارنىڭ بىرى",
        "Қазақ тілі түркі тілдерінің бірі",
        "Шла Саша по шоссе и сосала сушку",
        "ᠮᠣᠩᠭᠣᠯ ᠬᠡᠯᠡ ᠪᠣᠯ ᠮᠣᠩᠭᠣᠯᠴᠤᠳ ᠤᠨ ᠬᠡᠯᠡ",
        "中华人民共和国的首都是北京",
        "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอน",
        "हिन्दी विश्व की एक प्रमुख भाषा है",
    ],
)
def test_wide_encodings_are_read_in_every_script(text: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "wide.txt").write_bytes("\n".join([text] * 3).encode(encoding))
    (tmp_path / "utf-8.txt").write_text("\n".join([text] * 50 + ["a\0b"]), encoding="utf-8")
    config = ReadingConfig(encoding=encoding)
    lines = list(read_lines(find_sources([str(tmp_path / "wide.txt"), str(tmp_path / "utf-8.txt")], config), config))
    assert [(line.text, line.problem) for line in lines] == [(text, "")] * 53 + [("a\0b", "")]
    with pytest.raises(DataError, match=r"1 of 2 files are not UTF-8: wide.txt"):
        find_sources([str(tmp_path)], ReadingConfig())


def test_half_a_character_costs_its_line_only(tmp_path: Path) -> None:
    lines = _sentences(12)
    records = [{"text": text, "page": f"p{number}"} for number, text in enumerate(lines)]
    records[3]["page"] = "p\ud83d"
    damaged = [{"text": text, "page": "\ude00"} for text in ("half \ud83d a pair", "<p>half \ud83d a pair</p>")]
    corpus = _write_jsonl(tmp_path / "corpus.jsonl", damaged + records)
    config = CleaningConfig(language="bo", reading=ReadingConfig(document_field="page"))
    stats = prepare_corpus([str(corpus)], tmp_path / "out", config, workers=1, explain=True)
    assert sorted(_texts(tmp_path / "out")) == sorted(lines)
    assert {reason: languages.total() for reason, languages in stats.dropped.items()} == {"encoding": 2}
    opened = PreparedCorpus.open(tmp_path / "out")
    assert "p?" in {record["document"] for split in opened.splits for record in opened.records(split)}
    assert (tmp_path / "out" / "dropped" / "encoding.jsonl").read_text(encoding="utf-8").count("half ? a pair") == 2


@pytest.mark.parametrize("phase", ["cleaning", "writing"])
@pytest.mark.parametrize("min_length", [5, 6])
def test_a_folder_that_a_run_is_filling_is_left_alone(phase: str, min_length: int, tmp_path: Path) -> None:
    source, output = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("\n".join(_sentences(120)), encoding="utf-8")
    refused: list[str] = []

    def start_another(step: Progress) -> None:
        if step.phase == phase and not refused:
            other = CleaningConfig(language="bo", min_length=min_length)
            with pytest.raises(OutputError) as caught:
                prepare_corpus([str(source)], output, other, workers=1, overwrite=min_length == 6)
            refused.append(str(caught.value))

    prepare_corpus([str(source)], output, CleaningConfig(language="bo"), workers=1, on_progress=start_another)
    assert f"in use by process {os.getpid()}" in refused[0]
    assert len(_texts(output)) == sum(PreparedCorpus.open(output).splits.values()) == 120
    assert not (output / ".work").exists()


def test_records_without_a_document_are_documents_of_their_own(tmp_path: Path) -> None:
    values = [None, float("nan"), "", " ", "page", "page", 7]
    records = [{"text": text, "url": value} for text, value in zip(_sentences(7), values, strict=True)]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = ReadingConfig(document_field="url")
    sources = find_sources([str(corpus)], config)
    names = [line.document for line in read_lines(sources, config)]
    assert names == ["c.jsonl#1", "c.jsonl#2", "c.jsonl#3", "c.jsonl#4", "page", "page", "7"]
    for value, kind in ((["a"], "list"), ({"a": 1}, "dict")):
        corpus.write_text(json.dumps({"text": "a", "url": value}))
        with pytest.raises(DataError, match=rf"(?s)'url' holds a {kind}.*c.jsonl, record 1|record 1.*holds a {kind}"):
            list(read_lines(sources, config))


def test_names_depend_on_nothing_but_the_place_in_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("src/a.txt", "src/b/c.txt", "other/a.txt", "third/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(*sources: str | Path) -> list[str]:
        return [source.name for source in find_sources([str(source) for source in sources], ReadingConfig())]

    src, other = tmp_path / "src", tmp_path / "other"
    assert names(src) == names(f"{src}/") == ["a.txt", "b/c.txt"]
    assert names(src, tmp_path / "third" / "a.txt", other) == ["a.txt", "b/c.txt", "2/a.txt", "3/a.txt"]
    assert names(src, src / "a.txt") == ["a.txt", "b/c.txt", "a.txt"]  # the same file is the same document
    assert names(src / "b" / "c.txt", src) == ["c.txt", "a.txt", "c.txt"]
    monkeypatch.chdir(src)
    assert names(".") == names("../src") == ["a.txt", "b/c.txt"]
    src.rename(tmp_path / "renamed")
    assert names(tmp_path / "renamed") == ["a.txt", "b/c.txt"]


def test_empty_shards_among_others_are_no_error(tmp_path: Path) -> None:
    empty = {"b.csv": "text,url\n", "c.tsv": "text\turl\n", "d.json": "[]\n", "e.jsonl": "\n"}
    for name, content in empty.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "f.csv.gz").write_bytes(gzip.compress(b""))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "g.parquet")
    config = CleaningConfig(language="bo")
    with pytest.raises(DataError, match="the sources hold no lines"):
        prepare_corpus([str(tmp_path)], tmp_path / "out", config, workers=1)
    (tmp_path / "a.txt").write_text("\n".join(_sentences(9)), encoding="utf-8")
    assert prepare_corpus([str(tmp_path)], tmp_path / "out", config, workers=1).total_kept == 9


def test_the_output_may_lie_in_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("\n".join(_sentences(120)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config, output = CleaningConfig(language="bo"), Path("clean")

    def stop(step: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(["."], output, config, workers=1, on_progress=stop)
    first = prepare_corpus(["."], output, config, workers=1)
    assert first.read == 120
    assert prepare_corpus(["."], output, config, workers=1) == first
    assert prepare_corpus(["."], output, config, workers=1, overwrite=True).read == 120
    train = first.splits["train"]
    assert prepare_corpus([str(output / "train")], Path("again"), config, workers=1).read == train, "named, it is one"


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder, lines = tmp_path / "corpus", _sentences(12)
    folder.mkdir()
    try:
        for number, name in enumerate((b"\xb2\xe2.txt", b"\xb2\xe3.txt")):
            Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text("\n".join(lines[6 * number :][:6]))
    except OSError:
        pytest.skip("the file system takes no such names")
    config = CleaningConfig(language="bo")
    sources = sorted(map(str, folder.iterdir()))
    for number, given in enumerate(([str(folder)], sources)):
        stats = prepare_corpus(given, tmp_path / f"out{number}", config, workers=1, explain=True)
        assert stats.total_kept == 12 and stats.documents == 2
