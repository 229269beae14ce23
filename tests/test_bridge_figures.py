"""Pictures hold what they are given, in any script, and say what they cannot draw."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from enc2gen.errors import ConfigError
from enc2gen.evaluation.alignment import AlignmentTable, LanguageAlignment, correlation
from enc2gen.evaluation.layer_weights import LayerWeights, TokenWeights
from enc2gen.experiments.bridge import figures
from enc2gen.experiments.bridge.figures import (
    BASE_FONT,
    draw_alignment,
    draw_language_weights,
    draw_scatter,
    draw_token_weights,
    fonts_for,
    piece_labels,
    save_figure,
)

RNG = np.random.default_rng(0)
UNDRAWABLE = "\U0003134f"  # an ideograph that few fonts have


def texts(figure: Figure) -> list[str]:
    axes = figure.axes[0]
    return [text.get_text() for text in [*axes.texts, *axes.get_yticklabels(), *axes.get_xticklabels()]]


@pytest.fixture
def only_base_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_installed_fonts", lambda: [])


def test_language_weights_are_drawn_as_given(tmp_path: Path) -> None:
    weights = RNG.dirichlet(np.ones(3), size=2)
    rows = [LayerWeights(name, w, np.zeros(3), 5) for name, w in zip(("kaz_Cyrl", "bod_Tibt"), weights, strict=True)]
    figure = draw_language_weights(rows, [1, 2, 3])
    assert np.asarray(figure.axes[0].images[0].get_array()) == pytest.approx(100 * weights)
    assert texts(figure)[6:] == ["Kazakh", "Tibetan", "1", "2", "3"]
    assert texts(figure)[:6] == [f"{100 * weight:.0f}" for weight in weights.ravel()]
    png, svg = save_figure(figure, tmp_path / "new" / "weights.png")
    assert png.read_bytes().startswith(b"\x89PNG") and png.name == "weights.png"
    assert svg.read_text().startswith("<svg") and "<text" not in svg.read_text()
    with pytest.raises(ConfigError, match="2 rows and 2 layers"):
        draw_language_weights(rows, [1, 2])


def test_pieces_without_a_font_are_numbered(only_base_font: None, tmp_path: Path) -> None:
    pieces = ("<s>", "▁сөз", "$x$", "བོད", UNDRAWABLE)
    labels = piece_labels(pieces)
    assert [label for label, _ in labels] == ["<s>", "·сөз", "$x$", "", ""]
    assert fonts_for("བོད") is None and fonts_for("сөз") == [BASE_FONT]
    figure = draw_token_weights(TokenWeights("", pieces, RNG.dirichlet(np.ones(3), size=5)), [1, 2, 3])
    assert {"1", "5", "·сөз"} <= set(texts(figure))
    assert any("2 pieces have a number only" in text for text in texts(figure))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of every glyph that it lacks
        save_figure(figure, tmp_path / "tokens")


def test_scripts_that_need_shaping_are_drawn_only_where_text_is_shaped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [label for label, _ in piece_labels(["ئۇيغۇر", "қазақ"])] == ["ئۇيغۇر", "қазақ"]
    monkeypatch.setattr(figures, "shapes_text", lambda: False)
    assert [label for label, _ in piece_labels(["ئۇيغۇر", "қазақ"])] == ["", "қазақ"]


def test_long_texts_are_cut_and_say_so() -> None:
    figure = draw_token_weights(TokenWeights("", ("a",) * 75, np.full((75, 2), 0.5)), [1, 2])
    assert figure.axes[0].images[0].get_array().shape == (60, 2)  # type: ignore[union-attr]
    assert any("the first 60 of 75 pieces" in text for text in texts(figure))


def test_alignment_keeps_the_table_s_order() -> None:
    rows = tuple(LanguageAlignment(n, (1.0, v), v, v, 0.0, 9.0, 0) for n, v in (("uig_Arab", 90.0), ("yor_Latn", 7.0)))
    figure = draw_alignment(AlignmentTable(rows, "en", 100, "{text}", "mean", False))
    assert np.asarray(figure.axes[0].images[0].get_array()).tolist() == [[1.0, 90.0], [1.0, 7.0]]
    assert figure.axes[0].images[0].get_clim() == (0.0, 100.0)


def test_scatter_names_every_common_language() -> None:
    names = ["kaz_Cyrl", "khk_Cyrl", "yor_Latn", "tur_Latn", "bod_Tibt"]
    scores = {name: 10.0 * index for index, name in enumerate(names)}
    accuracies = {name: value + 3 for name, value in scores.items()} | {"other": 4.0}
    figure = draw_scatter(scores | {"eng": 1.0}, accuracies, correlation(scores, accuracies))
    axes = figure.axes[0]
    drawn = [point for group in axes.collections for point in np.asarray(group.get_offsets()).tolist()]
    assert sorted(drawn) == [[10.0 * index, 10.0 * index + 3] for index in range(5)]
    assert {"Kazakh", "Tibetan", "Yoruba", "Turkish"} <= {text.get_text() for text in axes.texts}
    assert [group.get_label() for group in axes.collections] == ["Cyrillic", "Latin", "others"]
    assert "Pearson 1.00" in axes.get_title(loc="left")
    crowd = {f"name {index}": 50.0 + index / 100 for index in range(40)}
    assert {text.get_text() for text in draw_scatter(crowd, crowd).axes[0].texts} == set(crowd)
    with pytest.raises(ConfigError, match="no language"):
        draw_scatter({"a": 1.0}, {"b": 1.0})
