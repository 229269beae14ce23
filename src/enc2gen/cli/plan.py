"""`enc2gen run --dry-run`: what a recipe would do."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from enc2gen.experiments.prepare import missing_files
from enc2gen.experiments.recipe import Recipe, as_yaml

if TYPE_CHECKING:
    from enc2gen.training.launch import Launch


def print_plan(path: Path, recipe: Recipe, console: Console) -> None:
    """Print the stages and the resolved settings of the recipe read from `path`.

    Under a launcher, all its processes meet and compare their recipes, and one of them prints.

    Raises:
        ConfigError: the launched processes have different recipes or settings.
    """
    launch = _launched(recipe)
    if launch is not None and not launch.main:
        return
    console.print(f"# {path} is valid. Output: {recipe.folder}", highlight=False, markup=False, soft_wrap=True)
    for name in missing_files(recipe):
        console.print(f"# Not there yet: {name}", highlight=False, markup=False, soft_wrap=True)
    if launch is not None:
        console.print(f"# Trained by {launch.describe()}", highlight=False, markup=False, soft_wrap=True)
    stages = ["prepare"]
    for name, config in recipe.variants.items():
        extension = config.extend_vocabulary
        changes = ["trimmed"] * config.trim_vocabulary
        if extension is not None:
            changes.append(f"extended ({extension.size} pieces, rows: {extension.initialisation.method})")
        stages.append(f"vocabulary {name}: {', '.join(changes) or 'as it is'}")
        if config.adapt is not None:
            steps = [f"{settings.max_steps:,} steps ({stage})" for stage, settings in config.adapt.stages().items()]
            stages.append(f"adapt {name}: masked-LM training, {', '.join(steps)}")
    stages += [f"build {name} ({system.preset})" for name, system in recipe.systems.items()]
    for stage in ("pretrain", "finetune"):
        section = getattr(recipe, stage)
        for name in recipe.systems:
            training = recipe.training(name, stage)
            if training is not None:
                line = f"{stage} {name}: {training.max_steps:,} steps, learning rate {training.learning_rate:g}"
                batch = f"; {launch.global_batch(training, section.batching)}" if launch is not None else ""
                stages.append(line + batch)
    stages += [f"evaluate {name}" for name in recipe.systems] + ["report"]
    for number, stage in enumerate(stages, start=1):
        console.print(f"# {number}. {stage}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        as_yaml(recipe, allow_unicode=console.encoding.startswith("utf")),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _launched(recipe: Recipe) -> Launch | None:
    """The processes of `torchrun` or `accelerate launch`; None where this is the only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from enc2gen.training.launch import rehearse

    return rehearse(hashlib.sha256(recipe.model_dump_json().encode()).hexdigest())
