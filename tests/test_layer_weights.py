"""Tables of layer weights: means over real tokens only, tokens beside their weights, cells that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import tiny_tokenizer
from enc2gen.errors import DataError
from enc2gen.evaluation.layer_weights import (
    LayerWeights,
    TokenWeights,
    language_weights,
    layer_numbers,
    token_weights,
    weights_html,
    weights_markdown,
)

TOKENIZER = tiny_tokenizer()


def encode(texts: Sequence[str]) -> list[list[int]]:
    return [TOKENIZER(text)["input_ids"] if text else [] for text in texts]


class Bridge:
    """Weights that depend on the token alone: [1, id, 2 * id], normalised; zeros at padding."""

    processor = SimpleNamespace(encoder_tokenizer=TOKENIZER, encode_sources=encode)

    def layer_weights(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        raw = torch.stack([torch.ones_like(input_ids), input_ids, 2 * input_ids], dim=-1).float()
        return raw / raw.sum(-1, keepdim=True) * attention_mask[..., None]


def expected(texts: Sequence[str]) -> np.ndarray:  # type: ignore[type-arg]
    ids = np.array([token for row in encode(texts) for token in row], dtype=np.float64)
    raw = np.stack([np.ones_like(ids), ids, 2 * ids], axis=1)
    return raw / raw.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_means_are_over_real_tokens_whatever_the_batch(batch_size: int) -> None:
    texts = {"en": ["a", "b c d e f", "g h"], "kk": ["қ ң"]}
    found = language_weights(Bridge(), texts, batch_size=batch_size)
    assert [row.name for row in found] == ["en", "kk"]
    for row in found:
        tokens = expected(texts[row.name])
        assert row.tokens == len(tokens)
        assert row.weights == pytest.approx(tokens.mean(axis=0), abs=1e-6)
        assert row.spread == pytest.approx(tokens.std(axis=0), abs=1e-6)
        assert row.weights.sum() == pytest.approx(1.0)


def test_tokens_stand_beside_their_weights() -> None:
    found = token_weights(Bridge(), "a d")
    assert found.tokens == tuple(TOKENIZER.convert_ids_to_tokens(encode(["a d"])[0]))
    assert found.weights == pytest.approx(expected(["a d"]), abs=1e-6)


def test_nothing_to_weigh() -> None:
    with pytest.raises(DataError, match="no text in kk"):
        language_weights(Bridge(), {"kk": []})
    with pytest.raises(DataError, match="no tokens"):
        token_weights(Bridge(), "")


@pytest.mark.parametrize(
    ("weights", "entropy"), [([0.25] * 4, 1.0), ([0, 0, 1, 0], 0.0), ([0.5, 0.5, 0, 0], 0.5), ([1.0], 0.0)]
)
def test_entropy(weights: list[float], entropy: float) -> None:
    values = np.array(weights, dtype=np.float64)
    assert LayerWeights("kk", values, 0 * values, 1).entropy == pytest.approx(entropy)


def test_layer_numbers_say_which_convention() -> None:
    assert layer_numbers(3, include_embeddings=False) == [1, 2, 3]
    assert layer_numbers(3, include_embeddings=True) == [0, 1, 2]


def test_tables() -> None:
    rows = [LayerWeights("k|k", np.array([0.25, 0.75]), np.zeros(2), 9)]
    lines = weights_markdown(rows, [1, 2]).splitlines()
    assert lines[0] == "| language | 1 | 2 | entropy | tokens |" and lines[2].startswith(
        "| k\\|k | 25.0 | 75.0 | 0.81 |"
    )
    html = weights_html(rows, [1, 2])
    assert "25.0" in html and ">language<" in html
    tokens = TokenWeights("x", ("<s>", "▁ئۇ"), np.array([[0.2, 0.8], [0.5, 0.5]]))
    html = weights_html(tokens, [0, 1])
    assert "&lt;s&gt;" in html and "<s>" not in html and "▁ئۇ" in html and 'dir="auto"' in html
