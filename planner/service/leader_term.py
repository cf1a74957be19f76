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
from typing import TYPE_CHECKING, Any, NamedTuple

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
from planner.service.record_split import divided
from planner.service.snapshot_writer import Keeper

if TYPE_CHECKING:
    from planner.service.service import PlannerService

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


class Failure(NamedTuple):
    """Why an input could not be handled."""

    message: Any  # what the record says; None where reading it failed
    detail: str
    times: int  # 1: handling it failed; 2: ending its task with that cause failed, too


class _Unproven(NamedTuple):
    """A record that is on its way."""

    seq: int
    part: int | None  # None: the decision itself
    payload: bytes
    begun_s: float  # when its step began, the loop's clock


class Lead:
    """One spell of leading: from winning an epoch to losing it."""

    def __init__(self, service: PlannerService, reader: Reader) -> None:
        self.service = service
        self.reader = reader
        self.epoch = service.decision_log.epoch
        self.nonce = service.nonce
        self.seq = service.decision_log.seq
        self._unproven: deque[_Unproven] = deque()  # what was decided and not yet read back
        self._acknowledgements: asyncio.Queue[Awaitable[Position]] = asyncio.Queue()
        self._room = asyncio.Event()
        self._begun_s = 0.0  # when the present step began
        self._spoke_s = float("-inf")
        self._unrecorded = 0  # inputs read since the last decision
        self._due: dict[str, int] | None = None  # where the inputs ended when it was time for a `Tick`
        self._keeper = Keeper(service)
        self._rejections = Allowance()
        self._not_logged = 0  # rejections since the last one in the log

    # --- what is written ---------------------------------------------------------------------------------------------

    async def read_back(self) -> None:
        """Read what really stands in the log; what this planner decided must be there, in order, and nothing else."""
        service = self.service
        while service.unreadable:  # what was put there while nobody led
            await self._bury_unreadable(*service.unreadable.popleft())
        while True:
            for record in await self.reader.fetch():
                message = service.decision_log.read(record)
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
                service.statistics.tell(message)
                self._log_rejections(message, now_s)
                if service.traces is not None:
                    service.traces.tell(message, begun_s, now_s, now_s - service.now_s())
                self._keeper.proven(message.seq, record.offset)

    def _log_rejections(self, decision: Decision, now_s: float) -> None:
        """A line for each rejected task, up to a rate; those that are the policy's fault have one of their own."""
        for change in decision.changes:
            if not isinstance(change, Ended) or change.state is not TaskState.REJECTED or change.cause == POLICY_ERROR:
                continue
            if not self._rejections.take(now_s):
                self._not_logged += 1
                continue
            about = {"task": change.task_id, "cause": change.cause, "detail": change.detail}
            self.service.log.warning("task rejected", **about, not_logged_before=self._not_logged)
            self._not_logged = 0

    async def _bury_unreadable(self, record: Record, dropped: Dropped) -> None:
        """Dead-letter what is no message on the decisions, once: the next decision says how far that was done."""
        service = self.service
        if record.offset >= service.inputs.get(topics.DECISIONS, 0):
            error = ProtocolError(dropped.reason, dropped.detail)
            service.dead_letters += 1
            await bury(service.bus, record, error, task_id="", by=service.name)
            self._read_up_to(topics.DECISIONS, record)

    def _read_up_to(self, topic: str, record: Record) -> None:
        """What changes no state is recorded as read by the next decision."""
        self.service.inputs[topic] = record.offset + 1
        self._unrecorded += 1

    async def tidy(self) -> None:
        """Dead-letter what is no snapshot, once. Whoever looks for a snapshot to begin at only skips it."""
        service = self.service
        where = (topics.SNAPSHOTS, service.region)
        reader = await service.bus.reader([where], start={where: service.inputs.get(topics.SNAPSHOTS, 0)})
        try:
            while True:
                for record in await reader.fetch():
                    # a tombstone is nobody's mistake
                    if record.value is not None and not self._keeper.wrote(record.value):
                        try:
                            messages.decode(record.topic, record.value)
                        except ProtocolError as error:
                            service.dead_letters += 1
                            await bury(service.bus, record, error, task_id="", by=service.name)
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
        service = self.service
        clock = asyncio.get_running_loop().time
        interval_s = service.lease_s / HEARTBEATS_PER_LEASE
        while True:
            wait_s = self._spoke_s + interval_s - clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                continue
            heartbeat = PlannerHeartbeat(region=service.region, epoch=self.epoch, nonce=self.nonce)
            await self._post(heartbeat, messages.encode(heartbeat))

    async def keep(self) -> None:
        """Write the snapshots that are proven."""
        await self._keeper.run()

    async def guard(self) -> None:
        """Where decisions are deleted that no snapshot covers, this planner alone knows the state: it writes a snapshot."""
        service = self.service
        where = (topics.DECISIONS, service.region)
        while True:
            await asyncio.sleep(GUARD_S)
            try:
                reader = await service.bus.reader([where], start="start")
                begin = reader.position(where)
                await reader.close()
                covered = begin == 0 or await self._keeper.covers(begin)
            except BusError as error:
                service.log.warning("start of the decisions not read; retrying", error=str(error))
                continue
            if not covered:
                service.log.error(
                    "decisions are deleted that no snapshot covers: writing one",
                    log_begins_at=begin,
                    remedy="see how the topic is set: deepar doctor",
                )
                service.snapshot_seq = -service.snapshot_every - service.core.live_tasks  # due with the next decision
                self._unrecorded = CHECKPOINT_EVERY  # which comes with the next input

    # --- deciding ----------------------------------------------------------------------------------------------------

    async def decide(self) -> None:
        """One step for every record of the region's inputs, in the order in which they are read; and one when time is up."""
        service = self.service
        start = {(topic, service.region): service.inputs[topic] for topic in INPUTS}
        reader = await service.bus.reader(list(start), start=start)
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
        service = self.service
        missing = record.offset - service.inputs[record.topic]
        if missing > LARGEST_HOLE and record.topic != topics.NODES:  # which is compacted
            service.lost_inputs += missing
            service.log.error(
                "inputs were deleted before they were read",
                topic=record.topic,
                records=missing,
                remedy="see how the topic is set: deepar doctor",
            )
        message, failure = None, service.failures.get((record.topic, record.offset))
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
                await self._decided((), service.now_s())  # so that no other planner meets it
            del service.failures[record.topic, record.offset]

    async def _read(self, record: Record) -> Any:
        """The message of a record; None where it is turned away."""
        try:
            message = self.service.door.read(record, self.service.core)
            if isinstance(message, TaskSubmitted) and self.service.core.contradicts(message):
                raise ProtocolError(
                    "task_id_taken", f"another task {message.task_id} was submitted before; this one is ignored"
                )
            return message
        except ProtocolError as error:
            await self._turn_away(record, error)
            return None

    def _failed(self, record: Record, message: Any, error: Exception) -> InputFailed:
        """Remember that an input cannot be handled. What it did to the state is undone by folding the topic anew."""
        service = self.service
        origin = f"{record.topic}/{record.partition}/{record.offset}"
        service.log.error("input not handled", origin=origin, exc_info=error)
        service.input_failures += 1
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        where = f"{PurePath(frame.f_code.co_filename).name}:{line}"
        detail = f"{type(error).__name__} at {where}: {error}"[:MAX_DETAIL]
        before = service.failures.get((record.topic, record.offset))
        service.failures[record.topic, record.offset] = Failure(
            message, detail, 1 if before is None else before.times + 1
        )
        return InputFailed(f"{origin} cannot be handled: {detail}")

    async def _give_up(self, record: Record, failure: Failure) -> Event | None:
        """Dead-letter an input that cannot be handled; what ends its task, unless that fails as well."""
        service = self.service
        service.dead_letters += 1
        await bury(
            service.bus,
            record,
            ProtocolError("planner_error", failure.detail),
            task_id=getattr(failure.message, "task_id", ""),
            by=service.name,
        )
        return (
            Unhandled(failure.message, failure.detail) if failure.times == 1 and failure.message is not None else None
        )

    async def _turn_away(self, record: Record, error: ProtocolError) -> None:
        """What is broken, or not said by whom it names, is kept for people and changes nothing."""
        service = self.service
        if not service.door.keeps(error, asyncio.get_running_loop().time()):
            return
        if error.cause == "task_id_taken":
            service.log.warning("submission ignored: task id taken", task=record.key, offset=record.offset)
        if error.cause == WRONG_IDENTITY:
            where = f"{record.topic}/{record.partition}/{record.offset}"
            service.log.warning(
                "record rejected: unauthorized", why=str(error), origin=where, refused=service.door.refused
            )
        elif self._rejections.take(asyncio.get_running_loop().time()):
            about = {"topic": record.topic, "offset": record.offset, "cause": error.cause, "error": str(error)}
            service.log.warning("record dead-lettered", **about)
        service.dead_letters += 1
        await bury(service.bus, record, error, task_id=record.key or "", by=service.name)

    def _patience_s(self) -> float:
        """How long to wait for inputs."""
        wakeup_s = self.service.core.next_wakeup()
        if wakeup_s is None:
            return 1.0
        return 0.1 if self._due is not None else min(1.0, max(0.001, wakeup_s - self.service.now_s()))

    async def _look_at_clock(self, reader: Reader) -> None:
        """Leases, deadlines and patience, once everything is read that was there when their time was up.

        So nobody is declared lost whose heartbeat lies unread: after a takeover, under load, or when this process was frozen.
        """
        service = self.service
        wakeup_s = service.core.next_wakeup()
        if wakeup_s is None or wakeup_s > service.now_s():
            self._due = None
            return
        if self._due is None:
            try:
                self._due = {topic: (await service.bus.end_offsets(topic))[service.region] for topic in INPUTS}
            except BusError as error:
                service.log.warning("end of the inputs not read; retrying", error=str(error))
                return
        if all(reader.position((topic, service.region)) >= end for topic, end in self._due.items()):
            self._due = None
            await self._step(Tick(), None)

    async def _step(self, event: Event | None, consumed: tuple[str, int] | None) -> None:
        """Let the core decide, and put the record on its way. Only `decide` comes here, so records keep their order."""
        service = self.service
        while len(self._unproven) >= MAX_UNPROVEN:
            self._room.clear()
            await self._room.wait()
        self._begun_s = asyncio.get_running_loop().time()
        now_s = service.now_s()
        changes = service.core.handle(event, now_s) if event is not None else []
        if consumed is not None:
            service.inputs[consumed[0]] = consumed[1]
            self._unrecorded += 1
        if changes or self._unrecorded >= CHECKPOINT_EVERY:
            await self._decided(changes, now_s)

    async def _decided(self, changes: Iterable[Change], now_s: float) -> None:
        service = self.service
        changes = tuple(changes)
        for change in changes:
            if isinstance(change, Ended) and change.cause == POLICY_ERROR:
                service.policy_errors += 1
                service.log.error("policy failed; task rejected", task=change.task_id, why=change.detail)
        self.seq += 1
        self._unrecorded = 0
        decision = Decision(
            region=service.region,
            epoch=self.epoch,
            nonce=self.nonce,
            seq=self.seq,
            now_s=now_s,
            inputs=dict(service.inputs),
            changes=changes,
            ledger_hash=service.core.state_hash,
            at=service.utc(),
        )
        payload = messages.encode(decision)
        if len(payload) > service.record_bytes and len(decision.changes) > 1:
            parts, decision = divided(decision, service.record_bytes)
            for part in parts:
                await self._put(part, messages.encode(part))
            payload = messages.encode(decision)
        self._keeper.decided(decision)
        await self._put(decision, payload)
        service.decisions += 1

    async def _put(self, record: Decision | DecisionPart, payload: bytes) -> None:
        if len(payload) > messages.MAX_MESSAGE_BYTES:
            raise InvariantError(f"decision {record.seq} takes {len(payload):,} bytes, which nobody would read")
        part = record.part if isinstance(record, DecisionPart) else None
        self._unproven.append(_Unproven(record.seq, part, payload, self._begun_s))
        await self._post(record, payload)

    async def _post(self, message: Message, payload: bytes) -> None:
        service = self.service
        acknowledgement = await service.bus.post(
            topics.DECISIONS,
            payload,
            key=str(service.region),
            partition=service.region,
            headers=service.envelope.headers(message),
        )
        self._acknowledgements.put_nowait(acknowledgement)
        self._spoke_s = asyncio.get_running_loop().time()


__all__ = ["HEARTBEATS_PER_LEASE", "INPUTS", "UNREADABLE", "Deposed", "Lead"]
