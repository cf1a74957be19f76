"""Leader term: a planner's work from winning an epoch of a region to losing it.

The planner decides on every input, sends each decision without waiting for its acknowledgement, and reads it back from the
topic. If a decision is missing there, the term ends and `planner.service.service` rebuilds the state from the topic.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from collections.abc import Awaitable, Iterable
from pathlib import PurePath
from typing import Any, NamedTuple

from bus import messages, topics
from bus.dead_letter import DeadLetterLimiter, write_dead_letter
from bus.decisions import MAX_OFFSET_GAP, Dropped
from bus.errors import BusError, InvariantError, ProtocolError
from bus.identity.keys import WRONG_IDENTITY
from bus.messages import (
    Change,
    Decision,
    DecisionPart,
    Ended,
    EpochOpened,
    Learned,
    Message,
    PlannerHeartbeat,
    TaskState,
    TaskSubmitted,
)
from bus.port import Position, Reader, Record
from planner.core.core import Event, Tick, Unhandled
from planner.service.record_split import split_decision
from planner.service.region_context import Failure, RegionContext
from planner.service.snapshot_writer import SnapshotWriter

HEARTBEATS_PER_LEASE = 5
"""Number of heartbeats that an idle leader sends per lease."""
POLICY_ERROR = "policy_error"
"""Cause of a rejection after a user's policy failed."""

MAX_UNCONFIRMED = 200
"""Limit for records sent and not yet read back; at the limit the planner stops deciding until one is read back."""
CHECKPOINT_EVERY = 1000
"""Number of inputs without a change (mostly heartbeats) after which an empty decision records the input offsets."""
GUARD_S = 60.0
"""Interval between checks for deleted decisions."""
INPUTS = (topics.NODES, topics.TASKS, topics.EVENTS)
"""Input topics, in the order in which records of one fetch are handled."""
MAX_DETAIL = 1_000
"""Maximum length, in characters, of the recorded reason why handling an input failed."""
UNREADABLE = ("undecodable", "oversized", "unknown_version")
"""Reasons that make a dropped decision record a dead letter. Records dropped for other reasons come from deposed planners."""


class Deposed(Exception):
    """The term is over. The latest decisions may be void, so the state must be rebuilt from the topic."""


class InputFailed(Deposed):
    """Handling an input failed and may have damaged the state: rebuild it from the topic and skip the input."""


class _Unconfirmed(NamedTuple):
    """A record that was sent and not yet read back."""

    seq: int
    part: int | None  # None: the decision itself
    payload: bytes
    begun_s: float  # start of its step, on the event loop's clock


class LeaderTerm:
    """One term of a leader. The service runs its public coroutines side by side and cancels all when one fails."""

    def __init__(self, context: RegionContext, reader: Reader) -> None:
        self.context = context
        self.reader = reader
        self.epoch = context.decision_log.epoch
        self.nonce = context.nonce
        self.seq = context.decision_log.seq
        self._unconfirmed: deque[_Unconfirmed] = deque()  # in the order sent
        self._acknowledgements: asyncio.Queue[Awaitable[Position]] = asyncio.Queue()
        self._room = asyncio.Event()  # set when a record was read back
        self._begun_s = 0.0  # start of the current step, on the event loop's clock
        self._last_sent_s = float("-inf")  # time of the last record sent, on the event loop's clock
        self._unrecorded = 0  # inputs read since the last decision
        self._due: dict[str, int] | None = None  # end offsets of the inputs when a `Tick` became due
        self._snapshot_writer = SnapshotWriter(context)
        self._dead_letter_limiter = DeadLetterLimiter()
        self._not_logged = 0  # rejections left out of the log since the last logged one

    # --- records written ---------------------------------------------------------------------------------------------

    async def read_back(self) -> None:
        """Read the decision topic and check that it holds exactly the records this planner sent, in order."""
        context = self.context
        while context.unreadable:  # read while this planner was standing by
            await self._dead_letter_unreadable(*context.unreadable.popleft())
        while True:
            for record in await self.reader.fetch():
                message = context.decision_log.read(record)
                if isinstance(message, EpochOpened):
                    raise Deposed(f"{message.planner} opened epoch {message.epoch}")
                if isinstance(message, Dropped) and self._unconfirmed and record.value == self._unconfirmed[0].payload:
                    raise InvariantError(
                        f"own decision {self._unconfirmed[0].seq} dropped by the reading rule: {message.detail}"
                    )
                if isinstance(message, Dropped) and message.reason in UNREADABLE:
                    await self._dead_letter_unreadable(record, message)
                if not isinstance(message, Decision | DecisionPart):
                    continue
                part = message.part if isinstance(message, DecisionPart) else None
                if not self._unconfirmed or (message.seq, part) != (
                    self._unconfirmed[0].seq,
                    self._unconfirmed[0].part,
                ):
                    raise InvariantError(f"decision {message.seq} read back out of order")
                begun_s = self._unconfirmed.popleft().begun_s
                self._room.set()
                if isinstance(message, DecisionPart):
                    continue
                now_s = asyncio.get_running_loop().time()
                context.statistics.record(message)
                self._log_rejections(message, now_s)
                if context.traces is not None:
                    context.traces.record(message, begun_s, now_s, now_s - context.now_s())
                self._snapshot_writer.decision_read_back(message.seq, record.offset)

    def _log_rejections(self, decision: Decision, now_s: float) -> None:
        """Log rejected tasks, rate-limited. `_publish_decision` logs rejections after a policy failure."""
        for change in decision.changes:
            if not isinstance(change, Ended) or change.state is not TaskState.REJECTED or change.cause == POLICY_ERROR:
                continue
            if not self._dead_letter_limiter.take(now_s):
                self._not_logged += 1
                continue
            about = {"task": change.task_id, "cause": change.cause, "detail": change.detail}
            self.context.log.warning("task rejected", **about, not_logged_before=self._not_logged)
            self._not_logged = 0

    async def _dead_letter_unreadable(self, record: Record, dropped: Dropped) -> None:
        """Dead-letter an unreadable record of the decision topic once: the next decision records its offset as read."""
        context = self.context
        if record.offset >= context.inputs.get(topics.DECISIONS, 0):
            error = ProtocolError(dropped.reason, dropped.detail)
            context.counters.dead_letters += 1
            await write_dead_letter(context.bus, record, error, task_id="", by=context.settings.name)
            self._read_up_to(topics.DECISIONS, record)

    def _read_up_to(self, topic: str, record: Record) -> None:
        """Have the next decision record this offset as read."""
        self.context.inputs[topic] = record.offset + 1
        self._unrecorded += 1

    async def dead_letter_broken_snapshots(self) -> None:
        """Dead-letter undecodable records of the snapshot topic once. Readers that search for a snapshot only skip them."""
        context = self.context
        where = (topics.SNAPSHOTS, context.settings.region)
        reader = await context.bus.reader([where], start={where: context.inputs.get(topics.SNAPSHOTS, 0)})
        try:
            while True:
                for record in await reader.fetch():
                    # Tombstones are written on purpose.
                    if record.value is not None and not self._snapshot_writer.wrote(record.value):
                        try:
                            messages.decode(record.topic, record.value)
                        except ProtocolError as error:
                            context.counters.dead_letters += 1
                            await write_dead_letter(context.bus, record, error, task_id="", by=context.settings.name)
                    self._read_up_to(topics.SNAPSHOTS, record)
        finally:
            await reader.close()

    async def await_acknowledgements(self) -> None:
        """End the term if a send fails: only the topic shows whether the record was written."""
        try:
            while True:
                acknowledgement = await self._acknowledgements.get()
                try:
                    await acknowledgement
                except BusError as error:
                    raise Deposed(f"sending a decision failed: {error}") from None
        finally:
            while not self._acknowledgements.empty():  # retrieve their errors, which asyncio would report otherwise
                rest = self._acknowledgements.get_nowait()
                if isinstance(rest, asyncio.Future):
                    rest.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def send_heartbeats(self) -> None:
        """Send a heartbeat when nothing was sent for a fifth of the lease."""
        context = self.context
        clock = asyncio.get_running_loop().time
        interval_s = context.settings.lease_s / HEARTBEATS_PER_LEASE
        while True:
            wait_s = self._last_sent_s + interval_s - clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                continue
            heartbeat = PlannerHeartbeat(region=context.settings.region, epoch=self.epoch, nonce=self.nonce)
            await self._post(heartbeat, messages.encode(heartbeat))

    async def write_snapshots(self) -> None:
        """Write each snapshot after its decision was read back."""
        await self._snapshot_writer.run()

    async def guard_log_start(self) -> None:
        """Force a snapshot if decisions were deleted that no snapshot covers: only this planner still holds the state."""
        context = self.context
        where = (topics.DECISIONS, context.settings.region)
        while True:
            await asyncio.sleep(GUARD_S)
            try:
                reader = await context.bus.reader([where], start="start")
                begin = reader.position(where)
                await reader.close()
                covered = begin == 0 or await self._snapshot_writer.covers(begin)
            except BusError as error:
                context.log.warning("start of the decisions not read; retrying", error=str(error))
                continue
            if not covered:
                context.log.error(
                    "decisions without a snapshot were deleted; snapshot forced",
                    log_begins_at=begin,
                    remedy="check the retention of the topic: deepar doctor",
                )
                context.snapshot_seq = (
                    -context.settings.snapshot_every - context.core.live_tasks
                )  # due with the next decision,
                self._unrecorded = CHECKPOINT_EVERY  # which the next input triggers

    # --- deciding ----------------------------------------------------------------------------------------------------

    async def decide(self) -> None:
        """Handle the region's inputs one by one, and a `Tick` when the core's next wake-up time has passed."""
        context = self.context
        start = {(topic, context.settings.region): context.inputs[topic] for topic in INPUTS}
        reader = await context.bus.reader(list(start), start=start)
        try:
            while True:
                records = await reader.fetch(timeout_s=self._fetch_timeout_s())
                # Nodes first, so that a task finds its device even if both arrive in one fetch.
                for record in sorted(records, key=lambda record: INPUTS.index(record.topic)):
                    await self._handle_record(record)
                await self._tick_when_due(reader)
        finally:
            await reader.close()

    async def _handle_record(self, record: Record) -> None:
        """Handle one input. An input that failed in an earlier term is dead-lettered, and its task ends with that cause."""
        context = self.context
        missing = record.offset - context.inputs[record.topic]
        if missing > MAX_OFFSET_GAP and record.topic != topics.NODES:  # compacted, so holes are normal
            context.counters.lost_inputs += missing
            context.log.error(
                "inputs were deleted before they were read",
                topic=record.topic,
                records=missing,
                remedy="check the retention of the topic: deepar doctor",
            )
        message, failure = None, context.failures.get((record.topic, record.offset))
        try:
            if failure is None:
                message = event = await self._read(record)
            else:
                event = await self._skip(record, failure)
            await self._step(event, (record.topic, record.offset + 1))
        except (BusError, Deposed):
            raise
        except Exception as error:
            raise self._failed(record, message, error) from error
        if failure is not None:
            if self._unrecorded:
                await self._publish_decision((), context.now_s())  # record it as read, so that the next leader skips it
            del context.failures[record.topic, record.offset]

    async def _read(self, record: Record) -> Any:
        """Decode a record; None if it was rejected."""
        try:
            message = self.context.input_filter.read(record, self.context.core)
            if isinstance(message, TaskSubmitted) and self.context.core.contradicts(message):
                raise ProtocolError(
                    "task_id_taken", f"task id {message.task_id} belongs to an earlier task; submission ignored"
                )
            return message
        except ProtocolError as error:
            await self._reject(record, error)
            return None

    def _failed(self, record: Record, message: Any, error: Exception) -> InputFailed:
        """Remember the input as failed. Rebuilding the state from the topic undoes what it changed."""
        context = self.context
        origin = f"{record.topic}/{record.partition}/{record.offset}"
        context.log.error("input not handled", origin=origin, exc_info=error)
        context.counters.input_failures += 1
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        where = f"{PurePath(frame.f_code.co_filename).name}:{line}"
        detail = f"{type(error).__name__} at {where}: {error}"[:MAX_DETAIL]
        before = context.failures.get((record.topic, record.offset))
        context.failures[record.topic, record.offset] = Failure(
            message, detail, 1 if before is None else before.times + 1
        )
        return InputFailed(f"input {origin} not handled: {detail}")

    async def _skip(self, record: Record, failure: Failure) -> Event | None:
        """Dead-letter a failed input. Return the event that ends its task, or None if that event failed before."""
        context = self.context
        context.counters.dead_letters += 1
        await write_dead_letter(
            context.bus,
            record,
            ProtocolError("planner_error", failure.detail),
            task_id=getattr(failure.message, "task_id", ""),
            by=context.settings.name,
        )
        return (
            Unhandled(failure.message, failure.detail) if failure.times == 1 and failure.message is not None else None
        )

    async def _reject(self, record: Record, error: ProtocolError) -> None:
        """Dead-letter and log an invalid or unauthorized record, within rate limits; the state does not change."""
        context = self.context
        if not context.input_filter.should_dead_letter(error, asyncio.get_running_loop().time()):
            return
        if error.cause == "task_id_taken":
            context.log.warning("submission ignored: task id taken", task=record.key, offset=record.offset)
        if error.cause == WRONG_IDENTITY:
            where = f"{record.topic}/{record.partition}/{record.offset}"
            context.log.warning(
                "record rejected: unauthorized", why=str(error), origin=where, refused=context.input_filter.refused
            )
        elif self._dead_letter_limiter.take(asyncio.get_running_loop().time()):
            about = {"topic": record.topic, "offset": record.offset, "cause": error.cause, "error": str(error)}
            context.log.warning("record dead-lettered", **about)
        context.counters.dead_letters += 1
        await write_dead_letter(context.bus, record, error, task_id=record.key or "", by=context.settings.name)

    def _fetch_timeout_s(self) -> float:
        """Timeout of the next fetch of inputs."""
        wakeup_s = self.context.core.next_wakeup()
        if wakeup_s is None:
            return 1.0
        return 0.1 if self._due is not None else min(1.0, max(0.001, wakeup_s - self.context.now_s()))

    async def _tick_when_due(self, reader: Reader) -> None:
        """Let the core handle expired leases and deadlines, after all inputs present at that time have been read.

        A node whose heartbeat still waits unread is therefore not declared lost after a takeover, under load, or after this
        process was frozen.
        """
        context = self.context
        wakeup_s = context.core.next_wakeup()
        if wakeup_s is None or wakeup_s > context.now_s():
            self._due = None
            return
        if self._due is None:
            try:
                self._due = {topic: (await context.bus.end_offsets(topic))[context.settings.region] for topic in INPUTS}
            except BusError as error:
                context.log.warning("end of the inputs not read; retrying", error=str(error))
                return
        if all(reader.position((topic, context.settings.region)) >= end for topic, end in self._due.items()):
            self._due = None
            await self._step(Tick(), None)

    async def _step(self, event: Event | None, consumed: tuple[str, int] | None) -> None:
        """Let the core handle an event and send the decision. Called only from `decide`, which preserves their order."""
        context = self.context
        while len(self._unconfirmed) >= MAX_UNCONFIRMED:
            self._room.clear()
            await self._room.wait()
        self._begun_s = asyncio.get_running_loop().time()
        now_s = context.now_s()
        changes = context.core.handle(event, now_s) if event is not None else []
        if consumed is not None:
            context.inputs[consumed[0]] = consumed[1]
            self._unrecorded += 1
        if changes or self._unrecorded >= CHECKPOINT_EVERY:
            await self._publish_decision(changes, now_s)

    async def _publish_decision(self, changes: Iterable[Change], now_s: float) -> None:
        """Send one decision: the changes, the input offsets and the hash of the state after them."""
        context = self.context
        changes = tuple(changes)
        for change in changes:
            context.counters.learned += isinstance(change, Learned)
            if isinstance(change, Ended) and change.cause == POLICY_ERROR:
                context.counters.policy_errors += 1
                context.log.error("policy failed; task rejected", task=change.task_id, why=change.detail)
        self.seq += 1
        self._unrecorded = 0
        decision = Decision(
            region=context.settings.region,
            epoch=self.epoch,
            nonce=self.nonce,
            seq=self.seq,
            now_s=now_s,
            inputs=dict(context.inputs),
            changes=changes,
            ledger_hash=context.core.state_hash,
            at=context.utc(),
        )
        payload = messages.encode(decision)
        if len(payload) > context.settings.record_bytes and len(decision.changes) > 1:
            parts, decision = split_decision(decision, context.settings.record_bytes)
            for part in parts:
                await self._send(part, messages.encode(part))
            payload = messages.encode(decision)
        self._snapshot_writer.copy_if_due(decision)
        await self._send(decision, payload)
        context.counters.decisions += 1

    async def _send(self, record: Decision | DecisionPart, payload: bytes) -> None:
        """Send a record and remember that it must be read back."""
        if len(payload) > messages.MAX_MESSAGE_BYTES:
            raise InvariantError(
                f"decision {record.seq} takes {len(payload):,} bytes; the limit is {messages.MAX_MESSAGE_BYTES:,}"
            )
        part = record.part if isinstance(record, DecisionPart) else None
        self._unconfirmed.append(_Unconfirmed(record.seq, part, payload, self._begun_s))
        await self._post(record, payload)

    async def _post(self, message: Message, payload: bytes) -> None:
        """Send a record without waiting; `await_acknowledgements` reports a failure."""
        context = self.context
        acknowledgement = await context.bus.post(
            topics.DECISIONS,
            payload,
            key=str(context.settings.region),
            partition=context.settings.region,
            headers=context.envelope.headers(message),
        )
        self._acknowledgements.put_nowait(acknowledgement)
        self._last_sent_s = asyncio.get_running_loop().time()


__all__ = ["HEARTBEATS_PER_LEASE", "INPUTS", "UNREADABLE", "Deposed", "LeaderTerm"]
