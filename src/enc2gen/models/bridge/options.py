"""What fusions and mappers share: checking of their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from enc2gen.errors import ConfigError

Options = TypeVar("Options", bound=BaseModel)


def checked_options(config: type[Options], given: Mapping[str, Any], *, where: str) -> Options:
    """The options `given` as a `config`.

    Args:
        where: whose options they are ("fusion 'global'"), for the message.

    Raises:
        ConfigError: options are unknown, missing or have impossible values; all are listed, with the known names.
    """
    try:
        return config(**given)
    except ValidationError as error:
        problems = [_problem(dict(problem)) for problem in error.errors()]
        known = ", ".join(config.model_fields) or "none, it takes no options"
        raise ConfigError("; ".join(problems), where=where, remedy=f"options: {known}") from error


def _problem(problem: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown option {name!r}"
    if problem["type"] == "missing":
        return f"option {name!r} is missing"
    if not name:
        return str(problem["msg"])
    return f"{name}={problem['input']!r}: {problem['msg']}"
