"""What a stage computes with: at this machine's speed, or paced by a profile of another one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from bus.errors import ConfigError
from bus.values import Role
from deploy.commands.services.stage_options import StageFlags
from deploy.services.runners import gpu_options, make_runner
from deploy.services.settings import CloudOptions, EdgeOptions, NodeOptions, Served, ServedModel, options_of
from stages.litert_runner import LitertRunner
from stages.models.gpu.accelerator import AcceleratorOptions
from stages.runner import ComputesBatches
from stages.zoo.registry import load_model
from tests.software_gpu import use_driver
from tests.unit.stages import built_models


def profile(folder: Path, sha256: str) -> str:
    """A file in which LeNet takes a second a layer."""
    cuts = load_model("lenet").manifest.cuts
    entry = {
        "model": "lenet",
        "sha256": sha256,
        "platform": "slow",
        "layer_names": [cut.name for cut in cuts[1:]],
        "layer_s": [1.0] * (len(cuts) - 1),
        "cut_bytes": [cut.cut_bytes for cut in cuts],
    }
    tiers = {"device": [entry], "edge": [entry], "cloud": [entry]}
    path = folder / "slow.json"
    path.write_text(json.dumps({"version": 1, "name": "slow", "link1_bps": 1, "link2_bps": 1} | tiers))
    return str(path)


def test_real_inference_is_paced_by_a_profile(tmp_path: Path) -> None:
    model = load_model("lenet")
    runner = make_runner(
        Role.EDGE, NodeOptions(name="e", profile=profile(tmp_path, model.sha256), slowdown=2.0), ["lenet"]
    )
    assert isinstance(runner, LitertRunner)
    (announced,) = runner.profiles()
    assert set(announced.layer_s) == {2.0}
    assert runner._paced
    asyncio.run(runner.close())


def test_a_profile_of_another_model_of_that_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="different lenet") as refused:
        make_runner(Role.EDGE, NodeOptions(name="e", profile=profile(tmp_path, "0" * 64)), ["lenet"])
    assert "modelled" in (refused.value.remedy or "")


@pytest.fixture
def two_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "halves.tflite"
    path.write_bytes(built_models.two_halves().to_bytes())
    return str(path)


def test_a_stage_serves_the_signatures_it_was_told_to(two_halves: str) -> None:
    entries: list[Served] = [two_halves, ServedModel(model=two_halves, signature="decode")]
    runner = make_runner(Role.EDGE, NodeOptions(name="e"), entries)
    assert [(profile.model, profile.cut_bytes[0]) for profile in runner.profiles()] == [
        ("halves", 4 * 12),
        ("halves.decode", 4 * 200),
    ]
    asyncio.run(runner.close())


def test_two_models_of_one_name_are_refused(two_halves: str, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "halves.tflite"
    other.parent.mkdir()
    other.write_bytes(built_models.residual().to_bytes())
    with pytest.raises(ConfigError, match="two models are named halves"):
        make_runner(Role.EDGE, NodeOptions(name="e"), [two_halves, str(other)])


def test_flags_name_the_signature_and_shapes_of_one_model() -> None:
    chosen = StageFlags(models=["m.tflite"], signature="decode", input_shape=["x=1x128"]).served()
    assert chosen == [ServedModel(model="m.tflite", signature="decode", input_shape={"x": "1x128"})]
    assert StageFlags(models=["a,b"]).served() == ["a", "b"]
    with pytest.raises(ConfigError, match="need exactly one --model"):
        StageFlags(models=["a", "b"], signature="decode").served()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (NodeOptions(name="d"), None),
        (EdgeOptions(name="e"), None),
        (EdgeOptions(name="e", accelerator="gpu"), AcceleratorOptions()),
        (EdgeOptions(name="e", accelerator="gpu", batches="off"), AcceleratorOptions(batches=())),
        (
            CloudOptions(name="c", accelerator="auto", gpu_tolerance=1e-2),
            AcceleratorOptions(tolerance=1e-2, only_if_faster=True),
        ),
    ],
)
def test_only_edges_and_clouds_that_ask_for_a_gpu_use_one(
    options: NodeOptions, expected: AcceleratorOptions | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_driver(monkeypatch, tmp_path / "none.json")
    model = load_model("lenet")
    assert gpu_options(options) == expected
    timed = options.model_copy(update={"profile": profile(tmp_path, model.sha256)})
    with capture_logs() as logs:
        runner = make_runner(Role.EDGE, timed, ["lenet"])
    asyncio.run(runner.close())
    assert [entry["event"] for entry in logs if "GPU" in entry.get("reason", "")] == (
        ["segment runs on the CPU"] if expected else []
    )


@pytest.mark.parametrize(("name", "value"), [("accelerator", "tpu"), ("gpu_tolerance", 0), ("batches", "some")])
def test_wrong_settings_of_inference_name_the_setting(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name.replace("_", ".")):
        options_of(EdgeOptions, name="e", **{name: value})


def test_flags_take_a_number_of_threads_or_choose_it() -> None:
    asked = {text: StageFlags(num_threads=text).machine()["threads"] for text in ("auto", "1", "65")}
    assert asked == {"auto": "auto", "1": 1, "65": 65}
    assert StageFlags().machine()["threads"] == NodeOptions(name="e").threads == 1
    with pytest.raises(ConfigError, match="--num-threads 0: must be auto or a number from 1 to 1024"):
        StageFlags(num_threads="0").machine()


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        (NodeOptions(name="d"), False),
        (EdgeOptions(name="e"), True),
        (CloudOptions(name="c"), True),
        (CloudOptions(name="c", batches="off"), False),
    ],
)
def test_edges_and_clouds_compute_in_batches_unless_told_otherwise(
    options: NodeOptions, batches: bool, tmp_path: Path
) -> None:
    timed = options.model_copy(update={"profile": profile(tmp_path, load_model("lenet").sha256)})
    runner = make_runner(Role.EDGE, timed, ["lenet"])
    asyncio.run(runner.close())
    assert isinstance(runner, ComputesBatches)
    assert (runner.batch_segments() is not None) == batches
