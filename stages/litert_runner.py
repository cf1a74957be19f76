"""The runner that computes: LiteRT in worker threads, at this machine's speed or at that of a slower machine.

With a slowdown, or when paced by the profile of another machine, the runner computes at full speed and returns each result
at the absolute deadline that the slower machine would have met. Otherwise it returns results as soon as they are computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from bus.errors import ConfigError, ModelError, UnknownNameError
from bus.frames import AttemptPlan
from bus.messages import DatasetInput, SeedInput, TaskSubmitted
from bus.tensors import Array
from bus.values import Codec, ModelProfile, TensorSpec
from stages.calibration.batch_times import measure_missing_batches, with_batches
from stages.calibration.stored import with_codecs
from stages.litert_batches import BatchLimits, LitertBatches
from stages.litert_stations import WORKERS, InlineStation, LitertCoder, LitertStation, PacedCoder, PacedStation, Workers
from stages.models.compute_options import BatchMode, ThreadCount
from stages.models.cuts import useful_positions
from stages.models.gpu.accelerator import Accelerator, AcceleratorOptions, RunsSegment
from stages.models.model import Model
from stages.models.profiler import machine_profile
from stages.models.random_samples import random_input
from stages.models.runtime.litert import InterpreterOptions
from stages.models.segments.segment import Segment, SegmentKey
from stages.models.segments.store import SegmentStore, StoreLimits
from stages.models.thread_count import machine_threads, usable_cores
from stages.runner import Coder, PaceClock, Station, profile_of
from stages.zoo.registry import digits

INLINE_S = 0.000_2
"""Shorter computations run on the event loop, because passing them to a thread costs several times as much."""

SAME_SHARE = 0.1
"""A new measurement that differs by a smaller share confirms the old one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """How a runner computes."""

    slowdown: float = 1.0  # the emulated machine is this many times slower than this one
    num_threads: ThreadCount = 1  # LiteRT threads per inference; auto: chosen for each model
    platform: str = "this machine"  # name of the platform in the announced profiles
    paced: bool = False  # results leave at the profile's times even without a slowdown
    remeasure: bool = False  # measure again instead of reading stored measurements
    gpu: AcceleratorOptions | None = None  # when segments run on the GPU; None: never
    batches: BatchMode = "off"  # when samples of a segment are computed together


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a runner is given instead of making it, so that runners of one process share it."""

    stores: Mapping[str, SegmentStore] = field(default_factory=dict)  # by model; the runner makes missing ones
    profiles: Mapping[str, ModelProfile] = field(default_factory=dict)  # by model; other models are measured
    pool: ThreadPoolExecutor | None = None  # None: the runner starts threads of its own
    accelerator: Accelerator | None = None  # None: made from `RunnerOptions.gpu`


class LitertRunner:
    """Computes with LiteRT. The constructor loads and measures the models, which takes seconds: call it in a thread."""

    def __init__(
        self,
        models: Sequence[Model],
        options: RunnerOptions,
        *,
        say: Callable[[str], None] | None = None,
        prepared: Prepared | None = None,
        measured: Callable[..., ModelProfile] = machine_profile,
        threads: Callable[..., int] = machine_threads,
    ) -> None:
        """`say` receives progress messages.

        `measured` and `threads` have the parameters of `machine_profile` and `machine_threads`.
        """
        prepared = prepared or Prepared()
        self._options, self._say, self._measured = options, say, measured
        self._measured_here = {model.name for model in models if model.name not in prepared.profiles}
        self._models = {model.name: model for model in models}
        self._paced = options.paced or options.slowdown > 1.0
        self._pool = prepared.pool or ThreadPoolExecutor(WORKERS, thread_name_prefix="inference")
        self._workers = Workers(self._pool)
        self._owns_pool = prepared.pool is None
        self._batch_mode: BatchMode = "off" if self._paced else options.batches
        self._batches = LitertBatches(self._batch_mode, self._workers)
        self._batches_tried: set[str] = set()  # models whose batches were measured, or could not be
        self._stores = dict(prepared.stores)
        self._profiles: dict[str, ModelProfile] = {}
        self._accelerator = prepared.accelerator
        if options.gpu is not None and self._accelerator is None:
            self._accelerator = Accelerator(options.gpu)
        # one thread of its own, since loads take seconds, one after the other, while other tasks compute
        self._gpu_loader = ThreadPoolExecutor(1, thread_name_prefix="gpu-loader")
        self._num_threads = {
            model.name: threads(model, remeasure=options.remeasure, say=say)
            if options.num_threads == "auto"
            else options.num_threads
            for model in models
        }
        for model in models:
            if model.name not in self._stores:
                interpreters = InterpreterOptions(num_threads=self._num_threads[model.name])
                limits = StoreLimits(replicas=WORKERS)
                self._stores[model.name] = SegmentStore(model, limits=limits, options=interpreters)
                self._stores[model.name].warm(say)
            profile = prepared.profiles.get(model.name)
            if profile is None:
                profile = self._measure(model, again=options.remeasure)
                profile = with_codecs(profile, model, remeasure=options.remeasure, say=say)
                profile = self._with_batches(profile, model, remeasure=options.remeasure)
                profile = self._accelerated(profile, model)
            elif self._accelerator is not None:
                self._accelerator.prepare(self._stores[model.name], 0, model.graph.depth)
            self._profiles[model.name] = self._emulated(profile)
        if self._accelerator is None:  # else its segments are checked as they are placed
            for model in models:
                self._check_batches(model)

    def _check_batches(self, model: Model) -> None:
        """Start the checks of the layers behind each useful cut, which most placements need; the shortest first."""
        depth = model.graph.depth
        for begin in reversed(useful_positions(model.manifest)):
            if begin < depth and self._predicted_s(model.name, begin, depth) >= INLINE_S:
                self._batches.prepare(self._stores[model.name], begin, depth, self._num_threads[model.name])

    def _measure(self, model: Model, *, again: bool) -> ModelProfile:
        return self._measured(model, num_threads=self._num_threads[model.name], remeasure=again, say=self._say)

    def _with_batches(self, profile: ModelProfile, model: Model, *, remeasure: bool = False) -> ModelProfile:
        num_threads = self._num_threads[model.name]
        found = with_batches(profile, model, self._batch_mode, num_threads, remeasure=remeasure, say=self._say)
        if found.executors is None or found is profile:
            return found
        whole = self._stores[model.name].get(0, model.graph.depth)
        return found.model_copy(update={"executors": min(found.executors, whole.interpreters)})

    def unmeasured_batches(self) -> str | None:
        """See `MeasuresBatches`."""
        wanted = self._batches.models() & self._measured_here - self._batches_tried
        return min((name for name in wanted if self._lacks_batches(self._profiles[name])), default=None)

    @staticmethod
    def _lacks_batches(profile: ModelProfile) -> bool:
        return profile.batch is None and profile.accelerator != "gpu"

    async def measure_batches(self, model: str) -> bool:
        """Measure the batches of a model in a thread, unless another process has done so meanwhile."""
        self._batches_tried.add(model)
        loaded, num_threads = self._model(model), self._num_threads[model]
        measure = partial(measure_missing_batches, loaded, num_threads, say=self._say)
        await asyncio.get_running_loop().run_in_executor(None, measure)
        before = self._profiles[model]
        self._profiles[model] = self._with_batches(before, loaded)
        return self._profiles[model] != before

    def _accelerated(self, profile: ModelProfile, model: Model) -> ModelProfile:
        """The profile of this machine with its GPU, if it has one to use."""
        if self._accelerator is None:
            return profile
        found = self._accelerator.profile(profile, self._stores[model.name])
        return found.without_batches() if self._batch_mode == "off" else found

    def _emulated(self, profile: ModelProfile) -> ModelProfile:
        """The profile of the emulated, slower machine."""
        return profile.slowed(self._options.slowdown).model_copy(update={"platform": self._options.platform})

    async def remeasure(self, model: str) -> bool:
        """Measure a model again in a thread, while this process computes nothing else."""
        if model not in self._measured_here:
            return False
        loaded = self._model(model)

        def measure() -> ModelProfile:
            measured = with_codecs(self._measure(loaded, again=True), loaded)
            return self._accelerated(self._with_batches(measured, loaded), loaded)

        found = self._emulated(await asyncio.get_running_loop().run_in_executor(None, measure))
        before_s = sum(self._profiles[model].layer_s)
        if abs(sum(found.layer_s) - before_s) <= SAME_SHARE * before_s:
            return False
        self._profiles[model] = found
        return True

    def profiles(self) -> tuple[ModelProfile, ...]:
        """The profiles that a node announces: measured here and multiplied by the slowdown."""
        return tuple(self._profiles.values())

    def models(self) -> tuple[Model, ...]:
        """The models that it runs."""
        return tuple(self._models.values())

    def gpu_segments(self) -> dict[str, str] | None:
        """Segment -> why it runs on the CPU, or "" if it runs on the GPU; None where the options ask for no GPU."""
        if self._accelerator is None:
            return None
        placements = sorted(self._accelerator.placements().items())
        return {f"{model} {begin + 1}..{end}": placed.reason for (model, begin, end), placed in placements}

    def batch_segments(self) -> dict[str, str] | None:
        """Segment -> why its samples are computed one by one, or "" for batches; None where the options ask for none."""
        return None if self._options.batches == "off" else self._batches.refusals()

    def batch_sizes(self) -> Mapping[int, int]:
        """How many batches were computed, by their number of samples."""
        return self._batches.sizes

    def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
        """Samples of a data set, or random samples from a seed. Raises `UnknownNameError`, `ConfigError`."""
        specs = self._model(task.model).manifest.cuts[0].tensors
        match task.input:
            case DatasetInput(name=name, start=start):
                return _dataset(name, start, specs)
            case SeedInput(seed=seed):
                return lambda sample: [random_input(spec, seed, sample) for spec in specs]
            case _:
                raise ConfigError(
                    f"task {task.task_id}: this device has no input {task.input.handle!r}; it has the data set digits"
                )

    async def prepare(self, plan: AttemptPlan, first: int, last: int) -> None:
        """Slice and load the segment in a thread of its store."""
        model = self._model(plan.model)
        if model.sha256 != plan.sha256:
            raise ModelError(model.name, f"SHA-256 is {model.sha256}, but the plan was made for {plan.sha256}")
        store = self._stores[model.name]
        await store.ready(first, last)
        gpu = self._accelerator
        if gpu is not None and not gpu.is_ready(model.name, first, last):
            load = partial(gpu.prepare, store, first, last)
            await asyncio.get_running_loop().run_in_executor(self._gpu_loader, load)
        if gpu is not None and gpu.holds(model.name, first, last):
            return  # which checks its batches itself
        if self._predicted_s(plan.model, first, last) >= INLINE_S:
            self._batches.prepare(store, first, last, self._num_threads[model.name])

    def station(self, plan: AttemptPlan, first: int, last: int, pace: PaceClock) -> Station:
        """A station on the prepared segment."""
        busy_s = self._predicted_s(plan.model, first, last)
        store = self._stores[plan.model]
        cpu = store.get(first, last)
        segment = cpu if self._accelerator is None else self._accelerator.segment(plan.model, cpu)
        if (batched := self._batched((plan.model, first, last), segment, cpu)) is not None:
            return batched
        here_s = busy_s / self._options.slowdown  # unknown where the profile is that of another machine
        kind = InlineStation if here_s < INLINE_S and not self._options.paced else LitertStation
        station = kind(segment, self._workers)
        return PacedStation(station, busy_s, pace) if self._paced else station

    def _batched(self, key: SegmentKey, segment: RunsSegment, cpu: Segment) -> Station | None:
        """A station that computes in batches; None where the segment, on the GPU or on the CPU, does not."""
        accelerator = self._accelerator
        if segment is not cpu and accelerator is not None:
            return self._batches.station(key, segment, lambda: BatchLimits(accelerator.most_at_once(key), 1))

        def limits() -> BatchLimits | None:
            if (most := self._batches.most(key)) is None:
                return None
            return BatchLimits(most, max(1, min(usable_cores() // self._num_threads[key[0]], cpu.interpreters)))

        return self._batches.station(key, cpu, limits)

    def _predicted_s(self, model: str, first: int, last: int) -> float:
        return sum(profile_of(self._profiles, model).layer_s[first:last])

    def coder(self, plan: AttemptPlan, position: int, codec: Codec, pace: PaceClock) -> Coder:
        """A coder for the model's tensors at a position."""
        cut, profile = self._model(plan.model).manifest.cuts[position], profile_of(self._profiles, plan.model)
        limit_bytes = max(cut.cut_bytes, plan.input_bytes or 0 if position == 0 else 0)
        coder = LitertCoder(codec, cut.tensors, limit_bytes, self._workers)
        return PacedCoder(coder, profile.codec(position, codec), pace) if self._paced else coder

    async def close(self) -> None:
        """Stop the worker threads and the GPU process of this runner."""
        self._batches.close()
        self._gpu_loader.shutdown(wait=False, cancel_futures=True)
        if self._owns_pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._accelerator is not None:
            await asyncio.to_thread(self._accelerator.close)

    def _model(self, name: str) -> Model:
        try:
            return self._models[name]
        except KeyError:
            known = ", ".join(sorted(self._models))
            raise UnknownNameError(f"this node has no model {name!r}; it has {known}") from None


def _dataset(name: str, start: int, specs: Sequence[TensorSpec]) -> Callable[[int], list[Array]]:
    if name != "digits":
        raise UnknownNameError(f"unknown data set {name!r}; the only one is digits")
    images, _ = digits()
    if len(specs) != 1 or specs[0].shape != (1, *images.shape[1:]):
        raise ConfigError(f"digits have the shape (1, 28, 28, 1), but the model takes {[spec.shape for spec in specs]}")
    return lambda sample: [images[(start + sample) % len(images)][np.newaxis]]
