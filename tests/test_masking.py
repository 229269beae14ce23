"""Masking: which pieces are hidden, that draws are functions of seed and position, blocks of long texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from enc2gen.data.batching import IGNORED_LABEL, BatchingConfig
from enc2gen.data.masking import (
    MaskedExample,
    Masker,
    MaskingConfig,
    collate_masked,
    masked_batches,
    masked_stream,
    word_numbers,
)
from enc2gen.data.text_blocks import TextBlocks
from enc2gen.errors import CheckpointError, ConfigError, DataError, ModelError

MASK, UNK = "<mask>", 3
TEXTS = [("ab cde fgh kl mnop", "en"), ("абв где жзи клм", "ru"), ("a b c d e f", "en")] * 4


def masker(tokenizer: PreTrainedTokenizerFast, max_length: int = 32, **settings: object) -> Masker:
    return Masker(tokenizer, MaskingConfig(**settings), max_length)  # type: ignore[arg-type]


def original(example: MaskedExample) -> list[int]:
    return [i if label == IGNORED_LABEL else label for i, label in zip(example.input_ids, example.labels, strict=True)]


def test_labels_restore_the_text_and_special_tokens_stay(tokenizer: PreTrainedTokenizerFast) -> None:
    one = masker(tokenizer, mask_ratio=0.5)
    for seed in range(30):
        example = one.training_example("ab cde fgh kl", np.random.default_rng(seed))
        assert original(example) == tokenizer("ab cde fgh kl")["input_ids"]
        assert example.labels[0] == example.labels[-1] == IGNORED_LABEL
        assert any(label != IGNORED_LABEL for label in example.labels)


def test_the_shares_are_those_of_the_settings(tokenizer: PreTrainedTokenizerFast) -> None:
    one = masker(tokenizer, 64, mask_ratio=0.4, mask_share=0.5, random_share=0.3, whole_words=False)
    text = " ".join("abcdefghij" * 3)
    counts: Counter[str] = Counter()
    for seed in range(400):
        example = one.training_example(text, np.random.default_rng(seed))
        for shown, label in zip(example.input_ids[1:-1], example.labels[1:-1], strict=True):
            counts["pieces"] += 1
            if label != IGNORED_LABEL:
                counts["predicted"] += 1
                counts["mask" if shown == tokenizer.mask_token_id else "kept" if shown == label else "random"] += 1
                assert shown == tokenizer.mask_token_id or shown not in tokenizer.all_special_ids
    assert counts["predicted"] / counts["pieces"] == pytest.approx(0.4, abs=0.02)
    assert counts["mask"] / counts["predicted"] == pytest.approx(0.5, abs=0.02)
    assert counts["random"] / counts["predicted"] == pytest.approx(0.3, abs=0.02)
    assert counts["kept"] / counts["predicted"] == pytest.approx(0.2, abs=0.02)


def test_words_are_masked_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "klmn opqr stuv"  # four or five pieces each
    for seed in range(40):
        example = masker(tokenizer, mask_share=1.0, random_share=0.0).training_example(
            text, np.random.default_rng(seed)
        )
        hidden = [label != IGNORED_LABEL for label in example.labels[1:-1]]
        pieces = tokenizer.convert_ids_to_tokens(original(example)[1:-1])
        words = np.cumsum([piece.startswith("▁") for piece in pieces])
        for word in set(words.tolist()):
            assert len({flag for flag, number in zip(hidden, words, strict=True) if number == word}) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("жол ашық", [0, 0, 0, -1, 1, 1, 1, 1]),
        ("བོད་ཡིག", [0, 0, 0, 0, 1, 1, 1]),  # syllables, the tsheg with the one before
        ("中文字", [0, 1, 2]),
        ("กำ", [0, 1]),
        ("ကို", [0, 0, 0]),  # a letter with its vowel signs
    ],
)
def test_words_of_a_text(text: str, words: list[int]) -> None:
    assert word_numbers(text).tolist() == words


def test_unknown_pieces_are_never_predicted(tokenizer: PreTrainedTokenizerFast) -> None:
    one = masker(tokenizer, mask_ratio=0.9, mask_share=0.0, random_share=1.0)
    for seed in range(20):
        example = one.training_example("ab བོད cd", np.random.default_rng(seed))
        assert UNK not in example.labels
    nothing = one.training_example("བོད", np.random.default_rng(0))
    assert set(nothing.labels) <= {IGNORED_LABEL, tokenizer.convert_tokens_to_ids("▁")}
    with pytest.raises(ModelError, match="mask token"):
        bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
        Masker(bare, MaskingConfig(), 16)


def test_scored_masks_depend_on_the_text_not_on_the_pieces(
    tokenizer: PreTrainedTokenizerFast, make_word_tokenizer: Callable[[], PreTrainedTokenizerFast]
) -> None:
    text = "abc de fgh ij klm no"
    hidden = []
    for tok in (tokenizer, make_word_tokenizer()):
        one = masker(tok, 64)
        (example,) = one.scored_examples(text, 0.4, np.random.default_rng(5))
        encoding = tok.backend_tokenizer.encode(text, add_special_tokens=False)
        spans = [o for o, label in zip(encoding.offsets, example.labels[1:-1], strict=True) if label != IGNORED_LABEL]
        hidden.append("".join(text[a:b] for a, b in spans).replace(" ", ""))
        shown = {i for i, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED_LABEL}
        assert shown == {tok.mask_token_id}  # always the mask, whatever training does
        assert example.covered == len(hidden[-1])
    assert hidden[0] == hidden[1] != ""


@pytest.fixture
def make_word_tokenizer() -> Callable[[], PreTrainedTokenizerFast]:
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel

    def make() -> PreTrainedTokenizerFast:
        words = ["<s>", "<pad>", "</s>", "<unk>", "abc", "de", "fgh", "ij", "klm", "no", "<mask>"]
        backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
            mask_token="<mask>",
        )  # fmt: skip

    return make


def test_bytes_under_masked_pieces(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = masker(tokenizer).scored_examples("ab བོད", 0.999, np.random.default_rng(0))
    assert example.covered == 2
    assert example.unknown == len("བོད".encode())


def test_a_batch_is_padded_and_keeps_labels_in_row_order() -> None:
    rows = [MaskedExample((0, 5, 9, 2), (-100, -100, 7, -100)), MaskedExample((0, 9, 2), (-100, 6, -100))]
    batch = collate_masked(rows, 1)
    assert batch.input_ids.tolist() == [[0, 5, 9, 2], [0, 9, 2, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.predicted.nonzero().tolist() == [[0, 2], [1, 1]]
    assert batch.labels.tolist() == [7, 6]
    assert (batch.num_tokens, batch.num_target_tokens) == (7, 2)
    assert [b.num_tokens for b in masked_batches(rows, 1, max_tokens=4)] == [4, 3]
    with pytest.raises(DataError):
        collate_masked([], 1)


def test_the_stream_resumes_and_masks_anew(tokenizer: PreTrainedTokenizerFast) -> None:
    def stream(seed: int = 3, **settings: float) -> object:
        config = BatchingConfig(max_tokens=80, buffer_batches=2)
        return masked_stream(TEXTS, masker(tokenizer, **settings), config, seed=seed)

    first, second = stream(), stream()
    drawn = [next(first) for _ in range(12)]
    for _ in range(5):
        next(second)
    resumed = stream()
    resumed.load_state_dict(second.state_dict())
    for expected in drawn[5:]:
        batch = next(resumed)
        assert torch.equal(batch.input_ids, expected.input_ids) and torch.equal(batch.labels, expected.labels)
    seen: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for batch in drawn:
        for flags, mask in zip(batch.predicted, batch.attention_mask, strict=True):
            length = int(mask.sum())
            seen.setdefault((length,), set()).add(tuple(flags[:length].tolist()))
    assert max(map(len, seen.values())) > 3  # the same texts under different masks
    with pytest.raises(CheckpointError, match="masking"):
        stream(mask_ratio=0.2).load_state_dict(second.state_dict())


def test_blocks_hold_the_whole_text_once() -> None:
    text = "".join(f"word{i} " for i in range(100))
    blocks = TextBlocks([(text, "en"), ("", "en"), ("  ", "en"), ("བོད་" * 30, "bo")], 50)
    assert "".join(blocks[i] for i in blocks.languages["en"]) == text
    assert all(len(blocks[i]) <= 50 and blocks[i].endswith(" ") for i in blocks.languages["en"])
    assert "".join(blocks[i] for i in blocks.languages["bo"]) == "བོད་" * 30
    assert all(blocks[i].endswith("་") for i in blocks.languages["bo"])
    unbroken = TextBlocks(["x" * 120], 50)
    assert [len(unbroken[i]) for i in range(len(unbroken))] == [50, 50, 20]


def test_long_texts_are_cut_to_the_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    one = masker(tokenizer, max_length=16)
    text = " ".join("abcdefghijklmnopqrstuvwxyz")
    starts = set()
    for seed in range(20):
        example = one.training_example(text, np.random.default_rng(seed))
        assert len(example.input_ids) == 16
        starts.add(original(example)[1])
    assert len(starts) > 3
    scored = one.scored_examples(text, 0.5, np.random.default_rng(0))
    assert sum(len(e.input_ids) - 2 for e in scored) == len(one.ids(text))


def test_bad_settings_and_rows_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="exceed 1"):
        MaskingConfig(mask_share=0.9, random_share=0.2)
    with pytest.raises(ConfigError, match="too short"):
        masker(tokenizer, max_length=3)
    with pytest.raises(DataError, match="no text"):
        masked_stream([], masker(tokenizer), BatchingConfig())
    with pytest.raises(DataError, match="is no text"):
        masked_stream([7], masker(tokenizer), BatchingConfig())
