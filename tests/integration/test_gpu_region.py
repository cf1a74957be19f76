"""A region on Kafka whose edge and cloud compute on a software Vulkan driver answers clients as the CPU would."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import deepar
from stages.models.difference import relative_difference
from stages.models.model import Model
from stages.models.runtime.litert import SegmentRunner
from stages.zoo.registry import load_model
from tests.integration.deepar_processes import Process
from tests.integration.serving_system import System, serving_system
from tests.software_gpu import use_software_gpu
from tests.unit.stages import built_models

FOREIGN = ("residual", "branches")
IMPLICIT = "implicit"
"""LeNet with a fully-connected layer that flattens its input itself, which the driver computes wrongly."""

TIERS = ("edge", "cloud")
SAMPLES = 24
TOLERANCE = 1e-4
KILLED_AFTER_S = 0.2
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the models."""
    made = tmp_path_factory.mktemp("gpu-region")
    for name in FOREIGN:
        (made / f"{name}.tflite").write_bytes(getattr(built_models, name)().to_bytes())
    (made / f"{IMPLICIT}.tflite").write_bytes(built_models.implicit_flatten(bytes(load_model("lenet").data)))
    return made


@pytest.fixture(scope="module")
def system(folder: Path) -> Iterator[System]:
    with pytest.MonkeyPatch.context() as patch:
        use_software_gpu(patch)
        patch.setenv("DEEPAR_ACCELERATOR", "gpu")
        models = ["lenet", *(str(folder / f"{name}.tflite") for name in (*FOREIGN, IMPLICIT))]
        with serving_system(folder, models) as made:
            yield made


def ask(system: System, model: Model, tier: str, seed: int = 1) -> None:
    """Let a tier compute samples; every result must be the CPU's within the tolerance."""
    shape = (SAMPLES, *model.manifest.cuts[0].tensors[0].shape[1:])
    inputs = np.random.default_rng(seed).random(shape, dtype=np.float32)
    with deepar.Client(f"http://{system.http}") as client:
        answer = client.infer(model.name, inputs, placement=tier)
    assert answer.parameters["deepar_kind"] == tier
    right = np.concatenate([SegmentRunner(model.source).run([sample[None]])[0] for sample in inputs])
    assert answer.array.shape == right.shape
    for found, expected in zip(answer.array, right, strict=True):
        assert relative_difference(found, expected) <= TOLERANCE


def on_cpu(process: Process, model: str) -> dict[str, str]:
    """The segments of a model that the stage does not run on the GPU, with the reasons."""
    told = process.wait_ready()["not_on_gpu"]
    return {segment: reason for segment, reason in told.items() if segment.split()[0] == model}


def gpu_processes(process: Process) -> list[int]:
    """The children of the stage that hold the driver."""
    tasks = Path(f"/proc/{process.process.pid}/task").iterdir()
    children = [child for task in tasks for child in (task / "children").read_text().split()]
    return [int(one) for one in children if b"stages.models.gpu.child" in Path(f"/proc/{one}/cmdline").read_bytes()]


@pytest.mark.parametrize("name", ["lenet", *FOREIGN])
@pytest.mark.parametrize("tier", TIERS)
def test_models_are_served_from_the_gpu(system: System, folder: Path, name: str, tier: str) -> None:
    ask(system, load_model("lenet" if name == "lenet" else folder / f"{name}.tflite"), tier)
    assert len(gpu_processes(system.running[tier])) == 1
    assert on_cpu(system.running[tier], name) == {}


@pytest.mark.parametrize("tier", TIERS)
def test_a_model_that_the_driver_computes_wrongly_is_served_from_the_cpu(
    system: System, folder: Path, tier: str
) -> None:
    ask(system, load_model(folder / f"{IMPLICIT}.tflite"), tier)
    assert "differs from the CPU's" in on_cpu(system.running[tier], IMPLICIT)[f"{IMPLICIT} 1..7"]


@pytest.mark.parametrize("tier", TIERS)
def test_a_driver_that_dies_while_a_client_asks_loses_no_answer(system: System, tier: str) -> None:
    model, stage = load_model("lenet"), system.running[tier]
    (driver,) = gpu_processes(stage)
    killer = threading.Timer(KILLED_AFTER_S, os.kill, (driver, signal.SIGKILL))
    killer.start()
    until_s = time.monotonic() + PATIENCE_S
    for seed in itertools.count(2):
        ask(system, model, tier, seed)
        if any("died of SIGKILL" in reason for reason in on_cpu(stage, "lenet").values()):
            break
        assert time.monotonic() < until_s, "the stage did not notice that its GPU process died"
    ask(system, model, tier)
