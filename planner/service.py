"""The planner as a service: a consumer around `PlannerCore` that can be killed anywhere and forgets nothing.

The decision topic is the truth. A planner stands by and folds it; when nobody leads (or the leader has been silent for its
lease) it appends `EpochOpened(highest + 1, nonce)` and reads on until it sees whether it was the first. Then it leads:
every input is one step of the core, every step with a change is one decision record that also says which inputs were
consumed, so that state, inputs and outputs are one atomic write. It goes on deciding while records are on their way, and
reads its own records back; should one not stand where it must, whatever it decided since is void, and it folds the topic
anew. Ledger time is the region's own: the last record's `now` plus what has passed locally since taking over.

Snapshots only save reading. One is written when its decision has been read back, and believed when that decision stands in
the log where the snapshot says; else the topic is folded from the start. `docs/service.md` tells the operator's side.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from enum import StrEnum

import structlog

from bus import messages, topics
from bus.dead_letter import bury
from bus.decisions import DecisionLog, Dropped
from bus.errors import BusError, DeeparError, InvariantError, ProtocolError
from bus.messages import Change, Decision, EpochOpened, Message, PlannerHeartbeat, PlannerLeft, Snapshot
from bus.port import Bus, Position, Reader, Record
from planner.core import Event, PlannerCore, Tick

LEASE_S = 5.0
HEARTBEATS_PER_LEASE = 5
MAX_UNPROVEN = 200
"""So many decisions may be on their way before the planner waits for their place in the log."""
SNAPSHOT_EVERY = 500
CHECKPOINT_EVERY = 1000
"""After so many inputs that changed nothing (heartbeats, mostly) a record without changes says that they were read."""
SNAPSHOTS_READ = 3
"""So many of the newest snapshots are looked at; of a compacted topic the last record always remains."""
RETRY_S = 0.5
INPUTS = (topics.NODES, topics.TASKS, topics.EVENTS)
UNREADABLE = ("undecodable", "oversized", "unknown_version")
"""Why a record on the decisions is a dead letter; others are drafts of a planner that lost the region."""

log = structlog.get_logger("planner")


class Standing(StrEnum):
    """What a planner is to its region at the moment."""

    READING = "reading"  # folding history
    STANDING_BY = "standing by"  # another leads
    LEADING = "leading"


class _Deposed(Exception):
    """What was decided last may not count; fold the topic anew."""


class PlannerService:
    """One planner of one region. `make_core` gives an empty core with the policy and objective wanted."""

    def __init__(
        self,
        bus: Bus,
        make_core: Callable[[], PlannerCore],
        *,
        name: str = "planner",
        region: int = 0,
        lease_s: float = LEASE_S,
        take_over: bool = False,
        snapshot_every: int = SNAPSHOT_EVERY,
    ) -> None:
        self.bus = bus
        self.core = make_core()
        self.name = name
        self.region = region
        self.lease_s = lease_s
        self.standing = Standing.READING
        self.decisions = 0  # records written while leading
        self.log = log.bind(planner=name, region=region)
        self._make_core = make_core
        self._take_over = take_over
        self._snapshot_every = snapshot_every
        self._log = DecisionLog()
        self._inputs: dict[str, int] = {}
        self._now_s = 0.0  # ledger time at `_since_s`
        self._since_s = 0.0  # the loop's clock
        self._nonce = ""

    def now_s(self) -> float:
        """Ledger time, while leading."""
        return self._now_s + (asyncio.get_running_loop().time() - self._since_s)

    async def run(self) -> None:
        """Serve until cancelled: stand by, lead, stand by again. Raises `InvariantError` for bugs only."""
        while True:
            try:
                reader = await self._fold()
            except BusError as error:
                self.log.warning("cannot read decisions, trying again", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            try:
                await self._stand_by(reader)
                await self._claim(reader)
                await self._lead(reader)
            except _Deposed as deposed:
                self.log.warning("not leading", reason=str(deposed))
            except BusError as error:
                self.log.warning("the bus failed; reading the log anew", error=str(error))
                await asyncio.sleep(RETRY_S)
            finally:
                await reader.close()

    # --- standing by -------------------------------------------------------------------------------------------------

    async def _fold(self) -> Reader:
        """The last snapshot that holds; the reader goes on behind it, and what it brings is to be folded in."""
        self.standing = Standing.READING
        where = (topics.DECISIONS, self.region)
        for snapshot in await self._newest_snapshots():
            if not self._restore(snapshot):
                continue
            reader = await self.bus.reader([where], start={where: snapshot.offset})
            try:
                proven = await self._proves(reader, snapshot)
            except BaseException:
                await reader.close()
                raise
            if proven:
                return reader
            await reader.close()
            self.log.error("a snapshot of what the log does not say is ignored", seq=snapshot.seq)
        self.core, self._log = self._make_core(), DecisionLog()
        self._inputs, self._now_s = dict.fromkeys(INPUTS, 0), 0.0
        return await self.bus.reader([where], start="start")

    async def _newest_snapshots(self) -> list[Snapshot]:
        """The last few snapshots, the newest state first (a planner that was deposed may have written an old one last)."""
        where = (topics.SNAPSHOTS, self.region)
        end = (await self.bus.end_offsets(topics.SNAPSHOTS))[self.region]
        reader = await self.bus.reader([where], start={where: max(0, end - SNAPSHOTS_READ)})
        found: list[Snapshot] = []
        try:
            while await reader.lag():
                for record in await reader.fetch(timeout_s=0.2):
                    try:
                        found.append(messages.decode(topics.SNAPSHOTS, record.value))
                    except ProtocolError as error:
                        self.log.warning("a broken snapshot is skipped", error=str(error))
        finally:
            await reader.close()
        return sorted(found, key=lambda snapshot: snapshot.seq, reverse=True)

    def _restore(self, snapshot: Snapshot) -> bool:
        """Take on a snapshot's state; False where it cannot be: another version's, or broken."""
        self.core = self._make_core()
        try:
            self.core.restore(snapshot.state)
            self._check_hash(snapshot.ledger_hash, snapshot.seq)
        except (DeeparError, LookupError, TypeError, ValueError) as error:
            self.log.warning("a snapshot cannot be used", seq=snapshot.seq, error=str(error))
            return False
        self._log = DecisionLog(epoch=snapshot.epoch, nonce=snapshot.nonce, seq=snapshot.seq)
        leader = snapshot.state.get("leader", {})
        self._log.planner, self._log.lease_s = leader.get("planner", ""), leader.get("lease_s", self.lease_s)
        self._inputs, self._now_s = dict.fromkeys(INPUTS, 0) | snapshot.inputs, snapshot.now_s
        return True

    async def _proves(self, reader: Reader, snapshot: Snapshot) -> bool:
        """Whether the reader's first record is the decision that the snapshot was taken after."""
        while True:
            for record in await reader.fetch(max_records=1, timeout_s=0.2):
                try:
                    decision = messages.decode(topics.DECISIONS, record.value)
                except ProtocolError:
                    return False
                if not isinstance(decision, Decision) or record.offset != snapshot.offset:
                    return False
                said = (decision.epoch, decision.nonce, decision.seq, decision.ledger_hash)
                return said == (snapshot.epoch, snapshot.nonce, snapshot.seq, snapshot.ledger_hash)
            if await reader.lag() == 0:
                return False

    async def _stand_by(self, reader: Reader) -> None:
        """Fold what comes until nobody leads. Returns when this planner should claim the region."""
        clock = asyncio.get_running_loop().time
        heard_s = clock()
        while True:
            # The clock before the question: a process that is frozen in between must not take its own silence for another's.
            asked_s = clock()
            if await reader.lag() == 0:
                # An epoch that this very planner opened and does not lead (its send failed, or its spell ended) is nobody's.
                free = self._log.epoch == 0 or self._log.left or self._log.nonce == self._nonce
                silent = asked_s - heard_s > (self._log.lease_s or self.lease_s)
                if free or silent or self._take_over:
                    return
                if self.standing is not Standing.STANDING_BY:
                    self.standing = Standing.STANDING_BY
                    self.log.info("standing by", leader=self._log.planner, epoch=self._log.epoch)
            for record in await reader.fetch(timeout_s=min(0.2, self.lease_s / HEARTBEATS_PER_LEASE)):
                message = self._log.read(record)
                if isinstance(message, Decision):
                    self._fold_in(message)
                if isinstance(message, Message):
                    heard_s = clock()

    def _fold_in(self, decision: Decision) -> None:
        self.core.fold(decision)
        self._inputs.update(decision.inputs)
        self._now_s = decision.now_s
        self._check_hash(decision.ledger_hash, decision.seq)

    def _check_hash(self, recorded: str, seq: int) -> None:
        if self.core.state_hash != recorded:
            raise InvariantError(
                f"region {self.region}: replaying decision {seq} gives the state {self.core.state_hash}, "
                f"recorded is {recorded}"
            )

    # --- claiming ----------------------------------------------------------------------------------------------------

    async def _claim(self, reader: Reader) -> None:
        """Open the next epoch and read on until it is known who opened it first."""
        self._nonce = uuid.uuid4().hex[:12]
        epoch = self._log.epoch + 1
        self._take_over = False  # once; two that were told to would else go on for ever
        opened = EpochOpened(
            region=self.region, epoch=epoch, nonce=self._nonce, planner=self.name, lease_s=self.lease_s, at=_utc()
        )
        await self._send(topics.DECISIONS, opened)
        while True:
            for record in await reader.fetch():
                message = self._log.read(record)
                if isinstance(message, Decision):
                    self._fold_in(message)
                elif isinstance(message, EpochOpened):
                    if message.nonce != self._nonce:
                        raise _Deposed(f"{message.planner} opened epoch {message.epoch} first")
                    return

    # --- leading -----------------------------------------------------------------------------------------------------

    async def _lead(self, reader: Reader) -> None:
        self._since_s = asyncio.get_running_loop().time()
        self.core.restart_leases(self.now_s())
        self.standing = Standing.LEADING
        self.log.info("leading", epoch=self._log.epoch, seq=self._log.seq, tasks=self.core.live_tasks)
        # A task of its own: a task group that is cancelled while one of its tasks fails reports the failure alone, and the
        # cancellation would be lost.
        leading = asyncio.create_task(self._lead_until_deposed(reader), name=f"{self.name}: leading")
        try:
            await asyncio.wait({leading})
        except asyncio.CancelledError:
            leading.cancel()
            await asyncio.wait({leading})
            if leading.cancelled() or leading.exception() is None:
                await self._leave()
            raise
        leading.result()

    async def _lead_until_deposed(self, reader: Reader) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                lead = _Lead(self, reader)
                for step in (lead.read_back, lead.decide, lead.show_life, lead.await_acknowledgements, lead.keep):
                    group.create_task(step(), name=f"{self.name}: {step.__name__}")
        except* (_Deposed, BusError) as failures:
            first: BaseException = failures
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None

    async def _leave(self) -> None:
        """Say that the region is free, where that can be said quickly."""
        with contextlib.suppress(BusError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._send(
                    topics.DECISIONS, PlannerLeft(region=self.region, epoch=self._log.epoch, nonce=self._nonce)
                )

    async def _send(self, topic: str, message: Message) -> Position:
        return await self.bus.send(topic, messages.encode(message), key=str(self.region), partition=self.region)


class _Lead:
    """One spell of leading: from winning an epoch to losing it."""

    def __init__(self, service: PlannerService, reader: Reader) -> None:
        self.service = service
        self.reader = reader
        self.epoch = service._log.epoch
        self.nonce = service._nonce
        self.seq = service._log.seq
        self._unproven: deque[tuple[int, bytes]] = deque()  # sequence and record: decided, not yet read back
        self._acknowledgements: asyncio.Queue[Awaitable[Position]] = asyncio.Queue()
        self._room = asyncio.Event()
        self._spoke_s = float("-inf")
        self._unrecorded = 0  # inputs read since the last decision
        self._due: dict[str, int] | None = None  # where the inputs ended when it was time for a `Tick`
        self._snapshots: dict[int, Snapshot] = {}  # by sequence, waiting for their proof
        self._proven: asyncio.Queue[Snapshot] = asyncio.Queue()

    # --- what is written ---------------------------------------------------------------------------------------------

    async def read_back(self) -> None:
        """Read what really stands in the log; what this planner decided must be there, in order, and nothing else."""
        service = self.service
        while True:
            for record in await self.reader.fetch():
                message = service._log.read(record)
                if isinstance(message, EpochOpened):
                    raise _Deposed(f"{message.planner} opened epoch {message.epoch}")
                if isinstance(message, Dropped) and self._unproven and record.value == self._unproven[0][1]:
                    raise InvariantError(f"decision {self._unproven[0][0]} does not count: {message.detail}")
                if isinstance(message, Dropped) and message.reason in UNREADABLE:
                    error = ProtocolError(message.reason, message.detail)
                    await bury(service.bus, record, error, task_id="", by=service.name)
                if not isinstance(message, Decision):
                    continue
                if not self._unproven or message.seq != self._unproven[0][0]:
                    raise InvariantError(f"decision {message.seq} came back, which was not the next that was sent")
                self._unproven.popleft()
                self._room.set()
                if (snapshot := self._snapshots.pop(message.seq, None)) is not None:
                    self._proven.put_nowait(snapshot.model_copy(update={"offset": record.offset}))

    async def await_acknowledgements(self) -> None:
        """A decision whose fate is unknown ends the spell: the log will tell."""
        while True:
            acknowledgement = await self._acknowledgements.get()
            try:
                await acknowledgement
            except BusError as error:
                raise _Deposed(f"a decision may not have been written: {error}") from None

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
            await self._post(messages.encode(heartbeat))

    async def keep(self) -> None:
        """Write the snapshots that are proven. Without one a restart reads further back: no reason to stop leading."""
        service = self.service
        while True:
            snapshot = await self._proven.get()
            payload = messages.encode(snapshot)
            if len(payload) > messages.MAX_MESSAGE_BYTES:
                service.log.warning("the state is too large for a snapshot", seq=snapshot.seq, size_bytes=len(payload))
                continue
            try:
                await service.bus.send(topics.SNAPSHOTS, payload, key=str(service.region), partition=service.region)
            except BusError as error:
                service.log.warning("a snapshot could not be kept", seq=snapshot.seq, error=str(error))

    # --- deciding ----------------------------------------------------------------------------------------------------

    async def decide(self) -> None:
        """One step for every record of the region's inputs, in the order in which they are read; and one when time is up."""
        service = self.service
        start = {(topic, service.region): service._inputs[topic] for topic in INPUTS}
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
        try:
            message = messages.decode(record.topic, record.value)
        except ProtocolError as error:
            await bury(service.bus, record, error, task_id=record.key or "", by=service.name)
            message = None
        await self._step(message, (record.topic, record.offset + 1))

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
                service.log.warning("cannot ask where the inputs end, trying again", error=str(error))
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
        now_s = service.now_s()
        changes = service.core.handle(event, now_s) if event is not None else []
        if consumed is not None:
            service._inputs[consumed[0]] = consumed[1]
            self._unrecorded += 1
        if changes or self._unrecorded >= CHECKPOINT_EVERY:
            await self._decided(changes, now_s)

    async def _decided(self, changes: Iterable[Change], now_s: float) -> None:
        service = self.service
        self.seq += 1
        self._unrecorded = 0
        decision = Decision(
            region=service.region,
            epoch=self.epoch,
            nonce=self.nonce,
            seq=self.seq,
            now_s=now_s,
            inputs=dict(service._inputs),
            changes=tuple(changes),
            ledger_hash=service.core.state_hash,
            at=_utc(),
        )
        payload = messages.encode(decision)
        if len(payload) > messages.MAX_MESSAGE_BYTES:
            raise InvariantError(f"decision {self.seq} takes {len(payload):,} bytes, which nobody would read")
        self._unproven.append((self.seq, payload))
        if self.seq % service._snapshot_every == 0:
            self._snapshots[self.seq] = self._snapshot(decision)
        await self._post(payload)
        service.decisions += 1

    def _snapshot(self, decision: Decision) -> Snapshot:
        service = self.service
        leader = {"planner": service.name, "lease_s": service.lease_s}
        return Snapshot(
            region=decision.region,
            epoch=decision.epoch,
            nonce=decision.nonce,
            seq=decision.seq,
            offset=0,  # known once it is read back
            now_s=decision.now_s,
            inputs=decision.inputs,
            ledger_hash=decision.ledger_hash,
            state=service.core.to_state() | {"leader": leader},
        )

    async def _post(self, payload: bytes) -> None:
        service = self.service
        acknowledgement = await service.bus.post(
            topics.DECISIONS, payload, key=str(service.region), partition=service.region
        )
        self._acknowledgements.put_nowait(acknowledgement)
        self._spoke_s = asyncio.get_running_loop().time()


def _utc() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


__all__ = ["LEASE_S", "PlannerService", "Standing"]
