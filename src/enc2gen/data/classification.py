"""Classification as text in, label name out: which data sets there are, and their labelled texts.

The bridge writes the name of the label, so that one model serves any label set, and a language that it was never
trained on needs no head of its own.

`sinhala-news` by its Hub name is untested. The released code of arXiv 2508.09091 takes `train_en` and `train_si` for
configurations, and so does the task here: a configuration for each split and language, each with the one split "train".
An earlier script of its authors takes them for splits; should that hold, set the task's options `hub_config: null` and
`splits: {train: "train_{language}", dev: "dev_{language}", test: "test_{language}"}`.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from enc2gen.corpora.languages import default_script, normalise_language
from enc2gen.corpora.readers import Record, read_records
from enc2gen.corpora.text_values import as_text, check_whole
from enc2gen.data.language_files import filled, hub_source, language_file, languages_in, near_languages
from enc2gen.errors import ConfigError, DataError, LanguageError
from enc2gen.registry import Registry


@dataclass(frozen=True)
class LabelledText:
    """A text as the encoder reads it, in its template, and the name of its label.

    `id` is the record's own where it has one, so that translations of one text can be compared, else its number.
    """

    text: str
    label: str
    language: str
    id: str


class ClassificationTask(BaseModel):
    """Where a data set is, what its records hold, and how they become texts and labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="name of the task, for messages")
    template: str = Field(default="{text}", description="what the encoder reads, with the text fields in braces")
    label_fields: tuple[str, ...] = Field(default=("label",), description="field with the label; the first there")
    id_fields: tuple[str, ...] = Field(default=("id",), description="field with the record's id; the first there")
    labels: tuple[str, ...] = Field(
        default=(), description="names of all labels, as the LLM writes them; none given: any text is a label"
    )
    raw_labels: dict[str, str] = Field(
        default_factory=dict, description="value in the data -> name; numbers count `labels` from 0 anyway"
    )
    hub: str | None = Field(default=None, description="name on the Hugging Face Hub")
    hub_config: str | None = Field(
        default="{language}", description="configuration on the Hub, with {language} and {split}"
    )
    hub_elsewhere: dict[str, str] = Field(
        default_factory=dict, description="language -> owner/name:config of the data set on the Hub that has it instead"
    )
    splits: dict[str, str] = Field(
        default_factory=lambda: {"dev": "validation"},
        description="split (train, dev, test) -> name on the Hub, with {language} and {split}",
    )
    languages: tuple[str, ...] = Field(default=(), description="languages on the Hub; none given: not known here")

    @field_validator("template")
    @classmethod
    def _names_fields(cls, template: str) -> str:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        except ValueError as error:
            raise ValueError(f"its braces do not match ({error})") from error
        if not names or not all(name.isidentifier() for name in names):
            raise ValueError("must name text fields in braces, for example {text}")
        return template

    @property
    def text_fields(self) -> tuple[str, ...]:
        """The fields that the template holds."""
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None)

    def load(self, language: str, split: str, path: str | Path | None = None) -> list[LabelledText]:
        """Read the labelled texts of one language and split.

        Args:
            language: as the data name it: "kaz_Cyrl", "sw".
            split: "train", "dev" or "test" ("validation" is "dev").
            path: a folder with `<language>/<split>.*` (any readable format, also .gz) or `<split>.*`; a file, with
                `{language}` and `{split}` in its name where there are several; or another name on the Hub. By
                default the task's own data set on the Hub.

        Raises:
            DataError: no such language, file or column, an empty file, a record without text, or an unknown label.
            ConfigError: a task without data of its own, and no `path`.
        """
        if split not in ("train", "dev", "validation", "test"):
            raise ConfigError(f"unknown split {split!r}", where=f"task {self.name}", remedy="train, dev or test")
        split = "dev" if split == "validation" else split
        source, hub_split = self.source(language, split, path)
        records = read_records(source, split=hub_split)
        return [self._labelled(record, number, language, source) for number, record in enumerate(records, 1)]

    def available_languages(self, path: str | Path | None = None) -> list[str]:
        """Languages of a folder's data or, without `path`, of the Hub's as far as they are known here."""
        return list(self.languages) if path is None else languages_in(path)

    def source(self, language: str, split: str, path: str | Path | None = None) -> tuple[str, str]:
        """What `load` reads and, on the Hub, which split of it; for files the split that was asked for."""
        if path is not None and (file := language_file(path, language, split)) is not None:
            return str(file), split
        name = self.hub if path is None else str(path).removeprefix("hub:")
        if name is None:
            raise ConfigError(
                "this task has no data of its own", where=f"task {self.name}", remedy="give the path of your file"
            )
        if name == self.hub and self.languages and language not in self.languages:
            raise DataError(
                f"no language {language!r}",
                where=name,
                remedy=f"{near_languages(language, self.languages)}available: {', '.join(self.languages)}",
            )
        if path is None or name == self.hub:
            name = self.hub_elsewhere.get(language, name)
        places = {"language": language, "split": split}
        return hub_source(name, self.hub_config, places), filled(self.splits.get(split, split), places)

    def _labelled(self, record: Record, number: int, language: str, source: str) -> LabelledText:
        where = f"{source}, record {number}"
        texts = {field: _text(record, field, where) for field in self.text_fields}
        label = self._label(record[_first(record, self.label_fields, where)], where)
        given = next((record[field] for field in self.id_fields if record.get(field) is not None), number)
        return LabelledText(self.template.format(**texts), label, language, str(given))

    def _label(self, value: Any, where: str) -> str:
        raw = "" if value is None else str(value).strip()
        if raw in self.raw_labels:
            return self.raw_labels[raw]
        if not raw:
            raise DataError("the label is empty", where=where, remedy="label the record or leave it out")
        if not self.labels or raw in self.labels:
            return raw
        if raw.isdecimal() and int(raw) < len(self.labels):
            return self.labels[int(raw)]
        close = difflib.get_close_matches(raw, self.labels, n=1)
        raise DataError(
            f"unknown label {raw!r}",
            where=where,
            remedy=(f"did you mean {close[0]!r}? " if close else "") + f"labels: {', '.join(self.labels)}",
        )


def _first(record: Record, fields: Sequence[str], where: str) -> str:
    """The first of `fields` that the record has; `DataError` with the closest names if it has none."""
    for field in fields:
        if field in record:
            return field
    close = difflib.get_close_matches(fields[0], list(record), n=1)
    raise DataError(
        f"missing column {' or '.join(map(repr, fields))}",
        where=where,
        remedy=(f"did you mean {close[0]!r}? " if close else "")
        + f"columns: {', '.join(map(str, record)) or 'none'}; name yours in the task's template or label_fields",
    )


def _text(record: Record, field: str, where: str) -> str:
    value = record[_first(record, (field,), where)]
    remedy = "name a field of text in the task's template or label_fields"
    text = check_whole(as_text(value, field, where=where, remedy=remedy).strip(), field, where=where)
    if not text:
        raise DataError(f"field {field!r} is empty", where=where, remedy="fill it in or leave the record out")
    return text


def label_names(examples: Sequence[LabelledText]) -> tuple[str, ...]:
    """The labels that occur, sorted: the label set of a task that declares none."""
    return tuple(sorted({example.label for example in examples}))


def balanced(examples: Sequence[LabelledText], limit: int, seed: int = 42) -> list[LabelledText]:
    """The first `limit // labels` examples of each label, shuffled: how the code of arXiv 2508.09091 limits data."""
    labels = label_names(examples)
    share = limit // max(1, len(labels))
    chosen = [e for label in labels for e in [e for e in examples if e.label == label][:share]]
    return [chosen[i] for i in np.random.default_rng(seed).permutation(len(chosen))]


def script_of(language: str) -> str:
    """ISO 15924 script of a language as data sets name it: "uig_Arab" -> "Arab", "sw" -> "Latn"; "Zyyy" if unknown."""
    try:
        return default_script(normalise_language(language))
    except LanguageError:
        return "Zyyy"


CLASSIFICATION_TASKS: Registry[ClassificationTask] = Registry("classification task")


def build_classification_task(name: str, options: Mapping[str, Any] | None = None) -> ClassificationTask:
    """The task `name` with some fields set otherwise, as written in a recipe.

    Raises:
        ConfigError: unknown task or field; all problems are listed.
    """
    task = CLASSIFICATION_TASKS.get(name)
    try:
        return type(task)(**{**task.model_dump(), **(options or {})})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ConfigError(
            f"the options of the {name} task are not valid: {'; '.join(problems)}",
            remedy=f"options: {', '.join(ClassificationTask.model_fields)}",
        ) from error


# In the order of the numbers that some versions of the data set on the Hub hold.
_SIB200 = ("science/technology", "travel", "politics", "sports", "health", "entertainment", "geography")
_INFERENCE = ("Entailment", "Neutral", "Contradiction")
_RATINGS = ("Very Negative", "Negative", "Neutral", "Positive", "Very Positive")

# Templates and label names but SIB-200's and tsv's: the released code of arXiv 2508.09091.
for _task in (
    ClassificationTask(
        name="sib200",
        label_fields=("label", "category"),
        id_fields=("id", "index_id"),
        labels=_SIB200,
        hub="Davlan/sib200",
    ),
    ClassificationTask(
        name="xnli",
        template="Premise: {premise} Hypothesis: {hypothesis} Label: ",
        labels=_INFERENCE,
        raw_labels={label.lower(): label for label in _INFERENCE},
        hub="facebook/xnli",
        languages=("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"),
    ),
    ClassificationTask(
        name="indicxnli",
        template="Premise: {premise} Hypothesis: {hypothesis} Label: ",
        labels=_INFERENCE,
        raw_labels={label.lower(): label for label in _INFERENCE},
        hub="Divyanshu/indicxnli",
        hub_elsewhere={"en": "facebook/xnli:en"},  # of which it is a translation, item by item
        languages=("en", "as", "bn", "gu", "hi", "kn", "ml", "mr", "or", "pa", "ta", "te"),
    ),
    ClassificationTask(
        name="sinhala-news",
        template="News Sentence: {sentence} Category: ",
        labels=("Business", "Entertainment", "Political", "Sports", "Science"),
        hub="Themira/en_si_news_classification_with_label_name",
        hub_config="{split}_{language}",
        splits={"train": "train", "dev": "train", "test": "train"},
        languages=("en", "si"),
    ),
    ClassificationTask(
        name="amazon-reviews",
        template="Review: {text} Label: ",
        labels=_RATINGS,
        hub="mteb/amazon_reviews_multi",
        languages=("de", "en", "es", "fr", "ja", "zh"),
    ),
    ClassificationTask(name="tsv"),
):
    CLASSIFICATION_TASKS.add(_task.name, _task)
