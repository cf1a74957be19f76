"""A schedule: which task is submitted when. Made from arrivals and a source, or read from a file, and kept as
a value.

The same schedule can be replayed live, in virtual time and through the core-only driver. As a file it is JSON
Lines, one task a line: `{"at_s": 1.5, "model": "lenet", "samples": 10, "device": "d1", ...}`; every field of
`TaskSubmitted` may stand there. `timestamp` (ISO 8601) may stand in the place of `at_s`; times then count
from the first line's.
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

    at_s: float  # when it is due, from the start of the replay
    task: TaskSubmitted  # what is published
    warmup: bool = False  # runs like the others and is left out of the summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Tasks in the order in which they are due. Validated when built: times do not fall, names differ."""

    entries: tuple[Entry, ...]
    closed: bool = False  # a task is due when the one before it has ended (MLPerf's streams), whatever `at_s` says
    seed: int = 0  # what it was drawn from, for the report
    streams: str = ""  # the streams that were used, for the report

    def __post_init__(self) -> None:
        last = 0.0
        seen: set[str] = set()
        for entry in self.entries:
            if not (entry.at_s >= last and math.isfinite(entry.at_s)):
                raise ConfigError(f"task {entry.task.task_id} is due at {entry.at_s}, before the one before it")
            last = entry.at_s
            if entry.task.task_id in seen:
                raise ConfigError(f"two tasks of the schedule are called {entry.task.task_id}")
            seen.add(entry.task.task_id)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def span_s(self) -> float:
        """From the start of the replay to the last arrival."""
        return self.entries[-1].at_s if self.entries else 0.0

    def scaled(self, time_scale: float) -> Schedule:
        """Every arrival at `time_scale` times its instant: 0.1 plays ten times as fast. Raises `ConfigError`."""
        if not (time_scale > 0 and math.isfinite(time_scale)):
            raise ConfigError(f"the time scale must be over 0, not {time_scale}")
        return replace(self, entries=tuple(replace(entry, at_s=entry.at_s * time_scale) for entry in self.entries))

    def with_warmup(self, tasks: int) -> Schedule:
        """The first `tasks` tasks marked as warm-up."""
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
    warmup: int = 0,
    closed: bool = False,
) -> Schedule:
    """A schedule of `tasks` tasks, the first `warmup` of them warm-up. The same arguments give the same schedule."""
    if tasks < 1:
        raise ConfigError(f"a schedule needs at least one task, not {tasks}")
    streams = Streams(seed)
    instants = arrivals(tasks, streams.stream("arrivals"))
    drawn = draw(mix, tasks, devices, streams, prefix=prefix)
    entries = tuple(
        Entry(at_s=instant, task=task, warmup=index < warmup)
        for index, (instant, task) in enumerate(zip(instants, drawn, strict=True))
    )
    return Schedule(entries=entries, closed=closed, seed=seed, streams=", ".join(streams.names))


def read(path: Path, devices: Sequence[str], *, seed: int = 0, prefix: str = "task") -> Schedule:
    """The schedule of a JSON Lines file. Tasks without a device take `devices` in turn, without an id
    `PREFIX-LINE`.

    Raises `ConfigError` naming file, line and key.
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
            raise ConfigError(f"{where}: not an object with keys")
        if "timestamp" in fields and "at_s" not in fields:
            moment = _moment(fields.pop("timestamp"), where)
            origin = origin or moment
            fields["at_s"] = (moment - origin).total_seconds()
        if "at_s" not in fields:
            raise ConfigError(f"{where}: neither `at_s` nor `timestamp` says when the task is due")
        entries.append(_entry(fields, devices, len(entries), seed, f"{prefix}-{number}", where))
    if not entries:
        raise ConfigError(f"{path}: holds no task")
    entries.sort(key=lambda entry: entry.at_s)
    return Schedule(entries=tuple(entries), seed=seed)


def write(schedule: Schedule, path: Path) -> None:
    """The schedule as JSON Lines that `read` takes."""
    lines = []
    for entry in schedule.entries:
        fields = {"at_s": entry.at_s, **entry.task.model_dump(mode="json", exclude_none=True)}
        if entry.warmup:
            fields["warmup"] = True
        lines.append(json_text(fields))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def merged(schedules: Iterable[Schedule]) -> Schedule:
    """Several open-loop schedules played at once."""
    entries = sorted((entry for schedule in schedules for entry in schedule.entries), key=lambda entry: entry.at_s)
    return Schedule(entries=tuple(entries))


def _entry(fields: dict[str, Any], devices: Sequence[str], index: int, seed: int, task_id: str, where: str) -> Entry:
    at_s, warmup = fields.pop("at_s"), bool(fields.pop("warmup", False))
    if not isinstance(at_s, int | float) or isinstance(at_s, bool) or not (at_s >= 0 and math.isfinite(at_s)):
        raise ConfigError(f"{where}: at_s is {at_s!r}, not a number of seconds")
    if "device" not in fields and not devices:
        raise ConfigError(f"{where}: no `device`, and none is known to take its place")
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
