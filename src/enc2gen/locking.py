"""A lock on a folder that several processes may want to write."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from enc2gen.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows has no flock: the process id in the lock file decides alone
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""Name of the lock file in its folder."""


@contextmanager
def locked_folder(folder: Path, *, remove: bool = False) -> Iterator[None]:
    """Hold `folder` for this process; the lock of a process that is gone is taken over.

    Args:
        folder: made if it is not there.
        remove: remove the lock file at the end, for a folder that is to go as well.

    Raises:
        OutputError: another live process holds the folder, or it cannot be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write to the output folder: {error.strerror}",
            where=str(folder),
            remedy="choose another folder",
        ) from error
    with handle:
        _acquire(handle, folder)
        if not _is_at(handle, path):  # its holder has just removed it: it keeps nobody out any more
            raise _in_use(folder, None)
        handle.seek(0)
        handle.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, handle)
        handle.flush()
        try:
            yield
        finally:
            handle.seek(0)
            handle.truncate()
            if remove:
                with suppress(OSError):  # Windows removes no open file; an empty one is in nobody's way
                    path.unlink()


def _acquire(handle: IO[str], folder: Path) -> None:
    handle.seek(0)
    try:
        pid = json.load(handle)["pid"]
    except (ValueError, KeyError, TypeError):
        pid = None
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError:  # a file system without locks: the process id decides
            if not _alive(pid):
                return
    elif not _alive(pid):
        return
    raise _in_use(folder, pid)


def _is_at(handle: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _in_use(folder: Path, pid: int | None) -> OutputError:
    return OutputError(
        f"the output folder is in use by process {pid}" if pid else "the output folder is in use by another process",
        where=str(folder),
        remedy="wait for that run to end, stop it, or choose another folder",
    )


def _alive(pid: int | None) -> bool:
    if pid is None or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
