"""How likely a language model finds each of a few labels, all of them behind one reading of the source.

The source is read once and leaves a key-value cache. The tokens of all labels form a tree (labels that begin alike
share the beginning), whose nodes are appended behind the source in a single pass: a mask lets every node see the
source and its own ancestors only, and its position is that of its depth, so that the sums are those that one pass
per label would give. The cost beside the source is one position per node, whatever the number of labels.
"""

from __future__ import annotations

import copy
import ctypes
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from enc2gen.data.batching import length_ordered
from enc2gen.errors import ConfigError
from enc2gen.evaluation.significance import Floats
from enc2gen.models.bridge.llm_inputs import accepts

_LOG = logging.getLogger(__name__)

Encoded = TypeVar("Encoded")

_MASKABLE = ("eager", "sdpa")
"""Attention implementations of transformers that take any additive mask."""
_DEVIATION = {torch.float32: 1e-2, torch.float64: 1e-6}
_HALF_DEVIATION = 1.0
"""Largest difference, in nats of a label's log-likelihood, between one pass for all labels and one pass per label
(our choice): rounding stays far below it, a mask or position that a language model ignores does not."""


@dataclass(frozen=True)
class LabelTree:
    """The tokens of all labels as a tree, its nodes in an order where parents come first.

    Attributes:
        tokens: `[nodes]`, token of each node; the last token of a label is only predicted, never read.
        depth: `[nodes]`, number of ancestors: 0 for a first token.
        visible: `[nodes, nodes]`, True where the row's node may see the column's: itself and its ancestors.
        readers: `[predictions]`, after which position something is predicted: 0 the source, i + 1 node i.
        predicted: `[predictions]`, the token that is predicted there.
        uses: `[predictions, labels]`, 1 where the label contains the prediction.
    """

    tokens: Tensor
    depth: Tensor
    visible: Tensor
    readers: Tensor
    predicted: Tensor
    uses: Tensor

    @classmethod
    def build(cls, labels: Sequence[Sequence[int]]) -> LabelTree:
        """The tree of labels given as token ids, each with its end token.

        Raises:
            ConfigError: there is no label, one has no token, or two have the same tokens.
        """
        if not labels or not all(labels):
            raise ConfigError("there is no label, or a label without tokens", where="labels", remedy="name the labels")
        if len({tuple(label) for label in labels}) < len(labels):
            raise ConfigError("two labels have the same tokens", where="labels", remedy="name every label once")
        nodes: dict[tuple[int, ...], int] = {}
        steps: dict[tuple[int, int], int] = {}
        used: list[list[int]] = []
        for label in labels:
            path = tuple(label)
            for end in range(1, len(path)):
                nodes.setdefault(path[:end], len(nodes))
            reader = [0] + [nodes[path[:end]] + 1 for end in range(1, len(path))]
            used.append([steps.setdefault(step, len(steps)) for step in zip(reader, path, strict=True)])
        visible = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for path, index in nodes.items():
            visible[index, [nodes[path[:end]] for end in range(1, len(path) + 1)]] = True
        uses = torch.zeros(len(steps), len(labels), dtype=torch.float64)
        for column, rows in enumerate(used):
            uses[rows, column] = 1
        return cls(
            tokens=torch.tensor([path[-1] for path in nodes], dtype=torch.long),
            depth=torch.tensor([len(path) - 1 for path in nodes], dtype=torch.long),
            visible=visible,
            readers=torch.tensor([reader for reader, _ in steps]),
            predicted=torch.tensor([token for _, token in steps]),
            uses=uses,
        )

    def to(self, device: torch.device) -> LabelTree:
        """The same tree on `device`."""
        return LabelTree(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def sums(self, logits: Tensor) -> Tensor:
        """Log-likelihoods of the labels, `[batch, labels]` in float64, from `logits` `[batch, 1 + nodes, vocabulary]`.

        Row 0 of `logits` follows the source, row i + 1 node i.
        """
        chosen = logits[:, self.readers, self.predicted].double()  # [batch, predictions]
        total = torch.logsumexp(logits.float(), dim=-1).double()[:, self.readers]
        return (chosen - total) @ self.uses


@dataclass
class ReadSource:
    """What a language model has kept of a batch of sources it has read.

    Attributes:
        cache: keys and values of transformers, `past_key_values`; used up by scoring.
        mask: `[batch, cached]`, 1 on what was read and 0 on padding, which may stand anywhere.
        logits: `[batch, vocabulary]`, of the token that follows the source.
        reading: the context in which the language model has to run, such as that of an aligner.
    """

    cache: Any
    mask: Tensor
    logits: Tensor
    reading: Callable[[], AbstractContextManager[Any]] = nullcontext


def score_tree(llm: PreTrainedModel, source: ReadSource, tree: LabelTree) -> Tensor:
    """Log-likelihood of every label behind every source, `[batch, labels]`, in one pass over the tree."""
    logits = source.logits[:, None]
    if len(tree.tokens):
        batch, cached = source.mask.shape
        seen = torch.cat(
            [
                source.mask.bool()[:, None].expand(batch, len(tree.tokens), cached),
                tree.visible[None].expand(batch, -1, -1),
            ],
            dim=-1,
        )
        hidden = torch.zeros(seen.shape, dtype=llm.dtype, device=seen.device)
        hidden.masked_fill_(~seen, torch.finfo(llm.dtype).min)
        with source.reading():
            output = llm(
                input_ids=tree.tokens[None].expand(batch, -1),
                attention_mask=hidden[:, None],  # [batch, 1, nodes, cached + nodes]
                position_ids=source.mask.sum(1, keepdim=True) + tree.depth[None],
                past_key_values=source.cache,
                use_cache=True,
            )
        logits = torch.cat([logits, output.logits.to(logits.dtype)], dim=1)
    return tree.sums(logits)


def takes_tree(llm: PreTrainedModel) -> bool:
    """Whether `llm` takes explicit positions and masks of any shape: full attention in all layers, eager or sdpa."""
    config: Any = llm.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if not getattr(config, "layer_types", None) else None
    full = kinds == {"full_attention"} and not window
    return full and getattr(config, "_attn_implementation", None) in _MASKABLE and accepts(llm, "position_ids")


def score_separately(llm: PreTrainedModel, source: ReadSource, labels: Sequence[Sequence[int]]) -> Tensor:
    """:func:`score_tree` with one pass per label, for language models that take ordinary masks only."""
    first = torch.log_softmax(source.logits.double(), dim=-1)
    columns = []
    for label in labels:
        ids = torch.tensor(label, device=source.mask.device).expand(len(source.mask), -1)
        column = first[:, label[0]]
        if ids.shape[1] > 1:
            positions = source.mask.sum(1, keepdim=True) + torch.arange(ids.shape[1] - 1, device=ids.device)
            with source.reading():
                output = llm(
                    input_ids=ids[:, :-1],
                    attention_mask=torch.cat([source.mask, torch.ones_like(ids[:, :-1])], dim=1),
                    past_key_values=copy.deepcopy(source.cache),
                    use_cache=True,
                    **({"position_ids": positions} if accepts(llm, "position_ids") else {}),
                )
            rest = torch.log_softmax(output.logits.double(), dim=-1)
            column = column + rest.gather(-1, ids[:, 1:, None]).sum((1, 2))
        columns.append(column)
    return torch.stack(columns, dim=1)


MAX_BATCH_TOKENS = 4096
"""Most tokens of a batch, padding included (our choice): texts in a script that an LLM spells out in bytes are long,
and the memory of attention grows with the square of the length."""


class _Text(NamedTuple):
    source_length: int
    target_length: int = 0


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like lengths, the longest first, so that a lack of memory shows at once.

    A batch holds at most `batch_size` texts and, unless it is a single text, `MAX_BATCH_TOKENS` tokens.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}", where="batch_size", remedy="use 1 or more")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    # A text that is longer than any batch may be fills one, instead of being refused as an example of training is.
    texts = [_Text(min(lengths[index], MAX_BATCH_TOKENS)) for index in order]
    return [[order[place] for place in cut] for cut in length_ordered(texts, MAX_BATCH_TOKENS, batch_size)]


def return_free_memory() -> None:
    """Give freed memory back to the system (glibc only; nothing happens elsewhere).

    An allocator may keep what is freed for the next step, which is right for training, where steps are alike; batches
    of ever shorter texts would leave it in pieces that fit nothing, until there is none left.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class Classification:
    """Predictions for some texts.

    Attributes:
        predictions: one a text: a label, or by generation whatever was written, stripped; "" for an empty text that
            was not read.
        labels: the labels to choose from.
        log_likelihoods: log p(label, end | text) in nats, `[texts, labels]`; None by generation.
    """

    predictions: tuple[str, ...]
    labels: tuple[str, ...]
    log_likelihoods: Floats | None = None

    @property
    def probabilities(self) -> Floats | None:
        """Probabilities of the labels, given that one of them is written, `[texts, labels]`; None by generation."""
        if self.log_likelihoods is None:
            return None
        shares = np.exp(self.log_likelihoods - self.log_likelihoods.max(axis=1, keepdims=True, initial=-np.inf))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    @classmethod
    def likeliest(cls, labels: Sequence[str], log_likelihoods: Floats) -> Classification:
        """The likeliest label of each text; the first of equals."""
        chosen = log_likelihoods.argmax(axis=1)
        return cls(tuple(labels[index] for index in chosen), tuple(labels), log_likelihoods)


class TreeScorer(ABC, Generic[Encoded]):
    """Scores labels behind sources, whatever the language model reads of a source.

    Before the first batch, one pass for all labels is compared with one pass per label on two sources. A language
    model in which they differ ignores masks or positions; it is scored label by label, and a line is logged.

    Args:
        llm: the language model, in evaluation mode.
        labels: what is scored, as text; columns of the results.
        label_ids: their tokens, each with the token that ends it.

    Raises:
        ConfigError: no label, or two with the same tokens.
    """

    def __init__(self, llm: PreTrainedModel, labels: Sequence[str], label_ids: Sequence[Sequence[int]]) -> None:
        self.llm, self.labels = llm, tuple(labels)
        self._ids = [list(ids) for ids in label_ids]
        self._tree = LabelTree.build(self._ids).to(llm.device)
        self._in_one_pass: bool | None = None

    @torch.inference_mode()
    def log_likelihoods(
        self, texts: Sequence[str], *, batch_size: int = 32, on_batch: Callable[[int], None] | None = None
    ) -> Floats:
        """log p(label, end | text) in nats, `[texts, labels]`; whichever the batches are, up to rounding.

        Args:
            batch_size: texts that are read at once, of like lengths.
            on_batch: called with the number of texts finished so far.
        """
        encoded = self._encode(texts)
        scores = np.empty((len(texts), len(self.labels)))
        done = 0
        for batch in length_sorted_batches([self._length(source) for source in encoded], batch_size):
            chosen = [encoded[index] for index in batch]
            if self._in_one_pass is None:
                self._in_one_pass = self._fits_one_pass([chosen[0], chosen[-1]])
            scores[batch] = self._score(chosen, self._in_one_pass).cpu().numpy()
            return_free_memory()
            done += len(batch)
            if on_batch is not None:
                on_batch(done)
        return scores

    def _score(self, sources: Sequence[Encoded], in_one_pass: bool) -> Tensor:
        read = self._read(sources)
        return score_tree(self.llm, read, self._tree) if in_one_pass else score_separately(self.llm, read, self._ids)

    def _fits_one_pass(self, sources: Sequence[Encoded]) -> bool:
        if not takes_tree(self.llm):
            return False
        difference = (self._score(sources, True) - self._score(sources, False)).abs().max().item()
        if difference <= _DEVIATION.get(self.llm.dtype, _HALF_DEVIATION):
            return True
        _LOG.warning(
            "%s does not take masks of trees (off by %.3g nats); scoring every label on its own",
            type(self.llm).__name__,
            difference,
        )
        return False

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> list[Encoded]:
        """What is read of each text."""

    @abstractmethod
    def _length(self, source: Encoded) -> int:
        """Tokens of an encoded text."""

    @abstractmethod
    def _read(self, sources: Sequence[Encoded]) -> ReadSource:
        """Read a batch, up to where labels begin."""
