"""The progress line of `enc2gen prepare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from enc2gen.corpora.pipeline import Progress as CleaningProgress

_TITLES = {"cleaning": "read, clean, filter", "duplicates": "find duplicates", "writing": "write shards"}


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} lines/s" if task.speed else "", style="progress.data.speed")


@contextmanager
def cleaning_progress(console: Console) -> Iterator[Callable[[CleaningProgress], None]]:
    """Show a line per phase on `console` while the block runs; call the function it gives with each step."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.completed:,.0f} lines, {task.fields[kept]:,} kept"),
        _Speed(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {}

        def show(step: CleaningProgress) -> None:
            if step.phase not in tasks:
                tasks[step.phase] = progress.add_task(_TITLES[step.phase], total=step.total, kept=0)
            progress.update(tasks[step.phase], completed=step.lines, total=step.total, kept=step.kept)

        yield show
