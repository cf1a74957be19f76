"""Schedules: tasks with their submission times, generated from an arrival pattern or read from a file.

The same schedule can be replayed live, in virtual time, and through the core-only driver. The file format is JSON
Lines, one task per line: `{"at_s": 1.5, "model": "lenet", "samples": 10, "device": "d1", ...}`. Every field of
`TaskSubmitted` is allowed. `timestamp` (ISO 8601) may replace `at_s`; times then count from the first line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bus.errors import ConfigError
from bus.messages import TaskSubmitted
from bus.text.json_text import json_text
from bus.validation import first_fault
from loadgen.random_streams import Streams
from loadgen.replay.arrivals import Arrivals
from loadgen.replay.task_mix import Mix, draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One task of a schedule."""

    at_s: float  # due time, seconds from the start of the replay
    task: TaskSubmitted  # message to publish
    warmup: bool = False  # runs normally but is excluded from the summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Tasks in due order. Validated when built: times are ascending, task ids are unique."""

    entries: tuple[Entry, ...]
    closed: bool = False  # closed loop: a task is due when the previous one has ended, and `at_s` is ignored
    seed: int = 0  # seed of the generated values, for the report
    streams: str = ""  # names of the random streams used, for the report

    def __post_init__(self) -> None:
        last = 0.0
        seen: set[str] = set()
        for entry in self.entries:
            if not (entry.at_s >= last and math.isfinite(entry.at_s)):
                raise ConfigError(f"task {entry.task.task_id} is due at {entry.at_s}, earlier than the previous task")
            last = entry.at_s
            if entry.task.task_id in seen:
                raise ConfigError(f"duplicate task id in the schedule: {entry.task.task_id}")
            seen.add(entry.task.task_id)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def span_s(self) -> float:
        """Time from the start of the replay to the last arrival."""
        return self.entries[-1].at_s if self.entries else 0.0

    def scaled(self, time_scale: float) -> Schedule:
        """A copy with every arrival time multiplied by `time_scale`; 0.1 is ten times as fast. Raises `ConfigError`."""
        if not (time_scale > 0 and math.isfinite(time_scale)):
            raise ConfigError(f"the time scale must be greater than 0, not {time_scale}")
        return replace(self, entries=tuple(replace(entry, at_s=entry.at_s * time_scale) for entry in self.entries))

    def with_warmup(self, tasks: int) -> Schedule:
        """A copy with the first `tasks` tasks marked as warm-up."""
        marked = (replace(entry, warmup=index < tasks) for index, entry in enumerate(self.entries))
        return replace(self, entries=tuple(marked))


def make(
    tasks: int,
    arrivals: Arrivals,
    mix: Mix,
    devices: Sequence[str],
    *,
    seed: int,
    prefix: str = "task",
) -> Schedule:
    """Generate an open-loop schedule of `tasks` tasks. Deterministic for the same arguments."""
    if tasks < 1:
        raise ConfigError(f"a schedule needs at least one task, not {tasks}")
    streams = Streams(seed)
    instants = arrivals(tasks, streams.stream("arrivals"))
    drawn = draw(mix, tasks, devices, streams, prefix=prefix)
    entries = tuple(Entry(at_s=instant, task=task) for instant, task in zip(instants, drawn, strict=True))
    return Schedule(entries=entries, seed=seed, streams=", ".join(streams.names))


def read(path: Path, devices: Sequence[str], *, seed: int = 0, prefix: str = "task") -> Schedule:
    """Read a schedule from a JSON Lines file.

    Tasks without a device are assigned `devices` round-robin; tasks without an id are named `PREFIX-LINE`. Raises
    `ConfigError` naming file, line and key.
    """
    entries: list[Entry] = []
    origin: datetime | None = None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{where}: not a JSON object")
        if "timestamp" in fields and "at_s" not in fields:
            moment = _moment(fields.pop("timestamp"), where)
            origin = origin or moment
            fields["at_s"] = (moment - origin).total_seconds()
        if "at_s" not in fields:
            raise ConfigError(f"{where}: missing `at_s` or `timestamp`, the time at which the task is due")
        entries.append(_entry(fields, devices, len(entries), seed, f"{prefix}-{number}", where))
    if not entries:
        raise ConfigError(f"{path}: contains no tasks")
    entries.sort(key=lambda entry: entry.at_s)
    return Schedule(entries=tuple(entries), seed=seed)


def write(schedule: Schedule, path: Path) -> None:
    """Write the schedule as JSON Lines in the format that `read` accepts."""
    lines = []
    for entry in schedule.entries:
        fields = {"at_s": entry.at_s, **entry.task.model_dump(mode="json", exclude_none=True)}
        if entry.warmup:
            fields["warmup"] = True
        lines.append(json_text(fields))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def merged(schedules: Iterable[Schedule]) -> Schedule:
    """One schedule that plays several open-loop schedules at the same time."""
    entries = sorted((entry for schedule in schedules for entry in schedule.entries), key=lambda entry: entry.at_s)
    return Schedule(entries=tuple(entries))


def _entry(fields: dict[str, Any], devices: Sequence[str], index: int, seed: int, task_id: str, where: str) -> Entry:
    at_s, warmup = fields.pop("at_s"), bool(fields.pop("warmup", False))
    if not isinstance(at_s, int | float) or isinstance(at_s, bool) or not (at_s >= 0 and math.isfinite(at_s)):
        raise ConfigError(f"{where}: at_s is {at_s!r}, not a number of seconds")
    if "device" not in fields and not devices:
        raise ConfigError(f"{where}: missing `device`, and no default device was given")
    defaults: dict[str, Any] = {
        "task_id": task_id,
        "samples": 1,
        "input": {"type": "seed", "seed": seed + index},
    }
    if devices:
        defaults["device"] = devices[index % len(devices)]
    try:
        task = TaskSubmitted.model_validate({**defaults, **fields})
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_fault(error)}") from None
    return Entry(at_s=float(at_s), task=task, warmup=warmup)


def _moment(text: Any, where: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: timestamp is {text!r}, not a time in ISO 8601") from None
