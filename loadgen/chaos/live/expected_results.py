"""Expected result of each sample: the output of the uncut model, computed once per digit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bus.messages import DatasetInput, TaskSubmitted
from stages.models.runtime.litert import SegmentRunner
from stages.zoo.registry import digits, load_model


@dataclass(frozen=True, slots=True)
class Answer:
    """The expected result of one sample."""

    payload: bytes  # the output tensor's bytes, as in a frame
    top: int  # index of the largest output, as in a device's result file


class Answers:
    """The results of LeNet on the digits, by task and sample."""

    def __init__(self) -> None:
        whole = SegmentRunner(load_model("lenet").source)
        outputs = [whole.run([image[np.newaxis]])[0] for image in digits()[0]]
        self._known = [Answer(output.tobytes(), int(np.argmax(output))) for output in outputs]
        self._starts: dict[str, int] = {}

    def expect(self, task: TaskSubmitted) -> None:
        """Register a submitted task."""
        assert isinstance(task.input, DatasetInput)
        self._starts[task.task_id] = task.input.start

    def of(self, task_id: str, sample: int) -> Answer | None:
        """The correct result; None for a task of another run. Sample numbers wrap around at the end of the data set."""
        start = self._starts.get(task_id)
        return None if start is None else self._known[(start + sample) % len(self._known)]
