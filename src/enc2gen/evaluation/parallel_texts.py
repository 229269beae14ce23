"""Read the same sentences in many languages, from a folder or one file."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import langcodes

from enc2gen.corpora.languages import base_language, default_script, language_name, normalise_language
from enc2gen.corpora.readers import Record, known_extension, read_records, source_files
from enc2gen.errors import DataError, LanguageError

_REMEDY = (
    "give a folder with one folder or file per language (records with id and text), or one file whose records hold "
    "id, language and text, or src, src_lang, tgt and tgt_lang, or one field per language"
)
# Fields that hold something else, or the text, though their names are language tags: url is Urali, dev Domung.
_NO_LANGUAGES = {
    "id", "text", "url", "uri", "key", "set", "num", "tag", "dev", "doc", "src", "tgt", "row", "seg", "par", "pos",
    "sha", "ver", "lic", "sim", "iso", "dir", "len", "msg", "cnt", "age", "env", "ner", "dep", "lem", "mod", "all",
    "any", "std", "sum", "dup", "err", "raw", "ans", "alt", "aid", "bid", "cid", "did", "gid", "pid", "qid", "sid",
    "tid",
}  # fmt: skip
_Sentences = dict[str, dict[str, str]]  # language -> id -> text


def language_label(name: str) -> str:
    """ "kaz_Cyrl" -> "Kazakh", "zho_Hant" -> "Chinese (Traditional)"; a name that is no language tag stays."""
    try:
        tag = normalise_language(name)
    except LanguageError:
        return name
    label = language_name(tag)
    # "(individual language)" tells Swahili proper from its macro-language: noise on an axis.
    return label.replace(" (individual language)", "").removesuffix(f" ({_script_name(tag)})")


def _script_name(tag: str) -> str:
    script = default_script(tag)
    # Chinese is written in two scripts, so there the script is part of the name.
    return "" if script in {"Hans", "Hant"} else langcodes.Language.make(script=script).script_name()


@dataclass(frozen=True)
class ParallelTexts:
    """Sentences of several languages.

    Attributes:
        texts: language -> sentences; sentence i is the same in all languages. English is the first.
        english: the name of English in `texts`.
        available: how many sentences all the languages share, of which `texts` may be a sample.
    """

    texts: dict[str, list[str]]
    english: str
    available: int


def read_parallel_texts(
    source: str | Path,
    *,
    english: str | None = None,
    languages: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
) -> ParallelTexts:
    """Read the sentences that English and all wanted languages have.

    Args:
        source: a folder with a folder or a file per language (`sib200/kaz_Cyrl/test.jsonl.gz`, `udhr/kk.jsonl.gz`);
            records with the same `id` are the same sentence, and without ids the same line of the same file is. Or
            one file: records with id, language and text; with src, src_lang, tgt and tgt_lang; or with one field per
            language.
        english: the name of English there; None finds it.
        languages: the languages wanted besides English, as the source or BCP 47 names them; none for all.
        limit: a random sample of so many sentences.
        seed: of the sample.

    Raises:
        DataError: the source cannot be read, has no English, lacks a language, has one twice, gives one id two texts,
            or shares fewer than two sentences among the languages.
    """
    named = [*languages, *([english] if english is not None else [])]
    found = _read_folder(Path(source)) if Path(source).is_dir() else _read_file(source, named)
    where = str(source)
    pivot = _match(english, found, where) if english is not None else _find_english(found, where)
    wanted = [_match(name, found, where) for name in languages] or list(found)
    chosen = {name: found[name] for name in dict.fromkeys([pivot, *wanted])}
    if len(chosen) < 2:
        raise DataError(f"there is no language but {pivot}", where=where, remedy=_REMEDY)
    common = [key for key in chosen[pivot] if all(key in sentences for sentences in chosen.values())]
    if len(common) < 2:
        shared = {name: len(chosen[pivot].keys() & sentences.keys()) for name, sentences in chosen.items()}
        least = min(shared, key=lambda name: shared[name])
        raise DataError(
            f"English and all languages share {len(common)} sentences ({least} shares {shared[least]} with English)",
            where=where,
            remedy="leave languages out with --languages, or give each sentence the same id in every language",
        )
    keys = common if limit is None or limit >= len(common) else _sample(common, limit, seed)
    texts = {name: [sentences[key] for key in keys] for name, sentences in chosen.items()}
    return ParallelTexts(texts, pivot, len(common))


def _sample(keys: Sequence[str], limit: int, seed: int) -> list[str]:
    # Neighbours in such corpora are often of one document: a random sample is a fairer task than the first sentences.
    return random.Random(seed).sample(list(keys), limit)


def _read_folder(folder: Path) -> _Sentences:
    found: _Sentences = {}
    entries: dict[str, str] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or not (entry.is_dir() or known_extension(entry)):
            continue
        name = entry.name.split(".")[0]
        if not _is_language(name):
            continue
        if (other := entries.setdefault(name, entry.name)) != entry.name:
            raise DataError(
                f"{other} and {entry.name} are both named after language {name!r}",
                where=str(folder),
                remedy="keep one of them, or put both into one folder of that name",
            )
        found[name] = dict(_read_language(entry))
    if not found:
        raise DataError("the folder holds no folder or file named after a language", where=str(folder), remedy=_REMEDY)
    return found


def _read_language(entry: Path) -> Iterator[tuple[str, str]]:
    seen: dict[str, str] = {}
    for file in source_files(entry):
        place = file.relative_to(entry).as_posix() if entry.is_dir() else ""
        for number, record in enumerate(read_records(file), 1):
            key = str(record["id"]) if "id" in record else f"{place}:{number}"
            text = _text(record, "text", f"{file}, record {number}")
            if text and _is_new(seen, key, text, str(file)):
                yield key, text


def _read_file(source: str | Path, named: Sequence[str]) -> _Sentences:
    """Texts of one file; `named` are the languages that were asked for by name, if any."""
    found: _Sentences = {}
    for number, record in enumerate(read_records(source), 1):
        where = f"{source}, record {number}"
        key = str(record.get("id", number))
        for language, text in _languages_of(record, where, named):
            if text and _is_new(found.setdefault(language, {}), key, text, str(source)):
                found[language][key] = text
    return found


def _languages_of(record: Record, where: str, named: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(language, text) of each text of one record."""
    if "src_lang" in record and "tgt_lang" in record:
        yield str(record["src_lang"]), _text(record, "src", where)
        yield str(record["tgt_lang"]), _text(record, "tgt", where)
        return
    field = next((name for name in ("language", "lang") if name in record), None)
    if field is not None:
        if "id" not in record:
            raise DataError("no id says which sentence this is", where=where, remedy=_REMEDY)
        yield str(record[field]), _text(record, "text", where)
        return
    names = [name for name in record if name in named or (_is_language(name) and not _is_metadata(name))]
    if named:  # what else there is need not be text
        names = [name for name in names if name in named or isinstance(record[name], str | None)]
    if len(names) < 2:
        raise DataError(f"no texts of two languages in the fields {', '.join(record)}", where=where, remedy=_REMEDY)
    for name in names:
        yield name, _text(record, name, where)


def _text(record: Record, field: str, where: str) -> str:
    """The text of a field, "" where it is empty."""
    if field not in record:
        raise DataError(f"no field {field!r}; there are: {', '.join(record) or 'none'}", where=where, remedy=_REMEDY)
    value = record[field]
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"field {field!r} holds a {type(value).__name__}, not text",
            where=where,
            remedy=f"{_REMEDY}; where other fields are named like languages, give those that are with --languages",
        )
    return (value or "").strip()


def _is_new(seen: dict[str, str], key: str, text: str, where: str) -> bool:
    if (earlier := seen.setdefault(key, text)) != text:
        raise DataError(
            f"id {key} has two texts: {earlier[:40]!r} and {text[:40]!r}",
            where=where,
            remedy="an id must name one sentence",
        )
    return True


def _normalised(name: str) -> str | None:
    try:
        return normalise_language(name)
    except LanguageError:
        return None


def _is_language(name: str) -> bool:
    return _normalised(name) is not None


def _is_metadata(field: str) -> bool:
    """Whether a field whose name is a language tag holds something else, as far as its name tells: URL, doc_id."""
    name = field.casefold().replace("_", "-")
    stem = name.removesuffix("-id")  # which is a region, too: id-ID is Indonesian
    return name in _NO_LANGUAGES or (stem != "id" and stem in _NO_LANGUAGES)


def _match(name: str, found: Mapping[str, object], where: str) -> str:
    if name in found:
        return name
    tag = _normalised(name)
    same = [other for other in found if tag is not None and _normalised(other) == tag]
    if not same and tag is not None:  # "mn" for "khk_Cyrl", where that is the only one
        same = [other for other in found if base_language(_normalised(other) or "und") == base_language(tag)]
    if len(same) == 1:
        return same[0]
    raise DataError(
        f"there is no language {name!r}" if not same else f"{name!r} may be any of {', '.join(same)}",
        where=where,
        remedy=f"the languages there: {', '.join(sorted(found))}",
    )


def _find_english(found: Mapping[str, object], where: str) -> str:
    names = [name for name in found if base_language(_normalised(name) or "und") == "en"]
    if len(names) == 1:
        return names[0]
    raise DataError(
        "there is no English" if not names else f"English may be any of {', '.join(names)}",
        where=where,
        remedy=f"name it with --english; the languages there: {', '.join(sorted(found)) or 'none'}",
    )
