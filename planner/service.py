"""The planner as a service: a consumer around `PlannerCore` that can be killed anywhere and forgets nothing.

The decision topic is the truth. A planner stands by and folds it; when nobody leads (or the leader has been silent for its
lease) it appends `EpochOpened(highest + 1, nonce)` and reads on until it sees whether it was the first. Then it leads:
every input is one step of the core, every step with a change is one decision record that also says which inputs were
consumed, so that state, inputs and outputs are one atomic write. It goes on deciding while records are on their way, and
reads its own records back; should one not stand where it must, whatever it decided since is void, and it folds the topic
anew. Ledger time is the region's own: the last record's `now` plus what has passed locally since taking over.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from enum import StrEnum

import structlog
from planner.core import PlannerCore, Tick

from bus import messages, topics
from bus.dead_letter import bury
from bus.decisions import DecisionLog
from bus.errors import BusError, InvariantError, ProtocolError
from bus.messages import Decision, EpochOpened, Message, PlannerHeartbeat, PlannerLeft, Snapshot
from bus.port import Bus, Position, Reader, Record

LEASE_S = 5.0
HEARTBEATS_PER_LEASE = 5
MAX_UNPROVEN = 200
"""So many decisions may be on their way before the planner waits for their place in the log."""
SNAPSHOT_EVERY = 500
RETRY_S = 0.5
INPUTS = (topics.NODES, topics.TASKS, topics.EVENTS)

log = structlog.get_logger("planner")


class Standing(StrEnum):
    """What a planner is to its region at the moment."""

    READING = "reading"  # folding history
    STANDING_BY = "standing by"  # another leads
    LEADING = "leading"


class _Deposed(Exception):
    """What was decided last may not count; fold the topic anew."""

    def __init__(self, reason: str, *, reclaim: bool) -> None:
        super().__init__(reason)
        self.reclaim = reclaim  # nobody else is known to lead


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
        """Ledger time."""
        return self._now_s + (asyncio.get_running_loop().time() - self._since_s)

    async def run(self) -> None:
        """Serve until cancelled: stand by, lead, stand by again. Raises `InvariantError` for bugs only."""
        reclaim = self._take_over
        while True:
            try:
                reader = await self._fold()
            except BusError as error:
                self.log.warning("cannot read decisions, trying again", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            try:
                await self._stand_by(reader, reclaim=reclaim)
                await self._claim(reader)
                await self._lead(reader)
            except _Deposed as deposed:
                self.log.warning("not leading", reason=str(deposed))
                reclaim = deposed.reclaim
            except BusError as error:
                self.log.warning("the bus failed; reading the log anew", error=str(error))
                reclaim = self.standing is Standing.LEADING
                await asyncio.sleep(RETRY_S)
            finally:
                await reader.close()

    # --- standing by -------------------------------------------------------------------------------------------------

    async def _fold(self) -> Reader:
        """State as the topic tells it: the last snapshot, then every decision after it."""
        self.standing = Standing.READING
        snapshot = await self._last_snapshot()
        where = (topics.DECISIONS, self.region)
        if snapshot is None:
            self.core, self._log = self._make_core(), DecisionLog()
            self._inputs, self._now_s = dict.fromkeys(INPUTS, 0), 0.0
            return await self.bus.reader([where], start="start")
        self.core = self._make_core()
        self.core.restore(snapshot.state)
        self._log = DecisionLog(epoch=snapshot.epoch, nonce=snapshot.nonce, seq=snapshot.seq)
        self._inputs, self._now_s = dict(snapshot.inputs), snapshot.now_s
        self._check_hash(snapshot.ledger_hash, snapshot.seq)
        return await self.bus.reader([where], start={where: snapshot.offset + 1})

    async def _last_snapshot(self) -> Snapshot | None:
        reader = await self.bus.reader([(topics.SNAPSHOTS, self.region)], start="start")
        newest: Snapshot | None = None
        try:
            while await reader.lag():
                for record in await reader.fetch(timeout_s=0.2):
                    try:
                        newest = messages.decode(topics.SNAPSHOTS, record.value)
                    except ProtocolError as error:
                        self.log.warning("a broken snapshot is skipped", error=str(error))
        finally:
            await reader.close()
        return newest

    async def _stand_by(self, reader: Reader, *, reclaim: bool) -> None:
        """Fold what comes until nobody leads. Returns when this planner should claim the region."""
        clock = asyncio.get_running_loop().time
        heard_s = clock()
        while True:
            caught_up = await reader.lag() == 0
            if caught_up:
                free = self._log.epoch == 0 or self._log.left
                silent = clock() - heard_s > self._log.lease_s
                if free or silent or reclaim:
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
                        raise _Deposed(f"{message.planner} opened epoch {message.epoch} first", reclaim=False)
                    return

    # --- leading -----------------------------------------------------------------------------------------------------

    async def _lead(self, reader: Reader) -> None:
        self._since_s = asyncio.get_running_loop().time()
        self.core.restart_leases(self.now_s())
        self.standing = Standing.LEADING
        self.log.info("leading", epoch=self._log.epoch, seq=self._log.seq, tasks=self.core.live_tasks)
        try:
            await self._lead_until_deposed(reader)
        except asyncio.CancelledError:
            with contextlib.suppress(BusError, TimeoutError):
                async with asyncio.timeout(1.0):
                    left = PlannerLeft(region=self.region, epoch=self._log.epoch, nonce=self._nonce)
                    await self._send(topics.DECISIONS, left)
            raise

    async def _lead_until_deposed(self, reader: Reader) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                lead = _Lead(self, reader)
                for step in (lead.read_back, lead.decide, lead.keep_time, lead.await_acknowledgements):
                    group.create_task(step(), name=f"{self.name}: {step.__name__}")
        except* (_Deposed, BusError) as failures:
            first: BaseException = failures
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None

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
        self._unproven: deque[Decision] = deque()  # decided, not yet read back
        self._acknowledgements: asyncio.Queue[Awaitable[Position]] = asyncio.Queue()
        self._room = asyncio.Event()
        self._room.set()
        self._spoke_s = float("-inf")
        self._timer = asyncio.Event()
        self._deciding = asyncio.Lock()
        self._snapshots: dict[int, Snapshot] = {}  # by sequence, waiting for their proof

    async def read_back(self) -> None:
        """Read what really stands in the log; what this planner decided must be there, in order, and nothing else."""
        service = self.service
        while True:
            for record in await self.reader.fetch():
                message = service._log.read(record)
                if isinstance(message, EpochOpened):
                    raise _Deposed(f"{message.planner} opened epoch {message.epoch}", reclaim=False)
                if not isinstance(message, Decision):
                    continue
                if not self._unproven or message.seq != self._unproven[0].seq:
                    raise InvariantError(f"decision {message.seq} came back, which was not the next that was sent")
                self._unproven.popleft()
                self._room.set()
                if (snapshot := self._snapshots.pop(message.seq, None)) is not None:
                    kept = snapshot.model_copy(update={"offset": record.offset})
                    await service._send(topics.SNAPSHOTS, kept)

    async def await_acknowledgements(self) -> None:
        """A decision whose fate is unknown ends the spell: the log will tell."""
        while True:
            acknowledgement = await self._acknowledgements.get()
            try:
                await acknowledgement
            except BusError as error:
                raise _Deposed(f"a decision may not have been written: {error}", reclaim=True) from None

    async def decide(self) -> None:
        """One step for every record of the region's inputs, in the order in which they are read."""
        service = self.service
        start = {(topic, service.region): service._inputs[topic] for topic in INPUTS}
        reader = await service.bus.reader(list(start), start=start)
        try:
            while True:
                # Nodes first: a task that arrives with its device must find it there.
                for record in sorted(await reader.fetch(), key=lambda record: INPUTS.index(record.topic)):
                    await self._take(record)
        finally:
            await reader.close()

    async def _take(self, record: Record) -> None:
        service = self.service
        try:
            message = messages.decode(record.topic, record.value)
        except ProtocolError as error:
            service._inputs[record.topic] = record.offset + 1
            await bury(service.bus, record, error, task_id=record.key or "", by=service.name)
            return
        await self._step(message, (record.topic, record.offset + 1))

    async def keep_time(self) -> None:
        """Leases and deadlines, and a sign of life where there is nothing to decide."""
        service = self.service
        clock = asyncio.get_running_loop().time
        interval_s = service.lease_s / HEARTBEATS_PER_LEASE
        while True:
            wakeup_s = service.core.next_wakeup()
            now_s = service.now_s()
            if wakeup_s is not None and wakeup_s <= now_s:
                await self._step(Tick(), None)
                wakeup_s = service.core.next_wakeup()
            if clock() - self._spoke_s >= interval_s:
                await self._post(PlannerHeartbeat(region=service.region, epoch=self.epoch, nonce=self.nonce))
            wait_s = interval_s if wakeup_s is None else min(interval_s, max(0.001, wakeup_s - service.now_s()))
            self._timer.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._timer.wait()

    async def _step(self, event: object, consumed: tuple[str, int] | None) -> None:
        """Let the core decide, and put the record on its way. Steps never overlap, so records keep their order."""
        service = self.service
        async with self._deciding:
            while len(self._unproven) >= MAX_UNPROVEN:
                self._room.clear()
                await self._room.wait()
            now_s = service.now_s()
            before_s = service.core.next_wakeup()
            changes = service.core.handle(event, now_s)
            if consumed is not None:
                service._inputs[consumed[0]] = consumed[1]
            if service.core.next_wakeup() != before_s:
                self._timer.set()
            if not changes:
                return
            self.seq += 1
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
            self._unproven.append(decision)
            if self.seq % service._snapshot_every == 0:
                self._snapshots[self.seq] = self._snapshot(decision)
            await self._post(decision)
            service.decisions += 1

    def _snapshot(self, decision: Decision) -> Snapshot:
        return Snapshot(
            region=decision.region,
            epoch=decision.epoch,
            nonce=decision.nonce,
            seq=decision.seq,
            offset=0,  # known once it is read back
            now_s=decision.now_s,
            inputs=decision.inputs,
            ledger_hash=decision.ledger_hash,
            state=self.service.core.to_state(),
        )

    async def _post(self, message: Message) -> None:
        service = self.service
        acknowledgement = await service.bus.post(
            topics.DECISIONS, messages.encode(message), key=str(service.region), partition=service.region
        )
        self._acknowledgements.put_nowait(acknowledgement)
        self._spoke_s = asyncio.get_running_loop().time()


def _utc() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


__all__ = ["LEASE_S", "PlannerService", "Standing"]
