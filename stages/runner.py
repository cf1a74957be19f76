"""The runner port: how a stage computes its part of a model.

`LitertRunner` (stages.litert_runner) computes. `ModelledRunner` sleeps a profile's times on the loop's clock, so that one
machine can emulate a region of a hundred nodes, live or in virtual time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np

from bus.errors import UnknownNameError
from bus.frames import AttemptPlan
from bus.messages import TaskSubmitted
from bus.tensors import Array, Encoded, bytes_in, encoded_limit, heads_of
from bus.values import Codec, ModelProfile
from stages.measuring.clock import exact_clock


class Station(Protocol):
    """Computes one task's samples on one stage, one after the other."""

    @property
    def waited_s(self) -> float:
        """Total time that this task's samples have waited because other tasks used the runner."""

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        """Compute layers first+1..last for a sample whose inputs were ready at `ready_s` (the loop's clock).

        Returns when a platform of the announced speed would be done. Call it for one sample at a time.
        """

    def run_now(self, inputs: Sequence[Array]) -> list[Array] | None:
        """Compute a sample at once, on the event loop; None where that would make other tasks wait too long."""

    def close(self) -> None:
        """Release the station when the task has ended."""


class Coder(Protocol):
    """Encodes or decodes one task's samples at one position, one after the other."""

    @property
    def waited_s(self) -> float:
        """As of a `Station`."""

    async def encode(self, tensors: Sequence[Array], ready_s: float) -> Encoded:
        """Encode a sample that was ready at `ready_s`. Returns when a platform of the announced speed would be done."""

    async def decode(self, encoded: Encoded, ready_s: float) -> list[Array]:
        """Decode a sample. Raises `ProtocolError` where its payload is wrong."""


class Runner(Protocol):
    """Port through which a stage loads and runs models."""

    def profiles(self) -> tuple[ModelProfile, ...]:
        """Profiles of all models on this platform, as the node announces them."""

    def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
        """Return a function from sample number to input tensors. Raises `UnknownNameError`, `ConfigError`."""

    async def prepare(self, plan: AttemptPlan, first: int, last: int) -> None:
        """Prepare layers first+1..last without delaying other tasks.

        Raises `UnknownNameError` for a model it does not have, `ModelError` where the hash differs, `CutError`.
        """

    def station(self, plan: AttemptPlan, first: int, last: int, pace: PaceClock) -> Station:
        """A station for one task's samples; requires a completed `prepare`.

        The stations that share `pace` share the computing time of one platform.
        """

    def coder(self, plan: AttemptPlan, position: int, codec: Codec, pace: PaceClock) -> Coder:
        """A coder for what crosses `position`; requires a `prepare` of any layers. It shares `pace` with the stations."""

    async def remeasure(self, model: str) -> bool:
        """Measure a model on this machine again; returns whether `profiles` has changed. False if it was not measured."""

    async def close(self) -> None:
        """Release threads and memory."""


@runtime_checkable
class UsesGpu(Protocol):
    """A runner that may have a GPU."""

    def gpu_segments(self) -> dict[str, str] | None:
        """Segment -> why it runs on the CPU, or "" if it runs on the GPU; None without a GPU to use."""


class PaceClock:
    """Absolute deadlines of stations that take turns: the emulated platform finishes a sample at max(free, ready) + t.

    With absolute deadlines, a busy host does not distort the emulated platform and timer errors do not add up.
    """

    def __init__(self) -> None:
        self._free_s = float("-inf")

    def done_at(self, ready_s: float, busy_s: float) -> float:
        """When a sample that was ready at `ready_s` and takes `busy_s` is done."""
        self._free_s = max(self._free_s, ready_s) + busy_s
        return self._free_s


async def sleep_until(when_s: float) -> None:
    """Sleep until a time on the loop's clock, even where timers fire early."""
    clock = exact_clock()
    while (left_s := when_s - clock()) > 0:
        await asyncio.sleep(left_s)


@lru_cache(maxsize=64)
def _blank(size_bytes: int) -> Array:
    array = np.zeros(size_bytes, dtype=np.uint8)
    array.flags.writeable = False
    return array


class ModelledRunner:
    """Emulates a platform: each segment sleeps its profile's time and returns as many bytes as the model would."""

    def __init__(self, profiles: Sequence[ModelProfile]) -> None:
        self._profiles = {profile.model: profile for profile in profiles}

    def profiles(self) -> tuple[ModelProfile, ...]:
        """The emulated profiles."""
        return tuple(self._profiles.values())

    def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
        """Inputs of zero bytes, in the size of the task's input."""
        size_bytes = task.input_bytes
        if size_bytes is None:
            size_bytes = profile_of(self._profiles, task.model).cut_bytes[0]
        blank = [_blank(size_bytes)]
        return lambda sample: blank

    async def prepare(self, plan: AttemptPlan, first: int, last: int) -> None:
        """Check that the model has a profile."""
        profile_of(self._profiles, plan.model)

    def station(self, plan: AttemptPlan, first: int, last: int, pace: PaceClock) -> Station:
        """A station that sleeps instead of computing."""
        profile = profile_of(self._profiles, plan.model)
        return _ModelledStation(sum(profile.layer_s[first:last]), profile.cut_bytes[last], pace)

    def coder(self, plan: AttemptPlan, position: int, codec: Codec, pace: PaceClock) -> Coder:
        """A coder that sleeps, and makes as many bytes as the codec does on average."""
        return _ModelledCoder(profile_of(self._profiles, plan.model), position, codec, pace)

    async def remeasure(self, model: str) -> bool:
        """Keep the profile: it is emulated, not measured."""
        return False

    async def close(self) -> None:
        """Do nothing: this runner holds no resources."""


class _ModelledStation:
    waited_s = 0.0  # an emulated platform computes its tasks side by side

    def __init__(self, busy_s: float, output_bytes: int, pace: PaceClock) -> None:
        self._busy_s = busy_s
        self._output = [_blank(output_bytes)]
        self._pace = pace

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        await sleep_until(self._pace.done_at(ready_s, self._busy_s))
        return self._output

    def run_now(self, inputs: Sequence[Array]) -> list[Array] | None:
        return None  # it takes time

    def close(self) -> None:
        pass


class _ModelledCoder:
    waited_s = 0.0

    def __init__(self, profile: ModelProfile, position: int, codec: Codec, pace: PaceClock) -> None:
        self._codec, self._pace = codec, pace
        self._measured = profile.codec(position, codec)
        self._raw_bytes = profile.cut_bytes[position]

    async def encode(self, tensors: Sequence[Array], ready_s: float) -> Encoded:
        measured = self._measured
        await sleep_until(self._pace.done_at(ready_s, measured.encode_s))
        raw_bytes = bytes_in(tensors)  # a task's inputs may differ in size from the model's
        size_bytes = min(raw_bytes * measured.bytes // max(1, self._raw_bytes), encoded_limit(raw_bytes))
        return Encoded(self._codec, heads_of(tensors), _blank(size_bytes).data)

    async def decode(self, encoded: Encoded, ready_s: float) -> list[Array]:
        await sleep_until(self._pace.done_at(ready_s, self._measured.decode_s))
        return [_blank(encoded.raw_bytes)]


def profile_of(profiles: dict[str, ModelProfile], model: str) -> ModelProfile:
    """The profile of a model. Raises `UnknownNameError`."""
    try:
        return profiles[model]
    except KeyError:
        raise UnknownNameError(f"this node has no model {model!r}; it has {', '.join(sorted(profiles))}") from None
