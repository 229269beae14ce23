"""Character rewriting tables in the form that `tokenizers` runs fastest: SentencePiece's precompiled trie.

A table of thousands of single-character rewrites is slow as a chain of `Replace` normalizers (one scan of the
text each). `normalizers.Precompiled` does all of them in one scan, but accepts only SentencePiece's binary
format: the byte length of a double-array trie, the trie over the UTF-8 keys (32-bit Darts-clone units), and
the replacements, each ended by a zero byte.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenizers import Regex, normalizers

_LEAF_BIT = 1 << 31  # marks the unit that holds a value (Darts-clone)
_HAS_LEAF = 1 << 8
_MAX_OFFSET = 1 << 21  # offsets below this fit a unit without the extension by a factor of 256
# What can extend a grapheme cluster (UAX 29) within the limit below: marks, joiners, Thai and Lao AM,
# half-width sound marks, emoji skin tones, and the line feed after a carriage return.
_EXTENDERS = r"\p{M}\x{200c}\x{200d}\x{e33}\x{eb3}\x{ff9e}\x{ff9f}\x{1f3fb}-\x{1f3ff}\n"
_GRAPHEME_LIMIT = 6  # `Precompiled` looks up clusters shorter than this many bytes whole


@dataclass(slots=True)
class _Node:
    children: dict[int, _Node] = field(default_factory=dict)
    value: int | None = None  # offset of the replacement, for a node that ends a key
    base: int = 0

    def labels(self) -> list[int]:
        """Bytes of the children; a value counts as a child under byte 0, which no key holds."""
        return [*([0] if self.value is not None else []), *sorted(self.children)]


def precompiled_charsmap(table: Mapping[str, str]) -> bytes:
    """Serialise `table` (character -> replacement, possibly empty) for `normalizers.Precompiled`.

    Raises:
        ValueError: a key is not one character other than NUL, or the table is too large for the format.
    """
    blob = bytearray()
    values: dict[str, int] = {}
    root = _Node()
    for key, replacement in table.items():
        if len(key) != 1 or key == "\0" or "\0" in replacement:
            raise ValueError(f"a rule rewrites one character that is not NUL: {key!r}")
        if replacement not in values:
            values[replacement] = len(blob)
            blob += replacement.encode() + b"\0"
        node = root
        for byte in key.encode():
            node = node.children.setdefault(byte, _Node())
        node.value = values[replacement]
    units = _double_array(root)
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + bytes(blob)


def _double_array(root: _Node) -> list[int]:
    """Lay the trie out so that the child of `position` under `byte` is at `position ^ offset ^ byte`."""
    nodes = [root]
    for node in nodes:  # grows while it is walked: breadth first
        nodes.extend(node.children.values())
    taken, bases, first_free = {0}, set[int](), 1
    # Wide nodes first; narrow ones fill the gaps between them.
    for node in sorted(nodes, key=lambda node: len(node.labels()), reverse=True):
        labels = node.labels()
        while first_free in taken:
            first_free += 1
        slot = first_free
        while (base := slot ^ labels[0]) in bases or any(base ^ label in taken for label in labels):
            slot += 1
        node.base = base
        bases.add(base)
        taken.update(base ^ label for label in labels)
    size = -(-(max(taken) + 1) // 256) * 256  # whole blocks, so that `base ^ byte` never leaves the array
    if size > _MAX_OFFSET:
        raise ValueError(f"a character table of {size} trie units is too large")
    units = [0] * size
    stack = [(root, 0, 0)]  # node, position, label
    while stack:
        node, position, label = stack.pop()
        units[position] = label | ((node.base ^ position) << 10)
        if node.value is not None:
            units[position] |= _HAS_LEAF
            units[node.base] = node.value | _LEAF_BIT
        stack.extend((child, node.base ^ byte, byte) for byte, child in node.children.items())
    return units


def character_map(table: Mapping[str, str]) -> normalizers.Sequence:
    """A normalizer equal to `str.translate` with `table`, in one fast scan.

    `Precompiled` rewrites a whole grapheme cluster of up to five bytes by its first character's rule and so
    loses combining marks (full-width A + acute gives "A"). A control character that the table deletes is
    therefore put between such a character and a following mark: it ends the cluster and then vanishes. If the
    table deletes no control character, those marks are lost, as in SentencePiece-converted tokenizers.

    Raises:
        ValueError: see :func:`precompiled_charsmap`.
    """
    steps: list[normalizers.Normalizer] = []
    breaker = next((key for key, value in table.items() if value == "" and ord(key) < 0x20), None)
    bases = [key for key in table if len(key.encode()) < _GRAPHEME_LIMIT - 1]
    if breaker is not None and bases:
        pattern = "(?<=[" + "".join(_class_ranges(bases)) + rf"])(?=[{_EXTENDERS}])"
        steps.append(normalizers.Replace(Regex(pattern), breaker))
    steps.append(normalizers.Precompiled(precompiled_charsmap(table)))
    return normalizers.Sequence(steps)


def _class_ranges(characters: list[str]) -> list[str]:
    """Regular-expression ranges that cover exactly `characters`."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return [rf"\x{{{low:x}}}-\x{{{high:x}}}" for low, high in ranges]
