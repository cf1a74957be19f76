"""The runner port: how a stage computes its part of a model.

`LitertRunner` (stages.litert_runner) computes. `ModelledRunner` sleeps a profile's times on the loop's clock, so that one
machine can emulate a region of a hundred nodes, live or in virtual time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from bus.errors import UnknownNameError
from bus.frames import AttemptPlan
from bus.messages import TaskSubmitted
from bus.tensors import Array, Encoded, bytes_in, encoded_limit, heads_of
from bus.values import Codec, ModelProfile
from stages.batches import Batcher, Computed
from stages.measuring.clock import exact_clock

MOST_AT_ONCE = 8
"""Samples of one task that are computed together: more would gain little, and delay those of other tasks."""


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


@runtime_checkable
class BatchStation(Station, Protocol):
    """A station whose samples may be computed together, also with samples of other tasks."""

    @property
    def most_at_once(self) -> int:
        """How many samples of its task should be submitted before the first of them is done."""

    def submit(self, sample: int, inputs: Sequence[Array], ready_s: float) -> asyncio.Future[Computed[list[Array]]]:
        """Like `run`, for several samples at a time, which end in any order. Cancel the future to drop the sample."""


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


@runtime_checkable
class ComputesBatches(Protocol):
    """A runner that may compute samples of a segment together."""

    def batch_segments(self) -> dict[str, str] | None:
        """Segment -> why its samples are computed one by one, or "" for batches; None where no batches are wanted."""

    def batch_sizes(self) -> Mapping[int, int]:
        """How many batches were computed, by their number of samples."""


@runtime_checkable
class MeasuresBatches(Protocol):
    """A runner that measures how fast it computes batches."""

    def unmeasured_batches(self) -> str | None:
        """A model that it computes in batches and whose profile lacks them; None: there is none, or no need to measure it."""

    async def measure_batches(self, model: str) -> bool:
        """Measure this model, once; returns whether `profiles` has changed."""


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


async def waited_for(submitted: asyncio.Future[Computed[list[Array]]]) -> tuple[list[Array], float]:
    """The outputs of a sample that was just submitted, and for how long other samples delayed it."""
    clock = exact_clock()
    begin_s = clock()
    outputs, busy_s, _ = await submitted
    return outputs, max(0.0, clock() - begin_s - busy_s)


@lru_cache(maxsize=64)
def _blank(size_bytes: int) -> Array:
    array = np.zeros(size_bytes, dtype=np.uint8)
    array.flags.writeable = False
    return array


class ModelledSample(NamedTuple):
    """A sample in a batch of an emulated platform, with layers first+1..last to compute."""

    plan: AttemptPlan
    first: int
    last: int
    sample: int  # its number in the task
    inputs: Sequence[Array]
    ready_s: float  # when the inputs were ready, on the loop's clock


ModelledBatcher: TypeAlias = Batcher[ModelledSample, list[Array]]


class ModelledRunner:
    """Emulates a platform: each segment sleeps its profile's time and returns as many bytes as the model would.

    Samples are computed in batches where the profile has times of batches.
    """

    def __init__(self, profiles: Sequence[ModelProfile], batcher: Callable[..., ModelledBatcher] = Batcher) -> None:
        """`batcher` has the parameters of `Batcher`."""
        self._profiles = {profile.model: profile for profile in profiles}
        self._make_batcher = batcher
        self._batchers: dict[tuple[str, int, int], ModelledBatcher] = {}  # by model and layers

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
        work = _ModelledWork(self, plan, first, last)
        if not profile.batch:
            return _ModelledStation(work, sum(profile.layer_s[first:last]), pace)
        key = (plan.model, first, last)
        if key not in self._batchers:
            executors = profile.executors or 1
            platform = _ModelledBatches(partial(profile.together_s, first=first, last=last), self.compute, executors)
            self._batchers[key] = self._make_batcher(platform.run, executors=executors)
        return _ModelledBatchStation(work, self._batchers[key])

    def compute(self, one: ModelledSample) -> list[Array]:
        """The outputs of a sample whose time has passed."""
        return [_blank(profile_of(self._profiles, one.plan.model).cut_bytes[one.last])]

    def closed(self, plan: AttemptPlan) -> None:
        """Called when a station of an attempt has been closed."""

    def coder(self, plan: AttemptPlan, position: int, codec: Codec, pace: PaceClock) -> Coder:
        """A coder that sleeps, and makes as many bytes as the codec does on average."""
        return _ModelledCoder(profile_of(self._profiles, plan.model), position, codec, pace)

    async def remeasure(self, model: str) -> bool:
        """Keep the profile: it is emulated, not measured."""
        return False

    async def close(self) -> None:
        """Do nothing: this runner holds no resources."""


class _ModelledWork(NamedTuple):
    """What a station computes: layers first+1..last of an attempt."""

    runner: ModelledRunner
    plan: AttemptPlan
    first: int
    last: int

    def sample(self, number: int, inputs: Sequence[Array], ready_s: float) -> ModelledSample:
        return ModelledSample(self.plan, self.first, self.last, number, inputs, ready_s)

    def close(self) -> None:
        self.runner.closed(self.plan)


class _ModelledStation:
    waited_s = 0.0  # an emulated platform computes its tasks side by side

    def __init__(self, work: _ModelledWork, busy_s: float, pace: PaceClock) -> None:
        self._work, self._busy_s, self._pace = work, busy_s, pace

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        await sleep_until(self._pace.done_at(ready_s, self._busy_s))
        return self._work.runner.compute(self._work.sample(sample, inputs, ready_s))

    def run_now(self, inputs: Sequence[Array]) -> list[Array] | None:
        return None  # it takes time

    def close(self) -> None:
        self._work.close()


class _ModelledBatches:
    """Emulates the executors of one platform for one segment."""

    def __init__(
        self, together_s: Callable[[int], float], compute: Callable[[ModelledSample], list[Array]], executors: int
    ) -> None:
        """`together_s`: the time of a batch by the number of its samples."""
        self._together_s, self._compute = together_s, compute
        self._idle = deque(PaceClock() for _ in range(executors))

    async def run(self, batch: Sequence[ModelledSample]) -> tuple[list[list[Array]], float]:
        busy_s = self._together_s(len(batch))
        executor = self._idle.popleft()
        try:
            await sleep_until(executor.done_at(max(one.ready_s for one in batch), busy_s))
        finally:
            self._idle.append(executor)
        return [self._compute(one) for one in batch], busy_s


class _ModelledBatchStation:
    """A station on an emulated platform that computes in batches."""

    most_at_once = MOST_AT_ONCE

    def __init__(self, work: _ModelledWork, batcher: ModelledBatcher) -> None:
        self._work, self._batcher = work, batcher
        self.waited_s = 0.0

    def submit(self, sample: int, inputs: Sequence[Array], ready_s: float) -> asyncio.Future[Computed[list[Array]]]:
        return self._batcher.submit(self._work.sample(sample, inputs, ready_s))

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        outputs, waited_s = await waited_for(self.submit(sample, inputs, ready_s))
        self.waited_s += waited_s
        return outputs

    def run_now(self, inputs: Sequence[Array]) -> list[Array] | None:
        return None  # it takes time

    def close(self) -> None:
        self._work.close()


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
