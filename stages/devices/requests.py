"""Requests: plain tasks whose samples an application in the device's process holds, and their results.

The samples are in memory only, so the task has a `HandleInput`: if the device is lost, the task ends as `input_lost`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from bus.messages import Ended, HandleInput, Placed, TaskCompleted, TaskSubmitted
from bus.tensors import Array
from stages.devices.endings import TaskEndedError, end_of


class DeviceClient(Protocol):
    """What a device tells the application's side of a task."""

    submitted: TaskSubmitted

    @property
    def abandoned(self) -> bool:
        """Whether the application has its answers or gave up; the planner may not know yet."""

    def place(self, placed: Placed) -> None:
        """The planner placed the task, or a new attempt at it, or rerouted it."""

    def complete(self, completed: TaskCompleted) -> None:
        """All results are here."""

    def end(self, ended: Ended) -> None:
        """The planner ended the task."""

    def fail(self, cause: str, detail: str, *, repeatable: bool) -> None:
        """The device cannot answer any more."""


class DeviceRequest:
    """One task of an application: created by `Device.submit`."""

    def __init__(self, submitted: TaskSubmitted, samples: Sequence[list[Array]], on_cancel: Callable[[], None]) -> None:
        """Raises ValueError where the samples do not belong to the task."""
        if not isinstance(submitted.input, HandleInput) or submitted.session is not None:
            raise ValueError(f"task {submitted.task_id}: a request has a handle as its input and no session")
        if len(samples) != submitted.samples:
            raise ValueError(
                f"task {submitted.task_id}: {len(samples)} samples are given, the task has {submitted.samples}"
            )
        self.submitted = submitted
        self.placed: Placed | None = None  # the latest placement; None: not placed yet
        self.completed: TaskCompleted | None = None  # what was measured; None: not complete
        self._samples: Sequence[list[Array]] = samples
        self._outputs: dict[int, list[Array]] = {}
        self._error: TaskEndedError | None = None
        self._over = asyncio.Event()
        self._on_cancel = on_cancel

    async def result(self) -> list[list[Array]]:
        """The outputs of every sample, in the order of the samples. Raises `TaskEndedError`."""
        await self._over.wait()
        if self._error is not None:
            raise self._error
        return [self._outputs[sample] for sample in range(self.submitted.samples)]

    def cancel(self) -> None:
        """End the task as cancelled; without effect if it is over."""
        if not self._over.is_set():
            self.fail("cancelled", "the application cancelled the request", repeatable=True)
            self._on_cancel()

    # --- called by the device ----------------------------------------------------------------------------------------

    @property
    def abandoned(self) -> bool:
        """Whether the application has its results or gave up; the planner may not know yet."""
        return self._error is not None

    def inputs(self, sample: int) -> list[Array]:
        """The input tensors of a sample."""
        return self._samples[sample]

    def show(self, task: TaskSubmitted, sample: int, outputs: list[Array]) -> None:
        """Keep the outputs of a sample (`stages.devices.attempt.ResultSink`)."""
        if not self._over.is_set():
            self._outputs[sample] = outputs

    def place(self, placed: Placed) -> None:
        """Keep the placement."""
        self.placed = placed

    def complete(self, completed: TaskCompleted) -> None:
        """All results are here."""
        if not self._over.is_set():
            self.completed = completed
            self._finish()

    def end(self, ended: Ended) -> None:
        """The planner ended the task; without effect if all results are here."""
        cause, detail, repeatable = end_of(ended)
        self.fail(cause, detail, repeatable=repeatable)

    def fail(self, cause: str, detail: str, *, repeatable: bool) -> None:
        """Give up the results that are missing."""
        if not self._over.is_set():
            self._error = TaskEndedError(cause, detail, repeatable=repeatable)
            self._outputs.clear()
            self._finish()

    def _finish(self) -> None:
        self._samples = ()
        self._over.set()
