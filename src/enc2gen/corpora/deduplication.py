"""Duplicates among any number of lines: exact ones by a digest, near ones by MinHash, found on disk.

Near-duplicates are lines whose sets of shingles (overlapping character n-grams) have a Jaccard similarity of at least
a threshold. Shingles of characters, not of words, because Tibetan and Chinese have no spaces between words. MinHash
(Broder 1997) estimates the similarity from short signatures; locality-sensitive hashing finds the pairs worth
comparing: those that agree in a whole band of the signature.

Signatures come from rensa (R-MinHash, after Fast Similarity Sketching, arXiv 1704.04370), joins from DuckDB, which
spills to disk. The result depends on the lines alone, not on their batches, processes or the memory.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import regex
import rensa
from pydantic import BaseModel, ConfigDict, Field

from enc2gen.corpora.languages import dominant_script
from enc2gen.errors import DataError, OutputError

__all__ = ["DuplicateIndex", "MinHasher", "NearDuplicateConfig", "duplicate_form", "form_key", "is_han", "text_key"]

_SEPARATORS = regex.compile(r"[\p{P}\p{Z}\p{Cc}]+")
_INVISIBLE = regex.compile(r"\p{Cf}+")
# Letters of scripts that do without spaces between words, where both spaces and commas are a matter of taste.
_UNSPACED = r"(?V1)[[\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]&&[\p{L}\p{M}]]"
_BESIDE_UNSPACED = regex.compile(f" (?={_UNSPACED})|(?<={_UNSPACED}) ")
_MAY_BE_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\U0003ffff]"
)  # blocks of these: quick to ask
_HAN = regex.compile(r"\p{Han}")
_SAMPLE_CHARACTERS = 200  # our choice: enough to tell the script of a line
_CANDIDATE_RECALL = 0.95  # our choice: pairs at the threshold that LSH must find; verification removes the rest
_HASH_BITS = 8  # of each MinHash value kept for verification: b-bit MinHash, arXiv 0910.3349
_WINDOW = 16  # our choice: lines of one bucket are compared with this many before them; all pairs would be quadratic
_FETCHED_ROWS = 50_000
_MEMORY_MEGABYTES = 256  # our choice: above it DuckDB spills to disk
_ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: Fibonacci hashing (Knuth, vol. 3, section 6.4)


def duplicate_form(text: str) -> str:
    """Return what counts when lines are compared: case-folded, punctuation and spaces one space, no invisible signs.

    Beside a letter of Chinese, Japanese, Thai, Lao, Khmer or Burmese, punctuation and spaces count for nothing. A
    Tibetan tsheg is punctuation and so separates syllables. Text of nothing but punctuation is only stripped.
    """
    folded = unicodedata.normalize("NFC", text.casefold())
    visible = folded if folded.isprintable() else _INVISIBLE.sub("", folded)
    form = _SEPARATORS.sub(" ", visible).strip()
    if _MAY_BE_UNSPACED.search(form):
        form = _BESIDE_UNSPACED.sub("", form)
    return form or text.strip()


def text_key(text: str) -> bytes:
    """Return 16 bytes (BLAKE2b) that are the same for texts with the same :func:`duplicate_form`."""
    return form_key(duplicate_form(text))


def form_key(form: str) -> bytes:
    """Return :func:`text_key` of the texts with this :func:`duplicate_form`."""
    return hashlib.blake2b(form.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def is_han(form: str) -> bool:
    """Whether a text is mostly in Chinese characters, by its first 200 characters."""
    sample = form[:_SAMPLE_CHARACTERS]
    return _HAN.search(sample) is not None and dominant_script(sample) == "Hani"


class NearDuplicateConfig(BaseModel):
    """What a near-duplicate is.

    A share p of edited characters, spread evenly, leaves about u = (1 - p)^n of the n-grams and a Jaccard similarity of
    u / (2 - u): at p = 4 % 0.79 for n = 3, and 0.85 for n = 2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(
        default=0.75,
        gt=0,
        lt=1,
        description="Smallest Jaccard similarity of two near-duplicates; as FineWeb (2406.17557).",
    )
    shingle_length: int = Field(default=3, ge=1, le=20, description="Characters of a shingle. Our choice.")
    shingle_length_han: int = Field(
        default=2, ge=1, le=20, description="The same for mostly Chinese text, whose characters say more. Our choice."
    )
    min_shingles: int = Field(
        default=24, ge=1, description="Lines with fewer different shingles are only compared exactly. Our choice."
    )
    permutations: int = Field(
        default=128,
        ge=16,
        le=1024,
        multiple_of=8,
        description="MinHash values; standard error at most 0.5 / sqrt(n): 0.044.",
    )
    seed: int = Field(default=1, ge=0, description="Of the hash functions.")

    @property
    def rows(self) -> int:
        """MinHash values per band: as many as still find 95 % of the pairs at the threshold.

        Two lines of similarity s agree in one of b bands of r values with probability 1 - (1 - s^r)^b.
        """
        found = 1
        for rows in range(1, self.permutations + 1):
            if 1 - (1 - self.threshold**rows) ** (self.permutations // rows) >= _CANDIDATE_RECALL:
                found = rows
        return found

    @property
    def bands(self) -> int:
        """Bands of a signature."""
        return self.permutations // self.rows


class MinHasher:
    """Makes signatures of lines; the same ones in every process."""

    def __init__(self, config: NearDuplicateConfig) -> None:
        self.config = config

    def signatures(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return for each text its band hashes, then its MinHash values cut to 8 bits, eight to a number.

        All are unsigned 64-bit numbers, `bands + permutations / 8` of them; none for a text that is too short.
        """
        return self.signatures_of_forms([duplicate_form(text) for text in texts])

    def signatures_of_forms(self, forms: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the signatures of the texts with these :func:`duplicate_form`."""
        shingles = [self._shingles(form) for form in forms]
        long_enough = [index for index, found in enumerate(shingles) if len(found) >= self.config.min_shingles]
        signatures: list[tuple[int, ...]] = [()] * len(forms)
        if not long_enough:
            return signatures
        digests = rensa.RMinHash.digest_matrix_from_token_sets(
            [shingles[index] for index in long_enough], self.config.permutations, self.config.seed
        )
        values = np.array(digests.to_rows(), dtype=np.uint64)  # [lines, permutations]
        short = (values & np.uint64(2**_HASH_BITS - 1)).astype(np.uint8).view("<u8")  # [lines, permutations / 8]
        rows = np.concatenate([self._band_hashes(values), short], axis=1).tolist()
        for index, row in zip(long_enough, rows, strict=True):
            signatures[index] = tuple(row)
        return signatures

    def _shingles(self, form: str) -> set[str]:
        length = self.config.shingle_length_han if is_han(form) else self.config.shingle_length
        form = form.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair is no UTF-8
        return {form[start : start + length] for start in range(len(form) - length + 1)}

    def _band_hashes(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """[lines, permutations] -> [lines, bands]."""
        bands, rows = self._bands_and_rows
        grouped = values[:, : bands * rows].reshape(len(values), bands, rows)
        hashes = np.zeros((len(values), bands), dtype=np.uint64)
        for row in range(rows):
            hashes = (hashes ^ grouped[:, :, row]) * np.uint64(_ODD)  # modulo 2^64
            hashes ^= hashes >> np.uint64(32)
        return hashes

    @cached_property
    def _bands_and_rows(self) -> tuple[int, int]:
        return self.config.bands, self.config.rows


class DuplicateIndex:
    """Keys and signatures of lines on disk, and the duplicates among them.

    Args:
        folder: where the index lies while it is used; an earlier index there is removed.
        config: the configuration of the :class:`MinHasher` whose signatures are added.
        memory_megabytes: what DuckDB may hold in memory; the rest is on disk.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        config: NearDuplicateConfig | None = None,
        *,
        memory_megabytes: int = _MEMORY_MEGABYTES,
    ) -> None:
        self.config = config or NearDuplicateConfig()
        self._folder = folder
        self._found = False
        self._bands = [f"band_{index}" for index in range(self.config.bands)]
        with self._errors():
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            self._database = duckdb.connect(
                str(folder / "duplicates.duckdb"),
                config={
                    "memory_limit": f"{memory_megabytes}MB",
                    "temp_directory": str(folder / "spill"),
                    "preserve_insertion_order": False,
                    "threads": 2,
                },
            )
            self._run("PRAGMA disable_checkpoint_on_shutdown")  # nothing is read after the end
            columns = ", ".join(f"{band} UBIGINT" for band in self._bands)
            self._run(f"CREATE TABLE lines (id BIGINT, key BLOB, signature BLOB, {columns})")

    def add(self, ids: Sequence[int], keys: Sequence[bytes], bands: Sequence[Sequence[int]]) -> None:
        """Add lines.

        Args:
            ids: a number for each line, smaller for earlier lines, each only once.
            keys: what :func:`text_key` gives.
            bands: what :meth:`MinHasher.signatures` gives; empty for lines that are only compared exactly.

        Raises:
            DataError: a signature is of another configuration.
            OutputError: the disk is full.
        """
        count, packed = len(self._bands), self.config.permutations // 8
        if any(len(row) not in (0, count + packed) for row in bands):
            raise DataError("a signature was made with another configuration", remedy="start again in an empty folder")
        present = np.array([len(row) > 0 for row in bands], dtype=bool)
        values = np.zeros((len(ids), count + packed), dtype=np.uint64)
        if present.any():
            values[present] = np.array([row for row in bands if len(row)], dtype=np.uint64)
        signatures = values[:, count:].astype("<u8")
        table: dict[str, pa.Array] = {
            "id": pa.array(ids, pa.int64()),
            "key": pa.array(keys, pa.binary()),
            "signature": pa.array(
                [row.tobytes() if there else None for row, there in zip(signatures, present, strict=True)], pa.binary()
            ),
        }
        for index, band in enumerate(self._bands):
            table[band] = pa.array(values[:, index], pa.uint64(), mask=~present)
        self._insert("lines", pa.table(table))

    def duplicates(self) -> Iterator[tuple[int, str, int]]:
        """Yield (id, "exact-duplicate" or "near-duplicate", id of the line that is kept) by ascending id.

        A line is dropped only for an earlier line that is kept and that it is a near-duplicate of itself: a chain of
        small changes does not take its far end along. They are looked for at the first call, after which no line can
        be added.

        Raises:
            OutputError: the disk is full.
        """
        with self._errors():
            if not self._found:
                self._find_exact()
                self._find_near()
                self._choose_kept()
                self._found = True
            reader = (
                self._database.cursor()
                .sql(
                    """SELECT exact.id, 'exact-duplicate', coalesce(groups.kept, exact.kept)
                       FROM exact LEFT JOIN groups ON groups.id = exact.kept
                       UNION ALL SELECT id, 'near-duplicate', kept FROM groups ORDER BY 1"""
                )
                .to_arrow_reader(_FETCHED_ROWS)
            )
            for batch in reader:
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)

    def close(self) -> None:
        """Release the files; the index cannot be used afterwards."""
        self._database.close()

    def _find_exact(self) -> None:
        """Table `exact`: id, kept. These lines leave the search for near-duplicates."""
        self._run(
            """CREATE TABLE exact AS SELECT lines.id, first.kept FROM lines JOIN
               (SELECT key, min(id) AS kept FROM lines GROUP BY key HAVING count(*) > 1) AS first USING (key)
               WHERE lines.id > first.kept"""
        )
        self._run("DELETE FROM lines USING exact WHERE lines.id = exact.id")

    def _find_near(self) -> None:
        """Table `links`: earlier, later: pairs of near-duplicates."""
        self._run("CREATE TABLE pairs (earlier BIGINT, later BIGINT)")
        found: list[pa.Table] = []
        for band in self._bands:
            reader = (
                self._database.cursor()
                .sql(
                    f"""SELECT id, {band}, signature FROM lines
                        SEMI JOIN (SELECT {band} FROM lines WHERE {band} IS NOT NULL
                                   GROUP BY {band} HAVING count(*) > 1) AS shared USING ({band})
                        ORDER BY {band}, id"""
                )
                .to_arrow_reader(_FETCHED_ROWS)
            )
            for earlier, later in self._verified(reader):
                found.append(pa.table({"earlier": earlier, "later": later}))
                if sum(map(len, found)) >= _FETCHED_ROWS or len(found) >= _FETCHED_ROWS // 100:
                    self._insert("pairs", pa.concat_tables(found))
                    found = []
        if found:
            self._insert("pairs", pa.concat_tables(found))
        self._run("CREATE TABLE links AS SELECT DISTINCT earlier, later FROM pairs")

    def _verified(self, rows: pa.RecordBatchReader) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Yield the pairs of a bucket whose estimated similarity reaches the threshold: ids, ids."""
        permutations, needed = self.config.permutations, self._needed
        ids, buckets = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)
        signatures = np.zeros((0, permutations), dtype=np.uint8)
        for batch in rows:
            seen = len(ids)
            ids = np.concatenate([ids, batch.column(0).to_numpy(zero_copy_only=False)])
            buckets = np.concatenate([buckets, batch.column(1).to_numpy(zero_copy_only=False)])
            packed = np.frombuffer(b"".join(batch.column(2).to_pylist()), dtype=np.uint8)
            signatures = np.concatenate([signatures, packed.reshape(-1, permutations)])
            for distance in range(1, min(_WINDOW, len(ids) - 1) + 1):
                start = max(seen, distance)
                later = start + np.flatnonzero(buckets[start:] == buckets[start - distance : len(ids) - distance])
                agreeing = (signatures[later] == signatures[later - distance]).sum(axis=1)
                later = later[agreeing >= needed]
                if len(later):
                    yield ids[later - distance], ids[later]
            ids, buckets, signatures = ids[-_WINDOW:], buckets[-_WINDOW:], signatures[-_WINDOW:]

    @cached_property
    def _needed(self) -> float:
        """How many values of two signatures must agree. b-bit MinHash: 2^-b do by chance (0910.3349, section 2)."""
        chance = 2.0**-_HASH_BITS
        return (self.config.threshold * (1 - chance) + chance) * self.config.permutations

    def _choose_kept(self) -> None:
        """Table `groups`: id, kept: the lines to drop, by ascending id, and the earlier line that stays for each.

        As a bucket is searched only a window back, a line is also compared with what its dropped neighbours were
        dropped for: else one line in each window of many copies would stay.
        """
        self._run("CREATE TABLE groups (id BIGINT, kept BIGINT)")
        found = "SELECT earlier AS id FROM links UNION SELECT later FROM links"
        ids = self._database.sql(f"SELECT id FROM ({found}) ORDER BY id").fetchnumpy()["id"]
        if not len(ids):
            return
        path = self._folder / "signatures"  # 128 bytes a linked line: too many for the memory
        query = f"SELECT signature FROM lines SEMI JOIN ({found}) AS found USING (id) ORDER BY id"
        with path.open("wb") as file:
            for batch in self._database.sql(query).to_arrow_reader(_FETCHED_ROWS):
                file.write(b"".join(batch.column(0).to_pylist()))
        signatures = np.memmap(path, dtype=np.uint8, mode="r", shape=(len(ids), self.config.permutations))
        kept, refused = array("q", range(len(ids))), (-1, -1)
        links = self._database.sql("SELECT later, earlier FROM links ORDER BY later, earlier")
        for batch in links.to_arrow_reader(_FETCHED_ROWS):
            places = [np.searchsorted(ids, column.to_numpy(zero_copy_only=False)).tolist() for column in batch.columns]
            for line, earlier in zip(*places, strict=True):
                stays = kept[earlier]
                if kept[line] != line or (line, stays) == refused:
                    continue
                if stays == earlier or (signatures[line] == signatures[stays]).sum() >= self._needed:
                    kept[line] = stays
                else:
                    refused = line, stays
        chosen = np.frombuffer(kept, dtype=np.int64)
        dropped = np.flatnonzero(chosen != np.arange(len(ids)))
        self._insert("groups", pa.table({"id": ids[dropped], "kept": ids[chosen[dropped]]}))

    def _insert(self, name: str, rows: pa.Table) -> None:
        with self._errors():
            self._database.register("added", rows)
            self._database.execute(f"INSERT INTO {name} SELECT * FROM added")
            self._database.unregister("added")

    def _run(self, statement: str) -> None:
        self._database.execute(statement)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (duckdb.Error, OSError) as error:
            raise OutputError(
                f"the index of duplicates failed: {error}",
                where=str(self._folder),
                remedy="check space and rights; the index takes about 600 bytes a line",
            ) from error
