"""While segments are loaded on the GPU, which takes seconds, other tasks compute."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.models.gpu.accelerator import Accelerator, AcceleratorOptions
from stages.models.gpu.process import GpuProcess
from stages.models.model import Model
from stages.models.segments.store import SegmentStore
from stages.runner import PaceClock
from tests.model_plans import plan_of, profile_of
from tests.unit.stages.models.gpu.drivers import program

THREADS = 2


class SlowAccelerator(Accelerator):
    """Loads parts of a model only when `go` is set; the whole is loaded at once."""

    def __init__(self) -> None:
        super().__init__(AcceleratorOptions(batches=()), GpuProcess(program("absent")))
        self.go = threading.Event()
        self.asked = 0

    def is_ready(self, model: str, begin: int, end: int) -> bool:
        """Count the calls for parts, after each of which the runner loads the part."""
        self.asked += (begin, end) != (0, 7)
        return super().is_ready(model, begin, end)

    def prepare(self, store: SegmentStore, begin: int, end: int) -> None:
        """Wait, then load."""
        if (begin, end) != (0, 7):
            self.go.wait()
        super().prepare(store, begin, end)


def test_loads_on_the_gpu_take_no_thread_from_tasks_that_compute(lenet: Model) -> None:
    async def run() -> None:
        accelerator, pool = SlowAccelerator(), ThreadPoolExecutor(THREADS)
        prepared = Prepared(profiles={"lenet": profile_of(lenet)}, pool=pool, accelerator=accelerator)
        runner = LitertRunner([lenet], RunnerOptions(), prepared=prepared)
        plan = plan_of(lenet)
        loads = [asyncio.create_task(runner.prepare(plan, 0, end)) for end in range(1, 2 + THREADS)]
        while accelerator.asked < len(loads):
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        await runner.prepare(plan, 0, 7)
        station = runner.station(plan, 0, 7, PaceClock())
        try:
            await asyncio.wait_for(station.run(0, [np.zeros((1, 28, 28, 1), np.float32)], 0.0), timeout=30.0)
            assert not any(load.done() for load in loads)
        finally:
            accelerator.go.set()
        await asyncio.gather(*loads)
        await runner.close()
        pool.shutdown()

    asyncio.run(run())
