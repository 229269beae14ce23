"""The built-in corpus: (English, target) strings out of the catalogues of installed, widely used packages.

Nothing of the text is part of enc2gen, and nothing is cached: Babel's CLDR names, pycountry's translations of
ISO names and Django's interface messages are read where pip put them, each time.
"""

from __future__ import annotations

import hashlib
import html
import importlib
import importlib.metadata
import importlib.util
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import langcodes
import polib
from langcodes.tag_parser import LanguageTagError

from enc2gen.corpora.catalogues import catalogue_entries
from enc2gen.corpora.languages import (
    PLACEHOLDER,
    base_language,
    default_script,
    dominant_script,
    language_name,
    natural_text,
    normalise_languages,
    script_matches,
)
from enc2gen.errors import ConfigError, DataError

Split = Literal["train", "dev", "test"]

SOURCE_LANGUAGE = "en"
MIN_PAIRS = 200  # our choice: fewer strings than this train nothing that can be measured
MAX_PER_ORIGIN = 2000  # our choice: keeps 7,000 transliterated language names (ta, lo) from drowning the rest

# CLDR sections of names and phrases; the others hold number and date patterns.
_PACKAGES = {"babel": "Babel", "pycountry": "pycountry", "django": "Django"}
"""Module -> package."""

_BABEL_SECTIONS = (
    "territories", "languages", "scripts", "variants", "currency_names", "currency_names_plural", "months",
    "days", "quarters", "eras", "day_periods", "date_fields", "unit_display_names", "unit_patterns",
    "compound_unit_patterns", "time_zones", "meta_zones", "zone_formats", "measurement_systems",
    "list_patterns",
)  # fmt: skip

_ABBREVIATED = frozenset({"abbreviated", "narrow", "short"})
_LOCALE_MODIFIERS = {
    "latin": "Latn",
    "iqtelif": "Latn",
    "cyrillic": "Cyrl",
    "arabic": "Arab",
    "devanagari": "Deva",
}
# Soft hyphen and bidirectional controls are layout; joiners (ZWJ, ZWNJ) are spelling in Sinhala and Persian
# and stay.
_LAYOUT_CONTROLS = dict.fromkeys([0x00AD, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])


@dataclass(frozen=True)
class Pair:
    """One translated string. `origin` says where it was read: "babel/territories", "django/admin"."""

    source: str
    target: str
    source_language: str
    target_language: str
    origin: str


def localisation_pairs(languages: Sequence[str], *, max_per_origin: int = MAX_PER_ORIGIN) -> list[Pair]:
    """Collect the translated strings of installed packages for each language.

    Pairs are unique in (source, target, target language) and sorted, so two calls give the same list. Left
    out: untranslated strings (target = source), targets in another script than the language's, and targets
    that lose or invent a placeholder. A source may have several targets: see :func:`group_references`.

    Args:
        languages: BCP 47 tags of the target languages, normalised here.
        max_per_origin: at most so many pairs per language and origin, chosen by a hash of the source, so that
            every language keeps the same sources.

    Raises:
        LanguageError: an unknown tag.
        DataError: a package is missing, or a language has fewer than 200 pairs.
        ConfigError: no language, or `max_per_origin` below 1.
    """
    if not languages:
        raise ConfigError("no language given", where="builtin:localisation", remedy="name at least one, for example kk")
    if max_per_origin < 1:
        raise ConfigError(f"max_per_origin is {max_per_origin}", where="builtin:localisation", remedy="use at least 1")
    roots = _package_roots()
    # A cap below the minimum is the caller's wish, not a lack of data.
    needed = min(MIN_PAIRS, max_per_origin)
    pairs: list[Pair] = []
    for language in normalise_languages(languages, where="builtin:localisation"):
        found = _pairs_of(language, roots, max_per_origin)
        if len(found) < needed:
            raise DataError(
                f"only {len(found)} strings in {language_name(language)} ({language}), {needed} are needed",
                where="builtin:localisation",
                remedy="train on your own files, or choose a language that several packages translate: "
                + ", ".join(available_languages()),
            )
        pairs.extend(found)
    return sorted(pairs, key=lambda pair: (pair.target_language, pair.source, pair.target))


def group_references(pairs: Iterable[Pair]) -> dict[tuple[str, str], tuple[str, ...]]:
    """Map (target language, source) to all its targets, sorted: the references of a translation."""
    groups: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for pair in pairs:
        groups[pair.target_language, pair.source].add(pair.target)
    return {key: tuple(sorted(targets)) for key, targets in groups.items()}


def localisation_records(
    languages: Sequence[str], *, split: str = "train", max_per_origin: int = MAX_PER_ORIGIN
) -> Iterator[dict[str, Any]]:
    """Yield the records of one split: a pair's fields, and `references`, all targets of the same source.

    "train" has one record per pair; "dev" and "test" have one per source, so that no source counts twice in a
    score.
    """
    if split not in ("train", "dev", "test", "all"):
        raise ConfigError(
            f"unknown split {split!r}",
            where="builtin:localisation",
            remedy="available: train, dev, test, all",
        )
    pairs = localisation_pairs(languages, max_per_origin=max_per_origin)
    references = group_references(pairs)
    seen: set[tuple[str, str]] = set()
    for pair in pairs:
        key = (pair.target_language, pair.source)
        if split != "all" and (split_of(pair.source) != split or (split != "train" and key in seen)):
            continue
        seen.add(key)
        yield {**vars(pair), "references": list(references[key])}


def split_key(source: str) -> str:
    """Return what near-duplicates of an English string share.

    Lower-cased letters only: "Delete", "delete?" and "Delete 2" are the same, and so are singular and plural
    ("{0} minute", "{0} minutes", "Minutes"), which many languages translate alike. Strings without letters
    stay as they are.
    """
    lowered = unicodedata.normalize("NFKD", PLACEHOLDER.sub(" ", source).lower())
    words = ["".join(filter(str.isalpha, word)) for word in lowered.split()]
    # Regular English plurals: minute/minutes -> minut, inch/inches -> inch, century/centuries -> centuri.
    stems = [re.sub("y$", "i", re.sub("(?:es|s|e)$", "", word)) if len(word) > 3 else word for word in words]
    return "".join(stems) or source.lower()


def split_of(source: str, *, dev_percent: int = 5, test_percent: int = 5) -> Split:
    """Return the split of an English string: a pure function of its :func:`split_key`, for all languages
    alike.

    So no test source, nor its near-duplicate, is in training in any language.

    Raises:
        ConfigError: the percentages are negative or leave nothing to train on.
    """
    if dev_percent < 0 or test_percent < 0 or dev_percent + test_percent >= 100:
        raise ConfigError(
            f"dev_percent={dev_percent} and test_percent={test_percent} leave no training data",
            remedy="use percentages of at least 0 that sum to less than 100",
        )
    bucket = _hash(split_key(source)) % 100
    if bucket < test_percent:
        return "test"
    return "dev" if bucket < test_percent + dev_percent else "train"


def available_languages() -> list[str]:
    """Return the languages that at least two of the packages have catalogues for, as sorted BCP 47 tags."""
    roots = _package_roots()
    names = [
        _babel().locale_identifiers(),
        _folders(roots["pycountry"] / "locales"),
        _folders(roots["django"] / "conf" / "locale"),
    ]
    counts = Counter(tag for package in names for tag in {_language_and_script(name) for name in package})
    return sorted(tag for tag, count in counts.items() if count > 1 and tag not in ("", SOURCE_LANGUAGE))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


BUILTIN_LICENCE = (
    "texts of installed packages: Unicode CLDR in Babel (Unicode License v3), names of ISO standards in pycountry "
    "(LGPL-2.1), messages of Django (BSD 3-Clause)"
)
"""Of the texts, for model cards."""


def package_versions() -> dict[str, str]:
    """Versions of the packages that hold the texts; those that are not installed are left out."""
    installed = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is not None]
    return {package: importlib.metadata.version(package) for package in installed}


def _package_roots() -> dict[str, Path]:
    """Return the folders of the packages that hold catalogues, without importing them."""
    roots = {}
    for module, package in _PACKAGES.items():
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise DataError(
                f"the package {package} is not installed",
                where="builtin:localisation",
                remedy='pip install "enc2gen[demo]"',
            )
        roots[module] = Path(spec.origin).parent
    return roots


def _pairs_of(language: str, roots: Mapping[str, Path], max_per_origin: int) -> list[Pair]:
    by_origin: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
    script = default_script(language)
    for read in (_babel_strings, _pycountry_strings, _django_strings):
        for origin, source, target in read(language, roots):
            source, target = _clean(source), _clean(target)
            if _is_translation(source, target, script):
                by_origin[origin].add((source, target))
    unique: dict[tuple[str, str], Pair] = {}
    for origin in sorted(by_origin):
        chosen = sorted(by_origin[origin], key=lambda pair: (_hash(pair[0]), pair))[:max_per_origin]
        for source, target in chosen:
            unique.setdefault((source, target), Pair(source, target, SOURCE_LANGUAGE, language, origin))
    return list(unique.values())


def _clean(text: str) -> str:
    """Normalise to NFC, decode HTML entities, drop layout controls, collapse white space."""
    text = html.unescape(text).translate(_LAYOUT_CONTROLS)
    return " ".join(unicodedata.normalize("NFC", text).split())


def _is_translation(source: str, target: str, script: str) -> bool:
    if source == target or dominant_script(natural_text(source)) is None:
        return False
    if Counter(PLACEHOLDER.findall(source)) != Counter(PLACEHOLDER.findall(target)):
        return False
    return script_matches(dominant_script(natural_text(target)), script)


def _babel() -> Any:
    return importlib.import_module("babel.localedata")


def _babel_strings(language: str, roots: Mapping[str, Path]) -> Iterator[tuple[str, str, str]]:
    localedata = _babel()
    name = _best_name(language, localedata.locale_identifiers())
    if name is None:
        return
    english = localedata.LocaleDataDict(localedata.load("en"))
    local = localedata.LocaleDataDict(localedata.load(name))
    for section in _BABEL_SECTIONS:
        sources = dict(_leaves(english.get(section, {})))
        for path, target in _leaves(local.get(section, {})):
            source = sources.get(path)
            if source is None and section == "time_zones" and path[-1] == "city":
                # CLDR (UTS 35, "Using time zone names"): the city of a zone without a name is the last part
                # of its id.
                source = str(path[0]).rsplit("/", 1)[-1].replace("_", " ")
            if source:
                yield f"babel/{section}", source, target


def _leaves(tree: Any, path: tuple[object, ...] = ()) -> Iterator[tuple[tuple[object, ...], str]]:
    """Yield (path, text) of each string, but no abbreviations: "S" is Saturday, September and siemens."""
    for key, value in tree.items():
        if isinstance(value, str):
            yield (*path, key), value
        elif hasattr(value, "items") and key not in _ABBREVIATED:
            yield from _leaves(value, (*path, key))


def _pycountry_strings(language: str, roots: Mapping[str, Path]) -> Iterator[tuple[str, str, str]]:
    folder = roots["pycountry"] / "locales"
    name = _best_name(language, _folders(folder))
    if name is not None:
        for path in sorted((folder / name / "LC_MESSAGES").glob("*.mo")):
            yield from _gettext_strings(path, f"pycountry/{path.stem}")


def _django_strings(language: str, roots: Mapping[str, Path]) -> Iterator[tuple[str, str, str]]:
    root = roots["django"]
    for folder in sorted([root / "conf" / "locale", *root.glob("contrib/*/locale")]):
        name = _best_name(language, _folders(folder))
        if name is not None:
            for path in sorted((folder / name / "LC_MESSAGES").glob("*.mo")):
                yield from _gettext_strings(path, f"django/{folder.parent.name}")


def _gettext_strings(path: Path, origin: str) -> Iterator[tuple[str, str, str]]:
    try:
        catalogue = polib.mofile(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the catalogue cannot be read: {error}",
            where=str(path),
            remedy='reinstall: pip install "enc2gen[demo]"',
        ) from error
    for entry in catalogue_entries(catalogue, catalogue.metadata.get("Plural-Forms", "")):
        yield origin, entry.source, entry.target


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if (path / "LC_MESSAGES").is_dir())


def _as_tag(name: str) -> str | None:
    """Return the BCP 47 tag of a catalogue's name: "zh_CN" -> "zh-CN", "sr@latin" -> "sr-Latn"."""
    locale, _, modifier = name.partition("@")
    tag = locale.replace("_", "-")
    if modifier:
        if modifier not in _LOCALE_MODIFIERS:
            return None
        tag = f"{tag}-{_LOCALE_MODIFIERS[modifier]}"
    try:
        return langcodes.standardize_tag(tag)
    except LanguageTagError:
        return None


def _language_and_script(name: str) -> str:
    tag = _as_tag(name)
    if tag is None:
        return ""
    language = langcodes.Language.get(tag).language or ""
    script = default_script(tag)
    return language if script == default_script(language) else f"{language}-{script}"


def _best_name(language: str, names: Iterable[str]) -> str | None:
    """Return the catalogue for `language`: same language and script, if possible same tag or territory."""
    wanted = langcodes.Language.get(language).maximize()
    base, script = base_language(language), default_script(language)
    ranked = []
    for name in names:
        tag = _as_tag(name) if name[:1] == base[:1] or base == "no" else None
        if tag is None or base_language(tag) != base or default_script(tag) != script:
            continue
        territory = langcodes.Language.get(tag).maximize().territory
        ranked.append((tag != language, territory != wanted.territory, len(name), name))
    return min(ranked)[-1] if ranked else None
