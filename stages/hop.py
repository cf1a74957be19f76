"""What an edge and the cloud do: take activations in, compute their part (or only relay), send them on.

Frames are drained from the topic into per-task flows at once, so no task blocks another at the head of a partition; each
flow waits for its slot (edges), works through its samples in order and sends them out shaped. What is buffered is bounded
by the windows of the tasks that the planner admitted. An offset is committed when everything that came out of its record
is acknowledged downstream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from functools import partial

from bus import topics
from bus.errors import BusError, DeeparError, ProtocolError
from bus.frames import Array, Assembler, Frame, Piece, Plan, decode_frame, encode_frame
from bus.messages import Decision, TaskFailed
from bus.port import Member, Record, TopicPartition
from bus.values import Role
from stages.node import RETRY_S, Node
from stages.offsets import OffsetLedger, Receipt
from stages.outlet import Outgoing, Outlet
from stages.shaper import Grant, Link

COMMIT_S = 0.25
"""Offsets are committed this often; what a crash repeats is bounded by it."""

ORPHANS = 10_000
"""So many frames of tasks whose plan has not been seen yet are kept."""


class Hop:
    """The work of an edge or a cloud stage."""

    def __init__(self, node: Node) -> None:
        settings = node.settings
        self.node = node
        self.is_edge = settings.role is Role.EDGE
        self.link1 = Link(settings.link1_capacity_bps)
        self.link2 = Link(settings.link2_capacity_bps)
        # Results cross the same links the other way; link 2's other end is in the cloud.
        self.results = Link(settings.link1_capacity_bps if self.is_edge else 0)
        self.slots = asyncio.Semaphore(settings.slots) if self.is_edge else None
        self.offsets = OffsetLedger()
        self.flows: dict[tuple[str, int], Flow] = {}
        self._orphans: dict[tuple[str, int], list[tuple[Piece, Receipt]]] = {}
        self._orphaned = 0
        self._group: asyncio.TaskGroup | None = None
        self._draining = False

    async def run(self) -> None:
        """Serve until cancelled."""
        name = self.node.settings.name
        topic = topics.activations_topic(name) if self.is_edge else topics.ACTIVATIONS_CLOUD
        group_id = f"deepar.edge.{name}" if self.is_edge else topics.CLOUD_GROUP
        member = await self.node.bus.join([topic], group=group_id, on_assigned=self._assigned, on_revoked=self._revoked)
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(self._receive(member), name=f"{name}: receive")
                group.create_task(self._commit(member), name=f"{name}: commit")
        finally:
            self._group = None
            with contextlib.suppress(BusError, TimeoutError):
                await member.commit(self.offsets.committable())
            await member.close()

    async def drain(self) -> None:
        """Take nothing new and return when the flows here have ended."""
        self._draining = True
        while self.flows:
            await asyncio.sleep(0.05)

    def on_decision(self, decision: Decision, fenced: Iterable[str]) -> None:
        """Let go of what was ended or planned again; give plans to frames that waited for one."""
        gone = frozenset(fenced)
        for task_id, attempt in [key for key in self.flows if key[0] in gone]:
            if self.node.fences.fenced(task_id, attempt):
                self.flows[task_id, attempt].stop(discard=True)
        for key in list(self._orphans):
            task_id, attempt = key
            if self.node.fences.fenced(task_id, attempt):
                self._drop_orphans(key)
            elif (placed := self.node.fences.placed.get(task_id)) is not None and placed.attempt == attempt:
                self._adopt(Plan.of(placed, region=decision.region, todo=placed.samples))

    def on_lost(self) -> None:
        """Let go of every flow; what was under way is planned again elsewhere."""
        for flow in list(self.flows.values()):
            flow.stop(discard=True)
        for key in list(self._orphans):
            self._drop_orphans(key)

    # --- receiving ---------------------------------------------------------------------------------------------------

    async def _assigned(self, partitions: frozenset[TopicPartition]) -> None:
        self.node.status.receiving = True

    async def _revoked(self, partitions: frozenset[TopicPartition]) -> None:
        """Another member gets these, and with them every record that was not committed."""
        for flow in [flow for flow in self.flows.values() if flow.partition in partitions]:
            flow.stop(discard=False)
        self.offsets.forget(partitions)

    async def _receive(self, member: Member) -> None:
        while True:
            try:
                records = await member.fetch()
            except BusError as error:
                self.node.log.warning("cannot read activations, trying again", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            for record in records:
                receipt = self.offsets.open(record)
                try:
                    self._take(record, decode_frame(record.value), receipt)
                except ProtocolError as error:
                    await self._bury(record, error)
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
                self.node.log.warning("cannot commit, trying again", error=str(error))

    def _take(self, record: Record, frame: Frame, receipt: Receipt) -> None:
        """Hand a frame's pieces to its flow."""
        if frame.kind != "activations":
            raise ProtocolError("undecodable", f"a frame of kind {frame.kind} is not for {record.topic}")
        key = (frame.task_id, frame.attempt)
        if self.node.fences.fenced(*key):
            self.node.status.count("fenced_frames")
            return
        if frame.plan is not None:
            if (frame.plan.task_id, frame.plan.attempt) != key:
                raise ProtocolError("wrong_shape", "the plan is another task's")
            self._adopt(frame.plan, (record.topic, record.partition))
        placed = self.node.fences.placed.get(frame.task_id)
        if key not in self.flows and placed is not None and placed.attempt == frame.attempt:
            plan = Plan.of(placed, region=self.node.settings.region, todo=placed.samples)
            self._adopt(plan, (record.topic, record.partition))
        if key in self.flows:
            for piece in frame.pieces:
                receipt.hold()
                self.flows[key].take(piece, receipt)
            return
        if self._orphaned >= ORPHANS:
            raise ProtocolError("no_plan", f"task {frame.task_id} attempt {frame.attempt} came without a plan")
        for piece in frame.pieces:
            receipt.hold()
            self._orphans.setdefault(key, []).append((piece, receipt))
            self._orphaned += 1

    def _adopt(self, plan: Plan, partition: TopicPartition | None = None) -> None:
        """Open the flow of a plan, and give it the frames that came before the plan."""
        key = (plan.task_id, plan.attempt)
        if key in self.flows or self._group is None:
            return
        flow = Flow(self, plan, partition)
        self.flows[key] = flow
        flow.task = self._group.create_task(
            flow.run(), name=f"{self.node.settings.name}: {plan.task_id}/{plan.attempt}"
        )
        for piece, receipt in self._orphans.pop(key, ()):
            self._orphaned -= 1
            flow.take(piece, receipt)

    def _drop_orphans(self, key: tuple[str, int]) -> None:
        for _, receipt in self._orphans.pop(key):
            self._orphaned -= 1
            receipt.release()

    async def _bury(self, record: Record, error: ProtocolError) -> None:
        """Dead-letter a record; where it names a live task, that task fails with the cause."""
        task_id = record.key or ""
        await self.node.bury(record, error, task_id=task_id)
        if attempt := self.node.fences.attempt(task_id):
            await self.fail(task_id, attempt, error.cause, str(error))

    async def fail(self, task_id: str, attempt: int, cause: str, detail: str, *, retryable: bool = False) -> None:
        """Tell the planner that this stage cannot go on with a task."""
        message = TaskFailed(
            task_id=task_id,
            attempt=attempt,
            node=self.node.settings.name,
            cause=cause,
            detail=detail[:2000],
            retryable=retryable,
        )
        await self.node.tell(topics.EVENTS, message, task_id)


class Flow:
    """One attempt of one task at this stage."""

    def __init__(self, hop: Hop, plan: Plan, partition: TopicPartition | None) -> None:
        self.hop = hop
        self.plan = plan
        self.partition = partition
        self.task: asyncio.Task[None] | None = None
        placement = plan.placement
        self.first, self.last = (placement.cut1, placement.cut2) if hop.is_edge else (placement.cut2, -1)
        self.computes = placement.uses_slot if hop.is_edge else True
        self.busy_s = 0.0
        self._assembler = Assembler()
        self._ready: deque[tuple[int, list[Array], float, list[Receipt]]] = deque()
        self._arrived = asyncio.Event()
        self._receipts: dict[int, list[Receipt]] = {}
        self._done: set[int] = set()
        self._finished = asyncio.Event()
        self._broken: ProtocolError | None = None
        self._discard = False

    # --- in ----------------------------------------------------------------------------------------------------------

    def take(self, piece: Piece, receipt: Receipt) -> None:
        """One piece that arrived; its receipt is held once for it."""
        if piece.sample in self._done or self._broken:
            self.hop.node.status.count("duplicates_suppressed")
            receipt.release()
            return
        try:
            whole = self._assembler.add(piece)
        except ProtocolError as error:
            receipt.release()
            if error.cause != "missing_chunk":  # a gap is filled when its sender sends the sample again
                self._broken = error
                self._arrived.set()
            return
        self._receipts.setdefault(piece.sample, []).append(receipt)
        if whole is not None:
            self._ready.append(
                (piece.sample, whole, asyncio.get_running_loop().time(), self._receipts.pop(piece.sample))
            )
            self._arrived.set()

    # --- through -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Wait for a slot, work through the samples, report; stops when done or fenced."""
        node = self.hop.node
        try:
            await self._serve()
        except DeeparError as error:
            cause = error.cause if isinstance(error, ProtocolError) else type(error).__name__
            node.log.error("a task cannot go on here", task=self.plan.task_id, cause=cause, error=str(error))
            self._discard = True
            await self.hop.fail(self.plan.task_id, self.plan.attempt, cause, str(error))
        except Exception as error:
            # A model that breaks in its runtime must not take the other tasks of this stage down.
            node.log.exception("a task broke here", task=self.plan.task_id)
            self._discard = True
            await self.hop.fail(self.plan.task_id, self.plan.attempt, "stage_error", f"{type(error).__name__}: {error}")
        finally:
            self._release()

    async def _serve(self) -> None:
        runner = self.hop.node.runner
        async with contextlib.AsyncExitStack() as stack:
            if self.computes:
                if self.last < 0:
                    self.last = next(p.layers for p in runner.profiles() if p.model == self.plan.model)
                await runner.prepare(self.plan, self.first, self.last)
                if self.hop.slots is not None:
                    await stack.enter_async_context(self.hop.slots)
                station = runner.station(self.plan, self.first, self.last)
                stack.callback(station.close)
            outlet = self._outlet()
            sending = asyncio.create_task(outlet.run())
            stack.push_async_callback(_cancelled, sending)
            clock = asyncio.get_running_loop().time
            free_s = float("-inf")
            left = self.plan.todo
            while left:
                while not self._ready:
                    if self._broken:
                        raise self._broken
                    self._arrived.clear()
                    await self._arrived.wait()
                sample, tensors, ready_s, receipts = self._ready.popleft()
                if self.computes:
                    tensors = await station.run(sample, tensors, ready_s)
                    now = clock()
                    begin_s = max(ready_s, free_s)
                    self.busy_s += now - begin_s
                    self.hop.node.busy("edge_s" if self.hop.is_edge else "cloud_s", self.plan.task_id, begin_s, now)
                    free_s = now
                    ready_s = now
                left -= 1
                outlet.put(Outgoing(sample, tensors, ready_s, partial(self._acknowledged, sample, receipts)))
            await self._finished.wait()
            await self._report(outlet.busy_s)

    def _outlet(self) -> Outlet:
        hop, plan = self.hop, self.plan
        placement = plan.placement
        assert placement.edge is not None
        onward = hop.is_edge and placement.uses_cloud
        topic = topics.ACTIVATIONS_CLOUD if onward else topics.RESULTS
        key = plan.task_id if onward else plan.device
        grants: tuple[Grant, ...]
        if onward:
            grants = (hop.link2.grant(placement.link2_bps),)
        elif hop.is_edge:
            grants = (hop.results.grant(placement.link1_bps),)
        else:
            grants = (hop.results.grant(placement.link2_bps), hop.results.grant(placement.link1_bps))
        return Outlet(
            hop.node.bus,
            topic=topic,
            key=key,
            source=hop.node.settings.name,
            kind="activations" if onward else "result",
            plan=plan,
            grants=grants,
            gate=hop.node.gate,
            on_busy=partial(hop.node.busy, "link2_s" if onward else "result_s", plan.task_id),
        )

    # --- done --------------------------------------------------------------------------------------------------------

    def _acknowledged(self, sample: int, receipts: list[Receipt]) -> None:
        self._done.add(sample)
        for receipt in receipts:
            receipt.release()
        if len(self._done) >= self.plan.todo:
            self._finished.set()

    async def _report(self, sending_s: float) -> None:
        """Tell the device what this stage measured; unshaped, since it is no part of the task's data."""
        plan, node = self.plan, self.hop.node
        busy = {"link2_s" if self.hop.is_edge and plan.placement.uses_cloud else "result_s": sending_s}
        if self.computes:
            busy["edge_s" if self.hop.is_edge else "cloud_s"] = self.busy_s
        frame = Frame("report", plan.task_id, plan.attempt, node.settings.name, report=busy)
        try:
            await node.bus.send(topics.RESULTS, encode_frame(frame), key=plan.device)
        except BusError as error:
            node.log.warning("a report was not sent", task=plan.task_id, error=str(error))

    def stop(self, *, discard: bool) -> None:
        """Let go. `discard`: the attempt is fenced, nobody wants its frames; else another member will get them."""
        self._discard = discard
        if self.task is not None:
            self.task.cancel()

    def _release(self) -> None:
        self.hop.flows.pop((self.plan.task_id, self.plan.attempt), None)
        if not self._discard:
            return  # what is not committed comes again
        for receipts in [*self._receipts.values(), *(entry[3] for entry in self._ready)]:
            for receipt in receipts:
                receipt.release()
        self._receipts.clear()
        self._ready.clear()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
