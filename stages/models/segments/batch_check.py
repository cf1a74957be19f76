"""The check of whether a segment may be computed in batches: whether the results stay the same, and whether it is faster.

LiteRT can change the batch dimension of most models. Whether the results of a batch are those of its samples one by one, to
the bit, depends on the operators and on the processor, so they are compared here. The findings are stored beside the
profiles.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from bus.errors import DeeparError, ModelError
from bus.tensors import Array
from bus.values import MAX_BATCH, TensorSpec
from stages.models.compute_options import BatchMode
from stages.models.difference import relative_difference
from stages.models.files.cache import measured_path, write_whole
from stages.models.profiler import METHOD, processor_name
from stages.models.random_samples import random_sample
from stages.models.segments.segment import Segment
from stages.models.segments.store import SegmentStore

NEARLY = 1e-4
"""The largest difference that `any` accepts, relative to the largest value of the tensor."""

SPEEDUP = 1.25
"""A segment is computed in batches if that makes a sample at least this many times as fast.

A smaller gain would not pay, since the first samples of a batch wait for its last.
"""

COMPARED = (2, 3, 5, 8)
"""Sizes of batch whose results are compared, and the largest one: runtimes compute odd remainders with other code."""

BATCH_S = 0.5
"""The largest batch takes about this long; longer ones would delay other work too much."""

COMPARED_S = 1.0
"""Batches are compared only up to the size that would take so long if its samples were computed one by one."""

ACTIVATION_BYTES = 64 << 20
"""Limit for the tensors of the largest batch."""

RUNS = 3
"""Timed runs; the shortest counts."""


class BatchCheck(BaseModel):
    """What was found about batches of one segment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    most: Annotated[int, Field(ge=1, le=MAX_BATCH)] = 1  # the largest batch; 1: no batches are possible
    exact: bool = False  # whether the results were those of single samples to the bit
    difference: float = 0.0  # largest one, relative to the largest value of the tensor
    speedup: float = 0.0  # time of a sample alone over that of a sample in a batch
    fault: str = ""  # why no batches are possible

    def refusal(self, mode: BatchMode) -> str:
        """Why the samples are computed one by one; "" if they are computed in batches."""
        if self.fault:
            return self.fault
        if not self.exact and (mode == "exact" or self.difference > NEARLY):
            return f"results in a batch differ by {self.difference:.2g} of the largest value"
        if self.speedup < SPEEDUP:
            return f"a batch is only {self.speedup:.2f} times as fast"
        return ""


def check_batches(
    store: SegmentStore,
    begin: int,
    end: int,
    clock: Callable[[], float] = time.perf_counter,
    stopped: Callable[[], bool] = lambda: False,
) -> BatchCheck:
    """Compare batches with single samples. Takes seconds: call it in a thread; it ends soon after `stopped` says so."""
    segment = store.get(begin, end)
    runs = _Runs(segment, clock, stopped)
    try:
        if fault := _unsuited(segment, store):
            return BatchCheck(fault=fault)
        fits = ACTIVATION_BYTES // max(1, store.activation_bytes(begin, end))
        sizes = [size for size in COMPARED if size <= fits]
        if not sizes:
            return BatchCheck(fault="the tensors of a batch would take too much memory")
        store.try_batch(begin, end, sizes[-1])
        alone_s = _alone_s(runs)
        sizes = [size for size in sizes if size * alone_s <= COMPARED_S]
        if not sizes:
            return BatchCheck(fault=f"a sample alone takes {alone_s:.2g} s, too long for batches")
        return _compared(runs, sizes, fits, partial(store.try_batch, begin, end))
    except DeeparError as error:
        return BatchCheck(fault=str(error))
    finally:
        segment.release()


class _Runs:
    """Runs of a segment, none after the check was stopped."""

    def __init__(self, segment: Segment, clock: Callable[[], float], stopped: Callable[[], bool]) -> None:
        self.segment, self.clock = segment, clock
        self._stopped = stopped

    def alone(self, inputs: Sequence[Array]) -> list[Array]:
        """The results of one sample."""
        self._go_on()
        return self.segment.run(inputs)

    def together(self, samples: Sequence[Sequence[Array]]) -> list[list[Array]]:
        """The results of several samples in a batch."""
        self._go_on()
        return self.segment.run_batch(samples)

    def _go_on(self) -> None:
        if self._stopped():
            raise ModelError(str(self.segment), "the check of batches was stopped")


def known_check(store: SegmentStore, begin: int, end: int, num_threads: int) -> BatchCheck | None:
    """The stored findings; None if there are none."""
    with contextlib.suppress(OSError, ValueError):
        return BatchCheck.model_validate_json(_path(store, begin, end, num_threads).read_bytes())
    return None


def store_check(found: BatchCheck, store: SegmentStore, begin: int, end: int, num_threads: int) -> None:
    """Keep the findings for later starts, if the disk allows."""
    with contextlib.suppress(ModelError, OSError):
        write_whole(_path(store, begin, end, num_threads), [found.model_dump_json().encode()], durable=False)


def _compared(runs: _Runs, sizes: Sequence[int], fits: int, try_batch: Callable[[int], None]) -> BatchCheck:
    samples = [_sample(runs.segment.inputs, number) for number in range(sizes[-1])]
    expected = [runs.alone(one) for one in samples]
    differences = [_difference(runs, samples[:size], expected) for size in sizes]
    largest = sizes[-1]
    alone_s, each_s = _times_s(runs, samples[:largest])
    most = min(fits, MAX_BATCH, max(largest, int(BATCH_S / each_s)))
    if most > largest:
        try_batch(most)
        differences.append(_difference(runs, [samples[at % len(samples)] for at in range(most)], expected))
    return BatchCheck(
        most=most,
        exact=all(same for same, _ in differences),
        difference=max(difference for _, difference in differences),
        speedup=alone_s / each_s,
    )


def _difference(runs: _Runs, batch: Sequence[list[Array]], expected: Sequence[list[Array]]) -> tuple[bool, float]:
    """Whether the results of a batch of the first samples, in turn, are the same to the bit; and the largest difference."""
    same, largest = True, 0.0
    for at, found in enumerate(runs.together(batch)):
        for value, right in zip(found, expected[at % len(expected)], strict=True):
            if value.tobytes() != right.tobytes():
                difference = relative_difference(value.astype(np.float64), right.astype(np.float64))
                same, largest = False, max(largest, difference)
    return same, largest


def _sample(specs: Sequence[TensorSpec], number: int) -> list[Array]:
    """Random inputs of different magnitudes, which reveal operators that scale a whole batch by its largest value."""
    scale = (1.0, 0.1, 3.0)[number % 3]
    values = random_sample(specs, number)
    return [(value * scale).astype(value.dtype) if value.dtype.kind == "f" else value for value in values]


def _alone_s(runs: _Runs) -> float:
    inputs = _sample(runs.segment.inputs, 0)
    runs.alone(inputs)  # the first run is slower
    begin_s = runs.clock()
    runs.alone(inputs)
    return runs.clock() - begin_s


def _times_s(runs: _Runs, samples: Sequence[list[Array]]) -> tuple[float, float]:
    """The shortest time of a sample alone, and of one in a batch; in turns, so that other load meets both."""
    alone, together = [], []
    for _ in range(RUNS):
        begin_s = runs.clock()
        for one in samples:
            runs.alone(one)
        middle_s = runs.clock()
        runs.together(samples)
        alone.append((middle_s - begin_s) / len(samples))
        together.append(max(1e-9, runs.clock() - middle_s) / len(samples))
    return min(alone), min(together)


def _unsuited(segment: Segment, store: SegmentStore) -> str:
    if store.stateful:
        return "the model keeps state"
    for spec in (*segment.inputs, *segment.outputs):
        if not spec.shape or spec.shape[0] != 1:
            return f"{spec.name} has no batch dimension of 1"
        if np.dtype(spec.dtype).kind not in "fiub":
            return f"{spec.name} is {spec.dtype}"
    return ""


def _path(store: SegmentStore, begin: int, end: int, num_threads: int) -> Path:
    model, threads, runtime = store.model, f"{num_threads} threads", metadata.version("ai-edge-litert")
    known_by = [str(METHOD), processor_name(), threads, model.sha256, runtime]
    return measured_path(f"{model.name}-batches-{begin + 1}-{end}", known_by)
