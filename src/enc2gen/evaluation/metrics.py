"""The metrics, by name: each turns texts into a :class:`Score` with an interval and a signature.

`METRICS.get("chrf++").score(hypotheses, references, language="kk")`; metrics with options are classes to
construct, such as `Bleu(tokenizer="intl")`. References are given per sentence: `references[i]` lists those of
sentence i.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from enc2gen.corpora.language_id import LANGUAGE_IDENTIFIERS, LanguageIdentifier, matches
from enc2gen.corpora.languages import base_language, default_script, dominant_script
from enc2gen.errors import ConfigError, DataError
from enc2gen.evaluation.rouge import RougeVariant, overlap, rouge_units
from enc2gen.evaluation.segmentation import HAN_SCRIPTS, UNSPACED_SCRIPTS, normalise_text, segment
from enc2gen.evaluation.significance import (
    CONFIDENCE,
    RESAMPLES,
    Floats,
    Score,
    Statistics,
    bootstrap_interval,
    mean_statistics,
)
from enc2gen.registry import Registry

References = Sequence[Sequence[str]]

# Sacrebleu tokenizers that split at spaces and punctuation only: a sentence is one word without spaces.
_WORD_TOKENIZERS = frozenset({"13a", "intl", "none"})


class Metric(ABC):
    """A corpus metric on the scale 0-100.

    Attributes:
        name: what it is registered as.
        higher_is_better: False for rates of errors.
    """

    name: str
    higher_is_better: ClassVar[bool] = True
    needs_references: ClassVar[bool] = True

    def statistics(
        self, hypotheses: Sequence[str], references: References | None = None, *, language: str | None = None
    ) -> Statistics | None:
        """Additive statistics of every sentence; values, intervals and comparisons need no more than these.

        Args:
            hypotheses: one text per sentence; empty ones are allowed.
            references: per sentence, one or more reference texts.
            language: BCP 47 tag of the language the hypotheses should be in.

        Returns:
            The statistics, or None if the metric cannot be measured for `language`.

        Raises:
            DataError: no sentence, a sentence without reference, unequal lengths, or something that is not
                text.
            ConfigError: an option does not fit the language.
        """
        check_texts(hypotheses, references if self.needs_references else None, needed=self.needs_references)
        return self._statistics(hypotheses, references or (), language)

    def score(
        self,
        hypotheses: Sequence[str],
        references: References | None = None,
        *,
        language: str | None = None,
        resamples: int = RESAMPLES,
        confidence: float = CONFIDENCE,
        seed: int = 0,
    ) -> Score | None:
        """The corpus score with its bootstrap interval; arguments and errors as in :meth:`statistics`.

        Returns:
            The score, or None (never NaN) if the metric cannot be measured for `language`.
        """
        statistics = self.statistics(hypotheses, references, language=language)
        if statistics is None:
            return None
        low, high = bootstrap_interval(statistics, resamples=resamples, confidence=confidence, seed=seed)
        # Where sacrebleu's own signatures put it: right after the number of references.
        first, _, rest = statistics.signature.partition("|")
        signature = f"{first}|bs:{resamples}|seed:{seed}|{rest}"
        return Score(self.name, statistics.value(), low, high, len(statistics), signature, confidence)

    @abstractmethod
    def _statistics(
        self, hypotheses: Sequence[str], references: References, language: str | None
    ) -> Statistics | None: ...


def check_texts(hypotheses: Sequence[str], references: References | None, *, needed: bool = True) -> None:
    """Raise `DataError` unless these are texts, each with at least one reference if those are `needed`."""
    if isinstance(hypotheses, str) or not hypotheses:
        raise DataError("there is no hypothesis to score", remedy="give a non-empty list of strings")
    for index, hypothesis in enumerate(hypotheses):
        if not isinstance(hypothesis, str):
            raise DataError(f"hypothesis is {hypothesis!r}, not text", where=f"sentence {index}")
    if not needed:
        return
    if references is None or len(references) != len(hypotheses):
        found = "no" if references is None else len(references)
        raise DataError(
            f"there are {len(hypotheses)} hypotheses and {found} lists of references",
            remedy="give one list of references per hypothesis, in the same order",
        )
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"references are {texts!r}, not a non-empty list of strings",
                where=f"sentence {index}",
                remedy="wrap a single reference in a list",
            )


def _own_signature(references: References, **settings: str) -> str:
    from enc2gen import __version__

    counts = {len(texts) for texts in references}
    nrefs = str(counts.pop()) if len(counts) == 1 else ("var" if counts else "0")
    fields = {"nrefs": nrefs, **settings, "version": f"enc2gen-{__version__}"}
    return "|".join(f"{key}:{value}" for key, value in fields.items())


def _sacrebleu_statistics(metric: Any, hypotheses: Sequence[str], references: References) -> Statistics:
    """Statistics of a sacrebleu metric, through the two methods that its own significance tests use."""
    # sacrebleu wants one list per reference position, None where a sentence has fewer.
    streams = list(zip_longest(*references))
    rows = np.asarray(metric._extract_corpus_statistics(hypotheses, streams), dtype=np.float64)

    def aggregate(sums: Floats) -> Floats:
        # Counts are exact in float64, so these are the integers that sacrebleu's corpus_score would sum.
        counts = sums.astype(np.int64).tolist()
        return np.asarray([metric._compute_score_from_stats(row).score for row in counts])

    return Statistics(rows, aggregate, str(metric.get_signature()))


class Bleu(Metric):
    """Corpus BLEU (Papineni et al. 2002), exactly as sacrebleu computes it.

    Args:
        tokenizer: a sacrebleu tokenizer, or None to choose by language: "zh" for Chinese, "char" for every
            other script without word spaces (Japanese, Thai, Lao, Khmer, Burmese, Tibetan, ...), "13a"
            elsewhere. Without a language, the script of the references decides.
    """

    name = "bleu"

    def __init__(self, tokenizer: str | None = None) -> None:
        if tokenizer is not None and tokenizer not in BLEU.TOKENIZERS:
            raise ConfigError(
                f"unknown BLEU tokenizer {tokenizer!r}",
                remedy=f"available: {', '.join(sorted(BLEU.TOKENIZERS))}",
            )
        self.tokenizer = tokenizer

    def _statistics(self, hypotheses: Sequence[str], references: References, language: str | None) -> Statistics:
        name = bleu_tokenizer(language, references, self.tokenizer)
        try:
            metric = BLEU(tokenize=name, force=True)
        except (ImportError, RuntimeError, OSError) as error:  # a missing package or model file
            raise ConfigError(
                f"BLEU tokenizer {name!r} cannot be loaded: {error}",
                remedy="install what it needs, or use 'char', which needs nothing",
            ) from error
        return _sacrebleu_statistics(metric, hypotheses, references)


def bleu_tokenizer(language: str | None, references: References, requested: str | None = None) -> str:
    """The sacrebleu tokenizer for a language and references: `requested`, or as :class:`Bleu` says.

    Raises:
        ConfigError: `requested` does not fit. "13a" takes a Tibetan sentence for one word: one wrong syllable
            makes the score 0 where "char" gives over 90.
    """
    written = dominant_script(" ".join(text for texts in references for text in texts))
    script = default_script(language) if language else written
    if requested is None:
        if script in HAN_SCRIPTS:
            return "zh"
        return "char" if {script, written} & UNSPACED_SCRIPTS else "13a"
    fits = requested not in _WORD_TOKENIZERS or not {script, written} & UNSPACED_SCRIPTS
    if requested == "zh":
        fits = script in HAN_SCRIPTS
    elif requested in {"ja-mecab", "ko-mecab"}:
        fits = language is None or base_language(language) == requested[:2]
    if not fits:
        raise ConfigError(
            f"BLEU tokenizer {requested!r} does not fit {language or written} text",
            remedy=f"use {bleu_tokenizer(language, references)!r}, or chrf++, which needs no tokenizer",
        )
    return requested


class ChrfPlusPlus(Metric):
    """Corpus chrF++ (Popović 2017, W17-4770: character order 6, word order 2, beta 2), as in sacrebleu."""

    name = "chrf++"

    def _statistics(self, hypotheses: Sequence[str], references: References, language: str | None) -> Statistics:
        return _sacrebleu_statistics(CHRF(word_order=2), hypotheses, references)


class _SentenceMean(Metric):
    """A mean over sentences of the best value over references."""

    def _statistics(self, hypotheses: Sequence[str], references: References, language: str | None) -> Statistics:
        values = [
            max(self._value(hypothesis, reference, language) for reference in texts)
            for hypothesis, texts in zip(hypotheses, references, strict=True)
        ]
        settings = {"case": "fold", "seg": "script", **({"lang": language} if language else {})}
        return mean_statistics(np.asarray(values), _own_signature(references, **settings))

    @abstractmethod
    def _value(self, hypothesis: str, reference: str, language: str | None) -> float: ...


class Rouge(_SentenceMean):
    """ROUGE F1 (Lin 2004), mean over sentences; :mod:`enc2gen.evaluation.rouge` has precision and recall."""

    def __init__(self, variant: RougeVariant) -> None:
        self.name = variant
        self._variant = variant

    def _value(self, hypothesis: str, reference: str, language: str | None) -> float:
        return rouge_units(segment(hypothesis, language), segment(reference, language), self._variant).f1


class ExactMatch(_SentenceMean):
    """Share of hypotheses with the same units, in order, as a reference (SQuAD's exact match, script-aware).

    Case, punctuation and spacing do not count.

    Texts without any unit (only symbols) are compared character by character.
    """

    name = "exact-match"

    def _value(self, hypothesis: str, reference: str, language: str | None) -> float:
        found, wanted = segment(hypothesis, language), segment(reference, language)
        if not found and not wanted:
            return 100.0 * (normalise_text(hypothesis).strip() == normalise_text(reference).strip())
        return 100.0 * (found == wanted)


class TokenF1(_SentenceMean):
    """Token F1 (SQuAD, arXiv 1606.05250) on script-aware units; two empty texts agree."""

    name = "token-f1"

    def _value(self, hypothesis: str, reference: str, language: str | None) -> float:
        found, wanted = Counter(segment(hypothesis, language)), Counter(segment(reference, language))
        if not found and not wanted:
            return ExactMatch()._value(hypothesis, reference, language)
        return overlap((found & wanted).total(), found.total(), wanted.total()).f1


class OffTarget(Metric):
    """Share of hypotheses that are not in the requested language or its script.

    Empty hypotheses and those without a letter are off target. None where the identifier does not know the
    language.

    Args:
        identifier: tells the language of a text; None for the registered default, loaded on first use.
    """

    name = "off-target"
    higher_is_better = False
    needs_references = False
    _default: ClassVar[str] = "fasttext-lid176"

    def __init__(self, identifier: LanguageIdentifier | None = None) -> None:
        self._given = identifier
        self._identifier_name = self._default if identifier is None else type(identifier).__name__

    @cached_property
    def identifier(self) -> LanguageIdentifier:
        """The identifier in use."""
        return self._given if self._given is not None else LANGUAGE_IDENTIFIERS.get(self._default)()

    def _statistics(self, hypotheses: Sequence[str], references: References, language: str | None) -> Statistics | None:
        if language is None:
            raise ConfigError("off-target needs the requested language", remedy='pass language="kk", for example')
        if not self.identifier.supports(language):
            return None
        guesses = self.identifier.identify(hypotheses)
        values = [
            0.0 if hypothesis.strip() and matches(language, guess) else 100.0
            for hypothesis, guess in zip(hypotheses, guesses, strict=True)
        ]
        return mean_statistics(np.asarray(values), _own_signature((), lang=language, lid=self._identifier_name))


METRICS: Registry[Metric] = Registry("metric")
_DEFAULT_METRICS: tuple[Metric, ...] = (
    Bleu(),
    ChrfPlusPlus(),
    Rouge("rouge-1"),
    Rouge("rouge-2"),
    Rouge("rouge-l"),
    ExactMatch(),
    TokenF1(),
    OffTarget(),
)
for _metric in _DEFAULT_METRICS:
    METRICS.add(_metric.name, _metric)
