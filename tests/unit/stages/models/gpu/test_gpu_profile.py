"""Profiles of models on a GPU: the whole as fast as measured, its layers in proportion to the CPU's."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from bus.values import ModelProfile
from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.models.gpu.accelerator import CHECKS, Accelerator, AcceleratorOptions
from stages.models.gpu.gpu_profile import on_cpu, on_gpu
from stages.models.gpu.process import GpuProcess
from stages.models.model import Model
from stages.models.runtime.trial_run import ChildProgram
from tests.model_plans import profile_of
from tests.unit.stages.models.gpu.drivers import program

LAYER_S = (4.0, 1.0, 5.0, 2.0, 4.0, 3.0, 1.0)


def measured(model: Model, **values: Any) -> ModelProfile:
    return profile_of(model).model_copy(update={"layer_s": LAYER_S, **values})


def test_layers_share_the_time_of_the_whole_and_batches_take_as_long_as_measured(lenet: Model) -> None:
    found = on_gpu(measured(lenet, sum_of_slices_s=21.0, not_on_gpu="no"), {1: 2.0, 8: 6.0})
    assert found.layer_s == pytest.approx([one / 10.0 for one in LAYER_S])
    assert (found.whole_s, found.sum_of_slices_s, found.accelerator, found.not_on_gpu) == (2.0, None, "gpu", None)
    assert found.together_s(8, 0, 7) == pytest.approx(6.0)
    assert found.together_s(8, 0, 2) == pytest.approx(1.5)
    assert found.executors == 1


def test_a_gpu_without_batches_that_pay_has_none_in_its_profile(lenet: Model) -> None:
    found = on_gpu(measured(lenet), {1: 2.0})
    assert (found.batch, found.executors) == (None, None)


def test_a_model_that_the_gpu_refuses_keeps_the_times_of_the_cpu(lenet: Model) -> None:
    found = on_cpu(measured(lenet), "x" * 1000)
    assert found.layer_s == LAYER_S
    assert (found.accelerator, found.not_on_gpu) == ("cpu", "x" * 300)


def announced(
    lenet: Model, child: ChildProgram, prepared: dict[str, ModelProfile] | None = None, **how: Any
) -> ModelProfile:
    """What a stage announces whose samples take one second on CPU and GPU, and whose batches take one second, too."""
    accelerator = Accelerator(AcceleratorOptions(), GpuProcess(child), itertools.count().__next__)
    runner = LitertRunner(
        [lenet],
        RunnerOptions(**({"slowdown": 2.0} | how), platform="edge e"),
        prepared=Prepared(profiles=prepared or {}, accelerator=accelerator),
        measured=lambda model, **_: measured(model),
    )
    (found,) = runner.profiles()
    assert asyncio.run(runner.remeasure("lenet")) is False, "the same machine was measured again"
    asyncio.run(runner.close())
    return found


def test_a_stage_announces_the_speed_of_its_gpu(lenet: Model) -> None:
    found = announced(lenet, program("scripted"))
    assert found.accelerator == "gpu"
    assert sum(found.layer_s) == pytest.approx(2.0), "one second, on an emulated machine that is half as fast"
    assert found.platform == "edge e"


@pytest.mark.parametrize(
    ("how", "batches"),
    [
        ({"slowdown": 1.0, "batches": "exact"}, [8]),
        ({"slowdown": 1.0, "batches": "off"}, []),
        ({"slowdown": 2.0, "batches": "exact"}, []),  # an emulated machine computes samples one by one
    ],
)
def test_a_stage_announces_batches_of_its_gpu_only_if_it_uses_them(
    lenet: Model, how: dict[str, Any], batches: list[int]
) -> None:
    found = announced(lenet, program("scripted"), **how)
    assert found.accelerator == "gpu"
    assert [speed.batch for speed in found.batch or ()] == batches
    assert sum(found.layer_s) == pytest.approx(how["slowdown"])


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        (program("scripted", error=0.1), "differs from the CPU's"),
        (program("absent"), "no usable GPU"),
        (program("scripted", dies_at=CHECKS + 8 + 4), "died of SIGSEGV while computing"),  # while it is measured
    ],
)
def test_a_stage_announces_why_its_gpu_does_not_compute_a_model(lenet: Model, child: ChildProgram, reason: str) -> None:
    found = announced(lenet, child)
    assert found.accelerator == "cpu"
    assert reason in (found.not_on_gpu or "")
    assert found.layer_s == pytest.approx([2.0 * one for one in LAYER_S])


def test_a_profile_that_was_given_is_kept(lenet: Model) -> None:
    found = announced(lenet, program("scripted"), {"lenet": measured(lenet)})
    assert found.layer_s == pytest.approx([2.0 * one for one in LAYER_S])
    assert found.accelerator is None
