"""Carry out runs, some at once; a run that fails takes along only those that start from it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enc2gen.errors import Enc2genError, Interrupted
from enc2gen.experiments.grid.engines import POLL_SECONDS, Command, Outcome, Runner
from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.grid.records import LOG, RECIPE, RunRecord, lost_weights, make_ready, take_finished, tidy
from enc2gen.training.runtime import InterruptFlag

TAIL_LINES = 12
"""Lines at the end of a failed run's log that are shown (our choice)."""
_PROMPT = "$ enc2gen "


@dataclass(frozen=True)
class Failure:
    """A run that did not end well.

    Attributes:
        status: exit status of its process, negative for a signal; None if it was not started.
        reason: what is known of the cause.
        tail: the end of its log.
    """

    run: GridRun
    status: int | None
    reason: str
    tail: str = ""

    def to_json(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "run": self.run.name,
            "cell": self.run.cell,
            "seed": self.run.seed,
            "kind": self.run.kind,
            "status": self.status,
            "reason": self.reason,
            "tail": self.tail,
        }


class Execution:
    """Carries out runs in the order of what they start from.

    Args:
        runner: where.
        store: folder of what runs share.
        log: told one line per run that starts or ends.
        overwrite: replace training in a run's folder that was done with other data.
    """

    def __init__(self, runner: Runner, store: Path, log: Callable[[str], None], *, overwrite: bool = False) -> None:
        self._runner, self._store, self._log, self._overwrite = runner, store, log, overwrite
        self._waiting: list[GridRun] = []
        self._under_way: dict[str, GridRun] = {}
        self._finished: set[Path] = set()
        self._failed: dict[Path, Failure] = {}
        self._done, self._count = 0, 0

    def carry_out(self, runs: Sequence[GridRun]) -> list[Failure]:
        """Carry out the runs that are not finished yet, each once; returns what failed, in order.

        Raises:
            Interrupted: by Ctrl-C, SIGTERM or a hang-up, after the runs under way have saved.
        """
        known = self._finished | set(self._failed)
        fresh = [run for run in {run.folder: run for run in runs}.values() if run.folder not in known]
        self._finished |= {run.folder for run in fresh if RunRecord(run).finished}
        if kept := sum(run.folder in self._finished for run in fresh):
            self._log(f"{kept} run{'s' if kept > 1 else ''} done before, kept")
        for run in fresh:
            if run.folder not in self._finished and (experiment := take_finished(run)) is not None:
                self._finished.add(run.folder)
                self._log(f"{run.name}: done before in {experiment}, taken over")
        self._waiting = [run for run in fresh if run.folder not in self._finished]
        self._done, self._count = 0, len(self._waiting)
        with InterruptFlag() as flag:
            told = False
            while self._under_way or (self._waiting and not flag.raised):
                if flag.raised and not told:
                    self._log(f"interrupted; {len(self._under_way)} under way are saving")
                    self._runner.interrupt()
                    told = True
                if not flag.raised:
                    self._start()
                for name, outcome in self._runner.ended():
                    self._end(self._under_way.pop(name), outcome, interrupted=flag.raised)
                time.sleep(POLL_SECONDS)
        if flag.raised:
            raise Interrupted("interrupted; everything is saved")
        return [self._failed[run.folder] for run in fresh if run.folder in self._failed]

    def _start(self) -> None:
        """Start whatever is ready, as far as there is room; give up what can never start."""
        for run in list(self._waiting):
            if (reason := self._hindrance(run)) is not None:
                self._waiting.remove(run)
                self._fail(Failure(run, None, reason))
            elif len(self._under_way) < self._runner.slots and all(n.folder in self._finished for n in run.needs):
                self._waiting.remove(run)
                try:
                    make_ready(run)
                    self._runner.start(run.name, self._command(run))
                except (OSError, Enc2genError) as error:
                    self._fail(Failure(run, None, f"not started: {error}"))
                    continue
                self._under_way[run.name] = run
                self._log(f"{run.name}: started")

    def _hindrance(self, run: GridRun) -> str | None:
        """Why a run can never start; None if it can, now or later."""
        coming = {other.folder for other in (*self._waiting, *self._under_way.values())}
        for need in run.needs:
            if need.folder in self._failed:
                return f"not started: {need.name}, which it starts from, failed"
            if need.folder not in self._finished | coming:
                return f"not started: {need.name}, which it starts from, is not among the runs"
            trained = need.folder / "systems" / need.recipe.main_system / "finetuned"
            if need.folder in self._finished and lost_weights(need.model if need is run.start else trained):
                return (
                    f"not started: {need.name}, which it starts from, has lost its weights; remove {need.folder}, "
                    "and the same command does it again"
                )
        return None

    def _command(self, run: GridRun) -> Command:
        recipe, log = run.folder / RECIPE, run.folder / LOG
        arguments = [run.verb, recipe.as_posix(), "--store", self._store.as_posix()]
        arguments += ["--overwrite"] * self._overwrite
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{_PROMPT}{' '.join(arguments)}\n")
        return Command(("-m", "enc2gen.cli.main", *arguments), log, {"COLUMNS": "120"})

    def _end(self, run: GridRun, outcome: Outcome, *, interrupted: bool) -> None:
        try:
            if outcome.status == 0:
                tidy(run)  # before the record: what is finished may be taken over
            RunRecord(run).add(outcome.status, outcome.core_seconds, outcome.wall_seconds)
        except (OSError, Enc2genError) as error:
            self._fail(Failure(run, outcome.status, f"ended, and this could not be written down: {error}"))
            return
        if outcome.status == 0:
            self._done += 1
            self._finished.add(run.folder)
            said = f"{outcome.wall_seconds:.0f} s, {outcome.core_seconds:.0f} core-seconds"
            self._log(f"{run.name}: done in {said}; {self._done} of {self._count}")
        elif not interrupted:
            reason = outcome.reason or _reason(outcome.status)
            self._fail(Failure(run, outcome.status, reason, tail(run.folder / LOG)))

    def _fail(self, failure: Failure) -> None:
        self._failed[failure.run.folder] = failure
        self._log(f"{failure.run.name}: FAILED, {failure.reason}")


def _reason(status: int) -> str:
    """What an exit status says."""
    if status == -signal.SIGKILL:
        return "killed, probably for lack of memory: use fewer --jobs, or smaller batches"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}"


def tail(log: Path) -> str:
    """The last lines that the last attempt wrote into a log."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.rstrip() for line in text.rpartition(_PROMPT)[2].split("\n")[1:] if line.strip()]
    return "\n".join(lines[-TAIL_LINES:])
