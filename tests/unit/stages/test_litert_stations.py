"""Where samples are computed: on the event loop if that takes less time than waking a thread, else in a worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from bus.values import ModelProfile
from stages.litert_runner import INLINE_S, LitertRunner, Prepared, RunnerOptions
from stages.models.model import Model
from stages.rehearsal import rehearse

SHORT_S, LONG_S = INLINE_S / 4, INLINE_S * 2


class CountingPool(ThreadPoolExecutor):
    """Counts what is passed to its threads."""

    jobs = 0

    def submit(self, work: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        self.jobs += 1
        return super().submit(work, *args, **named)


def profile(model: Model, whole_s: float) -> ModelProfile:
    layers = model.manifest.layers
    return ModelProfile(
        model=model.name,
        sha256=model.sha256,
        platform="p",
        layer_names=tuple(f"l{number}" for number in range(layers)),
        layer_s=(whole_s / layers,) * layers,
        cut_bytes=(3136,) * (layers + 1),
    )


@pytest.mark.parametrize(
    ("whole_s", "options", "jobs"),
    [
        (SHORT_S, RunnerOptions(), 0),
        (LONG_S, RunnerOptions(), 1),
        # An emulated slower machine computes at full speed, and waits afterwards.
        (SHORT_S, RunnerOptions(slowdown=8.0), 0),
        (LONG_S, RunnerOptions(slowdown=8.0), 1),
        # With the profile of another machine it is not known how long this one takes.
        (SHORT_S, RunnerOptions(paced=True), 1),
    ],
)
def test_only_samples_that_take_longer_than_waking_a_thread_go_to_one(
    lenet: Model, whole_s: float, options: RunnerOptions, jobs: int
) -> None:
    async def run() -> float:
        measured = {lenet.name: profile(lenet, whole_s)}
        runner = await asyncio.to_thread(
            LitertRunner, [lenet], options, prepared=Prepared(profiles=measured, pool=pool)
        )
        took_s = await rehearse(runner, *runner.profiles())
        await runner.close()
        return took_s

    with CountingPool(1) as pool:
        took_s = asyncio.run(run())
    assert pool.jobs == jobs
    if options.slowdown > 1.0:
        assert took_s >= options.slowdown * whole_s
