"""What fusions and mappers share: checking of their options, and seeded initialisation of their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
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


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers from `seed` inside the block, and leave the global generators as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
