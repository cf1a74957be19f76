"""Profiles: every layer timed, scaled to the whole, remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bus.errors import ConfigError
from bus.values import ModelProfile
from stages import profiler
from stages.model import Model
from stages.profiler import machine_profile, measure, profile_model
from stages.zoo import load_model
from tests.unit.stages import built_models


def test_every_layer_is_timed_and_the_profile_adds_up_to_the_whole(lenet: Model) -> None:
    steps: list[tuple[str, int, int]] = []
    found = measure(lenet, num_runs=3, step=lambda *step: steps.append(step))
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
    found = {layer.name: layer.median_s for layer in measure(alexnet, num_runs=3).layers}
    assert found["conv_2"] > 3 * found["maxpool_2"]
    assert found["fc_1"] > 3 * found["maxpool_3"]


def test_layers_that_cannot_be_cut_apart_share_their_time(tmp_path: Path) -> None:
    path = tmp_path / "stateful.tflite"
    path.write_bytes(built_models.stateful().to_bytes())
    model = load_model(path)
    profile = profile_model(model, num_runs=2)
    assert profile.forbidden == (2, 3, 4)
    assert profile.layers == 6
    assert sum(profile.layer_s) == pytest.approx(profile.whole_s or 0)


@pytest.mark.parametrize("wrong", [{"num_runs": 0}, {"warmup_runs": -1}, {"num_threads": 0}])
def test_a_profile_needs_runs(lenet: Model, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least one run"):
        measure(lenet, **wrong)


def test_this_machine_is_measured_once(lenet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))
    said: list[str] = []
    first = machine_profile(lenet, say=said.append)
    assert machine_profile(lenet, say=said.append) == first
    assert said == ["measuring lenet on this machine, once"]
    assert ModelProfile.model_validate_json(first.model_dump_json()) == first
    monkeypatch.setattr(profiler, "_processor", lambda: "another")
    machine_profile(lenet, say=said.append)
    machine_profile(lenet, num_threads=2, say=said.append)
    assert len(said) == 3
