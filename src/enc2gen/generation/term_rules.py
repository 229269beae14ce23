"""What the terms of sources come to in tokens: phrases that outputs contain, and rules against what they must not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from enc2gen.errors import ConfigError
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.engine.candidates import Rule
from enc2gen.generation.engine.constraints import Phrase, Requirements
from enc2gen.generation.glossary import Terms
from enc2gen.generation.shortlist import Shortlist
from enc2gen.generation.spelling import Spelling


class TermRules:
    """The terms of sources in the tokens of one model.

    Args:
        tokenizer: of the model.
        shortlist: tokens to be written, by language; all by default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shortlist: Shortlist | None = None) -> None:
        self._tokenizer, self._shortlist = tokenizer, shortlist
        self._spelling: Spelling | None = None
        self._phrases: dict[tuple[str, str], Phrase] = {}
        self._tokens: dict[str, frozenset[int]] = {}

    @property
    def spelling(self) -> Spelling:
        """The tokens as text; read once."""
        self._spelling = self._spelling or Spelling(self._tokenizer)
        return self._spelling

    def check(self, sources: Iterable[Terms], language: str, config: DecodingConfig) -> None:
        """Say before anything is written what would stop it at one of the sources.

        Args:
            sources: what the outputs of each are held to.
            language: to write.

        Raises:
            ConfigError: there are required terms, and `config` searches in a way that does without them.
            DataError: a required term cannot be spelled by the vocabulary or the shortlist.
        """
        for terms in sources:
            for term in terms.required:
                _check_search(term, config)
                self._phrase(term, language)

    def requirements(self, terms: Terms, language: str) -> Requirements:
        """The phrases that an output with these terms contains.

        Phrases that cannot be written without a forbidden term are left out: nothing that is searched would meet them.

        Raises:
            DataError: a term cannot be spelled by the vocabulary or the shortlist.
        """
        phrases: list[Phrase | None] = [self._phrase(term, language) for term in terms.required]
        if terms.forbidden and phrases:
            rule = self.spelling.never(terms.forbidden)
            phrases = [self.spelling.phrase_beside(phrase, rule) for phrase in phrases if phrase]
        return Requirements([phrase for phrase in phrases if phrase])

    def forbidding(self, sources: Sequence[Terms]) -> list[list[Rule]]:
        """For each source, the rule against its forbidden terms; empty where no source has any."""
        made = {terms: [self.spelling.never(terms)] for terms in {one.forbidden for one in sources} if terms}
        return [made.get(one.forbidden, []) for one in sources] if made else []

    def unmet(self, terms: Sequence[str], tokens: Sequence[int], text: str) -> tuple[str, ...]:
        """Terms that are neither among the tokens of an output nor in its text."""
        missing = [term for term in terms if term not in text]
        return tuple(term for term in missing if Requirements([self.spelling.phrase(term)]).of(tokens) != (None,))

    def _phrase(self, term: str, language: str) -> Phrase:
        """The phrase of `term`; kept, because sources share terms."""
        key = term, language
        if key not in self._phrases:
            if self._shortlist is not None and language not in self._tokens:
                self._tokens[language] = frozenset(self._shortlist.of(language))
            self._phrases[key] = self.spelling.phrase(term, self._tokens.get(language))
        return self._phrases[key]


def _check_search(term: str, config: DecodingConfig) -> None:
    if config.samples or config.num_beams == 1:
        raise ConfigError(
            f"the glossary requires {term!r}, for which outputs are searched with beams",
            where="glossary",
            remedy="give num_beams 4 or more and do not sample, or keep to forbidden terms",
        )
    if config.coverage_penalty or config.beam_groups > 1:
        raise ConfigError(
            "required terms are searched without coverage_penalty and beam_groups",
            where="glossary",
            remedy="leave them out, or take the required terms out of the glossary",
        )
