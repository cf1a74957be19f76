"""The runner that computes: samples of several tasks in batches, with the results of single samples."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from bus.errors import ModelError
from bus.tensors import Array
from stages import litert_batches
from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.models.difference import relative_difference
from stages.models.gpu.accelerator import CHECKS, Accelerator, AcceleratorOptions
from stages.models.gpu.process import GpuProcess
from stages.models.model import Model
from stages.models.profiler import measuring_alone
from stages.models.runtime.litert import SegmentRunner
from stages.models.segments.batch_check import BatchCheck, store_check
from stages.models.segments.store import SegmentStore
from stages.runner import BatchStation, PaceClock, Station
from tests.model_plans import plan_of, profile_of
from tests.unit.stages.models.gpu.drivers import program

ENDS = (0, 7)
PASSED = BatchCheck(most=32, exact=True, speedup=4.0)


@asynccontextmanager
async def runner_of(
    model: Model,
    check: BatchCheck | None = PASSED,
    layer_s: float = 0.001,
    accelerator: Accelerator | None = None,
    **options: object,
) -> AsyncIterator[LitertRunner]:
    """A runner that knows what a check of the whole model would find."""
    store = SegmentStore(model)
    if check is not None:
        store_check(check, store, *ENDS, 1)
    chosen = RunnerOptions(**{"batches": "exact"} | options)  # type: ignore[arg-type]
    profiles = {model.name: profile_of(model, layer_s)}
    prepared = Prepared(profiles=profiles, stores={model.name: store}, accelerator=accelerator)
    runner = LitertRunner([model], chosen, prepared=prepared)
    try:
        await runner.prepare(plan_of(model, "t"), *ENDS)
        yield runner
    finally:
        await runner.close()


def station(runner: LitertRunner, model: Model, task_id: str = "t") -> Station:
    return runner.station(plan_of(model, task_id), *ENDS, PaceClock())


def sample(seed: int) -> list[Array]:
    return [np.random.default_rng(seed).random((1, 28, 28, 1), dtype=np.float32)]


def test_each_sample_of_a_batch_gets_the_result_that_it_has_alone(lenet: Model) -> None:
    async def run() -> None:
        whole = SegmentRunner(lenet.source)
        async with runner_of(lenet) as runner:
            stations = [station(runner, lenet, f"t{number}") for number in range(6)]
            jobs = [
                one.run(at, sample(10 * number + at), 0.0) for number, one in enumerate(stations) for at in range(3)
            ]
            results = await asyncio.gather(*jobs)
            for at, (result,) in enumerate(results):
                assert result.tobytes() == whole.run(sample(10 * (at // 3) + at % 3))[0].tobytes()
            sizes = runner.batch_sizes()
            assert max(sizes) > 1
            assert sum(size * batches for size, batches in sizes.items()) == 18
            assert (runner.batch_segments() or {})["lenet 1..7"] == ""
            for one in stations:
                one.close()

    asyncio.run(run())


def test_a_sample_of_the_wrong_shape_fails_alone(lenet: Model) -> None:
    async def run() -> None:
        async with runner_of(lenet) as runner:
            one = station(runner, lenet)
            wrong = [np.zeros((2, 28, 28, 1), np.float32)]
            inputs = [sample(1), wrong, sample(2)]
            jobs = [one.run(at, values, 0.0) for at, values in enumerate(inputs)]
            found = await asyncio.gather(*jobs, return_exceptions=True)
            assert isinstance(found[1], ModelError)
            whole = SegmentRunner(lenet.source)
            for at in (0, 2):
                assert found[at][0].tobytes() == whole.run(inputs[at])[0].tobytes()  # type: ignore[index]

    asyncio.run(run())


def test_the_gpu_computes_in_batches_where_it_found_them_right(lenet: Model) -> None:
    async def run() -> None:
        ticks = count()  # any run takes one tick, so that batches pay
        accelerator = Accelerator(
            AcceleratorOptions(batches=(4,)), GpuProcess(program("scripted")), lambda: float(next(ticks))
        )
        async with runner_of(lenet, None, accelerator=accelerator) as runner:
            one = station(runner, lenet)
            assert isinstance(one, BatchStation)
            results = await asyncio.gather(*(one.run(at, sample(at), 0.0) for at in range(4)))
            whole = SegmentRunner(lenet.source)
            for at, (result,) in enumerate(results):
                assert relative_difference(result, whole.run(sample(at))[0]) < 1e-4
            assert runner.batch_sizes() == {4: 1}
            one.close()

    asyncio.run(run())


def test_after_a_fault_of_the_gpu_new_tasks_are_computed_in_batches_of_the_cpu(lenet: Model) -> None:
    """Although a task that began on the GPU goes on."""

    async def run() -> None:
        ticks = count()
        options, driver = AcceleratorOptions(batches=(4,)), program("scripted", dies_at=CHECKS + 10)
        accelerator = Accelerator(options, GpuProcess(driver), lambda: float(next(ticks)))
        async with runner_of(lenet, accelerator=accelerator) as runner:
            before = station(runner, lenet)
            assert isinstance(before, BatchStation)
            while accelerator.holds("lenet", *ENDS):
                await before.run(0, sample(0), 0.0)
            await runner.prepare(plan_of(lenet, "later"), *ENDS)
            sizes = dict(runner.batch_sizes())
            later = station(runner, lenet, "later")
            await asyncio.gather(*(later.run(at, sample(at), 0.0) for at in range(64)))
            assert set(runner.batch_sizes()) - set(sizes) == {32}
            for one in (before, later):
                one.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "check", "layer_s"),
    [
        ({"batches": "off"}, PASSED, 0.001),
        ({"slowdown": 2.0}, PASSED, 0.001),  # a slower machine is emulated, task by task
        ({}, PASSED, 0.00001),  # computed on the event loop
        ({}, BatchCheck(most=8, difference=1e-6, speedup=4.0), 0.001),
        ({}, BatchCheck(most=8, exact=True, speedup=1.0), 0.001),
    ],
)
def test_other_segments_are_computed_one_by_one(
    lenet: Model, options: dict[str, object], check: BatchCheck, layer_s: float
) -> None:
    async def run() -> None:
        async with runner_of(lenet, check, layer_s, None, **options) as runner:
            assert not isinstance(station(runner, lenet), BatchStation)

    asyncio.run(run())


def test_any_accepts_a_segment_whose_results_differ_slightly(lenet: Model) -> None:
    async def run() -> None:
        async with runner_of(lenet, BatchCheck(most=8, difference=1e-6, speedup=4.0), batches="any") as runner:
            assert isinstance(station(runner, lenet), BatchStation)

    asyncio.run(run())


def test_an_unknown_segment_is_checked_in_the_background(
    lenet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that needs it first does not wait for the check, and is computed in batches after it."""
    checking, go_on = threading.Event(), threading.Event()

    def check(store: SegmentStore, begin: int, end: int, **more: object) -> BatchCheck:
        checking.set()
        assert go_on.wait(60)
        return PASSED

    monkeypatch.setattr(litert_batches, "check_batches", check)
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))  # knows no checks

    async def run() -> None:
        async with runner_of(lenet, None) as runner:
            one = station(runner, lenet)
            assert isinstance(one, BatchStation)
            await asyncio.to_thread(checking.wait, 60)
            assert one.most_at_once == 1
            alone = await asyncio.gather(*(one.run(at, sample(at), 0.0) for at in range(4)))
            assert runner.batch_sizes() == {1: 4}
            go_on.set()
            while one.most_at_once == 1:
                await asyncio.sleep(0)
            together = await asyncio.gather(*(one.run(at, sample(at), 0.0) for at in range(4)))
            assert max(runner.batch_sizes()) > 1
            assert [result.tobytes() for (result,) in together] == [result.tobytes() for (result,) in alone]

    asyncio.run(run())


def test_the_layers_behind_useful_cuts_are_checked_from_the_start(lenet: Model) -> None:
    async def run() -> None:
        async with runner_of(lenet, layer_s=0.0002) as runner:
            assert (runner.batch_segments() or {}).keys() == {f"lenet {begin}..7" for begin in (1, 5, 6, 7)}
        async with runner_of(lenet, layer_s=0.0001) as runner:  # the last layer is computed on the event loop
            assert (runner.batch_segments() or {}).keys() == {f"lenet {begin}..7" for begin in (1, 5, 6)}

    asyncio.run(run())


def test_closing_ends_a_check_that_waits_for_another_process_that_measures(
    lenet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))
    known = set(threading.enumerate())

    async def run() -> None:
        with measuring_alone():
            async with runner_of(lenet, None):
                checks = [one for one in set(threading.enumerate()) - known if one.name.startswith("check-batches")]
            (checker,) = checks
            await asyncio.to_thread(checker.join, 10)
            assert not checker.is_alive()

    asyncio.run(run())
