"""Which runs a published model went through, and how far each of them trained it: read off where it started from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enc2gen.experiments.data_config import STAGE_NAMES, DatasetConfig, MonolingualConfig, StageName
from enc2gen.experiments.recipe import Recipe

Corpus = DatasetConfig | MonolingualConfig

_TRAINED: dict[str, tuple[StageName, ...]] = {"initial": (), "pretrained": ("pretrain",), "finetuned": STAGE_NAMES}
"""Folders of a system's models -> the stages that such a model has behind it, where the recipe has them."""


@dataclass(frozen=True)
class Passage:
    """A model's way through one run.

    Attributes:
        folder: of the run.
        recipe: of the run.
        system: which of its systems the model was.
        stages: those that trained the model, in their order. A run may have more of them: what goes on from
            `pretrained` has nothing of the fine-tuning.
    """

    folder: Path
    recipe: Recipe
    system: str
    stages: tuple[StageName, ...]

    @property
    def whole_model(self) -> str | None:
        """The model that this run went on from; None if it grew one from an encoder."""
        return self.recipe.systems[self.system].whole_model

    @property
    def base(self) -> str:
        """The model or encoder that this run began with."""
        return self.whole_model or self.recipe.encoder_of(self.system).name

    @property
    def corpora(self) -> list[Corpus]:
        """All of the run, whether the model was trained on them or not."""
        return [*self.recipe.data.datasets, *self.recipe.data.monolingual]

    def trained_on(self, corpus: Corpus) -> list[str]:
        """What read a corpus of this run: the adaptation of the encoder (`adapt`) and stages; empty if nothing did."""
        reading = ("pretrain",) if isinstance(corpus, MonolingualConfig) else corpus.stages
        adapts = self.recipe.grows(self.system) and self.recipe.encoder_of(self.system).adapt is not None
        return ["adapt"] * adapts + [stage for stage in self.stages if stage in reading]

    def results(self) -> Iterator[tuple[StageName, dict[str, Any]]]:
        """(Stage, what training it came to), as far as the run still has it."""
        for stage in self.stages:
            path = self.folder / "systems" / self.system / stage / "result.json"
            if path.exists():
                yield stage, json.loads(path.read_text(encoding="utf-8"))


def history(recipe: Recipe) -> list[Passage]:
    """The way of the recipe's main system: through this run first, then through the runs before it, the last first.

    A model that is not known to come out of a run ends it: one of the Hub, or in a folder of another form.
    """
    passages = [Passage(recipe.folder, recipe, recipe.main_system, _stages(recipe))]
    seen = {Path(os.path.abspath(recipe.folder))}  # a run may have replaced the one it started from
    while (start := passages[-1].recipe.systems[passages[-1].system].start) is not None:
        before = _passage(start)
        if before is None or before.folder in seen:
            break
        seen.add(before.folder)
        passages.append(before)
    return passages


def _stages(recipe: Recipe) -> tuple[StageName, ...]:
    return tuple(stage for stage in STAGE_NAMES if getattr(recipe, stage) is not None)


def _passage(start: str) -> Passage | None:
    """The run that left the model at `start`: in `model/`, its first system's last, or `systems/NAME/STAGE/`."""
    path = Path(os.path.abspath(start))
    if path.name == "model":
        folder, system, behind = path.parent, None, STAGE_NAMES
    elif path.name in _TRAINED and path.parent.parent.name == "systems":
        folder, system, behind = path.parents[2], path.parent.name, _TRAINED[path.name]
    else:
        return None
    recipe = _recorded(folder / "recipe.json")
    if recipe is None or (system is not None and system not in recipe.systems):
        return None
    stages = tuple(stage for stage in _stages(recipe) if stage in behind)
    return Passage(folder, recipe, system or recipe.main_system, stages)


def _recorded(path: Path) -> Recipe | None:
    """The recipe that a run keeps; None if there is none, or one of another kind or version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for stage in STAGE_NAMES:  # a resolved recipe has the stages' own seeds, which a recipe may not set
            if content.get(stage):
                content[stage]["training"].pop("seed", None)
        return Recipe(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
