"""Readers: what each format gives, and one clear error for each way a source can be bad."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enc2gen.corpora.readers import (
    FORMATS,
    Record,
    read_records,
    source_files,
    source_names,
    source_sides,
    unread_files,
)
from enc2gen.errors import ConfigError, DataError

RECORDS: list[Record] = [
    {"source": "Hello, world", "target": "Сәлем"},
    {"source": 'a "b"', "target": "ئۇيغۇر\u2028"},
]


def _write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


def _jsonl(records: list[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


CSV = 'source,target\n"Hello, world",Сәлем\n"a ""b""",ئۇيغۇر\u2028\n'
TSV = 'source\ttarget\r\nHello, world\tСәлем\r\na "b"\tئۇيغۇر\u2028\r\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", _jsonl(RECORDS)),
        ("a.ndjson", "\n" + _jsonl(RECORDS).rstrip("\n")),
        ("a.JSONL.gz", _jsonl(RECORDS)),
        ("a.jsonl.xz", _jsonl(RECORDS)),
        ("a.csv.bz2", CSV),
        ("a.json", json.dumps(RECORDS, indent=2)),
        ("a.json.gz", json.dumps(RECORDS)),
        ("b.json", _jsonl(RECORDS)),
        ("a.csv", CSV),
        ("a.csv.gz", CSV),
        ("bom.csv", "\ufeff" + CSV),
        ("bom.jsonl", "\ufeff" + _jsonl(RECORDS)),
        ("a.tsv", TSV),
    ],
)
def test_formats_give_the_same_records(name: str, content: str, tmp_path: Path) -> None:
    assert list(read_records(_write(tmp_path / name, content))) == RECORDS


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS * 3000), tmp_path / "a.parquet", row_group_size=500)
    assert list(read_records(str(tmp_path / "a.parquet"))) == RECORDS * 3000


def test_text_gives_one_record_per_line_that_is_not_blank(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "\ufeffone\u2028still one\r\n\n  \ntwo\x0bstill two\nthree")
    texts = [record["text"] for record in read_records(path)]
    assert texts == ["one\u2028still one", "two\x0bstill two", "three"]


def test_a_named_format_overrides_the_extension(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.data", _jsonl(RECORDS))
    assert list(read_records(path, format="jsonl")) == RECORDS
    assert len(list(read_records(path, format="text"))) == 2


HEADER = 'msgid ""\nmsgstr ""\n"Content-Type: text/plain; charset=UTF-8\\n"\n'


def test_po_gives_real_translations_only(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "a.po",
        HEADER
        + 'msgid "Open"\nmsgstr "Ашу"\n\n'
        + 'msgctxt "door"\nmsgid "Open"\nmsgstr "Ашық"\n\n'
        + '#, fuzzy\nmsgid "Fuzzy"\nmsgstr "Бұлдыр"\n\n'
        + 'msgid "Untranslated"\nmsgstr ""\n\n'
        + 'msgid ""\n"two "\n"lines\\n"\nmsgstr "екі жол\\n"\n\n'
        + '#~ msgid "Obsolete"\n#~ msgstr "Ескі"\n',
    )
    assert list(read_records(path)) == [
        {"source": "Open", "target": "Ашу", "context": ""},
        {"source": "Open", "target": "Ашық", "context": "door"},
        {"source": "two lines\n", "target": "екі жол\n", "context": ""},
    ]


@pytest.mark.parametrize(
    ("rule", "forms", "expected"),
    [
        ("nplurals=1; plural=0;", ["%d файл"], [("%d file", "%d файл"), ("%d files", "%d файл")]),
        ("nplurals=2; plural=(n != 1);", ["one", "many"], [("%d file", "one"), ("%d files", "many")]),
        (
            "nplurals=3; plural=(n%10==1 && n%100!=11 ? 0 : n%10>=2 && n%10<=4 && (n%100<10) ? 1 : 2);",
            ["файл", "файла", "файлов"],
            [("%d file", "файл"), ("%d files", "файлов")],
        ),
        (
            "nplurals=3; plural=(n==0 ? 0 : n==1 ? 1 : 2);",
            ["zero", "one", "x"],
            [("%d file", "one"), ("%d files", "x")],
        ),
        ("nplurals=2; plural=(n != 1);", ["one", ""], [("%d file", "one")]),
        ("nplurals=2; plural=n/0;", ["one", "many"], [("%d file", "one"), ("%d files", "many")]),
        ("nonsense; plural=import os;", ["one", "many"], [("%d file", "one"), ("%d files", "many")]),
    ],
)
def test_po_plurals_pair_each_english_form_with_the_form_the_catalogue_says(
    rule: str, forms: list[str], expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    text = HEADER + f'"Plural-Forms: {rule}\\n"\n\nmsgid "%d file"\nmsgid_plural "%d files"\n'
    text += "".join(f'msgstr[{i}] "{form}"\n' for i, form in enumerate(forms))
    records = read_records(_write(tmp_path / "a.po", text))
    assert [(record["source"], record["target"]) for record in records] == expected


def test_a_folder_is_all_its_readable_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    _write(tmp_path / "c.txt", "third")
    _write(tmp_path / "b" / "x.jsonl", '{"text": "second"}')
    _write(tmp_path / "a.jsonl.gz", '{"text": "first"}\n')
    _write(tmp_path / "README.md", "not data")
    _write(tmp_path / ".hidden.txt", "not data either")
    assert [record["text"] for record in read_records(tmp_path)] == ["first", "second", "third"]
    assert [record["text"] for record in read_records(tmp_path, format="text")] == ["third"]


def test_columns_select_and_order_the_fields(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", "a,b,c\n1,2,3\n")
    assert [list(record.items()) for record in read_records(path, columns=["c", "a"])] == [[("c", "3"), ("a", "1")]]


_FIELDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@settings(max_examples=50, deadline=None)
@given(records=st.lists(st.dictionaries(_FIELDS, st.one_of(_FIELDS, st.integers(), st.none())), min_size=1))
def test_json_lines_round_trip(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = _write(tmp_path_factory.mktemp("round") / "a.jsonl.gz", _jsonl(records))
    assert list(read_records(path)) == records


@pytest.mark.parametrize("name", ["big.jsonl.gz", "big.csv", "big.parquet"])
def test_memory_stays_flat(name: str, tmp_path: Path) -> None:
    rows, text = 20_000, "х" * 500  # 20 MB of UTF-8
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": [text] * rows}), path, row_group_size=1000, use_dictionary=False)
    else:
        _write(path, f'{{"text": "{text}"}}\n' * rows if "jsonl" in name else "text\n" + f"{text}\n" * rows)
    next(read_records(path))  # imports
    tracemalloc.start()
    count = sum(1 for _ in read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == rows
    assert peak < 4_000_000


BAD_UTF8 = _jsonl(RECORDS).encode() + '{"source": "Привет"}\n'.encode("cp1251")


@pytest.mark.parametrize(
    ("name", "content", "where", "what", "remedy"),
    [
        ("a.jsonl", b"", "a.jsonl", "the file is empty", "written or copied completely"),
        ("a.txt.gz", b"", "a.txt.gz", "the file is empty", "copied completely"),
        ("a.txt", b"\n \n", "a.txt", "no records", "the file you meant"),
        ("a.csv", b"source,target\n", "a.csv", "no records", "the file you meant"),
        ("a.jsonl", b"\xef\xbb\xbf", "a.jsonl", "no records", "the file you meant"),
        (
            "a.jsonl",
            BAD_UTF8,
            "a.jsonl, line 3",
            rf"byte {len(_jsonl(RECORDS).encode()) + 12} \(0xcf\)",
            "iconv -f",
        ),
        ("a.po", BAD_UTF8, "a.po, line 3", "is not UTF-8", "iconv -f ENCODING -t UTF-8"),
        ("a.tsv.gz", BAD_UTF8, "a.tsv.gz, line 3", "is not UTF-8", "gzip -dc .* | iconv -f ENCODING"),
        ("a.txt", "Сәлем\n".encode("utf-16"), "a.txt, line 1", "UTF-16", "iconv -f UTF-16 -t UTF-8"),
        ("a.csv", b"\xfe\xff" + "a\n".encode("utf-16-be"), "a.csv, line 1", "UTF-16", "iconv -f UTF-16"),
        ("a.txt", "a\n".encode("utf-32"), "a.txt, line 1", "UTF-32", "iconv -f UTF-32"),
        ("a.txt", b"ab\nc\0d\n", "a.txt, line 2", "NUL byte at byte 4", "UTF-16LE"),
        ("a.jsonl", '{"a": 1}\n{"a": "cut', "a.jsonl, line 2", "not valid JSON at column 7", "cut off"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1", "not valid JSON: nested too deeply", "one JSON object"),
        (
            "a.jsonl",
            '{"a": 1}\n\n["a"]\n',
            "a.jsonl, line 3",
            "a JSON array, not an object",
            "one object per line",
        ),
        ("a.jsonl", "1\n", "a.jsonl, line 1", "a JSON number, not an object", "one object per line"),
        ("a.json", '[{"a": 1},\n {"a": }]', "a.json, line 2", "not valid JSON at column 8", "JSON Lines"),
        (
            "a.json",
            '[{"a": 1}, "b"]',
            "a.json",
            "element 2 of the array is a JSON string",
            "array of objects",
        ),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv, line 3", "3 fields, but the header names 2: a, b", "quote"),
        ("a.tsv", "a\tb\n1\n", "a.tsv, line 2", "1 fields, but the header names 2", "one field per column"),
        ("a.csv", 'a,b\n1,"2\n', "a.csv, line 2", "not a valid table: unexpected end", "quotation mark"),
        ("a.csv", "a,a\n1,2\n", "a.csv, line 1", "empty or repeated: 'a'", "name every column"),
        ("a.parquet", b"", "a.parquet", r"not a readable Parquet file \(0 bytes\)", "truncated"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\n",
            "a.parquet",
            "not a readable",
            "Git LFS",
        ),
        ("a.po", 'msgid "a"\nmsgstr "b\n', "a.po, line 2", "not a valid gettext catalogue", "msgfmt --check"),
        ("a.docx", b"PK", "a.docx", "unknown file type '.docx'", "name the format"),
        ("a.parquet.gz", b"x", "a.parquet.gz", "unknown file type '.parquet.gz'", "all but .parquet"),
        ("data", b"x", "data", "unknown file type 'data'", "rename the file"),
    ],
)
def test_bad_files(name: str, content: str | bytes, where: str, what: str, remedy: str, tmp_path: Path) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(DataError, match=what) as caught:
        list(read_records(path))
    assert str(caught.value.where) == str(tmp_path / where)
    assert caught.match(remedy)


def test_truncated_and_foreign_compressed_files(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"n": %d}\n' % i for i in range(50_000)))
    cut, foreign = tmp_path / "cut.jsonl.gz", tmp_path / "foreign.jsonl.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    foreign.write_bytes(b'{"n": 1}\n')
    seen = []
    with pytest.raises(
        DataError, match=r"cut\.jsonl\.gz, after line (\d+): the compressed file is truncated"
    ) as caught:
        seen.extend(record["n"] for record in read_records(cut))
    assert seen == list(range(len(seen))) and len(seen) > 1000, "what is intact is read"
    assert f"after line {len(seen)}" in str(caught.value)
    with pytest.raises(DataError, match="truncated or damaged: Not a gzipped file"):
        list(read_records(foreign))


@pytest.mark.parametrize(("suffix", "command"), [("xz", "xz"), ("bz2", "bzip2")])
def test_other_compressed_files_that_are_damaged(suffix: str, command: str, tmp_path: Path) -> None:
    path = _write(tmp_path / f"a.jsonl.{suffix}", os.urandom(5000).hex())
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=rf"(?s)truncated or damaged.*`{command} -t"):
        list(read_records(path))
    path.write_bytes(b'{"n": 1}\n')
    with pytest.raises(DataError, match=rf"(?s)truncated or damaged.*`{command} -t"):
        list(read_records(path))


def test_a_folder_is_what_lies_in_it_and_what_is_linked_to_but_nothing_hidden(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for name in ("b/one.txt", ".ipynb_checkpoints/b.txt", "old.zip", "b/c.txt.zst", "d.tar.gz", "a.pdf", "wiki.xz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "two.txt").write_text("x")
    for link, target in {"a": folder / "b", "linked": elsewhere, "b/loop": folder}.items():
        (folder / link).symlink_to(target)
    (elsewhere / "back").symlink_to(folder)

    def names(files: list[Path]) -> list[str]:
        return [file.relative_to(folder).as_posix() for file in files]

    assert names(source_files(folder)) == ["b/one.txt", "linked/deep/two.txt"]
    assert names(source_files(folder, leave_out=folder / "b")) == ["linked/deep/two.txt"]
    assert names(unread_files(folder)) == ["b/c.txt.zst", "d.tar.gz", "old.zip", "wiki.xz"]
    assert unread_files(folder / "old.zip") == []
    with pytest.raises(DataError, match=r"(?s)packed as .zst.*unpack it first"):
        read_records(folder / "b" / "c.txt.zst", format="text")
    with pytest.raises(DataError, match=r"unpack c.txt.zst"):
        source_files(folder / "b", "csv")


def test_truncated_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": list(range(1000))}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    _write(tmp_path / "a.parquet", data[:-10])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_records(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_missing_column_names_the_columns_there_are(name: str, tmp_path: Path) -> None:
    path = _write(tmp_path / name, "source,target\na,b\n" if name == "a.csv" else '{"source": "a", "target": "b"}\n')
    with pytest.raises(DataError, match="missing column 'targett' in record 1") as caught:
        list(read_records(path, columns=["source", "targett"]))
    assert "did you mean 'target'? available: source, target" in str(caught.value)


def test_a_column_missing_in_a_later_record_is_found_there(tmp_path: Path) -> None:
    records = read_records(_write(tmp_path / "a.jsonl", '{"a": 1}\n{"b": 2}\n'), columns=["a"])
    assert next(records) == {"a": 1}
    with pytest.raises(DataError, match="missing column 'a' in record 2"):
        next(records)


@pytest.mark.parametrize("source", ["missing.jsonl", "no/such/folder/a.csv", "/no/such/file.txt", "mssing"])
def test_a_source_that_is_not_there_is_refused_at_once(source: str) -> None:
    with pytest.raises(DataError, match="no such file or folder") as caught:
        read_records(source)
    assert source in str(caught.value)


def test_folders_without_data_and_unknown_formats(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no readable file"):
        read_records(tmp_path)
    _write(tmp_path / "a.txt", "x")
    with pytest.raises(DataError, match="holds no csv file"):
        read_records(tmp_path, format="csv")
    with pytest.raises(ConfigError, match="did you mean 'jsonl'"):
        read_records(tmp_path, format="jsnl")
    with pytest.raises(ConfigError, match="unknown file format"):
        read_records(tmp_path / "a.txt", format="docx")


def test_a_bad_file_in_a_folder_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "a.txt", "fine")
    _write(tmp_path / "b.txt", "")
    records = read_records(tmp_path)
    assert next(records) == {"text": "fine"}
    with pytest.raises(DataError, match=r"b\.txt: the file is empty"):
        next(records)


def _hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], object]) -> list[tuple[object, ...]]:
    calls: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        calls.append((name, config, split, streaming))
        return answer()

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


@pytest.mark.parametrize(
    ("source", "name", "config"),
    [
        ("owner/name", "owner/name", None),
        ("owner/na.me:kk", "owner/na.me", "kk"),
        ("hub:squad", "squad", None),
    ],
)
def test_hub_datasets_are_streamed(source: str, name: str, config: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.IterableDataset.from_generator(lambda: iter([{"a": 1, "b": 2}, {"a": 3, "b": 4}]))
    calls = _hub(monkeypatch, lambda: data)
    assert list(read_records(source, split="validation", columns=["b"])) == [{"b": 2}, {"b": 4}]
    assert calls == [(name, config, "validation", True)]


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable() -> object:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    _hub(monkeypatch, unreachable)
    with pytest.raises(DataError, match="Hub cannot be reached") as caught:
        list(read_records("owner/name"))
    assert "hf download --repo-type dataset owner/name --local-dir DIR" in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert "if a file or folder owner/name was meant: there is none" in str(caught.value)


def test_the_real_library_offline_raises_what_we_translate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="Hub cannot be reached"):
        list(read_records("hub:no-such-dataset-here"))


def test_other_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> object:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub")

    def bad_split() -> object:
        raise ValueError("Bad split: trian. Available splits: ['train']")

    def script() -> object:
        raise RuntimeError("Dataset scripts are no longer supported, but found name.py")

    _hub(monkeypatch, script)
    with pytest.raises(DataError, match=r"Python script[\s\S]*refs/convert/parquet owner/name"):
        list(read_records("owner/name"))
    _hub(monkeypatch, absent)
    with pytest.raises(DataError, match=r"no such dataset, or it is private[\s\S]*hf auth login"):
        list(read_records("owner/name"))
    _hub(monkeypatch, bad_split)
    with pytest.raises(DataError, match=r"Available splits: \['train'\]"):
        list(read_records("owner/name", split="trian"))


def test_builtin_corpus() -> None:
    pytest.importorskip("babel")
    pytest.importorskip("pycountry")
    pytest.importorskip("django")
    source = "builtin:localisation?languages=kk,UG&max_per_origin=50"
    train, test = list(read_records(source)), list(read_records(source, split="test"))
    assert {record["target_language"] for record in train} == {"kk", "ug"}
    assert not {record["source"] for record in train} & {record["source"] for record in test}
    assert set(train[0]) == {"source", "target", "source_language", "target_language", "origin", "references"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("builtin:localization?languages=kk", "unknown built-in corpus 'localization'"),
        ("builtin:localisation?language=kk", "unknown option 'language'"),
        ("builtin:localisation", "no language given"),
        ("builtin:localisation?languages=kk&max_per_origin=many", "max_per_origin=many is no number"),
    ],
)
def test_bad_builtin_sources(source: str, message: str) -> None:
    pytest.importorskip("babel")
    with pytest.raises(ConfigError, match=message):
        read_records(source)


def test_a_new_format_can_be_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FORMATS, "_entries", dict(FORMATS._entries))
    FORMATS.add("shout", lambda path: iter([{"text": path.read_text().upper()}]))
    assert list(read_records(_write(tmp_path / "a.txt", "abc"), format="shout")) == [{"text": "ABC"}]


def test_parallel_files_keep_their_lines_together(tmp_path: Path) -> None:
    """Whatever the extension; blank lines count, pairs with one are left out, and U+2028 ends no line."""
    (tmp_path / "corpus.en").write_text("One\n\nThree\u2028and more\nFour\n", encoding="utf-8")
    with gzip.open(tmp_path / "corpus.kk.gz", "wt", encoding="utf-8") as file:
        file.write(" Бір \nЕкі\nҮш\nТөрт")
    pairs = [{"source": "One", "target": "Бір"}, {"source": "Three\u2028and more", "target": "Үш"}]
    pairs.append({"source": "Four", "target": "Төрт"})
    source = f"{tmp_path / 'corpus.en'} | {tmp_path / 'corpus.kk.gz'}"
    assert list(read_records(source)) == pairs
    assert list(read_records(source, columns=["target"])) == [{"target": pair["target"]} for pair in pairs]
    assert source_sides(source) == source.split(" | ")


def test_parallel_files_of_different_lengths_are_refused_with_both_counts(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n2\n3\n")
    (tmp_path / "b").write_text("1\n2\n")
    with pytest.raises(DataError, match=r"3 texts in .*a, but 2 in .*b"):
        list(read_records(f"{tmp_path / 'a'}|{tmp_path / 'b'}"))
    with pytest.raises(DataError, match="no such file"):  # at the call
        read_records(f"{tmp_path / 'a'}|{tmp_path / 'c'}")


def test_a_file_whose_name_has_a_bar_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a|b.txt"
    path.write_text("text\n")
    assert list(read_records(path)) == [{"text": "text"}] and source_sides(path) == [str(path)]


def test_two_configurations_of_a_hub_dataset_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.IterableDataset.from_generator(lambda: iter([{"id": 1, "text": "a"}, {"id": 2, "text": "b"}]))
    calls = _hub(monkeypatch, lambda: data)
    found = list(read_records("hub:o/flores:eng_Latn|hub:o/flores:kaz_Cyrl", split="devtest"))
    assert found == [{"source": "a", "target": "a"}, {"source": "b", "target": "b"}]
    assert calls == [("o/flores", "eng_Latn", "devtest", True), ("o/flores", "kaz_Cyrl", "devtest", True)]


def test_one_file_of_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tmp_path / "x.jsonl"
    local.write_text('{"text": "t", "url": "u"}\n')
    asked: list[tuple[str, str, str]] = []

    def download(name: str, file: str, *, repo_type: str) -> str:
        asked.append((name, file, repo_type))
        return str(local)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert list(read_records("hub:o/mc2/sub/ug-2023.jsonl", columns=["text"])) == [{"text": "t"}]
    assert asked == [("o/mc2", "sub/ug-2023.jsonl", "dataset")]


def test_parallel_files_of_a_hub_dataset_keep_their_lines_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.en").write_text("One\n\nThree\nFour\n")
    (tmp_path / "t.kk").write_text("Bir\nEki\n\nTort\n")
    (tmp_path / "t.jsonl").write_text('{"text": "A"}\n{"text": "B"}\n{"text": ""}\n{"text": "D"}\n')
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, file, **__: str(tmp_path / file))
    found = [tuple(pair.values()) for pair in read_records("hub:o/n/t.en|hub:o/n/t.kk")]
    assert found == [("One", "Bir"), ("Four", "Tort")]
    found = [tuple(pair.values()) for pair in read_records(f"{tmp_path / 't.en'}|hub:o/n/t.jsonl")]
    assert found == [("One", "A"), ("Four", "D")]
    with pytest.raises(DataError, match="a folder has no line"):
        read_records(f"{tmp_path}|{tmp_path / 't.kk'}")


def test_what_is_wrong_with_a_file_of_the_hub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
    cases: list[tuple[Exception, str]] = [
        (errors.GatedRepoError("gated", response=response), "hf auth login"),
        (errors.RemoteEntryNotFoundError("no file", response=response), r"no file x\.jsonl[\s\S]*tree/main"),
        (errors.LocalEntryNotFoundError("offline"), "Hub cannot be reached"),
        (ConnectionError("reset"), "Hub cannot be reached"),
    ]
    for error, message in cases:

        def fail(*_: object, error: Exception = error, **__: object) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
        with pytest.raises(DataError, match=message):
            read_records("hub:o/mc2/x.jsonl")


def test_source_names_are_equal_for_equal_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kk.txt", "en.txt", "notes.pdf"):
        (tmp_path / name).write_text("a\n")
    monkeypatch.chdir(tmp_path)
    kk, en = (str(tmp_path / name) for name in ("kk.txt", "en.txt"))
    assert source_names(".", "train") == source_names("kk.txt|./en.txt", "test") == {kk, en}
    assert source_names("owner/name", "train") == source_names("hub:owner/name", "train")
    assert source_names("owner/name", "train") != source_names("owner/name", "test")
    assert source_names("hub:owner/name/kk.txt", "train") == source_names("hub:owner/name/kk.txt", "test")
    assert source_names("missing/kk.txt", "train") == {str(tmp_path / "missing" / "kk.txt")}
    assert source_names("builtin:names?languages=kk", "train") < source_names("builtin:names", "all")
    assert not source_names("builtin:names", "train") & source_names("builtin:names", "test")


def test_a_number_of_too_many_digits_names_the_line(tmp_path: Path) -> None:
    number = "1" * 5000
    with pytest.raises(DataError, match=r"(?s)a.jsonl, line 2.*not valid JSON.*digits"):
        list(read_records(_write(tmp_path / "a.jsonl", f'{{"a": 1}}\n{{"a": {number}}}\n')))
    with pytest.raises(DataError, match=r"(?s)b.json.*not valid JSON.*digits"):
        list(read_records(_write(tmp_path / "b.json", f'[{{"a": {number}}}]')))


def test_a_line_break_within_a_tsv_field_is_not_blamed_on_quotation_marks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a field cannot hold a line break"):
        list(read_records(_write(tmp_path / "a.tsv", "a\tb\none\rtwo\tthree\n")))
