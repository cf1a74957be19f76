"""A device for the tests of `DeviceInference`: its sessions and tasks double every input."""

from __future__ import annotations

from collections.abc import Sequence

from bus.messages import Ended, Placed, PlacedSession, TaskCompleted, TaskState, TaskSubmitted
from bus.tensors import Array
from bus.values import Execution, Kind, Objective, Parts, Placement
from stages.devices.requests import DeviceRequest
from stages.devices.session import DeviceSession, Keep

ALONE = Placement(kind=Kind.DEVICE, cut1=2, cut2=2, cut1_name="b", cut2_name="b")


def placed(task: TaskSubmitted) -> Placed:
    """A placement on the device alone."""
    return Placed(
        task_id=task.task_id,
        attempt=1,
        device=task.device,
        model=task.model,
        sha256="0" * 64,
        samples=task.samples,
        policy="p",
        objective=Objective.PIPELINED,
        execution=Execution.STREAMING,
        placement=ALONE,
        start_s=0.0,
        wait_s=0.0,
        delay_s=0.5,
        parts=Parts(device_s=0.25),
        session=None if task.session is None else PlacedSession(rate_hz=task.session.rate_hz),
    )


class FakeDevice:
    """Places every session and task at once, unless `held`; computes frames at once, unless `slow`."""

    def __init__(self) -> None:
        self.sessions: list[DeviceSession] = []
        self.requests: list[DeviceRequest] = []
        self.cancelled: list[str] = []
        self.refused: Ended | None = None  # how sessions end instead of being placed
        self.held = False
        self.slow = False

    def open_session(self, submitted: TaskSubmitted, keep: Keep = Keep.ALL) -> DeviceSession:
        session = DeviceSession(submitted, keep, lambda: self.cancelled.append(submitted.task_id), lambda counter: None)
        self.sessions.append(session)
        if self.refused is not None:
            session.end(self.refused)
        elif not self.held:
            self.place(session)
        return session

    def place(self, session: DeviceSession) -> None:
        """Let a session take frames."""
        session.place(placed(session.submitted))
        session.serve(lambda tensors: None if self.slow else [tensor + tensor for tensor in tensors])

    def complete(self, session: DeviceSession) -> None:
        """End a session that its owner has closed."""
        session.complete(completed(session.submitted))

    def submit(self, submitted: TaskSubmitted, samples: Sequence[list[Array]]) -> DeviceRequest:
        request = DeviceRequest(submitted, list(samples), lambda: self.cancelled.append(submitted.task_id))
        self.requests.append(request)
        if not self.held:
            request.place(placed(submitted))
            for number, tensors in enumerate(samples):
                request.show(submitted, number, [tensor + tensor for tensor in tensors])
            request.complete(completed(submitted))
        return request


def completed(task: TaskSubmitted) -> TaskCompleted:
    """The report of a task with all its results."""
    return TaskCompleted(
        task_id=task.task_id, attempt=1, node=task.device, measured=Parts(device_s=0.125), delay_s=0.375, wait_s=0.0625
    )


def rejected(task_id: str = "t", cause: str = "never_fits") -> Ended:
    """The end of a session that the planner does not place."""
    return Ended(task_id=task_id, attempt=1, state=TaskState.REJECTED, cause=cause, detail="no edge is fast enough")
