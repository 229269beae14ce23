"""Definitions of experiments: one YAML file that says what is compared, on which tasks, how often."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from enc2gen.errors import ConfigError
from enc2gen.experiments.recipe import FLOORS, merge, validated
from enc2gen.experiments.recipe_fields import RUN_NAME, Metrics, Section

LIBRARY = files("enc2gen.experiments.grid") / "library"

Content = dict[str, Any]
"""Part of a recipe, as in its file."""


class Variant(Section):
    """One of the things that are compared."""

    label: str | None = Field(default=None, description="its name in tables; by default its name in the file")
    system: Content = Field(default_factory=dict, description="on top of the experiment's `system`")
    recipe: Content = Field(default_factory=dict, description="on top of every run's recipe")
    pretraining: Content | Literal[False] = Field(
        default_factory=dict, description="on top of the experiment's `pretraining`; false: tasks start untrained"
    )
    tasks: dict[str, Content] = Field(default_factory=dict, description="task -> on top of the experiment's task")
    search: dict[str, list[Any]] = Field(
        default_factory=dict, description="values of searched settings of its own; an empty list: not searched"
    )


class Published(Section):
    """Figures of a paper, shown in a column of their own."""

    metric: str = Field(description="that the figures are in")
    note: str = Field(default="", description="what is different about them")
    values: dict[str, dict[str, float]] = Field(
        description="variant -> task, or task and language (`few-shot kk`), or any name -> figure"
    )
    others: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="the same of systems that are not among the variants"
    )

    @model_validator(mode="after")
    def _each_once(self) -> Published:
        if both := sorted(set(self.values) & set(self.others)):
            raise ValueError(f"in both values and others: {', '.join(both)}")
        return self


class Experiment(Section):
    """A question, and the grid of runs that answers it."""

    name: str = Field(pattern=RUN_NAME, description="of the experiment")
    question: str = Field(description="that the experiment answers")
    description: str = Field(default="", description="what is compared, and how")
    source: str | None = Field(default=None, description="where the question comes from")
    reference: str = Field(description="the variant that the others are compared with, pair by pair")
    headline: str = Field(default="chrf++", description="metric of comparisons, plots and the search")
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1, description="a number of seeds, or a list of them")
    recipe: Content = Field(description="what all runs have in common: a recipe without name, seed, output, systems")
    system: Content = Field(default_factory=dict, description="what the systems of all variants have in common")
    pretraining: Content | None = Field(
        default=None, description="on top of `recipe`: the run per variant and seed that all tasks start from"
    )
    tasks: dict[str, Content] = Field(
        default_factory=dict, description="name -> on top of `recipe`: what is fine-tuned on and evaluated"
    )
    sizes: list[int] = Field(default_factory=list, description="numbers of training examples to compare (train_limit)")
    variants: dict[str, Variant] = Field(default_factory=dict, description="what is compared, by name")
    factors: dict[str, dict[str, Variant]] = Field(
        default_factory=dict, description="factor -> level -> what it changes; the variants are all combinations"
    )
    search: dict[str, list[Any]] = Field(
        default_factory=dict, description="setting -> values, of which each variant takes its best (development set)"
    )
    published: Published | None = Field(default=None, description="figures of the paper")

    @field_validator("seeds", mode="before")
    @classmethod
    def _listed(cls, seeds: Any) -> Any:
        return list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds

    @field_validator("variants", "factors", "tasks", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        return _text_keys(given)

    @field_validator("headline")
    @classmethod
    def _known(cls, headline: str) -> str:
        _Headline(metrics=[headline])
        return headline

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if bool(self.variants) == bool(self.factors):
            raise ValueError("give either variants or factors")
        if len(set(self.seeds)) < len(self.seeds) or len(set(self.sizes)) < len(self.sizes):
            raise ValueError("seeds and sizes: each once")
        if min(self.seeds) < 0 or min(self.sizes, default=1) < 1:
            raise ValueError("seeds are 0 or more, sizes 1 or more")
        names = list(self.all_variants)
        if self.reference not in names:
            raise ValueError(f"reference: there is no variant {self.reference!r}; there are {', '.join(names)}")
        for kind, slugs in (("variants", map(slug, names)), ("tasks", map(slug, self.tasks))):
            listed = list(slugs)
            if len(set(listed)) < len(listed) or not all(listed) or set(listed) & set(FLOORS):
                raise ValueError(f"{kind}: names must differ in letters and digits, and not be {' or '.join(FLOORS)}")
        for where, content in self.contents():
            self._check_content(where, content)
        for where, content in self._pretraining_contents():
            for key in ("finetune", "evaluate"):
                if key in content:
                    raise ValueError(f"{where}.{key}: pretraining runs only pretrain: give it in recipe or a task")
        for where, content in self._task_contents() if self.pretraining is not None else ():
            if "encoder" in content:
                raise ValueError(f"{where}.encoder: tasks start from the pretraining run's model and have its encoder")
        for name, variant in self.all_variants.items():
            self._check_variant(name, variant)
        return self

    def _check_content(self, where: str, content: Content) -> None:
        """Refuse settings that would do nothing."""
        for key in ("name", "seed", "output", "systems"):
            if key in content:
                raise ValueError(f"{where}.{key}: the experiment itself sets this")
        if "system" in content:
            raise ValueError(f"{where}.system: the system is the same in all runs of a variant: give it there")

    def _check_variant(self, name: str, variant: Variant) -> None:
        if unknown := sorted(set(variant.tasks) - set(self.tasks)):
            raise ValueError(f"variants.{name}.tasks: there is no task {', '.join(unknown)}")
        if variant.pretraining != {} and self.pretraining is None:
            raise ValueError(f"variants.{name}.pretraining: the experiment has no pretraining")
        for setting, values in self.searched(variant).items():
            if len({json.dumps(value) for value in values}) < len(values):
                raise ValueError(f"search.{setting}: a value occurs twice")

    def contents(self) -> list[tuple[str, Content]]:
        """Every part of a recipe in the definition, with its place."""
        found = [("recipe", self.recipe)]
        found += [(f"variants.{name}.recipe", variant.recipe) for name, variant in self.all_variants.items()]
        return found + self._pretraining_contents() + self._task_contents()

    def _pretraining_contents(self) -> list[tuple[str, Content]]:
        found = [("pretraining", self.pretraining or {})]
        for name, variant in self.all_variants.items():
            found += [(f"variants.{name}.pretraining", variant.pretraining or {})]
        return found

    def _task_contents(self) -> list[tuple[str, Content]]:
        found = [(f"tasks.{name}", content) for name, content in self.tasks.items()]
        for name, variant in self.all_variants.items():
            found += [(f"variants.{name}.tasks.{task}", content) for task, content in variant.tasks.items()]
        return found

    @property
    def all_variants(self) -> dict[str, Variant]:
        """Variants by name: as given, or every combination of the factors' levels, as "factor=level factor=level"."""
        if self.variants:
            return self.variants
        found = {}
        for levels in itertools.product(*(levels.items() for levels in self.factors.values())):
            name = " ".join(f"{factor}={level}" for factor, (level, _) in zip(self.factors, levels, strict=True))
            content: Content = {}
            for _, variant in levels:
                content = merge(content, variant.model_dump(exclude_unset=True, exclude={"label"}))
            labels = [
                variant.label or f"{factor} {level}"
                for factor, (level, variant) in zip(self.factors, levels, strict=True)
            ]
            found[name] = Variant(label=", ".join(labels), **content)
        return found

    def searched(self, variant: Variant) -> dict[str, list[Any]]:
        """The settings that are searched for a variant, with their values."""
        return {setting: values for setting, values in {**self.search, **variant.search}.items() if values}


class _Headline(Section):
    metrics: Metrics


def _text_keys(given: Any, depth: int = 2) -> Any:
    """Names in YAML that it reads as numbers, or on and off as truth values, as text again."""
    if not isinstance(given, dict) or depth == 0:
        return given
    words = {True: "on", False: "off"}
    return {
        words[key] if isinstance(key, bool) else str(key): _text_keys(value, depth - 1) for key, value in given.items()
    }


def slug(name: str) -> str:
    """`name` as part of a file name and as a system's name in a recipe."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def shipped() -> dict[str, Content]:
    """The experiments that come with the package, by name. A name with "_" is what others extend, and not listed."""
    names = sorted(entry.name.removesuffix(".yaml") for entry in LIBRARY.iterdir() if entry.name.endswith(".yaml"))
    return {name: _extended(_from_library(name), name) for name in names if not name.startswith("_")}


def _from_library(name: str) -> Content:
    content: Content = yaml.safe_load((LIBRARY / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


def load_experiment(
    name: str,
    *,
    scale: str | None = None,
    seeds: int | None = None,
    languages: Sequence[str] = (),
    reference: str | None = None,
) -> tuple[Experiment, str | None]:
    """Read and validate the definition of an experiment.

    Args:
        name: of a shipped experiment, a YAML file, or the results.json of an experiment, which is then done again.
        scale: one of the definition's `scales`, the first by default.
        seeds: number of seeds instead of the definition's.
        languages: to write, instead of those of the definition's `recipe`.
        reference: variant that the others are compared with, instead of the definition's.

    Returns:
        The definition with the scale's settings merged in, and the scale's name (None: there are none).

    Raises:
        ConfigError: there is no such experiment or scale, its parts have languages of their own that cannot be replaced
            by others, or the definition is not valid: all problems are listed.
    """
    content, recorded = _read(name)
    content = _extended(content, name)
    scales = content.pop("scales", None) or {}
    if not isinstance(scales, dict) or not all(isinstance(value, dict) for value in scales.values()):
        raise ConfigError("scales is not a mapping of names to settings", where=name, remedy="see docs/experiments.md")
    if scale is not None and scale not in scales and scale != recorded:
        listed = ", ".join(scales) or recorded or "no scales"
        raise ConfigError(f"this experiment has no scale {scale!r}; it has {listed}", where="--scale")
    chosen = scale or recorded or next(iter(scales), None)
    if chosen in scales:
        content = merge(content, scales[chosen])
    if isinstance(content.get("tasks"), dict):
        content["tasks"] = {task: said for task, said in content["tasks"].items() if said is not None}
    if seeds is not None:
        content["seeds"] = seeds
    if reference is not None:
        content["reference"] = reference
    if languages:
        content = merge(content, {"recipe": {"languages": list(languages)}})
    experiment = validated(Experiment, content, name)
    if languages:
        _check_replaceable(experiment)
    return experiment, chosen


def _check_replaceable(experiment: Experiment) -> None:
    """Refuse other languages for an experiment whose parts have their own, or whose data are of certain ones."""
    fixed = [where for where, part in experiment.contents() if "languages" in part and where != "recipe"]
    if not fixed and "{languages}" not in json.dumps([part for _, part in experiment.contents()]):
        fixed = ["data"]
    if fixed:
        raise ConfigError(
            f"this experiment is about certain languages ({', '.join(fixed)})",
            where="--languages",
            remedy="write a definition that extends it, with languages and data of its own (docs/experiments.md)",
        )


def _extended(content: Content, where: str) -> Content:
    """`content` on top of the shipped definition that it names in `extends`, if any."""
    base = content.get("extends")
    if base is None:
        return content
    if not isinstance(base, str) or not (LIBRARY / f"{base}.yaml").is_file():
        names = sorted(entry.name.removesuffix(".yaml") for entry in LIBRARY.iterdir())
        raise ConfigError(
            f"extends: there is no shipped definition {base!r}", where=where, remedy=f"name one of {', '.join(names)}"
        )
    own = {key: value for key, value in content.items() if key != "extends"}
    return merge(_extended(_from_library(base), base), own)


def _read(name: str) -> tuple[Content, str | None]:
    """The content of a definition, and the scale that a results.json was made at."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        known = shipped()
        if name not in known:
            raise ConfigError(
                f"there is no experiment {name!r}; there are {', '.join(known)}",
                remedy="name one of them, a YAML file, or the results.json of an experiment",
            )
        return known[name], None
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"the experiment is not readable: {error}", where=name, remedy="check the path and the file"
        ) from error
    if path.suffix == ".json":
        if not isinstance(content, dict) or not isinstance(content.get("experiment"), dict):
            raise ConfigError("this is not the results.json of an experiment", where=name, remedy="check the path")
        return content["experiment"], content.get("scale")
    if not isinstance(content, dict):
        raise ConfigError("the experiment is not a mapping of fields", where=name, remedy="see docs/experiments.md")
    return content, None
