"""Work that several runs share: the output of a finished stage, kept by what it depends on and hard-linked."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from enc2gen.errors import OutputError
from enc2gen.experiments.workspace import replace_folder
from enc2gen.locking import locked_folder
from enc2gen.training.checkpoint import writing

WAIT_SECONDS = 0.5
"""Between two looks at whether another process has finished an entry (our choice)."""

NOT_SHARED = ("cache",)
"""Files that hold paths of the run that wrote them."""


class Store:
    """A folder of finished outputs. Runs link them, so that equal work is done once and lies on the disk once.

    Files of an entry must be replaced, never written into: a link shares its content with all runs that have it.

    Args:
        folder: of the store; one for all runs that may share.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def obtain(self, key: str, target: Path, work: Callable[[], Any]) -> None:
        """Have in `target` what `work` writes there: taken from the store, else made now and put into it.

        While one process makes an entry, others that want it wait.

        Args:
            key: a hash of everything the output depends on.
            target: folder that `work` writes into.

        Raises:
            OutputError: the store cannot be written.
        """
        entry = self.folder / key
        with ExitStack() as stack:
            while not entry.exists():
                try:
                    stack.enter_context(locked_folder(self.folder / "locks" / key))
                    break
                except OutputError as error:
                    if "in use" not in error.what:
                        raise
                    time.sleep(WAIT_SECONDS)
            if entry.exists():
                with writing(target):
                    shutil.rmtree(target, ignore_errors=True)
                    link_tree(entry, target)
                return
            work()
            replace_folder(entry, lambda folder: link_tree(target, folder, leave_out=NOT_SHARED))


def link_tree(
    source: Path, target: Path, *, leave_out: Collection[str] = (), suffixes: Collection[str] | None = None
) -> None:
    """Have the files of folder `source` in `target`, too, as hard links; copies where the file system has none.

    Args:
        leave_out: names of files and folders that `target` does not get.
        suffixes: link files that end so, and copy the others; None: link all.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.name in leave_out:
            continue
        if path.is_dir():
            link_tree(path, target / path.name, leave_out=leave_out, suffixes=suffixes)
        elif suffixes is None or path.suffix in suffixes:
            link_file(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)


def link_file(source: Path, target: Path) -> None:
    """Have the file `source` as `target`, too, in the place of an older one."""
    temporary = target.with_name(f".{target.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copy2(source, temporary)
    os.replace(temporary, target)
