"""Slicing benchmark (`deepar loadgen bench slices`): cost of cutting a model, in time and in memory.

*Time*: at every cut, the two parts and the whole model run alternately, with tensors copied in and out, so machine
noise affects them equally. A round's ratio is the sum of the parts over the whole; a cut's ratio is the median.

*Memory*: a separate process serves VGG-16 as all three stages at successive cut pairs, and reads its memory after
each. Anonymous memory cannot be shared with other processes; resident memory also includes mapped weights.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadgen.workers import worker_pool
from stages.models.model import Model
from stages.models.runtime.litert import InterpreterOptions, SegmentRunner
from stages.models.segments.store import SegmentStore
from stages.models.slicer import slice_model
from stages.models.verify import random_inputs, run_part
from stages.zoo.registry import load_model

MODELS = ("alexnet", "vgg16")
MEMORY_MODEL = "vgg16"
ROUNDS = 9
WARMUP_ROUNDS = 2
PAIRS = 8
"""Random cut pairs whose memory is measured, in addition to the pairs of useful cuts."""

RATIO_AIM = 1.03
ANONYMOUS_AIM = 1.2
RESIDENT_AIM = 2.3
RESIDENT_PLAIN_AIM = 1.2


def run(
    *,
    models: Sequence[str] = MODELS,
    memory_model: str | None = MEMORY_MODEL,
    rounds: int = ROUNDS,
    pairs: int = PAIRS,
    seed: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure and return the object that docs/json.md describes, with `memory` added if there is a memory model.

    Raises `ModelError` if a model's weights cannot be generated.
    """
    say = progress or (lambda line: None)
    results: list[dict[str, Any]] = []
    aims: list[dict[str, Any]] = []
    for name in models:
        say(f"loading {name}")
        found = ratios(load_model(name), rounds, np.random.default_rng(seed), say)
        results += found
        middle = statistics.median(row["ratio"] for row in found)
        aims.append(_aim(f"{name}: sum of the parts over the whole, median over cuts", middle, RATIO_AIM))
    memory: list[dict[str, Any]] = []
    for delegate in (True, False) if memory_model is not None else ():
        assert memory_model is not None
        say(f"memory of a stage that serves {memory_model}, delegate {'on' if delegate else 'off'}")
        rows = _in_a_process(memory_model, delegate, pairs, seed)
        memory += rows
        title = f"{memory_model}, delegate {'on' if delegate else 'off'}"
        anonymous = max(row["anonymous_ratio"] for row in rows)
        resident = max(row["resident_ratio"] for row in rows)
        aims.append(_aim(f"{title}: anonymous memory over the weights, at most", anonymous, ANONYMOUS_AIM))
        resident_aim = RESIDENT_AIM if delegate else RESIDENT_PLAIN_AIM
        aims.append(_aim(f"{title}: resident memory over the weights, at most", resident, resident_aim))
    return {
        "bench": "slices",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        "results": results,
        "aims": aims,
        "memory": memory,
        "rounds": rounds,
    }


def _aim(name: str, value: float, aim: float) -> dict[str, Any]:
    return {"name": name, "value": value, "aim": aim, "pass": value <= aim}


def ratios(model: Model, rounds: int, rng: np.random.Generator, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row per possible cut: time of the parts over the whole, on one thread."""
    graph = model.graph
    given = dict(zip(graph.inputs, random_inputs(model, rng), strict=True))
    whole = SegmentRunner(model.source, title=model.name)
    whole_inputs = [given[tensor] for tensor in graph.whole_inputs]
    rows = []
    for position in range(1, graph.depth):
        if position in graph.blocked:
            continue
        name = model.manifest.cuts[position].name
        say(f"{model.name}: cut {position} of {graph.depth - 1}, after {name}")
        parts = [slice_model(model, 1, position), slice_model(model, position + 1, graph.depth)]
        runners = [SegmentRunner(part.to_bytes(), title=f"{model.name} {part.first}..{part.last}") for part in parts]
        wholes_s, sums_s = [], []
        for number in range(WARMUP_ROUNDS + rounds):
            began_s = time.perf_counter()
            whole.run(whole_inputs)
            between_s = time.perf_counter()
            values = [given[tensor] for tensor in graph.inputs]
            for part, runner in zip(parts, runners, strict=True):
                values = run_part(part, runner, values)
            ended_s = time.perf_counter()
            if number >= WARMUP_ROUNDS:
                wholes_s.append(between_s - began_s)
                sums_s.append(ended_s - between_s)
        rows.append(
            {
                "model": model.name,
                "cut": position,
                "ratio": statistics.median(s / w for s, w in zip(sums_s, wholes_s, strict=True)),
                "name": name,
                "whole_s": statistics.median(wholes_s),
                "parts_s": statistics.median(sums_s),
            }
        )
    return rows


def _in_a_process(name: str, delegate: bool, pairs: int, seed: int) -> list[dict[str, Any]]:
    with worker_pool(1) as pool:
        return pool.submit(serve, name, delegate, pairs, seed).result()


def serve(name: str, delegate: bool, pairs: int, seed: int) -> list[dict[str, Any]]:
    """Serve cut pairs of a model one after another in this process, and return the memory in use after each."""
    model = load_model(name)
    store = SegmentStore(model, options=InterpreterOptions(delegate=delegate))
    store.warm()
    generator = random.Random(seed)
    depth = model.graph.depth
    cuttable = [position for position in range(1, depth) if position not in model.graph.blocked]
    chosen = [(3 * depth // 7, 6 * depth // 7), *(sorted(generator.sample(cuttable, 2)) for _ in range(pairs))]
    inputs = random_inputs(model, np.random.default_rng(seed))
    rows = []
    for cut1, cut2 in chosen:
        values = inputs
        segments = [store.prepare(*ends) for ends in ((0, cut1), (cut1, cut2), (cut2, depth))]
        for segment in segments:
            values = segment.run(values)
        status = _occupied_bytes()
        for segment in segments:
            segment.release()
        rows.append(
            {
                "model": name,
                "delegate": delegate,
                "cut1": cut1,
                "cut2": cut2,
                "anonymous_bytes": status["RssAnon"],
                "resident_bytes": status["VmRSS"],
                "anonymous_ratio": status["RssAnon"] / model.size_bytes,
                "resident_ratio": status["VmRSS"] / model.size_bytes,
            }
        )
    return rows


def _occupied_bytes() -> dict[str, int]:
    """Resident and anonymous memory of this process. Needs Linux."""
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "RssAnon"):
            found[key] = 1024 * int(value.split()[0])
    return found
