"""The output folder of `prepare`: whose it is, what of the work is done, and how finished parts come into place."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from enc2gen.corpora.shards import MANIFEST, SPLITS, read_json, read_manifest, write_json
from enc2gen.errors import OutputError
from enc2gen.locking import LOCK, locked_folder

_WORK = ".work"
_PARTIAL = ".partial-output"
_DROPPED = "dropped"
_IDENTITY = "identity.json"
_CHUNKS = "chunks"
_MARKER = ".enc2gen"  # in the folder of dropped lines that is all a run without a result leaves


class OutputFolder:
    """A folder that is being filled, in three steps: chunks in `.work`, all output in `.partial-output`, in place.

    What was complete in the folder before stays until the new output is. A folder that is not complete is held for this
    process, against another that would clear away what this one writes, until :meth:`finish`, :meth:`give_up` or the
    end of the `with` block.

    Args:
        root: the folder.
        identity: everything the output depends on, as JSON.
        overwrite: replace what was made with another identity.

    Raises:
        OutputError: the folder holds something else, was made with other settings or inputs, or is in use.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.root = root
        self.identity = dict(identity)
        self._lock = ExitStack()
        self.complete = self._is_complete(overwrite)
        if self.complete:
            return
        with ExitStack() as held:
            held.callback(self._remove_empty_work)
            held.enter_context(locked_folder(self._work, remove=True))
            self.complete = self._is_complete(overwrite)  # by now: whoever held it may have just finished
            if self.complete:
                return
            self._begin()
            self._lock = held.pop_all()

    def _is_complete(self, overwrite: bool) -> bool:
        """Whether nothing is left to do; an error if the folder is not for this output. Changes nothing."""
        if self.root.exists() and not self.root.is_dir():
            raise OutputError("is a file, not a folder", where=str(self.root), remedy="choose another --output")
        work, manifest = read_json(self._work / _IDENTITY), read_manifest(self.root)
        if work is None and manifest is None and self._is_foreign():
            raise OutputError(
                "the folder holds something else than a prepared corpus",
                where=str(self.root),
                remedy="choose another --output, or move its files away",
            )
        finished = manifest["identity"] if manifest is not None else None
        if finished == self.identity and not overwrite:
            return True
        begun = work if any(self.chunks.glob("*.json")) else None  # a run that failed at once binds nobody
        for made in (finished, begun):
            if made is not None and made != self.identity and not overwrite:
                raise _other_settings(self.root, made, self.identity)
        return False

    def _begin(self) -> None:
        """Clear away what cannot be gone on with."""
        work = read_json(self._work / _IDENTITY)
        if work is not None and work != self.identity:
            self._remove_work()
        shutil.rmtree(self.partial, ignore_errors=True)
        shutil.rmtree(self.index, ignore_errors=True)
        self.chunks.mkdir(parents=True, exist_ok=True)
        write_json(self._work / _IDENTITY, self.identity)

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @property
    def _work(self) -> Path:
        return self.root / _WORK

    @property
    def chunks(self) -> Path:
        """Results of finished chunks."""
        return self._work / _CHUNKS

    @property
    def index(self) -> Path:
        """Index of duplicates; empty at each start."""
        return self._work / "index"

    @property
    def positions(self) -> Path:
        """Where each line came from."""
        return self._work / "positions"

    @property
    def partial(self) -> Path:
        """Output before it is complete."""
        return self.root / _PARTIAL

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Put the output into place, the manifest last, remove the work, and let the folder go."""
        (self.root / MANIFEST).unlink(missing_ok=True)
        for name in (*SPLITS, _DROPPED):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for path in sorted(self.partial.iterdir()):
            path.replace(self.root / path.name)
        write_json(self.root / MANIFEST, {**manifest, "identity": self.identity})
        self.partial.rmdir()
        self._release()

    def give_up(self) -> Path | None:
        """Remove all work, let the folder go; return the folder of dropped lines, all that is kept, if there is one."""
        dropped, kept = self.partial / _DROPPED, None
        if dropped.is_dir() and read_manifest(self.root) is None:
            (dropped / _MARKER).touch()
            shutil.rmtree(self.root / _DROPPED, ignore_errors=True)
            kept = dropped.replace(self.root / _DROPPED)
        shutil.rmtree(self.partial, ignore_errors=True)
        self._release()
        if not any(self.root.iterdir()):
            self.root.rmdir()
        return kept

    def _remove_work(self) -> None:
        for path in self._work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _remove_empty_work(self) -> None:
        with suppress(OSError):  # not empty: to be gone on with, or another process is already in it
            self._work.rmdir()

    def _release(self) -> None:
        self._remove_work()
        self._lock.close()

    def _is_foreign(self) -> bool:
        names = _names(self.root)
        if _names(self._work) <= {LOCK, _CHUNKS} and not _names(self.chunks):  # a run that has only just begun
            names -= {_WORK}
        return bool(names) and not (names == {_DROPPED} and (self.root / _DROPPED / _MARKER).exists())


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def fingerprint(files: Mapping[str, Path]) -> str:
    """Return a digest of names, sizes and times of change: what tells changed inputs without reading them."""
    digest = hashlib.sha256()
    for name, path in files.items():
        status = path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _other_settings(root: Path, made: Mapping[str, Any], wanted: Mapping[str, Any]) -> OutputError:
    before, now = made.get("config", {}), wanted["config"]
    changed = [
        f"{name}: {before.get(name)!r} then, {value!r} now" for name, value in now.items() if before.get(name) != value
    ]
    what = "; ".join(changed) if changed else "the inputs or options are not the same"
    return OutputError(
        f"the folder was made with other settings or inputs ({what})",
        where=str(root),
        remedy="choose another --output, or replace it with --overwrite",
    )
