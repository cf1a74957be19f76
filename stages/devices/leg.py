"""The samples of an attempt that are started under one plan.

An attempt has one leg, and another one each time that the planner reroutes its task. Then the present leg ends at once, and
its samples without a result begin again under the new plan: most of them wait before the slow station that it avoids, and the
planner's prediction counts them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from bus.frames import PREDICTED, AttemptPlan
from bus.tensors import Activations, Array
from bus.values import ModelProfile
from stages.computing import Computing, tensors_of
from stages.devices.device_steps import device_segments, front, weighted_steps
from stages.devices.edge_path import DeviceWork, EdgePath, stopped
from stages.devices.idle_time import IdleTime, IdleWork
from stages.devices.sample_queue import SampleQueue
from stages.devices.share_feedback import ShareFeedback
from stages.devices.stage_reports import StageReports
from stages.measuring.clock import exact_clock
from stages.network.frame_sender import FrameSender, Outgoing
from stages.window import window_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LegWork:
    """What a leg uses of its attempt."""

    device: DeviceWork
    profile: ModelProfile
    inputs: Callable[[int], list[Array]]
    left: deque[int]  # samples that are not started yet; the leg removes those that it starts
    computing: Computing
    reports: StageReports
    keep: Callable[[int, list[Array]], bool]  # takes a result; returns False for a duplicate
    patience_s: float


class Leg:
    """Starts samples as the window allows, until none are left or `stop` is called."""

    def __init__(self, work: LegWork, plan: AttemptPlan) -> None:
        self.plan = plan
        self._work = work
        self._queue = SampleQueue(work.left, plan.placement, work.profile.layers)
        self._window = work.device.node.components.window()
        self.window = window_of(
            plan, work.profile.cut_bytes
        )  # a sample that is computed in idle time has no place in it
        self._in_window: set[int] = set()  # started samples without a result that have a place in the window
        self._alone: set[int] = set()  # the same in idle time
        self._concluded = False  # whether the stages know how many samples take each route
        self._clock = exact_clock()
        self._stopped = False
        self._failure: Exception | None = None
        self._changed = asyncio.Event()  # a result came, or a device-only sample was started
        self._feedback: ShareFeedback | None = None  # once it sends, where the plan has several routes
        self._path = EdgePath(
            work.device, plan, patience_s=work.patience_s, missing=lambda: self.under_way, abort=self.abort
        )

    @property
    def totals(self) -> tuple[int, ...]:
        """The samples started so far, by route."""
        return tuple(self._queue.totals)

    @property
    def under_way(self) -> int:
        """Samples in the window without a result yet."""
        return len(self._in_window)

    @property
    def unfinished(self) -> list[int]:
        """The samples that were started and have no result, in order."""
        return sorted(self._in_window | self._alone)

    def stop(self) -> None:
        """Start no more samples, and wait for no result through the edge."""
        self._stopped = True
        self._changed.set()
        self._window.wake()

    def abort(self, error: Exception) -> None:
        """End the leg with this error."""
        self._failure = error
        self._changed.set()
        self._window.wake()

    # --- sending -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start samples; return when all of them have results, or after `stop`.

        Raises the error of a sample, or of `abort`.
        """
        work, placement = self._work, self.plan.placement
        segments = device_segments(placement, work.profile)
        async with contextlib.AsyncExitStack() as stack:
            await work.computing.prepare(segments)
            work.computing.open(segments)
            stack.callback(work.computing.close)
            if placement.edge is None:
                await self._send(None, None)
                return
            sender = await stack.enter_async_context(self._path.open())
            if placement.routes is not None and len(placement.routes) > 1:
                self._feedback = ShareFeedback(placement.routes, self._queue, partial(self._measured, sender))
            idle = None if self._queue.alone is None else self._idle_time(sender)
            if idle is not None:
                stack.push_async_callback(stopped, asyncio.create_task(self._guarded(idle.run())))
            await self._send(sender, idle)
            work.reports.add("link1_s", sender.busy_s)

    async def _send(self, sender: FrameSender | None, idle: IdleTime | None) -> None:
        computing, queue, placement = self._work.computing, self._queue, self.plan.placement
        compute = computing.run if idle is None else idle.interrupt
        fronts = [front(placement, route) for route in range(len(placement.cut_pairs))]
        segments = [segment if segment.works else None for segment in fronts]
        routes, left = placement.routes, self._work.left
        self._window.open(self.window)  # here, so that preparing the model does not count as a sample's time
        while left and not self._stopped:
            # The time when the place became free, so that waiting in the event loop does not count as computing.
            ready_s = await self._window.take()
            if idle is not None and sender is not None and await self._left_to_device(idle, sender):
                ready_s = self._clock()
            if self._failure:
                raise self._failure
            if self._stopped or not left:
                break
            sample, route = queue.take()
            self._in_window.add(sample)
            outputs: Activations = self._work.inputs(sample)
            if (segment := segments[route]) is not None:
                predicted_s = 0.0 if routes is None else routes[route].stations_s[0]
                outputs, ready_s = await compute(segment, sample, outputs, ready_s, predicted_s)
            if sender is None:
                self.result(sample, tensors_of(outputs))
                continue
            self._path.progress(ready_s)
            sender.put(Outgoing(sample, outputs, ready_s, route))
            self._conclude(sender)
        if sender is not None:
            self._conclude(sender)
        while (self._in_window and not self._stopped) or self._alone:
            self._changed.clear()
            await self._changed.wait()
            if self._failure:
                break
        if self._failure:
            raise self._failure

    def _conclude(self, sender: FrameSender) -> None:
        """Tell the stages how many samples take each route, where the plan does not say so."""
        if not self._concluded and not self._queue and len(self._queue.totals) > 1:
            self._concluded = True
            sender.conclude(self._queue.sent, self.totals)

    def result(self, sample: int, outputs: list[Array]) -> None:
        """The result of a sample that is not computed in idle time."""
        if not self._work.keep(sample, outputs):
            return
        now = self._clock()
        if sample in self._in_window:
            self._in_window.remove(sample)
            self._queue.came(now)
            self._window.give()
        elif sample not in self._alone:  # sent before this device restarted, or forged
            self._queue.drop(sample)
        self._came(now)

    def _came(self, now_s: float) -> None:
        self._path.progress(now_s)
        self._changed.set()
        if self._feedback is not None:
            self._feedback.result()

    def _measured(self, sender: FrameSender) -> dict[str, float]:
        """Busy times of all stations, and what the plan predicts for them: of the device over the attempt, else this plan."""
        return self._work.reports.measured | {
            "device_s": self._work.computing.busy_s,
            f"device{PREDICTED}": self._work.computing.predicted_s,
            "link1_s": sender.busy_s,
            f"link1{PREDICTED}": sender.granted_s,
        }

    # --- the device-only route beside others ---------------------------------------------------------------------------

    def _idle_time(self, sender: FrameSender) -> IdleTime:
        """What computes the samples of the device-only route."""
        queue, work = self._queue, self._work
        return IdleTime(
            work.computing,
            IdleWork(
                steps=weighted_steps(work.profile),
                predicted_s=queue.alone_s,
                length_s=lambda: queue.alone_s,
                take=partial(self._take_alone, sender),
                inputs=work.inputs,
                done=self._alone_done,
                more=lambda: bool(queue) and not self._stopped,
            ),
        )

    def _take_alone(self, sender: FrameSender) -> int | None:
        if self._stopped or not self._queue or not self._queue.time_for_alone(self.under_way):
            return None
        sample = self._queue.take_alone()
        self._alone.add(sample)
        self._conclude(sender)
        if not self._queue:
            self._window.wake()
        self._changed.set()
        return sample

    def _alone_done(self, sample: int, outputs: list[Array]) -> None:
        self._alone.discard(sample)
        if self._work.keep(sample, outputs):
            self._came(self._clock())

    async def _left_to_device(self, idle: IdleTime, sender: FrameSender) -> bool:
        """Wait while samples had better be computed on the device alone; returns whether it did wait.

        That is where the device ends the rest of the task soon enough, or where link 1 is stuck.
        """
        waited = False
        while not self._failure and not self._stopped and self._better_alone(idle, sender):
            self._changed.clear()
            await self._changed.wait()
            waited = True
        return waited

    def _better_alone(self, idle: IdleTime, sender: FrameSender) -> bool:
        queue, under_way = self._queue, self.under_way
        if not queue:
            return False
        return queue.left_to_device(under_way, idle.begun_s) or (sender.stuck and queue.time_for_alone(under_way))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the samples; its failure ends the leg."""
        try:
            await work
        except Exception as error:
            self.abort(error)
