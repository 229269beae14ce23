"""Tasks: declared mappings from the fields of a record to (source, target, languages, references).

A field is named as in the record; a dot reaches into nested records (`"translation.kk"`, `"answers.text"`).
A language is either fixed (`target_language: kk`) or read from a field (`target_language_field: tgt_lang`).
"""

from __future__ import annotations

import difflib
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from enc2gen.corpora.languages import normalise_language
from enc2gen.corpora.text_values import as_text, check_whole
from enc2gen.errors import ConfigError, DataError
from enc2gen.registry import Registry


@dataclass(frozen=True)
class Example:
    """One thing to learn: write `target` in `target_language`, given `source`.

    `references` are all accepted targets, the first of them `target`; every task fills them. `group` is what
    decides train, dev or test: the text of the file's source field, whichever way a pair is read, so that no
    direction gives away another; of a question, its context.
    """

    source: str
    target: str
    source_language: str | None
    target_language: str
    references: tuple[str, ...] = ()
    objective: str = "translation"
    group: str = dataclass_field(default="", compare=False)


class _Record:
    """A record with its number, so that every complaint can say where."""

    def __init__(self, fields: Mapping[str, Any], number: int, origin: str | None) -> None:
        self.fields = fields
        self.where = f"{origin}, record {number}" if origin else f"record {number}"

    def value(self, field: str) -> Any:
        """The value of `field`; `DataError` with the fields present and the closest name if it is missing."""
        found, value = _look_up(self.fields, field)
        if found:
            return value
        present = _field_names(self.fields)
        close = difflib.get_close_matches(field, present, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(
            f"no field {field!r}; fields present: {', '.join(present) or 'none'}",
            where=self.where,
            remedy=f"{hint}name the right field in the task's mapping",
        )

    def texts(self, field: str) -> list[str]:
        """The non-empty texts of a field that holds one text, a list of texts, or nothing."""
        value = self.value(field)
        values = value if isinstance(value, list | tuple) else [value]
        return [text for item in values if (text := self._as_text(item, field))]

    def text(self, field: str) -> str:
        """The text of a field, without surrounding white space; empty for null and NaN."""
        return self._as_text(self.value(field), field)

    def _as_text(self, value: Any, field: str) -> str:
        remedy = "name a text field; a dot reaches into nested ones, as in 'answers.text'"
        return check_whole(as_text(value, field, where=self.where, remedy=remedy).strip(), field, where=self.where)


def _look_up(fields: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    if name in fields:
        return True, fields[name]
    head, dot, rest = name.partition(".")
    inner = fields.get(head)
    return _look_up(inner, rest) if dot and isinstance(inner, Mapping) else (False, None)


def _field_names(fields: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name, value in fields.items():
        names.append(str(name))
        if isinstance(value, Mapping):
            names += [f"{name}.{inner}" for inner in _field_names(value)]
    return names


class TaskConfig(BaseModel):
    """What every task's mapping shares."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    references: str | None = Field(
        default=None, description="field with further accepted targets: one text or a list of texts"
    )


class TextPairConfig(TaskConfig):
    """Mapping of a (source, target) record, with a language on either side."""

    source: str = Field(default="source", description="field with the text to read")
    target: str = Field(default="target", description="field with the text to write")
    source_language: str | None = Field(default=None, description="language of all sources (BCP 47)")
    source_language_field: str | None = Field(default=None, description="field with the source's language")
    target_language: str | None = Field(default=None, description="language of all targets (BCP 47)")
    target_language_field: str | None = Field(default=None, description="field with the target's language")

    @model_validator(mode="after")
    def _one_origin_per_language(self) -> TextPairConfig:
        _at_most_one(self, "source_language")
        _exactly_one(self, "target_language")
        return self


class TranslationConfig(TextPairConfig):
    """Mapping of a sentence pair."""

    directions: Literal["forward", "reverse", "both"] = Field(
        default="forward",
        description="learn source to target, target to source, or both "
        "(both directions in pretraining: XLM-SWCM, arXiv 2502.10852, section 4.1)",
    )

    @model_validator(mode="after")
    def _source_language_known(self) -> TranslationConfig:
        _exactly_one(self, "source_language")
        return self


class WithinLanguageConfig(TaskConfig):
    """Mapping of a task that reads and, unless told otherwise, writes one language."""

    language: str | None = Field(default=None, description="language of all records (BCP 47)")
    language_field: str | None = Field(default=None, description="field with the record's language")
    target_language: str | None = Field(default=None, description="language to write, if not the one read")
    target_language_field: str | None = Field(
        default=None, description="field with the language to write, if not the one read"
    )

    @model_validator(mode="after")
    def _one_origin_per_language(self) -> WithinLanguageConfig:
        _exactly_one(self, "language")
        _at_most_one(self, "target_language")
        return self


class SummarisationConfig(WithinLanguageConfig):
    """Mapping of a document and its summary or headline."""

    document: str = Field(default="document", description="field with the text to summarise")
    summary: str = Field(default="summary", description="field with the summary or headline")


class ReadingComprehensionConfig(WithinLanguageConfig):
    """Mapping of a question about a context, answered in free text."""

    context: str = Field(default="context", description="field with the text that holds the answer")
    question: str = Field(default="question", description="field with the question")
    answers: str = Field(
        default="answer",
        description="field with the accepted answer or answers; the first is learnt, all are references",
    )
    template: str = Field(
        default="{question} {context}",
        description="how question and context become one source. Our choice: question first, so that "
        "truncation cuts the context",
    )

    @field_validator("template")
    @classmethod
    def _names_both(cls, template: str) -> str:
        names = sorted(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)
        if names != ["context", "question"]:
            raise ValueError("must contain {question} and {context}, once each, and no other braces")
        return template


def _origins(config: BaseModel, language: str) -> int:
    return sum(getattr(config, name) is not None for name in (language, f"{language}_field"))


def _exactly_one(config: BaseModel, language: str) -> None:
    if _origins(config, language) != 1:
        raise ValueError(f"give exactly one of {language} and {language}_field")


def _at_most_one(config: BaseModel, language: str) -> None:
    if _origins(config, language) > 1:
        raise ValueError(f"give only one of {language} and {language}_field")


ConfigT = TypeVar("ConfigT", bound=TaskConfig)


class Task(ABC, Generic[ConfigT]):
    """Turns records into examples.

    Args:
        config: the mapping, an instance of the task's `config_class`.

    Attributes:
        counts: over all calls of :meth:`examples`: `records` read, `examples` made, and examples skipped for
            an `empty source` or `empty target`.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[TaskConfig]]

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self._languages: dict[str, str] = {}
        for field in type(config).model_fields:
            if field.endswith("language") and (tag := getattr(config, field)) is not None:
                self._normalise(tag, f"{self.name} task, {field}")

    def examples(self, records: Iterable[Mapping[str, Any]], *, where: str | None = None) -> Iterator[Example]:
        """Yield the examples of `records`, in order; records with an empty source or target are counted only.

        Args:
            records: what a reader yields.
            where: their origin (a file name), for error messages.

        Raises:
            DataError: a field of the mapping is missing or not text; names the record (counted from 1).
            LanguageError: a language field holds an unknown tag.
        """
        for number, fields in enumerate(records, start=1):
            self.counts["records"] += 1
            for example in self._examples_of(_Record(fields, number, where)):
                if not example.source:
                    self.counts["empty source"] += 1
                elif not example.target:
                    self.counts["empty target"] += 1
                else:
                    self.counts["examples"] += 1
                    yield example

    @abstractmethod
    def _examples_of(self, record: _Record) -> Iterator[Example]: ...

    def _language(self, record: _Record, name: str) -> str | None:
        """The language that the config calls `name`: fixed, from the record, or not declared."""
        fixed, field = getattr(self.config, name), getattr(self.config, f"{name}_field")
        if field is not None:
            tag = record.text(field)
            if not tag:
                raise DataError(f"field {field!r} names no language", where=record.where)
            return self._normalise(tag, record.where)
        return None if fixed is None else self._languages[fixed]

    def _normalise(self, tag: str, where: str) -> str:
        if tag not in self._languages:
            self._languages[tag] = normalise_language(tag, where=where)
        return self._languages[tag]

    def _targets(self, record: _Record, field: str) -> tuple[str, ...]:
        """All accepted targets without repetition; empty if `field` itself is empty."""
        targets = record.texts(field)
        if targets and self.config.references is not None:
            targets += record.texts(self.config.references)
        return tuple(dict.fromkeys(targets))

    def _example(self, source: str, targets: tuple[str, ...], read: str | None, write: str) -> Example:
        return Example(source, targets[0] if targets else "", read, write, targets, self.name, group=source)


TASKS: Registry[type[Task[Any]]] = Registry("task")
TASKS.add("continuation", "enc2gen.data.continuation:Continuation")


@TASKS.register("text-to-text")
class TextToText(Task[TextPairConfig]):
    """Any source text to any target text."""

    name = "text-to-text"
    config_class = TextPairConfig

    def _examples_of(self, record: _Record) -> Iterator[Example]:
        config = self.config
        source, targets = record.text(config.source), self._targets(record, config.target)
        read, write = self._language(record, "source_language"), self._language(record, "target_language")
        yield self._example(source, targets, read, cast(str, write))


@TASKS.register("translation")
class Translation(Task[TranslationConfig]):
    """A sentence to its translation; in a reversed pair the source is the only reference."""

    name = "translation"
    config_class = TranslationConfig

    def _examples_of(self, record: _Record) -> Iterator[Example]:
        config = self.config
        source, targets = record.text(config.source), self._targets(record, config.target)
        read = cast(str, self._language(record, "source_language"))
        write = cast(str, self._language(record, "target_language"))
        if config.directions != "reverse":
            yield self._example(source, targets, read, write)
        if config.directions != "forward":
            target = targets[0] if targets else ""
            yield replace(self._example(target, (source,) if source else (), write, read), group=source)


@TASKS.register("summarisation")
class Summarisation(Task[SummarisationConfig]):
    """A document to its summary; with headlines as summaries, headline generation."""

    name = "summarisation"
    config_class = SummarisationConfig

    def _examples_of(self, record: _Record) -> Iterator[Example]:
        source, targets = record.text(self.config.document), self._targets(record, self.config.summary)
        read = cast(str, self._language(record, "language"))
        yield self._example(source, targets, read, self._language(record, "target_language") or read)


@TASKS.register("reading-comprehension")
class ReadingComprehension(Task[ReadingComprehensionConfig]):
    """A question and its context to the answer, which is generated, not cut out of the context."""

    name = "reading-comprehension"
    config_class = ReadingComprehensionConfig

    def _examples_of(self, record: _Record) -> Iterator[Example]:
        config = self.config
        question, context = record.text(config.question), record.text(config.context)
        targets = self._targets(record, config.answers)
        source = config.template.format(question=question, context=context) if question and context else ""
        read = cast(str, self._language(record, "language"))
        example = self._example(source, targets, read, self._language(record, "target_language") or read)
        yield replace(example, group=context)  # all questions about a text are held out together, or none


def build_task(name: str, mapping: Mapping[str, Any], *, where: str | None = None) -> Task[Any]:
    """Build the task `name` from its mapping, as written in a recipe.

    Raises:
        ConfigError: unknown task, or a mapping with unknown, missing or contradictory keys; all are listed.
        LanguageError: a fixed language is unknown.
    """
    task = TASKS.get(name, where=where)
    try:
        config = task.config_class(**mapping)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc']) or name}: {problem['msg']}" for problem in error.errors()
        ]
        raise ConfigError(
            f"the {name} task's mapping is not valid: {'; '.join(problems)}",
            where=where,
            remedy=f"keys of this task: {', '.join(task.config_class.model_fields)}",
        ) from error
    return task(config)
