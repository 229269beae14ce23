"""Where the blocks of an input are written: in this process, or by the workers of a Ray cluster."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from enc2gen import errors
from enc2gen.corpora.engines import ray_session
from enc2gen.errors import Enc2genError
from enc2gen.generation.blocks import Block, FinishedBlocks, Job, Tally, WrittenBlock, check_blocks, write_block
from enc2gen.generation.generator import Generator
from enc2gen.generation.outputs import Output
from enc2gen.registry import Registry

Progress = Callable[[int], None]
"""Called with the number of lines with text that are finished."""

GenerationEngine = Callable[[Job, Sequence[Block], int | None, Progress], Iterator[WrittenBlock]]

ENGINES: Registry[GenerationEngine] = Registry("engine")
"""Name -> what writes blocks with so many workers, and yields them as they are finished, in any order."""


@ENGINES.register("local")
def write_here(job: Job, blocks: Sequence[Block], workers: int | None, on_progress: Progress) -> Iterator[WrittenBlock]:
    """Write blocks in this process, one after the other; it uses the device and the cores by itself."""
    if not blocks:
        return
    generator, before = job.load(), 0
    check_blocks(generator, job, blocks)
    for block in blocks:
        yield write_block(generator, job, block, lambda done, before=before: on_progress(before + done))  # type: ignore[misc]
        before += block.present


@ENGINES.register("ray")
def write_on_ray(
    job: Job, blocks: Sequence[Block], workers: int | None, on_progress: Progress
) -> Iterator[WrittenBlock]:
    """Write blocks with Ray Data: each worker loads the model once and takes block after block.

    The cluster is the one that RAY_ADDRESS names, else a local one. Its nodes need enc2gen installed and the model at
    the same path. A worker has one core, or a share of a GPU where the cluster has any.

    Args:
        workers: all GPUs, or cores, of the cluster by default.

    Raises:
        ConfigError: ray is not installed.
        Enc2genError: what a worker raised.
    """
    if not blocks:
        return
    if job.glossary is not None:  # workers see some of the lines only
        check_blocks(Generator.from_pretrained(job.model, device="cpu", shortlist=job.shortlist), job, blocks)
    with ray_session(workers) as ray:
        present, done = {block.index: block.present for block in blocks}, 0
        for row in _rows(ray, job, blocks, workers):
            written = WrittenBlock.from_json(row)
            done += present[written.index]
            on_progress(done)
            yield written


def _rows(ray: Any, job: Job, blocks: Sequence[Block], workers: int | None) -> Iterator[dict[str, Any]]:
    """Blocks as JSON, in the order in which they are finished."""
    import ray.data as ray_data

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    workers = min(workers or gpus or max(1, int(resources.get("CPU", 1))), len(blocks))
    share = 1 / math.ceil(workers / gpus) if gpus else 0
    context = ray_data.DataContext.get_current()
    context.enable_progress_bars = False  # ours is the only progress shown
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"index": block.index, "first_line": block.first_line, "texts": block.texts} for block in blocks]
    worker: Any = RayWorker  # typed as a function by Ray
    data = ray_data.from_items(rows, override_num_blocks=len(rows)).map(
        worker,
        fn_constructor_args=(job,),
        compute=ray_data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=share or None,
    )
    for row in data.iter_rows():
        if row["error"]:
            raise raised(row["error"])
        yield json.loads(row["block"])


class RayWorker:
    """One worker of the cluster; it loads the model when it gets its first block.

    Errors of ours are handed over as rows, because Ray Data keeps no more than the text of what is raised.

    Args:
        job: what it does.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._generator: Generator | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Write one block, as a row of Ray Data."""
        block = Block(int(row["index"]), int(row["first_line"]), [str(text) for text in row["texts"]])
        try:
            self._generator = self._generator or self._job.load()
            return {"block": json.dumps(write_block(self._generator, self._job, block).to_json()), "error": ""}
        except Enc2genError as error:
            said = {"kind": type(error).__name__, "what": error.what, "where": error.where, "remedy": error.remedy}
            return {"block": "", "error": json.dumps(said)}


def raised(error: str) -> Enc2genError:
    """The error that a worker handed over in its row."""
    said = json.loads(error)
    kind: type[Enc2genError] = getattr(errors, said["kind"], Enc2genError)
    return kind(said["what"], where=said["where"], remedy=said["remedy"])


def generate_to_file(
    job: Job,
    lines: Sequence[str],
    output: Path,
    *,
    engine: str = "local",
    workers: int | None = None,
    text_of: Callable[[Sequence[Output]], str] | None = None,
    on_progress: Progress = lambda done: None,
) -> Tally:
    """Write the outputs of `lines` into a file, going on where an interrupted call with the same job stopped.

    Finished blocks are kept in the folder `OUTPUT.parts` until the file is complete; it appears all at once.

    Args:
        engine, workers: see `ENGINES`; they change nothing in the file.
        text_of: what is written for a line's outputs; by default the best one, on one line.
        on_progress: called with the number of lines with text that are finished.

    Returns:
        How many lines were cut, and the like.

    Raises:
        ConfigError: the engine is unknown, or not installed.
        OutputError: the folder holds part of another output, or nothing can be written.
    """
    write = ENGINES.get(engine, where="--engine")
    blocks, tally = job.blocks(lines), Tally()
    text_of = text_of or best_line
    with FinishedBlocks(output, job.identity(lines)).held() as finished:
        missing = [block for block in blocks if finished.read(block) is None]
        before = sum(block.present for block in blocks) - sum(block.present for block in missing)
        on_progress(before)
        for written in write(job, missing, workers, lambda done: on_progress(before + done)):
            finished.add(written)

        def text(written: WrittenBlock) -> str:
            tally.add(written)
            return "".join(map(text_of, written.outputs))

        finished.join(blocks, text)
    return tally


def best_line(outputs: Sequence[Output]) -> str:
    """The best output, on one line."""
    return " ".join(outputs[0].text.split()) + "\n"
