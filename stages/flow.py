"""One attempt at one task on an edge or cloud stage.

A flow receives samples, computes its layers, and sends the outputs on. It holds the record of a frame until the bus has
acknowledged all outputs made from it; then the hop may commit the record's offset.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from bus import topics
from bus.errors import BusError, DeeparError, InvariantError, ProtocolError
from bus.frames import MAX_SAMPLE_BYTES, Frame, Plan, encode_frame
from bus.port import Bus, Record, TopicPartition
from bus.tensors import Array, Assembler, Piece
from bus.tracing import parent_in
from stages.frame_sender import FrameSender, Outgoing, sending
from stages.node import Node, cause_of, detail_of
from stages.offsets import Receipt
from stages.runner import Station
from stages.shaper import Grant, Link
from stages.window import MAX_WINDOW, window_samples


class Stage(Protocol):
    """What a flow needs of the edge or cloud stage that it runs on."""

    node: Node
    is_edge: bool
    link2: Link
    results: Link
    slots: asyncio.Semaphore | None

    async def fail(self, task_id: str, attempt: int, cause: str, detail: str, *, retryable: bool = False) -> None:
        """Report to the planner that the attempt failed."""


class Flow:
    """One attempt at one task on this stage.

    A finished flow stays in the hop's table, closed, until its task ends or its attempt is fenced, so that late
    duplicates are dropped instead of computed again.
    """

    def __init__(self, stage: Stage, plan: Plan) -> None:
        placement = plan.placement
        self.stage = stage
        self.plan = plan
        self.partitions: set[TopicPartition] = set()  # partitions that its frames came from
        self.task: asyncio.Task[None] | None = None
        self.closed = False
        self.heard_s = asyncio.get_running_loop().time()  # last time a frame arrived or a sample was acknowledged
        self.computes = placement.uses_slot if stage.is_edge else True
        self.first, self.last = (placement.cut1, placement.cut2) if stage.is_edge else (placement.cut2, 0)
        self.busy_s = 0.0
        self.parent_id: str | None = None  # parent trace span, where the frames name one
        self._began_s: float | None = None  # start of the first computation on this stage
        self._free_s = float("-inf")  # end of the last one
        self.window = MAX_WINDOW  # samples that its device may have in the pipeline
        self._widest_bytes = (
            MAX_SAMPLE_BYTES  # upper limit for one sample; `_check` lowers both limits where the model is known
        )
        self._expected_bytes: int | None = None
        self._check()
        self._sending: FrameSender | None = None
        self._assembler = Assembler()
        self._ready: deque[tuple[int, list[Array], float]] = deque()
        self._arrived = asyncio.Event()
        self._receipts: dict[int, list[Receipt]] = {}  # by sample, until acknowledged downstream
        self._whole: set[int] = set()  # complete samples not yet acknowledged downstream
        self._done: set[int] = set()
        self._finished = asyncio.Event()

    def _check(self) -> None:
        """Check that this stage can follow the plan. Raises `ProtocolError`."""
        plan, placement = self.plan, self.plan.placement
        if placement.edge is None or not placement.link1_bps or (placement.uses_cloud and not placement.link2_bps):
            raise ProtocolError("wrong_shape", f"task {plan.task_id}: the plan lacks an edge or a link rate")
        if not self.stage.is_edge and not placement.uses_cloud:
            raise ProtocolError("wrong_shape", f"task {plan.task_id}: the plan does not use the cloud")
        profile = next((p for p in self.stage.node.runner.profiles() if p.model == plan.model), None)
        if profile is None:
            if self.computes:
                raise ProtocolError("unknown_model", f"task {plan.task_id}: this stage has no model {plan.model!r}")
            return
        if self.computes and profile.sha256 != plan.sha256:
            raise ProtocolError("unknown_model", f"task {plan.task_id}: SHA-256 of {plan.model} differs from the plan")
        if placement.cut2 > profile.layers:
            raise ProtocolError("wrong_shape", f"task {plan.task_id}: {plan.model} has {profile.layers} layers")
        if not self.stage.is_edge:
            self.last = profile.layers
        if profile.sha256 == plan.sha256:
            self.window = window_samples(plan.execution, profile.cut_bytes)
            self._widest_bytes = max(plan.input_bytes or 0, *profile.cut_bytes[self.first : self.last + 1])
            cut_bytes = profile.cut_bytes[self.first]
            self._expected_bytes = plan.input_bytes if self.first == 0 and plan.input_bytes is not None else cut_bytes

    @property
    def under_way(self) -> int:
        """Number of samples held here and not yet acknowledged downstream."""
        return len(self._whole) + self._assembler.pending

    @property
    def held_bytes(self) -> int:
        """Bytes of data held for those samples."""
        waiting = sum(array.nbytes for _, tensors, _ in self._ready for array in tensors)
        return self._assembler.pending_bytes + waiting + (self._sending.held_bytes if self._sending else 0)

    @property
    def bound_bytes(self) -> int:
        """Upper limit of `held_bytes`: twice the window, at this stage's widest tensor."""
        return 2 * self.window * self._widest_bytes

    # --- in ----------------------------------------------------------------------------------------------------------

    def take_frame(self, record: Record, frame: Frame, receipt: Receipt) -> None:
        """Accept the pieces of a frame. Raises `ProtocolError` where the frame is unusable."""
        self.partitions.add((record.topic, record.partition))
        self.heard_s = asyncio.get_running_loop().time()
        if record.headers and self.parent_id is None:
            self.parent_id = parent_in(record.headers, self.plan.task_id)
        for piece in frame.pieces:
            self._take(piece, receipt)

    def _take(self, piece: Piece, receipt: Receipt) -> None:
        sample = piece.sample
        if self.closed or sample in self._done:
            self.stage.node.status.count("duplicates_suppressed")
            return
        if sample in self._whole:
            # A duplicate of a sample in work: its record, too, is done only when the sample is.
            self.stage.node.status.count("duplicates_suppressed")
            receipt.hold()
            self._receipts[sample].append(receipt)
            return
        if self._expected_bytes is not None and piece.size_bytes != self._expected_bytes:
            raise ProtocolError(
                "wrong_shape",
                f"sample {sample} of {self.plan.model} at {self.first}: {piece.size_bytes:,} bytes, "
                f"expected {self._expected_bytes:,}",
            )
        try:
            whole = self._assembler.add(piece)
        except ProtocolError as error:
            if error.cause != "missing_chunk":
                raise
            self.stage.node.status.count("gaps")  # the sender restarts the sample
            return
        receipt.hold()
        self._receipts.setdefault(sample, []).append(receipt)
        if whole is not None:
            self._whole.add(sample)
            self._ready.append((sample, whole, self.heard_s))
            self._arrived.set()

    # --- through -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Wait for a slot, compute all samples, and report; return when all are acknowledged."""
        node = self.stage.node
        try:
            await self._serve()
            self.closed = True
        except InvariantError:
            raise  # a bug in DeePar that could lose records: end the process
        except Exception as error:
            # A model that fails in its runtime must not stop the other tasks of this stage.
            cause = cause_of(error)
            node.log.error("task failed", task=self.plan.task_id, cause=cause, error=str(error))
            if not isinstance(error, DeeparError):
                node.log.exception("task failed with an unexpected error", task=self.plan.task_id)
            self._let_go()
            await self.stage.fail(self.plan.task_id, self.plan.attempt, cause, detail_of(error))

    async def _serve(self) -> None:
        runner = self.stage.node.runner
        async with contextlib.AsyncExitStack() as stack:
            station: Station | None = None
            if self.computes:
                await runner.prepare(self.plan, self.first, self.last)
                if self.stage.slots is not None:
                    await stack.enter_async_context(self.stage.slots)
                station = runner.station(self.plan, self.first, self.last)
                stack.callback(station.close)
            sender = self._sending = self._frame_sender()
            stack.callback(self._told, sender)
            async with sending(sender):
                await self._work(station, sender)
            await self._report(sender.busy_s)

    async def _work(self, station: Station | None, sender: FrameSender) -> None:
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
                self.stage.node.busy("edge_s" if self.stage.is_edge else "cloud_s", self.plan.task_id, begin_s, now)
                self._free_s = now
                ready_s = now
            sender.put(Outgoing(sample, tensors, ready_s))
        await self._finished.wait()

    def _told(self, sender: FrameSender) -> None:
        """Record the trace spans of this stage."""
        node, part = self.stage.node, "edge" if self.stage.is_edge else "cloud"
        if self.computes:
            node.span(part, self.plan, self._began_s, self._free_s, self.busy_s, self.parent_id)
        follows = None if self.computes else self.parent_id
        node.span(self._way, self.plan, sender.began_s, sender.busy_until_s, sender.busy_s, follows)

    @property
    def _way(self) -> str:
        """Name of the delay part that sending from this stage belongs to."""
        return "link2" if self.stage.is_edge and self.plan.placement.uses_cloud else "result"

    def _frame_sender(self) -> FrameSender:
        stage, plan = self.stage, self.plan
        placement = plan.placement
        onward = self._way == "link2"
        topic = topics.ACTIVATIONS_CLOUD if onward else topics.RESULTS
        key = plan.task_id if onward else plan.device
        grants: tuple[Grant, ...]
        if onward:
            grants = (stage.link2.grant(placement.link2_bps),)
        elif stage.is_edge:
            grants = (stage.results.grant(placement.link1_bps),)
        else:
            grants = (stage.results.grant(placement.link2_bps), stage.results.grant(placement.link1_bps))
        return FrameSender(
            stage.node.bus if onward else self._way_back(),
            topic=topic,
            key=key,
            source=stage.node.settings.name,
            kind="activations" if onward else "result",
            plan=plan,
            grants=grants,
            gate=stage.node.gate,
            on_busy=partial(stage.node.busy, f"{self._way}_s", plan.task_id),
            on_acknowledged=self._acknowledged,
            headers=stage.node.trace_header(self._way, plan),
        )

    def _way_back(self) -> Bus:
        """The bus for results: the site of the task's edge, whose links the planner reserved."""
        assert self.plan.placement.edge is not None  # `_check`
        return self.stage.node.bus.beside(topics.RESULTS, topics.activations_topic(self.plan.placement.edge))

    # --- done --------------------------------------------------------------------------------------------------------

    def _acknowledged(self, samples: Sequence[int]) -> None:
        """The bus holds the outputs of these samples: release their records for commit."""
        self.heard_s = asyncio.get_running_loop().time()
        self._done.update(samples)
        self._whole.difference_update(samples)
        for sample in samples:
            for receipt in self._receipts.pop(sample, ()):
                receipt.release()
        if len(self._done) >= self.plan.todo:
            self._finished.set()

    async def _report(self, sending_s: float) -> None:
        """Send the measured times to the device, unshaped, because a report is not task data."""
        plan, node = self.plan, self.stage.node
        busy = {f"{self._way}_s": sending_s}
        if self.computes:
            busy["edge_s" if self.stage.is_edge else "cloud_s"] = self.busy_s
        frame = Frame("report", plan.task_id, plan.attempt, node.settings.name, report=busy)
        try:
            await self._way_back().send(topics.RESULTS, encode_frame(frame), key=plan.device)
        except BusError as error:
            node.log.warning("report not sent", task=plan.task_id, error=str(error))

    def stop(self, *, discard: bool) -> None:
        """Stop the flow. `discard` releases its records for commit; else another member receives them again."""
        if self.task is not None:
            self.task.cancel()
        if discard:
            self._let_go()
        self.closed = True

    def _let_go(self) -> None:
        """Close the flow, release its records and drop its data."""
        self.closed = True
        for receipts in self._receipts.values():
            for receipt in receipts:
                receipt.release()
        self._receipts.clear()
        self._ready.clear()
