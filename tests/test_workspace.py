"""The folder of a run: what a failed write may cost, and what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from enc2gen.errors import OutputError
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
