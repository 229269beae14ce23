"""`enc2gen run` for bridge recipes: the dry run's plan, and the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

if TYPE_CHECKING:
    from enc2gen.experiments.bridge.recipe import BridgeRecipe


def listed(text: str | None) -> list[str]:
    """The entries of a comma-separated option."""
    return [entry.strip() for entry in (text or "").split(",") if entry.strip()]


def output_setting(folder: Path) -> str:
    """`--output` as a setting of a recipe: quoted, because the value of a setting is YAML, and a path is not."""
    quoted = yaml.safe_dump(str(folder), default_style='"', width=float("inf"))  # in one line, however long
    return f"output={quoted}"


def is_bridge_recipe(path: Path) -> bool:
    """Whether the file says `kind: bridge`; what is wrong with a file that cannot be read is said when it is loaded."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and content.get("kind") == "bridge"


def run_bridge(
    path: Path,
    languages: str | None,
    settings: Sequence[str] | None,
    output: Path | None,
    seed: int | None,
    overwrite: bool,
    dry_run: bool,
    only: Sequence[str] | None,
    console: Console,
) -> None:
    """Carry out the bridge recipe at `path`, or print its plan."""
    from enc2gen.experiments.bridge.recipe import load_bridge_recipe

    overrides = list(settings or [])
    if output is not None:
        overrides.append(output_setting(output))
    if seed is not None:
        overrides.append(f"seeds=[{seed}]")
    recipe = load_bridge_recipe(path, overrides, languages=listed(languages))
    if dry_run:
        print_bridge_plan(path, recipe, console)
        return
    from enc2gen.experiments.bridge.run import BridgeRun

    folder = BridgeRun(recipe, console, overwrite=overwrite, only=only or ()).run()
    console.print(
        f"output in {folder}" if only else f"report: {folder / 'report.html'}; tables: {folder / 'results.md'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def print_bridge_plan(path: Path, recipe: BridgeRecipe, console: Console) -> None:
    """Print what a run would do, and the resolved settings."""
    from enc2gen.experiments.recipe import as_yaml

    lines = [f"# {path} is valid. Output: {recipe.folder}", "# prepare"]
    for name in recipe.bridges:
        section = recipe.bridges[name]
        aligner = " + aligner" if section.aligner is not None else ""
        lines.append(f"# bridge {name}: {section.fusion} -> {section.mapper}{aligner}")
        searched = recipe.searched(name)
        if searched is not None:
            rates = ", ".join(f"{rate:g}" for rate in searched[1])
            lines.append(f"#   search: learning rates {rates} in stage {searched[0]}, seed {recipe.seeds_of(name)[0]}")
        for stage in recipe.stages_of(name):
            training = recipe.training(name, stage, recipe.seeds_of(name)[0])
            marked = searched is not None and stage.name == searched[0]
            rate = "chosen learning rate" if marked else f"learning rate {training.learning_rate:g}"
            tuning = recipe.tuning(name, stage)
            learning = [half for half in ("encoder", "llm") if getattr(tuning, half) != "frozen"]
            learns = " + ".join([*(["bridge"] if tuning.bridge else []), *learning])
            seeds = ", ".join(map(str, recipe.seeds_of(name)))
            lines.append(
                f"#   stage {stage.name}: {training.max_steps:,} steps, {rate}, {learns} learns, seeds {seeds}"
            )
    lines.append(f"# evaluate, against {', '.join(recipe.evaluate.controls) or 'nothing'}; report")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(
        as_yaml(recipe, allow_unicode=console.encoding.startswith("utf")),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
