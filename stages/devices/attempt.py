"""One attempt at one task on its device.

The attempt sends samples while its window has room; every result frees one place in the window.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from bus.errors import ConfigError, DeeparError, InvariantError
from bus.frames import AttemptPlan, Frame
from bus.messages import TaskCompleted, TaskSubmitted
from bus.tensors import Array
from bus.values import ModelProfile
from stages.computing import Computing
from stages.devices.edge_path import DeviceWork, StalledError
from stages.devices.incoming_results import IncomingResults
from stages.devices.leg import Leg, LegWork
from stages.devices.stage_reports import StageReports
from stages.measuring.clock import exact_clock
from stages.membership.failures import cause_of, detail_of
from stages.node import Node


class ResultSink(Protocol):
    """Receives the results of a device's tasks, each (task, sample) once."""

    def __call__(self, task: TaskSubmitted, sample: int, outputs: list[Array]) -> None: ...


class RunningAttempt(Protocol):
    """An attempt, as its device sees it."""

    plan: AttemptPlan

    @property
    def window(self) -> int:
        """Samples that may be under way."""

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
        self._left = deque(todo)  # samples not started yet
        self._patience_s = patience_s
        self._on_result = on_result
        components = device.node.components
        self._missing = components.missing(todo)
        self._computing = Computing(device.node, plan, "device")
        self._reports = StageReports(plan)
        self._results = self._incoming()
        self._leg: Leg | None = None  # the present one
        self._rerouted: AttemptPlan | None = None  # the plan of the next leg
        self._last_result_s = asyncio.get_running_loop().time()

    def _incoming(self) -> IncomingResults:
        assembler = self.device.node.components.assembler()
        return IncomingResults(assembler, self._reports, self._take_result, self._abort)

    @property
    def window(self) -> int:
        """Samples that may be under way."""
        return 0 if self._leg is None else self._leg.window

    @property
    def under_way(self) -> int:
        """Samples started without a result yet, but for those that the device computes alone in idle time."""
        return 0 if self._leg is None else self._leg.under_way

    @property
    def begun(self) -> int:
        """Samples started under the present plan."""
        return 0 if self._leg is None else sum(self._leg.totals)

    async def run(self) -> None:
        """Send all samples, wait for all results, and report to the planner."""
        async with reporting_failures(self.device, self.plan):
            if self._left:
                await self._serve()
            await self._finish()

    async def _serve(self) -> None:
        node = self.device.node
        work = LegWork(
            device=self.device,
            profile=profile_for(node, self.plan.model),
            inputs=self.device.open_input(self.known.task),
            left=self._left,
            computing=self._computing,
            reports=self._reports,
            keep=self._keep,
            patience_s=self._patience_s,
        )
        try:
            while self._left:
                if self._rerouted is not None:
                    self.plan = self._rerouted.model_copy(update={"todo": len(self._left)})
                    self._rerouted = None
                    self._reports.follow(self.plan)
                    self._results = self._incoming()  # without the pieces of results of the leg before
                self._leg = Leg(work, self.plan)
                await self._leg.run()
                self._left.extendleft(reversed(self._leg.unfinished))
        finally:
            self._computing.record_span()

    def reroute(self, plan: AttemptPlan) -> None:
        """Go on under another plan, which samples without a result follow from their beginning."""
        self._rerouted = plan
        if self._leg is not None:
            self._leg.stop()

    # --- results -----------------------------------------------------------------------------------------------------

    def take(self, frame: Frame) -> None:
        """Process a frame of results or a report. Raises `ProtocolError` where the frame is unusable."""
        if frame.kind == "result" and frame.revision != self.plan.number:
            self.device.node.status.count("fenced_frames")
            return
        self._results.take(frame)

    def _take_result(self, sample: int, outputs: list[Array]) -> None:
        if self._leg is not None:
            self._leg.result(sample, outputs)

    def _keep(self, sample: int, outputs: list[Array]) -> bool:
        """Keep a result; returns False for a duplicate."""
        if not self._missing.remove(sample):
            self.device.node.status.count("duplicates_suppressed")
            return False
        self.known.results.add(sample)
        self._last_result_s = exact_clock()()
        if self._on_result is not None:
            try:
                self._on_result(self.known.task, sample, outputs)
            except Exception as error:  # for example a full disk; fails this task only
                self._abort(error)
        return True

    def _abort(self, error: Exception) -> None:
        if self._leg is not None:
            self._leg.abort(error)

    async def _finish(self) -> None:
        await self._reports.arrive()
        known = self.known
        started_s = known.started_s if known.started_s is not None else known.admitted_s
        totals = () if self._leg is None else self._leg.totals
        message = TaskCompleted(
            task_id=self.plan.task_id,
            attempt=self.plan.attempt,
            node=self.device.node.settings.name,
            measured=self._reports.parts().model_copy(update={"device_s": self._computing.busy_s}),
            delay_s=max(0.0, self._last_result_s - started_s),
            wait_s=max(0.0, started_s - known.admitted_s),
            cloud=self._reports.cloud,
            route_samples=totals if len(totals) > 1 else None,
            edge_batches=self._reports.batches("edge"),
            cloud_batches=self._reports.batches("cloud"),
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
