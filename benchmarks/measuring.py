"""How two sides are measured against each other.

Each side works in a process of its own, so that its peak memory is its own, and waits while the other works: the
sides take turns, A B A B, so that whatever slows the machine down meets both. A third process measures the
matrix-product rate in the same turns. Nothing but the medians of many turns is compared.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Settings = Mapping[str, Any]
Report = dict[str, Any]


class SideError(Exception):
    """A side failed; the message holds its traceback."""


class SideEnded(Exception):
    """Raised in a side that waits for a turn when there are no more turns."""


class Turns:
    """A side's view of the measurement: it waits for requests and reports on each."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def next(self) -> Any:
        """Wait for the next request; raises `SideEnded` after the last."""
        request = self._connection.recv()
        if request == "end":
            raise SideEnded
        return request

    def report(self, **figures: Any) -> None:
        """Answer the request that :meth:`next` returned."""
        self._connection.send(figures | {"peak_bytes": peak_bytes()})


Work = Callable[[Turns, dict[str, Any]], None]
"""What a side does: build everything, then `turns.next()`, work, `turns.report(...)` until `SideEnded`."""


class Side:
    """One side in a process of its own. *Use* as a context manager.

    Args:
        work: a function of a module, called in the new process.
        settings: its second argument; must be picklable.
    """

    def __init__(self, work: Work, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(work, theirs, dict(settings)), daemon=True)
        self.name = work.__name__
        self._process.start()
        theirs.close()

    def turn(self, request: Any = None) -> Report:
        """Let the side work once and return what it reports.

        Raises:
            SideError: it failed or died.
        """
        try:
            self._connection.send(request)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            raise SideError(f"{self.name} died with exit code {self._process.exitcode}") from error
        if isinstance(answer, str):
            raise SideError(f"{self.name} failed:\n{answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._connection.send("end")
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.kill()  # it may be in the midst of a long turn
        self.close()


def _serve(work: Work, connection: Connection, settings: dict[str, Any]) -> None:
    try:
        work(Turns(connection), settings)
    except SideEnded:
        pass
    except BaseException:
        connection.send(traceback.format_exc())


def peak_bytes() -> int:
    """Most memory this process has held: on a GPU that of the device's allocator, else the resident set.

    Linux's `ru_maxrss` begins with the parent's size at the fork, so that the high-water mark of this very program
    image is read instead.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def synchronise() -> None:
    """Wait for the GPU, where there is one, before the clock is read."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def environment(threads: int, device: str) -> Iterator[None]:
    """Variables that processes started inside inherit: threads, device, no network, no progress bars."""
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # a side that waits for its turn must not burn the other's cores
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        wanted["CUDA_VISIBLE_DEVICES"] = ""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def alternate(
    sides: Mapping[str, Side], turns: int, *, warm_up: int = 1, request: Any = None
) -> dict[str, list[Report]]:
    """Let the sides take turns in their order; the reports of each, those of the warm-up left out."""
    reports: dict[str, list[Report]] = {name: [] for name in sides}
    for turn in range(warm_up + turns):
        for name, side in sides.items():
            report = side.turn(request)
            if turn >= warm_up:
                reports[name].append(report)
    return reports


@dataclass(frozen=True)
class Comparison:
    """What the turns of two sides come to.

    Attributes:
        speedup: median over pairs of turns of ours per second over the reference's per second.
        spread: largest minus smallest ratio of a pair, over the median.
        ours, reference: median amounts per second.
    """

    speedup: float
    spread: float
    ours: float
    reference: float


def compare(ours: Sequence[Report], reference: Sequence[Report], amount: str) -> Comparison:
    """Compare `amount` per `seconds` of two sides' reports, turn by turn."""
    rates = [[report[amount] / report["seconds"] for report in side] for side in (ours, reference)]
    ratios = [mine / other for mine, other in zip(*rates, strict=True)]
    middle = statistics.median(ratios)
    return Comparison(
        speedup=middle,
        spread=(max(ratios) - min(ratios)) / middle,
        ours=statistics.median(rates[0]),
        reference=statistics.median(rates[1]),
    )


def peak(reports: Sequence[Report]) -> int:
    """Peak memory of a side in bytes."""
    return max(report["peak_bytes"] for report in reports)


def matrix_products(turns: Turns, settings: dict[str, Any]) -> None:
    """Side that measures the machine: the best rate of large matrix products, in FLOP (or int8 operations) a second.

    Settings: `precision`, one of fp32, bf16, int8. The int8 rate is that of PyTorch's own dynamically quantised
    linear layer, its quantisation included.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    products = _products(settings["precision"], device)
    while True:
        turns.next()
        rates = []
        for operations, multiply in products:
            multiply()
            synchronise()
            seconds = []
            for _ in range(5):
                start = time.perf_counter()
                multiply()
                synchronise()
                seconds.append(time.perf_counter() - start)
            rates.append(operations / statistics.median(seconds))
        turns.report(rate=max(rates))


def _products(precision: str, device: str) -> list[tuple[float, Callable[[], Any]]]:
    """Operations and a function for each product: a square one, and tall ones as in feed-forward layers."""
    import torch

    sizes = [(2048, 2048, 2048), (4096, 768, 3072), (4096, 1024, 8192)]
    if device == "cuda":
        sizes += [(8192, 8192, 8192), (16384, 4096, 16384)]
    found: list[tuple[float, Callable[[], Any]]] = []
    for rows, inner, columns in sizes:
        operations = 2.0 * rows * inner * columns
        if precision == "int8" and device == "cpu":
            layer = torch.nn.Linear(inner, columns)
            quantised = torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, dtype=torch.qint8)
            values = torch.randn(rows, inner)
            found.append((operations, lambda f=quantised, x=values: f(x)))
        else:
            kind = torch.float32 if precision == "fp32" else torch.bfloat16
            left = torch.randn(rows, inner, device=device, dtype=kind)
            right = torch.randn(columns, inner, device=device, dtype=kind)
            found.append((operations, lambda a=left, b=right: torch.nn.functional.linear(a, b)))
    return found
