"""One attempt at one task on its device.

The attempt sends samples while its window has room; every result frees one place in the window.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from bus import topics
from bus.errors import BusError, ConfigError, DeeparError, InvariantError, ProtocolError
from bus.frames import AttemptPlan, Frame
from bus.messages import TaskCompleted, TaskSubmitted
from bus.tensors import Array
from bus.values import ModelProfile, Parts, is_node_name
from stages.measuring.clock import exact_clock
from stages.measuring.throughput import LinkThroughput
from stages.network.frame_sender import FrameSender, Outgoing, Route, SenderHooks, sending
from stages.network.shaper import Link
from stages.node import RETRY_S, Node, cause_of, detail_of
from stages.runner import Station
from stages.window import window_of

REPORTS_S = 1.0
"""Timeout for the reports of the other stages, counted from the last result."""


class StalledError(DeeparError):
    """The attempt sent no sample and received no result for longer than its time limit (`patience_s`)."""


class ResultSink(Protocol):
    """Receives the results of a device's tasks, each (task, sample) once."""

    def __call__(self, task: TaskSubmitted, sample: int, outputs: list[Array]) -> None: ...


class DeviceWork(Protocol):
    """What an attempt uses of its device."""

    node: Node
    link1: Link

    def throughput(self, edge: str) -> LinkThroughput:
        """What link 1 carries to an edge."""

    async def subscribe(self, edge: str) -> None:
        """Read the results that come back through `edge`. Raises `BusError`."""

    def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
        """A function from sample number to input tensors. Raises `UnknownNameError`, `ConfigError`."""

    async def complete(self, completed: TaskCompleted) -> None:
        """Report a task with all its results to the application and the planner."""

    async def fail(self, plan: AttemptPlan, cause: str, detail: str, *, retryable: bool = False) -> None:
        """Report to the planner that the attempt failed."""


@dataclass(slots=True)
class DeviceTask:
    """One task of this device, across its attempts."""

    task: TaskSubmitted
    admitted_s: float  # when this device read the admission, on its clock
    results: set[int] = field(default_factory=set)  # samples whose result has arrived
    started_s: float | None = None  # when the first attempt began
    running: asyncio.Task[None] | None = None
    attempt: DeviceAttempt | None = None


class DeviceAttempt:
    """Sends the samples in `todo` and collects their results."""

    def __init__(
        self,
        device: DeviceWork,
        known: DeviceTask,
        plan: AttemptPlan,
        todo: list[int],
        on_result: ResultSink | None,
        patience_s: float,
    ) -> None:
        self.device = device
        self.known = known
        self.plan = plan
        self.todo = todo
        self.device_s = 0.0
        self._began_s: float | None = None  # start of the first computation on this device
        self._computed_s = float("-inf")  # end of the last computation
        self.reports: dict[str, float] = {}
        self._cloud: str | None = None  # the cloud node that reported
        self._on_result = on_result
        components = device.node.components
        self._missing = components.missing(todo)
        self._assembler = components.assembler()
        self._window = components.window()
        self.window = 0  # window size, in samples
        self.under_way = 0  # samples started without a result yet
        self._complete = asyncio.Event()
        self._reported = asyncio.Event()
        self._last_result_s = asyncio.get_running_loop().time()
        self._progress_s = self._last_result_s  # last time a sample was sent or a result arrived
        self._patience_s = patience_s
        self._failure: Exception | None = None

    async def run(self) -> None:
        """Send all samples, wait for all results, and report to the planner."""
        node = self.device.node
        try:
            if self.todo:
                await self._serve()
            await self._finish()
        except StalledError as error:
            node.log.warning("attempt stalled; another one requested", task=self.plan.task_id, error=str(error))
            node.status.count("stalled_attempts")
            await self.device.fail(self.plan, "stalled", str(error), retryable=True)
        except InvariantError:
            raise  # a bug in DeePar: end the process
        except Exception as error:
            cause = cause_of(error)
            node.log.error("task failed", task=self.plan.task_id, cause=cause, error=str(error))
            if not isinstance(error, DeeparError):
                node.log.exception("task failed with an unexpected error", task=self.plan.task_id)
            await self.device.fail(self.plan, cause, detail_of(error))

    async def _serve(self) -> None:
        node, plan = self.device.node, self.plan
        cut1 = plan.placement.cut1
        inputs = self.device.open_input(self.known.task)
        self.window = window_of(plan, self._profile().cut_bytes)
        async with contextlib.AsyncExitStack() as stack:
            station: Station | None = None
            stack.callback(self._record_span, None)
            if cut1:
                await node.runner.prepare(plan, 0, cut1)
                station = node.runner.station(plan, 0, cut1)
                stack.callback(station.close)
            if plan.placement.edge is None:
                await self._send(inputs, station, None)
                return
            sender = self._frame_sender()
            stack.callback(self._record_span, sender)
            self._progress_s = asyncio.get_running_loop().time()
            watch = asyncio.create_task(self._watch(), name=f"{node.settings.name}: watch {plan.task_id}")
            stack.push_async_callback(_cancel, watch)
            await self._subscribe(plan.placement.edge)
            async with sending(sender):
                await self._send(inputs, station, sender)
            self.reports["link1_s"] = sender.busy_s

    async def _subscribe(self, edge: str) -> None:
        """Subscribe to the results that come through `edge`; retry until that succeeds."""
        while True:
            try:
                await self.device.subscribe(edge)
                return
            except BusError as error:
                self.device.node.log.warning("results not read; retrying", edge=edge, error=str(error))
                await asyncio.sleep(RETRY_S)
            if self._failure:
                raise self._failure

    async def _send(
        self, inputs: Callable[[int], list[Array]], station: Station | None, sender: FrameSender | None
    ) -> None:
        """Send every sample as the window allows; return when all results have arrived."""
        node, plan = self.device.node, self.plan
        clock = exact_clock()
        self._window.open(self.window)  # here, so that preparing the model does not count as a sample's time
        for sample in self.todo:
            # The time when the place became free, so that waiting in the event loop does not count as computing.
            ready_s = await self._window.take()
            if self._failure:
                raise self._failure
            self.under_way += 1
            tensors = inputs(sample)
            if station is not None:
                waited_s = station.waited_s
                tensors = await station.run(sample, tensors, ready_s)
                now = clock()
                begin_s = min(now, max(ready_s, self._computed_s) + station.waited_s - waited_s)
                self._began_s, self._computed_s = begin_s if self._began_s is None else self._began_s, now
                self.device_s += now - begin_s
                node.busy("device_s", plan.task_id, begin_s, now)
                ready_s = now
            if sender is None:
                self._result(sample, tensors)
            else:
                self._progress_s = ready_s
                sender.put(Outgoing(sample, tensors, ready_s))
        await self._complete.wait()
        if self._failure:
            raise self._failure

    def _record_span(self, sender: FrameSender | None) -> None:
        """Record a trace span: of sending where `sender` is given, else of computing."""
        if sender is None:
            self.device.node.span("device", self.plan, self._began_s, self._computed_s, self.device_s)
        else:
            self.device.node.span("link1", self.plan, sender.began_s, sender.busy_until_s, sender.busy_s)

    def _sent(self, samples: Sequence[int]) -> None:
        self._progress_s = asyncio.get_running_loop().time()

    async def _watch(self) -> None:
        """Abort the attempt when it makes no progress for longer than `patience_s`."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._patience_s / 4)
            if not self.device.node.alive:
                self._progress_s = clock()  # the bus is away, so missing results are expected
            elif clock() - self._progress_s > self._patience_s:
                self._abort(StalledError(f"{len(self._missing)} samples without a result for {self._patience_s:.0f} s"))
                return

    def _abort(self, error: Exception) -> None:
        self._failure = error
        self._complete.set()
        self._window.wake()

    def _frame_sender(self) -> FrameSender:
        node, plan, placement = self.device.node, self.plan, self.plan.placement
        assert placement.edge is not None
        grants = (self.device.link1.grant(placement.link1_bps),)
        return node.components.frame_sender(
            node.bus,
            plan,
            Route("link1", topics.activations_topic(placement.edge), plan.task_id, "activations", grants),
            SenderHooks(
                gate=node.gate,
                on_busy=partial(node.busy, "link1_s", plan.task_id),
                on_acknowledged=self._sent,
                throughput=self.device.throughput(placement.edge),
            ),
            source=node.settings.name,
            headers=node.trace_header("link1", plan),
        )

    # --- results -----------------------------------------------------------------------------------------------------

    def take(self, frame: Frame) -> None:
        """Process a frame of results or a report. Raises `ProtocolError` where the frame is unusable."""
        if frame.kind == "report":
            for part, busy_s in frame.report.items():
                self.reports[part] = self.reports.get(part, 0.0) + busy_s
            if "cloud_s" in frame.report and is_node_name(frame.source):
                self._cloud = frame.source
            if self._expected() <= self.reports.keys():
                self._reported.set()
            return
        if frame.kind != "result":
            raise ProtocolError(
                "undecodable", f"a frame of kind {frame.kind} cannot be sent to a device; expected result or report"
            )
        for piece in frame.pieces:
            try:
                whole = self._assembler.add(piece)
            except ProtocolError as error:
                if error.cause == "missing_chunk":
                    continue  # the sending stage sends the sample again
                self._abort(error)
                raise
            if whole is not None:
                self._result(piece.sample, whole)

    def _result(self, sample: int, outputs: list[Array]) -> None:
        if not self._missing.remove(sample):
            self.device.node.status.count("duplicates_suppressed")
            return
        self.under_way -= 1
        self.known.results.add(sample)
        self._last_result_s = self._progress_s = exact_clock()()
        self._window.give()
        if self._on_result is not None:
            try:
                self._on_result(self.known.task, sample, outputs)
            except Exception as error:  # for example a full disk; fails this task only
                self._abort(error)
        if not self._missing:
            self._complete.set()

    async def _finish(self) -> None:
        if self._expected():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORTS_S):
                    await self._reported.wait()
        known, node = self.known, self.device.node
        started_s = known.started_s if known.started_s is not None else known.admitted_s
        measured = Parts(
            device_s=self.device_s,
            link1_s=self.reports.get("link1_s", 0.0),
            edge_s=self.reports.get("edge_s", 0.0),
            link2_s=self.reports.get("link2_s", 0.0),
            cloud_s=self.reports.get("cloud_s", 0.0),
            result_s=self.reports.get("result_s", 0.0),
        )
        message = TaskCompleted(
            task_id=self.plan.task_id,
            attempt=self.plan.attempt,
            node=node.settings.name,
            measured=measured,
            delay_s=max(0.0, self._last_result_s - started_s),
            wait_s=max(0.0, started_s - known.admitted_s),
            cloud=self._cloud,
        )
        await self.device.complete(message)

    def _expected(self) -> set[str]:
        """Names of the parts that other stages report."""
        placement = self.plan.placement
        parts: set[str] = set()
        if placement.uses_slot:
            parts.add("edge_s")
        if placement.uses_cloud:
            parts |= {"link2_s", "cloud_s"}
        if placement.edge is not None:
            parts.add("result_s")
        return parts

    def _profile(self) -> ModelProfile:
        for profile in self.device.node.runner.profiles():
            if profile.model == self.plan.model:
                return profile
        raise ConfigError(f"this device has no model {self.plan.model!r}")


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
