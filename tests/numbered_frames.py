"""Frames that carry their number, and a runner that computes with them: an answer shows whose it is and what was computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bus.frames import AttemptPlan
from bus.tensors import Array
from stages.runner import ModelledRunner, PaceClock, Station


def frame(number: int, size: int = 64) -> list[Array]:
    """The input of a frame: its number, no layers computed yet."""
    array = np.zeros(size, np.uint8)
    array[:8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
    return [array]


def broken_frame() -> list[Array]:
    """The input of a frame that the model cannot compute."""
    (array,) = frame(0)
    array[9] = 1
    return [array]


def answers(number: int, outputs: list[Array], layers: int = 3) -> bool:
    """Whether these are the outputs of that frame, computed by every layer once."""
    (output,) = outputs
    return output[:8].tobytes() == number.to_bytes(8, "little") and output[8] == layers


class NumberingRunner(ModelledRunner):
    """Takes the profile's times; the outputs have the model's sizes, the input's number, and the layers computed so far."""

    def station(self, plan: AttemptPlan, first: int, last: int, pace: PaceClock) -> Station:
        (profile,) = (profile for profile in self.profiles() if profile.model == plan.model)
        return _Numbering(super().station(plan, first, last, pace), last - first, profile.cut_bytes[last])


class _Numbering:
    waited_s = 0.0

    def __init__(self, inner: Station, layers: int, size: int) -> None:
        self._inner, self._layers, self._size = inner, layers, size

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        await self._inner.run(sample, inputs, ready_s)
        if inputs[0][9]:
            raise RuntimeError("the model cannot compute this frame")
        output = np.zeros(self._size, np.uint8)
        output[:8] = inputs[0][:8]
        output[8] = inputs[0][8] + self._layers
        return [output]

    def run_now(self, inputs: Sequence[Array]) -> list[Array] | None:
        return None

    def close(self) -> None:
        self._inner.close()
