"""What the vocabulary commands share: text in, a whole model folder out, sizes before and after."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from enc2gen.errors import ConfigError, DataError, LanguageError, ModelError, OutputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from enc2gen.models.embedding_init import InitialisationConfig
    from enc2gen.models.surgery import VocabularyChange
    from enc2gen.models.surgery.operations import ModelSize
    from enc2gen.tokenization.coverage import CoverageReport

RECORD_FILE = "vocabulary.json"
"""Record of what was done, in the model's folder."""
_SAMPLE = 200
"""Lines on which the saved tokenizer is compared with the one in memory (our choice)."""

Text = tuple[str, str | None]
"""A text and its language, where known."""


def read_texts(sources: Sequence[str], fields: Sequence[str] = ()) -> list[Text]:
    """Texts of files, folders, Hub or built-in corpora; of a folder that `enc2gen prepare` wrote, its train split.

    Args:
        fields: of which fields; by default `text`, or else `source` and `target`.

    Raises:
        DataError: a source cannot be read, lacks the fields, holds half of a character, or all of them have no text.
    """
    texts = [text for source in sources for text in _texts_of(source, fields)]
    if not texts:
        raise DataError(
            "there is no text", where=", ".join(sources), remedy="give files with at least one line of text"
        )
    return texts


def _texts_of(source: str, fields: Sequence[str]) -> Iterator[Text]:
    from enc2gen.corpora.readers import read_records
    from enc2gen.corpora.text_values import check_whole

    folder = Path(source)
    prepared = (folder / "manifest.json").is_file() and (folder / "train").is_dir()
    for number, record in enumerate(read_records(folder / "train" if prepared else source), 1):
        chosen = list(fields) or (["text"] if "text" in record else ["source", "target"])
        if missing := [name for name in chosen if name not in record]:
            raise DataError(
                f"no field {missing[0]!r} in record {number}; there are: {', '.join(map(str, record)) or 'none'}",
                where=source,
                remedy="name the fields that hold text with --field",
            )
        for name in chosen:
            own = "language" if len(chosen) == 1 else f"{name}_language"
            language = record.get(own) or record.get("language")
            if isinstance(text := record[name], str) and text.strip():
                yield check_whole(text, name, where=f"{source}, record {number}"), _language_tag(language)


def _language_tag(value: Any) -> str | None:
    """The tag in canonical form; None for what is none ("English", "mul"): the language is then identified."""
    from enc2gen.corpora.languages import normalise_language

    try:
        return normalise_language(value) if isinstance(value, str) else None
    except LanguageError:
        return None


def read_pairs(sources: Sequence[str], fields: str | None = None) -> list[tuple[str, str]]:
    """Pairs of texts that share a meaning.

    Args:
        sources: whatever `read_records` takes.
        fields: the two fields that hold them, parted by a comma; `source` and `target` if None.

    Raises:
        ConfigError: not two fields.
        DataError: a source cannot be read, lacks a field, holds half of a character, or all of them have no pair.
    """
    from enc2gen.corpora.readers import read_records
    from enc2gen.corpora.text_values import check_whole

    if not sources:
        if fields is not None:
            raise ConfigError("there is no file of pairs", where="--pair-fields", remedy="add --pairs FILE")
        return []
    names = [name.strip() for name in (fields or "source,target").split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise ConfigError(f"{fields!r} are not two fields", where="--pair-fields", remedy="write for example en,bo")
    pairs = []
    for source in sources:
        for number, record in enumerate(read_records(source), 1):
            if missing := [name for name in names if name not in record]:
                raise DataError(
                    f"no field {missing[0]!r} in record {number}; there are: {', '.join(map(str, record)) or 'none'}",
                    where=source,
                    remedy="name the two fields that hold the pair, for example --pair-fields en,bo",
                )
            where = f"{source}, record {number}"
            one, other = (check_whole(str(record[name] or ""), name, where=where) for name in names)
            if one.strip() and other.strip():
                pairs.append((one, other))
    if not pairs:
        remedy = "give files with text in both fields"
        raise DataError("there is no pair of texts", where=", ".join(sources), remedy=remedy)
    return pairs


def parse_size(value: str) -> int | Literal["auto"]:
    """The value of `--size`; raises `ConfigError`."""
    if value == "auto":
        return "auto"
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{value!r} is no number of pieces", where="--size", remedy="give 1 or more, or auto")
    return int(value)


def initialisation(method: str, rank: int | None, vectors: Path | None) -> InitialisationConfig:
    """The settings of new rows; raises `ConfigError` for an unknown method (with the closest) or a bad value."""
    from enc2gen.models.embedding_init import EMBEDDING_INITIALISATIONS, InitialisationConfig

    if method not in EMBEDDING_INITIALISATIONS:
        raise EMBEDDING_INITIALISATIONS.unknown(method, where="--init")
    given = {"method": method, "rank": rank, "vectors": str(vectors) if vectors else None}
    try:
        chosen = {name: value for name, value in given.items() if value is not None}
        return InitialisationConfig.model_validate(chosen)
    except ValidationError as error:
        problem = error.errors()[0]
        option = ".".join(map(str, problem["loc"])) or "init"
        raise ConfigError(problem["msg"].removeprefix("Value error, "), where=f"--{option}") from error


def check_output(out: Path, model: str, overwrite: bool) -> None:
    """Find out before the work that `out` cannot take the result.

    Raises:
        OutputError: a file, the model itself, a folder in use, or (with `overwrite`) one that holds no model.
    """
    if out.exists() and Path(model).exists() and out.resolve() == Path(model).resolve():
        raise OutputError("this is the model itself", where=str(out), remedy="give another folder with --out")
    if out.exists() and not out.is_dir():
        raise OutputError("this is a file", where=str(out), remedy="give a folder with --out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError("the folder is not empty", where=str(out), remedy="give another one, or add --overwrite")
    if not (out / "config.json").is_file():
        raise OutputError(
            "the folder holds something else than a model, which is not overwritten",
            where=str(out),
            remedy="give another folder",
        )


def write_model(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: Mapping[str, Any],
    texts: Sequence[Text],
) -> None:
    """Write model, tokenizer and record under a temporary name, check the saved tokenizer, then rename.

    Raises:
        OutputError: it cannot be written; nothing is left behind, and an old folder stays as it was.
        ModelError: the saved tokenizer splits text otherwise than the one in memory.
    """
    from enc2gen.training.checkpoint import save_weights, write_checkpoint

    def fill(folder: Path) -> None:
        save_weights(model, folder)
        tokenizer.save_pretrained(folder)
        content = json.dumps(record, ensure_ascii=False)
        (folder / RECORD_FILE).write_text(content + "\n", encoding="utf-8")
        _check_saved(folder, tokenizer, [text for text, _ in islice(texts, _SAMPLE)])

    write_checkpoint(out, fill, {"operation": record["operation"]})


def _check_saved(folder: Path, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    from enc2gen.encoders.loading import load_tokenizer

    saved = load_tokenizer(folder)
    if saved.get_vocab() != tokenizer.get_vocab() or any(
        saved.encode(text) != tokenizer.encode(text) for text in texts
    ):
        raise ModelError(
            "the saved tokenizer splits text otherwise than the one in memory",
            where=str(tokenizer.name_or_path or type(tokenizer).__name__),
            remedy="report this tokenizer; it cannot be changed safely",
        )


def plain_table(*columns: str) -> Table:
    """A table without lines: its first column to the left, numbers to the right."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    return table


def print_sizes(console: Console, before: ModelSize, after: ModelSize) -> None:
    """Rows, parameters and bytes, before and after."""
    table = plain_table("size", "before", "after", "change")
    for name, old, new, form in (
        ("vocabulary rows", before.rows, after.rows, "{:,}"),
        ("parameters", before.parameters, after.parameters, "{:,}"),
        ("megabytes", before.bytes / 1e6, after.bytes / 1e6, "{:,.1f}"),
    ):
        table.add_row(name, form.format(old), form.format(new), f"{100 * (new / old - 1):+.1f} %")
    console.print(table)
    console.print()


def change_record(change: VocabularyChange) -> dict[str, Any]:
    """The part of the record that every change of the vocabulary has."""
    from dataclasses import asdict

    return {
        "sizes": {"before": asdict(change.before), "after": asdict(change.after)},
        "new_pieces": change.pieces,
        "how": change.how,
        "kept_characters": change.kept_characters,
        "still_altered": change.still_altered,
        "size_trials": [asdict(trial) for trial in change.trials],
        "origins": change.origins,
    }


def coverage_record(reports: Sequence[CoverageReport]) -> dict[str, Any]:
    """The part of the record that says how the corpus was covered before and after."""
    before, after = reports
    return {"coverage": {"before": before.to_dict(), "after": after.to_dict()}}
