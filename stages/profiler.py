"""Measuring how fast this machine runs every layer of a model.

The runtime does not time operators, so every layer is cut out and timed alone, on the values it would see, and the whole is
timed too. The layers' times are then scaled to add up to the whole; both numbers are kept. Only computing is timed, not
copying tensors in and out, which a layer inside a segment does not do. Layers that cannot be cut apart are timed together and
share the time by their work.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform as machine
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np

from bus.errors import ConfigError
from bus.values import ModelProfile
from stages.cache import cache_dir, write_whole
from stages.litert import SegmentRunner
from stages.model import Model
from stages.sandbox import Sandbox
from stages.slicer import slice_model
from stages.verify import random_inputs, run_part

Step = Callable[[str, int, int], None]
"""what is being measured, parts done, parts in total"""


@dataclass(frozen=True)
class LayerTime:
    """One layer's row of the table."""

    position: int  # 1..l
    name: str  # as in the manifest
    kind: str  # e.g. "CONV_2D"
    median_s: float  # of its one-layer slice, unscaled
    spread_s: float  # between the quartiles of its runs
    output_bytes: int  # what it makes


@dataclass(frozen=True)
class Measurement:
    """What was measured, before and after scaling."""

    model: Model
    whole_s: float  # median of the model in one piece
    whole_spread_s: float  # between the quartiles
    layers: tuple[LayerTime, ...]

    @property
    def sum_of_slices_s(self) -> float:
        """The layers' medians added up."""
        return sum(layer.median_s for layer in self.layers)

    def profile(self, platform: str) -> ModelProfile:
        """What a node announces: times that add up to the whole."""
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


def measure(
    model: Model,
    *,
    num_threads: int = 1,
    num_runs: int = 10,
    warmup_runs: int = 1,
    seed: int = 0,
    step: Step | None = None,
) -> Measurement:
    """Times the whole model and every layer, `num_runs` times each after `warmup_runs`.

    Raises `ModelError` where the model cannot be run here, `ConfigError` for numbers below 1 (0 for the warm-up).
    """
    if num_runs < 1 or warmup_runs < 0 or num_threads < 1:
        raise ConfigError("a profile needs at least one run and one thread")
    graph = model.graph
    values = random_inputs(model, np.random.default_rng(seed))

    def timed(runner: SegmentRunner, inputs: list[np.ndarray]) -> tuple[float, float]:
        for _ in range(warmup_runs):
            runner.timed(inputs)
        return _median_and_spread([runner.timed(inputs) for _ in range(num_runs)])

    bounds = [position for position in range(graph.depth + 1) if position not in graph.blocked]
    if step is not None:
        step("the whole", 0, len(bounds))
    given = dict(zip(graph.inputs, values, strict=True))
    whole = SegmentRunner(model.source, num_threads, title=str(model.path))
    whole_s, whole_spread_s = timed(whole, [given[tensor] for tensor in graph.whole_inputs])
    del whole

    rows: list[LayerTime] = []
    with Sandbox(model) as sandbox:
        for number, (begin, end) in enumerate(pairwise(bounds), start=1):
            layers = graph.layers[begin:end]
            if step is not None:
                step(layers[0].name, number, len(bounds))
            part = slice_model(model, begin + 1, end)
            data = part.to_bytes()
            sandbox.admit(part, data)
            runner = SegmentRunner(data, num_threads, title=f"{model.name} {begin + 1}..{end}")
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


def profile_model(
    model: Model,
    num_threads: int = 1,
    num_runs: int = 10,
    warmup_runs: int = 1,
    progress: Step | None = None,
    *,
    platform: str = "this machine",
) -> ModelProfile:
    """`measure`, as what a node announces."""
    found = measure(model, num_threads=num_threads, num_runs=num_runs, warmup_runs=warmup_runs, step=progress)
    return found.profile(platform)


def machine_profile(model: Model, *, num_threads: int = 1, say: Callable[[str], None] | None = None) -> ModelProfile:
    """The profile of this machine, measured once and remembered in the cache.

    A machine is known by its processor's name; another processor, thread count, model or runtime is measured anew.
    """
    known_by = "\n".join([_processor(), str(num_threads), model.sha256, metadata.version("ai-edge-litert")])
    path = cache_dir("profiles") / f"{model.name}-{hashlib.sha256(known_by.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        found = ModelProfile.model_validate_json(path.read_bytes())
        if found.sha256 == model.sha256:
            return found.model_copy(update={"model": model.name})
    if say is not None:
        say(f"measuring {model.name} on this machine, once")
    profile = profile_model(model, num_threads, num_runs=5, platform=_processor())
    write_whole(path, [profile.model_dump_json(indent=2).encode()], durable=False)
    return profile


def _median_and_spread(times_s: list[float]) -> tuple[float, float]:
    if len(times_s) < 2:
        return times_s[0], 0.0
    low, _, high = statistics.quantiles(times_s, n=4, method="inclusive")
    return statistics.median(times_s), high - low


def _processor() -> str:
    """The processor's name, as people know it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return machine.processor() or machine.machine()
