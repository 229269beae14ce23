"""From a definition to runs: variants x tasks x sizes x seeds, each as a recipe of its own in a folder of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from enc2gen.errors import ConfigError
from enc2gen.experiments.data_config import STAGE_NAMES, drop_licences
from enc2gen.experiments.grid.checks import check_start
from enc2gen.experiments.grid.definition import Content, Experiment, Variant, slug
from enc2gen.experiments.grid.plan import ONLY_TASK, GridRun, RunKind
from enc2gen.experiments.recipe import Recipe, digest, merge, validated

Settings = tuple[tuple[str, Any], ...]
"""Searched settings, dotted, and their values."""

DATA = "{data}"
"""In paths of a definition: the folder of --data."""

BEFORE_TASKS = ("pretrain.", "system.", "encoder.")
"""Settings with these beginnings concern the pretraining run, too, but for those of `OF_TASKS`."""

OF_TASKS, OF_PRETRAINING = "system.finetune.", ("pretrain.", "system.pretrain.")
"""Beginnings of settings that concern tasks alone, and pretraining alone."""


@dataclass
class Planner:
    """Makes the runs of an experiment; equal training is planned once.

    All variants are planned, whichever are asked for: what a run shares with another variant, and hence what it needs
    and is called, does not depend on that.

    Args:
        experiment: what is compared.
        folder: of the experiment.
        data: what `{data}` stands for in paths; None if it is not known.
        only: variants to carry out, with what they need of others; all if empty.
        searching: the runs of the search of all variants, once they are planned.

    Raises:
        ConfigError: `only` names something else.
    """

    experiment: Experiment
    folder: Path
    data: Path | None = None
    only: tuple[str, ...] = ()
    _pretrained: dict[str, GridRun] = field(default_factory=dict)
    _trained: dict[str, GridRun] = field(default_factory=dict)
    searching: list[GridRun] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = self.experiment.all_variants
        if unknown := [name for name in self.only if name not in names]:
            raise ConfigError(
                f"there is no variant {', '.join(unknown)}; there are {', '.join(names)}",
                where="--only",
                remedy="name these, as they are written here",
            )

    @property
    def variants(self) -> dict[str, Variant]:
        """The variants that are carried out, by name."""
        return {name: variant for name, variant in self.every.items() if not self.only or name in self.only}

    @property
    def every(self) -> dict[str, Variant]:
        """All variants, by name."""
        return self.experiment.all_variants

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.experiment.tasks) or [ONLY_TASK]

    def searches(self) -> list[GridRun]:
        """The runs of the search, with what they need: first seed, largest size.

        What a variant without a search trains is its own, and a search that trains the same takes it over from there.
        """
        found: list[GridRun] = []
        self.searching = []
        wanted = self.variants
        size = max(self.experiment.sizes, default=None)
        for name, variant in self.every.items():
            if not points(self.searched(name, variant)):
                for task in self.tasks:
                    list(self._runs(name, task, size, self.experiment.seeds[0], (), "task"))
        for name, variant in self.every.items():
            for settings in points(self.searched(name, variant)):
                for task in self.tasks:
                    made = list(self._runs(name, task, size, self.experiment.seeds[0], settings, "search"))
                    if made[-1].settings != settings:
                        raise ConfigError(
                            f"{_said(settings)} trains the same model as {_said(made[-1].settings)}",
                            where=f"{self.experiment.name}: search of {name}",
                            remedy="search a setting that this variant does not replace by its own",
                        )
                    self.searching.append(made[-1])
                    found += made if name in wanted else []
        return _once([needed for run in found for needed in _with_needs(run)])

    def searched(self, name: str, variant: Variant) -> dict[str, list[Any]]:
        """The settings that are searched for a variant; those of a pretraining that it does not have are left out."""
        given = self.experiment.searched(variant)
        if variant.pretraining is False:
            return {setting: values for setting, values in given.items() if not setting.startswith(OF_PRETRAINING)}
        return given

    def runs(self, chosen: Mapping[str, Settings]) -> list[GridRun]:
        """Every pretraining and task run, with the settings that were chosen for each variant.

        What was planned for a search is known here; what another choice would need is not.
        """
        return replace(self, _pretrained=dict(self._pretrained), _trained=dict(self._trained))._chosen_runs(chosen)

    def _chosen_runs(self, chosen: Mapping[str, Settings]) -> list[GridRun]:
        found: list[GridRun] = []
        wanted = self.variants
        sizes: list[int | None] = [*self.experiment.sizes] or [None]
        for name, variant in self.every.items():
            if name not in chosen and self.searched(name, variant):
                continue  # its search failed, and so would these
            for task, size in itertools.product(self.tasks, sizes):
                for seed in self.experiment.seeds:
                    made = list(self._runs(name, task, size, seed, chosen.get(name, ()), "task"))
                    # What the search has done is in its list.
                    needs = [need for run in made for need in _with_needs(run)] if self.only else made
                    found += [run for run in needs if run.kind != "search"] if name in wanted else []
        return _once(found)

    def _runs(
        self, name: str, task: str, size: int | None, seed: int, settings: Settings, kind: RunKind
    ) -> Iterator[GridRun]:
        """The run, after the pretraining run that it starts from, if any."""
        start = None
        if self.experiment.pretraining is not None:
            start = self._pretraining(name, seed, settings)
            yield start
        content = self._task_content(name, task, size, settings)
        if start is not None:
            content = _going_on(content, start, own_pretraining="pretrain" in self._own(name, task))
        if kind == "search":
            content = merge(content, {"evaluate": {"split": "dev"}})
        cell = "/".join(
            [name] + ([task] if len(self.tasks) > 1 else []) + ([str(size)] if len(self.experiment.sizes) > 1 else [])
        )
        parts = [name, *([task] if self.experiment.tasks else []), *([str(size)] if size is not None else [])]
        training = self._training_hash({**content, "seed": seed}, start, cell)
        same = self._trained.get(training)
        if start is not None:
            content = {**content, "system": {**content["system"], "start": start.model.as_posix()}}
        system = same.recipe.main_system if same is not None else slug(name)
        whole = digest([training, content.get("evaluate")])
        run = self._run(cell, name, parts, seed, content, system, whole, kind, start=start, settings=settings)
        made = GridRun(**{**run, "task": task, "size": size, "same_training": same})
        self._check_headline(made)
        if start is not None:
            check_start(start, made.recipe, f"{self.experiment.name}: {cell}")
        if same is not None and same.folder == made.folder:
            yield same if same.kind == kind else made
            return
        self._trained.setdefault(training, made)
        yield made

    def _check_headline(self, run: GridRun) -> None:
        """Nothing could be compared or chosen by a metric that is not measured."""
        headline, metrics = self.experiment.headline, run.recipe.evaluate.metrics
        if headline not in metrics:
            raise ConfigError(
                f"the headline metric {headline} is not measured; evaluate.metrics has {', '.join(metrics)}",
                where=f"{self.experiment.name}: {run.cell}",
                remedy=f"add {headline} to evaluate.metrics, or name one of these as headline",
            )

    def _pretraining(self, name: str, seed: int, settings: Settings) -> GridRun:
        variant = self.every[name]
        trains = variant.pretraining is not False
        content = merge(self.experiment.recipe, self.experiment.pretraining or {})
        content = merge(merge(content, variant.recipe), variant.pretraining or {})
        content = {key: value for key, value in content.items() if key not in ("finetune", "evaluate")}
        system = merge(self.experiment.system, variant.system)
        content["system"] = {key: value for key, value in system.items() if key != "finetune"}
        before = [found for found in settings if found[0].startswith(BEFORE_TASKS)]
        content = _with_settings(content, tuple(found for found in before if not found[0].startswith(OF_TASKS)))
        content = self._located(content, name)
        stage = "pretrain" if trains else "build"
        whole = digest([self._training_hash({**content, "seed": seed}, None, f"{name}, pretraining"), stage])
        if whole in self._pretrained:
            return self._pretrained[whole]
        parts = [name, "pretraining" if trains else "untrained"]
        run = self._run(name, name, parts, seed, content, slug(name), whole, "pretrain")
        self._pretrained[whole] = GridRun(**{**run, "stage": stage})
        return self._pretrained[whole]

    def _own(self, name: str, task: str) -> Content:
        """What the experiment and the variant say about one task alone."""
        return merge(self.experiment.tasks.get(task, {}), self.every[name].tasks.get(task, {}))

    def _task_content(self, name: str, task: str, size: int | None, settings: Settings) -> Content:
        variant = self.every[name]
        content = merge(self.experiment.recipe, self.experiment.tasks.get(task, {}))
        content = merge(merge(content, variant.recipe), variant.tasks.get(task, {}))
        content = _with_settings({**content, "system": merge(self.experiment.system, variant.system)}, settings)
        return self._located(_limited(content, size) if size is not None else content, name)

    def _located(self, content: Content, variant: str) -> Content:
        """`content` with `{data}` replaced."""
        text = json.dumps(content)
        if DATA not in text:
            return content
        if self.data is None:
            raise ConfigError(
                f"the paths of this experiment begin with {DATA}, and no folder of data is known",
                where=f"{self.experiment.name}: {variant}",
                remedy="name the folder with --data",
            )
        located: Content = json.loads(text.replace(DATA, json.dumps(self.data.as_posix())[1:-1]))
        return located

    def _training_hash(self, content: Content, start: GridRun | None, where: str) -> str:
        """Of everything that decides the trained model: settings with equal effect, however given, have equal hashes.

        Defaults are left out, so that a new setting whose default changes nothing leaves old hashes as they are.
        """
        recipe = self._recipe(content, "run", "system", content["seed"], where)
        said = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"name", "output", "description"})
        said.pop("evaluate", None)
        drop_licences(said["data"])
        kept = ("preset", "options", "start", "trainer")
        system = {key: value for key, value in said.pop("systems")["system"].items() if key in kept}
        said["encoder"] = recipe.encoder_of("system").model_dump(mode="json", exclude_defaults=True)
        for stage in STAGE_NAMES:
            if (training := recipe.training("system", stage)) is not None:
                said[stage]["training"] = training.model_dump(mode="json", exclude_defaults=True)
        return digest([{**said, "system": system, "seed": recipe.seed}, start.name.rpartition("-")[2] if start else ""])

    def _recipe(self, content: Content, name: str, system: str, seed: int, where: str) -> Recipe:
        said = {key: value for key, value in content.items() if key not in ("system", "seed")}
        return validated(
            Recipe,
            {"name": name, "seed": seed, **said, "systems": {system: content["system"]}},
            f"{self.experiment.name}: {where}",
        )

    def _run(
        self,
        cell: str,
        variant: str,
        parts: list[str],
        seed: int,
        content: Content,
        system: str,
        whole: str,
        kind: RunKind,
        *,
        start: GridRun | None = None,
        settings: Settings = (),
    ) -> dict[str, Any]:
        name = "-".join([*map(slug, parts), f"seed{seed}", whole[:8]])
        folder = self.folder / "runs" / name
        said = {"description": f"{self.experiment.name}: {cell}, seed {seed}", **content, "output": folder.as_posix()}
        recipe = self._recipe(said, name, system, seed, cell)
        return {
            "cell": cell,
            "variant": variant,
            "task": None,
            "size": None,
            "seed": seed,
            "folder": folder,
            "recipe": recipe,
            "kind": kind,
            "start": start,
            "stage": "evaluate" if kind == "search" else "report",
            "settings": settings,
        }


def _going_on(content: Content, start: GridRun, *, own_pretraining: bool) -> Content:
    """The content of a task's run that starts from another run's model, which brings vocabulary and layers along.

    Preset and options say what the model is; the start itself is not in it, as the name of its folder is no setting.
    """
    system = content["system"]
    kept = content if own_pretraining else {key: value for key, value in content.items() if key != "pretrain"}
    dropped = {"encoder", "start", *(() if own_pretraining else ("pretrain",))}
    return {
        **kept,
        "encoder": {"name": start.recipe.encoder_of(start.recipe.main_system).name},
        "system": {key: value for key, value in system.items() if key not in dropped},
    }


def _limited(content: Content, size: int) -> Content:
    """`content` with `size` training examples per data set; one without data sets is left to the recipe's checks."""
    data = content.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("datasets"), list):
        return content
    limit = {"train_limit": size}
    sets = [merge(dataset, limit) if isinstance(dataset, Mapping) else dataset for dataset in data["datasets"]]
    return {**content, "data": {**data, "datasets": sets}}


def points(searched: Mapping[str, list[Any]]) -> list[Settings]:
    """Every combination of the values of searched settings; none if nothing is searched."""
    if not searched:
        return []
    return [tuple(zip(searched, values, strict=True)) for values in itertools.product(*searched.values())]


def _said(settings: Settings) -> str:
    return ", ".join(f"{setting}={value}" for setting, value in settings)


def _with_settings(content: Content, settings: Settings) -> Content:
    """`content` with dotted settings on top."""
    for setting, value in settings:
        for key in reversed(setting.split(".")):
            value = {key: value}
        content = merge(content, value)
    return content


def _with_needs(run: GridRun) -> Iterator[GridRun]:
    """All that a run needs, first what it needs itself; then the run."""
    for need in run.needs:
        yield from _with_needs(need)
    yield run


def _once(runs: list[GridRun]) -> list[GridRun]:
    """Each run once, in order."""
    return list({(run.folder, run.cell, run.kind): run for run in runs}.values())
