"""The segments of a LiteRT runner that are computed in batches, and the stations that do so.

Segments are checked in the background, so that no task waits: at the start those that most placements need, and others when a
task first needs them. Until a segment has passed, its samples are computed one by one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import structlog

from bus.tensors import Array
from stages.batches import Batcher, Computed
from stages.litert_stations import WORKERS, Workers
from stages.models.compute_options import BatchMode
from stages.models.gpu.accelerator import RunsSegment
from stages.models.profiler import measuring_alone
from stages.models.segments.batch_check import BatchCheck, check_batches, known_check, store_check
from stages.models.segments.segment import SegmentKey
from stages.models.segments.store import SegmentStore
from stages.runner import MOST_AT_ONCE, waited_for

log = structlog.get_logger("batches")

Inputs = Sequence[Array]


class BatchLimits(NamedTuple):
    """How a segment is computed."""

    most: int  # samples in a batch
    executors: int  # batches at the same time


UNCHECKED = "not checked yet"

ONE_BY_ONE = BatchLimits(1, WORKERS)

FindLimits: TypeAlias = Callable[[], BatchLimits | None]
"""The limits of a segment; None while it is being checked."""


PAUSE_S = 0.5
"""How often a check asks whether another process has ended its measurement."""


class _StoppedError(Exception):
    """The runner was closed."""


@dataclass(slots=True)
class _Shared:
    """What the open stations of one segment share."""

    segment: RunsSegment
    batcher: Batcher[Inputs, list[Array]]
    find_limits: FindLimits | None  # until they are known
    stations: int = 0

    def refresh(self) -> None:
        """Compute in batches from now on, if the segment has passed its check meanwhile."""
        if self.find_limits is not None and (limits := self.find_limits()) is not None:
            self.find_limits = None
            self.batcher.limit(*limits)


class LitertBatches:
    """Checks segments, and makes stations for those that passed."""

    def __init__(self, mode: BatchMode, workers: Workers) -> None:
        self._mode, self._workers = mode, workers
        self._checks: dict[SegmentKey, BatchCheck] = {}
        self._asked: set[SegmentKey] = set()
        self._shared: dict[tuple[SegmentKey, type], _Shared] = {}  # apart on the GPU and, after a fault, on the CPU
        self._stopped = threading.Event()
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="check-batches")
        self.sizes: Counter[int] = Counter()  # batches that were computed, by their number of samples

    def refusals(self) -> dict[str, str]:
        """Segment -> why its samples are computed one by one, or "" if they are computed in batches."""
        found = {}
        for key in sorted(self._asked):
            model, begin, end = key
            check = self._checks.get(key)
            found[f"{model} {begin + 1}..{end}"] = UNCHECKED if check is None else check.refusal(self._mode)
        return found

    def models(self) -> frozenset[str]:
        """The models of which a segment is computed in batches."""
        return frozenset(key[0] for key, check in list(self._checks.items()) if not check.refusal(self._mode))

    def prepare(self, store: SegmentStore, begin: int, end: int, num_threads: int) -> None:
        """Start the check of a segment, unless it was started before."""
        key = (store.model.name, begin, end)
        if self._mode == "off" or key in self._asked:
            return
        self._asked.add(key)
        known = known_check(store, begin, end, num_threads)
        if known is None:
            self._checker.submit(self._check, store, begin, end, num_threads)
        else:
            self._conclude(key, known)

    def most(self, key: SegmentKey) -> int | None:
        """The largest batch of a segment on the CPU: 1 if it has not passed the check, None while it is being checked."""
        check = self._checks.get(key)
        if check is None:
            return None if key in self._asked else 1
        return 1 if check.refusal(self._mode) else check.most

    def station(self, key: SegmentKey, segment: RunsSegment, find_limits: FindLimits) -> BatchedStation | None:
        """A station for a segment, which it releases at the end; None where its samples are computed one by one."""
        limits = find_limits()
        if self._mode == "off" or (limits is not None and limits.most == 1):
            return None
        place = key, type(segment)
        shared = self._shared.get(place)
        if shared is None:
            most, executors = limits or ONE_BY_ONE
            batcher = Batcher(partial(self._compute, segment), most=most, executors=executors, on_batch=self._count)
            shared = self._shared[place] = _Shared(segment, batcher, None if limits else find_limits)
        else:
            segment.release()
        shared.stations += 1
        return BatchedStation(shared, partial(self._closed, place))

    def close(self) -> None:
        """Start no more checks, and end the one that runs."""
        self._stopped.set()
        self._checker.shutdown(wait=False, cancel_futures=True)

    async def _compute(self, segment: RunsSegment, samples: Sequence[Inputs]) -> tuple[list[list[Array]], float]:
        def work() -> tuple[list[list[Array]], float]:
            waits_s: list[float] = []
            begin_s = time.monotonic()
            results = segment.run_batch(samples, waits_s.append)
            return results, max(0.0, time.monotonic() - begin_s - sum(waits_s))

        found, _ = await self._workers.run(work)
        return found

    def _count(self, size: int) -> None:
        self.sizes[size] += 1

    def _closed(self, place: tuple[SegmentKey, type]) -> None:
        shared = self._shared[place]
        shared.stations -= 1
        if not shared.stations:
            del self._shared[place]
            shared.segment.release()

    def _check(self, store: SegmentStore, begin: int, end: int, num_threads: int) -> None:
        try:
            with measuring_alone(pause=self._pause):
                found = known_check(store, begin, end, num_threads)  # by the process that held the lock
                if found is None:
                    found = check_batches(store, begin, end, stopped=self._stopped.is_set)
        except _StoppedError:
            return
        except Exception as error:  # a thread's error would be lost
            log.exception("batches not checked", model=store.model.name, layers=f"{begin + 1}..{end}")
            found = BatchCheck(fault=f"the check failed: {error}")
        if not found.fault:  # else it is found again quickly, and may have been the disk's
            store_check(found, store, begin, end, num_threads)
        if not self._stopped.is_set():
            self._conclude((store.model.name, begin, end), found)

    def _pause(self) -> None:
        if self._stopped.wait(PAUSE_S):
            raise _StoppedError

    def _conclude(self, key: SegmentKey, check: BatchCheck) -> None:
        model, begin, end = key
        refusal = check.refusal(self._mode)
        layers = f"{begin + 1}..{end}"
        if refusal:
            log.info("samples are computed one by one", model=model, layers=layers, reason=refusal)
        else:
            speedup = round(check.speedup, 2)
            log.info("samples are computed in batches", model=model, layers=layers, most=check.most, speedup=speedup)
        self._checks[key] = check


class BatchedStation:
    """Computes the samples of one task in batches with those of other tasks."""

    def __init__(self, shared: _Shared, closed: Callable[[], None]) -> None:
        self._shared, self._closed = shared, closed
        self._open = True
        self.waited_s = 0.0

    @property
    def most_at_once(self) -> int:
        """See `BatchStation`."""
        self._shared.refresh()
        return MOST_AT_ONCE if self._shared.batcher.most > 1 else 1

    def submit(self, sample: int, inputs: Inputs, ready_s: float) -> asyncio.Future[Computed[list[Array]]]:
        """See `BatchStation`."""
        self._shared.refresh()
        return self._shared.batcher.submit(inputs)

    async def run(self, sample: int, inputs: Inputs, ready_s: float) -> list[Array]:
        """See `Station`."""
        outputs, waited_s = await waited_for(self.submit(sample, inputs, ready_s))
        self.waited_s += waited_s
        return outputs

    def run_now(self, inputs: Inputs) -> list[Array] | None:
        """None: only layers that take longer than waking a thread are computed in batches."""
        return None

    def close(self) -> None:
        """Release the segment when its last station is closed."""
        if self._open:
            self._open = False
            self._closed()
