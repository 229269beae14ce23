"""The fault harness finds what it is there to find, and finds nothing in the trainer as it is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from enc2gen.training import trainer as trainer_module

if sys.platform == "win32":
    pytest.skip("the harness forks", allow_module_level=True)


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "faults.py"
    spec = importlib.util.spec_from_file_location("faults", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_killed_runs_end_as_if_nothing_had_happened(faults: ModuleType, tmp_path: Path) -> None:
    done: list[int] = []
    report = faults.run_faults(3, 1, tmp_path, done.append)
    assert (report.kills, report.identical, report.unreadable) == (3, 3, 0)
    assert done == [1, 2, 3] and report.in_checkpoint + report.terminated > 0
    assert "| of them bit-identical at the end | 3 |" in report.table()


def test_a_resume_that_forgets_something_is_found(
    faults: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "load_optimizer_tensors", lambda *_: None)  # the forked children share this
    report = faults.run_faults(3, 1, tmp_path)  # one that was killed before its first checkpoint has nothing to forget
    assert report.kills == 3 and report.identical < 3


def test_a_resume_that_fails_and_a_broken_checkpoint_are_counted(
    faults: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("cannot be restored")

    monkeypatch.setattr(trainer_module, "restore_rng", fail)
    assert faults.run_faults(3, 1, tmp_path / "fails").unreadable >= 1
    assert "cannot be restored" in capsys.readouterr().err
    harness = faults.Harness(tmp_path, seed=0)
    harness.finish("run")
    assert harness.broken("run") == 0
    file = next((tmp_path / "run" / "checkpoints").glob("step-*/optimizer.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert harness.broken("run") == 1
