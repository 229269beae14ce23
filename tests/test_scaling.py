"""Long inputs in blocks: finished ones outlive a kill, are not mixed with others', and who writes does not matter."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from conftest import tiny_encoder, tiny_tokenizer
from enc2gen import DecodingConfig, Generator, SwcmForConditionalGeneration
from enc2gen.cli.generate import generate_lines
from enc2gen.cli.main import app
from enc2gen.errors import CheckpointError, ConfigError, LanguageError, OutputError
from enc2gen.generation import blocks as blocks_module
from enc2gen.generation.blocks import Job, WrittenBlock, write_block
from enc2gen.generation.outputs import Output
from enc2gen.generation.scaling import ENGINES, RayWorker, generate_to_file, raised

LINES = [f"{letter}{'bcd efg'[: i % 7]}" if i % 5 else "" for i, letter in enumerate("abcdefghijklmnopqrst")]
SAMPLING = DecodingConfig(num_beams=1, do_sample=True, batch_size=2, max_new_tokens=5)
BEAMS = DecodingConfig(num_beams=3, batch_size=2, max_new_tokens=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of two languages, whose outputs differ from source to source."""
    folder = tmp_path_factory.mktemp("model")
    tiny_encoder().save_pretrained(folder / "encoder")
    tiny_tokenizer().save_pretrained(folder / "encoder")
    grown = SwcmForConditionalGeneration.from_encoder(folder / "encoder", languages=["en", "kk"], verbose=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in grown.decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    grown.save_pretrained(folder / "grown")
    return folder / "grown"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four lines: the example of 20 lines has five."""
    monkeypatch.setattr(blocks_module, "BLOCK_LINES", 4)


@pytest.fixture
def job(model: Path) -> Job:
    return Job(str(model), "kk", "en", SAMPLING, seed=3)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are loaded while a test runs."""
    loaded: list[str] = []
    real = Job.load

    def load(job: Job) -> Generator:
        loaded.append(job.model)
        return real(job)

    monkeypatch.setattr(Job, "load", load)
    return loaded


def whole(job: Job) -> list[str]:
    """What the generator itself writes for all lines in one call."""
    return Generator.from_pretrained(job.model).generate(
        LINES, target_language=job.target_language, source_language="en", config=job.config, seed=job.seed
    )


def text(outputs: list[str]) -> str:
    return "".join(" ".join(output.split()) + "\n" for output in outputs)


class Stop(Exception):
    pass


def stop_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let local writing be killed when so many blocks are finished."""
    real, done = blocks_module.FinishedBlocks.add, []

    def add(self: Any, written: WrittenBlock) -> None:
        real(self, written)
        done.append(written.index)
        if len(done) == blocks:
            raise Stop

    monkeypatch.setattr(blocks_module.FinishedBlocks, "add", add)


@pytest.mark.parametrize("config", [SAMPLING, BEAMS])
def test_a_file_written_in_blocks_has_the_outputs_of_one_call(job: Job, config: DecodingConfig, tmp_path: Path) -> None:
    job, seen = replace(job, config=config), []
    output = tmp_path / "out.txt"
    generate_to_file(job, LINES, output, on_progress=seen.append)
    expected = whole(job)
    assert output.read_text(encoding="utf-8") == text(expected)
    assert len(set(expected)) > 2 and all(not output for output, line in zip(expected, LINES, strict=True) if not line)
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_samples_depend_on_the_number_of_the_line(job: Job) -> None:
    generator = job.load()
    same = [["abc"] * 4, ["abc"] * 4]
    first, second = (
        generator.generate(texts, target_language="kk", config=SAMPLING, seed=3, first_line=4 * place)
        for place, texts in enumerate(same)
    )
    assert first != second
    assert first + second == generator.generate(["abc"] * 8, target_language="kk", config=SAMPLING, seed=3)


def test_an_interrupted_call_goes_on_where_it_stopped(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    output = tmp_path / "out.txt"
    output.write_text("what was there before\n")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(2, patch)
        generate_to_file(job, LINES, output)
    assert output.read_text() == "what was there before\n"
    parts = tmp_path / "out.txt.parts"
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("block-*.json")}
    assert [path.name for path in sorted(kept)] == ["block-00000000.json", "block-00000001.json"]
    second = parts / "block-00000001.json"
    second.write_text(second.read_text()[:-9])  # by a failing disk
    written: list[int] = []

    def spy(generator: Generator, of: Job, block: Any, on_batch: Any = None) -> WrittenBlock:
        written.append(block.index)
        return write_block(generator, of, block, on_batch)

    monkeypatch.setattr("enc2gen.generation.scaling.write_block", spy)
    seen: list[int] = []
    generate_to_file(job, LINES, output, on_progress=seen.append)
    assert written == [1, 2, 3, 4] and seen[0] == 3 and len(loads) == 2
    assert output.read_text(encoding="utf-8") == text(whole(job)) and not parts.exists()


def test_when_only_joining_was_interrupted_no_model_is_loaded(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(5, patch)
        generate_to_file(job, LINES, tmp_path / "out.txt")
    generate_to_file(job, LINES, tmp_path / "out.txt")
    assert len(loads) == 1 and (tmp_path / "out.txt").read_text(encoding="utf-8") == text(whole(job))


def test_parts_of_another_output_are_refused_by_name(
    job: Job, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.txt"
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(1, patch)
        generate_to_file(job, LINES, output)
    other = tmp_path / "other"
    SwcmForConditionalGeneration.from_pretrained(model).save_pretrained(other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    changed = [
        (replace(job, seed=4), LINES, r"seed 3 then, 4 now"),
        (replace(job, config=BEAMS), LINES, r"do_sample True then, False now; num_beams 1 then, 3 now"),
        (replace(job, target_language="en"), LINES, r"target_language 'kk' then, 'en' now"),
        (job, [*LINES, "more"], r"\(another input\)"),
        (replace(job, model=str(other)), LINES, r"\(another model\)"),
    ]
    for wanted, lines, message in changed:
        with pytest.raises(OutputError, match=rf"out\.txt\.parts: .*{message}[\s\S]*delete the folder"):
            generate_to_file(wanted, lines, output)
    moved = tmp_path / "moved"
    model.rename(moved)
    try:
        generate_to_file(replace(job, model=str(moved)), LINES, output)  # the same model, at another place
    finally:
        moved.rename(model)
    assert output.read_text(encoding="utf-8") == text(whole(job))


def test_a_call_that_fails_at_once_leaves_nothing_and_binds_nobody(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "out.txt"
    with pytest.raises(LanguageError, match="does not know language 'bo'"):
        generate_to_file(replace(job, target_language="bo"), LINES, output)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"unknown engine 'rya'[\s\S]*did you mean 'ray'"):
        generate_to_file(job, LINES, output, engine="rya")


def test_two_calls_do_not_share_a_file(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nested(*_: Any) -> Iterator[WrittenBlock]:
        generate_to_file(job, LINES, tmp_path / "out.txt")
        yield from ()

    monkeypatch.setitem(ENGINES._entries, "local", nested)
    with pytest.raises(OutputError, match="in use"):
        generate_to_file(job, LINES, tmp_path / "out.txt")


def test_several_outputs_come_back_whole(model: Path, tmp_path: Path) -> None:
    job = Job(str(model), "kk", "en", BEAMS, n=2)
    output = tmp_path / "out.txt"
    generate_to_file(
        job, LINES, output, text_of=lambda found: "".join(f"{one.score:.4f}\t{one.text}\n" for one in found)
    )
    expected = Generator.from_pretrained(model).generate_n_best(
        LINES, 2, target_language="kk", source_language="en", config=BEAMS
    )
    assert output.read_text().count("\n") == sum(map(len, expected))
    scores = [float(line.split("\t")[0]) for line in output.read_text().split("\n") if line]
    assert scores == pytest.approx([one.score for several in expected for one in several], abs=2e-4)
    block = WrittenBlock(3, [[Output("a", -1.5, False, ("b", "c"))], [Output("")]], 1, 64)
    assert WrittenBlock.from_json(json.loads(json.dumps(block.to_json()))) == block


def _command(job: Job, source: Path, output: Path) -> None:
    generate_lines(job, source, output, Console(file=io.StringIO()))


def test_a_link_stays_and_a_pipe_is_written_to(job: Job, tmp_path: Path) -> None:
    source, target, link = tmp_path / "in.txt", tmp_path / "target.txt", tmp_path / "link.txt"
    source.write_text("\n".join(LINES))
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    _command(job, source, link)
    assert link.is_symlink() and target.read_text(encoding="utf-8") == text(whole(job))
    assert target.stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []

    def cat() -> None:
        while not any(read):  # a reader that has seen an early end would stop here, and the command wait for ever
            read.append((tmp_path / "pipe").read_text(encoding="utf-8"))

    reader = threading.Thread(target=cat, daemon=True)
    reader.start()
    _command(job, source, tmp_path / "pipe")
    reader.join(60)
    assert read == [text(whole(job))] and (tmp_path / "pipe").is_fifo()


def test_a_link_to_a_file_that_is_not_there_yet_stays(job: Job, tmp_path: Path) -> None:
    source, target, link = tmp_path / "in.txt", tmp_path / "target.txt", tmp_path / "link.txt"
    source.write_text("\n".join(LINES))
    link.symlink_to(target)
    _command(job, source, link)
    assert link.is_symlink() and target.read_text(encoding="utf-8") == text(whole(job))


def test_output_that_cannot_be_written_is_refused_before_the_work(job: Job, tmp_path: Path, loads: list[str]) -> None:
    (tmp_path / "in.txt").write_text("abc\n")
    for output in (tmp_path, tmp_path / "in.txt" / "out.txt", tmp_path / "none" / "out.txt"):
        with pytest.raises(OutputError, match=f"^{re.escape(str(output))}: cannot write"):
            _command(job, tmp_path / "in.txt", output)
    assert not loads and [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_blocks_of_another_version_are_not_mixed_in(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.txt"
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(1, patch)
        generate_to_file(job, LINES, output)
    monkeypatch.setattr(blocks_module, "__version__", "99.0")
    with pytest.raises(OutputError, match=r"enc2gen '[\d.]+' then, '99\.0' now[\s\S]*delete the folder"):
        generate_to_file(job, LINES, output)


def test_options_that_would_do_nothing_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("abc\n")
    arguments = ["generate", str(model), "--to", "kk", "--input", str(tmp_path / "in.txt")]
    refused = {
        "--workers 2": "--workers",
        "--engine ray": "add --output FILE",
        "--temperature 0.5 --top-p 0.9": "--temperature, --top-p: nothing is sampled",
        "--beams 1 --epsilon 0.1": "add --sample or --mbr",
        "--beams 1 --length-penalty 2": "give --beams 2 or more",
        "--beams 1 --coverage-penalty 0.1 --json": "--coverage-penalty: greedy search",
        "--beams 1 --diverse 1": "--diverse: greedy search",
        "--sample --beams 8": "--beams: outputs are sampled",
        "--sample --beams 4": "--beams: outputs are sampled",
        "--sample --length-penalty 0.5": "leave out --sample",
        "--mbr 4 --coverage-penalty 0.5": "leave out --mbr",
        "--sample --diverse 0.5": "--diverse: outputs are sampled",
    }
    for options, message in refused.items():
        result = CliRunner().invoke(app, [*arguments, *options.split()])
        assert isinstance(result.exception, ConfigError) and message in str(result.exception), options
    allowed = (
        "--beams 1 --length-penalty 2 --json",
        "--mbr 2 --temperature 0.7 --beams 1",
        "--length-penalty 0.5 --coverage-penalty 0.1 --diverse 0.5",
        "--sample --beams 1 --epsilon 0.01 --seed 0",
    )
    for options in allowed:
        assert CliRunner().invoke(app, [*arguments, "--max-new-tokens", "2", *options.split()]).exit_code == 0, options


def test_a_killed_command_goes_on(model: Path, job: Job, tmp_path: Path) -> None:
    """SIGKILL from outside, while it writes; blocks of a real command have 512 lines, here four."""
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("\n".join(LINES))
    script = (
        "import sys, time; from enc2gen.generation import blocks, scaling; blocks.BLOCK_LINES = 4\n"
        "real = scaling.write_block\n"
        "def slow(*a):\n    time.sleep(0.3); return real(*a)\n"
        "scaling.write_block = slow\n"
        "from enc2gen.cli.main import app; app(sys.argv[1:])"
    )
    options = ["--to", "kk", "--from", "en", "--sample", "--batch-size", "2", "--max-new-tokens", "5", "--seed", "3"]
    command = [sys.executable, "-c", script, "generate", str(model), "-i", str(source), "-o", str(output), *options]
    environment = {**os.environ, "ENC2GEN_COMMAND": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.txt.parts" / "block-00000000.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not output.exists()
    assert len(list((tmp_path / "out.txt.parts").glob("block-*.json"))) < 5
    _command(job, source, output)
    assert output.read_text(encoding="utf-8") == text(whole(job))


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    """A local cluster with two cores, for all tests."""
    module = pytest.importorskip("ray", reason="the extra enc2gen[ray] is not installed")
    pytest.importorskip("ray.data", reason="the extra enc2gen[ray] is not installed")
    module.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield module
    module.shutdown()


def test_a_cluster_goes_on_and_writes_the_same(
    ray: ModuleType, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    output = tmp_path / "out.txt"
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(2, patch)
        generate_to_file(job, LINES, output)
    seen: list[int] = []
    generate_to_file(job, LINES, output, engine="ray", workers=2, on_progress=seen.append)
    assert len(loads) == 1, "in this process for the first two blocks only"
    assert seen == sorted(seen) and seen[0] == 6 and seen[-1] == 16
    assert output.read_text(encoding="utf-8") == text(whole(job))


def test_an_error_of_a_worker_is_raised_here(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data keeps no more than the text of an exception: workers hand ours over as rows."""
    worker = RayWorker(replace(job, model=str(tmp_path / "none")))
    row = worker({"index": 0, "first_line": 0, "texts": LINES[:4]})
    with pytest.raises(CheckpointError) as caught:
        raise raised(row["error"])
    assert (caught.value.what, caught.value.remedy) == ("there is no such model folder", "check the path")
    assert caught.value.where == str(tmp_path / "none")
