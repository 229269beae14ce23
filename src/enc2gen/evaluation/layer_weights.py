"""Which layers of the encoder a bridge reads: the weights of its fusion per language and per token, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from enc2gen.errors import DataError
from enc2gen.evaluation.significance import Floats


class SourceProcessor(Protocol):
    """What a bridge's processor must offer here."""

    encoder_tokenizer: Any

    def encode_sources(self, texts: Sequence[str]) -> list[list[int]]:
        """Encoder ids of each text, template and special tokens included."""


class LayerWeighing(Protocol):
    """What a bridge must offer here."""

    processor: Any

    def layer_weights(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[batch, length, layers]`: each real token's weights sum to 1, padding has zeros."""


@dataclass(frozen=True)
class LayerWeights:
    """Mean weights of one language (or of any set of texts).

    Attributes:
        name: the language.
        weights: `[layers]`, summing to 1: the mean over all real tokens, special and template tokens included.
        spread: `[layers]`, standard deviation over the tokens; zero where all tokens share their weights.
        tokens: how many.
    """

    name: str
    weights: Floats
    spread: Floats
    tokens: int

    @property
    def entropy(self) -> float:
        """Entropy of the mean weights as a share of the largest possible: 1 is a plain mean, 0 a single layer."""
        if len(self.weights) < 2:
            return 0.0
        positive = self.weights[self.weights > 0]
        return float(-(positive * np.log(positive)).sum() / np.log(len(self.weights)))


@dataclass(frozen=True)
class TokenWeights:
    """Weights of every token of one text.

    Attributes:
        text: the text.
        tokens: the encoder's pieces, special tokens included, as the tokenizer spells them.
        weights: `[tokens, layers]`.
    """

    text: str
    tokens: tuple[str, ...]
    weights: Floats


def layer_numbers(count: int, *, include_embeddings: bool) -> list[int]:
    """The encoder's layer of each column of weights: 1, 2, ..., or 0 (the embedding output), 1, ..."""
    return [index + (0 if include_embeddings else 1) for index in range(count)]


def language_weights(
    model: LayerWeighing, texts: Mapping[str, Sequence[str]], *, batch_size: int = 32
) -> list[LayerWeights]:
    """Mean layer weights of each language, in the order of `texts`.

    Args:
        model: a bridge with its processor.
        texts: language -> texts.
        batch_size: texts read at once.

    Raises:
        DataError: a language without texts, or a text without tokens.
    """
    found = []
    for name, sentences in texts.items():
        if not sentences:
            raise DataError(f"no text in {name}", remedy="give each language at least one")
        total, squares, tokens = np.zeros(0), np.zeros(0), 0
        for weights in _read(model, sentences, batch_size):
            total = weights.sum(axis=0) + (total if total.size else 0.0)
            squares = (weights**2).sum(axis=0) + (squares if squares.size else 0.0)
            tokens += len(weights)
        mean = total / tokens
        spread = np.sqrt(np.maximum(squares / tokens - mean**2, 0.0))
        found.append(LayerWeights(name, mean, spread, tokens))
    return found


def token_weights(model: LayerWeighing, text: str) -> TokenWeights:
    """Layer weights of every token of one text.

    Raises:
        DataError: the text has no tokens.
    """
    processor: SourceProcessor = model.processor
    (weights,) = _read(model, [text], 1)
    ids = processor.encode_sources([text])[0]
    return TokenWeights(text, tuple(processor.encoder_tokenizer.convert_ids_to_tokens(ids)), weights)


@torch.inference_mode()
def _read(model: LayerWeighing, texts: Sequence[str], batch_size: int) -> Iterator[Floats]:
    """Weights of all real tokens of a batch, `[tokens, layers]`, batch by batch; sorted by length."""
    processor: SourceProcessor = model.processor
    rows = sorted(processor.encode_sources(texts), key=len)
    if not rows[0]:
        raise DataError("a text has no tokens", remedy="leave empty texts out")
    pad = processor.encoder_tokenizer.pad_token_id or 0  # masked, so any id will do
    device = getattr(model, "device", None)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in batch], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)
        yield model.layer_weights(ids, mask)[mask.bool()].to(torch.float64).cpu().numpy()


def weights_markdown(rows: Sequence[LayerWeights], layers: Sequence[int]) -> str:
    """A Markdown table: languages x layers in percent, then entropy (1 = plain mean) and tokens."""
    header = ["language", *map(str, layers), "entropy", "tokens"]
    lines = [_line(header), _line(["---", *["---:"] * (len(layers) + 2)])]
    lines += [_line([row.name, *_percent(row.weights), f"{row.entropy:.2f}", str(row.tokens)]) for row in rows]
    return "\n".join(lines) + "\n"


def weights_html(rows: Sequence[LayerWeights] | TokenWeights, layers: Sequence[int]) -> str:
    """An HTML table of percentages, each cell shaded by its weight; tokens are text, so any script is shown.

    Args:
        rows: languages, or the tokens of one text.
        layers: the layer of each column, see :func:`layer_numbers`.
    """
    if isinstance(rows, TokenWeights):
        first, named = "token", [(token, weights) for token, weights in zip(rows.tokens, rows.weights, strict=True)]
    else:
        first, named = "language", [(row.name, row.weights) for row in rows]
    highest = max((float(weights.max()) for _, weights in named), default=1.0) or 1.0
    head = "".join(f'<th scope="col">{layer}</th>' for layer in layers)
    body = "".join(
        f'<tr><th scope="row" dir="auto">{escape(name)}</th>{"".join(_cell(weight, highest) for weight in row)}</tr>'
        for name, row in named
    )
    return (
        f'<table class="layer-weights"><thead><tr><th scope="col">{first}</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _cell(weight: float, highest: float) -> str:
    # Half opaque at most, so that black figures stay readable on it.
    return f'<td style="background:rgba(0,114,178,{0.5 * weight / highest:.3f})">{100 * weight:.1f}</td>'


def _percent(weights: Floats) -> list[str]:
    return [f"{100 * weight:.1f}" for weight in weights]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
