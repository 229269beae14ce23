"""Where runs are carried out: as processes of this machine, or of the nodes of a Ray cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from enc2gen.corpora.engines import available_cores, ray_session
from enc2gen.errors import ConfigError
from enc2gen.registry import Registry

POLL_SECONDS = 0.2
"""Between two looks at processes under way (our choice)."""

CANCEL_SECONDS = 10.0
"""For tasks of a cluster to end their processes before their workers are killed (our choice)."""

KILL = "kill"
"""What the stop file says if processes are not to save."""

STOP_FILE = "stop"
"""Its presence in an experiment's folder tells the nodes of a cluster to end their processes in order."""


@dataclass(frozen=True)
class Command:
    """One process.

    Attributes:
        arguments: of `python`.
        log: file that its output is appended to.
        environment: on top of this process's own.
    """

    arguments: tuple[str, ...]
    log: Path
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        status: exit status; negative: the signal that killed it.
        core_seconds: of processor time.
        wall_seconds: of real time.
        reason: what is known of the cause of a failure beside the status.
    """

    status: int
    core_seconds: float
    wall_seconds: float
    reason: str = ""


class Child:
    """A process under way, of a session of its own: Ctrl-C in the terminal reaches it through `interrupt` alone."""

    def __init__(self, command: Command) -> None:
        self._began = time.monotonic()
        # A process inherits which signals are blocked, and workers of Ray block Ctrl-C.
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with command.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, *command.arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **command.environment},
                    start_new_session=True,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def poll(self) -> Outcome | None:
        """How it ended; None as long as it runs."""
        pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if not pid:
            return None
        self._process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - self._began
        return Outcome(self._process.returncode, usage.ru_utime + usage.ru_stime, wall)

    def interrupt(self) -> None:
        """Ask it to save and end."""
        os.kill(self._process.pid, signal.SIGINT)

    def kill(self) -> None:
        """End it at once; may be called at any time."""
        if self._process.returncode is None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Runner(Protocol):
    """Carries out commands, some at once. Leaving its context ends those that are under way."""

    slots: int
    """Most commands at once."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def start(self, name: str, command: Command) -> None:
        """Start a command; there must be a slot free."""
        ...

    def ended(self) -> Iterator[tuple[str, Outcome]]:
        """The commands that have ended since the last call; does not wait."""
        ...

    def interrupt(self) -> None:
        """Ask all commands under way to save and end."""
        ...


RUNNERS: Registry[Any] = Registry("engine")
"""Name -> class of runners, called with the number of commands at once (None: its choice) and the folder of logs."""


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def threads(count: int) -> dict[str, str]:
    """Environment of a process that has `count` cores."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(count))


@RUNNERS.register("local")
class LocalRunner:
    """Processes of this machine, which share its cores; each has a GPU where there are any.

    Args:
        jobs: processes at once; one per GPU, or else per core, by default.
    """

    def __init__(self, jobs: int | None, folder: Path) -> None:
        self._gpus = gpus()
        self.slots = jobs or len(self._gpus) or available_cores()
        self._free = list(range(self.slots))
        self._children: dict[str, tuple[Child, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for child, _ in self._children.values():
            child.kill()

    def start(self, name: str, command: Command) -> None:
        """Start a process."""
        slot = self._free[0]
        environment = dict(command.environment) | threads(max(1, available_cores() // self.slots))
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        self._children[name] = (Child(Command(command.arguments, command.log, environment)), slot)
        self._free.remove(slot)

    def ended(self) -> Iterator[tuple[str, Outcome]]:
        """Processes that have ended."""
        for name, (child, slot) in list(self._children.items()):
            if (outcome := child.poll()) is not None:
                del self._children[name]
                self._free.append(slot)
                yield name, outcome

    def interrupt(self) -> None:
        """Pass Ctrl-C on."""
        for child, _ in self._children.values():
            child.interrupt()


@RUNNERS.register("ray")
class RayRunner:
    """Tasks of the Ray cluster that RAY_ADDRESS names, else of a local one, each of which starts a process.

    All nodes need enc2gen and the working folder at the same paths, on a file system that they share. A task has one
    GPU where the cluster has any, and an equal share of the cores, at most those of the smallest node.

    Args:
        jobs: tasks at once; one per GPU, or else per core, by default.

    Raises:
        ConfigError: ray is not installed, its cluster cannot be reached or has no cores.
    """

    def __init__(self, jobs: int | None, folder: Path) -> None:
        self._session = ray_session()
        self._ray = self._session.__enter__()
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        on_gpus = int(sum(node.get("GPU", 0) for node in nodes))
        self.slots = jobs or on_gpus or max(1, int(sum(node.get("CPU", 0) for node in nodes)))
        try:
            self._cores = task_cores(nodes, self.slots)
        except ConfigError:
            self._session.__exit__(None, None, None)
            raise
        self._options = {"num_cpus": self._cores, "num_gpus": min(1.0, on_gpus / self.slots), "max_retries": 0}
        self._stop = folder / STOP_FILE
        self._tasks: dict[Any, str] = {}

    def __enter__(self) -> Self:
        self._stop.unlink(missing_ok=True)
        return self

    def __exit__(self, *exception: object) -> None:
        left = list(self._tasks)
        if left:  # workers that are killed would leave their processes behind
            self._stop.write_text(KILL, encoding="utf-8")
            _, left = self._ray.wait(left, num_returns=len(left), timeout=CANCEL_SECONDS)
        for task in left:
            self._ray.cancel(task, force=True)
        self._stop.unlink(missing_ok=True)
        self._session.__exit__(None, None, None)

    def start(self, name: str, command: Command) -> None:
        """Hand a command to the cluster."""
        command = Command(command.arguments, command.log, dict(command.environment) | threads(self._cores))
        task = self._ray.remote(**self._options)(carry_out)
        self._tasks[task.remote(command, os.getcwd(), str(self._stop.absolute()))] = name

    def ended(self) -> Iterator[tuple[str, Outcome]]:
        """Tasks that have ended; one whose worker or node was lost ends as if killed."""
        if not self._tasks:
            return
        ready, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        for task in ready:
            name = self._tasks.pop(task)
            try:
                yield name, self._ray.get(task)
            except self._ray.exceptions.RayTaskError as error:
                reason = f"the cluster could not start it: {_last_line(error)}; its nodes need enc2gen and this folder"
                yield name, Outcome(1, 0.0, 0.0, reason)
            except self._ray.exceptions.RayError as error:
                yield name, Outcome(-signal.SIGKILL, 0.0, 0.0, f"lost by the cluster: {type(error).__name__}")

    def interrupt(self) -> None:
        """Tell all nodes to end their processes in order."""
        self._stop.touch()


def task_cores(nodes: Sequence[Mapping[str, float]], slots: int) -> int:
    """Cores that each of `slots` tasks may ask for, so that any node which may get one has them.

    Args:
        nodes: the resources of each node, as Ray names them ("CPU", "GPU").
        slots: tasks at once; where there are GPUs, each has one, or an equal share of them.

    Raises:
        ConfigError: no node has cores, and GPUs where there are any.
    """
    on_gpus = sum(node.get("GPU", 0) for node in nodes)
    able = [node for node in nodes if node.get("CPU", 0) >= 1 and (not on_gpus or node.get("GPU", 0) > 0)]
    if not able:
        needs = "both cores and a GPU" if on_gpus else "cores"
        raise ConfigError(f"no node of the Ray cluster has {needs}", where="engine ray", remedy="see `ray status`")
    if on_gpus:
        each = min(1.0, on_gpus / slots)
        return max(1, min(int(node["CPU"] // max(1.0, node["GPU"] // each)) for node in able))
    return max(1, int(min(sum(node["CPU"] for node in able) // slots, *(node["CPU"] for node in able))))


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2].strip()


def carry_out(command: Command, folder: str, stop: str) -> Outcome:
    """Carry out a command in `folder`; it is interrupted as soon as there is a file `stop`, killed if that says so."""
    os.chdir(folder)
    child, told = Child(command), False
    try:
        while (outcome := child.poll()) is None:
            if Path(stop).exists():
                if Path(stop).read_text(encoding="utf-8") == KILL:
                    return Outcome(-signal.SIGKILL, 0.0, 0.0)
                if not told:
                    child.interrupt()
                told = True
            time.sleep(POLL_SECONDS)
        return outcome
    finally:
        child.kill()
