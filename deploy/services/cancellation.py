"""Cancellation of tasks: requests on `deepar.tasks`, followed in the decisions until each task has ended.

The planner decides the order: a task that completes before the planner reads the request stays COMPLETED. A request
for an ended task changes nothing, so a repeated request is safe.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from bus import messages, snapshots, topics
from bus.decisions import DecisionLog
from bus.errors import BusUnavailableError, ProtocolError
from bus.headers.envelope import Envelope
from bus.identity.signed_bus import satisfy_region
from bus.messages import Admitted, Decision, Ended, Snapshot, TaskCancelled, TaskState, TaskSubmitted
from bus.port import Bus, Reader

CANCELLED = "cancelled"
"""Cause of a task that is FAILED because it was cancelled."""

FETCH_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Outcome of the cancellation of one task."""

    task_id: str
    state: TaskState | None  # None: unknown to the region
    cause: str = ""
    before: bool = False  # whether it had ended before the request

    @property
    def cancelled(self) -> bool:
        """Whether the task ended because it was cancelled, now or earlier."""
        return self.cause == CANCELLED


class _Region:
    """Live and ended tasks of a region, folded from a snapshot and the decisions after it."""

    def __init__(self, snapshot: Snapshot | None) -> None:
        self.log = DecisionLog() if snapshot is None else snapshots.log_behind(snapshot)
        self.read_tasks = 0  # the planner has read deepar.tasks up to this offset, or further
        self.live: set[str] = set()
        self.ended: dict[str, tuple[TaskState, str]] = {}  # state and cause
        if snapshot is not None:
            self.read_tasks = snapshot.inputs.get(topics.TASKS, 0)
            self.live.update(task["submitted"]["task_id"] for task in snapshot.state.get("tasks", ()))
            self.ended.update((task_id, (TaskState(state), "")) for task_id, state in snapshot.state.get("ended", ()))

    async def read(self, reader: Reader) -> None:
        """Fold the decisions of one fetch."""
        for record in await reader.fetch(timeout_s=FETCH_S):
            message = self.log.read(record)
            if not isinstance(message, Decision):
                continue
            self.read_tasks = message.inputs.get(topics.TASKS, self.read_tasks)
            for change in message.changes:
                if isinstance(change, Admitted):
                    self.live.add(change.task.task_id)
                    self.ended.pop(change.task.task_id, None)
                elif isinstance(change, Ended):
                    self.live.discard(change.task_id)
                    self.ended[change.task_id] = (change.state, change.cause)


async def cancel(bus: Bus, region: int, task_ids: Iterable[str], *, timeout_s: float) -> list[End]:
    """Cancel tasks of a region and wait until each has ended. Unknown tasks are skipped.

    Raises `BusUnavailableError` if no planner answers within `timeout_s`, and `ConfigError` if the region requires
    a proof of identity that `bus` does not provide.
    """
    wanted = list(dict.fromkeys(task_ids))
    snapshot, reader = await snapshots.open_decisions(bus, region)
    try:
        known = _Region(snapshot)
        while await reader.lag():
            await known.read(reader)
        satisfy_region(bus, known.log.demanded, "the canceller")
        before = {task_id for task_id in wanted if task_id in known.ended}
        unknown = {task_id for task_id in wanted if task_id not in known.live and task_id not in before}
        if unknown:
            unknown -= await _submitted(bus, region, known.read_tasks)
        asked = [task_id for task_id in wanted if task_id not in before and task_id not in unknown]
        await _ask(bus, region, asked)
        await _await_ends(known, reader, asked, timeout_s)
    finally:
        await reader.close()
    return [
        End(task_id=task_id, state=None)
        if task_id in unknown
        else End(
            task_id=task_id, state=known.ended[task_id][0], cause=known.ended[task_id][1], before=task_id in before
        )
        for task_id in wanted
    ]


async def _submitted(bus: Bus, region: int, begin: int) -> set[str]:
    """The tasks submitted from this offset of `deepar.tasks` on; the planner may not have read them yet."""
    where = (topics.TASKS, region)
    found: set[str] = set()
    reader = await bus.reader([where], start={where: begin})
    try:
        while await reader.lag():
            for record in await reader.fetch(timeout_s=FETCH_S):
                try:
                    message = messages.decode(topics.TASKS, record.value)
                except ProtocolError:
                    continue
                if isinstance(message, TaskSubmitted):
                    found.add(message.task_id)
    finally:
        await reader.close()
    return found


async def _ask(bus: Bus, region: int, task_ids: Iterable[str]) -> None:
    envelope = Envelope(f"/deepar/{region}/cancel", uuid.uuid4().hex[:12])
    for task_id in task_ids:
        message = TaskCancelled(task_id=task_id)
        headers = envelope.headers(message)
        await bus.send(topics.TASKS, messages.encode(message), key=task_id, partition=region, headers=headers)


async def _await_ends(known: _Region, reader: Reader, asked: list[str], timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not known.ended.keys() >= set(asked):
                await known.read(reader)
    except TimeoutError:
        left = [task_id for task_id in asked if task_id not in known.ended]
        raise BusUnavailableError(
            f"no planner has cancelled {', '.join(left[:5])} within {timeout_s:g} s; the request stays on {topics.TASKS} "
            "and takes effect when a planner reads it",
            remedy="check whether a planner leads: deepar doctor; or start one: deepar planner",
        ) from None


__all__ = ["CANCELLED", "End", "cancel"]
