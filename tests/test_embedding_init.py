"""Rows of new pieces, against answers worked out by hand or with plain NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import PreTrainedTokenizerFast

from enc2gen.errors import ConfigError, DataError, ModelError
from enc2gen.models.embedding_init import EMBEDDING_INITIALISATIONS, InitialisationConfig, initialise_rows
from enc2gen.models.embedding_init.factorised import factorise
from enc2gen.models.embedding_init.pieces import PieceForm, Splitter, find_overlap, piece_forms
from enc2gen.models.embedding_init.similarity import sparsemax
from enc2gen.tokenization.pieces import BYTE_LEVEL

OLD = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁cat", "▁dog", "▁sun", "s", "ing", "▁Moon"]
NEW = ["▁བོད", "▁catsing", "▁ཉི", "▁moon", "moon"]
ALL = ["random", "mean", "lexical", "focus", "ofa"]


def unigram(pieces: list[str]) -> PreTrainedTokenizerFast:
    scores = [-10.0 if len(piece) == 1 else -2.0 - 0.01 * index for index, piece in enumerate(pieces)]
    backend = Tokenizer(Unigram(list(zip(pieces, scores, strict=True)), unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


OLD_TOKENIZER, NEW_TOKENIZER = unigram(OLD), unigram(OLD + NEW)
ORIGINS: list[int | None] = [*range(len(OLD)), *[None] * len(NEW)]
PAIRS = [("བོད", "cat"), ("ཉི", "sun"), ("དོ", "dog")] * 4
TABLE = torch.randn(len(OLD), 6, generator=torch.Generator().manual_seed(3))


def rows(method: str, *, table: torch.Tensor = TABLE, texts: Any = PAIRS, seed: int = 0, **options: Any) -> Any:
    config = InitialisationConfig(method=method, **options)
    return initialise_rows(table, OLD_TOKENIZER, NEW_TOKENIZER, ORIGINS, config, texts=texts, seed=seed)


def word_vectors(folder: Path, vectors: dict[str, list[float]]) -> str:
    lines = [f"{len(vectors)} {len(next(iter(vectors.values())))}"]
    lines += [" ".join([word, *map(str, vector)]) for word, vector in vectors.items()]
    path = folder / "words.vec"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("method", ALL)
def test_old_rows_are_copied_and_every_new_row_is_finite_distinct_and_repeatable(method: str) -> None:
    result, again = rows(method), rows(method)
    assert torch.equal(result.table[: len(OLD)], TABLE)
    assert result.how[: len(OLD)] == ["copied"] * len(OLD)
    assert result.table.isfinite().all()
    assert torch.equal(result.table, again.table)
    assert sum(result.summary.values()) == len(ORIGINS)
    unknown_script = result.table[[11, 13]]
    assert not torch.equal(unknown_script[0], unknown_script[1])


def test_all_methods_are_registered() -> None:
    assert list(EMBEDDING_INITIALISATIONS) == sorted(ALL)


def test_origins_may_permute_and_drop_old_rows() -> None:
    new = unigram(["<s>", "<pad>", "</s>", "<unk>", "▁dog", "▁cat", "▁new"])
    result = initialise_rows(TABLE, OLD_TOKENIZER, new, [0, 1, 2, 3, 6, 5, None], InitialisationConfig(method="random"))
    assert torch.equal(result.table[:6], TABLE[[0, 1, 2, 3, 6, 5]])
    assert result.how[6] == "random"


def test_half_precision_tables_stay_so_and_bit_exact() -> None:
    table = TABLE.to(torch.bfloat16)
    result = rows("mean", table=table)
    assert result.table.dtype == torch.bfloat16 and torch.equal(result.table[: len(OLD)], table)


def test_random_rows_have_the_tables_mean_and_spread() -> None:
    table = torch.randn(500, 2) * torch.tensor([1.0, 5.0]) + torch.tensor([3.0, -2.0])
    new = unigram([*OLD, *(f"▁w{i}" for i in range(4000))])
    origins: list[int | None] = [*range(len(OLD)), *[None] * 4000]
    made = initialise_rows(table, OLD_TOKENIZER, new, origins, InitialisationConfig(method="random")).table[len(OLD) :]
    np.testing.assert_allclose(made.mean(0), table.mean(0), atol=0.3)
    np.testing.assert_allclose(made.std(0), table.std(0), rtol=0.06)


def test_mean_is_that_of_the_old_sub_pieces() -> None:
    result = rows("mean")
    torch.testing.assert_close(result.table[12], (TABLE[5] + TABLE[8] + TABLE[9]) / 3)  # ▁cat s ing
    assert result.how[11:] == ["random", "mean", "random", "random", "random"]


def test_mean_leaves_the_unknown_piece_and_lone_space_marks_out() -> None:
    splitter = Splitter(OLD_TOKENIZER)
    assert splitter.split(PieceForm("ཀs", True)) == [8]
    assert splitter.split(PieceForm("ཀ", True)) == []


def test_pieces_inside_words_split_without_a_space_mark_in_wordpiece_and_byte_bpe() -> None:
    pieces = ["[UNK]", "[PAD]", "ab", "##ab", "##c", "a"]
    backend = Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    wordpiece = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    assert piece_forms(wordpiece)[:4] == [None, None, PieceForm("ab", True), PieceForm("ab", False)]
    assert Splitter(wordpiece).split(PieceForm("abc", True)) == [2, 4]
    assert Splitter(wordpiece).split(PieceForm("abཀc", False)) == [3, 4]

    other = [piece.replace("##", "@@") for piece in pieces]
    backend = Tokenizer(
        WordPiece({piece: i for i, piece in enumerate(other)}, unk_token="[UNK]", continuing_subword_prefix="@@")
    )
    marked = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    assert piece_forms(marked) == piece_forms(wordpiece)
    assert Splitter(marked).split(PieceForm("abc", True)) == [2, 4]

    vocabulary = {"Ġ": 0, "Ã": 1, "¤": 2, "a": 3, "Ã¤": 4, "ĠÃ¤": 5, "<s>": 6}  # the bytes of "ä" are C3 A4
    byte_level = Tokenizer(BPE(vocabulary, [("Ã", "¤"), ("Ġ", "Ã¤")]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    bpe = PreTrainedTokenizerFast(tokenizer_object=byte_level, bos_token="<s>")
    assert piece_forms(bpe)[3:6] == [PieceForm("a", False), PieceForm("ä", False), PieceForm("ä", True)]
    assert Splitter(bpe).split(PieceForm("äa", True)) == [5, 3]


def byte_level_bpe(merges: list[str]) -> PreTrainedTokenizerFast:
    """All 256 bytes, "<s>", and what the merges make: pieces given as their bytes in hexadecimal, "e0+bd"."""
    letters = {byte: letter for letter, byte in BYTE_LEVEL.items()}
    pairs = [tuple("".join(letters[b] for b in bytes.fromhex(side)) for side in merge.split("+")) for merge in merges]
    pieces = ["<s>", *letters.values(), *(first + second for first, second in pairs)]
    backend = Tokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_parts_of_characters_are_what_their_bytes_are() -> None:
    # Tibetan ཀ is E0 BD 80, Georgian ა is E1 83 90: beginnings of characters, a space before one, an end and a start
    old = byte_level_bpe(["d0+be"])  # о
    new = byte_level_bpe(["d0+be", "e0+bd", "e1+83", "20+e1", "90+e1"])
    count = len(old)
    origins: list[int | None] = [*range(count), None, None, None, None]
    table = torch.randn(count, 4, generator=torch.Generator().manual_seed(5))
    byte_ids = {byte: old.convert_tokens_to_ids(letter) for letter, byte in BYTE_LEVEL.items()}
    spelt = [(0xE0, 0xBD), (0xE1, 0x83), (0x20, 0xE1), (0x90, 0xE1)]
    mean = initialise_rows(table, old, new, origins, InitialisationConfig(method="mean"))
    assert mean.how[count:] == ["mean"] * 4
    for row, pair in zip(mean.table[count:], spelt, strict=True):
        counted = [table[byte_ids[byte]] for byte in pair if byte != 0x20]  # a lone space spells nothing
        torch.testing.assert_close(row, torch.stack(counted).mean(0))
    for overlap in ("exact", "fuzzy"):
        lexical = initialise_rows(table, old, new, origins, InitialisationConfig(method="lexical", overlap=overlap))
        assert lexical.how[count:] == ["low-rank random"] * 4, "no old piece has these bytes"


def test_the_same_part_of_a_character_overlaps_and_no_other() -> None:
    old = [PieceForm("\udce0\udcbd", False), PieceForm("a\udce0", True), PieceForm("A", True)]
    wanted = {
        0: PieceForm("\udce0\udcbd", False),
        1: PieceForm("\udce0\udcbd", True),
        2: PieceForm("A\udce0", True),
        3: PieceForm("\udce1", False),
        4: PieceForm("\ufffd", False),
        5: PieceForm("a", True),
    }
    assert find_overlap(wanted, old, fuzzy=True) == {0: 0, 5: 2}
    assert find_overlap(wanted, old, fuzzy=False) == {0: 0}
    whole = byte_level_bpe(["e0+bd", "e0bd+80"])
    assert piece_forms(whole)[-2:] == [PieceForm("\udce0\udcbd", False), PieceForm("ཀ", False)]
    assert Splitter(whole).split(PieceForm("\udce0\udcbd", False)) == [len(whole) - 2]
    assert Splitter(OLD_TOKENIZER).split(PieceForm("\udce0s", True)) == [8], "no byte is a piece there"


def test_special_and_byte_tokens_that_are_new_get_random_rows() -> None:
    new = unigram([*OLD, "<0xE0>"])
    new.add_special_tokens({"extra_special_tokens": [AddedToken("<bo>", special=True)]})
    origins: list[int | None] = [*range(len(OLD)), None, None]
    result = initialise_rows(TABLE, OLD_TOKENIZER, new, origins, InitialisationConfig(method="mean"))
    assert result.how[len(OLD) :] == ["random", "random"]


def test_factorisation_agrees_with_numpys() -> None:
    table = torch.randn(40, 7, generator=torch.Generator().manual_seed(1)) + 0.5
    factors = factorise(table, 3)
    u, s, v = np.linalg.svd(table.numpy(), full_matrices=False)
    expected = (u[:, :3] * s[:3]) @ v[:3]
    np.testing.assert_allclose(factors.rows(factors.coordinates(table)), expected, atol=1e-5)
    coordinates = factors.coordinates(table).numpy()
    np.testing.assert_allclose(factors.mean, coordinates.mean(0), atol=1e-5)
    np.testing.assert_allclose(factors.std, coordinates.std(0), atol=1e-5)


def test_lexical_rows_of_a_rank_two_table_lie_in_its_plane_and_overlap_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(len(OLD), 2, generator=generator) @ torch.randn(2, 6, generator=generator)
    result = rows("lexical", table=table, rank=2)
    assert result.how[11:] == ["low-rank random"] * 3 + ["overlap"] * 2
    torch.testing.assert_close(result.table[13 + 1], table[10])  # ▁moon ~ ▁Moon
    torch.testing.assert_close(result.table[15], table[10])  # moon ~ ▁Moon
    assert np.linalg.matrix_rank(result.table.numpy(), tol=1e-4) == 2


def test_exact_overlap_tells_case_apart() -> None:
    assert rows("lexical", overlap="exact").how[11:] == ["low-rank random"] * 5


def test_sparsemax_of_worked_examples() -> None:
    # Thresholds by hand: [1, .8, .1]: two in the support, t = (1.8 - 1) / 2 = .4; [2, 0, 0]: one; equal: all.
    scores = torch.tensor([[0.1, 1.0, 0.8], [0.0, 2.0, 0.0], [0.3, 0.3, 0.3]])
    expected = torch.tensor([[0.0, 0.6, 0.4], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(sparsemax(scores), expected)


def test_focus_mixes_old_rows_by_sparsemax_of_the_cosines(tmp_path: Path) -> None:
    # cosines of བོད with cat 1, dog .8, sun .6: threshold (1 + .8 + .6 - 1) / 3, weights .5333, .3333, .1333
    path = word_vectors(tmp_path, {"cat": [1, 0], "dog": [0.8, 0.6], "sun": [0.6, -0.8], "བོད": [5, 0]})
    result = rows("focus", vectors=path, texts=())
    expected = (8 * TABLE[5] + 5 * TABLE[6] + 2 * TABLE[7]) / 15
    torch.testing.assert_close(result.table[11], expected)
    assert result.how[11:] == ["focus", "random", "random", "overlap", "overlap"]
    assert torch.equal(result.table[14], TABLE[10])


def test_focus_follows_translations_where_no_script_is_shared() -> None:
    result = rows("focus")
    torch.testing.assert_close(result.table[11], TABLE[5], atol=1e-4, rtol=0)  # བོད always beside "cat"
    torch.testing.assert_close(result.table[13], TABLE[7], atol=1e-4, rtol=0)  # ཉི always beside "sun"


def test_ofa_mixes_the_nearest_by_softmax(tmp_path: Path) -> None:
    path = word_vectors(tmp_path, {"cat": [1, 0], "dog": [0.8, 0.6], "sun": [0.6, -0.8], "བོད": [5, 0]})
    result = rows("ofa", vectors=path, neighbours=2, temperature=0.5, texts=())
    cat, dog = np.exp(1 / 0.5), np.exp(0.8 / 0.5)
    expected = (cat * TABLE[5] + dog * TABLE[6]) / (cat + dog)
    torch.testing.assert_close(result.table[11], expected, atol=1e-5, rtol=1e-5)
    assert result.how[11] == "ofa"


def test_ofa_with_a_rank_gives_new_rows_of_that_rank_and_old_ones_only_if_asked() -> None:
    kept, projected = rows("ofa", rank=2), rows("ofa", rank=2, project_old_rows=True)
    assert np.linalg.matrix_rank(kept.table[len(OLD) :].numpy(), tol=1e-4) == 2
    assert torch.equal(kept.table[: len(OLD)], TABLE)
    u, s, v = np.linalg.svd(TABLE.numpy(), full_matrices=False)
    np.testing.assert_allclose(projected.table[: len(OLD)], (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)
    assert np.linalg.matrix_rank(projected.table.numpy(), tol=1e-4) == 2
    assert projected.how[0] == "projected"


def test_nothing_new_needs_no_texts() -> None:
    result = initialise_rows(TABLE, OLD_TOKENIZER, OLD_TOKENIZER, list(range(len(OLD))))
    assert torch.equal(result.table, TABLE) and result.summary == {"copied": len(OLD)}


@pytest.mark.parametrize("method", ["focus", "ofa"])
def test_similarity_without_usable_texts_is_refused(method: str) -> None:
    with pytest.raises(DataError, match="needs texts of the new language"):
        rows(method, texts=())
    with pytest.raises(DataError, match="no old piece has a static vector"):
        rows(method, texts=["བོད ཉི བོད ཉི"] * 5)


@pytest.mark.parametrize("method", ["lexical", "ofa"])
def test_a_rank_beyond_the_table_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match="rank 7 is too high for a table of 11 rows and 6 dimensions"):
        rows(method, rank=7)


def test_nan_and_origins_that_do_not_fit_are_refused() -> None:
    broken = TABLE.clone()
    broken[4, 2] = float("nan")
    with pytest.raises(ModelError, match="1 rows of the old table hold NaN or infinity, the first is row 4"):
        rows("random", table=broken)
    with pytest.raises(ModelError, match="3 origins for 16 tokens"):
        initialise_rows(TABLE, OLD_TOKENIZER, NEW_TOKENIZER, [0, 1, None])
    with pytest.raises(ModelError, match="origin 11 is not a row"):
        initialise_rows(TABLE, OLD_TOKENIZER, NEW_TOKENIZER, [11, *ORIGINS[1:]])


@pytest.mark.parametrize("method", ALL)
def test_settings_written_out_in_full_are_the_same_settings(method: str) -> None:
    config = InitialisationConfig(method=method)
    assert InitialisationConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "focuss"}, "did you mean 'focus'"),
        ({"method": "mean", "rank": 4}, "rank has no meaning"),
        ({"method": "ofa", "project_old_rows": True}, "project_old_rows needs"),
        ({"method": "mean", "vectors": "x.vec"}, "vectors have no meaning"),
        ({"method": "mean", "overlap": "exact"}, 'overlap has no meaning for method "mean": use "lexical"'),
        ({"method": "focus", "neighbours": 3}, "neighbours have no meaning"),
        ({"method": "lexical", "temperature": 0.5}, 'temperature has no meaning for method "lexical": use "ofa"'),
        ({"method": "random", "static_vectors": {"dimension": 10}}, "static_vectors have no meaning"),
        ({"method": "focus", "vectors": "x.vec", "static_vectors": {"window": 2}}, "static_vectors have no meaning"),
    ],
)
def test_settings_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        InitialisationConfig(**options)
