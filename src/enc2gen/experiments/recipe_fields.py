"""What the sections of all kinds of recipes have in common: their base, and fields that are checked alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from enc2gen.corpora.languages import normalise_languages
from enc2gen.data.tasks import build_task
from enc2gen.errors import ConfigError, Enc2genError
from enc2gen.evaluation.metrics import METRICS
from enc2gen.training.config import TrainingConfig

RUN_NAME = r"^[A-Za-z0-9._-]+$"
"""Names of runs, which are folders."""


class Section(BaseModel):
    """A part of a recipe: unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@contextmanager
def field_errors() -> Iterator[None]:
    """Inside a validator: our errors become the `ValueError` that pydantic lists with the field's place."""
    try:
        yield
    except Enc2genError as error:
        raise ValueError(str(error)) from error


SPLIT = "split to read; without it train of Hub data sets, all of built-in corpora"


def whole_builtin(content: Any) -> Any:
    """A section's content, in which a built-in corpus without a split is read whole: shares are held out of that."""
    if isinstance(content, dict) and str(content.get("path", "")).startswith("builtin:"):
        return {"split": "all", **content}
    return content


def check_task(name: str, fields: Mapping[str, Any]) -> None:
    """`ValueError` unless there is a task `name` whose mapping can be built of `fields`."""
    with field_errors():
        build_task(name, fields)


def check_training(training: TrainingConfig, trainer: str, objectives: Sequence[str], *, where: str) -> None:
    """`ValueError` unless `trainer` can do what `training` says, on examples of these `objectives` of pretraining."""
    if trainer == "transformers":
        try:
            training.check_transformers()
        except ConfigError as error:
            raise ValueError(f"{where}: {error.what}; {error.remedy}") from error
    if training.contrastive is not None and "translation-span-corruption" in objectives:
        raise ValueError(
            f"{where}.contrastive takes a text and its translation for a pair, and would take the examples of "
            "translation-span-corruption for one: use one of the two"
        )


def _normalised(languages: list[str]) -> list[str]:
    with field_errors():
        return normalise_languages(languages)


def _known(metrics: list[str]) -> list[str]:
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(str(METRICS.unknown(metric)))
    return metrics


Languages = Annotated[list[str], AfterValidator(_normalised)]
"""BCP 47 tags; in canonical form once validated, each once."""

Metrics = Annotated[list[str], AfterValidator(_known)]
"""Names of registered metrics."""
