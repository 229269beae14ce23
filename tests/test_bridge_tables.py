"""Tables of a bridge run say what was measured, with intervals, and warn of searches and trainings that stop short."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import pearsonr

from enc2gen.evaluation.alignment import AlignmentTable, LanguageAlignment
from enc2gen.experiments.bridge import results as collecting
from enc2gen.experiments.bridge.report import print_results
from enc2gen.experiments.bridge.tables import best_bridge, result_tables
from enc2gen.experiments.report_tables import markdown


def score(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 2, "high": value + 2, "n": 10}


def system(other: float) -> dict[str, Any]:
    groups = {"transfer": score(other), "non-Latin": score(other - 5), "Cyrl": score(other)}
    languages = {"en": score(80.0), "kk": score(other)}
    share = other / 0.8
    return {"languages": languages, "trained": score(80.0), "groups": groups, "transferred_share": share}


def bridge(other: float, best_steps: list[int]) -> dict[str, Any]:
    training = {
        str(seed): {"task": {"seconds": 3.0, "steps": 400, "best_step": step}} for seed, step in enumerate(best_steps)
    }
    accuracy = {"likelihood": system(other)}
    seeds = list(range(len(best_steps)))
    return {
        "accuracy": accuracy,
        "pairs": {},
        "training": training,
        "seeds": seeds,
        "parameters": 7,
        "learning_rate": 0.1,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    difference = {"value": 6.0, "low": 1.0, "high": 9.0}
    against_last = {"groups": {"transfer": difference}, "languages": {"kk": difference}}
    against_llm = {"groups": {"non-Latin": {"value": 20.0, "low": 11.0, "high": 29.0}}, "languages": {}}
    return {
        "languages": ["en", "kk"],
        "train_languages": ["en"],
        "scripts": {"en": "Latn", "kk": "Cyrl"},
        "method": "likelihood",
        "reference": "last",
        "alignment": None,
        "bridges": {"last": bridge(60.0, [200, 300]), "worse": bridge(50.0, [100, 400]), "ours": bridge(66.0, [400])},
        "controls": {
            "probe": {"accuracy": system(75.0), "pairs": {}},
            "llm_alone": {"accuracy": system(30.0), "pairs": {}},
        },
        "search": {
            "last": {"0.001": 2.0, "0.01": 1.0, "0.1": 3.0},
            "worse": {"0.001": 2.0, "0.01": 1.0},
            "ours": {"0.01": 1.0},
        },
        "paired_by": {},
        "samples": {},
        "paired": {"ours": {"last": against_last, "llm_alone": against_llm}, "worse": {"last": against_last}},
    }


def cells(results: dict[str, Any], title: str) -> dict[str, dict[str, str]]:
    table = next(table for table in result_tables(results) if table["title"] == title)
    return {row[0]: dict(zip(table["header"], row, strict=True)) for row in table["rows"]}


def note(results: dict[str, Any], title: str) -> str:
    return str(next(table for table in result_tables(results) if table["title"] == title)["note"])


def test_summary_compares_with_reference_probe_and_llm(results: dict[str, Any]) -> None:
    rows = cells(results, "Accuracy")
    assert rows["ours"]["against last"] == "+6.0 [+1.0, +9.0]"
    assert rows["ours"]["share of the probe"] == "88 %" and rows["last"]["share of the probe"] == "80 %"
    assert rows["ours"]["against the LLM, without Latin letters"] == "+20.0 [+11.0, +29.0]"
    assert rows["linear probe on the encoder"]["share of the probe"] == "–"
    results["controls"], results["reference"] = {}, None
    assert list(cells(results, "Accuracy")["ours"])[-1] == "without Latin letters"


def test_intervals_by_script_and_of_the_best_bridge_by_language(results: dict[str, Any]) -> None:
    assert cells(results, "By script")["ours"]["Cyrl (1)"] == "66.0 [64.0, 68.0]"
    rows = cells(results, "By language")
    assert rows["Kazakh (kk)"]["ours against last"] == "+6.0 [+1.0, +9.0]"
    assert rows["English (en)"]["ours against last"] == "–"
    results["bridges"]["last"] = bridge(99.0, [1])
    assert best_bridge(results) == "ours", "the reference is not compared with itself"


def test_a_best_rate_at_the_edge_is_flagged(results: dict[str, Any]) -> None:
    rows = cells(results, "Learning rates")
    assert rows["last"]["0.01"] == "1.000 *" and rows["worse"]["0.01"] == "1.000 * edge"
    assert rows["ours"]["0.01"] == "1.000 *", "a single rate has no edge"
    assert "(worse)" in note(results, "Learning rates")
    del results["search"]["worse"]
    assert "Edge" not in note(results, "Learning rates")


def test_a_rate_that_diverged_is_said_to_and_never_the_best(results: dict[str, Any]) -> None:
    results["search"]["last"] |= {"0.01": None}
    rows = cells(results, "Learning rates")
    assert (rows["last"]["0.001"], rows["last"]["0.01"]) == ("2.000 * edge", "diverged")


def test_a_best_step_that_is_the_last_is_flagged(results: dict[str, Any]) -> None:
    rows = cells(results, "Training")
    assert rows["last"]["best step"] == "200–300 of 400" and rows["last"]["last step best"] == "0 of 2"
    assert rows["worse"]["last step best"] == "1 of 2" and rows["ours"]["best step"] == "400 of 400"
    assert "not have converged" in note(results, "Training") and "(worse, ours)" in note(results, "Training")
    results["bridges"] = {"last": bridge(60.0, [200])}
    assert "converged" not in note(results, "Training")


def test_labels_chosen_by_generation_have_tables_of_their_own(results: dict[str, Any]) -> None:
    assert not [table["title"] for table in result_tables(results) if "generation" in table["title"]]
    for name, value in (("last", 40.0), ("ours", 20.0), ("worse", 10.0)):
        results["bridges"][name]["accuracy"]["generation"] = system(value)
    difference = {"value": -20.0, "low": -25.0, "high": -15.0}
    against_last = {"groups": {"transfer": difference}, "languages": {"kk": difference}}
    results["paired_by"] = {"generation": {"ours": {"last": against_last}}}
    rows = cells(results, "Accuracy by generation")
    assert rows["ours"]["other languages"] == "20.0 [18.0, 22.0]"
    assert rows["ours"]["against last"] == "-20.0 [-25.0, -15.0]"
    assert cells(results, "By script, by generation")["last"]["Cyrl (1)"] == "40.0 [38.0, 42.0]"
    kazakh = cells(results, "By language, by generation")["Kazakh (kk)"]
    assert (kazakh["ours"], kazakh["ours against last"]) == ("20.0", "-20.0 [-25.0, -15.0]")
    assert "by generation" in note(results, "Accuracy by generation") and "by likelihood" in note(results, "Accuracy")
    assert cells(results, "Accuracy")["ours"]["other languages"] == "66.0 [64.0, 68.0]"


@pytest.fixture
def written(results: dict[str, Any]) -> dict[str, Any]:
    """Results with two language pairs, written by two bridges and the LLM alone."""
    results["bridges"] = {name: results["bridges"][name] for name in ("last", "ours")}
    for entry, value in (
        *zip(results["bridges"].values(), (30.0, 40.0), strict=True),
        (results["controls"]["llm_alone"], 5.0),
    ):
        entry["pairs"] = {"kk-en": {"chrf++": score(value), "bleu": None}, "ug-en": {"chrf++": score(value / 2)}}
    outputs = {"last": "a | b\n<i>", "ours": "house"}
    results["samples"] = {"kk-en": [{"source": "үй", "references": ["house", "home"], "outputs": outputs}]}
    return results


def test_scores_of_written_texts_have_intervals(written: dict[str, Any]) -> None:
    rows = cells(written, "Writing")
    assert rows["ours"]["kk-en chrF++"] == "40.0 [38.0, 42.0]" and rows["last"]["ug-en chrF++"] == "15.0 [13.0, 17.0]"
    assert rows["LLM alone"]["kk-en chrF++"] == "5.0 [3.0, 7.0]" and rows["ours"]["kk-en BLEU"] == "–"


def test_samples_stand_beside_their_sources_and_references(written: dict[str, Any]) -> None:
    assert cells(written, "Sample outputs, kk-en") == {
        "үй": {"source": "үй", "reference": "house / home", "last": "a | b\n<i>", "ours": "house"}
    }
    table = next(table for table in result_tables(written) if table["title"].startswith("Sample"))
    assert markdown(table).splitlines()[-1] == "| үй | house / home | a \\| b &lt;i> | house |"
    console = Console(record=True, width=80, force_terminal=False)
    print_results(written, console)
    assert "40.0" in (text := console.export_text()) and "house" not in text


def test_markdown_is_a_table_of_equal_rows(results: dict[str, Any]) -> None:
    for table in result_tables(results):
        lines = [line for line in markdown(table).splitlines() if line.startswith("|")]
        assert len({line.count(" | ") for line in lines if "---" not in line}) == 1 and len(lines) > 2


def test_a_terminal_gets_every_column_whole(results: dict[str, Any]) -> None:
    console = Console(record=True, width=80, force_terminal=False)
    print_results(results, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "│ +20.0 [+11.0, +29.0] │" in " ".join(text.split()) and "66.0 [64.0, 68.0]" in text


def test_accuracy_is_correlated_with_the_mean_over_layers(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {"en": (0, 9, 9), "a": (0, 10, 100), "b": (0, 50, 100), "c": (0, 90, 100), "d": (0, 20, 90)}
    rows = tuple(LanguageAlignment(name, values, 0, 0, 0, 9, 0) for name, values in layers.items() if name != "en")
    table = AlignmentTable(rows, "en", 10, "{text}", "mean", False)
    monkeypatch.setattr(collecting, "read_alignment", lambda recipe, workspace: table)
    right = {"a": 2, "b": 5, "c": 9, "d": 4}
    entry = {name: {"correct": [[1] * count + [0] * (10 - count)]} for name, count in right.items()}
    results["bridges"] = {"last": {"accuracy": {"likelihood": {"languages": entry}}}}
    results["controls"] = {}
    found = collecting._alignment(SimpleNamespace(), SimpleNamespace(), results)  # type: ignore[arg-type]
    assert found is not None
    accuracies = np.array(list(right.values()))
    assert found["correlation"]["last"]["pearson"] == pytest.approx(pearsonr([55, 75, 95, 55], accuracies)[0])
    assert found["correlation_best"]["last"]["pearson"] == pytest.approx(pearsonr([100, 100, 100, 90], accuracies)[0])
