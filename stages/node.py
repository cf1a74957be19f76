"""The node loop that devices, edges and the cloud share: announce, keep the lease, follow the decisions.

A node first reads the region's decisions to their end, so that it knows what is fenced, then announces itself under a new
incarnation and begins to work. Heartbeats renew its lease. After half a lease without an acknowledged heartbeat it stops
sending (`Lease.gate`), so that none of its frames are in flight when the planner declares it lost. When it reads that it was
declared lost, it drops all work and announces itself again.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Iterable
from functools import partial
from typing import Protocol

import structlog

from bus import messages, topics
from bus.dead_letter import DeadLetterLimiter, write_dead_letter
from bus.decisions import DecisionsLostError
from bus.errors import BusError, ProtocolError
from bus.frames import AttemptPlan
from bus.headers.envelope import Envelope
from bus.headers.tracing import SpanSink
from bus.identity.proofs import WRONG_IDENTITY
from bus.messages import (
    Decision,
    Learned,
    LinkMeasurement,
    Message,
    NodeAnnounced,
    NodeHeartbeat,
    NodeJoined,
    NodeLeft,
    NodeLost,
    Placed,
)
from bus.port import Bus, Record
from bus.values import Role
from stages.calibration.announced import fitting
from stages.components import StageComponents
from stages.measuring.own_speed import OwnSpeed
from stages.measuring.peers import ProbingNode
from stages.measuring.reports import LinkReports
from stages.membership.failures import detail_of
from stages.membership.fences import Fences
from stages.membership.settings import NodeSettings
from stages.membership.spans import TaskSpans
from stages.membership.status import MEASURED, NodeStatus
from stages.profile_check import ProfileCheck
from stages.region_decisions import RegionDecisions
from stages.rehearsal import rehearse
from stages.runner import MeasuresBatches, Runner

HEARTBEATS_PER_LEASE = 5
RETRY_S = 0.5
DRAIN_ACKNOWLEDGED_S = 2.0
"""Timeout for the planner's acknowledgement of a drain."""
REHEARSAL_S = 2.0
"""Limit of the time for which a node rehearses; models that take longer are not rehearsed."""
MAX_PREPARATIONS = 16
"""Limit of models that are prepared ahead at the same time; beyond it an attempt prepares its model itself."""
DRAINED_S = 0.05
"""Interval at which a draining node checks whether its work has ended."""

log = structlog.get_logger("stage")


class BusySink(Protocol):
    """Receives every interval of work: the part of the delay (`device_s`, `link1_s`, ...), the task, begin and end."""

    def __call__(self, node: str, part: str, task_id: str, begin_s: float, end_s: float) -> None: ...


class Work(Protocol):
    """The part of a node that depends on its role."""

    async def run(self) -> None:
        """Serve until cancelled; set `Node.serving` when ready to receive tasks or frames."""

    def on_decision(self, decision: Decision, fenced: Iterable[str]) -> None:
        """Handle a decision; `fenced` names tasks with an attempt that no longer counts."""

    def idle(self) -> bool:
        """Whether no task uses the node."""

    def links(self) -> Iterable[LinkMeasurement]:
        """What the node has measured on its links, for its heartbeats."""

    def on_lost(self) -> None:
        """Drop work that the region may have given to others: the node was declared lost or missed decisions."""


class Node:
    """One node of a region, whatever its role."""

    def __init__(
        self,
        bus: Bus,
        settings: NodeSettings,
        runner: Runner,
        *,
        on_busy: BusySink | None = None,
        on_span: SpanSink | None = None,
        components: StageComponents | None = None,
    ) -> None:
        self.bus = bus
        self.components = StageComponents() if components is None else components
        self._on_busy = on_busy
        self.settings = settings
        self.runner = runner
        self.lease = self.components.lease(settings.lease_s)
        self.spans = TaskSpans(settings.name, settings.role, on_span)
        self.status = NodeStatus()
        for part in MEASURED[settings.role]:
            self.status.count(f"{part}_busy_seconds", 0.0)
        self.incarnation = uuid.uuid4().hex[:12]
        self._envelope = Envelope(f"/deepar/{settings.region}/{settings.role.value}/{settings.name}", self.incarnation)
        self.log = log.bind(node=settings.name, role=settings.role.value)
        self.decisions = RegionDecisions(bus, settings, self.components, self.log)
        self._dead_letter_limiter = DeadLetterLimiter()
        self.serving = asyncio.Event()  # set by the work when it can receive; the node announces itself after that
        self._announced_s = float("-inf")  # time of the last announcement
        self._group: asyncio.TaskGroup | None = None
        self._preparing = 0  # models being prepared ahead
        self._draining = False  # announcements say that the node accepts no new tasks
        self._drain_acknowledged = asyncio.Event()  # set when the planner has acknowledged the drain
        self._link_reports = LinkReports()
        self._own_speed: OwnSpeed | None = None  # set by `run`, where the node measures itself
        self._profile_check: ProfileCheck | None = None  # set by `run`
        self._heartbeat_due = asyncio.Event()  # send the next heartbeat now
        self._logged_ready = False  # readiness as last logged

    async def run(self, work: Work) -> None:
        """Serve until cancelled.

        Raises `BusError` where the bus cannot be reached at the start, and `ConfigError` where the region requires proofs of
        identity that this bus does not create (`bus.identity.signed_bus`).
        """
        await self._catch_up()
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                check = ProfileCheck(self.settings.name, self.runner, work.idle, self._announce_again, self.log)
                self._profile_check = check
                if self.settings.rehearses:
                    self._own_speed = OwnSpeed(
                        self.runner.profiles,
                        partial(rehearse, self.runner),
                        lambda: self.status.joined and work.idle() and not check.measuring,
                        self.heartbeat_now,
                        self.log,
                    )
                    group.create_task(self._own_speed.run(), name=f"{self.settings.name}: own speed")
                group.create_task(check.run(), name=f"{self.settings.name}: profiles")
                if isinstance(self.runner, MeasuresBatches):
                    group.create_task(check.run_batches(self.runner), name=f"{self.settings.name}: batches")
                group.create_task(work.run(), name=f"{self.settings.name}: work")
                group.create_task(self._follow(work), name=f"{self.settings.name}: decisions")
                group.create_task(self._keep_lease(work), name=f"{self.settings.name}: lease")
        finally:
            await self.decisions.close()

    @property
    def fences(self) -> Fences:
        """What the decisions say of attempts, tasks and nodes."""
        return self.decisions.fences

    async def drain(self) -> None:
        """Announce that this node accepts no new tasks, and return when the tasks placed on it have ended.

        Returns early where the planner does not acknowledge the drain within `DRAIN_ACKNOWLEDGED_S`.
        """
        self._draining = True
        try:
            async with asyncio.timeout(DRAIN_ACKNOWLEDGED_S):
                await self.publish(topics.NODES, self.announcement(), self.settings.name)
                await self._drain_acknowledged.wait()
        except TimeoutError:
            self.log.warning("drain not acknowledged", within_s=DRAIN_ACKNOWLEDGED_S)
            return
        # After the acknowledgement, `placed` holds only running tasks: the planner has placed waiting ones elsewhere.
        while self.settings.role is Role.EDGE and self.fences.holds(self.settings.name):
            await asyncio.sleep(DRAINED_S)

    async def leave(self) -> None:
        """Announce that this node leaves the region."""
        message = NodeLeft(node=self.settings.name, region=self.settings.region, incarnation=self.incarnation)
        await self.publish(topics.NODES, message, self.settings.name)

    def receives(self, assigned: bool) -> None:
        """Record whether partitions are assigned to this node."""
        self.status.receiving = assigned
        self._log_readiness()

    def _log_readiness(self) -> None:
        """Log when the node becomes ready and when it stops being ready."""
        ready = self.status.ready
        if ready is self._logged_ready:
            return
        self._logged_ready = ready
        if ready:
            self.log.info("ready")
        else:
            self.log.warning("no longer ready", caught_up=self.status.caught_up, receiving=self.status.receiving)

    @property
    def probing(self) -> ProbingNode:
        """What probes of this node's links use of it."""
        return ProbingNode(name=self.settings.name, bus=self.bus, gate=self.lease.gate, count=self.status.count)

    def busy(self, part: str, task_id: str, begin_s: float, end_s: float) -> None:
        """Record an interval of work on one part of a task's delay; times are on the loop's clock."""
        self.status.count(f"{part.removesuffix('_s')}_busy_seconds", end_s - begin_s)
        if self._on_busy is not None:
            self._on_busy(self.settings.name, part, task_id, begin_s, end_s)

    def prepare_ahead(self, placed: Placed, first: int, last: int) -> None:
        """Prepare layers first+1..last of a placed task in the background, before its samples arrive.

        A failure is left to the attempt, which prepares the layers again and reports it.
        """
        if self._group is None or self._preparing >= MAX_PREPARATIONS:
            return
        plan = AttemptPlan.of(placed, region=self.settings.region, todo=placed.samples)

        async def prepare() -> None:
            self._preparing += 1
            try:
                await self.runner.prepare(plan, first, last)
            except Exception as error:
                self.log.info("model not prepared ahead", task=placed.task_id, error=detail_of(error))
            finally:
                self._preparing -= 1

        self._group.create_task(prepare(), name=f"{self.settings.name}: prepare {placed.task_id}")

    async def publish(self, topic: str, message: Message, key: str) -> None:
        """Publish a control message to the region; retry until the bus acknowledges it."""
        payload, headers = messages.encode(message), self._envelope.headers(message)
        while True:
            try:
                await self.bus.send(topic, payload, key=key, partition=self.settings.region, headers=headers)
                return
            except BusError as error:
                self.log.warning("message not published; retrying", topic=topic, error=str(error))
                await asyncio.sleep(RETRY_S)

    async def dead_letter(self, record: Record, error: ProtocolError, *, task_id: str = "") -> None:
        """Publish an unusable record to the dead-letter topic with its origin and the cause."""
        if error.cause == WRONG_IDENTITY:
            self.status.count("wrong_identity")
            if not self._dead_letter_limiter.take(asyncio.get_running_loop().time()):
                return
        self.status.count("dead_letters")
        self.log.warning(
            "record dead-lettered", topic=record.topic, offset=record.offset, cause=error.cause, error=str(error)
        )
        await write_dead_letter(self.bus, record, error, task_id=task_id, by=self.settings.name)

    # --- decisions ---------------------------------------------------------------------------------------------------

    async def _catch_up(self) -> None:
        await self.decisions.catch_up()
        self.status.caught_up = True
        self._log_readiness()

    async def _follow(self, work: Work) -> None:
        await self.serving.wait()
        if self.settings.rehearses:
            await self._rehearse()
        await self._announce()
        while True:
            try:
                for record in await self.decisions.fetch():
                    self._handle(record, work)
            except DecisionsLostError as error:
                await self._recover(error, work)
            except BusError as error:
                self.log.warning("decisions not read; retrying", error=str(error))
                await asyncio.sleep(RETRY_S)

    def _handle(self, record: Record, work: Work) -> None:
        """Handle one record of the decisions topic."""
        read = self.decisions.read(record)
        if read is None:
            return
        decision, fenced = read
        lost = False
        for change in decision.changes:
            match change:
                case NodeJoined(node=node) if node.incarnation == self.incarnation:
                    if not self.status.joined:
                        self.log.info("joined the region", region=self.settings.region)
                        if any(True for _ in work.links()):
                            self.heartbeat_now()  # the planner accepts measurements from now on
                    self.status.joined = True
                    if node.draining:
                        self._drain_acknowledged.set()
                case NodeLost(incarnation=incarnation) if incarnation == self.incarnation:
                    lost = True
                case Learned() if self._profile_check is not None:
                    self._profile_check.learned(change)
                case _:
                    pass
        work.on_decision(decision, sorted(fenced))
        if lost:
            self.log.warning("declared lost; work dropped, announcing again")
            self.status.count("declared_lost")
            self._rejoin(work)

    async def _rehearse(self) -> None:
        """Run each model once, so that the first task takes no longer than others. A failure is left to the tasks."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REHEARSAL_S):
                for profile in self.runner.profiles():
                    if sum(profile.layer_s) > REHEARSAL_S:
                        continue
                    try:
                        await rehearse(self.runner, profile, packs=True)
                    except Exception as error:
                        self.log.info("model not rehearsed", model=profile.model, error=detail_of(error))

    async def _recover(self, error: DecisionsLostError, work: Work) -> None:
        """Recover from missed decisions: read again from the last snapshot, drop work and announce the node again.

        Heartbeats stop meanwhile, so that the planner replans tasks that this node may not know of.
        """
        self.log.warning("decisions were missed; reading again from the last snapshot", error=str(error))
        self.status.count("decisions_missed")
        self.status.caught_up = self.status.joined = False
        self._log_readiness()
        while not self.status.caught_up:
            try:
                await self._catch_up()
            except BusError as away:
                self.log.warning("decisions not read; retrying", error=str(away))
                await asyncio.sleep(RETRY_S)
        self._rejoin(work)

    def _rejoin(self, work: Work) -> None:
        self.status.joined = False
        self._link_reports.forget()
        if self._own_speed is not None:
            self._own_speed.forget()
        work.on_lost()
        # Two processes with the same name displace each other in turn; the pause limits how often.
        lease_s = self.settings.lease_s
        pause_s = 0.0
        if asyncio.get_running_loop().time() - self._announced_s < lease_s:
            self.log.warning("declared lost right after announcing; another process may have this name")
            pause_s = lease_s / HEARTBEATS_PER_LEASE
        self.incarnation = uuid.uuid4().hex[:12]
        assert self._group is not None
        self._group.create_task(self._announce_after(pause_s), name=f"{self.settings.name}: coming back")

    async def _announce_after(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        await self._announce()

    # --- the lease ---------------------------------------------------------------------------------------------------

    def announcement(self) -> NodeAnnounced:
        """The announcement of this node."""
        measured = self.runner.profiles()
        models = fitting(measured)
        if smaller := [one.model for one, whole in zip(models, measured, strict=True) if one is not whole]:
            self.log.warning("announcement too large; codecs or batches left out", models=smaller)
        return self.settings.announcement(self.incarnation, models, draining=self._draining)

    async def _announce_again(self) -> None:
        """Announce changed profiles; the node goes on as it is."""
        if self.status.joined:
            await self.publish(topics.NODES, self.announcement(), self.settings.name)

    async def _announce(self) -> None:
        self.status.warm = True
        self._log_readiness()
        sent_s = asyncio.get_running_loop().time()
        await self.publish(topics.NODES, self.announcement(), self.settings.name)
        self._announced_s = asyncio.get_running_loop().time()
        self.lease.renew(sent_s)

    def heartbeat_now(self) -> None:
        """Send the next heartbeat at once, because the node has measured something new."""
        self._heartbeat_due.set()

    async def _keep_lease(self, work: Work) -> None:
        interval_s = self.settings.lease_s / HEARTBEATS_PER_LEASE
        clock = asyncio.get_running_loop().time
        while True:
            if not self.status.caught_up:
                await asyncio.sleep(interval_s)
                continue
            sent_s = clock()
            self._heartbeat_due.clear()
            links = self._link_reports.news(work.links()) if self.status.joined else ()
            speeds = self._own_speed.news() if self._own_speed is not None and self.status.joined else ()
            message = NodeHeartbeat(node=self.settings.name, incarnation=self.incarnation, links=links, speeds=speeds)
            try:
                async with asyncio.timeout(interval_s):
                    await self.bus.send(
                        topics.EVENTS,
                        messages.encode(message),
                        key=self.settings.name,
                        partition=self.settings.region,
                        headers=self._envelope.headers(message),
                    )
            except TimeoutError:
                # Send the next one at once, so that work resumes as soon as the bus is back.
                self.log.warning("heartbeat not acknowledged", within_s=interval_s)
                continue
            except BusError as error:
                self.log.warning("heartbeat not acknowledged", error=str(error))
                await asyncio.sleep(min(interval_s, RETRY_S))
                continue
            self.lease.renew(sent_s)
            self._link_reports.told(links)
            if self._own_speed is not None:
                self._own_speed.told(speeds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._heartbeat_due.wait()
