"""The output folder of `prepare`: whose it is, what of the work is done, and how finished parts come into place."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enc2gen.corpora.shards import MANIFEST, SPLITS, read_json, read_manifest, write_json
from enc2gen.errors import OutputError

_WORK = ".work"
_PARTIAL = ".partial-output"
_DROPPED = "dropped"
_MARKER = ".enc2gen"  # in the folder of dropped lines that is all a run without a result leaves


class OutputFolder:
    """A folder that is being filled, in three steps: chunks in `.work`, all output in `.partial-output`, in place.

    What was complete in the folder before stays until the new output is.

    Args:
        root: the folder.
        identity: everything the output depends on, as JSON.
        overwrite: replace what was made with another identity.

    Raises:
        OutputError: the folder holds something else, or was made with other settings or inputs.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.root = root
        self.identity = dict(identity)
        self.complete = False
        if root.exists() and not root.is_dir():
            raise OutputError("is a file, not a folder", where=str(root), remedy="choose another --output")
        work, manifest = read_json(root / _WORK / "identity.json"), read_manifest(root)
        if work is None and manifest is None and self._is_foreign():
            raise OutputError(
                "the folder holds something else than a prepared corpus",
                where=str(root),
                remedy="choose another --output, or move its files away",
            )
        finished = manifest["identity"] if manifest is not None else None
        self.complete = finished == self.identity and not overwrite
        if self.complete:
            return
        begun = work if any(self.chunks.glob("*.json")) else None  # a run that failed at once binds nobody
        for made in (finished, begun):
            if made is not None and made != self.identity and not overwrite:
                raise _other_settings(root, made, self.identity)
        if work is not None and work != self.identity:
            shutil.rmtree(root / _WORK)
        shutil.rmtree(self.partial, ignore_errors=True)
        shutil.rmtree(self.index, ignore_errors=True)
        self.chunks.mkdir(parents=True, exist_ok=True)
        write_json(root / _WORK / "identity.json", self.identity)

    @property
    def chunks(self) -> Path:
        """Results of finished chunks."""
        return self.root / _WORK / "chunks"

    @property
    def index(self) -> Path:
        """Index of duplicates; empty at each start."""
        return self.root / _WORK / "index"

    @property
    def positions(self) -> Path:
        """Where each line came from."""
        return self.root / _WORK / "positions"

    @property
    def partial(self) -> Path:
        """Output before it is complete."""
        return self.root / _PARTIAL

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Put the output into place, the manifest last, and remove the work."""
        (self.root / MANIFEST).unlink(missing_ok=True)
        for name in (*SPLITS, _DROPPED):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for path in sorted(self.partial.iterdir()):
            path.replace(self.root / path.name)
        write_json(self.root / MANIFEST, {**manifest, "identity": self.identity})
        self.partial.rmdir()
        shutil.rmtree(self.root / _WORK)

    def give_up(self) -> Path | None:
        """Remove all work; return the folder of dropped lines, the only thing that is kept, if there is one."""
        dropped, kept = self.partial / _DROPPED, None
        if dropped.is_dir() and read_manifest(self.root) is None:
            (dropped / _MARKER).touch()
            shutil.rmtree(self.root / _DROPPED, ignore_errors=True)
            kept = dropped.replace(self.root / _DROPPED)
        shutil.rmtree(self.partial, ignore_errors=True)
        shutil.rmtree(self.root / _WORK)
        if not any(self.root.iterdir()):
            self.root.rmdir()
        return kept

    def _is_foreign(self) -> bool:
        names = {path.name for path in self.root.iterdir()} if self.root.is_dir() else set()
        return bool(names) and not (names == {_DROPPED} and (self.root / _DROPPED / _MARKER).exists())


def fingerprint(files: Mapping[str, Path]) -> str:
    """Return a digest of names, sizes and times of change: what tells changed inputs without reading them."""
    digest = hashlib.sha256()
    for name, path in files.items():
        status = path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
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
