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
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum

from bus import messages, snapshots, topics
from bus.decisions import DecisionLog, DecisionsLostError, DecisionTopicMessage, Dropped
from bus.errors import BusError, ConfigError, DeeparError, InvariantError
from bus.headers.tracing import SpanSink
from bus.identity.keys import Master
from bus.messages import Decision, EpochOpened, Message, PlannerLeft, Snapshot
from bus.port import Bus, Position, Reader, Record
from planner.core.core import PlannerCore
from planner.service.input_filter import InputFilter
from planner.service.leader_term import HEARTBEATS_PER_LEASE, INPUTS, UNREADABLE, Deposed, LeaderTerm
from planner.service.region_context import PlannerCounters, PlannerSettings, RegionContext
from planner.service.traces import TaskTraces

RETRY_S = 0.5
"""Pause before the planner retries after a failure of the bus."""


class Standing(StrEnum):
    """Current role of a planner in its region."""

    READING = "reading"  # replaying the decision topic
    STANDING_BY = "standing by"  # another planner leads
    LEADING = "leading"


ReaderBehind = Callable[[Bus, Snapshot], Awaitable[Reader | None]]
"""Opens a reader of the decisions after a snapshot; returns None if the log does not confirm the snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceComponents:
    """The replaceable components of a planner service. Tests replace one to plant a bug."""

    reader_behind: ReaderBehind = snapshots.reader_behind  # checks a snapshot against the log
    leader_term: Callable[[RegionContext, Reader], LeaderTerm] = LeaderTerm


class PlannerService:
    """One planner of one region. `make_core` creates an empty core with its policy and objective.

    With a `master`, the region requires proofs of identity from this planner's first epoch on. Without one, the planner
    refuses to serve a region that already requires proofs, unless `trust_everybody` turns them off.
    """

    def __init__(
        self,
        bus: Bus,
        make_core: Callable[[], PlannerCore],
        settings: PlannerSettings | None = None,
        *,
        master: Master | None = None,
        wall_clock: Callable[[], float] = time.time,
        components: ServiceComponents | None = None,
    ) -> None:
        """`wall_clock` (seconds since 1970) only labels records for people who read them."""
        settings = PlannerSettings() if settings is None else settings
        self.context = RegionContext(bus, settings, make_core(), InputFilter(master), wall_clock)
        self.standing = Standing.READING
        self._make_core = make_core
        self._take_over = settings.take_over
        self._components = ServiceComponents() if components is None else components

    @property
    def core(self) -> PlannerCore:
        """The region's state: as replayed so far, or as decided while leading."""
        return self.context.core

    @property
    def counters(self) -> PlannerCounters:
        """The counters since this process started."""
        return self.context.counters

    def trace_to(self, sink: SpanSink | None) -> None:
        """Send the spans of tasks and decisions to `sink`. Call it before `run`."""
        self.context.traces = TaskTraces(self.context.settings.name, sink) if sink is not None else None

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
                self.context.log.warning("decisions not read; retrying", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            try:
                await self._stand_by(reader)
                await self._claim(reader)
                await self._lead(reader)
            except Deposed as deposed:
                self.context.log.warning("leadership lost", reason=str(deposed))
            except DecisionsLostError as error:
                if self.standing is Standing.READING:  # lost behind the newest snapshot, so a retry would find the same
                    raise self._unrecoverable(error) from error
                self.context.log.warning("decisions lost; replaying the topic", error=str(error))
            except BusError as error:
                self.context.log.warning("bus failed; replaying the topic", error=str(error))
                await asyncio.sleep(RETRY_S)
            finally:
                await reader.close()

    # --- standing by -------------------------------------------------------------------------------------------------

    async def _start_replay(self) -> Reader:
        """Restore the newest usable snapshot or an empty state. The reader starts at the first decision to replay."""
        self.standing = Standing.READING
        async with aclosing(snapshots.found(self.context.bus, self.context.settings.region)) as candidates:
            async for one in candidates:
                reader = await self._components.reader_behind(self.context.bus, one.snapshot)
                if reader is None:
                    continue
                try:
                    snapshot = await snapshots.whole(self.context.bus, one)
                except BaseException:
                    await reader.close()
                    raise
                if snapshot is not None and self._restore(snapshot):
                    return reader
                await reader.close()
        reader = await snapshots.reader_at_start(self.context.bus, self.context.settings.region)
        self.context.core, self.context.decision_log = self._make_core(), DecisionLog(next_offset=0)
        self.context.inputs, self.context.clock.last_s, self.context.snapshot_seq = dict.fromkeys(INPUTS, 0), 0.0, 0
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
        self.context.core = self._make_core()
        try:
            self.context.core.restore(snapshot.state)
            self._check_hash(snapshot.ledger_hash, snapshot.seq)
        except (DeeparError, LookupError, TypeError, ValueError) as error:
            self.context.log.warning("unusable snapshot skipped", seq=snapshot.seq, error=str(error))
            return False
        self.context.decision_log = snapshots.log_behind(snapshot)
        self.context.inputs, self.context.clock.last_s = dict.fromkeys(INPUTS, 0) | snapshot.inputs, snapshot.now_s
        self.context.snapshot_seq = snapshot.seq
        return True

    async def _stand_by(self, reader: Reader) -> None:
        """Replay decisions as they arrive. Returns when this planner should claim the region."""
        if self.context.traces is not None:
            self.context.traces.retain(self.context.core.tasks)
        self.context.statistics.retain(self.context.core.tasks)
        clock = asyncio.get_running_loop().time
        heard_s = clock()
        while True:
            # Read the clock before the lag: if this process freezes in between, the leader must not look silent.
            asked_s = clock()
            if await reader.lag() == 0:
                self._require_master()
                # An epoch with this planner's own nonce has no leader: its send failed or its term ended.
                free = (
                    self.context.decision_log.epoch == 0
                    or self.context.decision_log.left
                    or self.context.decision_log.nonce == self.context.nonce
                )
                silent = asked_s - heard_s > (self.context.decision_log.lease_s or self.context.settings.lease_s)
                if free or silent or self._take_over:
                    return
                if self.standing is not Standing.STANDING_BY:
                    self.standing = Standing.STANDING_BY
                    self.context.log.info(
                        "standing by", leader=self.context.decision_log.planner, epoch=self.context.decision_log.epoch
                    )
            for record in await reader.fetch(timeout_s=min(0.2, self.context.settings.lease_s / HEARTBEATS_PER_LEASE)):
                message = self._read(record)
                if isinstance(message, Decision):
                    self._fold_in(message)
                if isinstance(message, Message):
                    heard_s = clock()

    def _require_master(self) -> None:
        """Stop a planner without a master secret from turning off the region's proofs of identity by accident."""
        if (
            self.context.decision_log.identity is not None
            and self.context.master_fingerprint is None
            and not self.context.settings.trust_everybody
        ):
            raise ConfigError(
                f"region {self.context.settings.region} requires proofs of identity, and this planner has no master secret",
                remedy="set DEEPAR_IDENTITY_MASTER_FILE to its file; to turn proofs off: deepar planner --trust-everybody",
            )

    def _read(self, record: Record) -> DecisionTopicMessage | Dropped:
        """Decode a decision record, and drop it if it is void. Unreadable records are kept until this planner leads."""
        message = self.context.decision_log.read(record)
        if isinstance(message, Dropped) and message.reason in UNREADABLE:
            self.context.unreadable.append((record, message))
        return message

    def _fold_in(self, decision: Decision) -> None:
        """Apply a decision of the topic to the state and check the hash."""
        self.context.core.fold(decision)
        if self.context.traces is not None:
            self.context.traces.fold(decision)
        self.context.statistics.fold(decision)
        self.context.inputs.update(decision.inputs)
        self.context.clock.last_s = decision.now_s
        self._check_hash(decision.ledger_hash, decision.seq)

    def _check_hash(self, recorded: str, seq: int) -> None:
        """Raise `InvariantError` if the state differs from the one that the leader recorded."""
        region, replayed = self.context.settings.region, self.context.core.state_hash
        if replayed != recorded:
            raise InvariantError(
                f"region {region}: state hash after replaying decision {seq} is {replayed}, "
                f"the recorded one is {recorded}"
            )

    # --- claiming ----------------------------------------------------------------------------------------------------

    async def _claim(self, reader: Reader) -> None:
        """Open the next epoch. Returns once the topic shows that this planner opened it first; raises `Deposed` otherwise."""
        if self.context.decision_log.epoch == 0:
            await self._require_no_snapshot()
        self.context.nonce = uuid.uuid4().hex[:12]
        epoch = self.context.decision_log.epoch + 1
        self._take_over = False  # once only: two planners with this option would otherwise depose each other forever
        opened = EpochOpened(
            region=self.context.settings.region,
            epoch=epoch,
            nonce=self.context.nonce,
            planner=self.context.settings.name,
            lease_s=self.context.settings.lease_s,
            identity=self.context.master_fingerprint,
            at=self.context.utc(),
        )
        await self._send(topics.DECISIONS, opened)
        while True:
            for record in await reader.fetch():
                message = self._read(record)
                if isinstance(message, Decision):
                    self._fold_in(message)
                elif isinstance(message, EpochOpened):
                    if message.nonce != self.context.nonce:
                        raise Deposed(f"{message.planner} opened epoch {message.epoch} first")
                    return

    async def _require_no_snapshot(self) -> None:
        """Check that a topic without an epoch belongs to a new region: a snapshot means that its decisions were deleted."""
        async with aclosing(snapshots.found(self.context.bus, self.context.settings.region)) as candidates:
            async for one in candidates:
                raise self._unrecoverable(DecisionsLostError(self.context.settings.region, one.snapshot.offset, 0))

    # --- leading -----------------------------------------------------------------------------------------------------

    async def _lead(self, reader: Reader) -> None:
        """Lead until deposed or cancelled; when cancelled, announce that the region has no leader."""
        self.context.clock.start()
        self.context.core.restart_leases(self.context.now_s())
        self.standing = Standing.LEADING
        self.context.log.info(
            "leading",
            epoch=self.context.decision_log.epoch,
            seq=self.context.decision_log.seq,
            tasks=self.context.core.live_tasks,
        )
        # Run the term in a separate asyncio task: a task group that is cancelled while one of its tasks fails reports only
        # the failure, and the cancellation would be lost.
        leading = asyncio.create_task(self._lead_until_deposed(reader), name=f"{self.context.settings.name}: leading")
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
                term = self._components.leader_term(self.context, reader)
                for step in (
                    term.read_back,
                    term.decide,
                    term.send_heartbeats,
                    term.await_acknowledgements,
                    term.write_snapshots,
                    term.guard_log_start,
                    term.dead_letter_broken_snapshots,
                ):
                    group.create_task(step(), name=f"{self.context.settings.name}: {step.__name__}")
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
                    topics.DECISIONS,
                    PlannerLeft(
                        region=self.context.settings.region,
                        epoch=self.context.decision_log.epoch,
                        nonce=self.context.nonce,
                    ),
                )

    async def _send(self, topic: str, message: Message) -> Position:
        return await self.context.bus.send(
            topic,
            messages.encode(message),
            key=str(self.context.settings.region),
            partition=self.context.settings.region,
            headers=self.context.envelope.headers(message),
        )


__all__ = ["PlannerService", "ServiceComponents", "Standing"]
