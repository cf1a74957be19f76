"""LeNet and foreign models through the whole pipeline with a GPU runner, on a software Vulkan driver."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bus.messages import Admitted, Placed, SeedInput, Start, TaskCompleted, TaskSubmitted
from bus.tensors import Array
from bus.values import Execution, Kind, ModelProfile, Objective, Parts, Placement
from deploy.commands.models import app
from deploy.commands.profile import profile
from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.models.difference import relative_difference
from stages.models.gpu.accelerator import CHECKS, Accelerator, AcceleratorOptions
from stages.models.gpu.accelerator import Placed as PlacedSegment
from stages.models.gpu.process import GpuProcess
from stages.models.model import Model
from stages.models.segments.store import SegmentStore
from stages.zoo.registry import load_model
from tests.model_plans import profile_of
from tests.software_gpu import use_driver, use_software_gpu
from tests.unit.stages import built_models
from tests.unit.stages.models.gpu.drivers import program
from tests.unit.stages.scripted_region import scripted_region

commands = typer.Typer()
commands.command("profile")(profile)
commands.add_typer(app, name="models")

SAMPLES = 60
LAYER_S = 0.000_5
TOLERANCE = 1e-4


def served(
    model: Model, cuts: tuple[int, int], process: GpuProcess | None = None
) -> dict[tuple[int, int], PlacedSegment]:
    """Run a task on all three tiers; every result must be the CPU's within the tolerance. Returns where segments ran."""
    profile = profile_of(model, LAYER_S)
    accelerator = Accelerator(AcceleratorOptions(tolerance=TOLERANCE), process)
    prepared = Prepared(profiles={model.name: profile}, accelerator=accelerator)
    runner = LitertRunner([model], RunnerOptions(slowdown=1.01), prepared=prepared)
    shown: dict[int, list[Array]] = {}

    def show(task: TaskSubmitted, sample: int, outputs: list[Array]) -> None:
        shown[sample] = outputs

    cut1, cut2 = cuts
    names = ("input", *profile.layer_names)
    placement = Placement(
        kind=Kind.DEVICE_EDGE_CLOUD, edge="e", cut1=cut1, cut2=cut2, cut1_name=names[cut1], cut2_name=names[cut2],
        link1_bps=40_000_000, link2_bps=20_000_000,
    )  # fmt: skip
    task = TaskSubmitted(task_id="t", device="d", model=model.name, samples=SAMPLES, input=SeedInput(seed=5))

    async def run() -> None:
        async with scripted_region(runner=runner, on_result=show) as region:
            placed = Placed(
                task_id="t", attempt=1, device="d", model=model.name, sha256=model.sha256, samples=SAMPLES, policy="p",
                objective=Objective.PIPELINED, execution=Execution.STREAMING, placement=placement, start_s=0.0,
                wait_s=0.0, delay_s=1.0, parts=Parts(),
            )  # fmt: skip
            await region.decide(Admitted(task=task), placed, Start(task_id="t", attempt=1, device="d", at_s=0.0))
            async with asyncio.timeout(60.0):
                while not region.events():
                    await asyncio.sleep(0.02)
            (completed,) = region.events()
            assert isinstance(completed, TaskCompleted), completed

    placements = {}
    try:
        asyncio.run(run())
        placements = {(begin, end): where for (_, begin, end), where in accelerator.placements().items()}
    finally:
        asyncio.run(runner.close())
    assert len(shown) == SAMPLES
    store = SegmentStore(model)
    whole, read = store.get(0, model.graph.depth), runner.open_input(task)
    for sample, outputs in shown.items():
        for output, expected in zip(outputs, whole.run(read(sample)), strict=True):
            assert relative_difference(output, expected) <= 3 * TOLERANCE, f"sample {sample} differs"
    store.close()
    return placements


def on_gpu(placements: dict[tuple[int, int], PlacedSegment]) -> set[tuple[int, int]]:
    return {ends for ends, placed in placements.items() if placed.files is not None}


def test_lenet_runs_wholly_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use_software_gpu(monkeypatch)
    assert {(0, 7), (0, 2), (2, 4), (4, 7)} <= on_gpu(served(load_model("lenet"), (2, 4)))
    assert {(0, 4), (4, 5), (5, 7)} <= on_gpu(served(load_model("lenet"), (4, 5)))


def test_segments_with_an_implicit_flatten_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_software_gpu(monkeypatch)
    path = tmp_path / "implicit.tflite"
    path.write_bytes(built_models.implicit_flatten(bytes(load_model("lenet").data)))
    placements = served(load_model(path), (2, 4))
    assert on_gpu(placements) == {(0, 2), (2, 4)}
    assert "fc_3 differs from the CPU's" in placements[4, 7].reason
    assert "fc_3 differs from the CPU's" in placements[0, 7].reason
    placements = served(load_model(path), (4, 5))
    assert on_gpu(placements) == {(0, 4), (5, 7)}
    assert "fc_1 differs from the CPU's" in placements[4, 5].reason


@pytest.mark.parametrize("build", ["residual", "inverted_residual", "branches", "normalizing"])
def test_foreign_models_run_on_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, build: str) -> None:
    use_software_gpu(monkeypatch)
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / f"{build}.tflite"
    path.write_bytes(getattr(built_models, build)().to_bytes())
    model = load_model(path)
    inner = [cut.position for cut in model.manifest.cuts if 0 < cut.position < model.manifest.layers]
    cuts = (inner[0], inner[-1])
    placements = served(model, cuts)
    needed = {(0, cuts[0]), cuts, (cuts[1], model.manifest.layers)}
    assert {ends for ends in needed if ends[0] < ends[1]} <= on_gpu(placements), placements


def test_verify_finds_the_parts_of_lenet_right_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use_software_gpu(monkeypatch)
    result = CliRunner().invoke(
        commands, ["models", "verify", "lenet", "--cuts", "single", "--accelerator", "gpu", "--json"]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["gpu"]
    assert len(rows) == 13
    assert all(row["trusted"] and 0 < row["max_rel_diff"] < TOLERANCE for row in rows if row["segment"] != "2..2")


def test_profile_measures_lenet_on_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_software_gpu(monkeypatch)
    out = tmp_path / "profile.json"
    words = ["profile", "lenet", "--num-runs", "1", "--accelerator", "gpu", "--out", str(out), "--json"]
    result = CliRunner().invoke(commands, words)
    assert result.exit_code == 0, result.output
    found, written = json.loads(result.stdout), ModelProfile.model_validate_json(out.read_text())
    assert written.accelerator == "gpu"
    assert found["gpu"]["reason"] == ""
    assert sum(written.layer_s) == pytest.approx(found["gpu"]["whole_s"])
    assert found["gpu"]["whole_s"] > 2 * found["whole_s"], "a software driver is slower than the CPU"


def test_without_a_driver_the_cpu_computes_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_driver(monkeypatch, tmp_path / "none.json")
    placements = served(load_model("lenet"), (2, 4))
    assert on_gpu(placements) == set()
    assert all("no usable GPU" in placed.reason for placed in placements.values()), placements


def test_a_driver_that_dies_in_the_middle_of_a_task_loses_nothing() -> None:
    batches = AcceleratorOptions().batches
    checks = 4 * (CHECKS + sum(batches) + 2 * len(batches))  # runs until the whole and three parts are checked
    placements = served(load_model("lenet"), (2, 4), GpuProcess(program("scripted", dies_at=checks + 4)))
    assert any("died of SIGSEGV while computing" in placed.reason for placed in placements.values()), placements
