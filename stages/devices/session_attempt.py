"""One attempt at a session on its device: takes frames as the window allows, and answers them.

Frames are numbered by the attempt in the order in which they are sent, so that the stages see no gaps.
"""

from __future__ import annotations

import asyncio
import contextlib
import math

from bus.errors import InvariantError
from bus.frames import AttemptPlan, Frame
from bus.messages import TaskCompleted
from bus.tensors import Activations, Array
from stages.computing import Computing, tensors_of
from stages.devices.attempt import profile_for, reporting_failures
from stages.devices.device_steps import front
from stages.devices.edge_path import DeviceWork, EdgePath
from stages.devices.endings import SampleFailedError
from stages.devices.incoming_results import IncomingResults
from stages.devices.session import DeviceSession, Keep, PushedFrame
from stages.devices.stage_reports import StageReports
from stages.measuring.clock import exact_clock
from stages.membership.failures import cause_of, detail_of
from stages.network.frame_sender import FrameSender, Outgoing
from stages.window import window_of

SLACK_S = 0.05
"""Latency beyond the prediction for which the window of a session with `Keep.LATEST` has room."""


class SessionAttempt:
    """Computes or sends the frames of a session (`stages.devices.attempt.RunningAttempt`)."""

    def __init__(self, device: DeviceWork, session: DeviceSession, plan: AttemptPlan, patience_s: float) -> None:
        self.plan = plan
        self.window = 0
        self._device, self._session = device, session
        self._segment = front(plan.placement, 0)  # what this device does
        self._computing = Computing(device.node, plan, "device")
        self._delay_s = 0.0  # sum over the answered frames
        self._answered = 0
        components = device.node.components
        self._reports = StageReports(plan)
        self._results = IncomingResults(components.assembler(), self._reports, self._take_result, self._abort)
        self._window = components.window()
        self._changed = asyncio.Event()  # a frame was answered, or the attempt failed
        self._failure: Exception | None = None
        self._path = EdgePath(device, plan, patience_s=patience_s, missing=lambda: self.under_way, abort=self._abort)

    @property
    def under_way(self) -> int:
        """Frames taken without an answer yet."""
        return self._session.under_way

    async def run(self) -> None:
        """Answer frames until the session is closed, and report to the planner."""
        async with reporting_failures(self._device, self.plan):
            await self._serve()
            await self._finish()

    async def _serve(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._computing.record_span)
            if self._segment.works:
                await self._computing.prepare((self._segment,))
                self._computing.open((self._segment,))
                stack.callback(self._computing.close)
            if self.plan.placement.edge is None:
                await self._compute_all()
                return
            sender = await stack.enter_async_context(self._path.open())
            await self._send_all(sender)
            self._reports.add("link1_s", sender.busy_s, self._answered)

    # --- on the device alone -----------------------------------------------------------------------------------------

    async def _compute_all(self) -> None:
        """Answer every frame here; frames that can be computed at once do not come to this loop."""
        self.window = 1
        self._session.serve(self._compute_now)
        while (taken := await self._session.take()) is not None:
            number, frame = taken
            if (computed := await self._compute_or_refuse(number, frame)) is not None:
                self._answer(number, tensors_of(computed[0]))

    def _compute_now(self, tensors: list[Array]) -> list[Array] | None:
        try:
            computed = self._computing.run_now(self._segment, tensors)
        except InvariantError:
            raise
        except Exception as error:
            raise SampleFailedError(cause_of(error), detail_of(error), repeatable=False) from error
        if computed is None:
            return None
        outputs, took_s = computed
        self._delay_s += took_s
        self._answered += 1
        return outputs

    async def _compute_or_refuse(self, number: int, frame: PushedFrame) -> tuple[Activations, float] | None:
        """What `_compute` returns; None for a frame that the model cannot compute, though it may compute others."""
        assert frame.taken_s is not None
        try:
            return await self._compute(number, frame.tensors, frame.taken_s)
        except InvariantError:
            raise
        except Exception as error:
            self._session.refuse(number, SampleFailedError(cause_of(error), detail_of(error), repeatable=False))
            return None

    async def _compute(self, number: int, tensors: list[Array], ready_s: float) -> tuple[Activations, float]:
        """The outputs of this device's layers, and when they were ready."""
        if not self._segment.works:
            return tensors, ready_s
        return await self._computing.run(self._segment, number, tensors, ready_s)

    # --- through an edge ---------------------------------------------------------------------------------------------

    async def _send_all(self, sender: FrameSender) -> None:
        """Send every frame as the window allows; return when the session is closed and all are answered."""
        self.window = self._window_size()
        self._window.open(self.window)
        self._session.serve()
        while True:
            await self._window.take()  # first, so that frames that no place is free for can still be replaced
            if self._failure:
                raise self._failure
            taken = await self._session.take()
            if self._failure:
                raise self._failure
            if taken is None:
                break
            number, frame = taken
            assert frame.taken_s is not None
            self._path.progress(frame.taken_s)
            if (computed := await self._compute_or_refuse(number, frame)) is None:
                self._window.give()
            else:
                sender.put(Outgoing(number, *computed))
        while self.under_way:
            self._changed.clear()
            await self._changed.wait()
            if self._failure:
                raise self._failure

    def _window_size(self) -> int:
        """Frames that may be under way: few where only the latest counts, else as many as a task's."""
        session, node = self._session, self._device.node
        window = window_of(self.plan, profile_for(node, self.plan.model).cut_bytes)
        placed, terms = session.placed, session.submitted.session
        if session.keep is Keep.ALL or placed is None or terms is None:
            return window
        return min(window, 2 + math.ceil(terms.rate_hz * (placed.delay_s + SLACK_S)))

    def _abort(self, error: Exception) -> None:
        self._failure = error
        self._window.wake()
        self._session.stop()
        self._changed.set()

    def take(self, frame: Frame) -> None:
        """Process a frame of results or a report. Raises `ProtocolError` where the frame is unusable."""
        self._results.take(frame)

    def _take_result(self, number: int, outputs: list[Array]) -> None:
        if self._answer(number, outputs):
            self._path.progress()
            self._window.give()
            self._changed.set()

    def _answer(self, number: int, outputs: list[Array]) -> bool:
        """Answer a frame; returns False for a duplicate."""
        frame = self._session.answer(number, outputs)
        if frame is None:
            self._device.node.status.count("duplicates_suppressed")
            return False
        assert frame.taken_s is not None
        self._delay_s += exact_clock()() - frame.taken_s
        self._answered += 1
        return True

    # --- the end -----------------------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        if self._answered:
            await self._reports.arrive()
        count = max(1, self._answered)
        message = TaskCompleted(
            task_id=self.plan.task_id,
            attempt=self.plan.attempt,
            node=self._device.node.settings.name,
            measured=self._reports.parts().model_copy(update={"device_s": self._computing.busy_s / count}),
            delay_s=self._delay_s / count,
            cloud=self._reports.cloud,
        )
        await self._device.complete(message)
