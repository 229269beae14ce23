"""Finding the file of one language and split among a user's data."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from enc2gen.corpora.languages import base_language, normalise_language
from enc2gen.corpora.readers import known_extension, source_files
from enc2gen.errors import DataError, LanguageError

_SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.{}-]+)?")


def language_file(path: str | Path, language: str, split: str) -> Path | None:
    """The file of `language` and `split` below `path`, or None if `path` names a data set on the Hub.

    Args:
        path: a file; a file name with `{language}` and `{split}`; a folder with `<language>/<split>.*` or, of a
            single language, `<split>.*`; a name on the Hub (`owner/name` that is no path here, or `hub:...`).
        split: "train", "dev" (also found as validation, valid, val) or "test".

    Raises:
        DataError: nothing there; the message names the nearest languages.
    """
    text = str(path)
    if text.startswith("hub:"):
        return None
    places = [Path(text.replace("{language}", language).replace("{split}", name)) for name in _SPLIT_NAMES[split]]
    place = next((found for found in places if found.exists()), places[0])
    if not place.exists():
        if _HUB_NAME.fullmatch(text) and not known_extension(place):
            return None
        raise _missing(path, language, place, split)
    return _split_file(place, language, split) if place.is_dir() else place


def is_pattern(path: str | Path) -> bool:
    """Whether `path` stands for several files, by `{language}` or `{split}` in it."""
    return "{language}" in str(path) or "{split}" in str(path)


def languages_in(path: str | Path) -> list[str]:
    """Names of the languages in a folder: its subfolders, or what stands for `{language}` in file names."""
    text = str(path)
    if "{language}" not in text:
        return sorted(p.name for p in Path(text).iterdir() if p.is_dir()) if Path(text).is_dir() else []
    before, after = text.replace("{split}", "*").split("{language}", 1)
    folder, prefix = Path(before + "x").parent, Path(before + "x").name[:-1]
    head, *below = after.split("/", 1)
    found = [p for p in folder.glob(f"{prefix}*{head}") if not below or any(p.glob(below[0]))]
    pattern = re.compile(re.escape(prefix) + "(.+?)" + re.escape(head).replace(r"\*", ".*"))
    return sorted({match[1] for p in found if (match := pattern.fullmatch(p.name))})


def own_splits(path: str | Path | None, language: str) -> set[str]:
    """The splits of a language that have a file of their own; on the Hub all of them, and "train" of a single file."""
    found: dict[str, Path | None] = {}
    for split in _SPLIT_NAMES:
        try:
            found[split] = None if path is None else language_file(path, language, split)
        except DataError:
            continue
    shared = found.get("train") is not None and len(set(found.values())) == 1 and len(found) > 1
    return {"train"} if shared else set(found)


def near_languages(language: str, names: Iterable[str]) -> str:
    """ "did you mean ...? " for names of the same language or of similar spelling; "" if there is none."""
    names = list(names)
    base = _base(language)
    near = [name for name in names if base is not None and _base(name) == base]
    near = near or difflib.get_close_matches(language, names, n=3)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


def hub_source(name: str, config: str | None, places: Mapping[str, str]) -> str:
    """What `read_records` calls a data set on the Hub; a configuration in `name` itself goes first."""
    return filled(f"hub:{name}" if config is None or ":" in name else f"hub:{name}:{config}", places)


def filled(name: str, places: Mapping[str, str]) -> str:
    """`name` with the values of `places` for {language} and {split}; other braces are the name's own."""
    for place, value in places.items():
        name = name.replace(f"{{{place}}}", value)
    return name


def _base(language: str) -> str | None:
    try:
        return base_language(normalise_language(language))
    except LanguageError:
        return None


def _split_file(folder: Path, language: str, split: str) -> Path:
    inner = folder / language if (folder / language).is_dir() else folder
    files = source_files(inner)
    for name in _SPLIT_NAMES[split]:
        for file in files:
            if file.parent == inner and file.name.split(".")[0] == name:
                return file
    if inner == folder and any(p.is_dir() for p in folder.iterdir()):
        raise _missing(folder, language, folder / language, split)
    raise DataError(
        f"no file of split {split!r}",
        where=str(inner),
        remedy=f"files there: {', '.join(file.name for file in files)}; wanted: {split}.tsv, .csv or .jsonl",
    )


def _missing(path: str | Path, language: str, place: Path, split: str) -> DataError:
    names = languages_in(path)
    if language in names:
        wanted = " or ".join(_SPLIT_NAMES[split])
        return DataError(
            f"no file of split {split!r} of language {language!r}",
            where=str(place),
            remedy=f"in its name, {{split}} stands for {wanted}" if "{split}" in str(path) else f"wanted: {wanted}",
        )
    remedy = f"{near_languages(language, names)}available: {', '.join(names)}" if names else "check the path"
    return DataError(
        f"no data of language {language!r}" if names else "no such file or folder", where=str(place), remedy=remedy
    )
