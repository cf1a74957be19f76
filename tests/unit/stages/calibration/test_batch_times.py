"""Batches that are measured layer by layer, stored, and announced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from bus.tensors import Array
from bus.values import ModelProfile
from stages.calibration import batch_times
from stages.calibration.batch_times import (
    LONG_S,
    SIZES,
    LayerBatches,
    MeasuredBatches,
    measure_and_store_batches,
    measure_batches,
    measure_missing_batches,
    stored_batches,
    with_batches,
)
from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.models.files.graph_builder import GraphBuilder
from stages.models.model import Model, read_model
from stages.models.runtime.litert import SegmentRunner
from stages.models.segments.batch_check import BatchCheck, store_check
from stages.models.segments.store import SegmentStore, StoreLimits
from tests.unit.stages import built_models

EXACT = LayerBatches(factors=(0.7, 0.5, 0.4, 0.3, 0.25), difference=0.0)
NEAR = LayerBatches(factors=(0.9, 0.8), difference=1e-6)
WRONG = LayerBatches(factors=(0.5,), difference=0.3)
IMPOSSIBLE = LayerBatches()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))


def profile(model: Model) -> ModelProfile:
    names = tuple(cut.name for cut in model.manifest.cuts[1:])
    return ModelProfile(
        model=model.name, sha256=model.sha256, platform="here", layer_names=names, layer_s=(0.001,) * len(names),
        cut_bytes=tuple(cut.cut_bytes for cut in model.manifest.cuts),
    )  # fmt: skip


def timed(fixed_s: float, each_s: float) -> Callable[[SegmentRunner, Sequence[Array]], float]:
    """A machine on which a batch of n takes `fixed_s + n * each_s`."""
    return lambda runner, inputs: fixed_s + len(inputs[0]) * each_s


def factors(measured: MeasuredBatches, mode: str = "exact") -> list[tuple[float, ...]] | None:
    """Of each layer, by rising batch."""
    speeds = measured.speeds(mode)  # type: ignore[arg-type]
    if speeds is None:
        return None
    assert [one.batch for one in speeds] == list(SIZES)
    return list(zip(*(one.factors for one in speeds), strict=True))


def load(tmp_path: Path, graph: GraphBuilder) -> Model:
    path = tmp_path / "model.tflite"
    path.write_bytes(graph.to_bytes())
    return read_model(path)


def test_every_layer_of_lenet_is_timed_in_batches_and_stays_exact(lenet: Model) -> None:
    steps: list[str] = []
    found = measure_batches(lenet, step=lambda what, done, total: steps.append(what), time_s=timed(0.0003, 0.0001))
    assert len(found.layers) == 7
    for layer in found.layers:
        assert layer.difference == 0.0
        assert layer.factors == pytest.approx([(0.75 / size + 0.25) for size in SIZES], rel=1e-3)
    assert steps == [*(layer.name for layer in lenet.graph.layers), "done"]


def test_a_layer_that_computes_for_long_is_not_timed_in_larger_batches(lenet: Model) -> None:
    found = measure_batches(lenet, time_s=timed(0.0, LONG_S / 3.5))
    assert [layer.factors for layer in found.layers] == [(1.0, 1.0)] * 7
    assert factors(found) == [(1.0,) * len(SIZES)] * 7


@pytest.mark.parametrize("make", [lambda: built_models.reshaped(wanted=(1, 60)), built_models.stateful])
def test_a_model_that_cannot_be_computed_in_batches_has_none(make: Callable[[], GraphBuilder], tmp_path: Path) -> None:
    model = load(tmp_path, make())
    assert factors(measure_batches(model), "any") is None


def test_results_that_depend_on_the_batch_are_found(tmp_path: Path) -> None:
    graph = GraphBuilder("a layer that turns the batch around, and one that does not")
    x, turned, y = graph.input("input", (1, 6)), graph.tensor("turned", (1, 6)), graph.tensor("positive", (1, 6))
    axis = graph.constant("axis", np.array([0], np.int32))
    graph.operator("REVERSE_V2", [x, axis], [turned], schema.ReverseV2OptionsT())
    graph.operator("RELU", [turned], [y])
    graph.output(y)
    found = measure_batches(load(tmp_path, graph), time_s=timed(0.001, 0.001))
    assert [layer.same("any") for layer in found.layers] == [False, True]
    assert (found.layers[0].difference or 0.0) > 0.01
    assert factors(found) == [(1.0,) * len(SIZES), pytest.approx([0.5 / size + 0.5 for size in SIZES], rel=1e-3)]


def test_no_layer_before_one_that_is_computed_one_by_one_counts_as_faster() -> None:
    ones, last = (1.0,) * len(SIZES), (0.9, 0.8, 0.8, 0.8, 0.8)
    found = MeasuredBatches(sha256="0" * 64, layers=(EXACT, WRONG, EXACT, NEAR, EXACT))
    assert factors(found, "exact") == [ones, ones, ones, ones, EXACT.factors]
    assert factors(found, "any") == [ones, ones, EXACT.factors, last, EXACT.factors]
    for never in (WRONG, IMPOSSIBLE):
        assert factors(MeasuredBatches(sha256="0" * 64, layers=(EXACT, never)), "any") is None


def test_a_profile_gets_the_batches_that_were_measured_here(lenet: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = profile(lenet)
    assert with_batches(plain, lenet, "exact", 1) is plain
    monkeypatch.setattr(batch_times, "usable_cores", lambda: 6)
    measure_and_store_batches(lenet, 2)
    assert stored_batches(lenet, 1) is None
    found = with_batches(plain, lenet, "exact", 2)
    assert found.batch == stored_batches(lenet, 2).speeds("exact")  # type: ignore[union-attr]
    assert found.executors == 3
    assert found.without_batches() == plain
    assert with_batches(plain, lenet, "off", 2) is plain
    on_gpu = plain.model_copy(update={"accelerator": "gpu"})
    assert with_batches(on_gpu, lenet, "exact", 2) is on_gpu


def test_batches_are_measured_again_only_if_asked(lenet: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Model] = []

    def measured(model: Model, **options: object) -> MeasuredBatches:
        asked.append(model)
        return MeasuredBatches(sha256=model.sha256, layers=(EXACT,) * 7)

    monkeypatch.setattr(batch_times, "measure_batches", measured)
    said: list[str] = []
    assert with_batches(profile(lenet), lenet, "exact", 1, remeasure=True).batch is None
    measure_missing_batches(lenet, 1)
    measure_missing_batches(lenet, 1)
    assert len(asked) == 1
    found = with_batches(profile(lenet), lenet, "exact", 1, remeasure=True, say=said.append)
    assert found.batch is not None
    assert len(asked) == 2
    assert said == ["measuring batches of lenet on this machine"]


@pytest.mark.parametrize("passes", [True, False])
def test_a_stage_that_computes_batches_measures_them_once(lenet: Model, passes: bool) -> None:
    async def run() -> None:
        store = SegmentStore(lenet, limits=StoreLimits(replicas=64))
        store.warm()
        for begin in (0, 4, 5, 6):  # the segments that a stage checks at its start
            store_check(BatchCheck(most=32, exact=passes, difference=1.0, speedup=4.0), store, begin, 7, 1)
        options, prepared = RunnerOptions(batches="exact"), Prepared(stores={"lenet": store})
        runner = LitertRunner([lenet], options, prepared=prepared, measured=lambda model, **more: profile(model))
        try:
            assert runner.unmeasured_batches() == ("lenet" if passes else None)
            if not passes:
                return
            assert await runner.measure_batches("lenet")
            assert runner.unmeasured_batches() is None
            here = {"platform": "this machine"}
            (found,) = runner.profiles()
            assert found.batch is not None
            assert found == with_batches(profile(lenet), lenet, "exact", 1).model_copy(update=here)
        finally:
            await runner.close()

    asyncio.run(run())


@pytest.mark.parametrize(("interpreters", "executors"), [(1, 1), (3, 3), (64, 4)])
def test_a_stage_announces_no_more_executors_than_it_has_interpreters(
    lenet: Model, interpreters: int, executors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_times, "usable_cores", lambda: 4)
    measure_missing_batches(lenet, 1)
    store = SegmentStore(lenet, limits=StoreLimits(replicas=interpreters))
    store.warm()
    options, prepared = RunnerOptions(batches="exact"), Prepared(stores={"lenet": store})
    runner = LitertRunner([lenet], options, prepared=prepared, measured=lambda model, **more: profile(model))
    assert runner.profiles()[0].executors == executors
    asyncio.run(runner.close())
