"""What a run survives, and what it refuses: a full disk, another vocabulary."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from conftest import tiny_tokenizer
from enc2gen.data.batching import BatchingConfig
from enc2gen.data.masking import Masker, MaskingConfig, masked_stream
from enc2gen.errors import CheckpointError, OutputError
from enc2gen.tokenization.vocabulary import trim_vocabulary
from enc2gen.training import Callback, StepMetrics, Trainer
from enc2gen.training.checkpoint import verify_checkpoint
from training_toys import assert_same, config, final_state, trainer


class Reader(nn.Module):
    """The least that learns masked tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(120, 8), nn.Linear(8, 120)

    def forward(self, input_ids: Tensor, predicted: Tensor, **_: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embed(input_ids)[predicted]))


@pytest.mark.parametrize("change", ["trimmed", "extended"])
def test_a_run_is_not_resumed_with_another_vocabulary(change: str, tmp_path: Path) -> None:
    texts = [{"text": "abc def ghi jkl", "language": "en"}] * 8

    def run(tokenizer: PreTrainedTokenizerBase, steps: int) -> int:
        masker = Masker(tokenizer, MaskingConfig(), max_length=20)
        stream = masked_stream(texts, masker, BatchingConfig(max_tokens=60))
        settings = config(max_steps=steps, warmup=0, freeze_encoder_steps=0)
        return Trainer(Reader(), stream, {}, settings, tmp_path).train().steps

    assert run(tiny_tokenizer(), 3) == 3
    other = tiny_tokenizer()
    if change == "trimmed":
        other = trim_vocabulary(other, ["abc def ghi jkl"]).tokenizer
    else:
        other.add_tokens(["ཀ"])
    with pytest.raises(CheckpointError, match=r"different: .*the vocabulary \(data\.tokenizer\)[\s\S]*new folder"):
        run(other, 3)
    assert run(tiny_tokenizer(), 3) == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, timeout=20)
    except OSError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("mounting is not allowed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=20)


class FillDisk(Callback):
    """Leaves no room on the disk from the given step on, but for `room` bytes."""

    def __init__(self, folder: Path, step: int, room: int) -> None:
        self.folder, self.step, self.room = folder, step, room

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step == self.step:
            with suppress(OSError), (self.folder / "filler").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            with (self.folder / "filler").open("rb+") as file:
                file.truncate(file.seek(0, 2) - self.room)


@pytest.mark.parametrize("room", [0, 8192], ids=["at once", "in the middle of a checkpoint"])
def test_a_full_disk_costs_nothing_but_the_time_since_the_last_checkpoint(
    small_disk: Path, tmp_path: Path, room: int
) -> None:
    trainer(tmp_path / "undisturbed").train()
    run = small_disk / "run"
    with pytest.raises(OutputError, match="No space left on device"):
        trainer(run, callbacks=[FillDisk(small_disk, 8, room)]).train()
    kept = sorted((run / "checkpoints").glob("step-*"))
    assert [path.name for path in kept] == ["step-00000003", "step-00000006"]
    for path in kept:
        verify_checkpoint(path)
    (small_disk / "filler").unlink()
    assert trainer(run).train().steps == 12
    assert_same(final_state(run), final_state(tmp_path / "undisturbed"))
