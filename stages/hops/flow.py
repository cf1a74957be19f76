"""One attempt at one task on an edge or cloud stage.

A flow receives samples, computes its layers of each sample's route, and sends the outputs on. It holds the record of a frame
until the bus has acknowledged all outputs made from it; then the hop may commit the record's offset. Samples that the stage
only passes on do not wait for those that it computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import NamedTuple, Protocol

from bus import topics
from bus.errors import DeeparError, InvariantError, ProtocolError
from bus.frames import BATCHES, PREDICTED, SAMPLES, AttemptPlan, Frame
from bus.headers.tracing import parent_in
from bus.port import Bus, Record, TopicPartition
from bus.tensors import Activations, Piece, bytes_in, codec_of
from bus.values import Codec
from stages.computing import Computing
from stages.hops.branches import Branch, StageSide, branches_of
from stages.hops.stage_reporter import StageReporter
from stages.measuring.clock import exact_clock
from stages.measuring.throughput import LinkThroughput
from stages.membership.failures import cause_of, detail_of
from stages.network.frame_sender import Destination, FrameSender, Outgoing, SenderHooks, sending
from stages.node import Node
from stages.offsets import Receipt
from stages.sample_ranges import SampleRanges

IN_TRANSIT = frozenset(("undecodable", "no_plan", "undecided"))
"""Causes of dead letters that say nothing about the task: one bad record ends an attempt at a session, not the session."""

REPORT_SAMPLES = 8
"""A stage of a task of several routes reports after this many samples: several times before the shares are solved again."""


class HopStage(StageSide, Protocol):
    """What differs between an edge and the cloud."""

    @property
    def topic(self) -> str:
        """The topic of the activations for this stage."""

    @property
    def group_id(self) -> str:
        """The consumer group that reads this topic."""

    def slot(self) -> AbstractAsyncContextManager[None]:
        """What a flow holds while it computes."""

    def destination(self, plan: AttemptPlan, *, to_cloud: bool) -> Destination:
        """Where outputs go, with new grants for its links."""

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


class _Arrived(NamedTuple):
    """A sample to compute."""

    sample: int
    route: int
    branch: Branch
    inputs: Activations
    ready_s: float  # when it arrived
    record: Record | None  # the last of those that brought an encoded sample


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
        self.parent_id: str | None = None  # parent trace span, where the frames name one
        profile = next((p for p in self.node.runner.profiles() if p.model == plan.model), None)
        self._branches = branches_of(hop.stage, plan, profile)
        self.window = self._branches.window  # samples that its device may have in the pipeline
        self._mixed = len(plan.placement.cut_pairs) > 1  # whether it has several routes
        self._totals: tuple[int, ...] | None = None  # samples of each route; None: not known yet, or a session
        self._samples = plan.samples if plan.session is None else math.inf  # of the task: their numbers are lower
        self._to_finish = self._to_compute = math.inf  # samples that pass this stage, and those that it computes
        if not self._mixed and plan.session is None:
            self._expect((plan.todo,))
        self._computing = Computing(self.node, plan, hop.stage.part)
        self._handled = 0  # samples computed or passed on
        self._senders = {to_cloud: self._sender(to_cloud) for to_cloud in self._branches.destinations}
        self._reporter = StageReporter(self.node, plan, self._results_bus(), self._measured)
        self._report_due = asyncio.Event()
        self._assembler = hop.node.components.assembler()
        self._ready: deque[_Arrived] = deque()
        self._arrived = asyncio.Event()
        self._receipts: dict[int, list[Receipt]] = {}  # by sample, until acknowledged downstream
        self._whole: set[int] = set()  # complete samples not yet acknowledged downstream
        self._done = hop.node.components.done()
        self._finished = asyncio.Event()

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
        waiting = sum(bytes_in(arrived.inputs) for arrived in self._ready)
        return self._assembler.pending_bytes + waiting + sum(sender.held_bytes for sender in self._senders.values())

    @property
    def bound_bytes(self) -> int:
        """Upper limit of `held_bytes`: twice the window, at this stage's widest tensor."""
        return 2 * self.window * self._branches.widest_bytes

    # --- receive frames ----------------------------------------------------------------------------------------------

    def take_frame(self, record: Record, frame: Frame, receipt: Receipt) -> None:
        """Accept the pieces of a frame. Raises `ProtocolError` where the frame is unusable."""
        self.partitions.add((record.topic, record.partition))
        self.active_s = exact_clock()()
        if record.headers and self.parent_id is None:
            self.parent_id = parent_in(record.headers, self.plan.task_id)
        for piece in frame.pieces:
            self._take(piece, record, receipt)
        if frame.totals and frame.totals != self._totals and not self.closed:
            self._conclude(frame.totals)

    def _take(self, piece: Piece, record: Record, receipt: Receipt) -> None:
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
        if sample >= self._samples:
            raise ProtocolError("wrong_shape", f"sample {sample} of a task with {self.plan.samples} samples")
        branch = self._branches.of(piece.route)
        if piece.size_bytes != branch.expected_bytes or piece.encoded is not None or branch.arrives is not Codec.RAW:
            self._check(piece, branch)
        try:
            whole = self._assembler.add(piece)
        except ProtocolError as error:
            if error.cause != "missing_chunk":
                raise
            self.node.status.count("gaps")  # the sender restarts the sample
            return
        receipt.hold()
        self._receipts.setdefault(sample, []).append(receipt)
        if whole is None:
            return
        self._whole.add(sample)
        if branch.computes:
            self._ready.append(
                _Arrived(sample, piece.route, branch, whole, self.active_s, record if piece.encoded else None)
            )
            self._arrived.set()
        else:
            self._pass_on(sample, piece.route, branch, whole, self.active_s)

    def _check(self, piece: Piece, branch: Branch) -> None:
        """Raise `ProtocolError` where the codec or the size of a piece differs from the plan."""
        if (codec := codec_of(piece.encoded)) is not branch.arrives:
            raise ProtocolError("wrong_codec", f"sample {piece.sample}: codec {codec}, expected {branch.arrives}")
        raw_bytes = piece.size_bytes if piece.encoded is None else piece.encoded.raw_bytes
        if branch.expected_bytes is not None and raw_bytes != branch.expected_bytes:
            raise ProtocolError(
                "wrong_shape",
                f"sample {piece.sample} of {self.plan.model} at {branch.segment.first}: {raw_bytes:,} bytes, "
                f"expected {branch.expected_bytes:,}",
            )

    def _conclude(self, totals: tuple[int, ...]) -> None:
        """Note how many samples take each route. Raises `ProtocolError` where the plan has another number of routes."""
        if len(totals) != len(self._branches.routes) or self.plan.session is not None:
            raise ProtocolError("wrong_shape", f"totals of {len(totals)} routes do not fit the plan")
        self._expect(totals)
        for to_cloud, sender in self._senders.items():
            sender.conclude(self._branches.total(totals, to_cloud=to_cloud), totals if to_cloud else ())
        self._arrived.set()
        self._check_finished()

    def _expect(self, totals: tuple[int, ...]) -> None:
        self._totals = totals
        self._to_finish = self._branches.total(totals)
        self._to_compute = self._branches.total(totals, computed=True)

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
            retryable = self.plan.session is not None and cause in IN_TRANSIT
            await self.hop.fail(self.plan.task_id, self.plan.attempt, cause, detail_of(error), retryable=retryable)

    async def _serve(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._record_spans)
            for sender in self._senders.values():
                await stack.enter_async_context(sending(sender))
            if segments := self._branches.segments:
                await self._computing.prepare(segments)
                if self.plan.session is None:
                    await stack.enter_async_context(self.hop.stage.slot())
                self._computing.open(segments)
                stack.callback(self._computing.close)
                self._computing.begin()
            if self.plan.session is not None:
                stack.push_async_callback(_cancel, asyncio.create_task(self._reporter.report_session()))
            elif self._mixed:
                stack.push_async_callback(_cancel, asyncio.create_task(self._reporter.report_at(self._report_due)))
            await self._work()

    async def _work(self) -> None:
        """Compute and send all samples, and report; in a session without an end."""
        await self._compute_all()
        for sender in self._senders.values():
            await sender.all_posted.wait()
        # Before the acknowledgement, so that the report travels with the last result instead of one round trip later.
        reported = await self._reporter.report()
        await self._finished.wait()
        if not reported:
            await self._reporter.report()

    async def _compute_all(self) -> None:
        computed = 0
        while computed < self._to_compute:
            if not self._ready:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            batch = self._take_ready()
            together = self._computing.most_at_once(batch[0].branch.segment) > 1
            await (self._compute_together(batch) if together else self._compute(batch[0]))
            computed += len(batch)

    def _take_ready(self) -> list[_Arrived]:
        """The next sample, and those right behind it that can be computed together with it."""
        batch = [self._ready.popleft()]
        branch = batch[0].branch
        most = self._computing.most_at_once(branch.segment)
        while self._ready and len(batch) < most and self._ready[0].branch is branch:
            batch.append(self._ready.popleft())
        return batch

    async def _compute(self, arrived: _Arrived) -> None:
        sample, route, branch, inputs, ready_s, _ = arrived
        try:
            outputs, ready_s = await self._computing.run(branch.segment, sample, inputs, ready_s, branch.predicted_s)
        except ProtocolError as error:
            await self._dead_letter(arrived, error)
            raise
        self._pass_on(sample, route, branch, outputs, ready_s)

    async def _compute_together(self, batch: Sequence[_Arrived]) -> None:
        branch = batch[0].branch
        computed = self._computing.run_together(branch.segment, batch, branch.predicted_s)
        async with contextlib.aclosing(computed):
            for arrived in batch:
                try:
                    outputs, ready_s = await anext(computed)
                except ProtocolError as error:
                    await self._dead_letter(arrived, error)
                    raise
                self._pass_on(arrived.sample, arrived.route, branch, outputs, ready_s)

    async def _dead_letter(self, arrived: _Arrived, error: ProtocolError) -> None:
        """Copy the record of a sample that is encoded wrongly to the dead-letter topic."""
        if arrived.record is not None:
            await self.node.dead_letter(arrived.record, error, task_id=self.plan.task_id)

    def _pass_on(self, sample: int, route: int, branch: Branch, outputs: Activations, ready_s: float) -> None:
        self._senders[branch.to_cloud].put(Outgoing(sample, outputs, ready_s, route if branch.to_cloud else 0))
        self._handled += 1
        if self._mixed and self._handled % REPORT_SAMPLES == 0:
            self._report_due.set()

    def _measured(self) -> dict[str, float]:
        """What this stage reports: busy times by part; in a session with the number of samples."""
        measured = {f"{self.hop.stage.part}_s": self._computing.busy_s} if self._branches.segments else {}
        if self._computing.batches:
            measured[f"{self.hop.stage.part}{BATCHES}"] = self._computing.batches
        if self._mixed and measured:
            measured[f"{self.hop.stage.part}{PREDICTED}"] = self._computing.predicted_s
        for to_cloud, sender in self._senders.items():
            part = _part(to_cloud)
            measured[f"{part}_s"] = sender.busy_s
            if self._mixed:
                measured[f"{part}{PREDICTED}"] = sender.granted_s
        return measured | ({SAMPLES: float(self._handled)} if self.plan.session is not None else {})

    def _record_spans(self) -> None:
        """Record the trace spans of this stage."""
        self._computing.record_span(self.parent_id)
        follows = None if self._branches.segments else self.parent_id
        for to_cloud, sender in self._senders.items():
            span = (sender.began_s, sender.busy_until_s, sender.busy_s)
            self.node.spans.record(_part(to_cloud), self.plan, *span, follows)

    def _sender(self, to_cloud: bool) -> FrameSender:
        node, plan = self.node, self.plan
        destination = self.hop.stage.destination(plan, to_cloud=to_cloud)
        return node.components.frame_sender(
            node.bus if to_cloud else self._results_bus(),
            plan,
            destination,
            SenderHooks(
                gate=node.lease.gate,
                on_busy=partial(node.busy, f"{destination.part}_s", plan.task_id),
                on_acknowledged=self._acknowledged,
                throughput=self.hop.stage.throughput if to_cloud else None,
            ),
            source=node.settings.name,
            headers=node.spans.header(destination.part, plan),
        )

    def _results_bus(self) -> Bus:
        """The bus for results: the site of the task's edge, whose links the planner reserved."""
        assert self.plan.placement.edge is not None  # `branches_of`
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
        self._check_finished()

    def _check_finished(self) -> None:
        if len(self._done) >= self._to_finish:
            self._finished.set()

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


def _part(to_cloud: bool) -> str:
    """The part of a task's delay that sending there belongs to."""
    return "link2" if to_cloud else "result"


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))  # unlike `await task`, this ends with the flow where that is cancelled meanwhile
