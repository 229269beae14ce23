"""Pictures of bridges: weights by language and by token, alignment by layer, alignment against accuracy.

Text is drawn as outlines, so a picture looks the same wherever it is opened; which fonts can be drawn with is known
only on the machine that makes it. See :func:`piece_labels` for pieces in scripts that no font here can draw.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import ArrayLike

from enc2gen.corpora.languages import default_script, normalise_language
from enc2gen.errors import ConfigError, LanguageError, OutputError
from enc2gen.evaluation.alignment import AlignmentTable, Correlation
from enc2gen.evaluation.layer_weights import LayerWeights, TokenWeights
from enc2gen.evaluation.parallel_texts import language_label
from enc2gen.evaluation.significance import Floats
from enc2gen.experiments.curves import COLOURS, save_png, to_svg

BASE_FONT = "DejaVu Sans"  # comes with matplotlib: Latin, Cyrillic, Greek, Arabic, Armenian, Georgian, Lao
_NUMBER_WIDTH = 0.05  # of the numbers beside the pieces, as a share of the picture's width
_PIECES_SHOWN = 60  # rows of the tokens' picture (our choice)
_MARKERS = "osD^vP*X<>"
_UNSHAPED = frozenset(
    ("LATIN", "CYRILLIC", "GREEK", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "ARMENIAN", "GEORGIAN", "ETHIOPIC")
)
"""First words of the Unicode names of letters that look the same beside any other."""
_STYLE: Any = {
    "svg.fonttype": "path",
    "svg.hashsalt": "enc2gen",
    "font.family": [BASE_FONT],
    "font.size": 10,
    "axes.titlesize": 12,
    "text.parse_math": False,
}


def save_figure(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write `path`.png (200 dots per inch) and `path`.svg, whatever the suffix of `path`.

    Raises:
        OutputError: they cannot be written.
    """
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(_STYLE):
            save_png(figure, png)
            svg.write_text(to_svg(figure), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"the picture cannot be written ({error.strerror})", where=str(png), remedy="check the folder's rights"
        ) from error
    return png, svg


# Pieces in many scripts


@lru_cache(maxsize=1)
def _installed_fonts() -> list[tuple[str, str]]:
    """(family, file) of each installed regular sans or serif font, sans first."""
    entries = {
        entry.name: entry.fname
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal"
        and str(entry.weight) in {"400", "normal", "regular"}
        and entry.name != BASE_FONT
        and "Last Resort" not in entry.name  # has a box for every character
    }
    return sorted(entries.items(), key=lambda item: ("Sans" not in item[0], "CJK" not in item[0], item[0]))


@lru_cache(maxsize=512)
def _characters(file: str) -> frozenset[int]:
    try:
        return frozenset(ft2font.FT2Font(file).get_charmap())
    except (OSError, RuntimeError):  # a font file that FreeType refuses
        return frozenset()


def fonts_for(text: str) -> list[str] | None:
    """Families that together draw every character of `text`, the base font first; None if some character has none."""
    base = _characters(font_manager.findfont(BASE_FONT))
    families = [BASE_FONT]
    missing = {ord(char) for char in text if not char.isspace()} - base
    while missing:
        best = max(_installed_fonts(), key=lambda item: len(missing & _characters(item[1])), default=None)
        if best is None or not missing & _characters(best[1]):
            return None
        families.append(best[0])
        missing -= _characters(best[1])
    return families


def shapes_text() -> bool:
    """Whether this matplotlib shapes text (joins Arabic letters, stacks Tibetan ones): from 3.11 on."""
    return hasattr(ft2font, "__libraqm_version__")


def _needs_shaping(text: str) -> bool:
    """Whether letters change their form or order beside others, so that one glyph a character would be wrong."""
    letters = (char for char in text if unicodedata.category(char)[0] in "LM")
    return any(unicodedata.name(char, "").split(" ")[0] not in _UNSHAPED for char in letters)


def piece_labels(pieces: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Label and font families of each piece of a text; the label is empty where this machine cannot spell the piece.

    It can if the installed fonts have all its characters and, where the script needs shaping, this matplotlib shapes.
    Pieces are numbered in pictures, so one without a label is still told; nothing is transliterated. SentencePiece's
    "▁" (a space before the piece) is drawn as "·".
    """
    labels = []
    for piece in pieces:
        shown = piece.replace("\u2581", "\N{MIDDLE DOT}")
        families = fonts_for(shown) if shapes_text() or not _needs_shaping(shown) else None
        labels.append((shown, families) if families else ("", [BASE_FONT]))
    return labels


# Heat maps


def draw_language_weights(rows: Sequence[LayerWeights], layers: Sequence[int], *, title: str = "") -> Figure:
    """Heat map of learned weights, languages x layers, in percent.

    Args:
        rows: from `language_weights`.
        layers: the encoder's layer of each column, from `layer_numbers`.
    """
    values = 100.0 * np.stack([row.weights for row in rows])
    labels = [language_label(row.name) for row in rows]
    plain = 100.0 / len(layers)
    return _heat_map(
        values, labels, layers, title=title or "Weight of each layer", unit=f"weight (%)\n{plain:.1f} in a plain mean"
    )


def draw_alignment(table: AlignmentTable, *, title: str = "") -> Figure:
    """Heat map of MEXA, languages x layers (0 is the embedding output), in percent; the best language on top."""
    values = np.array([row.layers for row in table.languages])
    labels = [language_label(row.language) for row in table.languages]
    unit = f"MEXA (%)\n{table.sentences} sentences"
    return _heat_map(
        values, labels, range(values.shape[1]), title=title or "Alignment with English", unit=unit, limits=(0.0, 100.0)
    )


def draw_token_weights(
    weights: TokenWeights, layers: Sequence[int], *, title: str = "", highest: float | None = None
) -> Figure:
    """Heat map of the weights of each token of one text, tokens x layers, in percent; at most 60 tokens.

    Tokens are numbered, and spelt as far as :func:`piece_labels` can.

    Args:
        highest: weight, from 0 to 1, of the darkest colour, so that pictures can be compared; none: the largest here.
    """
    labels = piece_labels(weights.tokens[:_PIECES_SHOWN])
    values = 100.0 * weights.weights[:_PIECES_SHOWN]
    numbers = [str(number) for number in range(1, len(labels) + 1)]
    limits = None if highest is None else (0.0, 100.0 * highest)
    title = title or "Weight of each layer"
    figure = _heat_map(values, numbers, layers, title=title, unit="weight (%)", limits=limits)
    axes = figure.axes[0]
    for row, (label, families) in enumerate(labels):
        place = axes.get_yaxis_transform()
        axes.text(-_NUMBER_WIDTH, row, label, transform=place, ha="right", va="center", family=families)
    notes = []
    if len(weights.tokens) > _PIECES_SHOWN:
        notes.append(f"the first {_PIECES_SHOWN} of {len(weights.tokens)} pieces")
    if unspelt := sum(not label for label, _ in labels):
        notes.append(f"{unspelt} pieces have a number only: no font installed here can draw them")
    if notes:
        axes.annotate("\n".join(notes), (0, 0), (0, -44), "axes fraction", "offset points", fontsize=8, color="#555555")
    return figure


def _heat_map(
    values: Floats,
    labels: Sequence[str],
    layers: Iterable[int],
    *,
    title: str,
    unit: str,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """`values`, `[rows, layers]`, with the figure in every cell where there is room."""
    columns = [str(layer) for layer in layers]
    if values.shape != (len(labels), len(columns)) or not values.size:
        raise ConfigError(f"{values.shape} values for {len(labels)} rows and {len(columns)} layers")
    low, high = limits or (0.0, max(float(values.max()), 1e-9))
    with matplotlib.rc_context(_STYLE):
        width = 3.4 + 0.46 * len(columns)
        figure = Figure(figsize=(max(6.0, width), 1.5 + 0.25 * max(4, len(labels))), layout="constrained")
        axes: Axes = figure.subplots()
        image = axes.imshow(values, cmap="YlGnBu", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("layer of the encoder")
        axes.set_title(title, loc="left", fontweight="bold")
        bar = figure.colorbar(image, ax=axes, label=unit, aspect=30, pad=0.02)
        bar.outline.set_visible(False)
        _write_cells(axes, values, low, high)
    return figure


def _write_cells(axes: Axes, values: Floats, low: float, high: float) -> None:
    for row, column in np.ndindex(*values.shape):
        dark = (values[row, column] - low) / (high - low) > 0.55
        axes.text(
            column,
            row,
            f"{values[row, column]:.0f}",
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if dark else "black",
        )


# Alignment against accuracy


def draw_scatter(
    scores: Mapping[str, float],
    accuracies: Mapping[str, float],
    found: Correlation | None = None,
    *,
    x_label: str = "alignment with English (MEXA, %)",
    y_label: str = "accuracy (%)",
    title: str = "",
) -> Figure:
    """One named point per language that both have, coloured and shaped by script; the correlation below the title."""
    common = [name for name in scores if name in accuracies]
    if not common:
        raise ConfigError("no language has both a score and an accuracy", remedy="name the languages alike in both")
    scripts = _scripts(common)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained")
        axes: Axes = figure.subplots()
        for index, (script, names) in enumerate(scripts.items()):
            axes.scatter(
                [scores[name] for name in names],
                [accuracies[name] for name in names],
                label=script,
                color=COLOURS[index % len(COLOURS)],
                marker=_MARKERS[index % len(_MARKERS)],
                s=36,
                zorder=3,
            )
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(0.06)
        heading = title or "Alignment before training, accuracy after it"
        axes.set_title(heading + (f"\n{found}" if found else ""), loc="left", fontsize=11)
        figure.legend(loc="outside right upper", frameon=False, title="script", alignment="left")
        FigureCanvasAgg(figure)
        _name_points(figure, axes, [(scores[n], accuracies[n], language_label(n)) for n in common])
    return figure


def _scripts(names: Sequence[str]) -> dict[str, list[str]]:
    """Languages by script, the commonest script first; those of a single language go together."""
    import langcodes

    found: dict[str, list[str]] = {}
    for name in names:
        try:
            tag = normalise_language(name)
            script = langcodes.Language.make(script=default_script(tag)).script_name()
        except LanguageError:
            script = "unknown"
        found.setdefault(script, []).append(name)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    shown = {script: languages for script, languages in ordered if len(languages) > 1}
    if rest := [name for languages in found.values() if len(languages) == 1 for name in languages]:
        shown["others"] = rest
    return shown


def _name_points(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name at the nearest place that covers neither a point nor another name, with a line if it is far.

    Where a crowd leaves no place at all, the last one tried is taken: no language stays without its name.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the names fit this layout
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    placed = _boxes(axes, points)
    for x, y, name in sorted(points, key=lambda point: (point[1], point[0])):
        for distance, (right, up, ha, va) in product(_DISTANCES, _DIRECTIONS):
            line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6} if distance > _DISTANCES[0] else None
            text = axes.annotate(
                name,
                (x, y),
                (right * distance, up * distance),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=7.5,
                color="#333333",
                arrowprops=line,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the line
            last = (distance, right, up) == (_DISTANCES[-1], *_DIRECTIONS[-1][:2])
            if last or (not any(box.overlaps(other) for other in placed) and _inside(axes, box)):
                placed.append(box)
                break
            text.remove()


_DISTANCES = (6, 16, 28, 42, 58, 76, 96, 120)  # points
_DIRECTIONS: tuple[tuple[int, int, Any, Any], ...] = (
    (1, 0, "left", "center"), (-1, 0, "right", "center"), (0, 1, "center", "bottom"), (0, -1, "center", "top"),
    (1, 1, "left", "bottom"), (-1, 1, "right", "bottom"), (1, -1, "left", "top"), (-1, -1, "right", "top"),
)  # fmt: skip


def _boxes(axes: Axes, points: Sequence[tuple[float, float, ArrayLike]]) -> list[Any]:
    from matplotlib.transforms import Bbox

    centres = axes.transData.transform([(x, y) for x, y, _ in points])
    half = 3.5 * axes.figure.dpi / 72  # of a marker, in pixels
    return [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in centres]


def _inside(axes: Axes, box: Any) -> bool:
    area = axes.get_window_extent()
    return bool(area.x0 <= box.x0 and box.x1 <= area.x1 and area.y0 <= box.y0 and box.y1 <= area.y1)
