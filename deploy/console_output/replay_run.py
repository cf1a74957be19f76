"""A replay as `deepar loadgen replay` runs it: with a live display, and a summary at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from bus.errors import ConfigError, unknown_name
from bus.messages import NodeAnnounced
from bus.port import Bus
from bus.text.units import format_seconds
from bus.values import Role
from deploy.services.process import run_on_uvloop
from deploy.services.telemetry.otel import tracing
from deploy.services.wiring import require_region
from loadgen.replay import metrics
from loadgen.replay.outcome import Recorder
from loadgen.replay.readiness import await_planner, find_nodes
from loadgen.replay.replay import Observers, ReplayResult, utc_now
from loadgen.replay.replay import replay as play
from loadgen.replay.schedule import Schedule

PLANNER_TIMEOUT_S = 30.0
"""Listening time for a planner: a leading one sends a record a second, but none while a dead broker is replaced."""

TELL_EVERY_S = 10.0
"""Interval of progress lines if stderr is not a terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRequest:
    """The region and devices to which a replay submits, and how long it waits for the last tasks."""

    region: int
    devices: list[str] | None  # None: all announced devices that have every model
    models: frozenset[str]  # that the tasks need
    drain_timeout_s: float  # the replay ends after this time without an ended task


class ReplayRun:
    """One replay with a live display; keeps what was seen when it is interrupted."""

    def __init__(
        self,
        bus: Bus,
        request: ReplayRequest,
        make: Callable[[list[str]], Schedule],
        console: Console,
    ) -> None:
        """`make` makes the schedule for the devices that it is given."""
        self.bus, self.request, self.make, self.console = bus, request, make, console
        self.recorder = Recorder()
        self.seed = 0
        self.total = 0
        self.began_at = utc_now()
        self._began_s = self._told_s = time.monotonic()

    @property
    def result(self) -> ReplayResult:
        """The outcomes seen so far."""
        return ReplayResult(
            outcomes=tuple(self.recorder.outcomes.values()), seed=self.seed, dropped_records=0, unreadable_records=0
        )

    def play(self) -> bool:
        """Run to the end; True when Ctrl-C cut it short."""
        try:
            run_on_uvloop(self._play())
        except KeyboardInterrupt:
            if not self.recorder.outcomes:
                raise
            return True
        return False

    async def _play(self) -> None:
        async with tracing("deepar-loadgen") as on_span, self.bus:
            await require_region(self.bus, self.request.region)
            await await_planner(self.bus, self.request.region, timeout_s=PLANNER_TIMEOUT_S)
            found = await find_nodes(self.bus, self.request.region, [Role.DEVICE])
            there = [node.node for node in found]
            names = devices_for(self.request.models, found) if self.request.devices is None else self.request.devices
            if not names:
                raise ConfigError(
                    f"no device has announced itself in region {self.request.region}",
                    remedy="start one: deepar stage device",
                )
            if self.request.devices is None and len(names) < len(there):
                left_out = ", ".join(sorted({*there} - {*names}))
                line = f"devices left out, because they lack {' and '.join(sorted(self.request.models))}: {left_out}"
                self.console.print(line, style="yellow", markup=False)
            if absent := [name for name in names if name not in there]:
                start = f"deepar stage device --name {absent[0]}"
                line = f"devices not running, so their tasks wait: {', '.join(absent)}; start one: {start}"
                self.console.print(line, style="yellow", markup=False)
            schedule = self.make(names)
            require_models(schedule, found)
            self.seed, self.total = schedule.seed, len(schedule)
            self.console.print(f"seed {schedule.seed}; streams: {schedule.streams or 'from the file'}", style="dim")
            self.began_at, self._began_s = utc_now(), time.monotonic()
            self._told_s = self._began_s
            with Live(console=self.console, get_renderable=self._table, refresh_per_second=4, transient=True):
                await play(
                    self.bus,
                    schedule,
                    region=self.request.region,
                    drain_timeout_s=self.request.drain_timeout_s,
                    wall_clock=utc_now,
                    observers=Observers(
                        recorder=self.recorder,
                        on_span=on_span,
                        progress=None if self.console.is_terminal else self._tell,
                    ),
                )

    def _tell(self, recorder: Recorder) -> None:
        """For logs: a line in ten seconds."""
        now_s = time.monotonic()
        if now_s - self._told_s >= TELL_EVERY_S:
            self._told_s = now_s
            mean = _short(metrics.distribution(list(recorder.delays_s))["mean"])
            counts = (
                f"{recorder.submitted} of {self.total} submitted, {recorder.running} running, {recorder.ended} ended"
            )
            self.console.print(f"{now_s - self._began_s:.0f} s: {counts}, mean delay {mean}", style="dim")

    def _table(self) -> Table:
        recorder, delays = self.recorder, list(self.recorder.delays_s)
        table = Table(box=None, padding=(0, 1, 0, 0))
        for name in ("time", "submitted", "running", "ended", "mean", "p50", "p90", "p99"):
            table.add_column(name, justify="right", no_wrap=True)
        found = metrics.distribution(delays)
        cells = [_short(found[name]) for name in ("mean", "p50", "p90", "p99")]
        elapsed = f"{time.monotonic() - self._began_s:.0f} s"
        counts = (f"{recorder.submitted}/{self.total}", str(recorder.running), str(recorder.ended))
        table.add_row(elapsed, *counts, *cells)
        return table


def devices_for(models: Set[str], found: Sequence[NodeAnnounced]) -> list[str]:
    """The names of the devices that have every model, or of all where none has."""
    able = [node.node for node in found if models <= {profile.model for profile in node.models}]
    return able or [node.node for node in found]


def require_models(schedule: Schedule, found: Sequence[NodeAnnounced]) -> None:
    """Raises `UnknownNameError` for a task whose device is there, and whose model no device has: it would be rejected."""
    known = sorted({profile.model for node in found for profile in node.models})
    there = {node.node for node in found}
    for entry in schedule.entries:
        if entry.task.device in there and entry.task.model not in known:
            raise unknown_name("model on any device called", entry.task.model, known)


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Print the summary on a terminal."""
    states = ", ".join(
        f"{summary[name]} {name}"
        for name in ("completed", "rejected", "failed", "expired", "unfinished")
        if summary[name]
    )
    console.print(
        f"{summary['submitted']} tasks submitted: {states}; policy {summary['policy']}; seed {summary['seed']}"
    )
    if summary["causes"]:
        causes = ", ".join(f"{cause}: {count}" for cause, count in summary["causes"].items())
        console.print(f"causes: {causes}", markup=False)
    title = "Delay, counted from when each task was due"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "tasks", "mean", "p50", "p90", "p99", "p99.9"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name), overflow="fold")
    delay = summary["delay_s"]
    table.add_row("all", str(summary["completed"]), *(_short(delay[k]) for k in ("mean", "p50", "p90", "p99", "p99_9")))
    for group in ("by_kind", "by_model"):
        table.add_section()
        for name, row in summary[group].items():
            cells = (_short(row[k]) for k in ("mean_delay_s", "p50_s", "p90_s", "p99_s", "p99_9_s"))
            table.add_row(name, str(row["tasks"]), *cells)
    console.print(table)
    for path in summary.get("files", []):
        console.print(f"  {path}", markup=False)


def _short(seconds: float | None) -> str:
    return "-" if seconds is None else format_seconds(seconds)
