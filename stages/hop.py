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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from pydantic import ValidationError

from bus import topics
from bus.errors import BusError, DeeparError, ProtocolError
from bus.frames import MAX_SAMPLE_BYTES, Frame, Plan, decode_frame, encode_frame
from bus.messages import Decision, TaskFailed
from bus.port import Bus, Member, Record, TopicPartition
from bus.tensors import Array, Assembler, Piece
from bus.tracing import parent_in
from bus.values import Role
from stages.node import RETRY_S, Node, cause_of
from stages.offsets import OffsetLedger, Receipt
from stages.outlet import Outgoing, Outlet, sending
from stages.runner import Station
from stages.shaper import Grant, Link
from stages.window import MAX_WINDOW, window_samples

COMMIT_S = 0.25
"""Offsets are committed this often; what a crash repeats is bounded by it."""

ORPHAN_BYTES = 64 << 20
"""So much of tasks whose plan has not been seen yet is kept; what comes beyond is a dead letter."""

STRANGER_S = 30.0
"""What is silent for so long and belongs to no task that the region knows is let go of."""

FOREIGN_S = 600.0
"""The same for a task of another region, whose decisions this cloud stage does not read."""

SWEEP_S = 5.0


@dataclass(slots=True)
class _Orphan:
    """A record whose task's plan has not been seen yet."""

    record: Record
    frame: Frame
    receipt: Receipt
    since_s: float


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
        self._orphans: dict[tuple[str, int], list[_Orphan]] = {}
        self._orphan_bytes = 0
        self._group: asyncio.TaskGroup | None = None

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
                group.create_task(self._sweep(), name=f"{name}: sweep")
                self.node.serving.set()
        finally:
            self._group = None
            with contextlib.suppress(BusError, TimeoutError):
                await member.commit(self.offsets.committable())
            await member.close()

    async def drain(self) -> None:
        """Return when the flows here have ended."""
        while any(not flow.closed for flow in self.flows.values()):
            await asyncio.sleep(0.05)

    def on_decision(self, decision: Decision, fenced: Iterable[str]) -> None:
        """Let go of what was ended or planned again; give plans to frames that waited for one."""
        gone = frozenset(fenced)
        fences = self.node.fences
        for key in [key for key in self.flows if key[0] in gone and fences.fenced(*key)]:
            self.flows.pop(key).stop(discard=True)
        for key in list(self._orphans):
            task_id, attempt = key
            if fences.fenced(task_id, attempt):
                for orphan in self._take_orphans(key):
                    orphan.receipt.release()
            elif (placed := fences.placed.get(task_id)) is not None and placed.attempt == attempt:
                try:
                    self._adopt(Plan.of(placed, region=decision.region, todo=placed.samples))
                except ProtocolError as error:
                    self._refuse(self._take_orphans(key), error)

    @property
    def held_bytes(self) -> int:
        """What is buffered here of tasks' data."""
        return self._orphan_bytes + sum(flow.held_bytes for flow in self.flows.values() if not flow.closed)

    @property
    def open_records(self) -> int:
        """Records that are not done with: their offsets are held."""
        return self.offsets.open_records

    @property
    def bound_bytes(self) -> int:
        """What `held_bytes` never exceeds: each task's window, once as frames and once as whole samples, and orphans."""
        return ORPHAN_BYTES + sum(flow.bound_bytes for flow in self.flows.values() if not flow.closed)

    def on_lost(self) -> None:
        """Nothing more: what was planned again is fenced, and what another cloud stage could do as well goes on here."""

    # --- receiving ---------------------------------------------------------------------------------------------------

    async def _assigned(self, partitions: frozenset[TopicPartition]) -> None:
        self.node.status.receiving = True

    async def _revoked(self, partitions: frozenset[TopicPartition]) -> None:
        """Another member gets these, and with them every record that was not committed."""
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
        # Only when they have let go may the frames come again, to them or to others.
        await asyncio.gather(*(task for task in stopped if task is not None), return_exceptions=True)

    async def _receive(self, member: Member) -> None:
        while True:
            try:
                records = await member.fetch()
            except BusError as error:
                self.node.log.warning("cannot read activations, trying again", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            poison: list[tuple[Record, ProtocolError, str, int, Receipt]] = []
            for record in records:
                receipt = self.offsets.open(record)
                task_id = record.key or ""
                attempt = self.node.fences.attempt(task_id)
                try:
                    frame = decode_frame(record.value)
                    task_id, attempt = frame.task_id, frame.attempt
                    self._take(record, frame, receipt)
                except ProtocolError as error:
                    poison.append((record, error, task_id, attempt, receipt))
                else:
                    receipt.release()
            for record, fault, task_id, attempt, receipt in poison:
                await self._bury(record, fault, task_id, attempt)
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

    async def _sweep(self) -> None:
        """Let go of what belongs to no task that anybody knows: it would hold a slot, memory and offsets for ever."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = asyncio.get_running_loop().time()
            for (task_id, attempt), flow in list(self.flows.items()):
                ours = flow.plan.region == self.node.settings.region
                silent_s = now - flow.heard_s
                if task_id not in self.node.fences.tasks and silent_s > (STRANGER_S if ours else FOREIGN_S):
                    del self.flows[task_id, attempt]
                    flow.stop(discard=True)
                    self.node.status.count("strangers")
            for key, orphans in list(self._orphans.items()):
                if now - orphans[-1].since_s <= STRANGER_S:
                    continue
                self._refuse(
                    self._take_orphans(key),
                    ProtocolError("no_plan", f"task {key[0]} attempt {key[1]} came without a plan"),
                )

    def _take(self, record: Record, frame: Frame, receipt: Receipt) -> None:
        """Hand a frame's pieces to its flow. Raises `ProtocolError` where it cannot be used."""
        if frame.kind != "activations":
            raise ProtocolError("undecodable", f"a frame of kind {frame.kind} is not for {record.topic}")
        key = (frame.task_id, frame.attempt)
        if self.node.fences.fenced(*key):
            self.node.status.count("fenced_frames")
            return
        if frame.plan is not None:
            if (frame.plan.task_id, frame.plan.attempt) != key:
                raise ProtocolError("wrong_shape", "the plan is another task's")
            self._adopt(frame.plan)
        elif key not in self.flows:
            placed = self.node.fences.placed.get(frame.task_id)
            if placed is not None and placed.attempt == frame.attempt:
                self._adopt(Plan.of(placed, region=self.node.settings.region, todo=placed.samples))
        if key in self.flows:
            self.flows[key].take_frame(record, frame, receipt)
            return
        size_bytes = len(record.value or b"")
        if self._orphan_bytes + size_bytes > ORPHAN_BYTES:
            raise ProtocolError("no_plan", f"task {frame.task_id} attempt {frame.attempt} came without a plan")
        receipt.hold()
        since_s = asyncio.get_running_loop().time()
        self._orphans.setdefault(key, []).append(_Orphan(record, frame, receipt, since_s))
        self._orphan_bytes += size_bytes

    def _adopt(self, plan: Plan) -> None:
        """Open the flow of a plan, and give it the frames that came before the plan.

        Raises `ProtocolError` for a plan that cannot be followed here.
        """
        key = (plan.task_id, plan.attempt)
        if key in self.flows or self._group is None:
            return
        flow = Flow(self, plan)
        self.flows[key] = flow
        flow.task = self._group.create_task(
            flow.run(), name=f"{self.node.settings.name}: {plan.task_id}/{plan.attempt}"
        )
        for orphan in self._take_orphans(key):
            try:
                flow.take_frame(orphan.record, orphan.frame, orphan.receipt)
            except ProtocolError as error:
                self._refuse([orphan], error)
            else:
                orphan.receipt.release()

    def _take_orphans(self, key: tuple[str, int]) -> list[_Orphan]:
        orphans = self._orphans.pop(key, [])
        self._orphan_bytes -= sum(len(orphan.record.value or b"") for orphan in orphans)
        return orphans

    def _refuse(self, orphans: list[_Orphan], error: ProtocolError) -> None:
        """Dead-letter frames that were put by."""

        async def bury() -> None:
            for orphan in orphans:
                await self._bury(orphan.record, error, orphan.frame.task_id, orphan.frame.attempt)
                orphan.receipt.release()

        if self._group is not None:
            self._group.create_task(bury(), name=f"{self.node.settings.name}: dead letters")

    async def _bury(self, record: Record, error: ProtocolError, task_id: str, attempt: int) -> None:
        """Dead-letter a record; where it names a live task, that task fails with the cause."""
        await self.node.bury(record, error, task_id=task_id)
        if attempt and not self.node.fences.fenced(task_id, attempt):
            flow = self.flows.get((task_id, attempt))
            if flow is not None:
                flow.stop(discard=True)
            with contextlib.suppress(ValidationError):  # a name that no task can have
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
    """One attempt of one task at this stage.

    It stays among the hop's flows, closed, until its task is over or the attempt is fenced: what still comes of it is
    dropped then, instead of being worked on again.
    """

    def __init__(self, hop: Hop, plan: Plan) -> None:
        placement = plan.placement
        self.hop = hop
        self.plan = plan
        self.partitions: set[TopicPartition] = set()  # where its frames came from
        self.task: asyncio.Task[None] | None = None
        self.closed = False
        self.heard_s = asyncio.get_running_loop().time()  # when it last took or finished something
        self.computes = placement.uses_slot if hop.is_edge else True
        self.first, self.last = (placement.cut1, placement.cut2) if hop.is_edge else (placement.cut2, 0)
        self.busy_s = 0.0
        self.parent_id: str | None = None  # the span that this stage's work follows from, where its frames name one
        self._began_s: float | None = None  # when it first computed here
        self._free_s = float("-inf")  # when it last did
        self.window = MAX_WINDOW  # samples that its device may have under way
        self._widest_bytes = MAX_SAMPLE_BYTES  # of a sample here; these two are less where the model is known
        self._expected_bytes: int | None = None
        self._check()
        self._sending: Outlet | None = None
        self._assembler = Assembler()
        self._ready: deque[tuple[int, list[Array], float]] = deque()
        self._arrived = asyncio.Event()
        self._receipts: dict[int, list[Receipt]] = {}  # of samples that are not acknowledged downstream yet
        self._whole: set[int] = set()  # of those, the samples that have all their pieces
        self._done: set[int] = set()
        self._finished = asyncio.Event()

    def _check(self) -> None:
        """Whether the plan can be followed here. Raises `ProtocolError`."""
        plan, placement = self.plan, self.plan.placement
        if placement.edge is None or not placement.link1_bps or (placement.uses_cloud and not placement.link2_bps):
            raise ProtocolError("wrong_shape", f"task {plan.task_id}: a plan without an edge, or without rates")
        if not self.hop.is_edge and not placement.uses_cloud:
            raise ProtocolError("wrong_shape", f"task {plan.task_id}: a plan without the cloud")
        profile = next((p for p in self.hop.node.runner.profiles() if p.model == plan.model), None)
        if profile is None:
            if self.computes:
                raise ProtocolError("unknown_model", f"task {plan.task_id}: there is no model {plan.model!r} here")
            return
        if self.computes and profile.sha256 != plan.sha256:
            raise ProtocolError("unknown_model", f"task {plan.task_id}: {plan.model} is another one here")
        if placement.cut2 > profile.layers:
            raise ProtocolError("wrong_shape", f"task {plan.task_id}: {plan.model} has {profile.layers} layers")
        if not self.hop.is_edge:
            self.last = profile.layers
        if profile.sha256 == plan.sha256:
            self.window = window_samples(plan.execution, profile.cut_bytes)
            self._widest_bytes = max(plan.input_bytes or 0, *profile.cut_bytes[self.first : self.last + 1])
            cut_bytes = profile.cut_bytes[self.first]
            self._expected_bytes = plan.input_bytes if self.first == 0 and plan.input_bytes is not None else cut_bytes

    @property
    def under_way(self) -> int:
        """Samples of which something is here that is not acknowledged downstream."""
        return len(self._whole) + self._assembler.pending

    @property
    def held_bytes(self) -> int:
        """Data of those samples."""
        waiting = sum(array.nbytes for _, tensors, _ in self._ready for array in tensors)
        return self._assembler.pending_bytes + waiting + (self._sending.held_bytes if self._sending else 0)

    @property
    def bound_bytes(self) -> int:
        """What `held_bytes` never exceeds: the window at the wider end of this stage, twice."""
        return 2 * self.window * self._widest_bytes

    # --- in ----------------------------------------------------------------------------------------------------------

    def take_frame(self, record: Record, frame: Frame, receipt: Receipt) -> None:
        """The pieces of a frame. Raises `ProtocolError` for one that cannot be used."""
        self.partitions.add(_partition(record))
        self.heard_s = asyncio.get_running_loop().time()
        if record.headers and self.parent_id is None:
            self.parent_id = parent_in(record.headers, self.plan.task_id)
        for piece in frame.pieces:
            self._take(piece, receipt)

    def _take(self, piece: Piece, receipt: Receipt) -> None:
        sample = piece.sample
        if self.closed or sample in self._done:
            self.hop.node.status.count("duplicates_suppressed")
            return
        if sample in self._whole:
            # Under way already; yet this record, too, is done only when the sample is.
            self.hop.node.status.count("duplicates_suppressed")
            receipt.hold()
            self._receipts[sample].append(receipt)
            return
        if self._expected_bytes is not None and piece.size_bytes != self._expected_bytes:
            raise ProtocolError(
                "wrong_shape",
                f"sample {sample} of {self.plan.model} at {self.first}: {piece.size_bytes:,} bytes, "
                f"it takes {self._expected_bytes:,}",
            )
        try:
            whole = self._assembler.add(piece)
        except ProtocolError as error:
            if error.cause != "missing_chunk":
                raise
            self.hop.node.status.count("gaps")  # its sender begins the sample again
            return
        receipt.hold()
        self._receipts.setdefault(sample, []).append(receipt)
        if whole is not None:
            self._whole.add(sample)
            self._ready.append((sample, whole, self.heard_s))
            self._arrived.set()

    # --- through -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Wait for a slot, work through the samples, report; ends when all are done, or when stopped."""
        node = self.hop.node
        try:
            await self._serve()
            self.closed = True
        except Exception as error:
            # A model that breaks in its runtime must not take the other tasks of this stage down.
            cause = cause_of(error)
            node.log.error("a task cannot go on here", task=self.plan.task_id, cause=cause, error=str(error))
            if not isinstance(error, DeeparError):
                node.log.exception("a task broke here", task=self.plan.task_id)
            self._let_go()
            await self.hop.fail(self.plan.task_id, self.plan.attempt, cause, f"{type(error).__name__}: {error}")

    async def _serve(self) -> None:
        runner = self.hop.node.runner
        async with contextlib.AsyncExitStack() as stack:
            station: Station | None = None
            if self.computes:
                await runner.prepare(self.plan, self.first, self.last)
                if self.hop.slots is not None:
                    await stack.enter_async_context(self.hop.slots)
                station = runner.station(self.plan, self.first, self.last)
                stack.callback(station.close)
            outlet = self._sending = self._outlet()
            stack.callback(self._told, outlet)
            async with sending(outlet):
                await self._work(station, outlet)
            await self._report(outlet.busy_s)

    async def _work(self, station: Station | None, outlet: Outlet) -> None:
        clock = asyncio.get_running_loop().time
        for _ in range(self.plan.todo):
            while not self._ready:
                self._arrived.clear()
                await self._arrived.wait()
            sample, tensors, ready_s = self._ready.popleft()
            if station is not None:
                tensors = await station.run(sample, tensors, ready_s)
                now = clock()
                begin_s = max(ready_s, self._free_s)
                if self._began_s is None:
                    self._began_s = begin_s
                self.busy_s += now - begin_s
                self.hop.node.busy("edge_s" if self.hop.is_edge else "cloud_s", self.plan.task_id, begin_s, now)
                self._free_s = now
                ready_s = now
            outlet.put(Outgoing(sample, tensors, ready_s))
        await self._finished.wait()

    def _told(self, outlet: Outlet) -> None:
        """What was done here, for traces."""
        node, part = self.hop.node, "edge" if self.hop.is_edge else "cloud"
        if self.computes:
            node.span(part, self.plan, self._began_s, self._free_s, self.busy_s, self.parent_id)
        follows = None if self.computes else self.parent_id
        node.span(self._way, self.plan, outlet.began_s, outlet.busy_until_s, outlet.busy_s, follows)

    @property
    def _way(self) -> str:
        """The part that sending on from here is."""
        return "link2" if self.hop.is_edge and self.plan.placement.uses_cloud else "result"

    def _outlet(self) -> Outlet:
        hop, plan = self.hop, self.plan
        placement = plan.placement
        onward = self._way == "link2"
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
            hop.node.bus if onward else self._way_back(),
            topic=topic,
            key=key,
            source=hop.node.settings.name,
            kind="activations" if onward else "result",
            plan=plan,
            grants=grants,
            gate=hop.node.gate,
            on_busy=partial(hop.node.busy, f"{self._way}_s", plan.task_id),
            on_acknowledged=self._acknowledged,
            headers=hop.node.trace_header(self._way, plan),
        )

    def _way_back(self) -> Bus:
        """Where results go: to the site of the edge that the task goes through, as the reservations do."""
        assert self.plan.placement.edge is not None  # `_check`
        return self.hop.node.bus.beside(topics.RESULTS, topics.activations_topic(self.plan.placement.edge))

    # --- done --------------------------------------------------------------------------------------------------------

    def _acknowledged(self, samples: Sequence[int]) -> None:
        """The bus holds what came of these samples; only now may their records be committed."""
        self.heard_s = asyncio.get_running_loop().time()
        self._done.update(samples)
        self._whole.difference_update(samples)
        for sample in samples:
            for receipt in self._receipts.pop(sample, ()):
                receipt.release()
        if len(self._done) >= self.plan.todo:
            self._finished.set()

    async def _report(self, sending_s: float) -> None:
        """Tell the device what this stage measured; unshaped, since it is no part of the task's data."""
        plan, node = self.plan, self.hop.node
        busy = {f"{self._way}_s": sending_s}
        if self.computes:
            busy["edge_s" if self.hop.is_edge else "cloud_s"] = self.busy_s
        frame = Frame("report", plan.task_id, plan.attempt, node.settings.name, report=busy)
        try:
            await self._way_back().send(topics.RESULTS, encode_frame(frame), key=plan.device)
        except BusError as error:
            node.log.warning("a report was not sent", task=plan.task_id, error=str(error))

    def stop(self, *, discard: bool) -> None:
        """End it. `discard`: nobody wants its frames any more; else another member will get them."""
        if self.task is not None:
            self.task.cancel()
        if discard:
            self._let_go()
        self.closed = True

    def _let_go(self) -> None:
        """Nothing that was taken will be asked for again."""
        self.closed = True
        for receipts in self._receipts.values():
            for receipt in receipts:
                receipt.release()
        self._receipts.clear()
        self._ready.clear()


def _partition(record: Record) -> TopicPartition:
    return (record.topic, record.partition)
