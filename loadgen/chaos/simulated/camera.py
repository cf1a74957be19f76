"""Cameras of the simulated campaign: applications in the devices' processes that push frames through sessions.

A camera's record survives its process. Each frame that was pushed must have one answer with the content of that frame, or one
error that the faults explain.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from functools import partial

from bus.messages import HandleInput, SessionTerms, TaskSubmitted
from bus.tensors import Array
from loadgen.chaos.simulated.oracle import Say
from loadgen.chaos.simulated.region import LAYER_S, frame_content, same_frame
from loadgen.sim.region import MODEL
from stages.devices.device import Device
from stages.devices.endings import FrameDroppedError, SessionEndedError
from stages.devices.session import DeviceSession, Keep

REST_S = 4.0
"""Longest pause between two sessions of a camera."""


class CameraRecord:
    """What the cameras of a region pushed, and what came back."""

    def __init__(self, say: Say, note: Callable[..., None]) -> None:
        self.sessions: list[TaskSubmitted] = []
        self.running: set[str] = set()  # devices whose camera has not come to its end
        self.outcomes: Counter[str] = Counter()  # frames by outcome: answered, dropped, or the cause of the error
        self.causes: dict[str, set[str]] = {}  # causes of errors, by session
        self._open: dict[tuple[str, int], str] = {}  # frames without an outcome, and their device
        self._say, self._note = say, note

    def begin(self, device: str) -> None:
        """A process of a device starts: the frames of its last process died with it."""
        self.running.add(device)
        for key in [key for key, owner in self._open.items() if owner == device]:
            del self._open[key]
            self.outcomes["killed"] += 1

    def opened(self, submitted: TaskSubmitted) -> None:
        """Note a session before it is submitted."""
        self.sessions.append(submitted)
        self.causes[submitted.task_id] = set()
        self._note("session", submitted.task_id)

    def pushed(self, device: str, session_id: str, number: int, answer: asyncio.Future[list[Array]]) -> None:
        """Note a frame."""
        self._open[session_id, number] = device
        if answer.done():
            self._outcome(session_id, number, answer)
        else:
            answer.add_done_callback(partial(self._outcome, session_id, number))

    def _outcome(self, session_id: str, number: int, answer: asyncio.Future[list[Array]]) -> None:
        if self._open.pop((session_id, number), None) is None:
            return  # of a process that was killed
        error = answer.exception()
        if error is None:
            self.outcomes["answered"] += 1
            if not same_frame(answer.result(), session_id, number, len(LAYER_S)):
                self._say("G5", f"{session_id}: frame {number} was answered with wrong content")
        elif isinstance(error, FrameDroppedError):
            self.outcomes["dropped"] += 1
        elif isinstance(error, SessionEndedError):
            self.outcomes[error.cause] += 1
            self.causes[session_id].add(error.cause)
        else:
            self._say("G5", f"{session_id}: frame {number} failed with {error!r}")

    @property
    def unanswered(self) -> list[tuple[str, int]]:
        """Frames without an answer or an error."""
        return sorted(self._open)


class Camera:
    """The application of one device: opens one session after the other until a time on the loop's clock."""

    def __init__(self, device: str, draw: random.Random, record: CameraRecord, lasts_s: float) -> None:
        self._name, self._draw, self._record, self._lasts_s = device, draw, record, lasts_s
        self._until_s: float | None = None
        self._count = 0

    async def run(self, device: Device) -> None:
        """Run in the device's process until all sessions are over."""
        self._record.begin(self._name)
        await device.node.serving.wait()
        clock = asyncio.get_running_loop().time
        if self._until_s is None:
            self._until_s = clock() + self._lasts_s
        while clock() < self._until_s:
            await asyncio.sleep(self._draw.uniform(0.1, REST_S))
            await self._film(device)
        self._record.running.discard(self._name)

    async def _film(self, device: Device) -> None:
        """Open a session, push frames at its rate or faster, and close it."""
        draw = self._draw
        self._count += 1
        task_id = f"{self._name}s{self._count}"
        rate_hz = draw.choice([2.0, 4.0, 8.0])
        submitted = TaskSubmitted(
            task_id=task_id,
            device=self._name,
            model=MODEL,
            samples=1,
            input=HandleInput(handle=task_id),
            session=SessionTerms(rate_hz=rate_hz),
        )
        self._record.opened(submitted)
        session = device.open_session(submitted, draw.choice(list(Keep)))
        try:
            await self._push(session, task_id, rate_hz * draw.choice([1.0, 1.0, 3.0]), draw.randint(1, 40))
            await session.close()
        except SessionEndedError as error:
            self._record.causes[task_id].add(error.cause)

    async def _push(self, session: DeviceSession, task_id: str, rate_hz: float, count: int) -> None:
        for number in range(count):
            answer = session.push([frame_content(task_id, number, 0)])
            self._record.pushed(self._name, task_id, number, answer)
            await asyncio.sleep(1.0 / rate_hz)
