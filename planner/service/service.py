"""The planner as a service: a consumer around `PlannerCore` that can be killed anywhere and forgets nothing.

The decision topic is the truth. A planner stands by and folds it; when nobody leads (or the leader has been silent for its
lease) it appends `EpochOpened(highest + 1, nonce)` and reads on until it sees whether it was the first. Then it leads:
every input is one step of the core, every step with a change is one decision record that also says which inputs were
consumed, so that state, inputs and outputs are one atomic write. It goes on deciding while records are on their way, and
reads its own records back; should one not stand where it must, whatever it decided since is void, and it folds the topic
anew. Ledger time is the region's own: the last record's `now` plus what has passed locally since taking over.

Snapshots only save reading. One is written when its decision has been read back, and believed when it is whole and that
decision stands in the log where the snapshot says; else the topic is folded from the start. `docs/service.md` tells the
operator's side.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import aclosing
from datetime import UTC, datetime
from enum import StrEnum

import structlog

from bus import messages, snapshots, topics
from bus.decisions import DecisionLog, DecisionsLostError, DecisionTopicMessage, Dropped
from bus.envelope import Envelope
from bus.errors import BusError, ConfigError, DeeparError, InvariantError
from bus.identity.keys import Master
from bus.messages import Decision, EpochOpened, Message, PlannerLeft, Snapshot
from bus.port import Bus, Position, Reader, Record
from bus.tracing import SpanSink
from planner.core.core import PlannerCore
from planner.service.input_filter import InputFilter
from planner.service.leader_term import HEARTBEATS_PER_LEASE, INPUTS, UNREADABLE, Deposed, LeaderTerm
from planner.service.record_split import RECORD_BYTES
from planner.service.region_context import Failure
from planner.service.snapshot_writer import PART_BYTES
from planner.service.task_statistics import TaskStatistics
from planner.service.traces import TaskTraces

LEASE_S = 5.0
SNAPSHOT_EVERY = 500
UNREADABLE_KEPT = 100
RETRY_S = 0.5

log = structlog.get_logger("planner")


class Standing(StrEnum):
    """What a planner is to its region at the moment."""

    READING = "reading"  # folding history
    STANDING_BY = "standing by"  # another leads
    LEADING = "leading"


class PlannerService:
    """One planner of one region. `make_core` gives an empty core with the policy and objective wanted.

    With a `master` the region demands proofs of identity from now on. Without, it stays as it is: where it demands them this
    planner will not serve it, unless it is told that the region is to `trust_everybody` again.
    """

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
        part_bytes: int = PART_BYTES,
        record_bytes: int = RECORD_BYTES,
        master: Master | None = None,
        trust_everybody: bool = False,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`part_bytes`: what a record of a snapshot takes about, `record_bytes` one of a decision; what is more is divided.

        `wall_clock` (seconds since 1970) is for people who read the records; nothing is decided by it."""
        self.bus = bus
        self.core = make_core()
        self.name = name
        self.region = region
        self.lease_s = lease_s
        self.standing = Standing.READING
        self.decisions = 0  # records written while leading
        self.input_filter = InputFilter(master)
        self.lost_inputs = 0  # tasks and events that were deleted before this planner read them
        self.policy_errors = 0  # tasks rejected because a user's policy failed
        self.input_failures = 0  # inputs that could not be handled: bugs of ours
        self.failures: dict[tuple[str, int], Failure] = {}  # topic and offset of those that are still to be passed over
        self.dead_letters = 0  # that this planner wrote, refusals included
        self.log = log.bind(planner=name, region=region)
        self._make_core = make_core
        self._take_over = take_over
        self._trust_everybody = trust_everybody
        self.snapshot_every = snapshot_every
        self.part_bytes = part_bytes
        self.record_bytes = record_bytes
        self.snapshot_seq = 0  # of the decision behind which reading began, or of the last snapshot taken since
        self.decision_log = DecisionLog()  # the reading rule, as far as was read
        self.inputs: dict[str, int] = {}  # topic -> next offset to read
        self._wall_clock = wall_clock
        self._now_s = 0.0  # ledger time at `_since_s`
        self._since_s = 0.0  # the loop's clock
        self.nonce = ""
        self.envelope = Envelope(f"/deepar/{region}/planner/{name}", uuid.uuid4().hex[:12])
        self.traces: TaskTraces | None = None
        self.statistics = TaskStatistics()
        # what is no message on the decisions, read while not leading
        self.unreadable: deque[tuple[Record, Dropped]] = deque(maxlen=UNREADABLE_KEPT)

    def now_s(self) -> float:
        """Ledger time, while leading."""
        return self._now_s + (asyncio.get_running_loop().time() - self._since_s)

    @property
    def demanded(self) -> str | None:
        """The fingerprint of the master whose keys this planner demands proofs by."""
        return None if self.input_filter.master is None else self.input_filter.master.fingerprint

    def trace_to(self, sink: SpanSink | None) -> None:
        """Tell `sink` of the decisions and the ends of tasks. Before `run`."""
        self.traces = TaskTraces(self.name, sink) if sink is not None else None

    def utc(self) -> str:
        """Now, for people to read."""
        return datetime.fromtimestamp(self._wall_clock(), UTC).isoformat(timespec="milliseconds")

    async def run(self) -> None:
        """Serve until cancelled: stand by, lead, stand by again. Raises `InvariantError` for bugs only, and `ConfigError`
        where the region demands proofs of identity that this planner could not check, or where decisions are gone that no
        snapshot makes up for.
        """
        while True:
            try:
                reader = await self._fold()
            except DecisionsLostError as error:
                raise self._cannot_go_on(error) from error
            except BusError as error:
                self.log.warning("decisions not read; retrying", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            try:
                await self._stand_by(reader)
                await self._claim(reader)
                await self._lead(reader)
            except Deposed as deposed:
                self.log.warning("leadership lost", reason=str(deposed))
            except DecisionsLostError as error:
                if self.standing is Standing.READING:  # behind the newest snapshot, so another look would find the same
                    raise self._cannot_go_on(error) from error
                self.log.warning("decisions are gone; reading the log anew", error=str(error))
            except BusError as error:
                self.log.warning("bus failed; reading the log again", error=str(error))
                await asyncio.sleep(RETRY_S)
            finally:
                await reader.close()

    # --- standing by -------------------------------------------------------------------------------------------------

    async def _fold(self) -> Reader:
        """The last snapshot that holds; the reader goes on behind it, and what it brings is to be folded in."""
        self.standing = Standing.READING
        async with aclosing(snapshots.found(self.bus, self.region)) as candidates:
            async for one in candidates:
                reader = await self._reader_behind(one.snapshot)
                if reader is None:
                    continue
                try:
                    snapshot = await snapshots.whole(self.bus, one)
                except BaseException:
                    await reader.close()
                    raise
                if snapshot is not None and self._restore(snapshot):
                    return reader
                await reader.close()
        reader = await snapshots.reader_at_start(self.bus, self.region)
        self.core, self.decision_log = self._make_core(), DecisionLog(next_offset=0)
        self.inputs, self._now_s, self.snapshot_seq = dict.fromkeys(INPUTS, 0), 0.0, 0
        return reader

    def _cannot_go_on(self, lost: DecisionsLostError) -> ConfigError:
        """To begin again would forget the tasks under way, and decide every task that stands on the topic once more."""
        return ConfigError(
            f"{lost}, and no snapshot covers them: this planner does not know what was decided",
            remedy=f"restore {topics.DECISIONS} and {topics.SNAPSHOTS} from a backup; or give up every task that has not"
            f" ended: stop all services, delete {topics.DECISIONS}, {topics.SNAPSHOTS}, {topics.TASKS} and {topics.EVENTS}"
            " (kafka-topics.sh --delete), then: deepar topics create",
        )

    def _restore(self, snapshot: Snapshot) -> bool:
        """Take on a snapshot's state; False where it cannot be: another version's, or broken."""
        self.core = self._make_core()
        try:
            self.core.restore(snapshot.state)
            self._check_hash(snapshot.ledger_hash, snapshot.seq)
        except (DeeparError, LookupError, TypeError, ValueError) as error:
            self.log.warning("unusable snapshot skipped", seq=snapshot.seq, error=str(error))
            return False
        self.decision_log = snapshots.log_behind(snapshot)
        self.inputs, self._now_s = dict.fromkeys(INPUTS, 0) | snapshot.inputs, snapshot.now_s
        self.snapshot_seq = snapshot.seq
        return True

    async def _reader_behind(self, snapshot: Snapshot) -> Reader | None:
        """A reader of the decisions behind a snapshot, where the log proves it."""
        return await snapshots.reader_behind(self.bus, snapshot)

    async def _stand_by(self, reader: Reader) -> None:
        """Fold what comes until nobody leads. Returns when this planner should claim the region."""
        if self.traces is not None:
            self.traces.keep(self.core.tasks)
        self.statistics.keep(self.core.tasks)
        clock = asyncio.get_running_loop().time
        heard_s = clock()
        while True:
            # The clock before the question: a process that is frozen in between must not take its own silence for another's.
            asked_s = clock()
            if await reader.lag() == 0:
                self._require_master()
                # An epoch that this very planner opened and does not lead (its send failed, or its spell ended) is nobody's.
                free = self.decision_log.epoch == 0 or self.decision_log.left or self.decision_log.nonce == self.nonce
                silent = asked_s - heard_s > (self.decision_log.lease_s or self.lease_s)
                if free or silent or self._take_over:
                    return
                if self.standing is not Standing.STANDING_BY:
                    self.standing = Standing.STANDING_BY
                    self.log.info("standing by", leader=self.decision_log.planner, epoch=self.decision_log.epoch)
            for record in await reader.fetch(timeout_s=min(0.2, self.lease_s / HEARTBEATS_PER_LEASE)):
                message = self._read(record)
                if isinstance(message, Decision):
                    self._fold_in(message)
                if isinstance(message, Message):
                    heard_s = clock()

    def _require_master(self) -> None:
        """A region that was safe must not become unsafe because one of its planners was started without the secret."""
        if self.decision_log.identity is not None and self.demanded is None and not self._trust_everybody:
            raise ConfigError(
                f"region {self.region} demands proofs of identity, and this planner has no master secret",
                remedy="name its file in DEEPAR_IDENTITY_MASTER_FILE; to give proofs up: deepar planner --trust-everybody",
            )

    def _read(self, record: Record) -> DecisionTopicMessage | Dropped:
        """A record of the decisions, by the reading rule; what nobody can read is put by for whoever leads next."""
        message = self.decision_log.read(record)
        if isinstance(message, Dropped) and message.reason in UNREADABLE:
            self.unreadable.append((record, message))
        return message

    def _fold_in(self, decision: Decision) -> None:
        self.core.fold(decision)
        if self.traces is not None:
            self.traces.fold(decision)
        self.statistics.fold(decision)
        self.inputs.update(decision.inputs)
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
        if self.decision_log.epoch == 0:
            await self._require_no_snapshot()
        self.nonce = uuid.uuid4().hex[:12]
        epoch = self.decision_log.epoch + 1
        self._take_over = False  # once; two that were told to would else go on for ever
        opened = EpochOpened(
            region=self.region,
            epoch=epoch,
            nonce=self.nonce,
            planner=self.name,
            lease_s=self.lease_s,
            identity=self.demanded,
            at=self.utc(),
        )
        await self._send(topics.DECISIONS, opened)
        while True:
            for record in await reader.fetch():
                message = self._read(record)
                if isinstance(message, Decision):
                    self._fold_in(message)
                elif isinstance(message, EpochOpened):
                    if message.nonce != self.nonce:
                        raise Deposed(f"{message.planner} opened epoch {message.epoch} first")
                    return

    async def _require_no_snapshot(self) -> None:
        """A log in which no epoch was ever opened is that of a new region, unless there are snapshots of what it held."""
        async with aclosing(snapshots.found(self.bus, self.region)) as candidates:
            async for one in candidates:
                raise self._cannot_go_on(DecisionsLostError(self.region, one.snapshot.offset, 0))

    # --- leading -----------------------------------------------------------------------------------------------------

    async def _lead(self, reader: Reader) -> None:
        self._since_s = asyncio.get_running_loop().time()
        self.core.restart_leases(self.now_s())
        self.standing = Standing.LEADING
        self.log.info("leading", epoch=self.decision_log.epoch, seq=self.decision_log.seq, tasks=self.core.live_tasks)
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
        first: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                term = LeaderTerm(self, reader)
                for step in (
                    term.read_back,
                    term.decide,
                    term.show_life,
                    term.await_acknowledgements,
                    term.keep,
                    term.guard,
                    term.tidy,
                ):
                    group.create_task(step(), name=f"{self.name}: {step.__name__}")
        except* (Deposed, BusError) as failures:
            first = failures
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
        if (
            first is not None
        ):  # raised here: early releases of Python 3.11 wrap what is raised above in a group once more
            raise first from None

    async def _leave(self) -> None:
        """Say that the region is free, where that can be said quickly."""
        with contextlib.suppress(BusError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._send(
                    topics.DECISIONS, PlannerLeft(region=self.region, epoch=self.decision_log.epoch, nonce=self.nonce)
                )

    async def _send(self, topic: str, message: Message) -> Position:
        return await self.bus.send(
            topic,
            messages.encode(message),
            key=str(self.region),
            partition=self.region,
            headers=self.envelope.headers(message),
        )


__all__ = ["LEASE_S", "PlannerService", "Standing"]
