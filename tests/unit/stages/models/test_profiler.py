"""Profiles: every layer timed, scaled to the whole, remembered."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bus.errors import ConfigError
from bus.values import ModelProfile
from stages.models.model import Model
from stages.models.profiler import (
    MAX_TRIES,
    METHOD,
    Measurement,
    ProfileCache,
    TimedRuns,
    machine_profile,
    measure,
    measure_steadily,
    measuring_alone,
)
from stages.models.runtime.litert import SegmentRunner
from stages.models.verify import random_inputs
from stages.zoo.registry import load_model
from tests.unit.stages import built_models


def test_every_layer_is_timed_and_the_profile_adds_up_to_the_whole(lenet: Model) -> None:
    steps: list[tuple[str, int, int]] = []
    found = measure(lenet, TimedRuns(num_runs=3), step=lambda *step: steps.append(step))
    assert [layer.name for layer in found.layers] == [cut.name for cut in lenet.manifest.cuts[1:]]
    assert all(layer.median_s > 0 for layer in found.layers)
    assert found.layers[0].output_bytes == 28 * 28 * 6 * 4
    profile = found.profile("a test")
    assert sum(profile.layer_s) == pytest.approx(found.whole_s)
    assert profile.whole_s == found.whole_s
    assert profile.sum_of_slices_s == pytest.approx(sum(layer.median_s for layer in found.layers))
    assert profile.cut_bytes == tuple(cut.cut_bytes for cut in lenet.manifest.cuts)
    assert steps[0] == ("the whole", 0, 8)
    assert steps[-1] == ("done", 8, 8)


def test_convolutions_of_alexnet_take_longer_than_its_pools(alexnet: Model) -> None:
    found = {layer.name: layer.median_s for layer in measure(alexnet, TimedRuns(num_runs=3)).layers}
    assert found["conv_2"] > 3 * found["maxpool_2"]
    assert found["fc_1"] > 3 * found["maxpool_3"]


def test_layers_that_cannot_be_cut_apart_share_their_time(tmp_path: Path) -> None:
    path = tmp_path / "stateful.tflite"
    path.write_bytes(built_models.stateful().to_bytes())
    model = load_model(path)
    profile = measure(model, TimedRuns(num_runs=2)).profile("this machine")
    assert profile.forbidden == (2, 3, 4)
    assert profile.layers == 6
    assert sum(profile.layer_s) == pytest.approx(profile.whole_s or 0)


@pytest.mark.parametrize("wrong", [{"num_runs": 0}, {"warmup_runs": -1}, {"num_threads": 0}])
def test_a_profile_needs_runs(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least one run"):
        TimedRuns(**wrong)


def test_this_machine_is_measured_once(lenet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))
    said: list[str] = []
    first = machine_profile(lenet, say=said.append)
    assert machine_profile(lenet, say=said.append) == first
    assert said == ["measuring lenet on this machine, once"]
    assert ModelProfile.model_validate_json(first.model_dump_json()) == first
    machine_profile(lenet, say=said.append, cache=ProfileCache(processor="another"))
    machine_profile(lenet, num_threads=2, say=said.append)
    assert len(said) == 3


def test_a_profile_of_another_way_of_measuring_is_measured_again(
    lenet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))
    said: list[str] = []
    machine_profile(lenet, say=said.append)
    machine_profile(lenet, say=said.append)
    assert len(said) == 1
    machine_profile(lenet, say=said.append, cache=ProfileCache(method=METHOD + 1))
    assert len(said) == 2


@pytest.fixture
def quiet(lenet: Model) -> Measurement:
    """A measurement whose times are plain numbers: 8 ms in one piece, 1 ms each layer."""
    found = measure(lenet, TimedRuns(num_runs=1))
    layers = tuple(replace(layer, median_s=0.001) for layer in found.layers)
    return replace(found, whole_s=0.001 * len(layers), layers=layers)


def slower(quiet: Measurement, *, whole: float = 1.0, **by_layer: float) -> Measurement:
    """A measurement disturbed by other processes: times multiplied by these factors."""
    layers = tuple(replace(row, median_s=row.median_s * by_layer.get(row.name, 1.0)) for row in quiet.layers)
    return replace(quiet, whole_s=quiet.whole_s * whole, layers=layers)


class ScriptedMeasure:
    """Stands in for `measure`: returns the given measurements in order, then the last one repeatedly."""

    def __init__(self, *script: Measurement) -> None:
        self.script = script
        self.calls = 0

    def __call__(self, model: Model, runs: TimedRuns, **options: object) -> Measurement:
        self.calls += 1
        return self.script[min(self.calls, len(self.script)) - 1]


def test_a_measurement_that_agrees_is_taken(lenet: Model, quiet: Measurement) -> None:
    take = ScriptedMeasure(slower(quiet, whole=1.2))
    assert measure_steadily(lenet, take=take).whole_s == pytest.approx(1.2 * quiet.whole_s)
    assert take.calls == 1


def test_a_measurement_that_was_disturbed_is_repeated_and_what_was_not_is_kept(
    lenet: Model, quiet: Measurement
) -> None:
    said: list[str] = []
    take = ScriptedMeasure(
        slower(quiet, whole=2.7),
        slower(quiet, whole=3.0, conv_1=9.0),
        slower(quiet, whole=1.1, conv_2=9.0, fc_1=9.0),
    )
    found = measure_steadily(lenet, say=said.append, take=take)
    assert take.calls == 3
    assert found.whole_s == pytest.approx(1.1 * quiet.whole_s)
    assert found.layers == quiet.layers
    assert not said


def test_measurements_that_never_agree_are_said_and_bounded(lenet: Model, quiet: Measurement) -> None:
    said: list[str] = []
    take = ScriptedMeasure(slower(quiet, whole=2.0), slower(quiet, whole=1.9), slower(quiet, whole=2.5))
    found = measure_steadily(lenet, say=said.append, take=take)
    assert take.calls == MAX_TRIES
    assert found.whole_s == pytest.approx(1.9 * quiet.whole_s)
    (line,) = said
    assert "uncertain" in line
    assert "--remeasure" in line


def test_a_noisy_profile_can_be_measured_again(
    lenet: Model, quiet: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))
    take = ScriptedMeasure(slower(quiet, whole=2.7, **{row.name: 2.7 for row in quiet.layers}), quiet)
    for _ in range(2):
        assert machine_profile(lenet, take=take).whole_s == pytest.approx(2.7 * quiet.whole_s)
    assert machine_profile(lenet, remeasure=True, take=take).whole_s == quiet.whole_s
    assert machine_profile(lenet, take=take).whole_s == quiet.whole_s


def test_processes_that_start_together_measure_one_after_the_other(
    lenet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that waited for another one's measurement of the same model uses its result."""
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))
    waits = threading.Event()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("waiting"):
            waits.set()

    second = threading.Thread(target=lambda: said.append(f"{machine_profile(lenet, say=say).whole_s}"))
    with measuring_alone():
        second.start()
        assert waits.wait(60)
        found = measure(lenet, TimedRuns(num_runs=1))
        ProfileCache().store(found, num_threads=1)
    second.join(60)
    assert said == ["waiting for another process that is measuring this machine", f"{found.whole_s}"]


def test_a_profile_that_cannot_be_kept_is_used_all_the_same(
    lenet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is no reason for a stage not to start."""
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))

    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stages.models.files.cache.tempfile.mkstemp", full)
    (tmp_path / "profiles" / "measuring.lock").mkdir(parents=True)  # a folder, so the lock file cannot be opened
    said: list[str] = []
    assert machine_profile(lenet, say=said.append).layers == 7
    assert any("the disk is full" in line for line in said)
    assert any("without the lock" in line for line in said)


def test_time_that_others_had_the_processor_does_not_count(lenet: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = SegmentRunner(lenet.source)
    inputs = random_inputs(lenet, np.random.default_rng(0))
    walls, owns = iter([10.0, 10.9]), iter([3.0, 3.2])
    monkeypatch.setattr("stages.models.runtime.litert.time.perf_counter", lambda: next(walls))
    monkeypatch.setattr("stages.models.runtime.litert.time.thread_time", lambda: next(owns))
    assert runner.timed(inputs) == pytest.approx(0.2)
