"""Pictures of an experiment, drawn from `results.json` alone: learning curves, scores, scores against data size."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, NullFormatter, StrMethodFormatter

from enc2gen.corpora.languages import language_name
from enc2gen.experiments.curves import COLOURS, DASHES
from enc2gen.experiments.findings import FLOOR_LABELS, METRIC_LABELS

_STYLE: Any = {"font.size": 10, "axes.titlesize": 11, "text.parse_math": False, "font.family": ["DejaVu Sans"]}
_FLOOR_DASHES = {"copy_source": ":", "best_constant": "--"}
_GREY = "#777777"
_MARKERS = "osD^vPX*"
_MOST_COLUMNS = 4
_LETTER, _HANDLE = 0.08, 0.75
"""Inches that a letter takes on average (many are narrower), and a line of a legend with the space around it."""
_ROW, _LINE, _LABEL_LETTERS = 0.34, 0.6, 32
"""Inches from one row of a forest to the next, the part of that which a line of a label takes, and its letters."""


def draw_all(results: Mapping[str, Any]) -> Iterator[tuple[str, str, Figure]]:
    """(Name of the file, caption, picture) of every picture that these results have something for."""
    metric = METRIC_LABELS.get(headline(results), headline(results))
    if results["cells"]:
        caption = (
            f"{metric} with 95 % intervals; small dots: single seeds. Filled: the interval of the paired difference to "
            f"{label(results, results['experiment']['reference'])} excludes zero. Grey lines: systems without a model."
            + (" Each task with its largest number of training examples." if len(sizes(results)) > 1 else "")
        )
        yield "scores", caption, draw_scores(results)
    if results["curves"]:
        caption = (
            "Validation loss against tokens seen (source and target): mean over seeds, and the range of the seeds. "
            "Systems are not ranked on it."
        )
        yield "curves", caption, draw_curves(results)
    if len(sizes(results)) > 1:
        yield "sizes", f"{metric} against training examples, with 95 % intervals", draw_sizes(results)


def headline(results: Mapping[str, Any]) -> str:
    """Name of the metric that cells are compared in."""
    return str(results["headline"])


def label(results: Mapping[str, Any], variant: str) -> str:
    """What a variant is called in tables and pictures."""
    found = (place["label"] for place in results["grid"].values() if place["variant"] == variant)
    # Without a finished run, it has its name from the definition.
    own = results["experiment"].get("variants", {}).get(variant) or {}
    return str(next(found, own.get("label") or variant))


def variants(results: Mapping[str, Any]) -> list[str]:
    """Variants with a finished cell, in the experiment's order."""
    return list(dict.fromkeys(place["variant"] for place in results["grid"].values()))


def sizes(results: Mapping[str, Any]) -> list[int]:
    """Training sizes, ascending."""
    return sorted({place["size"] for place in results["grid"].values() if place["size"] is not None})


def groups(results: Mapping[str, Any]) -> dict[tuple[str, int | None], dict[str, str]]:
    """(Task, size) -> variant -> cell: the cells that are compared with each other."""
    found: dict[tuple[str, int | None], dict[str, str]] = {}
    for cell, place in results["grid"].items():
        found.setdefault((place["task"], place["size"]), {})[place["variant"]] = cell
    return found


def languages(results: Mapping[str, Any], cells: Sequence[str]) -> list[str]:
    """Languages that any of these cells has scores in."""
    return list(dict.fromkeys(tag for cell in cells for tag in results["cells"].get(cell, {})))


def group_title(task: str, size: int | None, *, single: bool = False) -> str:
    """`headlines, 500 examples`; empty for an experiment's only task."""
    parts = [*([] if single else [task]), *([f"{size:,} examples"] if size is not None else [])]
    return ", ".join(parts)


def excludes_zero(difference: Mapping[str, Any] | None) -> bool:
    """Whether the interval of a difference lies on one side of zero."""
    return difference is not None and (difference["low"] > 0 or difference["high"] < 0)


# Scores


def draw_scores(results: Mapping[str, Any]) -> Figure:
    """Forest of the headline metric: a panel per task (at its largest size) and language, a row per variant.

    Several tasks have a row of panels each; all panels have one scale.
    """
    shown = _largest(results)
    named = variants(results)
    labels = [textwrap.wrap(label(results, name), _LABEL_LETTERS) for name in named]
    high = _ROW * max(1.0, _LINE * max(map(len, labels)))
    wide = _LETTER * max(len(line) for lines in labels for line in lines)
    tags = languages(results, [cell for cells in shown.values() for cell in cells.values()])
    if len(shown) == 1 or len(tags) > _MOST_COLUMNS:
        tags = []  # as they come
    places = [
        (task, tag) if tag in own else None
        for task, cells in shown.items()
        if (own := languages(results, list(cells.values())))
        for tag in tags or own
    ]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(places, height=1.1 + high * len(named), margin=wide, columns=len(tags), share=True)
        for axis, (task, tag) in zip(axes, filter(None, places), strict=True):
            _forest(axis, results, shown[task], task, tag, named)
            axis.set_title(_panel_title(results, task, tag), loc="left", fontweight="bold")
            axis.set_xlabel(METRIC_LABELS.get(headline(results), headline(results)))
        for axis in axes:
            axis.set_yticks(range(len(named)), ["\n".join(lines) for lines in labels])
            axis.set_ylim(len(named) - 0.5, -0.5)
        floors = {name for task in shown for name in results["floors"].get(task, {})}
        _legend(figure, [(text, _floor_look(name)) for name, text in FLOOR_LABELS.items() if name in floors])
    return figure


def _floor_look(floor: str) -> dict[str, Any]:
    return {"color": _GREY, "linestyle": _FLOOR_DASHES[floor], "linewidth": 1.2, "zorder": 1}


def _largest(results: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Task -> variant -> cell, at the largest size of the task."""
    found = groups(results)
    largest = {task: max((size or 0 for other, size in found if other == task), default=0) for task, _ in found}
    return {task: cells for (task, size), cells in found.items() if (size or 0) == largest[task]}


def _panel_title(results: Mapping[str, Any], task: str, tag: str) -> str:
    tasks = {place["task"] for place in results["grid"].values()}
    return language_name(tag) if len(tasks) == 1 else f"{task}: {language_name(tag)}"


def _forest(
    axis: Axes, results: Mapping[str, Any], cells: Mapping[str, str], task: str, tag: str, named: Sequence[str]
) -> None:
    metric = headline(results)
    for row, variant in enumerate(named):
        score = results["cells"].get(cells.get(variant, ""), {}).get(tag, {}).get(metric)
        if score is None:
            continue
        is_reference = variant == results["experiment"]["reference"]
        sure = is_reference or excludes_zero(results["paired"].get(cells[variant], {}).get(tag))
        colour = COLOURS[1] if is_reference else COLOURS[0]
        axis.plot([score["low"], score["high"]], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
        face = colour if sure else "white"
        axis.plot([score["value"]], [row], "o", color=colour, markerfacecolor=face, markersize=7, markeredgewidth=1.6)
        seeds = list(score["seeds"].values())
        if len(seeds) > 1:
            axis.plot(seeds, [row + 0.24] * len(seeds), ".", color=_GREY, markersize=4)
    for name, by_language in results["floors"].get(task, {}).items():
        if (floor := (by_language.get(tag) or {}).get(metric)) is not None:
            axis.axvline(floor["value"], **_floor_look(name))


# Curves


def draw_curves(results: Mapping[str, Any]) -> Figure:
    """Validation loss against tokens seen: a panel per stage and task, a line per variant, a band over seeds."""
    named = variants(results) or list(dict.fromkeys(name for panel in results["curves"].values() for name in panel))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(list(results["curves"]), height=3.4)
        for axis, (title, panel) in zip(axes, results["curves"].items(), strict=True):
            for index, variant in enumerate(named):
                if variant in panel:
                    _band(axis, panel[variant], _look(index))
            axis.set_title(title, loc="left", fontweight="bold")
            axis.set_xlabel("tokens seen")
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes[0].set_ylabel("validation loss\n(nats per target token)")
        _legend(figure, [(label(results, name), _look(index)) for index, name in enumerate(named)])
    return figure


def _band(axis: Axes, seeds: Mapping[str, Sequence[Sequence[float | None]]], look: Mapping[str, Any]) -> None:
    """Mean line and range of the seeds, as far as all of them were trained."""
    shortest = min(len(points) for points in seeds.values())
    values = np.array([points[:shortest] for points in seeds.values()], dtype=float)  # [seeds, points, 2]
    tokens, losses = values[..., 0].mean(axis=0), values[..., 1]
    axis.plot(tokens, losses.mean(axis=0), linewidth=2.0, marker="o", markersize=3.5, **look)
    if len(losses) > 1:
        axis.fill_between(tokens, losses.min(axis=0), losses.max(axis=0), color=look["color"], alpha=0.18, linewidth=0)


# Sizes


def draw_sizes(results: Mapping[str, Any]) -> Figure:
    """Headline metric against the number of training examples: a panel per task and language, a line per variant."""
    metric, named = headline(results), variants(results)
    tasks = list(dict.fromkeys(task for task, size in groups(results) if size is not None))
    by_task = {task: [cell for cell, place in results["grid"].items() if place["task"] == task] for task in tasks}
    places = [(task, tag) for task, cells in by_task.items() for tag in languages(results, cells)]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(places, height=3.2)
        for axis, (task, tag) in zip(axes, places, strict=True):
            for index, variant in enumerate(named):
                # A little apart from each other, so that intervals do not hide behind one another.
                shift = 1.0 + 0.03 * (index - (len(named) - 1) / 2)
                _size_line(
                    axis, results, [c for c in by_task[task] if _is(results, c, variant)], tag, metric, shift, index
                )
            axis.set_xscale("log")
            axis.set_xticks(sizes(results))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_title(_panel_title(results, task, tag), loc="left", fontweight="bold")
            axis.set_xlabel("training examples")
        axes[0].set_ylabel(METRIC_LABELS.get(metric, metric))
        _legend(figure, [(label(results, name), _marked(index)) for index, name in enumerate(named)])
    return figure


def _is(results: Mapping[str, Any], cell: str, variant: str) -> bool:
    return bool(results["grid"][cell]["variant"] == variant)


def _size_line(
    axis: Axes, results: Mapping[str, Any], cells: Sequence[str], tag: str, metric: str, shift: float, index: int
) -> None:
    found = {results["grid"][cell]["size"]: results["cells"].get(cell, {}).get(tag, {}).get(metric) for cell in cells}
    points = [(size * shift, found[size]) for size in sorted(found) if found[size] is not None]
    if points:
        x, values = [place for place, _ in points], [score["value"] for _, score in points]
        # Percentile intervals need not contain the score itself.
        errors = [
            [max(0.0, score["value"] - score["low"]) for _, score in points],
            [max(0.0, score["high"] - score["value"]) for _, score in points],
        ]
        axis.errorbar(x, values, yerr=errors, linewidth=1.8, capsize=2.5, **_marked(index))


# Common


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def _marked(index: int) -> dict[str, Any]:
    return {**_look(index), "marker": _MARKERS[index % len(_MARKERS)], "markersize": 5}


def _panels(
    places: Sequence[Any], *, height: float, margin: float = 0.0, columns: int = 0, share: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each place but None, each `height` inches high; `margin` inches left of them.

    At most four are in a row unless `columns` says how many; with `share`, all have the same axes.
    """
    columns = columns or min(len(places), _MOST_COLUMNS)
    rows = -(-len(places) // columns)
    figure = Figure(figsize=(max(5.0, 3.3 * columns + max(1.2, margin)), height * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False).ravel().tolist()
    shown = []
    for number, axis in enumerate(grid):
        if number >= len(places) or places[number] is None:
            axis.set_frame_on(False)  # names of rows remain, in the first column
            axis.tick_params(left=False, bottom=False, labelbottom=False)
            axis.set_visible(share and number < len(places) and number % columns == 0)
            continue
        shown.append(axis)
        axis.tick_params(labelbottom=True)
        axis.grid(color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, shown


def _legend(figure: Figure, lines: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Lines below the panels, as (label, how it looks)."""
    if not lines:
        return
    # A zero-width space keeps matplotlib from hiding names that start with an underscore.
    handles = [
        Line2D([], [], label=f"\u200b{text}" if text.startswith("_") else text, **{"linewidth": 2.2, **look})
        for text, look in lines
    ]
    # As many columns as the longest name leaves room for: a legend wider than the figure is cut at both sides.
    room = figure.get_figwidth() / (max(len(text) for text, _ in lines) * _LETTER + _HANDLE)
    columns = max(1, min(4, len(handles), int(room)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
