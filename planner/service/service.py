"""Planner service: runs `PlannerCore` for one region on the bus and recovers all state from the decision topic.

A planner first replays the topic and stands by. When the region has no leader, or the leader has been silent for its lease,
the planner appends `EpochOpened(highest + 1, nonce)` and reads on to see whether its record came first. Then it leads
(`planner.service.leader_term`): each input is one step of the core, and each step with a change is one decision record, which
also holds the input offsets. State, inputs and outputs are therefore one atomic write. A leader keeps deciding while records
are in flight and reads its own records back; if one is missing, the planner discards its state and replays the topic.

Ledger time is the region's own clock: the `now_s` of the last decision plus the local time since this planner took over.

Snapshots shorten the replay. A snapshot is used only if it is complete and the log confirms its decision; otherwise the
planner tries an older one or replays from the start. `docs/service.md` is the operator's page.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
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
"""Default silence of a leader after which another planner takes over."""
SNAPSHOT_EVERY = 500
"""Default number of decisions from one snapshot to the next."""
MAX_UNREADABLE = 100
"""Limit for unreadable decision records that are remembered until this planner leads and dead-letters them."""
RETRY_S = 0.5
"""Pause before the planner retries after a failure of the bus."""

log = structlog.get_logger("planner")


class Standing(StrEnum):
    """Current role of a planner in its region."""

    READING = "reading"  # replaying the decision topic
    STANDING_BY = "standing by"  # another planner leads
    LEADING = "leading"


ReaderBehind = Callable[[Bus, Snapshot], Awaitable[Reader | None]]
"""Opens a reader of the decisions after a snapshot; returns None if the log does not confirm the snapshot."""


class PlannerService:
    """One planner of one region. `make_core` creates an empty core with its policy and objective.

    With a `master`, the region requires proofs of identity from this planner's first epoch on. Without one, the planner
    refuses to serve a region that already requires proofs, unless `trust_everybody` turns them off.
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
        reader_behind: ReaderBehind = snapshots.reader_behind,
    ) -> None:
        """Snapshots are split at about `part_bytes` per record, decisions at about `record_bytes`.

        `wall_clock` (seconds since 1970) only labels records for people who read them. `reader_behind` checks a snapshot
        against the log.
        """
        self.bus = bus
        self.core = make_core()
        self.name = name
        self.region = region
        self.lease_s = lease_s
        self.standing = Standing.READING
        self.decisions = 0  # decisions written while leading
        self.input_filter = InputFilter(master)
        self.lost_inputs = 0  # tasks and events deleted before this planner read them
        self.policy_errors = 0  # tasks rejected because a user's policy failed
        self.input_failures = 0  # inputs that the planner failed to handle: bugs of ours
        self.failures: dict[tuple[str, int], Failure] = {}  # (topic, offset) -> inputs to skip in the next term
        self.dead_letters = 0  # dead letters written, unauthorized records included
        self.log = log.bind(planner=name, region=region)
        self._make_core = make_core
        self._take_over = take_over
        self._trust_everybody = trust_everybody
        self.snapshot_every = snapshot_every
        self.part_bytes = part_bytes
        self.record_bytes = record_bytes
        self.snapshot_seq = 0  # decision of the last snapshot taken; initially of the one restored
        self.decision_log = DecisionLog()  # the rule which decision records count, up to the last one read
        self.inputs: dict[str, int] = {}  # topic -> next offset to read
        self._wall_clock = wall_clock
        self._reader_behind = reader_behind
        self._now_s = 0.0  # ledger time at `_since_s`
        self._since_s = 0.0  # on the event loop's clock
        self.nonce = ""
        self.envelope = Envelope(f"/deepar/{region}/planner/{name}", uuid.uuid4().hex[:12])
        self.traces: TaskTraces | None = None
        self.statistics = TaskStatistics()
        # unreadable decision records, read while not leading
        self.unreadable: deque[tuple[Record, Dropped]] = deque(maxlen=MAX_UNREADABLE)

    def now_s(self) -> float:
        """Ledger time, while leading."""
        return self._now_s + (asyncio.get_running_loop().time() - self._since_s)

    @property
    def master_fingerprint(self) -> str | None:
        """Fingerprint of the master secret; None if this planner does not require proofs of identity."""
        return None if self.input_filter.master is None else self.input_filter.master.fingerprint

    def trace_to(self, sink: SpanSink | None) -> None:
        """Send the spans of tasks and decisions to `sink`. Call it before `run`."""
        self.traces = TaskTraces(self.name, sink) if sink is not None else None

    def utc(self) -> str:
        """Wall-clock time in UTC, for people who read the records."""
        return datetime.fromtimestamp(self._wall_clock(), UTC).isoformat(timespec="milliseconds")

    async def run(self) -> None:
        """Serve until cancelled: replay, stand by, lead, and again.

        Raises `InvariantError` for bugs only. Raises `ConfigError` if the region requires proofs of identity that this
        planner has no secret to verify, or if decisions were deleted that no snapshot covers.
        """
        while True:
            try:
                reader = await self._start_replay()
            except DecisionsLostError as error:
                raise self._unrecoverable(error) from error
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
                if self.standing is Standing.READING:  # lost behind the newest snapshot, so a retry would find the same
                    raise self._unrecoverable(error) from error
                self.log.warning("decisions lost; replaying the topic", error=str(error))
            except BusError as error:
                self.log.warning("bus failed; replaying the topic", error=str(error))
                await asyncio.sleep(RETRY_S)
            finally:
                await reader.close()

    # --- standing by -------------------------------------------------------------------------------------------------

    async def _start_replay(self) -> Reader:
        """Restore the newest usable snapshot or an empty state. The reader starts at the first decision to replay."""
        self.standing = Standing.READING
        async with aclosing(snapshots.found(self.bus, self.region)) as candidates:
            async for one in candidates:
                reader = await self._reader_behind(self.bus, one.snapshot)
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

    def _unrecoverable(self, lost: DecisionsLostError) -> ConfigError:
        """An error that stops the planner: an empty state would drop running tasks and decide old ones a second time."""
        return ConfigError(
            f"{lost}, and no snapshot covers them: the planner cannot restore the region's state",
            remedy=f"restore {topics.DECISIONS} and {topics.SNAPSHOTS} from a backup; or drop all unfinished"
            f" tasks: stop all services, delete {topics.DECISIONS}, {topics.SNAPSHOTS}, {topics.TASKS} and {topics.EVENTS}"
            " (kafka-topics.sh --delete), then: deepar topics create",
        )

    def _restore(self, snapshot: Snapshot) -> bool:
        """Load a snapshot's state; False if it is corrupt or of another version."""
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

    async def _stand_by(self, reader: Reader) -> None:
        """Replay decisions as they arrive. Returns when this planner should claim the region."""
        if self.traces is not None:
            self.traces.retain(self.core.tasks)
        self.statistics.retain(self.core.tasks)
        clock = asyncio.get_running_loop().time
        heard_s = clock()
        while True:
            # Read the clock before the lag: if this process freezes in between, the leader must not look silent.
            asked_s = clock()
            if await reader.lag() == 0:
                self._require_master()
                # An epoch with this planner's own nonce has no leader: its send failed or its term ended.
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
        """Stop a planner without a master secret from turning off the region's proofs of identity by accident."""
        if self.decision_log.identity is not None and self.master_fingerprint is None and not self._trust_everybody:
            raise ConfigError(
                f"region {self.region} requires proofs of identity, and this planner has no master secret",
                remedy="set DEEPAR_IDENTITY_MASTER_FILE to its file; to turn proofs off: deepar planner --trust-everybody",
            )

    def _read(self, record: Record) -> DecisionTopicMessage | Dropped:
        """Decode a decision record, and drop it if it is void. Unreadable records are kept until this planner leads."""
        message = self.decision_log.read(record)
        if isinstance(message, Dropped) and message.reason in UNREADABLE:
            self.unreadable.append((record, message))
        return message

    def _fold_in(self, decision: Decision) -> None:
        """Apply a decision of the topic to the state and check the hash."""
        self.core.fold(decision)
        if self.traces is not None:
            self.traces.fold(decision)
        self.statistics.fold(decision)
        self.inputs.update(decision.inputs)
        self._now_s = decision.now_s
        self._check_hash(decision.ledger_hash, decision.seq)

    def _check_hash(self, recorded: str, seq: int) -> None:
        """Raise `InvariantError` if the state differs from the one that the leader recorded."""
        if self.core.state_hash != recorded:
            raise InvariantError(
                f"region {self.region}: state hash after replaying decision {seq} is {self.core.state_hash}, "
                f"the recorded one is {recorded}"
            )

    # --- claiming ----------------------------------------------------------------------------------------------------

    async def _claim(self, reader: Reader) -> None:
        """Open the next epoch. Returns once the topic shows that this planner opened it first; raises `Deposed` otherwise."""
        if self.decision_log.epoch == 0:
            await self._require_no_snapshot()
        self.nonce = uuid.uuid4().hex[:12]
        epoch = self.decision_log.epoch + 1
        self._take_over = False  # once only: two planners with this option would otherwise depose each other forever
        opened = EpochOpened(
            region=self.region,
            epoch=epoch,
            nonce=self.nonce,
            planner=self.name,
            lease_s=self.lease_s,
            identity=self.master_fingerprint,
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
        """Check that a topic without an epoch belongs to a new region: a snapshot means that its decisions were deleted."""
        async with aclosing(snapshots.found(self.bus, self.region)) as candidates:
            async for one in candidates:
                raise self._unrecoverable(DecisionsLostError(self.region, one.snapshot.offset, 0))

    # --- leading -----------------------------------------------------------------------------------------------------

    async def _lead(self, reader: Reader) -> None:
        """Lead until deposed or cancelled; when cancelled, announce that the region has no leader."""
        self._since_s = asyncio.get_running_loop().time()
        self.core.restart_leases(self.now_s())
        self.standing = Standing.LEADING
        self.log.info("leading", epoch=self.decision_log.epoch, seq=self.decision_log.seq, tasks=self.core.live_tasks)
        # Run the term in a separate asyncio task: a task group that is cancelled while one of its tasks fails reports only
        # the failure, and the cancellation would be lost.
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
        """Run one leader term and raise its first failure."""
        first: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                term = LeaderTerm(self, reader)
                for step in (
                    term.read_back,
                    term.decide,
                    term.send_heartbeats,
                    term.await_acknowledgements,
                    term.write_snapshots,
                    term.guard_log_start,
                    term.dead_letter_broken_snapshots,
                ):
                    group.create_task(step(), name=f"{self.name}: {step.__name__}")
        except* (Deposed, BusError) as failures:
            first = failures
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
        # Raised outside `except*`: early releases of Python 3.11 wrap an error raised inside it in another group.
        if first is not None:
            raise first from None

    async def _leave(self) -> None:
        """Announce that the region has no leader; give up after one second."""
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
