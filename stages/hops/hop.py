"""The hop: what the edge and cloud stages have in common. `EdgeStage` and `CloudStage` hold what differs.

A hop receives activations, computes its layers (or relays) and sends the outputs on. It passes each frame to the flow of its
task at once, so that tasks do not block each other within a partition. A flow computes its samples in order and sends the
outputs through the shaper. The windows of the admitted tasks bound the buffers. An offset is committed when all outputs of
its record are acknowledged downstream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pydantic import ValidationError

from bus import topics
from bus.errors import BusError, ProtocolError
from bus.frames import PROBING, AttemptPlan, Frame, decode_frame
from bus.identity.proofs import WRONG_IDENTITY, Speaker
from bus.messages import Decision, LinkMeasurement, NodeJoined, NodeLost, Placed, Rerouted, TaskFailed
from bus.port import Bus, Member, Record, TopicPartition
from bus.values import Role
from stages.frame_authorization import FrameAuthorization
from stages.hops.branches import segments_of
from stages.hops.cloud_stage import CloudStage
from stages.hops.edge_stage import EdgeStage
from stages.hops.flow import IN_TRANSIT, Flow
from stages.measuring.peers import CLOUD, Echoes, LinkToPeers
from stages.measuring.probes import Prober
from stages.measuring.reports import measurement
from stages.node import RETRY_S, Node
from stages.offsets import Receipt

COMMIT_S = 0.25
"""Commit interval; it bounds the work that is repeated after a crash."""

ORPHAN_BYTES = 64 << 20
"""Buffer limit for frames whose plan or decision has not arrived yet; beyond it frames are dead-lettered."""

UNKNOWN_TASK_S = 30.0
"""A flow of an unknown task is dropped after this long without frames."""

OTHER_REGION_S = 600.0
"""The same limit for tasks of other regions, whose decisions this cloud stage does not read."""

SWEEP_S = 5.0

PREPARED_S = 1.0
"""Time limit for connecting to the results topic before the node announces itself."""


@dataclass(slots=True)
class _Orphan:
    """A buffered record whose plan, or required decision, has not arrived yet."""

    record: Record
    frame: Frame
    receipt: Receipt
    sender: Speaker | None  # None where no proof is required
    since_s: float


def hop_of(node: Node) -> Hop:
    """The work of an edge or a cloud node."""
    return Hop(node, EdgeStage(node.settings) if node.settings.role is Role.EDGE else CloudStage(node.settings.network))


class Hop:
    """What an edge and the cloud have in common; `stage` holds what differs."""

    def __init__(self, node: Node, stage: EdgeStage | CloudStage, make_flow: Callable[..., Flow] = Flow) -> None:
        """`make_flow` has the parameters of `Flow`."""
        self._make_flow = make_flow
        self.node = node
        self.stage = stage
        self.offsets = node.components.offsets()
        self.authorization = FrameAuthorization(node)
        self.flows: dict[tuple[str, int], Flow] = {}
        self._orphans: dict[tuple[str, int], list[_Orphan]] = {}
        self._orphan_bytes = 0
        self._group: asyncio.TaskGroup | None = None
        self._echoes = Echoes(node.probing, stage, self.authorization.can_sign, self._echo_bus)
        self._prober: Prober | None = None  # of an edge
        if node.settings.probes and stage.probed_link is not None:
            way = LinkToPeers(node.probing, stage.probed_link, lambda peer: topics.ACTIVATIONS_CLOUD, idle=self.idle)
            self._prober = Prober(node.settings.name, way, node.heartbeat_now)

    def idle(self) -> bool:
        """Whether no flow has work."""
        return all(flow.idle for flow in self.flows.values())

    def _echo_bus(self, topic: str) -> Bus:
        """The bus for answers: as for results, the site of this edge."""
        return self.node.bus.beside(topic, self.stage.topic) if topic == topics.RESULTS else self.node.bus

    def links(self) -> list[LinkMeasurement]:
        """Latency and throughput of an edge's link to the cloud."""
        found = {} if self._prober is None else self._prober.latencies()
        return [measurement(2, self.node.settings.name, one, self.stage.throughput) for one in found.values()]

    async def run(self) -> None:
        """Serve until cancelled."""
        name = self.node.settings.name
        member = await self.node.bus.join(
            [self.stage.topic], group=self.stage.group_id, on_assigned=self._assigned, on_revoked=self._revoked
        )
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(self._receive(member), name=f"{name}: receive")
                group.create_task(self._commit(member), name=f"{name}: commit")
                group.create_task(self._sweep(), name=f"{name}: sweep")
                self._aim()
                if self._prober is not None:
                    group.create_task(self._prober.run(self.node.incarnation), name=f"{name}: probes")
                if self.node.settings.rehearses:
                    await self._prepare_results()
                self.node.serving.set()
        finally:
            self._group = None
            with contextlib.suppress(BusError, TimeoutError):
                await member.commit(self.offsets.committable())
            await member.close()

    async def _prepare_results(self) -> None:
        """Connect to where results go, so that the first one does not wait for it; retried by the first result."""
        with contextlib.suppress(BusError, TimeoutError):
            async with asyncio.timeout(PREPARED_S):
                await self._echo_bus(topics.RESULTS).prepare_topic(topics.RESULTS)

    async def drain(self) -> None:
        """Return when all flows have ended, except sessions: the planner moves them, or another cloud stage takes over."""
        while any(not flow.closed and flow.plan.session is None for flow in self.flows.values()):
            await asyncio.sleep(0.05)

    def on_decision(self, decision: Decision, fenced: Iterable[str]) -> None:
        """Stop flows that the decision ended or replanned, and process buffered frames that it placed."""
        gone = frozenset(fenced)
        fences = self.node.fences
        if any(isinstance(change, NodeJoined | NodeLost) for change in decision.changes):
            self._aim()
        for key in [key for key in self.flows if key[0] in gone and fences.fenced(*key)]:
            self.flows.pop(key).stop(discard=True)
        # Plans of other regions are accepted without a decision, except under a task name of this region.
        for change in decision.changes:
            if not isinstance(change, Placed | Rerouted):
                continue
            key = (change.task_id, change.attempt)
            if self.stage.serves(change.placement) and (placed := fences.placed(change.task_id)) is not None:
                self._prepare_ahead(placed)
            if key in self.flows and self.flows[key].plan.region != decision.region:
                self.flows.pop(key).stop(discard=True)
        for key in list(self._orphans):
            task_id, attempt = key
            if fences.fenced(task_id, attempt):
                for orphan in self._take_orphans(key):
                    orphan.receipt.release()
            elif fences.attempt(task_id) == attempt and fences.placed(task_id) is not None:
                self._process_buffered(key)

    def _aim(self) -> None:
        """Probe the cloud while the region has a cloud node."""
        if self._prober is not None:
            self._prober.aim([CLOUD] if self.node.fences.names(Role.CLOUD) else [])

    def _prepare_ahead(self, placed: Placed) -> None:
        profile = next((p for p in self.node.runner.profiles() if p.model == placed.model), None)
        if profile is not None:
            for segment in segments_of(self.stage, placed.placement, profile.layers):
                self.node.prepare_ahead(placed, segment.first, segment.last)

    @property
    def held_bytes(self) -> int:
        """Bytes of task data buffered on this stage."""
        return self._orphan_bytes + sum(flow.held_bytes for flow in self.flows.values() if not flow.closed)

    @property
    def buffered(self) -> list[tuple[str, int]]:
        """Task and attempt of the frames that wait for their plan or decision."""
        return sorted(self._orphans)

    @property
    def open_records(self) -> int:
        """Number of records whose offsets cannot be committed yet."""
        return self.offsets.open_records

    @property
    def bound_bytes(self) -> int:
        """Upper limit of `held_bytes`: the limits of all open flows plus the orphan buffer."""
        return ORPHAN_BYTES + sum(flow.bound_bytes for flow in self.flows.values() if not flow.closed)

    def on_lost(self) -> None:
        """Stop fenced flows, because their decisions may have been missed; the other flows go on."""
        for key in [key for key in self.flows if self.node.fences.fenced(*key)]:
            self.flows.pop(key).stop(discard=True)

    # --- receiving ---------------------------------------------------------------------------------------------------

    async def _assigned(self, partitions: frozenset[TopicPartition]) -> None:
        self.node.receives(bool(partitions))  # empty: other members have all partitions

    async def _revoked(self, partitions: frozenset[TopicPartition]) -> None:
        """Stop the flows of revoked partitions; another member receives their uncommitted records."""
        stopped = []
        for key, flow in list(self.flows.items()):
            if flow.partitions & partitions:
                del self.flows[key]
                flow.stop(discard=False)
                stopped.append(flow.task)
        for key, orphans in list(self._orphans.items()):
            for orphan in self._take_orphans(key) if _partition(orphans[0].record) in partitions else ():
                orphan.receipt.release()
        self.offsets.forget(partitions)
        # Wait until they have stopped, because the frames may be delivered again right after this.
        await asyncio.gather(*(task for task in stopped if task is not None), return_exceptions=True)

    async def _receive(self, member: Member) -> None:
        while True:
            try:
                records = await member.fetch()
            except BusError as error:
                self.node.log.warning("activations not read; retrying", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            poison: list[tuple[Record, ProtocolError, str, int, Receipt]] = []
            for record in records:
                receipt = self.offsets.open(record)
                task_id, attempt = record.key or "", 0
                try:
                    sender = self.authorization.of(record)
                    attempt = self._attempt_to_fail(sender, task_id, self.node.fences.attempt(task_id))
                    frame = decode_frame(record.value)
                    if frame.kind in PROBING:
                        attempt = 0  # a probe belongs to no task
                    else:
                        task_id, attempt = frame.task_id, self._attempt_to_fail(sender, frame.task_id, frame.attempt)
                    self._dispatch(record, frame, receipt, sender)
                except ProtocolError as error:
                    poison.append((record, error, task_id, attempt, receipt))
                else:
                    receipt.release()
            for record, fault, task_id, attempt, receipt in poison:
                await self._dead_letter(record, fault, task_id, attempt)
                receipt.release()

    async def _commit(self, member: Member) -> None:
        while True:
            await asyncio.sleep(COMMIT_S)
            ready = self.offsets.committable()
            if not ready:
                continue
            try:
                await member.commit(ready)
                self.offsets.committed(ready)
            except (BusError, TimeoutError) as error:
                self.node.log.warning("offsets not committed; retrying", error=str(error))

    async def _sweep(self) -> None:
        """Drop flows and buffered frames of unknown tasks, which would hold slots, memory and offsets forever."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = asyncio.get_running_loop().time()
            for (task_id, attempt), flow in list(self.flows.items()):
                ours = flow.plan.region == self.node.settings.region
                silent_s = now - flow.active_s
                if task_id not in self.node.fences.tasks and silent_s > (UNKNOWN_TASK_S if ours else OTHER_REGION_S):
                    del self.flows[task_id, attempt]
                    flow.stop(discard=True)
                    self.node.status.count("strangers")
            for key, orphans in list(self._orphans.items()):
                if now - orphans[0].since_s > UNKNOWN_TASK_S:
                    self._reject(self._take_orphans(key), _unplanned(orphans[0].frame))

    def _dispatch(self, record: Record, frame: Frame, receipt: Receipt, sender: Speaker | None) -> None:
        """Pass a frame's pieces to its flow. Raises `ProtocolError` where the frame is unusable."""
        if frame.kind in PROBING:
            self._take_probe(frame, sender)
            return
        key = (frame.task_id, frame.attempt)
        followed = self.flows[key].plan if key in self.flows else frame.plan
        usable = self.authorization.usable(sender, frame, followed)
        if frame.kind != "activations":
            raise ProtocolError("undecodable", f"a frame of kind {frame.kind} is not for {record.topic}")
        if self.node.fences.fenced(*key):
            self.node.status.count("fenced_frames")
            return
        if frame.plan is not None and (frame.plan.task_id, frame.plan.attempt, frame.plan.number) != (
            *key,
            frame.revision,
        ):
            raise ProtocolError("wrong_shape", "the plan in the frame is for another task, attempt or revision")
        if usable:
            if key in self.flows and self.flows[key].plan.number != frame.revision:
                if self.flows[key].plan.number > frame.revision:
                    self.node.status.count("fenced_frames")
                    return
                # Samples without a result begin again under the new revision.
                self.flows.pop(key).stop(discard=True)
            if frame.plan is not None:
                self._start_flow(frame.plan)
            elif key not in self.flows:
                placed = self.node.fences.revised(*key, frame.revision)
                if placed is not None:
                    self._start_flow(AttemptPlan.of(placed, region=self.node.settings.region, todo=placed.samples))
            if key in self.flows:
                self.flows[key].take_frame(record, frame, receipt)
                return
        size_bytes = len(record.value or b"")
        if self._orphan_bytes + size_bytes > ORPHAN_BYTES:
            raise _unplanned(frame)
        receipt.hold()
        since_s = asyncio.get_running_loop().time()
        self._orphans.setdefault(key, []).append(_Orphan(record, frame, receipt, sender, since_s))
        self._orphan_bytes += size_bytes

    def _take_probe(self, frame: Frame, sender: Speaker | None) -> None:
        """Answer a probe, or take the answer to one. Raises `ProtocolError` where the frame is unusable."""
        self.authorization.check_probe(sender, frame)
        if frame.kind == "probe" and self._group is not None:
            self._echoes.answer(frame, self._group)
        elif frame.kind == "echo" and self._prober is not None:
            self._prober.take(frame, CLOUD)

    def _start_flow(self, plan: AttemptPlan) -> None:
        """Start the flow of a plan and pass it the frames that arrived before the plan.

        Raises `ProtocolError` where this stage cannot follow the plan.
        """
        key = (plan.task_id, plan.attempt)
        if key in self.flows or self._group is None:
            return
        flow = self._make_flow(self, plan)
        self.flows[key] = flow
        flow.task = self._group.create_task(
            flow.run(), name=f"{self.node.settings.name}: {plan.task_id}/{plan.attempt}"
        )
        self._process_buffered(key)

    def _process_buffered(self, key: tuple[str, int]) -> None:
        """Process a task's buffered frames after its plan or decision has arrived."""
        for orphan in self._take_orphans(key):
            try:
                self._dispatch(orphan.record, orphan.frame, orphan.receipt, orphan.sender)
            except ProtocolError as error:
                self._reject([orphan], error)
            else:
                orphan.receipt.release()

    def _take_orphans(self, key: tuple[str, int]) -> list[_Orphan]:
        orphans = self._orphans.pop(key, [])
        self._orphan_bytes -= sum(len(orphan.record.value or b"") for orphan in orphans)
        return orphans

    def _reject(self, orphans: list[_Orphan], error: ProtocolError) -> None:
        """Dead-letter buffered frames."""

        async def dead_letter_all() -> None:
            for orphan in orphans:
                task_id = orphan.frame.task_id
                attempt = self._attempt_to_fail(orphan.sender, task_id, orphan.frame.attempt)
                await self._dead_letter(orphan.record, error, task_id, attempt)
                orphan.receipt.release()

        if self._group is not None:
            self._group.create_task(dead_letter_all(), name=f"{self.node.settings.name}: dead letters")

    async def _dead_letter(self, record: Record, error: ProtocolError, task_id: str, attempt: int) -> None:
        """Dead-letter a record; fail the attempt that it belongs to, if that is live."""
        await self.node.dead_letter(record, error, task_id=task_id)
        if attempt and error.cause != WRONG_IDENTITY and not self.node.fences.fenced(task_id, attempt):
            flow = self.flows.get((task_id, attempt))
            if flow is not None:
                flow.stop(discard=True)
            placed = self.node.fences.placed(task_id)
            session = placed is not None and placed.session is not None
            with contextlib.suppress(ValidationError):  # the key is not a valid task name
                retryable = session and error.cause in IN_TRANSIT
                await self.fail(task_id, attempt, error.cause, str(error), retryable=retryable)

    def _attempt_to_fail(self, sender: Speaker | None, task_id: str, attempt: int) -> int:
        """The attempt to fail for a broken frame; 0 where its sender is unauthorized."""
        return attempt if self.authorization.may_send(sender, task_id) else 0

    async def fail(self, task_id: str, attempt: int, cause: str, detail: str, *, retryable: bool = False) -> None:
        """Report to the planner that this stage cannot continue the attempt."""
        message = TaskFailed(
            task_id=task_id,
            attempt=attempt,
            node=self.node.settings.name,
            cause=cause,
            detail=detail[:2000],
            retryable=retryable,
        )
        await self.node.publish(topics.EVENTS, message, task_id)


def _unplanned(frame: Frame) -> ProtocolError:
    """The error for a frame that was buffered too long or exceeds the buffer limit."""
    if frame.plan is None:
        return ProtocolError("no_plan", f"task {frame.task_id} attempt {frame.attempt}: no frame brought a plan")
    return ProtocolError(
        "undecided", f"task {frame.task_id} attempt {frame.attempt}: no decision of the planner has arrived"
    )


def _partition(record: Record) -> TopicPartition:
    return (record.topic, record.partition)
