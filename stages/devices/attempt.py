"""One attempt at one task on its device.

The attempt sends samples while its window has room; every result frees one place in the window.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from bus.errors import ConfigError, DeeparError, InvariantError
from bus.frames import PREDICTED, AttemptPlan, Frame
from bus.messages import TaskCompleted, TaskSubmitted
from bus.tensors import Activations, Array
from bus.values import ModelProfile
from stages.computing import Computing, Segment, tensors_of
from stages.devices.device_steps import device_segments, front, weighted_steps
from stages.devices.edge_path import DeviceWork, EdgePath, StalledError, stopped
from stages.devices.idle_time import IdleTime, IdleWork
from stages.devices.incoming_results import IncomingResults
from stages.devices.sample_queue import SampleQueue
from stages.devices.share_feedback import ShareFeedback
from stages.devices.stage_reports import StageReports
from stages.measuring.clock import exact_clock
from stages.network.frame_sender import FrameSender, Outgoing
from stages.node import Node, cause_of, detail_of
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
        self._queue: SampleQueue | None = None  # once the attempt serves
        self._feedback: ShareFeedback | None = None  # once it sends, where the plan has routes
        self._on_result = on_result
        components = device.node.components
        self._missing = components.missing(todo)
        self._computing = Computing(device.node, plan, "device")
        self._reports = StageReports(plan.placement)
        self._results = IncomingResults(components.assembler(), self._reports, self._take_result, self._abort)
        self._window = components.window()
        self.window = 0  # window size, in samples; a sample that is computed in idle time has no place in it
        self.under_way = 0  # samples in the window without a result yet
        self._came = asyncio.Event()  # a result came, or a device-only sample was started
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
        plan = self.plan
        profile = profile_for(self.device.node, plan.model)
        inputs = self.device.open_input(self.known.task)
        queue = self._queue = SampleQueue(self.todo, plan.placement, profile.layers)
        segments = device_segments(plan.placement, profile)
        self.window = window_of(plan, profile.cut_bytes)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._computing.record_span)
            await self._computing.prepare(segments)
            self._computing.open(segments)
            stack.callback(self._computing.close)
            if plan.placement.edge is None:
                await self._send(inputs, queue, None)
                return
            sender = await stack.enter_async_context(self._path.open())
            if plan.placement.routes is not None:
                self._feedback = ShareFeedback(plan.placement.routes, queue, partial(self._measured, sender))
            idle = None if queue.alone is None else self._idle_time(inputs, queue, sender, weighted_steps(profile))
            if idle is not None:
                stack.push_async_callback(stopped, asyncio.create_task(self._guarded(idle.run())))
            await self._send(inputs, queue, sender, idle)
            self._reports.add("link1_s", sender.busy_s)

    async def _send(
        self,
        inputs: Callable[[int], list[Array]],
        queue: SampleQueue,
        sender: FrameSender | None,
        idle: IdleTime | None = None,
    ) -> None:
        """Send every sample as the window allows; return when all results have arrived."""
        compute = self._computing.run if idle is None else idle.interrupt
        placement = self.plan.placement
        segments = [front(placement, route) for route in range(len(placement.cut_pairs))]
        routes = placement.routes
        self._window.open(self.window)  # here, so that preparing the model does not count as a sample's time
        while queue:
            # The time when the place became free, so that waiting in the event loop does not count as computing.
            ready_s = await self._window.take()
            if idle is not None and sender is not None and await self._left_to_device(queue, idle, sender):
                ready_s = exact_clock()()
            if self._failure:
                raise self._failure
            if not queue:
                break
            sample, route = queue.take()
            self.under_way += 1
            outputs: Activations = inputs(sample)
            if segments[route].works:
                predicted_s = 0.0 if routes is None else routes[route].stations_s[0]
                outputs, ready_s = await compute(segments[route], sample, outputs, ready_s, predicted_s)
            if sender is None:
                self._take_result(sample, tensors_of(outputs))
                continue
            self._path.progress(ready_s)
            sender.put(Outgoing(sample, outputs, ready_s, route))
            self._conclude(queue, sender)
        await self._complete.wait()
        if self._failure:
            raise self._failure

    def _conclude(self, queue: SampleQueue, sender: FrameSender) -> None:
        """Where all samples of several routes have been started, tell the stages how many take each route."""
        if not queue and len(queue.totals) > 1:
            sender.conclude(queue.sent, tuple(queue.totals))

    def _abort(self, error: Exception) -> None:
        self._failure = error
        self._came.set()
        self._complete.set()
        self._window.wake()

    # --- the device-only route beside others ---------------------------------------------------------------------------

    def _idle_time(
        self,
        inputs: Callable[[int], list[Array]],
        queue: SampleQueue,
        sender: FrameSender,
        steps: Sequence[tuple[Segment, float]],
    ) -> IdleTime:
        """What computes the samples of the device-only route."""

        def take() -> int | None:
            if not queue or not queue.time_for_alone(self.under_way):
                return None
            sample = queue.take_alone()
            self._conclude(queue, sender)
            if not queue:
                self._window.wake()
            self._came.set()
            return sample

        return IdleTime(
            self._computing,
            IdleWork(
                steps=steps,
                predicted_s=queue.alone_s,
                length_s=lambda: queue.alone_s,
                take=take,
                inputs=inputs,
                done=self._keep,
                more=lambda: bool(queue),
            ),
        )

    async def _left_to_device(self, queue: SampleQueue, idle: IdleTime, sender: FrameSender) -> bool:
        """Wait while samples had better be computed on the device alone; returns whether it did wait.

        That is where the device ends the rest of the task soon enough, or where link 1 is stuck.
        """
        waited = False
        while (
            queue
            and not self._failure
            and (
                queue.left_to_device(self.under_way, idle.begun_s)
                or (sender.stuck and queue.time_for_alone(self.under_way))
            )
        ):
            self._came.clear()
            await self._came.wait()
            waited = True
        return waited

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the samples; its failure ends the attempt."""
        try:
            await work
        except Exception as error:
            self._abort(error)

    def _measured(self, sender: FrameSender) -> dict[str, float]:
        """Busy times of all stations so far, and what the plan predicts for them."""
        return self._reports.measured | {
            "device_s": self._computing.busy_s,
            f"device{PREDICTED}": self._computing.predicted_s,
            "link1_s": sender.busy_s,
            f"link1{PREDICTED}": sender.granted_s,
        }

    # --- results -----------------------------------------------------------------------------------------------------

    def take(self, frame: Frame) -> None:
        """Process a frame of results or a report. Raises `ProtocolError` where the frame is unusable."""
        self._results.take(frame)

    def _take_result(self, sample: int, outputs: list[Array]) -> None:
        """Take the result of a sample that had a place in the window."""
        if self._keep(sample, outputs):
            self.under_way -= 1
            if self._queue is not None:
                self._queue.came(self._last_result_s)
            self._window.give()

    def _keep(self, sample: int, outputs: list[Array]) -> bool:
        """Keep a result; returns False for a duplicate."""
        if not self._missing.remove(sample):
            self.device.node.status.count("duplicates_suppressed")
            return False
        self.known.results.add(sample)
        self._last_result_s = exact_clock()()
        self._path.progress(self._last_result_s)
        self._came.set()
        if self._feedback is not None:
            self._feedback.result()
        if self._on_result is not None:
            try:
                self._on_result(self.known.task, sample, outputs)
            except Exception as error:  # for example a full disk; fails this task only
                self._abort(error)
        if not self._missing:
            self._complete.set()
        return True

    async def _finish(self) -> None:
        await self._reports.arrive()
        known = self.known
        started_s = known.started_s if known.started_s is not None else known.admitted_s
        message = TaskCompleted(
            task_id=self.plan.task_id,
            attempt=self.plan.attempt,
            node=self.device.node.settings.name,
            measured=self._reports.parts().model_copy(update={"device_s": self._computing.busy_s}),
            delay_s=max(0.0, self._last_result_s - started_s),
            wait_s=max(0.0, started_s - known.admitted_s),
            cloud=self._reports.cloud,
            route_samples=tuple(self._queue.totals) if self._feedback is not None and self._queue is not None else None,
        )
        await self.device.complete(message)


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
