"""Progress of commands that take long, with the time left: a bar on a terminal, lines in a log. Both on stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bus.text.units import format_seconds


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left on a terminal; elsewhere at most one line in ten seconds."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    if not console.is_terminal:
        yield _Lines(console)
        return
    with Progress(*columns, console=console, transient=True) as bars:
        known: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bars.add_task(what, total=total)
            bars.update(known[what], completed=done, total=total)

        yield tell


class _Lines:
    """Progress as lines, with the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began: dict[str, tuple[float, int]] = {}
        self._said_s = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        began_s, before = self._began.setdefault(what, (now_s, done))
        if done < total and now_s - self._said_s < 10:
            return
        self._said_s = now_s
        fresh = done - before
        left_s = (now_s - began_s) / fresh * (total - done) if fresh else None
        left = f", about {format_seconds(left_s)} left" if left_s else ""
        self.console.print(f"{what}: {done}/{total}{left}", style="dim")
