"""Replay of a schedule over a bus, with the outcome of each task read back from the topics.

The generator is an ordinary client: it writes `deepar.tasks` and reads `deepar.decisions` (with the reading rule of
`bus.decisions`) and `deepar.events`. The same code runs on Kafka, `MemoryBus`, and virtual time. An open-loop task is
sent when it is due, independent of the progress of earlier tasks.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from bus import messages, topics
from bus.decisions import DecisionLog
from bus.errors import BusError, ProtocolError
from bus.headers.envelope import Envelope
from bus.headers.tracing import SUBMIT, TASK, Span, SpanSink, span_id
from bus.identity.signed_bus import satisfy_region
from bus.messages import Decision, EpochOpened, TaskCompleted
from bus.port import Bus, Position, Reader
from loadgen.replay import metrics
from loadgen.replay.outcome import Outcome, Recorder
from loadgen.replay.readiness import FETCH_S, decisions_from_now
from loadgen.replay.schedule import Entry, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """The result of a finished replay."""

    outcomes: tuple[Outcome, ...]  # in due order
    seed: int  # seed of the schedule
    dropped_records: int  # decisions that the reading rule ignored
    unreadable_records: int  # events that could not be decoded

    @property
    def summary(self) -> dict[str, Any]:
        """What `deepar loadgen replay --json` prints, without `files`."""
        return metrics.summary(self.outcomes, seed=self.seed)

    @property
    def unfinished(self) -> int:
        """Number of tasks that had not ended when the replay stopped reading."""
        return sum(outcome.state is None for outcome in self.outcomes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observers:
    """Where a replay reports to while it runs."""

    recorder: Recorder = field(default_factory=Recorder)  # holds the outcomes, also after an interruption
    progress: Callable[[Recorder], None] | None = None  # called on every submission and every record read
    on_span: SpanSink | None = None  # receives a span for every submission


async def replay(
    bus: Bus,
    schedule: Schedule,
    *,
    region: int = 0,
    drain_timeout_s: float = 120.0,
    wall_clock: Callable[[], datetime] | None = None,
    observers: Observers | None = None,
) -> ReplayResult:
    """Submit the schedule and read until every task has ended, or until no task ended for `drain_timeout_s`.

    The replay also waits while the bus still tries to deliver a task; the bus gives up in bounded time. `wall_clock`
    fills `submitted_at`, which is informational (virtual time omits it). The topics must exist. Raises `BusError`, and
    `ConfigError` if the region demands signed records and `bus` does not sign (`bus.identity.signed_bus`).
    """
    run = _Replay(bus, schedule, region, wall_clock, observers or Observers())
    await run.play(drain_timeout_s)
    return ReplayResult(
        outcomes=tuple(run.recorder.outcomes.values()),
        seed=schedule.seed,
        dropped_records=run.log.dropped,
        unreadable_records=run.unreadable,
    )


class _Replay:
    """The state of one replay."""

    def __init__(
        self,
        bus: Bus,
        schedule: Schedule,
        region: int,
        wall_clock: Callable[[], datetime] | None,
        observers: Observers,
    ) -> None:
        self.bus, self.schedule, self.region, self.wall_clock = bus, schedule, region, wall_clock
        self.recorder, self.progress, self.on_span = observers.recorder, observers.progress, observers.on_span
        self.envelope = Envelope(f"/deepar/{region}/loadgen", uuid.uuid4().hex[:12])
        self.log = DecisionLog()
        self.unreadable = 0
        self._loop = asyncio.get_running_loop()
        self._began_s = 0.0
        self._changed = asyncio.Event()  # set when a task is acknowledged or ends
        self._unacknowledged = 0  # tasks that the bus is still delivering

    def now_s(self) -> float:
        """Seconds since the replay began."""
        return self._loop.time() - self._began_s

    async def play(self, drain_timeout_s: float) -> None:
        self.log, decisions = await decisions_from_now(self.bus, self.region)
        events = await self.bus.reader([(topics.EVENTS, self.region)], start="end")
        try:
            satisfy_region(self.bus, self.log.demanded, "whoever submits")
            for entry in self.schedule.entries:
                self.recorder.expect(entry)
            self._began_s = self._loop.time()
            async with asyncio.TaskGroup() as group:
                followers = [
                    group.create_task(self._follow(decisions, self._read_decision), name="replay decisions"),
                    group.create_task(self._follow(events, self._read_event), name="replay events"),
                ]
                await self._submit(group)
                await self._drain(drain_timeout_s)
                for follower in followers:
                    follower.cancel()
        finally:
            await decisions.close()
            await events.close()

    async def _submit(self, group: asyncio.TaskGroup) -> None:
        for entry in self.schedule.entries:
            task_id = entry.task.task_id
            due_s: float | None = None
            if self.schedule.closed:
                while self.recorder.ended < self.recorder.submitted:
                    await self._change()
                due_s = self.now_s()
            else:
                # Due times are absolute, so a late wake-up does not delay later tasks.
                await asyncio.sleep(max(0.0, self._began_s + entry.at_s - self._loop.time()))
            self.recorder.submit(task_id, self.now_s(), due_s=due_s)
            acknowledged = await self._post(entry)
            if acknowledged is not None:
                group.create_task(self._acknowledge(task_id, acknowledged), name=f"acknowledge {task_id}")
            self._report()

    async def _post(self, entry: Entry) -> Awaitable[Position] | None:
        task = entry.task
        if self.wall_clock is not None:
            task = task.model_copy(update={"submitted_at": self.wall_clock().isoformat()})
        try:
            return await self.bus.post(
                topics.TASKS,
                messages.encode(task),
                key=task.task_id,
                partition=self.region,
                headers=self.envelope.headers(task),
            )
        except BusError:
            self._lost(task.task_id)
            return None

    async def _acknowledge(self, task_id: str, acknowledged: Awaitable[Position]) -> None:
        self._unacknowledged += 1
        try:
            await acknowledged
        except BusError:
            self._lost(task_id)
            return
        finally:
            self._unacknowledged -= 1
            self._changed.set()
        self.recorder.outcomes[task_id].acknowledged_s = self.now_s()
        self._tell(task_id)

    def _lost(self, task_id: str) -> None:
        self.recorder.lose(task_id)
        self._tell(task_id, failed="not acknowledged")
        self._changed.set()

    def _tell(self, task_id: str, failed: str = "") -> None:
        if self.on_span is not None:
            begin_s = self._began_s + (self.recorder.outcomes[task_id].submitted_s or 0.0)
            own, parent = span_id(task_id, SUBMIT), span_id(task_id, TASK)
            attributes = {"deepar.role": "loadgen"}
            self.on_span(Span(task_id, SUBMIT, own, parent, begin_s, self._loop.time(), attributes, failed))

    async def _drain(self, timeout_s: float) -> None:
        while self.recorder.ended < len(self.schedule):
            try:
                async with asyncio.timeout(timeout_s):
                    await self._change()
            except TimeoutError:
                if not self._unacknowledged:
                    return

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _follow(self, reader: Reader, read: Callable[[Any], None]) -> None:
        while True:
            for record in await reader.fetch(timeout_s=FETCH_S):
                read(record)
            self._report()

    def _read_decision(self, record: Any) -> None:
        message = self.log.read(record)
        if isinstance(message, EpochOpened):
            # A submitter without a key stops here: the planner would reject all its tasks from now on.
            satisfy_region(self.bus, self.log.demanded, "whoever submits")
        if isinstance(message, Decision) and self.recorder.decide(message, self.now_s()):
            self._changed.set()

    def _read_event(self, record: Any) -> None:
        try:
            event = messages.decode(topics.EVENTS, record.value)
        except ProtocolError:
            self.unreadable += 1  # not written by this replay; the planner dead-letters it
            return
        if isinstance(event, TaskCompleted):
            self.recorder.complete(event, self.now_s())

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.recorder)


def utc_now() -> datetime:
    """Current wall-clock time, for `submitted_at` and for reports."""
    return datetime.now(UTC)
