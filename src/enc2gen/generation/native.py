"""Which search of the engine writes what is asked for, and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.engine.beam import BeamSettings, Hypothesis
from enc2gen.generation.engine.engine import (
    Engine,
    beam_settings,
    chosen_precision,
    compiles,
    sampling_settings,
)
from enc2gen.generation.engine.linear import Precision
from enc2gen.generation.engine.sampling import SamplingSettings
from enc2gen.generation.glossary import Terms
from enc2gen.generation.shortlist import Shortlist
from enc2gen.generation.term_rules import TermRules


@dataclass(frozen=True)
class Source:
    """One source and what its outputs are held to.

    Attributes:
        ids: tokens that the encoder reads.
        seed: numbers that its samples depend on.
        terms: that its outputs must and must not contain.
    """

    ids: Sequence[int]
    seed: tuple[int, ...]
    terms: Terms = field(default_factory=Terms)


class NativeWriter:
    """Writes with the engines of one model, made when they are first needed.

    Args:
        model: a grown model, in evaluation mode.
        tokenizer: of the model.
        shortlist: tokens to be written, by language; all by default.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shortlist: Shortlist | None = None
    ) -> None:
        self._model, self._shortlist = cast(Any, model), shortlist
        self._engines: dict[tuple[Precision, str | None, bool], Engine] = {}
        self.term_rules = TermRules(tokenizer, shortlist)

    def engine(self, precision: Precision, language: str | None = None, *, compiles: bool = False) -> Engine:
        """The engine for one precision, and for the shortlist of one language; made once, from the weights then."""
        key = (precision, language, compiles)
        if key not in self._engines:
            if language is None or self._shortlist is None:
                self._engines[key] = Engine(self._model, precision, compiles=compiles)
            else:
                tokens = torch.tensor(self._shortlist.of(language))
                self._engines[key] = self.engine(precision, compiles=compiles).limited_to(tokens, self._model)
        return self._engines[key]

    def write(
        self,
        sources: Sequence[Source],
        padded: tuple[Tensor, Tensor],
        language: str,
        start: int,
        config: DecodingConfig,
        *,
        samples: int = 1,
        scored: bool = False,
    ) -> list[list[Hypothesis]]:
        """Hypotheses of each source: of a beam search the best first, of sampling in the order of drawing.

        Args:
            padded: ids and mask of the sources, `[B, S]` each.
            language: to write; start: its token, which outputs start from.
            samples: of each source, where outputs are drawn.
            scored: whether greedy search tells log-probabilities, too.

        Raises:
            ConfigError, DataError: as of `TermRules.check`.
        """
        device = self._model.device
        written = language if self._shortlist else None
        engine = self.engine(chosen_precision(config, device), written, compiles=compiles(config, device))
        starts = torch.full((len(sources),), start, device=device)
        self.term_rules.check((source.terms for source in sources), language, config)
        rules = self.term_rules.forbidding([source.terms for source in sources])
        longest = engine.decoder.longest
        if config.samples or config.num_beams == 1:
            settings = sampling_settings(self._model, config, longest, samples=samples)
            settings = replace(settings, own_rules=rules, scored=scored)
            return self._without_beams(engine, sources, padded, starts, settings, config)
        search = replace(beam_settings(self._model, config, longest), own_rules=rules)
        return self._with_beams(engine, sources, padded, starts, search, config, language)

    def _without_beams(
        self,
        engine: Engine,
        sources: Sequence[Source],
        padded: tuple[Tensor, Tensor],
        starts: Tensor,
        settings: SamplingSettings,
        config: DecodingConfig,
    ) -> list[list[Hypothesis]]:
        if config.draft_tokens:
            texts = [source.ids for source in sources]
            return engine.draft(*padded, starts, settings, texts, draft_tokens=config.draft_tokens)
        return engine.sample(*padded, starts, settings, [source.seed for source in sources])

    def _with_beams(
        self,
        engine: Engine,
        sources: Sequence[Source],
        padded: tuple[Tensor, Tensor],
        starts: Tensor,
        settings: BeamSettings,
        config: DecodingConfig,
        language: str,
    ) -> list[list[Hypothesis]]:
        if any(source.terms.required for source in sources):
            requirements = [self.term_rules.requirements(source.terms, language) for source in sources]
            return engine.search_with(*padded, starts, settings, requirements)
        if config.beam_groups > 1:
            groups, penalty = config.beam_groups, config.diversity_penalty
            return engine.search_diverse(*padded, starts, settings, groups=groups, penalty=penalty)
        return engine.search(*padded, starts, settings)
