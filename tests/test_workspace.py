"""The folder of a run: what a failed write may cost, and what it may not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from enc2gen.errors import CheckpointError, OutputError
from enc2gen.experiments.workspace import Workspace
from test_model_card import a_recipe


def a_stage(root: Path, key: str) -> tuple[Workspace, Path]:
    """A workspace with a checkpoint of a stage that was begun with `key` and interrupted."""
    workspace = Workspace(a_recipe(root))
    folder = workspace.system("shared", "finetune")

    def interrupted() -> None:
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "weights").write_text("intact")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workspace.run_stage("finetune-shared", key, interrupted, folder=folder)
    return workspace, folder / "checkpoints" / "weights"


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: files are opened, and emptied, but nothing can be written into them."""

    def write_text(self: Path, data: str, *arguments: object, **options: object) -> int:
        self.open("w").close()
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", write_text)


def test_an_interrupted_stage_goes_on_after_a_resume_that_found_the_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, weights = a_stage(tmp_path / "run", "key")

    def resume(key: str) -> None:
        workspace.run_stage("finetune-shared", key, weights.read_text, folder=weights.parents[1])

    def failing() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(KeyboardInterrupt):  # it gets as far as the training
            workspace.run_stage("finetune-shared", "key", failing, folder=weights.parents[1])
    resume("key")
    assert weights.read_text() == "intact" and workspace.done("finetune-shared", "key")
    with pytest.raises(OutputError, match="other settings"):
        resume("other")
    assert weights.read_text() == "intact"


def test_a_stage_that_cannot_be_begun_is_told_and_leaves_no_half_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, weights = a_stage(tmp_path / "run", "key")
    started = tmp_path / "run" / "stages" / "finetune-shared.started"
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(OutputError, match=r"No space left(?s:.)*remedy"):
            workspace.run_stage("finetune-shared", "other", weights.read_text)
    assert started.read_text() == "key"


def test_a_stage_that_was_begun_otherwise_and_not_finished_is_no_longer_done(tmp_path: Path) -> None:
    workspace = Workspace(a_recipe(tmp_path / "run"))
    made: list[str] = []

    def fill(text: str) -> None:
        made.append(text)
        workspace.data.mkdir(exist_ok=True)
        (workspace.data / "file").write_text(text)

    def fail() -> None:
        raise KeyboardInterrupt

    workspace.run_stage("prepare", "one", lambda: fill("one"), folder=workspace.data)
    with pytest.raises(KeyboardInterrupt):
        workspace.run_stage("prepare", "two", fail, folder=workspace.data)
    assert not workspace.done("prepare", "one") and not list(workspace.root.glob("data/*"))
    workspace.run_stage("prepare", "one", lambda: fill("one"), folder=workspace.data)
    assert workspace.done("prepare", "one") and (workspace.data / "file").read_text() == "one" and len(made) == 2


def test_training_of_other_settings_is_refused_before_its_stage_begins(tmp_path: Path) -> None:
    workspace, weights = a_stage(tmp_path / "run", "key")
    folder = weights.parents[1]
    workspace.check_training("finetune-shared", "key", folder)
    with pytest.raises(OutputError, match=r"other settings(?s:.)*--overwrite"):
        workspace.check_training("finetune-shared", "other", folder)
    workspace.check_training("finetune-other", "other", workspace.system("other", "finetune"))
    Workspace(a_recipe(tmp_path / "run"), overwrite=True).check_training("finetune-shared", "other", folder)
    assert weights.read_text() == "intact"


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("data/summary.json", "prepare"),
        ("encoders/shared/vocabulary.json", "vocabulary-shared"),
        ("encoders/shared/adaptation.json", "adapt-shared"),
        ("systems/shared/initial/init_report.json", "build-shared"),
        ("systems/shared/pretrain/result.json", "pretrain-shared"),
        ("systems/shared/finetune/result.json", "finetune-shared"),
        ("systems/shared/scores.json", "evaluate-shared"),
        ("floors.json", "evaluate-floors"),
        ("stages/build-shared.json", "build-shared"),
        ("bridges/last/seed0/task/result.json", "train-last-seed0-task"),
        ("bridges/last/seed0/task/scores.json", "evaluate-last-seed0"),
        ("controls/majority.json", "control-majority"),
        ("alignment.json", "alignment"),
    ],
)
def test_a_lost_file_costs_its_own_stage_alone(tmp_path: Path, file: str, stage: str) -> None:
    workspace = Workspace(a_recipe(tmp_path / "run"))
    record = workspace.root / "stages" / f"{stage}.json"
    with pytest.raises(CheckpointError, match=r"not the NAME\.started"):
        workspace.read_json(workspace.root / file)
    workspace.run_stage(stage, "key", lambda: None)
    record.write_text("{")  # half a record is a damaged file, too
    with pytest.raises(CheckpointError, match=rf"remove {re.escape(str(record))} \(that file alone\)"):
        workspace.read_json(workspace.root / file)
