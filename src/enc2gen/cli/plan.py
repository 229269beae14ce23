"""`enc2gen run --dry-run`: what a recipe would do."""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.console import Console

from enc2gen.experiments.recipe import Recipe


def print_plan(path: Path, recipe: Recipe, console: Console) -> None:
    """Print the stages and the resolved settings of the recipe read from `path`."""
    console.print(f"# {path} is valid. Output: {recipe.folder}", highlight=False, markup=False, soft_wrap=True)
    stages = ["prepare"] + [f"build {name} ({system.preset})" for name, system in recipe.systems.items()]
    for stage in ("pretrain", "finetune"):
        for name in recipe.systems:
            training = recipe.training(name, stage)
            if training is not None:
                stages.append(f"{stage} {name}: {training.max_steps:,} steps, learning rate {training.learning_rate:g}")
    stages += [f"evaluate {name}" for name in recipe.systems] + ["report"]
    for number, stage in enumerate(stages, start=1):
        console.print(f"# {number}. {stage}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
