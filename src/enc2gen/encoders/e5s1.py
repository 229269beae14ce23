"""Reader of `E5S1` files: a BERT-shaped encoder in 4 bits together with its Unigram vocabulary.

Little-endian layout: 72 bytes of header; piece offsets `u32[n + 1]`, log-probabilities `f32[n]`, the UTF-8 of
the pieces; a character rewriting table; a directory of tensors (name, dtype, elements, offset, bytes); the
tensors. A Q4 tensor holds blocks of 18 bytes for 32 weights: a signed float16 scale, then 16 bytes of which
byte j holds weight j in its low and weight j + 16 in its high nibble; weight = (nibble - 8) * scale (as
ggml's Q4_0).

The file is input like any other: every size is checked against the file before it is used.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from enc2gen.errors import CheckpointError

_BLOCK = 32  # weights per Q4 block
_BLOCK_BYTES = 18
_CHUNK_BLOCKS = 1 << 16  # blocks dequantised at a time: 8 MB of float32, so that the passes stay in cache
_MAX_SIZE = 1 << 24  # bounds every count in the header; a product of two stays within 48 bits


@dataclass(frozen=True)
class Header:
    """The fixed fields of an `E5S1` file, in file order."""

    hidden_size: int
    layers: int
    heads: int
    ffn_size: int
    rows: int
    positions: int
    types: int
    epsilon: float
    block: int
    pieces: int
    bos: int
    eos: int
    pad: int
    unk: int

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...], bool]]:
        """Tensor name in the file -> (BertModel key, shape, is quantised)."""
        h, f = self.hidden_size, self.ffn_size
        table: dict[str, tuple[str, tuple[int, ...], bool]] = {
            "emb.word": ("embeddings.word_embeddings.weight", (self.rows, h), True),
            "emb.pos": ("embeddings.position_embeddings.weight", (self.positions, h), False),
            "emb.type": ("embeddings.token_type_embeddings.weight", (self.types, h), False),
            "emb.ln.w": ("embeddings.LayerNorm.weight", (h,), False),
            "emb.ln.b": ("embeddings.LayerNorm.bias", (h,), False),
        }
        linears = {
            "q": ("attention.self.query", h, h),
            "k": ("attention.self.key", h, h),
            "v": ("attention.self.value", h, h),
            "ao": ("attention.output.dense", h, h),
            "fi": ("intermediate.dense", f, h),
            "fo": ("output.dense", h, f),
        }
        norms = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
        for i in range(self.layers):
            for short, (key, size_out, size_in) in linears.items():
                table[f"l{i}.{short}.w"] = (f"encoder.layer.{i}.{key}.weight", (size_out, size_in), True)
                table[f"l{i}.{short}.b"] = (f"encoder.layer.{i}.{key}.bias", (size_out,), False)
            for short, key in norms.items():
                table[f"l{i}.{short}.w"] = (f"encoder.layer.{i}.{key}.weight", (h,), False)
                table[f"l{i}.{short}.b"] = (f"encoder.layer.{i}.{key}.bias", (h,), False)
        return table


class E5File:
    """A checked, memory-mapped `E5S1` file.

    Args:
        path: the file.

    Raises:
        CheckpointError: anything about the file is not as the format says (file, field, expected, found).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                stream.seek(0, 2)
                empty = stream.tell() == 0  # which cannot be mapped
                self._data: Any = b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error})", where=str(path)) from error
        self._position = 0
        self.header = self._read_header()
        self._offsets_at, self._scores_at, self._blob_at = self._piece_sections()
        self._table_at, self._table_end = self._table_section()
        self._tensors = self._read_directory()

    def fail(self, field: str, expected: object, found: object) -> NoReturn:
        """Raise the error for a field that is not as it should be."""
        raise CheckpointError(
            f"{field}: expected {expected}, found {found}",
            where=str(self.path),
            remedy="the file is damaged or of another kind; reinstall the package that holds it",
        )

    def _take(self, count: int, field: str) -> int:
        """Move past `count` bytes and return where they start."""
        start = self._position
        if count > len(self._data) - start:
            self.fail(field, f"{count} bytes at offset {start}", f"only {len(self._data) - start} more")
        self._position = start + count
        return start

    def _unpack(self, layout: str, field: str) -> tuple[Any, ...]:
        return struct.unpack_from(layout, self._data, self._take(struct.calcsize(layout), field))

    def _read_header(self) -> Header:
        magic = bytes(self._data[self._take(4, "magic") : 4])
        if magic != b"E5S1":
            self.fail("magic", b"E5S1", magic)
        (version,) = self._unpack("<I", "version")
        if version != 1:
            self.fail("version", 1, version)
        header = Header(*self._unpack("<7if2i4i", "header"))
        for field in ("hidden_size", "layers", "heads", "ffn_size", "rows", "positions", "types", "pieces"):
            if not 0 < getattr(header, field) <= _MAX_SIZE:
                self.fail(field, f"1 to {_MAX_SIZE}", getattr(header, field))
        if header.block != _BLOCK:
            self.fail("block", _BLOCK, header.block)
        for field in ("hidden_size", "ffn_size"):
            if getattr(header, field) % _BLOCK:
                self.fail(field, f"a multiple of {_BLOCK}", getattr(header, field))
        if header.hidden_size % header.heads:
            self.fail("heads", f"a divisor of the hidden size {header.hidden_size}", header.heads)
        if not 0 < header.epsilon < 1:
            self.fail("epsilon", "between 0 and 1", header.epsilon)
        if header.pieces > header.rows:
            self.fail("pieces", f"at most the {header.rows} rows of the embedding", header.pieces)
        special = {field: getattr(header, field) for field in ("bos", "eos", "pad", "unk")}
        for field, value in special.items():
            if not 0 <= value < header.pieces or list(special.values()).count(value) > 1:
                self.fail(field, f"an id of its own below {header.pieces}", value)
        return header

    def _piece_sections(self) -> tuple[int, int, int]:
        (blob_bytes,) = self._unpack("<Q", "blob_len")
        offsets_at = self._take(4 * (self.header.pieces + 1), "piece offsets")
        scores_at = self._take(4 * self.header.pieces, "piece scores")
        blob_at = self._take(blob_bytes, "pieces")
        offsets = self._array(np.dtype("<u4"), self.header.pieces + 1, offsets_at)
        if offsets[0] != 0 or offsets[-1] != blob_bytes:
            self.fail("piece offsets", f"from 0 to {blob_bytes}", f"from {offsets[0]} to {offsets[-1]}")
        if (offsets[1:] < offsets[:-1]).any():
            self.fail("piece offsets", "ascending", "a smaller one after a larger one")
        return offsets_at, scores_at, blob_at

    def _table_section(self) -> tuple[int, int]:
        count, size = self._unpack("<iI", "character table size")
        if not 0 <= 5 * count <= size:
            self.fail("character table size", "5 bytes or more a rule", f"{count} rules in {size} bytes")
        start = self._take(size, "character table")
        self._rules = count
        return start, start + size

    def _array(self, dtype: np.dtype, count: int, start: int) -> np.ndarray:
        return np.frombuffer(self._data, dtype=dtype, count=count, offset=start)

    def _read_directory(self) -> dict[str, tuple[int, int]]:
        """Tensor name -> (file offset, bytes): the tensors of the architecture, each inside the file."""
        (count,) = self._unpack("<i", "number of tensors")
        if count != 5 + 16 * self.header.layers:
            self.fail("number of tensors", 5 + 16 * self.header.layers, count)
        if 24 * count > len(self._data) - self._position:  # a record of the shortest name takes 24 bytes
            self.fail("tensor directory", f"{count} records", f"{len(self._data) - self._position} bytes")
        shapes, directory = self.header.shapes(), {}
        for index in range(count):
            field = f"tensor {index}"
            (length,) = self._unpack("<H", f"{field} name length")
            start = self._take(length, f"{field} name")
            name = bytes(self._data[start : start + length]).decode("ascii", "replace")
            if name not in shapes or name in directory:
                self.fail(f"{field} name", "a tensor of this architecture, once", repr(name[:80]))
            dtype, elements, offset, size = self._unpack("<BIQQ", f"{field} ({name})")
            _, shape, quantised = shapes[name]
            count_expected = int(np.prod(shape, dtype=np.int64))
            bytes_expected = count_expected // _BLOCK * _BLOCK_BYTES if quantised else 4 * count_expected
            expected = (int(quantised), count_expected, bytes_expected)
            if (dtype, elements, size) != expected:
                self.fail(f"{name} (dtype, elements, bytes)", expected, (dtype, elements, size))
            if size > len(self._data) or offset > len(self._data) - size:
                self.fail(name, f"{size} bytes within the file of {len(self._data)}", f"offset {offset}")
            directory[name] = (offset, size)
        for name, (offset, _) in directory.items():
            if offset < self._position:
                self.fail(name, f"an offset after the directory ({self._position})", offset)
        return directory

    def pieces(self) -> list[tuple[str, float]]:
        """Vocabulary in id order: (piece, log-probability)."""
        count = self.header.pieces
        offsets = self._array(np.dtype("<u4"), count + 1, self._offsets_at).tolist()
        scores = self._array(np.dtype("<f4"), count, self._scores_at)
        if not np.isfinite(scores).all():
            self.fail("piece scores", "finite numbers", "others")
        blob = bytes(self._data[self._blob_at : self._blob_at + offsets[-1]])
        try:
            texts = [blob[offsets[i] : offsets[i + 1]].decode("utf-8") for i in range(count)]
        except UnicodeDecodeError as error:
            self.fail("pieces", "UTF-8", error.reason)
        if len(set(texts)) != count or "" in texts:
            self.fail("pieces", f"{count} different, non-empty ones", len(set(texts) - {""}))
        return list(zip(texts, scores.astype(float).tolist(), strict=True))

    def character_table(self) -> dict[str, str]:
        """Character -> its normalised form (possibly empty)."""
        table: dict[str, str] = {}
        position, last = self._table_at, 0
        for rule in range(self._rules):
            field = f"character rule {rule}"
            if position + 5 > self._table_end:
                self.fail(field, "5 bytes", self._table_end - position)
            code, length = struct.unpack_from("<IB", self._data, position)
            position += 5
            if position + 4 * length > self._table_end:
                self.fail(field, f"{length} replacement characters", f"{self._table_end - position} bytes")
            codes = struct.unpack_from(f"<{length}I", self._data, position)
            position += 4 * length
            if code <= last or any(not 0 < c < 0x110000 or 0xD800 <= c < 0xE000 for c in (code, *codes)):
                self.fail(field, "ascending, valid code points", f"{code:#x} -> {[hex(c) for c in codes]}")
            table[chr(code)] = "".join(map(chr, codes))
            last = code
        if position != self._table_end:
            self.fail("character table", f"{self._rules} rules up to offset {self._table_end}", position)
        return table

    def tensor(self, name: str, rows: Sequence[int] | None = None) -> Tensor:
        """Tensor `name` in float32, or only `rows` of a quantised matrix: `[len(rows), columns]`."""
        offset, size = self._tensors[name]
        _, shape, quantised = self.header.shapes()[name]
        if not quantised:
            values = self._array(np.dtype("<f4"), size // 4, offset).astype(np.float32)
            result = torch.from_numpy(values).view(shape)
        else:
            raw = self._array(np.dtype("u1"), size, offset).reshape(shape[0], -1)
            if rows is not None:
                raw, shape = raw[np.asarray(rows, dtype=np.int64)], (len(rows), shape[1])
            result = dequantise_q4(raw.reshape(-1, _BLOCK_BYTES)).view(shape)
        if not torch.isfinite(result.sum()):  # a sum is finite only if every element is, at these magnitudes
            self.fail(name, "finite weights", "infinite or undefined ones")
        return result


def dequantise_q4(blocks: np.ndarray) -> Tensor:
    """Float32 weights `[blocks * 32]` of Q4 blocks `[blocks, 18]` (uint8); layout: top of the module."""
    out = torch.empty(len(blocks), _BLOCK)
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        raw = torch.from_numpy(np.array(blocks[start : start + _CHUNK_BLOCKS]))
        chunk = out[start : start + _CHUNK_BLOCKS]
        nibbles = raw[:, 2:]
        chunk[:, : _BLOCK // 2] = nibbles & 15
        chunk[:, _BLOCK // 2 :] = nibbles >> 4
        scale = raw[:, :2].contiguous().view(torch.float16).float()
        chunk.sub_(8).mul_(scale)
    return out.view(-1)
