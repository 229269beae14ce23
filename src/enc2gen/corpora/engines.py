"""Engines: where the chunks of a corpus are worked on. Results come in the order of the items from all of them."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import get_all_start_methods, get_context
from typing import Any, Protocol, TypeVar

from enc2gen.errors import ConfigError, Enc2genError
from enc2gen.registry import Registry

T = TypeVar("T")
R = TypeVar("R")

_IN_FLIGHT_PER_WORKER = 2  # our choice: one being worked on, one waiting, so that no worker idles

_LIGHT = "ENC2GEN_COMMAND"


class Engine(Protocol):
    """Applies a function to many items, at several places at once."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
        """Yield `function(item)` for every item, in order; items are drawn as they are needed. Closing it stops work.

        The function must be importable by name, as for `pickle`.
        """
        ...


ENGINES: Registry[Callable[[int | None], Engine]] = Registry("engine")
"""Name -> engine, called with the number of workers (None: all there are)."""


@ENGINES.register("local")
class LocalEngine:
    """Processes of this machine; with one worker, or one item, this process itself.

    Workers are no copies of the calling program, whose threads would not survive that: it must guard its start with
    `if __name__ == "__main__":`. Where the system allows, modules are loaded once, for all workers.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or available_cores()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
        """Yield `function(item)` for every item, in order.

        Raises:
            Enc2genError: a worker was killed, most often for lack of memory.
        """
        iterator = iter(items)
        first = list(islice(iterator, 2))
        if self.workers == 1 or len(first) < 2:
            yield from map(function, chain(first, iterator))
            return
        context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload([function.__module__])
        pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_ignore_interrupts)
        try:
            limit = _IN_FLIGHT_PER_WORKER * self.workers

            def submit(item: T) -> Future[R]:
                with _light_imports():  # a worker is started with an item, as long as none is idle
                    return pool.submit(function, item)

            yield from _in_order(submit, lambda future: future.result(), chain(first, iterator), limit)
        except BrokenProcessPool as error:
            raise Enc2genError(
                "a worker process was killed, probably for lack of memory",
                where="engine local",
                remedy=f"use fewer than {self.workers} --workers; finished chunks are kept",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class RayEngine:
    """Tasks of a Ray cluster (the extra `enc2gen[ray]`): the one that RAY_ADDRESS names, else a local one.

    The nodes need enc2gen installed, and the evaluation files at the same paths; results come back to this process.

    Raises:
        ConfigError: ray is not installed.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._ray = _import_ray()
        self._workers = workers

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
        """Yield `function(item)` for every item, in order; an error of a task is raised here as it was there."""
        with ray_session(self._workers) as ray:
            workers = self._workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
            task = ray.remote(num_cpus=1)(function)
            yield from _in_order(task.remote, self._result, items, _IN_FLIGHT_PER_WORKER * workers)

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Enc2genError) else error) from None


ENGINES.add("ray", RayEngine)


@contextmanager
def ray_session(workers: int | None = None) -> Iterator[Any]:
    """The module `ray`, connected: as it is, else to the cluster that RAY_ADDRESS names, else to a local one.

    Args:
        workers: cores of a local cluster; all by default.

    Raises:
        ConfigError: ray is not installed, or the cluster cannot be reached.
    """
    ray = _import_ray()
    started = not ray.is_initialized()
    if started:
        # RAY_ADDRESS may name a cluster, which brings its own number of cores.
        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"address": "local", "num_cpus": workers, "include_dashboard": False}
        try:
            with _light_imports():
                ray.init(log_to_driver=False, **local)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ConfigError(
                f"no connection to the Ray cluster: {str(error).partition(chr(10))[0]}",
                where=f"RAY_ADDRESS={address}" if address else "engine ray",
                remedy="`ray status` must find it from here (a cluster with tokens: RAY_AUTH_MODE=token); without "
                "RAY_ADDRESS, the cores of this machine are used",
            ) from error
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "the engine ray needs the package ray",
            where="engine",
            remedy='pip install "enc2gen[ray]", or use --engine local',
        ) from error
    return ray


def _in_order(submit: Callable[[T], Any], result: Callable[[Any], R], items: Iterable[T], limit: int) -> Iterator[R]:
    """Yield results in the order of the items, with at most `limit` of them under way or waiting."""
    under_way: deque[Any] = deque()
    for item in items:
        under_way.append(submit(item))
        if len(under_way) >= limit:
            yield result(under_way.popleft())
    while under_way:
        yield result(under_way.popleft())


@contextmanager
def _light_imports() -> Iterator[None]:
    """Processes started in this block import no models (see `enc2gen/__init__.py`), which they have no use for."""
    if _LIGHT in os.environ:
        yield
        return
    os.environ[_LIGHT] = "1"
    try:
        yield
    finally:
        os.environ.pop(_LIGHT, None)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; the main one handles it and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
