"""Metrics file, TensorBoard, progress line and early stopping, as a user sees them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from enc2gen.errors import OutputError
from enc2gen.training.callbacks import (
    EarlyStopping,
    JsonlMetrics,
    ProgressLine,
    StepMetrics,
    TensorBoard,
    ValidationMetrics,
    named_callbacks,
)


def _step(step: int, **changes: Any) -> StepMetrics:
    values = {"loss": 2.0, "learning_rate": 1e-4, "gradient_norm": 1.0, "tokens": 10 * step, "skipped": 0}
    return StepMetrics(**{"step": step, "tokens_per_second": 1234.0, "seconds": 2.0 * step, **values, **changes})


def _validation(step: int, improved: bool) -> ValidationMetrics:
    return ValidationMetrics(step=step, losses={"kk": 1.5, "ug": 2.5}, mean=2.0, improved=improved)


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_metrics_after_the_resumed_step_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    first = JsonlMetrics(path)
    first.on_start(0, 10)
    for step in (1, 2, 3, 4):
        first.on_step(_step(step))
        first.on_validation(_validation(step, improved=True))
    first.on_end()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "ste')  # killed in the middle of a line

    second = JsonlMetrics(path)
    second.on_start(2, 10)
    second.on_step(_step(3, loss=9.0))
    second.on_end()
    records = _records(path)
    assert [(r["kind"], r["step"]) for r in records] == [
        ("train", 1), ("validation", 1), ("train", 2), ("validation", 2), ("train", 3),
    ]  # fmt: skip
    assert records[-1]["loss"] == 9.0
    assert records[1]["losses"] == {"kk": 1.5, "ug": 2.5}


def test_a_fresh_run_starts_a_fresh_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 0}\n', encoding="utf-8")
    callback = JsonlMetrics(path)
    callback.on_start(0, 10)
    callback.on_end()
    assert _records(path) == []


def test_metrics_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    callback = JsonlMetrics(path)
    callback.on_start(0, 10)
    callback.on_step(_step(1, loss=math.nan, gradient_norm=math.inf))
    callback.on_validation(ValidationMetrics(step=1, losses={"kk": math.nan, "ug": 2.5}, mean=math.nan, improved=False))
    callback.on_end()
    lines = path.read_text(encoding="utf-8").splitlines()
    record, validated = (json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines)
    assert record["loss"] is None and record["gradient_norm"] is None
    assert validated["losses"] == {"kk": None, "ug": 2.5} and validated["mean"] is None


def test_metrics_that_cannot_be_written_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"metrics cannot be written[\s\S]*remedy"):
        JsonlMetrics(tmp_path / "file" / "metrics.jsonl").on_start(0, 10)


def test_tensorboard_hides_the_points_after_the_resumed_step(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        callback = TensorBoard(tmp_path)
        callback.on_start(start, 10)
        for step in steps:
            callback.on_step(_step(step, loss=float(10 * start + step)))
            callback.on_validation(_validation(step, improved=True))
        callback.on_end()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 23.0),
        (4, 24.0),
    ]
    assert [e.step for e in events.Scalars("validation/kk")] == [1, 2, 3, 4]


def test_progress_is_plain_lines_where_there_is_no_terminal() -> None:
    output = io.StringIO()
    callback = ProgressLine(Console(file=output, force_terminal=False, width=200))
    callback.on_start(0, 100)
    callback.on_step(_step(10))
    callback.on_step(_step(20))
    callback.on_validation(_validation(20, improved=True))
    callback.on_end()
    lines = output.getvalue().splitlines()
    assert lines[0] == "step 10/100  loss 2.000  lr 1.00e-04  1,234 tokens/s"
    assert lines[1].endswith("0:02:40 left")  # 80 updates at 2 s
    assert lines[2] == "validation at step 20: kk 1.500  ug 2.500  (best so far)"


def test_progress_is_one_live_line_on_a_terminal() -> None:
    output = io.StringIO()
    callback = ProgressLine(Console(file=output, force_terminal=True, width=120))
    callback.on_start(5, 100)
    callback.on_step(_step(10))
    callback.on_end()
    assert "10/100" in output.getvalue() and "1,234 tokens/s" in output.getvalue()
    assert output.getvalue().count("\n") <= 1


def test_early_stopping_counts_validations_without_improvement_and_remembers() -> None:
    stopping = EarlyStopping(patience=2)
    for improved, stop in ((True, False), (False, False), (True, False), (False, False)):
        stopping.on_validation(_validation(1, improved))
        assert stopping.should_stop is stop
    resumed = EarlyStopping(patience=2)
    resumed.load_state_dict(json.loads(json.dumps(stopping.state_dict())))
    resumed.on_validation(_validation(2, improved=False))
    assert resumed.should_stop


def test_names_of_callbacks_do_not_depend_on_other_kinds() -> None:
    stopping = [EarlyStopping(1), EarlyStopping(2)]
    with_line = named_callbacks([ProgressLine(), *stopping])
    without = named_callbacks(stopping)
    assert {name: with_line[name] for name in without} == without and len(without) == 2
