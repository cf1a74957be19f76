"""A session of an application: an open-ended task whose frames the application pushes one by one.

It is planned once. Frames that are under way when an attempt is replaced are repeated by the next one, so that each frame has
exactly one answer or one error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from bus.messages import Ended, HandleInput, Placed, TaskCompleted, TaskSubmitted
from bus.tensors import Array
from stages.devices.endings import FrameDroppedError, SessionEndedError, UnansweredError, end_of
from stages.measuring.clock import exact_clock

MAX_WAITING = 1024
"""Frames of a session with `Keep.ALL` that may wait; more are dropped with an error."""

Answer = asyncio.Future[list[Array]]
InstantComputing = Callable[[list[Array]], list[Array] | None]
"""Computes a frame at once, or returns None where it would have to wait. Raises `UnansweredError`."""


class Keep(StrEnum):
    """Which frames are kept when they come faster than they are sent."""

    ALL = "all"  # they wait, up to `MAX_WAITING`; beyond it new frames are dropped
    LATEST = "latest"  # only the newest waits; the one that it replaces is dropped


@dataclass(slots=True, eq=False)
class PushedFrame:
    """A frame without an answer."""

    tensors: list[Array]
    answer: Answer
    taken_s: float | None = None  # when the last attempt took it, on the loop's clock; None: none has


class DeviceSession:
    """The application's side of a session: created by `Device.open_session`."""

    def __init__(
        self, submitted: TaskSubmitted, keep: Keep, on_cancel: Callable[[], None], count: Callable[[str], None]
    ) -> None:
        """`count` adds to a counter of the node. Raises ValueError where the task is no session with a handle."""
        if not isinstance(submitted.input, HandleInput) or submitted.session is None:
            raise ValueError(f"task {submitted.task_id}: a session has terms and a handle as its input")
        self.submitted = submitted
        self.placed: Placed | None = None  # the latest placement; None: not placed yet
        self.answered = 0  # frames with an answer
        self.dropped = 0  # frames that ended with `FrameDroppedError`
        self.keep = keep
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[PushedFrame] = deque()
        self._under_way: dict[int, PushedFrame] = {}  # by number in the current attempt
        self._taken = 0  # frames that the current attempt has taken: the next number
        self._closing = False
        self._stopped = False  # the attempt failed
        self._completed = False
        self._error: SessionEndedError | None = None
        self._compute: InstantComputing | None = None
        self._serves = asyncio.Event()  # an attempt takes frames, or the session is over
        self._changed = asyncio.Event()  # a frame waits, or the session closes
        self._over = asyncio.Event()
        self._on_cancel, self._count = on_cancel, count

    # --- called by the application -----------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Frames that wait to be sent."""
        return len(self._waiting)

    @property
    def under_way(self) -> int:
        """Frames that are being computed."""
        return len(self._under_way)

    def push(self, tensors: list[Array]) -> Answer:
        """Push a frame; the future has its outputs, or fails with an `UnansweredError`.

        Raises `SessionEndedError` where the session takes no more frames.
        """
        if self._error is not None or self._closing:
            raise self._error or SessionEndedError("closed", "the session is closed", repeatable=True)
        answer: Answer = self._loop.create_future()
        if self._compute is not None and not self._waiting and not self._under_way:
            try:
                outputs = self._compute(tensors)
            except UnansweredError as error:
                _give_up(answer, error)
                return answer
            if outputs is not None:
                self.answered += 1
                self._count("frames_answered")
                answer.set_result(outputs)
                return answer
        frame = PushedFrame(tensors, answer)
        if self.keep is Keep.LATEST and self._waiting and self._waiting[-1].taken_s is None:
            self._drop(self._waiting.pop(), "a newer frame replaced it")
        elif len(self._waiting) >= MAX_WAITING:
            self._drop(frame, f"{MAX_WAITING} frames wait already")
            return answer
        self._waiting.append(frame)
        answer.add_done_callback(lambda answer: self._forget(frame))
        self._changed.set()
        return answer

    async def ready(self) -> None:
        """Return when frames are computed as they come. Raises `SessionEndedError`."""
        await self._serves.wait()
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Take no more frames; return when all that were pushed have their answer and the session is over."""
        self.drain()
        if self.placed is None and not self._waiting:
            self.cancel()
        await self._over.wait()

    def cancel(self) -> None:
        """End the session now; frames without an answer fail as `cancelled`."""
        if not self._over.is_set():
            self.fail("cancelled", "the application cancelled the session", repeatable=True)
            self._on_cancel()

    def _forget(self, frame: PushedFrame) -> None:
        """Free a frame that the application cancelled while it waited."""
        if frame.answer.cancelled():
            with suppress(ValueError):  # an attempt has taken it
                self._waiting.remove(frame)

    def _drop(self, frame: PushedFrame, why: str) -> None:
        self.dropped += 1
        self._count("frames_dropped")
        _give_up(frame.answer, FrameDroppedError("dropped", why, repeatable=True))

    def drain(self) -> None:
        """Take no more frames, as with `close`, without waiting for the answers under way."""
        self._closing = True
        self._changed.set()

    # --- called by the device ----------------------------------------------------------------------------------------

    def place(self, placed: Placed) -> None:
        """Keep the placement."""
        self.placed = placed

    def complete(self, completed: TaskCompleted) -> None:
        """The session is closed and every frame has its answer."""
        self._completed = True
        self.fail("closed", "the session is closed", repeatable=True)

    def end(self, ended: Ended) -> None:
        """The planner ended the session."""
        cause, detail, repeatable = end_of(ended)
        self.fail(cause, detail, repeatable=repeatable)

    def fail(self, cause: str, detail: str, *, repeatable: bool) -> None:
        """End the session; frames without an answer fail."""
        if self._over.is_set():
            return
        self._error = SessionEndedError(cause, detail, repeatable=repeatable)
        for frame in (*self._under_way.values(), *self._waiting):
            _give_up(frame.answer, self._error)
        self._under_way.clear()
        self._waiting.clear()
        self._compute = None
        for event in (self._over, self._serves, self._changed):
            event.set()

    # --- called by the attempt ---------------------------------------------------------------------------------------

    @property
    def abandoned(self) -> bool:
        """Whether the session is over for the application; the planner may not know yet."""
        return self._error is not None and not self._completed

    def interrupt(self) -> None:
        """The attempt is over: frames under way wait again, before the others."""
        self._compute = None
        if self._error is None:
            self._serves.clear()
        self._waiting.extendleft(reversed(self._under_way.values()))
        self._under_way.clear()
        self._taken = 0
        self._stopped = False
        self._changed.set()

    def stop(self) -> None:
        """Let `take` return None from now on: the attempt failed."""
        self._stopped = True
        self._changed.set()

    def serve(self, compute: InstantComputing | None = None) -> None:
        """The attempt takes frames from now on; with `compute` it answers a frame at once where it can."""
        self._compute = compute
        self._serves.set()

    async def take(self) -> tuple[int, PushedFrame] | None:
        """The next frame and its number in the attempt; None when the session is closed and no frame waits, or stopped."""
        while not self._stopped:
            while self._waiting:
                frame = self._waiting.popleft()
                if frame.answer.done():
                    continue  # the application cancelled it
                frame.taken_s = exact_clock()()
                number = self._taken
                self._taken += 1
                self._under_way[number] = frame
                return number, frame
            if self._closing:
                return None
            self._changed.clear()
            await self._changed.wait()
        return None

    def answer(self, number: int, outputs: list[Array]) -> PushedFrame | None:
        """Answer a frame; returns it, or None if it was answered before."""
        frame = self._under_way.pop(number, None)
        if frame is not None:
            self.answered += 1
            self._count("frames_answered")
            if not frame.answer.done():
                frame.answer.set_result(outputs)
        return frame

    def refuse(self, number: int, error: UnansweredError) -> None:
        """Fail the frame that was taken last and not sent. The next one gets its number."""
        if (frame := self._under_way.pop(number, None)) is not None:
            self._taken = number
            _give_up(frame.answer, error)


def _give_up(answer: Answer, error: UnansweredError) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()  # asyncio must not warn where the application has lost interest
