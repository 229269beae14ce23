"""The benchmarks' harness: what is compared, what is kept, and a smoke run of the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measuring, reporting, tables  # noqa: E402
from benchmarks.workloads import forward_operations  # noqa: E402


def entry(**changes: Any) -> dict[str, Any]:
    found = {
        "speedup": 2.0, "memory_ratio": 0.5, "spread": 0.1, "limit_fraction": 0.6, "rows": {"ours": {"speed": 3.0}},
        "setting": "a setting",
    }  # fmt: skip
    return reporting.described(found | changes, command="a command", seed=0, threads=1)


def report_pid(turns: measuring.Turns, settings: dict[str, Any]) -> None:
    """Side that holds `megabytes` and tells its process and the request."""
    held = bytearray(settings["megabytes"] * 1_000_000)
    while True:
        request = turns.next()
        if request == "fail":
            raise ValueError("a reason")
        if request == "die":
            os._exit(3)
        turns.report(pid=os.getpid(), request=request, size=len(held))


def test_comparison_is_by_pairs_of_turns() -> None:
    # the machine is half as fast in the second turn: pairs still say 4, and one bad turn does not change the median
    ours = [{"n": 8, "seconds": 1}, {"n": 8, "seconds": 2}, {"n": 8, "seconds": 4}]
    theirs = [{"n": 8, "seconds": 4}, {"n": 8, "seconds": 8}, {"n": 8, "seconds": 4}]
    found = measuring.compare(ours, theirs, "n")
    assert found.speedup == 4 and found.spread == pytest.approx((4 - 1) / 4)
    assert found.ours == 4 and found.reference == 2


def test_sides_work_in_turns_in_processes_of_their_own_with_their_own_peak() -> None:
    small, large = ({"megabytes": size} for size in (1, 200))
    with measuring.Side(report_pid, small) as a, measuring.Side(report_pid, large) as b:
        found = measuring.alternate({"a": a, "b": b}, 2, request="x")
        assert [len(reports) for reports in found.values()] == [2, 2]
        assert len({report["pid"] for reports in found.values() for report in reports} | {os.getpid()}) == 3
        assert found["a"][0]["request"] == "x"
        assert measuring.peak(found["b"]) - measuring.peak(found["a"]) > 150_000_000
    # not begun with the parent's size, as ru_maxrss would
    ballast = bytearray(b"x") * 600_000_000
    with measuring.Side(report_pid, small) as side:
        assert side.turn()["peak_bytes"] < len(ballast)


@pytest.mark.parametrize(("request_", "message"), [("fail", "ValueError: a reason"), ("die", "exit code 3")])
def test_failure_of_a_side_is_told(request_: str, message: str) -> None:
    with measuring.Side(report_pid, {"megabytes": 1}) as side, pytest.raises(measuring.SideError, match=message):
        side.turn(request_)


def test_store_keeps_other_answers_and_the_old_file_if_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "results" / "latest.json"
    reporting.store("beam4", entry(speedup=2.0), path)
    before = reporting.read_results(path)["beam4"]
    reporting.store("faults", entry(), path)
    reporting.store("beam4_int8", entry(), path)
    assert reporting.read_results(path)["beam4"] == before and len(reporting.read_results(path)) == 3
    with pytest.raises(TypeError):
        reporting.store("beam4", {"speedup": object()}, path)
    assert reporting.read_results(path)["beam4"] == before
    assert [file.name for file in path.parent.iterdir()] == ["latest.json"]


def test_tables_replace_the_marked_block_only(tmp_path: Path) -> None:
    results, page = tmp_path / "latest.json", tmp_path / "page.md"
    reporting.store("beam4", entry(speedup=5.25, remarks={"equal outputs": "8 of 8"}), results)
    reporting.store("train_trimmed", entry(), results)
    page.write_text(f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n")
    tables.rewrite(page, results)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert "**5.25 times** as fast" in text and "equal outputs: 8 of 8" in text
    assert text.index("Training") < text.index("Beam search")
    tables.rewrite(page, results)
    assert page.read_text() == text


def test_the_page_has_the_marks() -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    assert text.index(tables.BEGIN) < text.index(tables.END)


@pytest.mark.parametrize("growth", ["standard", "swcm"])
def test_operations_are_those_that_pytorch_counts(make_encoder: Any, growth: str) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from enc2gen import SwcmForConditionalGeneration

    model = SwcmForConditionalGeneration.from_encoder(make_encoder(), growth=growth, verbose=False)
    source, target = 7, 5
    inputs = {
        "input_ids": torch.randint(5, 100, (1, source)), "decoder_input_ids": torch.randint(5, 100, (1, target)),
    }  # fmt: skip
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**inputs, use_cache=False)
    # PyTorch counts the future too, which a causal product need not compute
    future = 2 * 2 * len(model.config.plan) * model.config.hidden_size * (target * target - target * (target + 1) / 2)
    assert forward_operations(model, [(source, target)]) + future == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.slow
def test_a_quick_run_answers(tmp_path: Path) -> None:
    path = tmp_path / "latest.json"
    command = [sys.executable, "-m", "benchmarks.run", "train_full_vocabulary", "--quick", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    done = subprocess.run(
        [*command, "--output", str(path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())["train_full_vocabulary"]
    assert found["speedup"] > 0 and 0 < found["memory_ratio"] < 10 and 0 < found["limit_fraction"] < 1
    assert "times** as fast" in done.stdout and "Training, full vocabulary" in done.stdout
