"""Units of work that several processes share: each takes the next one that is ready and that nobody else works on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enc2gen.errors import OutputError
from enc2gen.experiments.workspace import Workspace
from enc2gen.locking import locked_folder

WAIT_SECONDS = 1.0
"""Between two looks at what other processes have finished (our choice)."""


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    Attributes:
        name: of its stage in the run's folder.
        key: what its result depends on; asked for only when the unit is ready.
        ready: whether everything it needs is finished.
        work: does it.
        folder: of its output, emptied first if it holds the output of other settings.
    """

    name: str
    key: Callable[[], str]
    work: Callable[[], Any]
    ready: Callable[[], bool] = lambda: True
    folder: Path | None = None


def carry_out(
    units: Callable[[], Iterable[Unit]],
    workspace: Workspace,
    log: Callable[[str], None],
    begin: Callable[[str], None],
) -> None:
    """Finish all units, alone or together with other processes that are given the same folder.

    A unit is locked while it is worked on; the lock of a process that has died is free. A unit that another process
    holds is looked at again later, so every process has something to do as long as there is anything.

    Args:
        units: all units known at the time; asked again after each one, because some are known only when others are
            finished.
        begin: is told the name of a unit that starts.
    """
    finished: set[str] = set()
    waiting = False
    while pending := [unit for unit in units() if unit.name not in finished]:
        for unit in pending:
            if unit.ready() and _attempt(unit, workspace, log, begin):
                finished.add(unit.name)
                waiting = False
                break
        else:
            if not waiting:
                log(f"waiting for another process: {pending[0].name}")
            waiting = True
            time.sleep(WAIT_SECONDS)


def _attempt(unit: Unit, workspace: Workspace, log: Callable[[str], None], begin: Callable[[str], None]) -> bool:
    """Whether the unit is finished now; not if another process holds it."""
    key = unit.key()
    if workspace.done(unit.name, key):
        log(f"{unit.name}: done before, kept")
        return True
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(workspace.root / "locks" / unit.name))
        except OutputError as error:
            if "in use" in error.what:
                return False
            raise
        if not workspace.done(unit.name, key):  # finished by another process before the lock was free
            begin(unit.name)
            workspace.run_stage(unit.name, key, unit.work, folder=unit.folder)
    return True
