"""Verdicts are true of the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from enc2gen.experiments.findings import compare, verdict_sentence


def score(value: float, margin: float = 1.5) -> dict[str, float]:
    return {"value": value, "low": value - margin, "high": value + margin}


def test_verdict_follows_the_intervals() -> None:
    metrics: dict[str, Any] = {
        "higher_is_better": {"chrf++": True},
        "systems": {
            name: {"kk": {"chrf++": score(value, 1.0)}}
            for name, value in {
                "main": 20.0,
                "far": 10.0,
                "near": 19.0,
                "same": 20.0,
                "touching": 18.0,
                "above": 25.0,
            }.items()
        },
    }
    found = {v.other: (v.difference, v.better, v.apart) for v in compare(metrics, "kk")}
    assert found == {
        "far": (10.0, True, True),
        "near": (1.0, True, False),
        "same": (0.0, False, False),
        "touching": (2.0, True, False),
        "above": (-5.0, False, True),
    }
    assert compare(metrics, "ug") == []


def test_verdict_knows_that_less_is_better_for_error_rates() -> None:
    metrics = {
        "higher_is_better": {"off-target": False},
        "systems": {"main": {"kk": {"off-target": score(2, 1)}}, "other": {"kk": {"off-target": score(9, 1)}}},
    }
    (verdict,) = compare(metrics, "kk", "off-target")
    assert (verdict.difference, verdict.better, verdict.apart) == (-7, True, True)
    assert verdict_sentence(metrics, "kk").startswith("Yes: main beats other (by 7.0) in off-target")


def test_verdict_prefers_the_paired_comparison_to_overlapping_intervals() -> None:
    metrics = {
        "higher_is_better": {"chrf++": True},
        "systems": {name: {"kk": {"chrf++": score(value, 2)}} for name, value in (("main", 20), ("a", 19), ("b", 19))},
        "paired": {"kk": {"a": {"low": 0.5, "high": 1.5}, "b": {"low": -0.5, "high": 2.5}}},
    }
    sentence = verdict_sentence(metrics, "kk")
    assert "ahead of a (by 1.0) in chrF++: the intervals overlap, but that of the difference" in sentence
    assert "ahead of b (by 1.0) in chrF++, but the intervals overlap, so this may be chance" in sentence
    assert sentence.startswith("No: ")  # to win, the intervals themselves lie apart


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"a": 5.0, "b": 9.0}, "Yes: main beats a (by 15.0) and b (by 11.0) in chrF++, with 95 % intervals apart."),
        (
            {"a": 5.0, "b": 19.0},
            "Only in part: main beats a (by 15.0) in chrF++, with 95 % intervals apart; "
            "main is ahead of b (by 1.0) in chrF++, but the intervals overlap, so this may be chance.",
        ),
        (
            {"a": 19.98},
            "No: main is ahead of a (by less than 0.1) in chrF++, but the intervals overlap, so this may be chance.",
        ),
        ({"a": 20.0}, "No: main is level with a in chrF++."),
        ({"a": 30.0}, "No: a (by 10.0) is better than main in chrF++, with intervals apart."),
        (
            {"a": 21.0, "b": 21.5},
            "No: a (by 1.0) and b (by 1.5) are better than main in chrF++, but the intervals overlap.",
        ),
        ({}, "Nothing can be said: there is no other system with chrF++ to compare main with."),
    ],
)  # fmt: skip
def test_verdict_sentence_is_true(others: dict[str, float], expected: str) -> None:
    values = {"main": 20.0, **others}
    systems = {name: {"kk": {"chrf++": score(value)}} for name, value in values.items()}
    assert verdict_sentence({"higher_is_better": {"chrf++": True}, "systems": systems}, "kk") == expected


def test_verdict_names_what_could_not_be_compared() -> None:
    systems: dict[str, Any] = {
        "main": {"kk": {"chrf++": score(20)}},
        "a": {"kk": {"chrf++": score(5)}},
        "b": {"kk": {"chrf++": None}},
    }
    metrics: dict[str, Any] = {"higher_is_better": {"chrf++": True}, "systems": systems}
    sentence = verdict_sentence(metrics, "kk")
    assert sentence.startswith("Only in part: main beats a")
    assert sentence.endswith("Not comparable, for lack of a value: b.")
    systems["main"]["kk"]["chrf++"] = None
    assert verdict_sentence(metrics, "kk") == "Nothing can be said: chrF++ of main could not be measured."


def test_the_printed_command_exists_from_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`make demo` installs into .venv, which is not on a newcomer's path."""
    import sys

    from enc2gen.experiments import findings

    monkeypatch.setattr(findings.shutil, "which", lambda name: "/usr/bin/enc2gen")
    assert findings.command_name() == "enc2gen"
    monkeypatch.setattr(findings.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / ".venv" / "bin" / "enc2gen"
    script.parent.mkdir(parents=True)
    script.touch()
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    assert findings.command_name() == ".venv/bin/enc2gen"
    script.unlink()
    assert findings.command_name().endswith("-m enc2gen.cli.main")
