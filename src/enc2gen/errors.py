"""One exception tree. Every error a user can cause says what is wrong, where, and how to repair it."""

from __future__ import annotations


class Enc2genError(Exception):
    """Base of all errors that a user can cause and repair.

    Args:
        what: what is wrong, with the offending value.
        where: file, line, field or option it was found in.
        remedy: the next step that repairs it.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  remedy: {self.remedy}" if self.remedy else text


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line for a message of ours; its type's name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ConfigError(Enc2genError, ValueError):
    """A recipe, option or argument is not valid."""


class DataError(Enc2genError, ValueError):
    """A corpus file or record cannot be used."""


class LanguageError(Enc2genError, ValueError):
    """A language tag is unknown, or unknown to this model."""


class ModelError(Enc2genError, ValueError):
    """An encoder, tokenizer or model does not fit."""


class CheckpointError(Enc2genError, ValueError):
    """A checkpoint is truncated, foreign, or does not match the run."""


class TrainingError(Enc2genError, RuntimeError):
    """Training cannot go on, for example because the loss is not finite."""


class OutputError(Enc2genError, OSError):
    """Output cannot be written: folder in use, disk full, no permission."""


class Interrupted(Enc2genError):
    """The run was interrupted and saved; running it again goes on."""
