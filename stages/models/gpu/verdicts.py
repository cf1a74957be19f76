"""The check of a model's parts on the GPU against the CPU, on given samples (`deepar models verify --accelerator gpu`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bus.tensors import Array
from stages.models.difference import relative_difference
from stages.models.gpu.accelerator import Accelerator
from stages.models.segments.store import SegmentStore
from stages.models.verify import runnable_depth


@dataclass(frozen=True, slots=True)
class Verdict:
    """One segment on the GPU."""

    begin: int
    end: int
    max_rel_diff: float | None  # largest difference from the CPU's results on the given samples; None: not run there
    reason: str  # why the GPU must not run it; "" if it may


def verify_on_gpu(
    store: SegmentStore,
    pairs: Sequence[tuple[int, int]],
    samples: Sequence[Sequence[Array]],
    accelerator: Accelerator,
    *,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> list[Verdict]:
    """A verdict on each part of the model between the pairs of cuts; `step` receives the parts done and their number."""
    depth = runnable_depth(store.model)
    wanted = [(0, *pair, depth) for pair in pairs if pair[1] <= depth]
    ends = sorted({part for bounds in wanted for part in pairwise(bounds) if part[0] < part[1]})
    inputs = _inputs(store, samples, {begin for begin, _ in ends})
    found = []
    for number, (begin, end) in enumerate(ends):
        step(number, len(ends))
        found.append(_verdict(store, accelerator, begin, end, inputs[begin]))
    step(len(ends), len(ends))
    return found


def _inputs(
    store: SegmentStore, samples: Sequence[Sequence[Array]], positions: set[int]
) -> dict[int, list[Sequence[Array]]]:
    """What the CPU computes of each sample up to each position."""
    inputs: dict[int, list[Sequence[Array]]] = {0: list(samples)}
    for before, position in pairwise(sorted({0, *positions})):
        segment = store.prepare(before, position)
        inputs[position] = [segment.run(values) for values in inputs[before]]
        segment.release()
    return inputs


def _verdict(
    store: SegmentStore, accelerator: Accelerator, begin: int, end: int, inputs: Sequence[Sequence[Array]]
) -> Verdict:
    cpu = store.prepare(begin, end)
    accelerator.prepare(store, begin, end)
    gpu = accelerator.segment(store.model.name, cpu)
    name = (store.model.name, begin, end)
    largest: float | None = None
    if gpu is not cpu:
        pairs = [pair for values in inputs for pair in zip(gpu.run(values), cpu.run(values), strict=True)]
        largest = max((relative_difference(found, right) for found, right in pairs), default=0.0)
    gpu.release()
    placed = accelerator.placements().get(name)
    reason = "the GPU process ended" if placed is None else placed.reason
    if not reason and largest is not None and largest > accelerator.tolerance:
        reason = f"the results differ by {largest:.2g} of the largest value, more than {accelerator.tolerance:g}"
    return Verdict(begin, end, largest, reason)
