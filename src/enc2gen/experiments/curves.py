"""Loss curves of all systems of a run, from `systems/NAME/{pretrain,finetune}/metrics.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from enc2gen.experiments.recipe import Recipe
from enc2gen.experiments.workspace import Workspace

STAGE_TITLES = {"pretrain": "Pretraining", "finetune": "Fine-tuning"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which readers with any kind of colour blindness can tell apart."""
DASHES = ("-", "--", ":", "-.")
_STYLE: Any = {"svg.fonttype": "path", "svg.hashsalt": "enc2gen", "font.size": 11, "axes.titlesize": 12}

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """Losses of one system in one stage, as (updates done, nats per target token)."""

    system: str
    stage: str
    training: Points
    validation: Points


def read_curves(recipe: Recipe, workspace: Workspace) -> list[Curve]:
    """Curves of every system and stage that wrote any; a half-written line is skipped."""
    curves = []
    for stage in STAGE_TITLES:
        for name in recipe.systems:
            path = workspace.system(name, stage, "metrics.jsonl")
            if getattr(recipe, stage) is not None and path.exists():
                training, validation = _points(path, "train", "loss"), _points(path, "validation", "mean")
                if training or validation:
                    curves.append(Curve(name, stage, training, validation))
    return curves


def _points(path: Path, kind: str, field: str) -> Points:
    points = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record: dict[str, Any] = json.loads(line)
            if record["kind"] == kind:
                value = record[field]
                points[int(record["step"])] = math.nan if value is None else float(value)
        except (ValueError, KeyError, TypeError):
            continue
    return sorted(points.items())


def draw_curves(curves: Sequence[Curve]) -> Figure:
    """One panel per stage, side by side on one scale: training loss thin, validation loss bold with dots."""
    stages = list(dict.fromkeys(curve.stage for curve in curves))
    systems = list(dict.fromkeys(curve.system for curve in curves))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        panels: Sequence[Axes] = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
        for panel, stage in zip(panels, stages, strict=True):
            panel.set_title(STAGE_TITLES[stage], loc="left", fontweight="bold")
            panel.set_xlabel("updates")
            panel.grid(color="#dddddd", linewidth=0.7)
            panel.spines[["top", "right"]].set_visible(False)
            for curve in curves:
                if curve.stage == stage:
                    _draw(panel, curve, systems.index(curve.system))
        panels[0].set_ylabel("loss (nats per target token)")
        _legend(figure, systems)
    return figure


def _draw(panel: Axes, curve: Curve, index: int) -> None:
    look = _look(index)
    if curve.training:
        panel.plot(*zip(*curve.training, strict=True), linewidth=0.9, alpha=0.65, **look)
    if curve.validation:
        panel.plot(*zip(*curve.validation, strict=True), linewidth=2.6, marker="o", markersize=5, **look)


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def _legend(figure: Figure, systems: Sequence[str]) -> None:
    handles: list[Line2D] = []
    for index, name in enumerate(systems):
        # A zero-width space keeps matplotlib from hiding names that start with an underscore.
        label = ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")
        handles.append(Line2D([], [], linewidth=2.6, label=label, **_look(index)))
    handles.append(Line2D([], [], color="#555555", linewidth=0.9, label="training loss"))
    handles.append(Line2D([], [], color="#555555", linewidth=2.6, marker="o", markersize=5, label="validation loss"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), frameon=False)


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure, 2000 pixels wide: sharp when shown at 1000."""
    with matplotlib.rc_context(_STYLE):
        figure.savefig(path, format="png", dpi=200, metadata={"Software": None})


def to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element to embed: no prologue, no metadata, nothing loaded from elsewhere."""
    buffer = StringIO()
    with matplotlib.rc_context(_STYLE):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
