"""One attempt at one task on an edge or cloud stage.

A flow receives samples, computes its layers, and sends the outputs on. It holds the record of a frame until the bus has
acknowledged all outputs made from it; then the hop may commit the record's offset.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import NamedTuple, Protocol

from bus import topics
from bus.errors import BusError, DeeparError, InvariantError, ProtocolError
from bus.frames import MAX_SAMPLE_BYTES, SAMPLES, AttemptPlan, Frame, encode_frame
from bus.headers.tracing import parent_in
from bus.port import Bus, Record, TopicPartition
from bus.tensors import Array, Piece
from stages.measuring.clock import exact_clock
from stages.measuring.throughput import LinkThroughput
from stages.network.frame_sender import FrameSender, Outgoing, Route, SenderHooks, sending
from stages.node import Node, cause_of, detail_of
from stages.offsets import Receipt
from stages.runner import Station
from stages.sample_ranges import SampleRanges
from stages.window import MAX_WINDOW, window_of

FIRST_REPORT_S, REPORT_EVERY_S = 0.1, 2.0
"""A session's first report, and the largest interval between two."""


class LayerRange(NamedTuple):
    """The layers of a task's model that a stage computes: first+1..last."""

    first: int
    last: int | None  # None: to the model's last layer
    computes: bool  # False: the stage relays frames without computing


class HopStage(Protocol):
    """What differs between an edge and the cloud."""

    @property
    def part(self) -> str:
        """The part of a task's delay that computing here belongs to."""

    @property
    def topic(self) -> str:
        """The topic of the activations for this stage."""

    @property
    def group_id(self) -> str:
        """The consumer group that reads this topic."""

    def slot(self) -> AbstractAsyncContextManager[None]:
        """What a flow holds while it computes."""

    def layers(self, plan: AttemptPlan) -> LayerRange:
        """The layers that the plan has for this stage. Raises `ProtocolError` where it has none."""

    def route(self, plan: AttemptPlan) -> Route:
        """Where the task's outputs go, with new grants for its links."""

    @property
    def throughput(self) -> LinkThroughput | None:
        """What link 2 carries from an edge."""

    @property
    def sent_bytes(self) -> dict[str, int]:
        """Bytes sent over each link, by metric name."""


class FlowOwner(Protocol):
    """What a flow uses of its hop."""

    @property
    def node(self) -> Node:
        """The node that the flow runs on."""

    @property
    def stage(self) -> HopStage:
        """The edge's or the cloud's side of the hop."""

    async def fail(self, task_id: str, attempt: int, cause: str, detail: str, *, retryable: bool = False) -> None:
        """Report to the planner that the attempt failed."""


class Flow:
    """One attempt at one task on this stage.

    A finished flow stays in the hop's table, closed, until its task ends or its attempt is fenced, so that late
    duplicates are dropped instead of computed again.
    """

    def __init__(self, hop: FlowOwner, plan: AttemptPlan) -> None:
        self.hop = hop
        self.node = hop.node
        self.plan = plan
        self.partitions: set[TopicPartition] = set()  # partitions that its frames came from
        self.task: asyncio.Task[None] | None = None
        self.closed = False
        self.active_s = asyncio.get_running_loop().time()  # last time a frame arrived or a sample was acknowledged
        self.busy_s = 0.0
        self._computed = 0  # samples computed or relayed
        self.parent_id: str | None = None  # parent trace span, where the frames name one
        self._began_s: float | None = None  # start of the first computation on this stage
        self._opened_s = float("-inf")  # when the model was ready and the slot taken
        self._free_s = float("-inf")  # from when the next sample may be computed
        self.window = MAX_WINDOW  # samples that its device may have in the pipeline
        self._widest_bytes = MAX_SAMPLE_BYTES  # upper limit for one sample
        self._expected_bytes: int | None = None  # size of one sample that arrives here, where the model is known
        self.first, self.last, self.computes = self._check_plan()
        self._route = hop.stage.route(plan)
        self._sending: FrameSender | None = None
        self._assembler = hop.node.components.assembler()
        self._ready: deque[tuple[int, list[Array], float]] = deque()
        self._arrived = asyncio.Event()
        self._receipts: dict[int, list[Receipt]] = {}  # by sample, until acknowledged downstream
        self._whole: set[int] = set()  # complete samples not yet acknowledged downstream
        self._done = hop.node.components.done()
        self._finished = asyncio.Event()

    def _check_plan(self) -> tuple[int, int, bool]:
        """Check that this stage can follow the plan; lower the window and the size limit where the model is known.

        Returns the first and last layer, and whether this stage computes them. Raises `ProtocolError`.
        """
        plan, placement = self.plan, self.plan.placement
        if placement.edge is None or not placement.link1_bps or (placement.uses_cloud and not placement.link2_bps):
            raise ProtocolError("wrong_shape", f"task {plan.task_id}: the plan lacks an edge or a link rate")
        first, last, computes = self.hop.stage.layers(plan)
        profile = next((p for p in self.node.runner.profiles() if p.model == plan.model), None)
        if profile is None:
            if computes:
                raise ProtocolError("unknown_model", f"task {plan.task_id}: this stage has no model {plan.model!r}")
            return first, placement.cut2, False
        if computes and profile.sha256 != plan.sha256:
            raise ProtocolError("unknown_model", f"task {plan.task_id}: SHA-256 of {plan.model} differs from the plan")
        if placement.cut2 > profile.layers:
            raise ProtocolError("wrong_shape", f"task {plan.task_id}: {plan.model} has {profile.layers} layers")
        last = profile.layers if last is None else last
        if profile.sha256 == plan.sha256:
            self.window = window_of(plan, profile.cut_bytes)
            self._widest_bytes = max(plan.input_bytes or 0, *profile.cut_bytes[first : last + 1])
            self._expected_bytes = profile.cut_bytes[first]
            if first == 0 and plan.input_bytes is not None:
                self._expected_bytes = plan.input_bytes
        return first, last, computes

    @property
    def idle(self) -> bool:
        """Whether it is closed, or a session without work."""
        return self.closed or (self.plan.session is not None and not self.under_way)

    @property
    def under_way(self) -> int:
        """Number of samples held here and not yet acknowledged downstream."""
        return len(self._whole) + self._assembler.pending

    @property
    def finished(self) -> SampleRanges:
        """The samples whose outputs are acknowledged downstream."""
        return self._done

    @property
    def whole_samples(self) -> frozenset[int]:
        """Complete samples that are not acknowledged downstream yet."""
        return frozenset(self._whole)

    @property
    def held_bytes(self) -> int:
        """Bytes of data held for those samples."""
        waiting = sum(array.nbytes for _, tensors, _ in self._ready for array in tensors)
        return self._assembler.pending_bytes + waiting + (self._sending.held_bytes if self._sending else 0)

    @property
    def bound_bytes(self) -> int:
        """Upper limit of `held_bytes`: twice the window, at this stage's widest tensor."""
        return 2 * self.window * self._widest_bytes

    # --- receive frames ----------------------------------------------------------------------------------------------

    def take_frame(self, record: Record, frame: Frame, receipt: Receipt) -> None:
        """Accept the pieces of a frame. Raises `ProtocolError` where the frame is unusable."""
        self.partitions.add((record.topic, record.partition))
        self.active_s = exact_clock()()
        if record.headers and self.parent_id is None:
            self.parent_id = parent_in(record.headers, self.plan.task_id)
        for piece in frame.pieces:
            self._take(piece, receipt)

    def _take(self, piece: Piece, receipt: Receipt) -> None:
        sample = piece.sample
        if self.closed or sample in self._done:
            self.node.status.count("duplicates_suppressed")
            return
        if sample in self._whole:
            # A duplicate of a sample in progress: its record, too, stays open until the sample is acknowledged.
            self.node.status.count("duplicates_suppressed")
            receipt.hold()
            self._receipts[sample].append(receipt)
            return
        if self._expected_bytes is not None and piece.size_bytes != self._expected_bytes:
            raise ProtocolError(
                "wrong_shape",
                f"sample {sample} of {self.plan.model} at {self.first}: {piece.size_bytes:,} bytes, "
                f"expected {self._expected_bytes:,}",
            )
        if piece.encoded is not None:
            raise ProtocolError("wrong_codec", f"sample {sample}: the plan has no codec {piece.encoded.codec} here")
        try:
            whole = self._assembler.add(piece)
        except ProtocolError as error:
            if error.cause != "missing_chunk":
                raise
            self.node.status.count("gaps")  # the sender restarts the sample
            return
        receipt.hold()
        self._receipts.setdefault(sample, []).append(receipt)
        if isinstance(whole, list):
            self._whole.add(sample)
            self._ready.append((sample, whole, self.active_s))
            self._arrived.set()

    # --- compute -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Wait for a slot, compute all samples, and report; return when all are acknowledged.

        A session computes until it is stopped. It waits for no slot: the planner booked a share of the computing time for it,
        and expects the tasks beside it to take longer.
        """
        node = self.node
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
            self._discard()
            await self.hop.fail(self.plan.task_id, self.plan.attempt, cause, detail_of(error))

    async def _serve(self) -> None:
        runner = self.node.runner
        async with contextlib.AsyncExitStack() as stack:
            station: Station | None = None
            if self.computes:
                await runner.prepare(self.plan, self.first, self.last)
                if self.plan.session is None:
                    await stack.enter_async_context(self.hop.stage.slot())
                station = runner.station(self.plan, self.first, self.last)
                stack.callback(station.close)
                self._opened_s = self._free_s = exact_clock()()  # waiting for model and slot is not computing
            sender = self._sending = self._frame_sender()
            stack.callback(self._record_spans, sender)
            async with sending(sender):
                if self.plan.session is not None:
                    stack.push_async_callback(_cancel, asyncio.create_task(self._report_regularly(sender)))
                await self._work(station, sender)

    async def _work(self, station: Station | None, sender: FrameSender) -> None:
        """Compute and send all samples, and report; in a session without an end."""
        await self._compute_all(station, sender)
        await sender.all_posted.wait()
        # Before the acknowledgement, so that the report travels with the last result instead of one round trip later.
        reported = await self._report(self._busy_s(sender))
        await self._finished.wait()
        if not reported:
            await self._report(self._busy_s(sender))

    async def _compute_all(self, station: Station | None, sender: FrameSender) -> None:
        clock = exact_clock()
        for _ in itertools.count() if self.plan.session is not None else range(self.plan.todo):
            while not self._ready:
                self._arrived.clear()
                await self._arrived.wait()
            sample, tensors, ready_s = self._ready.popleft()
            if station is not None:
                waited_s = station.waited_s
                tensors = await station.run(sample, tensors, max(ready_s, self._opened_s))
                now = clock()
                begin_s = min(now, max(ready_s, self._free_s) + station.waited_s - waited_s)
                if self._began_s is None:
                    self._began_s = begin_s
                self.busy_s += now - begin_s
                self.node.busy(f"{self.hop.stage.part}_s", self.plan.task_id, begin_s, now)
                self._free_s = now
                ready_s = now
            sender.put(Outgoing(sample, tensors, ready_s))
            self._computed += 1

    async def _report_regularly(self, sender: FrameSender) -> None:
        """Report what came since the last report, until cancelled: soon at first, since a session may be short."""
        pause_s = FIRST_REPORT_S
        reported: dict[str, float] = {}  # totals
        while True:
            await asyncio.sleep(pause_s)
            pause_s = min(REPORT_EVERY_S, 2.0 * pause_s)
            total = self._busy_s(sender) | {SAMPLES: float(self._computed)}
            news = {name: value - reported.get(name, 0.0) for name, value in total.items()}
            if news[SAMPLES] and await self._report(news):
                reported = total

    def _busy_s(self, sender: FrameSender) -> dict[str, float]:
        """Busy times of this stage so far, by part."""
        busy_s = {f"{self._route.part}_s": sender.busy_s}
        return busy_s | ({f"{self.hop.stage.part}_s": self.busy_s} if self.computes else {})

    def _record_spans(self, sender: FrameSender) -> None:
        """Record the trace spans of this stage."""
        node = self.node
        if self.computes:
            node.span(self.hop.stage.part, self.plan, self._began_s, self._free_s, self.busy_s, self.parent_id)
        follows = None if self.computes else self.parent_id
        node.span(self._route.part, self.plan, sender.began_s, sender.busy_until_s, sender.busy_s, follows)

    def _frame_sender(self) -> FrameSender:
        node, plan, route = self.node, self.plan, self._route
        return node.components.frame_sender(
            node.bus if route.topic != topics.RESULTS else self._results_bus(),
            plan,
            route,
            SenderHooks(
                gate=node.gate,
                on_busy=partial(node.busy, f"{route.part}_s", plan.task_id),
                on_acknowledged=self._acknowledged,
                throughput=self.hop.stage.throughput if route.part == "link2" else None,
            ),
            source=node.settings.name,
            headers=node.trace_header(route.part, plan),
        )

    def _results_bus(self) -> Bus:
        """The bus for results: the site of the task's edge, whose links the planner reserved."""
        assert self.plan.placement.edge is not None  # `_check_plan`
        return self.node.bus.beside(topics.RESULTS, topics.activations_topic(self.plan.placement.edge))

    # --- finish ------------------------------------------------------------------------------------------------------

    def _acknowledged(self, samples: Sequence[int]) -> None:
        """The bus holds the outputs of these samples: release their records for commit."""
        self.active_s = asyncio.get_running_loop().time()
        self._done.update(samples)
        self._whole.difference_update(samples)
        for sample in samples:
            for receipt in self._receipts.pop(sample, ()):
                receipt.release()
        if len(self._done) >= self.plan.todo and self.plan.session is None:
            self._finished.set()

    async def _report(self, busy_s: dict[str, float]) -> bool:
        """Send measured times to the device, and return whether the bus has them.

        Reports are not shaped, because they are not task data.
        """
        plan, node = self.plan, self.node
        frame = Frame("report", plan.task_id, plan.attempt, node.settings.name, report=busy_s)
        try:
            await self._results_bus().send(topics.RESULTS, encode_frame(frame), key=plan.device)
        except BusError as error:
            node.log.warning("report not sent", task=plan.task_id, error=str(error))
            return False
        return True

    def stop(self, *, discard: bool) -> None:
        """Stop the flow.

        With `discard`, its records are released for commit. Without, another consumer receives them again.
        """
        if self.task is not None:
            self.task.cancel()
        if discard:
            self._discard()
        self.closed = True

    def _discard(self) -> None:
        """Close the flow, release its records and drop its data."""
        self.closed = True
        for receipts in self._receipts.values():
            for receipt in receipts:
                receipt.release()
        self._receipts.clear()
        self._ready.clear()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))  # unlike `await task`, this ends with the flow where that is cancelled meanwhile
