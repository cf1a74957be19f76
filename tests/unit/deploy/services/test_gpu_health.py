"""`/readyz` and `/metrics` of a stage say which segments run on the GPU, and why others do not."""

from __future__ import annotations

import asyncio

from bus.memory.bus import MemoryBroker, MemoryBus
from bus.values import Role
from deploy.services.telemetry.metric_help import HELP
from deploy.services.telemetry.probes import Health
from deploy.services.wiring import Stage
from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.membership.settings import NodeSettings
from stages.models.gpu.accelerator import Accelerator, AcceleratorOptions
from stages.models.gpu.process import GpuProcess
from stages.models.model import Model
from stages.zoo.registry import load_model
from tests.model_plans import profile_of
from tests.unit.stages.models.gpu.drivers import program


def health(model: Model, accelerator: Accelerator | None) -> Health:
    async def look() -> Health:
        prepared = Prepared(profiles={model.name: profile_of(model)}, accelerator=accelerator)
        runner = LitertRunner([model], RunnerOptions(), prepared=prepared)
        try:
            async with MemoryBus(MemoryBroker(), "n") as bus:
                return Stage(bus, NodeSettings(name="n", role=Role.EDGE, slots=1), runner).look()
        finally:
            await runner.close()

    return asyncio.run(look())


def test_a_stage_reports_its_segments_on_the_gpu_and_those_it_could_not_use_it_for() -> None:
    lenet = load_model("lenet")
    right = health(lenet, Accelerator(AcceleratorOptions(), GpuProcess(program("scripted"))))
    assert (right.gauges["gpu_segments"], right.gauges["gpu_refused_segments"]) == (1.0, 0.0)
    assert right.detail["not_on_gpu"] == {}
    wrong = health(lenet, Accelerator(AcceleratorOptions(), GpuProcess(program("scripted", error=0.1))))
    assert (wrong.gauges["gpu_segments"], wrong.gauges["gpu_refused_segments"]) == (0.0, 1.0)
    assert "fc_3 differs" in wrong.detail["not_on_gpu"]["lenet 1..7"]
    assert wrong.gauges.keys() <= HELP.keys()


def test_a_stage_that_asks_for_no_gpu_reports_none() -> None:
    plain = health(load_model("lenet"), None)
    assert not any("gpu" in name for name in (*plain.gauges, *plain.detail))
