"""The profiler, which measures how long this machine takes for every layer of a model.

The runtime does not time operators, so the profiler cuts out every layer, times it on the values that it receives in the
model, times the whole model, and scales the layers' times so that they add up to the whole. It times only the computation:
a layer inside a segment does not copy tensors in or out. Layers that cannot be separated are timed together and share the
time in proportion to their work.

Three measures keep other load out of a stored profile: measurements on a machine take turns (`measuring_alone`), a single
thread is timed by its processor time, and a measurement is repeated until the whole and the sum of its slices agree
(`measure_steadily`).
"""

from __future__ import annotations

import contextlib
import platform as machine
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np

from bus.errors import ConfigError, ModelError
from bus.values import ModelProfile
from stages.models.files.cache import cache_dir, locked, measured_path, write_whole
from stages.models.model import Model
from stages.models.runtime.litert import SegmentRunner
from stages.models.sandbox import Sandbox
from stages.models.slicer import slice_model
from stages.models.verify import random_inputs, run_part

Step = Callable[[str, int, int], None]
"""Receives what is being measured, the parts done, and the total of parts."""

Say = Callable[[str], None]
"""Receives a line of text for the user."""

METHOD = 2
"""Version of the method. Increase it when measuring or cutting changes: profiles of other versions are measured again."""

TOLERANCE = 0.25
"""Allowed difference between the whole and the sum of its slices, as a share of the whole; `CALL_S` per slice is added."""

CALL_S = 0.000_001
"""Time to start one slice."""

MAX_TRIES = 5
"""Maximum number of measurements of one model; after them the shortest times are used."""


@dataclass(frozen=True)
class LayerTime:
    """The measured time of one layer."""

    position: int  # 1..l
    name: str  # as in the manifest
    kind: str  # e.g. "CONV_2D"
    median_s: float  # of its one-layer slice, unscaled
    spread_s: float  # interquartile range of its runs
    output_bytes: int  # size of its outputs


@dataclass(frozen=True)
class Measurement:
    """The measured times of one model, before scaling."""

    model: Model
    whole_s: float  # median time of the whole model
    whole_spread_s: float  # interquartile range
    layers: tuple[LayerTime, ...]

    @property
    def sum_of_slices_s(self) -> float:
        """The sum of the layers' medians."""
        return sum(layer.median_s for layer in self.layers)

    @property
    def agrees(self) -> bool:
        """Whether the whole and the sum of its slices agree within `TOLERANCE`."""
        allowed_s = TOLERANCE * self.whole_s + CALL_S * len(self.layers)
        return abs(self.sum_of_slices_s - self.whole_s) <= allowed_s

    def least(self, other: Measurement) -> Measurement:
        """The smaller of each pair of times from two measurements, because other load can only lengthen a time."""
        whole = min(self, other, key=lambda one: one.whole_s)
        layers = tuple(min(pair, key=lambda row: row.median_s) for pair in zip(self.layers, other.layers, strict=True))
        return replace(self, whole_s=whole.whole_s, whole_spread_s=whole.whole_spread_s, layers=layers)

    def profile(self, platform: str) -> ModelProfile:
        """The profile that a node announces; its layer times add up to the time of the whole."""
        scale = self.whole_s / self.sum_of_slices_s if self.sum_of_slices_s else 1.0
        manifest = self.model.manifest
        return ModelProfile(
            model=manifest.model,
            sha256=manifest.sha256,
            platform=platform,
            layer_names=tuple(layer.name for layer in self.layers),
            layer_s=tuple(layer.median_s * scale for layer in self.layers),
            cut_bytes=tuple(cut.cut_bytes for cut in manifest.cuts),
            forbidden=tuple(sorted(self.model.graph.blocked)),
            whole_s=self.whole_s,
            sum_of_slices_s=self.sum_of_slices_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRuns:
    """How often each part of a model runs, and with how many threads. Raises `ConfigError` for numbers that are too low."""

    num_threads: int = 1
    num_runs: int = 10  # timed runs
    warmup_runs: int = 1  # untimed runs before them

    def __post_init__(self) -> None:
        if self.num_runs < 1 or self.warmup_runs < 0 or self.num_threads < 1:
            raise ConfigError("a profile needs at least one run, one thread, and zero or more warm-up runs")


TEN_RUNS = TimedRuns()


def measure(
    model: Model,
    runs: TimedRuns = TEN_RUNS,
    *,
    seed: int = 0,
    step: Step | None = None,
    sandbox: Sandbox | None = None,
) -> Measurement:
    """Times the whole model and every layer.

    `sandbox` admits each layer before it runs; the default is a new one. Raises `ModelError` if the model cannot run here.
    """
    graph = model.graph
    values = random_inputs(model, np.random.default_rng(seed))

    def timed(runner: SegmentRunner, inputs: list[np.ndarray]) -> tuple[float, float]:
        for _ in range(runs.warmup_runs):
            runner.timed(inputs)
        return _median_and_spread([runner.timed(inputs) for _ in range(runs.num_runs)])

    bounds = [position for position in range(graph.depth + 1) if position not in graph.blocked]
    if step is not None:
        step("the whole", 0, len(bounds))
    given = dict(zip(graph.inputs, values, strict=True))
    whole = SegmentRunner(model.source, runs.num_threads, title=str(model.path))
    whole_s, whole_spread_s = timed(whole, [given[tensor] for tensor in graph.whole_inputs])
    del whole

    rows: list[LayerTime] = []
    with sandbox or Sandbox(model) as sandbox:
        for number, (begin, end) in enumerate(pairwise(bounds), start=1):
            layers = graph.layers[begin:end]
            if step is not None:
                step(layers[0].name, number, len(bounds))
            part = slice_model(model, begin + 1, end)
            data = part.to_bytes()
            sandbox.admit(part, data)
            runner = SegmentRunner(data, runs.num_threads, title=f"{model.name} {begin + 1}..{end}")
            known = {spec.name: value for spec, value in zip(part.inputs, values, strict=True)}
            median_s, spread_s = timed(runner, [known[name] for name in part.reads])
            values = run_part(part, runner, values)
            total = sum(layer.work for layer in layers)
            for layer in layers:
                share = layer.work / total if total else 1 / len(layers)
                row = LayerTime(
                    layer.position, layer.name, layer.kind, median_s * share, spread_s * share, layer.output_bytes
                )
                rows.append(row)
    if step is not None:
        step("done", len(bounds), len(bounds))
    return Measurement(model, whole_s, whole_spread_s, tuple(rows))


Measure = Callable[..., Measurement]
"""Takes one measurement of a model, with the parameters of `measure`."""


def measure_steadily(
    model: Model,
    runs: TimedRuns = TEN_RUNS,
    *,
    step: Step | None = None,
    say: Say | None = None,
    take: Measure = measure,
) -> Measurement:
    """Repeats the measurement `take` until the whole and the sum of its slices agree, at most `MAX_TRIES` times.

    Several measurements are combined by their shortest times. If they never agree, `say` receives a warning.
    """

    def once() -> Measurement:
        return take(model, runs, step=step)

    found = once()
    for _ in range(MAX_TRIES - 1):
        if found.agrees:
            return found
        found = found.least(once())
    if not found.agrees and say is not None:
        say(
            f"{model.name} takes {found.whole_s * 1e3:.3g} ms in one piece and {found.sum_of_slices_s * 1e3:.3g} ms in "
            f"slices after {MAX_TRIES} measurements: its profile is uncertain; measure again on an idle machine "
            "(deepar profile, or --remeasure of a stage)"
        )
    return found


@contextlib.contextmanager
def measuring_alone(say: Say | None = None, pause: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock that lets only one of this user's processes on this machine measure at a time.

    `pause`: see `locked`.
    """
    with contextlib.ExitStack() as stack:
        try:
            waiting = "waiting for another process that is measuring this machine"
            on_wait = None if say is None else lambda: say(waiting)
            stack.enter_context(locked(cache_dir("profiles") / "measuring", on_wait, pause))
        except OSError as error:
            if say is not None:
                say(f"measuring without the lock that prevents parallel measurements: {error}")
        yield


def machine_profile(
    model: Model,
    *,
    num_threads: int = 1,
    remeasure: bool = False,
    say: Say | None = None,
    cache: ProfileCache | None = None,
    take: Measure = measure,
) -> ModelProfile:
    """The profile of this machine from the `cache`, measured with `take` if it is missing or `remeasure` is set."""
    cache = cache or ProfileCache()
    if not remeasure and (known := cache.find(model, num_threads)) is not None:
        return known
    with measuring_alone(say):
        if not remeasure and (known := cache.find(model, num_threads)) is not None:
            return known  # measured by the process that held the lock
        if say is not None:
            say(f"measuring {model.name} on this machine" + ("" if remeasure else ", once"))
        found = measure_steadily(model, TimedRuns(num_threads=num_threads, num_runs=5), say=say, take=take)
        return cache.store(found, num_threads=num_threads, say=say)


@dataclass(frozen=True, slots=True)
class ProfileCache:
    """The stored profiles of this user.

    The key is the processor's name, the thread count, the model's hash, the runtime's version and the method's version.
    """

    processor: str = field(default_factory=lambda: processor_name())
    method: int = METHOD

    def store(self, found: Measurement, *, num_threads: int, say: Say | None = None) -> ModelProfile:
        """Stores a measurement as the profile of this machine; `say` receives a warning if the cache cannot be written."""
        profile = found.profile(self.processor)
        path = self._path(found.model, num_threads)
        try:
            write_whole(path, [profile.model_dump_json(indent=2).encode()], durable=False)
        except ModelError as error:
            if say is not None:
                say(f"the profile was not stored: {error}")
        return profile

    def find(self, model: Model, num_threads: int) -> ModelProfile | None:
        """The stored profile of a model, under the model's present name; None if there is none."""
        with contextlib.suppress(OSError, ValueError):
            found = ModelProfile.model_validate_json(self._path(model, num_threads).read_bytes())
            if found.sha256 == model.sha256:
                return found.model_copy(update={"model": model.name})
        return None

    def _path(self, model: Model, num_threads: int) -> Path:
        runtime = metadata.version("ai-edge-litert")
        return measured_path(model.name, [str(self.method), self.processor, str(num_threads), model.sha256, runtime])


def _median_and_spread(times_s: list[float]) -> tuple[float, float]:
    if len(times_s) < 2:
        return times_s[0], 0.0
    low, _, high = statistics.quantiles(times_s, n=4, method="inclusive")
    return statistics.median(times_s), high - low


def processor_name() -> str:
    """The processor's product name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return machine.processor() or machine.machine()
