"""The runner that computes: LiteRT in worker threads, at this machine's speed or at that of a slower one.

`slowdown` makes it play a machine so many times slower than this one: the inference runs, and its result is handed over at
the absolute deadline that the slower machine would have kept. At 1.0 nothing is played, results leave when they are there,
unless the times of another machine are given, to be `paced` by.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bus.errors import ConfigError, ModelError, UnknownNameError
from bus.frames import Plan
from bus.messages import DatasetInput, SeedInput, TaskSubmitted
from bus.tensors import Array
from bus.values import ModelProfile, TensorSpec
from stages.models.model import Model
from stages.models.profiler import machine_profile
from stages.models.segments import Segment, SegmentStore
from stages.runner import Pace, Station, profile_of, sleep_until
from stages.zoo import digits

WORKERS = 4 * max(2, os.cpu_count() or 1)
"""More threads than cores: the operating system shares them out, so that a digit does not queue behind a photograph."""


INLINE_S = 0.000_2
"""Work that takes less is done on the event loop: handing it to a thread and back would cost several times as much."""

BREATH_S = 0.001
"""After so much work on the event loop others get their turn."""


class LitertRunner:
    """Computes with LiteRT. Models are loaded and measured when it is built, which takes seconds; do that in a thread."""

    def __init__(
        self,
        models: Sequence[Model],
        *,
        slowdown: float = 1.0,
        num_threads: int = 1,
        platform: str = "this machine",
        say: Callable[[str], None] | None = None,
        stores: Mapping[str, SegmentStore] | None = None,
        profiles: Mapping[str, ModelProfile] | None = None,
        paced: bool = False,
        remeasure: bool = False,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        self._models = {model.name: model for model in models}
        self._paced = paced or slowdown > 1.0
        self._pool = pool or ThreadPoolExecutor(WORKERS, thread_name_prefix="inference")
        self._owns_pool = pool is None
        self._stores = dict(stores or {})
        self._profiles: dict[str, ModelProfile] = {}
        for model in models:
            if model.name not in self._stores:
                self._stores[model.name] = SegmentStore(model, num_threads=num_threads, replicas=WORKERS)
                self._stores[model.name].warm(say)
            measured = (profiles or {}).get(model.name) or machine_profile(
                model, num_threads=num_threads, remeasure=remeasure, say=say
            )
            layer_s = tuple(seconds * slowdown for seconds in measured.layer_s)
            self._profiles[model.name] = measured.model_copy(update={"platform": platform, "layer_s": layer_s})

    def profiles(self) -> tuple[ModelProfile, ...]:
        """What a node announces: measured here, stretched by the slowdown."""
        return tuple(self._profiles.values())

    def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
        """Samples of a data set, or drawn from a seed. Raises `UnknownNameError`, `ConfigError`."""
        specs = self._model(task.model).manifest.cuts[0].tensors
        match task.input:
            case DatasetInput(name=name, start=start):
                return _dataset(name, start, specs)
            case SeedInput(seed=seed):
                return lambda sample: [_drawn(spec, seed, sample) for spec in specs]
            case _:
                raise ConfigError(f"task {task.task_id}: this device holds no input {task.input.handle!r}")

    async def prepare(self, plan: Plan, first: int, last: int) -> None:
        """Cut and load the segment, in a thread of its store."""
        model = self._model(plan.model)
        if model.sha256 != plan.sha256:
            raise ModelError(model.name, f"its SHA-256 is {model.sha256}, the plan is for {plan.sha256}")
        await self._stores[model.name].ready(first, last)

    def station(self, plan: Plan, first: int, last: int) -> Station:
        """A station on the prepared segment."""
        played_s = sum(profile_of(self._profiles, plan.model).layer_s[first:last])
        segment = self._stores[plan.model].get(first, last)
        if self._paced:
            return _PlayedStation(segment, self._pool, played_s)
        kind = _InlineStation if played_s < INLINE_S else _LitertStation
        return kind(segment, self._pool)

    async def close(self) -> None:
        """Stop the worker threads that this runner created."""
        if self._owns_pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _model(self, name: str) -> Model:
        try:
            return self._models[name]
        except KeyError:
            there = ", ".join(sorted(self._models))
            raise UnknownNameError(f"no model {name!r} here; there are {there}") from None


class _LitertStation:
    """Computes in a worker thread and returns the result as soon as it is computed."""

    def __init__(self, segment: Segment, pool: ThreadPoolExecutor) -> None:
        self._segment = segment
        self._pool = pool

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._segment.run, inputs)

    def close(self) -> None:
        self._segment.release()


class _PlayedStation(_LitertStation):
    """Computes in a worker thread and returns the result when the emulated slower machine would."""

    def __init__(self, segment: Segment, pool: ThreadPoolExecutor, busy_s: float) -> None:
        super().__init__(segment, pool)
        self._busy_s = busy_s
        self._pace = Pace()

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        outputs = await super().run(sample, inputs, ready_s)
        await sleep_until(self._pace.deadline(ready_s, self._busy_s))
        return outputs


class _InlineStation(_LitertStation):
    """Computes on the event loop, for layers that are done before a thread would wake up; in a thread all the same where the
    loop would have to wait for an interpreter, or load one.
    """

    def __init__(self, segment: Segment, pool: ThreadPoolExecutor) -> None:
        super().__init__(segment, pool)
        self._breathed_s = time.perf_counter()

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        if time.perf_counter() - self._breathed_s > BREATH_S:
            await asyncio.sleep(0)
            self._breathed_s = time.perf_counter()
        if not self._segment.idle:  # asked last: while others had their turn, one may have taken the interpreter
            return await super().run(sample, inputs, ready_s)
        return self._segment.run(inputs)


def _dataset(name: str, start: int, specs: Sequence[TensorSpec]) -> Callable[[int], list[Array]]:
    if name != "digits":
        raise UnknownNameError(f"no data set {name!r}; there is digits")
    images, _ = digits()
    if len(specs) != 1 or specs[0].shape != (1, *images.shape[1:]):
        raise ConfigError(f"the model takes {[spec.shape for spec in specs]}, a digit is (1, 28, 28, 1)")
    return lambda sample: [images[(start + sample) % len(images)][np.newaxis]]


def _drawn(spec: TensorSpec, seed: int, sample: int) -> Array:
    """One input tensor: normal for floats, the whole range for small integers, 0 or 1 for wide ones (often indices)."""
    rng = np.random.default_rng([seed, sample])
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return rng.standard_normal(spec.shape).astype(dtype)
    if dtype.kind in "iu" and dtype.itemsize <= 2:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, spec.shape, dtype, endpoint=True)
    return rng.integers(0, 2, spec.shape).astype(dtype)
