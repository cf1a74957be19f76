"""One spell of leading a region: decide on every input, put the records on their way, read them back.

`planner.service.service` tells when a spell begins and what follows it; everything that is decided in between can be
void, and is
folded anew from the topic when the spell is over.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from collections.abc import Awaitable, Iterable
from pathlib import PurePath
from typing import Any, NamedTuple

from bus import messages, topics
from bus.dead_letter import Allowance, bury
from bus.decisions import LARGEST_HOLE, Dropped
from bus.errors import BusError, InvariantError, ProtocolError
from bus.identity.keys import WRONG_IDENTITY
from bus.messages import (
    Change,
    Decision,
    DecisionPart,
    Ended,
    EpochOpened,
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
POLICY_ERROR = "policy_error"
"""The cause of a rejection that is the fault of a user's policy."""

MAX_UNPROVEN = 200
"""So many decisions may be on their way before the planner waits for their place in the log."""
CHECKPOINT_EVERY = 1000
"""After so many inputs that changed nothing (heartbeats, mostly) a record without changes says that they were read."""
GUARD_S = 60.0
"""How often the planner looks whether decisions are deleted."""
INPUTS = (topics.NODES, topics.TASKS, topics.EVENTS)
MAX_DETAIL = 1_000
"""So many characters are kept of why an input could not be handled."""
UNREADABLE = ("undecodable", "oversized", "unknown_version")
"""Why a record on the decisions is a dead letter; others are drafts of a planner that lost the region."""


class Deposed(Exception):
    """What was decided last may not count; fold the topic anew."""


class InputFailed(Deposed):
    """An input could not be handled, and the state may be broken: fold the topic anew, and do without the input."""


class _Unproven(NamedTuple):
    """A record that is on its way."""

    seq: int
    part: int | None  # None: the decision itself
    payload: bytes
    begun_s: float  # when its step began, the loop's clock


class LeaderTerm:
    """One spell of leading: from winning an epoch to losing it."""

    def __init__(self, context: RegionContext, reader: Reader) -> None:
        self.context = context
        self.reader = reader
        self.epoch = context.decision_log.epoch
        self.nonce = context.nonce
        self.seq = context.decision_log.seq
        self._unproven: deque[_Unproven] = deque()  # what was decided and not yet read back
        self._acknowledgements: asyncio.Queue[Awaitable[Position]] = asyncio.Queue()
        self._room = asyncio.Event()
        self._begun_s = 0.0  # when the present step began
        self._spoke_s = float("-inf")
        self._unrecorded = 0  # inputs read since the last decision
        self._due: dict[str, int] | None = None  # where the inputs ended when it was time for a `Tick`
        self._snapshot_writer = SnapshotWriter(context)
        self._rejections = Allowance()
        self._not_logged = 0  # rejections since the last one in the log

    # --- what is written ---------------------------------------------------------------------------------------------

    async def read_back(self) -> None:
        """Read what really stands in the log; what this planner decided must be there, in order, and nothing else."""
        context = self.context
        while context.unreadable:  # what was put there while nobody led
            await self._bury_unreadable(*context.unreadable.popleft())
        while True:
            for record in await self.reader.fetch():
                message = context.decision_log.read(record)
                if isinstance(message, EpochOpened):
                    raise Deposed(f"{message.planner} opened epoch {message.epoch}")
                if isinstance(message, Dropped) and self._unproven and record.value == self._unproven[0].payload:
                    raise InvariantError(f"decision {self._unproven[0].seq} does not count: {message.detail}")
                if isinstance(message, Dropped) and message.reason in UNREADABLE:
                    await self._bury_unreadable(record, message)
                if not isinstance(message, Decision | DecisionPart):
                    continue
                part = message.part if isinstance(message, DecisionPart) else None
                if not self._unproven or (message.seq, part) != (self._unproven[0].seq, self._unproven[0].part):
                    raise InvariantError(f"decision {message.seq} came back, which was not the next that was sent")
                begun_s = self._unproven.popleft().begun_s
                self._room.set()
                if isinstance(message, DecisionPart):
                    continue
                now_s = asyncio.get_running_loop().time()
                context.statistics.tell(message)
                self._log_rejections(message, now_s)
                if context.traces is not None:
                    context.traces.tell(message, begun_s, now_s, now_s - context.now_s())
                self._snapshot_writer.proven(message.seq, record.offset)

    def _log_rejections(self, decision: Decision, now_s: float) -> None:
        """A line for each rejected task, up to a rate; those that are the policy's fault have one of their own."""
        for change in decision.changes:
            if not isinstance(change, Ended) or change.state is not TaskState.REJECTED or change.cause == POLICY_ERROR:
                continue
            if not self._rejections.take(now_s):
                self._not_logged += 1
                continue
            about = {"task": change.task_id, "cause": change.cause, "detail": change.detail}
            self.context.log.warning("task rejected", **about, not_logged_before=self._not_logged)
            self._not_logged = 0

    async def _bury_unreadable(self, record: Record, dropped: Dropped) -> None:
        """Dead-letter what is no message on the decisions, once: the next decision says how far that was done."""
        context = self.context
        if record.offset >= context.inputs.get(topics.DECISIONS, 0):
            error = ProtocolError(dropped.reason, dropped.detail)
            context.dead_letters += 1
            await bury(context.bus, record, error, task_id="", by=context.name)
            self._read_up_to(topics.DECISIONS, record)

    def _read_up_to(self, topic: str, record: Record) -> None:
        """What changes no state is recorded as read by the next decision."""
        self.context.inputs[topic] = record.offset + 1
        self._unrecorded += 1

    async def tidy(self) -> None:
        """Dead-letter what is no snapshot, once. Whoever looks for a snapshot to begin at only skips it."""
        context = self.context
        where = (topics.SNAPSHOTS, context.region)
        reader = await context.bus.reader([where], start={where: context.inputs.get(topics.SNAPSHOTS, 0)})
        try:
            while True:
                for record in await reader.fetch():
                    # a tombstone is nobody's mistake
                    if record.value is not None and not self._snapshot_writer.wrote(record.value):
                        try:
                            messages.decode(record.topic, record.value)
                        except ProtocolError as error:
                            context.dead_letters += 1
                            await bury(context.bus, record, error, task_id="", by=context.name)
                    self._read_up_to(topics.SNAPSHOTS, record)
        finally:
            await reader.close()

    async def await_acknowledgements(self) -> None:
        """A decision whose fate is unknown ends the spell: the log will tell."""
        try:
            while True:
                acknowledgement = await self._acknowledgements.get()
                try:
                    await acknowledgement
                except BusError as error:
                    raise Deposed(f"a decision may not have been written: {error}") from None
        finally:
            while not self._acknowledgements.empty():  # nobody will ask for these
                rest = self._acknowledgements.get_nowait()
                if isinstance(rest, asyncio.Future):
                    rest.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def show_life(self) -> None:
        """A sign of life where there is nothing to decide."""
        context = self.context
        clock = asyncio.get_running_loop().time
        interval_s = context.lease_s / HEARTBEATS_PER_LEASE
        while True:
            wait_s = self._spoke_s + interval_s - clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                continue
            heartbeat = PlannerHeartbeat(region=context.region, epoch=self.epoch, nonce=self.nonce)
            await self._post(heartbeat, messages.encode(heartbeat))

    async def keep(self) -> None:
        """Write the snapshots that are proven."""
        await self._snapshot_writer.run()

    async def guard(self) -> None:
        """Where decisions are deleted that no snapshot covers, this planner alone knows the state: it writes a snapshot."""
        context = self.context
        where = (topics.DECISIONS, context.region)
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
                    "decisions are deleted that no snapshot covers: writing one",
                    log_begins_at=begin,
                    remedy="see how the topic is set: deepar doctor",
                )
                context.snapshot_seq = -context.snapshot_every - context.core.live_tasks  # due with the next decision
                self._unrecorded = CHECKPOINT_EVERY  # which comes with the next input

    # --- deciding ----------------------------------------------------------------------------------------------------

    async def decide(self) -> None:
        """One step for every record of the region's inputs, in the order in which they are read; and one when time is up."""
        context = self.context
        start = {(topic, context.region): context.inputs[topic] for topic in INPUTS}
        reader = await context.bus.reader(list(start), start=start)
        try:
            while True:
                records = await reader.fetch(timeout_s=self._patience_s())
                # Nodes first: a task that arrives with its device must find it there.
                for record in sorted(records, key=lambda record: INPUTS.index(record.topic)):
                    await self._take(record)
                await self._look_at_clock(reader)
        finally:
            await reader.close()

    async def _take(self, record: Record) -> None:
        context = self.context
        missing = record.offset - context.inputs[record.topic]
        if missing > LARGEST_HOLE and record.topic != topics.NODES:  # which is compacted
            context.lost_inputs += missing
            context.log.error(
                "inputs were deleted before they were read",
                topic=record.topic,
                records=missing,
                remedy="see how the topic is set: deepar doctor",
            )
        message, failure = None, context.failures.get((record.topic, record.offset))
        try:
            if failure is None:
                message = event = await self._read(record)
            else:
                event = await self._give_up(record, failure)
            await self._step(event, (record.topic, record.offset + 1))
        except (BusError, Deposed):
            raise
        except Exception as error:
            raise self._failed(record, message, error) from error
        if failure is not None:
            if self._unrecorded:
                await self._decided((), context.now_s())  # so that no other planner meets it
            del context.failures[record.topic, record.offset]

    async def _read(self, record: Record) -> Any:
        """The message of a record; None where it is turned away."""
        try:
            message = self.context.input_filter.read(record, self.context.core)
            if isinstance(message, TaskSubmitted) and self.context.core.contradicts(message):
                raise ProtocolError(
                    "task_id_taken", f"another task {message.task_id} was submitted before; this one is ignored"
                )
            return message
        except ProtocolError as error:
            await self._turn_away(record, error)
            return None

    def _failed(self, record: Record, message: Any, error: Exception) -> InputFailed:
        """Remember that an input cannot be handled. What it did to the state is undone by folding the topic anew."""
        context = self.context
        origin = f"{record.topic}/{record.partition}/{record.offset}"
        context.log.error("input not handled", origin=origin, exc_info=error)
        context.input_failures += 1
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        where = f"{PurePath(frame.f_code.co_filename).name}:{line}"
        detail = f"{type(error).__name__} at {where}: {error}"[:MAX_DETAIL]
        before = context.failures.get((record.topic, record.offset))
        context.failures[record.topic, record.offset] = Failure(
            message, detail, 1 if before is None else before.times + 1
        )
        return InputFailed(f"{origin} cannot be handled: {detail}")

    async def _give_up(self, record: Record, failure: Failure) -> Event | None:
        """Dead-letter an input that cannot be handled; what ends its task, unless that fails as well."""
        context = self.context
        context.dead_letters += 1
        await bury(
            context.bus,
            record,
            ProtocolError("planner_error", failure.detail),
            task_id=getattr(failure.message, "task_id", ""),
            by=context.name,
        )
        return (
            Unhandled(failure.message, failure.detail) if failure.times == 1 and failure.message is not None else None
        )

    async def _turn_away(self, record: Record, error: ProtocolError) -> None:
        """What is broken, or not said by whom it names, is kept for people and changes nothing."""
        context = self.context
        if not context.input_filter.keeps(error, asyncio.get_running_loop().time()):
            return
        if error.cause == "task_id_taken":
            context.log.warning("submission ignored: task id taken", task=record.key, offset=record.offset)
        if error.cause == WRONG_IDENTITY:
            where = f"{record.topic}/{record.partition}/{record.offset}"
            context.log.warning(
                "record rejected: unauthorized", why=str(error), origin=where, refused=context.input_filter.refused
            )
        elif self._rejections.take(asyncio.get_running_loop().time()):
            about = {"topic": record.topic, "offset": record.offset, "cause": error.cause, "error": str(error)}
            context.log.warning("record dead-lettered", **about)
        context.dead_letters += 1
        await bury(context.bus, record, error, task_id=record.key or "", by=context.name)

    def _patience_s(self) -> float:
        """How long to wait for inputs."""
        wakeup_s = self.context.core.next_wakeup()
        if wakeup_s is None:
            return 1.0
        return 0.1 if self._due is not None else min(1.0, max(0.001, wakeup_s - self.context.now_s()))

    async def _look_at_clock(self, reader: Reader) -> None:
        """Leases, deadlines and patience, once everything is read that was there when their time was up.

        So nobody is declared lost whose heartbeat lies unread: after a takeover, under load, or when this process was frozen.
        """
        context = self.context
        wakeup_s = context.core.next_wakeup()
        if wakeup_s is None or wakeup_s > context.now_s():
            self._due = None
            return
        if self._due is None:
            try:
                self._due = {topic: (await context.bus.end_offsets(topic))[context.region] for topic in INPUTS}
            except BusError as error:
                context.log.warning("end of the inputs not read; retrying", error=str(error))
                return
        if all(reader.position((topic, context.region)) >= end for topic, end in self._due.items()):
            self._due = None
            await self._step(Tick(), None)

    async def _step(self, event: Event | None, consumed: tuple[str, int] | None) -> None:
        """Let the core decide, and put the record on its way. Only `decide` comes here, so records keep their order."""
        context = self.context
        while len(self._unproven) >= MAX_UNPROVEN:
            self._room.clear()
            await self._room.wait()
        self._begun_s = asyncio.get_running_loop().time()
        now_s = context.now_s()
        changes = context.core.handle(event, now_s) if event is not None else []
        if consumed is not None:
            context.inputs[consumed[0]] = consumed[1]
            self._unrecorded += 1
        if changes or self._unrecorded >= CHECKPOINT_EVERY:
            await self._decided(changes, now_s)

    async def _decided(self, changes: Iterable[Change], now_s: float) -> None:
        context = self.context
        changes = tuple(changes)
        for change in changes:
            if isinstance(change, Ended) and change.cause == POLICY_ERROR:
                context.policy_errors += 1
                context.log.error("policy failed; task rejected", task=change.task_id, why=change.detail)
        self.seq += 1
        self._unrecorded = 0
        decision = Decision(
            region=context.region,
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
        if len(payload) > context.record_bytes and len(decision.changes) > 1:
            parts, decision = split_decision(decision, context.record_bytes)
            for part in parts:
                await self._put(part, messages.encode(part))
            payload = messages.encode(decision)
        self._snapshot_writer.decided(decision)
        await self._put(decision, payload)
        context.decisions += 1

    async def _put(self, record: Decision | DecisionPart, payload: bytes) -> None:
        if len(payload) > messages.MAX_MESSAGE_BYTES:
            raise InvariantError(f"decision {record.seq} takes {len(payload):,} bytes, which nobody would read")
        part = record.part if isinstance(record, DecisionPart) else None
        self._unproven.append(_Unproven(record.seq, part, payload, self._begun_s))
        await self._post(record, payload)

    async def _post(self, message: Message, payload: bytes) -> None:
        context = self.context
        acknowledgement = await context.bus.post(
            topics.DECISIONS,
            payload,
            key=str(context.region),
            partition=context.region,
            headers=context.envelope.headers(message),
        )
        self._acknowledgements.put_nowait(acknowledgement)
        self._spoke_s = asyncio.get_running_loop().time()


__all__ = ["HEARTBEATS_PER_LEASE", "INPUTS", "UNREADABLE", "Deposed", "LeaderTerm"]
