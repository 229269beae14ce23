"""Does the output depend on the source? Controls that a loss or a score alone does not give.

A decoder can reach a low loss as a language model that ignores its source and a fair chrF by always writing a
frequent string. So every system is also measured with shuffled sources and permuted hypotheses, and against
two model-free
systems: the best constant string, and the copied source.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sacrebleu.metrics import CHRF

from enc2gen.data.batching import Batch, EncodedExample
from enc2gen.errors import ConfigError, DataError
from enc2gen.evaluation.metrics import ChrfPlusPlus, References, check_texts
from enc2gen.evaluation.significance import RESAMPLES, Score

MAX_CANDIDATES = 20_000  # our choice: a few seconds; more are sampled
_EXACT_CANDIDATES = 10  # our choice: see best_constant


@dataclass(frozen=True)
class SourceUse:
    """How much a system's loss and output depend on its source.

    Attributes:
        loss: nats per target token with the true sources.
        shuffled_loss: the same targets with other sources of the same languages.
        chrf: chrF++ of the hypotheses.
        permuted_chrf: chrF++ of the same hypotheses, each given to another sentence.
        distinct_outputs: number of different hypotheses.
        outputs: number of hypotheses.
        left_out: examples that the losses are not of (:func:`with_another_source`).
    """

    loss: float
    shuffled_loss: float
    chrf: Score
    permuted_chrf: Score
    distinct_outputs: int
    outputs: int
    left_out: int = 0

    @property
    def gain(self) -> float:
        """Nats per token that the true source saves."""
        return source_gain(self.loss, self.shuffled_loss)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, `gain` included."""
        return {**asdict(self), "gain": self.gain}


@dataclass(frozen=True)
class BestConstant:
    """The string that scores best when it is the answer to everything, and its chrF++ on the test set."""

    text: str
    score: Score


def source_gain(loss_true: float, loss_shuffled: float) -> float:
    """Loss that the true source saves over a shuffled one; 0 for a decoder that ignores its source.

    Raises:
        DataError: a loss is not finite.
    """
    if not (math.isfinite(loss_true) and math.isfinite(loss_shuffled)):
        raise DataError(f"losses are {loss_true} and {loss_shuffled}", remedy="evaluate a model that did not diverge")
    return loss_shuffled - loss_true


def measure_source_use(
    hypotheses: Sequence[str],
    references: References,
    *,
    loss: float,
    shuffled_loss: float,
    left_out: int = 0,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> SourceUse:
    """Collect the controls of one system on one test set; needs at least two sentences (`DataError`)."""
    source_gain(loss, shuffled_loss)
    return SourceUse(
        loss=loss,
        shuffled_loss=shuffled_loss,
        chrf=_chrf(hypotheses, references, resamples, seed),
        permuted_chrf=permuted_chrf(hypotheses, references, seed, resamples=resamples),
        distinct_outputs=distinct_outputs(hypotheses),
        outputs=len(hypotheses),
        left_out=left_out,
    )


def distinct_outputs(hypotheses: Sequence[str]) -> int:
    """Number of different hypotheses, spaces around them aside."""
    return len({hypothesis.strip() for hypothesis in hypotheses})


def copy_source(sources: Sequence[str]) -> list[str]:
    """Hypotheses of the system that copies its source."""
    return list(sources)


def permuted_chrf(
    hypotheses: Sequence[str], references: References, seed: int = 0, *, resamples: int = RESAMPLES
) -> Score:
    """chrF++ of the hypotheses when each is given to another sentence: the score without the source.

    Raises:
        DataError: fewer than two sentences, or texts that cannot be scored.
    """
    check_texts(hypotheses, references)
    order = derangement(range(len(hypotheses)), seed)
    return _chrf([hypotheses[index] for index in order], references, resamples, seed)


def _chrf(hypotheses: Sequence[str], references: References, resamples: int, seed: int) -> Score:
    score = ChrfPlusPlus().score(hypotheses, references, resamples=resamples, seed=seed)
    assert score is not None, "chrF++ is measurable in every language"
    return score


def derangement(values: Sequence[Hashable], seed: int, *, what: str = "sentence") -> NDArray[np.int64]:
    """A random permutation p, `[len(values)]`, with `values[p[i]] != values[i]` everywhere.

    Positions are put in random order with equal values next to each other, and rotated by the size of the
    largest group of equal values; with distinct values that is a random cycle.

    Raises:
        DataError: more than half of the values are equal, so that none exists.
    """
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    rng = np.random.default_rng(seed)
    for index in rng.permutation(len(values)).tolist():
        groups[values[index]].append(index)
    largest = max(map(len, groups.values()), default=0)
    if not values or 2 * largest > len(values):
        raise DataError(
            f"cannot give every {what} another one: {largest} of {len(values)} are the same",
            remedy="evaluate on more, and more different, sentences",
        )
    lined_up = np.asarray([index for group in groups.values() for index in group])
    result = np.empty(len(values), dtype=np.int64)
    result[lined_up] = np.roll(lined_up, -largest)
    return result


def with_another_source(
    examples: Sequence[EncodedExample], *, language_ids: Collection[int] = ()
) -> list[EncodedExample]:
    """The examples that :func:`shuffled_source_examples` can shuffle: without languages of which most sources are
    identical, one example alone included.
    """
    sources = [example.input_ids for example in examples]
    groups = _language_groups(sources, [example.decoder_input_ids[0] for example in examples], language_ids)
    kept = {
        index
        for members in groups
        if 2 * max(Counter(sources[member] for member in members).values()) <= len(members)
        for index in members
    }
    return [example for index, example in enumerate(examples) if index in kept]


def shuffled_source_examples(
    examples: Sequence[EncodedExample], seed: int = 0, *, language_ids: Collection[int] = ()
) -> list[EncodedExample]:
    """Give every target the source of another example of the same languages, never an identical source.

    Args:
        examples: encoded examples; the first decoder input id is the target language.
        seed: which sources are swapped.
        language_ids: ids of language tokens; an example whose second, first or last source id is one of them only
            gets sources that have the same one.

    Raises:
        DataError: more than half of the sources of a language are identical (one example alone included).
    """
    sources = [example.input_ids for example in examples]
    order = _shuffle_sources(sources, [example.decoder_input_ids[0] for example in examples], seed, language_ids)
    return [replace(example, input_ids=sources[index]) for example, index in zip(examples, order, strict=True)]


def shuffled_source_batches(
    batches: Sequence[Batch], pad_token_id: int, seed: int = 0, *, language_ids: Collection[int] = ()
) -> list[Batch]:
    """Like :func:`shuffled_source_examples`, for batches: every row keeps its target and gets another source.

    Sources move between batches too. Source tensors keep the dtype and the device of their batch.
    """
    sources = [
        tuple(row[mask.bool()].tolist())
        for batch in batches
        for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    targets = [int(first) for batch in batches for first in batch.decoder_input_ids[:, 0]]
    order = iter(_shuffle_sources(sources, targets, seed, language_ids).tolist())
    return [_with_sources(batch, [sources[next(order)] for _ in batch.input_ids], pad_token_id) for batch in batches]


def _shuffle_sources(
    sources: Sequence[tuple[int, ...]], targets: Sequence[int], seed: int, language_ids: Collection[int]
) -> NDArray[np.int64]:
    order = np.empty(len(sources), dtype=np.int64)
    for members in _language_groups(sources, targets, language_ids):
        shuffled = derangement([sources[index] for index in members], seed, what="source of a language")
        order[members] = np.asarray(members)[shuffled]
    return order


def _language_groups(
    sources: Sequence[tuple[int, ...]], targets: Sequence[int], language_ids: Collection[int]
) -> list[list[int]]:
    """Numbers of the examples with the same two languages."""
    groups: defaultdict[tuple[int, int | None], list[int]] = defaultdict(list)
    for index, (source, target) in enumerate(zip(sources, targets, strict=True)):
        places = (*source[1:2], *source[:1], *source[-1:])  # the standard one, NLLB's, mBART's
        language = next((index for index in places if index in language_ids), None)
        groups[target, language].append(index)
    return list(groups.values())


def _with_sources(batch: Batch, sources: Sequence[tuple[int, ...]], pad_token_id: int) -> Batch:
    length = max(map(len, sources))
    input_ids = torch.full((len(sources), length), pad_token_id, dtype=batch.input_ids.dtype)
    attention_mask = torch.zeros((len(sources), length), dtype=batch.attention_mask.dtype)
    for row, source in enumerate(sources):
        input_ids[row, : len(source)] = torch.tensor(source, dtype=input_ids.dtype)
        attention_mask[row, : len(source)] = 1
    device = batch.input_ids.device
    return replace(batch, input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))


def best_constant(
    references_dev: References,
    references_test: References,
    *,
    optimistic: bool = False,
    candidates: Sequence[str] = (),
    max_candidates: int = MAX_CANDIDATES,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> BestConstant:
    """The constant answer with the best chrF++: a floor that any system using its source must beat.

    Candidates are the dev references and `candidates` (training targets, say). All are ranked by corpus
    chrF++, and the best few are scored again by sacrebleu, which picks the winner. The ranking is exact with
    one reference per sentence; with several it counts each as a sentence of its own.

    Args:
        references_dev: references of the development set, on which the string is chosen.
        references_test: references of the test set, on which it is scored.
        optimistic: choose on the test set instead, its references being candidates too. That knows the
            answers, so a system that beats it needs no further argument.
        candidates: more strings to try.
        max_candidates: with more different candidates than this, a random sample is tried.
        seed: of that sample and of the bootstrap.
        resamples: bootstrap resamples of the score.

    Raises:
        DataError: no references, or no candidate with any text.
        ConfigError: `max_candidates` below 1.
    """
    chosen_on = references_test if optimistic else references_dev
    for references in (chosen_on, references_test):
        check_texts([""] * len(references), references)
    pools = [*references_dev, *(references_test if optimistic else ()), candidates]
    strings = sorted({text for texts in pools for text in texts if text.strip()})
    if max_candidates < 1:
        raise ConfigError(f"max_candidates is {max_candidates}", remedy="use at least 1")
    if not strings:
        raise DataError("every candidate string is empty", remedy="give references that have text")
    if len(strings) > max_candidates:
        picked = np.random.default_rng(seed).choice(len(strings), size=max_candidates, replace=False)
        strings = [strings[index] for index in sorted(picked.tolist())]
    chrf = CHRF(word_order=2)
    ranked = _ConstantRanking(chrf, chosen_on).best(strings, _EXACT_CANDIDATES)
    statistics = [ChrfPlusPlus().statistics([text] * len(chosen_on), chosen_on) for text in ranked]
    values = [found.value() for found in statistics if found is not None]
    text = ranked[int(np.argmax(values))]
    return BestConstant(text, _chrf([text] * len(references_test), references_test, resamples, seed))


class _ConstantRanking:
    """Corpus chrF++ of one string against all references, in time linear in the string.

    The matches of an n-gram that the string has c times are `sum_r min(c, count_r)` over references r. That
    is a function of the n-gram and c alone, so it is tabulated once.
    """

    def __init__(self, chrf: CHRF, references: References) -> None:
        self._chrf = chrf
        texts = [text for group in references for text in group]
        self._totals = [0] * chrf.order  # reference n-grams per order
        # References that have n-grams of the order: only against those does sacrebleu count the hypothesis'
        # n-grams.
        self._scored = [0] * chrf.order
        # n-gram -> in how many references it occurs at least once, twice, ...
        self._at_least: list[defaultdict[str, list[int]]] = [defaultdict(list) for _ in range(chrf.order)]
        for text in texts:
            for order, counts in enumerate(self._ngrams(text)):
                self._totals[order] += counts.total()
                self._scored[order] += bool(counts)
                for ngram, count in counts.items():
                    table = self._at_least[order][ngram]
                    table.extend([0] * (count - len(table)))
                    for times in range(count):
                        table[times] += 1

    def best(self, strings: Sequence[str], count: int) -> list[str]:
        """The `count` strings with the highest score, best first; ties in the given order."""
        return sorted(strings, key=self._score, reverse=True)[:count]

    def _ngrams(self, text: str) -> Sequence[Counter[str]]:
        # What sacrebleu itself counts, so that the ranking cannot drift from the metric.
        return self._chrf._extract_reference_info([self._chrf._preprocess_segment(text)])["ref_ngrams"][0]

    def _score(self, text: str) -> float:
        statistics: list[int] = []
        for order, counts in enumerate(self._ngrams(text)):
            table = self._at_least[order]
            matched = sum(sum(table[ngram][:count]) for ngram, count in counts.items() if ngram in table)
            statistics += [sum(counts.values()) * self._scored[order], self._totals[order], matched]
        return self._chrf._compute_f_score(statistics)
