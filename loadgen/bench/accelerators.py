"""Accelerator benchmark: segments of models on the GPU and on the CPU, one sample at a time.

The GPU's segments run as in a stage, through the GPU process. The CPU's rate is the best of one thread and all processors.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bus.tensors import Array
from stages.models.cuts import useful_positions
from stages.models.gpu.accelerator import Accelerator, AcceleratorOptions, relative_difference
from stages.models.gpu.process import GpuProcess
from stages.models.model import Model
from stages.models.runtime.litert import InterpreterOptions
from stages.models.segments import SegmentStore
from stages.zoo.registry import load_model

MODELS = ("lenet", "alexnet")
CHECKED = 5
"""Random samples whose results are compared."""

LONGEST_S, QUICK_S = 2.0, 0.2
"""Time for one segment on one platform."""

Run = Callable[[Sequence[Array]], list[Array]]


def run(
    *,
    model: Sequence[str] = MODELS,
    seed: int = 1,
    quick: bool = False,
    process: GpuProcess | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure and return the object that docs/json.md describes."""
    accelerator = Accelerator(AcceleratorOptions(), process)
    rng = np.random.default_rng(seed)
    results: list[dict[str, Any]] = []
    try:
        for name in model:
            progress(f"loading {name}")
            results += _of_model(load_model(name), accelerator, rng, QUICK_S if quick else LONGEST_S, progress)
    finally:
        accelerator.close()
    return {
        "bench": "accelerators",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        "results": results,
        "aims": [],
        "seed": seed,
    }


def _of_model(
    model: Model, accelerator: Accelerator, rng: np.random.Generator, longest_s: float, progress: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    threads = sorted({1, os.cpu_count() or 1})
    stores = [SegmentStore(model, options=InterpreterOptions(num_threads=number)) for number in threads]
    try:
        for begin, end in _segments(model):
            progress(f"{model.name} {begin + 1}..{end}")
            cpus = [store.prepare(begin, end) for store in stores]
            samples = [[_random(rng, spec.shape, spec.dtype) for spec in cpus[0].inputs] for _ in range(CHECKED)]
            cpu_rate = max(_rate(cpu.run, samples, longest_s) for cpu in cpus)
            row = {"model": model.name, "segment": f"{begin + 1}..{end}", "batch": 1}
            yield row | _found("cpu", cpu_rate, 1.0, 0.0)
            accelerator.prepare(stores[0], begin, end)
            placed = accelerator.placements()[model.name, begin, end]
            if placed.file is None:
                yield row | _found("gpu", None, None, None, placed.reason)
                continue
            gpu = accelerator.segment(model.name, cpus[0])
            pairs = [pair for one in samples for pair in zip(gpu.run(one), cpus[0].run(one), strict=True)]
            gpu_rate = _rate(gpu.run, samples, longest_s)
            gpu.release()
            difference = max(relative_difference(found, right) for found, right in pairs)
            yield row | _found("gpu", gpu_rate, gpu_rate / cpu_rate, difference)
    finally:
        for store in stores:
            store.close()


def _segments(model: Model) -> list[tuple[int, int]]:
    """The whole, and the parts before and after the middle one of the useful cuts."""
    depth = model.graph.depth
    inner = [position for position in useful_positions(model.manifest) if 0 < position < depth]
    middle = inner[len(inner) // 2 : len(inner) // 2 + 1]
    return [(0, depth), *((0, cut) for cut in middle), *((cut, depth) for cut in middle)]


def _found(
    platform: str, samples_per_s: float | None, ratio: float | None, difference: float | None, reason: str = ""
) -> dict[str, Any]:
    return {
        "platform": platform,
        "samples_per_s": samples_per_s,
        "ratio_to_cpu": ratio,
        "max_rel_diff": difference,
        "reason": reason,  # why the GPU is not used
    }


def _rate(run: Run, samples: Sequence[Sequence[Array]], longest_s: float) -> float:
    """Samples a second, from the median time of a sample after one that is dropped."""
    run(samples[0])
    took_s: list[float] = []
    begin_s = perf_counter()
    while len(took_s) < len(samples) or perf_counter() - begin_s < longest_s:
        before_s = perf_counter()
        run(samples[len(took_s) % len(samples)])
        took_s.append(perf_counter() - before_s)
    return 1.0 / median(took_s)


def _random(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> Array:
    values = rng.random(shape)
    return values.astype(dtype) if np.dtype(dtype).kind == "f" else np.rint(values).astype(dtype)
