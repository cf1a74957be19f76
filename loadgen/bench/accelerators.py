"""Accelerator benchmark: segments of models in batches on the GPU, on the CPU, and in PyTorch where it is installed.

The GPU's segments run as in a stage, through the GPU process. The CPU's rate is the best of one thread, half the processors
and all of them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from bus.errors import ConfigError, ModelError
from bus.tensors import Array
from loadgen.bench import pytorch
from stages.models.cuts import useful_positions
from stages.models.difference import relative_difference
from stages.models.gpu.accelerator import AcceleratorOptions
from stages.models.gpu.normalization import for_gpu
from stages.models.gpu.part_for_batch import part_for_batch
from stages.models.gpu.process import GpuFaultError, GpuProcess
from stages.models.gpu.segment_file import SegmentFile, batchable, file_of, unsuited
from stages.models.model import Model
from stages.models.runtime.litert import SegmentRunner
from stages.models.runtime.trial_run import ChildProgram
from stages.models.segments.segment import Segment
from stages.models.segments.store import SegmentStore
from stages.models.slicer import SlicedPart, slice_model
from stages.zoo.registry import load_model

MODELS = ("lenet", "alexnet", "vgg16")
BATCHES = (1, 2, 4, 8, 16, 32)
QUICK_BATCHES = (1, 8)
LONGEST_S, QUICK_S = 2.0, 0.2
"""Time for one segment on one platform."""

LEAST_RUNS = 3

FASTER_THAN_CPU, PYTORCH_OVER_GPU = 15.0, 2.5
"""Aims for VGG-16 whole, where PyTorch finds a GPU: over the best CPU setting at batch 1, and PyTorch's rate over ours."""

Row = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class _Bench:
    process: GpuProcess
    pytorch: ChildProgram | None  # None: it is not installed
    seed: int
    batches: Sequence[int]
    longest_s: float
    progress: Callable[[str], None]
    results: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Keep a row and show it, so that an interrupted run has shown what it found."""
        self.results.append(row)
        found = "not measured"
        if row["samples_per_s"] is not None:
            found = f"{row['samples_per_s']:.4g} samples/s, {row['ratio_to_cpu']:.3g} times the CPU"
        line = f"{row['model']} {row['segment']}, {row['platform']}, batch {row['batch']}: {found}"
        self.progress(line + (f": {row['reason']}" if row["reason"] else ""))


def run(
    *,
    model: Sequence[str] = MODELS,
    segment: Sequence[str] = (),
    batch: Sequence[int] = (),
    seed: int = 1,
    quick: bool = False,
    process: GpuProcess | None = None,
    torch: ChildProgram | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure and return the object that docs/json.md describes.

    `torch` is the child process with PyTorch, where it is installed; without one, that of this Python.
    `segment` has entries such as `whole` or `3..7`; without any, the whole, and the parts before and after the middle cut.
    """
    bench = _Bench(
        process=process or GpuProcess(),
        pytorch=torch or (pytorch.CHILD if pytorch.installed() else None),
        seed=seed,
        batches=sorted(set(batch)) or (QUICK_BATCHES if quick else BATCHES),
        longest_s=QUICK_S if quick else LONGEST_S,
        progress=progress,
    )
    try:
        for name in model:
            begin_s = perf_counter()
            loaded = load_model(name)
            progress(f"loaded {name} in {perf_counter() - begin_s:.1f} s")
            for begin, end in _segments(loaded, segment):
                _measure(bench, loaded, begin, end)
    finally:
        bench.process.close()
    return {
        "bench": "accelerators",
        "machine": f"{platform.machine()}, {_processors()} processors, Python {platform.python_version()}",
        "results": bench.results,
        "aims": aims(bench.results),
        "seed": seed,
    }


def _segments(model: Model, wanted: Sequence[str]) -> list[tuple[int, int]]:
    """Begin and end of the wanted segments. Raises `ConfigError`."""
    depth = model.graph.depth
    if not wanted:
        inner = [position for position in useful_positions(model.manifest) if 0 < position < depth]
        middle = inner[len(inner) // 2 : len(inner) // 2 + 1]
        return [(0, depth), *((0, cut) for cut in middle), *((cut, depth) for cut in middle)]
    found = []
    for text in wanted:
        first, _, last = ("1", "..", str(depth)) if text == "whole" else text.partition("..")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= depth):
            raise ConfigError(
                f"--segment {text} is invalid: {model.name} has layers 1..{depth}", remedy="write whole, or 3..7"
            )
        found.append((int(first) - 1, int(last)))
    return found


class _Case(NamedTuple):
    """A segment to measure."""

    names: Row  # what its rows say of it
    segment: Segment
    part: SlicedPart
    batches: Sequence[int]
    samples: Sequence[Sequence[Array]]  # as many as the largest batch has
    right: Sequence[Sequence[Array]]  # the CPU's results for each sample alone


def _measure(bench: _Bench, model: Model, begin: int, end: int) -> None:
    """Add the rows of one segment."""
    store = SegmentStore(model)
    segment = store.get(begin, end)
    reason = unsuited(segment, stateful=store.stateful)
    store.close()
    part = slice_model(model, begin + 1, end)
    rng = np.random.default_rng(bench.seed)
    batches = bench.batches if batchable(segment) else (1,)
    samples = [[_random(rng, spec.shape, spec.dtype) for spec in segment.inputs] for _ in range(max(batches))]
    alone = {
        threads: _rate(_CpuFile(part, threads).run, samples[:1], bench.longest_s)[0] for threads in _thread_counts()
    }
    fast = [threads for threads, rate in alone.items() if rate > max(alone.values()) / 2]
    one_by_one = _CpuFile(part, fast[-1])
    right = [one_by_one.run([sample])[0] for sample in samples]
    names = {"model": model.name, "segment": f"{begin + 1}..{end}"}
    case = _Case(names, segment, part, batches, samples, right)
    best = _add_cpu(bench, case, fast, max(alone.values()))
    _add_gpu(bench, case, best, reason)
    if bench.pytorch is not None and model.name in pytorch.NAMES and (begin, end) == (0, model.graph.depth):
        _add_pytorch(bench, bench.pytorch, names, best, batches)


def _add_cpu(bench: _Bench, case: _Case, fast: Sequence[int], alone: float) -> dict[int, float]:
    """Rows of the CPU with the faster numbers of threads; returns the best rate of each batch, `alone` of a single sample."""
    best = {1: alone}
    for batch in case.batches:
        row = case.names | {"platform": "cpu", "accelerator": "cpu", "batch": batch}
        try:
            settings = fast if batch > 1 else fast[:1]
            tried = [
                _rate(_CpuFile(case.part, threads, batch).run, case.samples[:batch], bench.longest_s)
                for threads in settings
            ]
            best[batch] = max(best.get(batch, 0.0), *(rate for rate, _ in tried))
            difference = max(_difference(found, case.right) for _, found in tried)
            bench.add(row | _measured(best[batch], best[batch], difference))
        except ModelError as error:
            bench.add(row | _failed(str(error)))
    return best


def _add_gpu(bench: _Bench, case: _Case, cpu: Mapping[int, float], unsuited_because: str | None) -> None:
    """Rows of the GPU; `cpu` has the CPU's best rate of each batch."""
    for batch in case.batches:
        row = case.names | {"platform": "gpu", "accelerator": "gpu", "batch": batch}
        try:
            if unsuited_because is not None:
                raise GpuFaultError(unsuited_because)
            file = SegmentFile(bench.process, case.segment, for_gpu(case.part), batch)
            rate, found = _rate(file.run, case.samples[:batch], bench.longest_s)
            file.unload()
            bench.add(row | _measured(rate, cpu.get(batch, cpu[1]), _difference(found, case.right)))
        except GpuFaultError as error:
            bench.add(row | _failed(str(error)))


class _CpuFile:
    """A segment's file on the CPU, for batches of a size. Raises `ModelError` if it has no batches."""

    def __init__(self, part: SlicedPart, threads: int, batch: int = 1) -> None:
        self._part, self._batch = part, batch
        with file_of(part_for_batch(part, batch)) as path:  # the runner maps it until it ends
            self._runner = SegmentRunner(path, threads, title=f"layers {part.first}..{part.last}")

    def run(self, samples: Sequence[Sequence[Array]]) -> list[list[Array]]:
        known = [dict(zip([spec.name for spec in self._part.inputs], sample, strict=True)) for sample in samples]
        stacked = [np.concatenate([values[name] for values in known]) for name in self._part.reads]
        for name, made in zip(self._part.makes, self._runner.run(stacked), strict=True):
            if self._batch > 1 and made.shape[:1] != (self._batch,):
                raise ModelError(self._runner.title, f"a batch gives {name} the shape {list(made.shape)}")
            for row, values in enumerate(known):
                values[name] = made[row : row + 1] if self._batch > 1 else made
        return [[values[spec.name] for spec in self._part.outputs] for values in known]


def _rate(
    run: Callable[[Sequence[Sequence[Array]]], list[list[Array]]], samples: Sequence[Sequence[Array]], longest_s: float
) -> tuple[float, list[list[Array]]]:
    """Samples a second, from the median time of a batch after the first one, and the outputs.

    If the first one takes longer than all should, it is the only one.
    """
    first_s = perf_counter()
    found = run(samples)
    begin_s = perf_counter()
    took_s = [begin_s - first_s]
    if took_s[0] > 2 * longest_s:
        return len(samples) / took_s[0], found
    while len(took_s) <= LEAST_RUNS or perf_counter() - begin_s < longest_s:
        before_s = perf_counter()
        run(samples)
        took_s.append(perf_counter() - before_s)
    return len(samples) / median(took_s[1:]), found


def _difference(found: Sequence[Sequence[Array]], right: Sequence[Sequence[Array]]) -> float:
    """The largest relative difference of all tensors of all samples."""
    pairs = [pair for one, other in zip(found, right, strict=False) for pair in zip(one, other, strict=True)]
    return max(relative_difference(*pair) for pair in pairs)


def _add_pytorch(
    bench: _Bench, child: ChildProgram, names: Row, cpu: Mapping[int, float], batches: Sequence[int]
) -> None:
    """Rows of the same network in PyTorch, with the copies to its device and back."""
    bench.progress(f"starting PyTorch for {names['model']}")
    device, reason = "cpu", ""
    rates: dict[int, float] = {}
    try:
        device, rates = pytorch.measure(names["model"], batches, bench.longest_s, child)
    except ConfigError as error:
        reason = str(error)
    for batch in batches:
        row = names | {"platform": "pytorch", "accelerator": "gpu" if device == "cuda" else device, "batch": batch}
        bench.add(row | (_failed(reason) if reason else _measured(rates[batch], cpu.get(batch, cpu[1]), None)))


def aims(rows: Sequence[Row]) -> list[Row]:
    """The aims for VGG-16 whole at batch 1, where PyTorch found a GPU; a software driver reaches none."""
    whole = next((row["segment"] for row in rows if row["platform"] == "pytorch" and row["model"] == "vgg16"), None)
    rates = {
        (row["platform"], row["accelerator"]): row
        for row in rows
        if (row["model"], row["segment"], row["batch"]) == ("vgg16", whole, 1)
    }
    if ("pytorch", "gpu") not in rates or ("gpu", "gpu") not in rates:
        return []
    ours, theirs = rates["gpu", "gpu"], rates["pytorch", "gpu"]
    ratio = ours["ratio_to_cpu"] if ours["trusted"] else None
    share = theirs["samples_per_s"] / ours["samples_per_s"] if ours["trusted"] and theirs["samples_per_s"] else None
    return [
        {
            "name": "VGG-16 whole on the GPU over the best CPU setting, one sample at a time",
            "value": ratio,
            "aim": f">= {FASTER_THAN_CPU:g}",
            "pass": ratio is not None and ratio >= FASTER_THAN_CPU,
        },
        {
            "name": "PyTorch in float32 over the GPU here, VGG-16 whole, one sample at a time",
            "value": share,
            "aim": f"<= {PYTORCH_OVER_GPU:g}",
            "pass": share is not None and share <= PYTORCH_OVER_GPU,
        },
    ]


def _measured(rate: float, cpu_rate: float, difference: float | None) -> Row:
    trusted = difference is None or difference <= AcceleratorOptions().tolerance
    return {
        "samples_per_s": rate,
        "ratio_to_cpu": rate / cpu_rate,
        "max_rel_diff": difference,
        "trusted": trusted,
        "reason": "" if trusted else f"its results differ from the CPU's by {difference:.2g} of the largest value",
    }


def _failed(reason: str) -> Row:
    """What a row says of a segment that was not measured."""
    return {"samples_per_s": None, "ratio_to_cpu": None, "max_rel_diff": None, "trusted": False, "reason": reason}


def _processors() -> int:
    return os.cpu_count() or 1


def _thread_counts() -> list[int]:
    """One, half the processors and all of them."""
    return sorted({1, max(1, _processors() // 2), _processors()})


def _random(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> Array:
    values = rng.random(shape)
    return values.astype(dtype) if np.dtype(dtype).kind == "f" else np.rint(values).astype(dtype)
