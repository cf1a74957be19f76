"""One attempt at one task on its device.

The attempt sends samples while its window has room; every result frees one place in the window.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from bus.errors import ConfigError, DeeparError, InvariantError, ProtocolError
from bus.frames import AttemptPlan, Frame
from bus.messages import TaskCompleted, TaskSubmitted
from bus.tensors import Array
from bus.values import ModelProfile
from stages.devices.edge_path import DeviceWork, EdgePath, StalledError
from stages.devices.stage_reports import StageReports
from stages.measuring.clock import exact_clock
from stages.network.frame_sender import FrameSender, Outgoing
from stages.node import Node, cause_of, detail_of
from stages.runner import Station
from stages.window import window_of


class ResultSink(Protocol):
    """Receives the results of a device's tasks, each (task, sample) once."""

    def __call__(self, task: TaskSubmitted, sample: int, outputs: list[Array]) -> None: ...


class RunningAttempt(Protocol):
    """An attempt, as its device sees it."""

    plan: AttemptPlan
    window: int  # samples that may be under way

    @property
    def under_way(self) -> int:
        """Samples started without a result yet."""

    async def run(self) -> None:
        """Compute and report to the planner."""

    def take(self, frame: Frame) -> None:
        """Process a frame of results or a report. Raises `ProtocolError` where the frame is unusable."""


@dataclass(slots=True)
class DeviceTask:
    """One task of this device, across its attempts."""

    task: TaskSubmitted
    admitted_s: float  # when this device read the admission, on its clock
    results: set[int] = field(default_factory=set)  # samples whose result has arrived
    started_s: float | None = None  # when the first attempt began
    running: asyncio.Task[None] | None = None
    attempt: RunningAttempt | None = None


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
        self._reports = StageReports(plan.placement)
        self._on_result = on_result
        components = device.node.components
        self._missing = components.missing(todo)
        self._assembler = components.assembler()
        self._window = components.window()
        self.window = 0  # window size, in samples
        self.under_way = 0  # samples started without a result yet
        self._complete = asyncio.Event()
        self._last_result_s = asyncio.get_running_loop().time()
        self._failure: Exception | None = None
        self._path = EdgePath(
            device, plan, patience_s=patience_s, missing=lambda: len(self._missing), abort=self._abort
        )

    async def run(self) -> None:
        """Send all samples, wait for all results, and report to the planner."""
        async with reporting_failures(self.device, self.plan):
            if self.todo:
                await self._serve()
            await self._finish()

    async def _serve(self) -> None:
        node, plan = self.device.node, self.plan
        cut1 = plan.placement.cut1
        inputs = self.device.open_input(self.known.task)
        self.window = window_of(plan, profile_for(node, plan.model).cut_bytes)
        async with contextlib.AsyncExitStack() as stack:
            station: Station | None = None
            stack.callback(self._record_span)
            if cut1:
                await node.runner.prepare(plan, 0, cut1)
                station = node.runner.station(plan, 0, cut1)
                stack.callback(station.close)
            if plan.placement.edge is None:
                await self._send(inputs, station, None)
                return
            sender = await stack.enter_async_context(self._path.open())
            await self._send(inputs, station, sender)
            self._reports.add("link1_s", sender.busy_s)

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
                self._path.progress(ready_s)
                sender.put(Outgoing(sample, tensors, ready_s))
        await self._complete.wait()
        if self._failure:
            raise self._failure

    def _record_span(self) -> None:
        """Record the trace span of computing."""
        self.device.node.span("device", self.plan, self._began_s, self._computed_s, self.device_s)

    def _abort(self, error: Exception) -> None:
        self._failure = error
        self._complete.set()
        self._window.wake()

    # --- results -----------------------------------------------------------------------------------------------------

    def take(self, frame: Frame) -> None:
        """Process a frame of results or a report. Raises `ProtocolError` where the frame is unusable."""
        if frame.kind == "report":
            self._reports.take(frame)
            return
        require_result(frame)
        for piece in frame.pieces:
            try:
                whole = self._assembler.add(piece)
            except ProtocolError as error:
                if error.cause == "missing_chunk":
                    continue  # the sending stage sends the sample again
                self._abort(error)
                raise
            if isinstance(whole, list):
                self._result(piece.sample, whole)

    def _result(self, sample: int, outputs: list[Array]) -> None:
        if not self._missing.remove(sample):
            self.device.node.status.count("duplicates_suppressed")
            return
        self.under_way -= 1
        self.known.results.add(sample)
        self._last_result_s = exact_clock()()
        self._path.progress(self._last_result_s)
        self._window.give()
        if self._on_result is not None:
            try:
                self._on_result(self.known.task, sample, outputs)
            except Exception as error:  # for example a full disk; fails this task only
                self._abort(error)
        if not self._missing:
            self._complete.set()

    async def _finish(self) -> None:
        await self._reports.arrive()
        known = self.known
        started_s = known.started_s if known.started_s is not None else known.admitted_s
        message = TaskCompleted(
            task_id=self.plan.task_id,
            attempt=self.plan.attempt,
            node=self.device.node.settings.name,
            measured=self._reports.parts().model_copy(update={"device_s": self.device_s}),
            delay_s=max(0.0, self._last_result_s - started_s),
            wait_s=max(0.0, started_s - known.admitted_s),
            cloud=self._reports.cloud,
        )
        await self.device.complete(message)


def require_result(frame: Frame) -> None:
    """Raises `ProtocolError` for a frame that is neither a result nor a report."""
    if frame.kind != "result":
        raise ProtocolError(
            "undecodable", f"a frame of kind {frame.kind} cannot be sent to a device; expected result or report"
        )
    if any(piece.encoded is not None for piece in frame.pieces):
        raise ProtocolError("wrong_codec", "results are not encoded")


def profile_for(node: Node, model: str) -> ModelProfile:
    """The profile of a model on this device. Raises `ConfigError` where it has none."""
    for profile in node.runner.profiles():
        if profile.model == model:
            return profile
    raise ConfigError(f"this device has no model {model!r}")


@contextlib.asynccontextmanager
async def reporting_failures(device: DeviceWork, plan: AttemptPlan) -> AsyncIterator[None]:
    """Report an error in the block to the planner instead of raising it, except for a bug in DeePar."""
    node = device.node
    try:
        yield
    except StalledError as error:
        node.log.warning("attempt stalled; another one requested", task=plan.task_id, error=str(error))
        node.status.count("stalled_attempts")
        await device.fail(plan, "stalled", str(error), retryable=True)
    except InvariantError:
        raise  # a bug in DeePar: end the process
    except Exception as error:
        cause = cause_of(error)
        node.log.error("task failed", task=plan.task_id, cause=cause, error=str(error))
        if not isinstance(error, DeeparError):
            node.log.exception("task failed with an unexpected error", task=plan.task_id)
        await device.fail(plan, cause, detail_of(error))
