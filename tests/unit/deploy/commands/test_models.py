"""`deepar models ...` and `deepar profile`: what they print for programs and for people, and their exit codes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from bus.errors import ConfigError, CutError, ModelError
from bus.values import ModelProfile, Role
from deploy.commands import models
from deploy.services.runners import make_runner
from deploy.services.settings import NodeOptions
from stages.models.profiler import ProfileCache
from stages.models.runtime.litert import SegmentRunner
from stages.models.verify import pairs_of, verify
from stages.zoo.registry import digits, load_model
from tests.software_gpu import use_driver
from tests.unit.stages import built_models

runner = CliRunner()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def app() -> Any:
    whole = typer.Typer()
    whole.add_typer(models.app, name="models")
    whole.command("profile")(models.profile)
    return whole


def call(app: Any, *words: str) -> Result:
    result = runner.invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def read(app: Any, *words: str) -> dict[str, Any]:
    result = call(app, *words, "--json")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_list_names_the_paper_s_networks_and_mobilenet(app: Any) -> None:
    assert [entry["name"] for entry in read(app, "models", "list")["models"]] == [
        "lenet",
        "alexnet",
        "vgg16",
        "deepface",
        "mobilenet",
    ]
    assert "LeNet-5" in call(app, "models", "list").stdout


def test_show_tells_what_a_model_takes_and_gives(app: Any) -> None:
    shown = read(app, "models", "show", "lenet")
    assert shown["layers"] == 7
    assert shown["inputs"][0]["shape"] == [1, 28, 28, 1]
    assert shown["kinds"] == {"CONV_2D": 2, "MAX_POOL_2D": 2, "FULLY_CONNECTED": 3}
    assert "lenet" in call(app, "models", "show", "lenet").stdout


def test_cuts_has_every_position(app: Any) -> None:
    found = read(app, "models", "cuts", "lenet")
    assert (found["model"], found["layers"], len(found["cuts"])) == ("lenet", 7, 8)
    second = found["cuts"][2]
    assert second == {
        "position": 2,
        "name": "maxpool_1",
        "tensors": [{"name": "maxpool_1", "dtype": "float32", "shape": [1, 14, 14, 6]}],
        "cut_bytes": 14 * 14 * 6 * 4,
        "work_share": pytest.approx(0.29, abs=0.01),
        "useful": False,
        "cuttable": True,
        "reason": None,
    }
    useful = [cut["position"] for cut in read(app, "models", "cuts", "lenet", "--useful")["cuts"]]
    assert useful == [cut["position"] for cut in found["cuts"] if cut["useful"]]
    assert "maxpool_1" in call(app, "models", "cuts", "lenet").stdout


def test_slice_writes_parts_that_run(app: Any, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    found = read(app, "models", "slice", "lenet", "--cut1", "maxpool_1", "--cut2", "5", "--out", str(out))
    assert set(found["parts"][0]) == {"role", "file", "first", "last", "size_bytes", "sha256"}
    values = [digits()[0][:1]]
    for part in found["parts"]:
        values = SegmentRunner(out / part["file"]).run(values)
    assert values[0].argmax() == digits()[1][0]
    assert json.loads(Path(found["manifest"]).read_text())["model"] == "lenet"
    assert "edge" in call(app, "models", "slice", "lenet", "--cut1", "1", "--cut2", "2", "--out", str(out)).stdout
    with pytest.raises(CutError, match="is after"):
        call(app, "models", "slice", "lenet", "--cut1", "4", "--cut2", "2", "--out", str(out))


def test_verify_reports_as_promised(app: Any, tmp_path: Path) -> None:
    found = read(app, "models", "verify", "lenet", "--cuts", "all")
    assert (found["positions"], found["checked"], found["bit_identical"]) == (8, 36, True)
    assert (found["max_abs_diff"], found["worst"], found["uncuttable"]) == (0.0, None, [])
    np.savez(tmp_path / "in.npz", input=digits()[0][:5])
    given = read(
        app, "models", "verify", "lenet", "--cuts", "single", "--inputs", str(tmp_path / "in.npz"), "--samples", "0"
    )
    assert given["samples"] == 5
    assert "bit-identical" in call(app, "models", "verify", "lenet", "--cuts", "2").stdout


def verdict(capsys: pytest.CaptureFixture[str], *, as_json: bool, **changed: Any) -> str:
    """What is printed for a real report of LeNet with some fields changed; it must end with exit code 1."""
    lenet = load_model("lenet")
    report = verify(lenet, pairs_of(lenet, "single", 0), [[digits()[0][:1]]])
    with pytest.raises(typer.Exit) as ended:
        models.print_verdict(dataclasses.replace(report, bit_identical=False, **changed), lenet, 1, as_json=as_json)
    assert ended.value.exit_code == 1
    return capsys.readouterr().out


def test_a_difference_is_printed_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    changed = {"max_abs_diff": 1.0, "worst": (2, 2), "differing": ((2, 2),)}
    found = json.loads(verdict(capsys, as_json=True, **changed))
    assert (found["worst"], found["differing"]) == ({"cut1": 2, "cut2": 2}, [{"cut1": 2, "cut2": 2}])
    assert "different" in verdict(capsys, as_json=False, **changed)


def test_verify_refuses_what_it_cannot_use(app: Any, tmp_path: Path) -> None:
    (tmp_path / "in.npz").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="cannot be read as an"):
        call(app, "models", "verify", "lenet", "--inputs", str(tmp_path / "in.npz"))
    with pytest.raises(ConfigError, match="no inputs to run"):
        call(app, "models", "verify", "lenet", "--samples", "0")
    with pytest.raises(ModelError, match="as asked for"):
        call(app, "models", "show", "lenet", "--sha256", "0" * 64)


def test_profile_measures_codecs_on_real_inputs(app: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", images=digits()[0][:4], labels=digits()[1][:4])
    words = ("profile", "lenet", "--num-runs", "1", "--codecs", "--calibration", str(tmp_path / "few.npz"))
    found = read(app, *words, "--out", str(tmp_path / "profile.json"))
    assert {row["cut"] for row in found["codecs"]} == set(range(7))
    assert all(row["ratio"] > 1 and row["encode_bytes_per_s"] > 0 for row in found["codecs"])
    file = str(tmp_path / "few.npz")
    assert found["calibration"] == {"samples": 4, "classes": True, "lowest_proven": 0.25, "file": file}
    written = ModelProfile.model_validate_json((tmp_path / "profile.json").read_bytes())
    assert written.codecs is not None
    assert [(one.position, one.codec) for one in written.codecs] == [
        (row["cut"], row["codec"]) for row in found["codecs"]
    ]
    assert len(written.agreements or ()) == len(found["pairs"]) > 0
    shown = call(app, *words).stdout
    assert "exact" in shown
    assert "samples of 4 with the same best class; all of them prove at least 25.0%" in shown
    for wrong in (words[:4] + words[5:], ("profile", "alexnet", "--codecs")):
        with pytest.raises(ConfigError, match=r"without --codecs|no calibration samples"):
            call(app, *wrong)


def test_profile_measures_batches_of_every_layer(app: Any, tmp_path: Path) -> None:
    words = ("profile", "lenet", "--num-runs", "1", "--batches")
    found = read(app, *words, "--out", str(tmp_path / "profile.json"))
    assert [row["name"] for row in found["batches"]] == [row["name"] for row in found["layers"]]
    for row in found["batches"]:
        assert list(row["factors"]) == ["2", "4", "8", "16", "32"]
        assert row["max_rel_diff"] == 0
    written = ModelProfile.model_validate_json((tmp_path / "profile.json").read_bytes())
    assert written.executors == found["executors"] >= 1
    assert written.batch is not None
    assert [one.batch for one in written.batch] == [2, 4, 8, 16, 32]
    assert written.batch[2].factors == tuple(row["factors"]["8"] for row in found["batches"])
    shown = call(app, *words).stdout
    assert "times as fast per sample, in batches of" in shown
    assert shown.count("exact") == 7
    assert "batches" not in read(app, *words[:-1])


def test_profile_writes_what_nodes_announce_and_a_chart(app: Any, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    found = read(app, "profile", "lenet", "--num-runs", "2", "--out", str(out), "--platform", "bench")
    assert (found["model"], found["platform"], len(found["layers"])) == ("lenet", "bench", 7)
    assert {"position", "name", "kind", "median_s", "spread_s", "output_bytes"} <= set(found["layers"][0])
    assert found["sum_of_slices_s"] == pytest.approx(sum(layer["median_s"] for layer in found["layers"]))
    assert ModelProfile.model_validate_json(out.read_text()).whole_s == found["whole_s"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "conv_1" in call(app, "profile", "lenet", "--num-runs", "1", "--chart", str(tmp_path / "x.svg")).stdout
    assert (tmp_path / "x.svg").exists()


def test_profile_chooses_the_threads_and_stages_use_what_it_measured(
    app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("stages.models.thread_count.usable_cores", lambda: 2)
    monkeypatch.setattr("stages.models.thread_count.least_time_s", lambda model, threads: {1: 2.0, 2: 1.0}[threads])
    words = ("profile", "lenet", "--num-runs", "1")
    shown = call(app, *words, "--num-threads", "auto", "--json")
    assert "threads for one inference of lenet: 2 (measured 1: 2e+03 ms, 2: 1e+03 ms)" in shown.stderr
    found = json.loads(shown.stdout)
    assert found["num_threads"] == 2
    stored = ProfileCache().find(load_model("lenet"), 2)
    assert stored is not None
    assert stored.whole_s == found["whole_s"]
    monkeypatch.setattr("stages.models.thread_count.least_time_s", None)  # measured already
    said: list[str] = []
    runner = make_runner(Role.EDGE, NodeOptions(name="e", threads="auto"), ["lenet"], said.append)
    assert runner.profiles()[0].whole_s == found["whole_s"]
    assert said[0] == "threads for one inference of lenet: 2 (measured 1: 2e+03 ms, 2: 1e+03 ms)"
    assert not any("measuring" in line for line in said)
    asyncio.run(runner.close())
    assert read(app, *words)["num_threads"] == 1
    for wrong in ("0", "65", "all"):
        with pytest.raises(ConfigError, match=f"--num-threads {wrong}: must be auto or a number from 1 to 64"):
            call(app, *words, "--num-threads", wrong)


def test_verify_says_which_parts_the_gpu_must_not_compute(
    app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_driver(monkeypatch, tmp_path / "none.json")  # no GPU
    words = ("models", "verify", "lenet", "--cuts", "single", "--accelerator", "gpu")
    result = call(app, *words, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["bit_identical"] is True
    assert {"1..2", "3..7", "1..7"} <= {row["segment"] for row in found["gpu"]}
    for row in found["gpu"]:
        assert (row["max_rel_diff"], row["trusted"]) == (None, False)
        assert "no usable GPU" in row["reason"]
    shown = call(app, *words).stdout
    assert "refused on the GPU: 13 of 13 parts" in shown
    assert "and 5 more" in shown


def test_profile_says_why_the_gpu_does_not_compute_a_model(
    app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_driver(monkeypatch, tmp_path / "none.json")  # no GPU
    out = tmp_path / "profile.json"
    words = ("profile", "lenet", "--num-runs", "1", "--accelerator", "gpu")
    found = read(app, *words, "--out", str(out))
    assert (found["gpu"]["whole_s"], found["gpu"]["batches"]) == (None, [])
    assert "no usable GPU" in found["gpu"]["reason"]
    written = ModelProfile.model_validate_json(out.read_text())
    assert (written.accelerator, written.not_on_gpu) == ("cpu", found["gpu"]["reason"])
    assert f"not on the GPU: {written.not_on_gpu}" in call(app, *words).stdout
    assert "gpu" not in read(app, *words[:4])


def test_build_writes_a_network_with_the_user_s_own_weights(app: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    shapes = {"conv_1": (6, 5, 5, 1), "conv_2": (16, 5, 5, 6), "fc_1": (120, 400), "fc_2": (84, 120), "fc_3": (10, 84)}
    arrays: dict[str, Any] = {f"{name}/kernel": rng.random(shape, np.float32) for name, shape in shapes.items()}
    arrays |= {f"{name}/bias": np.zeros(shape[0], np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "mine.npz", **arrays)
    out = tmp_path / "mine.tflite"
    words = ("models", "build", "lenet", "--weights", str(tmp_path / "mine.npz"), "--out", str(out))
    assert read(app, *words)["size_bytes"] == out.stat().st_size
    assert read(app, "models", "verify", str(out), "--cuts", "single")["bit_identical"]
    np.savez(tmp_path / "mine.npz", **{**arrays, "fc_1/kernel": arrays["fc_2/kernel"]})
    out.unlink()
    with pytest.raises(ConfigError, match=r"fc_1/kernel has the shape \(84, 120\), not \(120, 400\)"):
        call(app, *words)
    assert not out.exists()


def test_a_difference_without_bound_is_null_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    printed = verdict(capsys, as_json=True, max_abs_diff=float("inf"), worst=(1, 2))
    found = json.loads(printed, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (found["max_abs_diff"], found["not_finite"]) == (None, {"max_abs_diff": "infinity"})


@pytest.fixture
def halves(tmp_path: Path) -> str:
    path = tmp_path / "halves.tflite"
    path.write_bytes(built_models.two_halves().to_bytes())
    return str(path)


def test_show_lists_signatures_and_says_which_is_meant(app: Any, halves: str) -> None:
    shown = read(app, "models", "show", halves)
    assert shown["signature"] == "encode"
    assert [(one["name"], one["meant"]) for one in shown["signatures"]] == [("encode", True), ("decode", False)]
    assert shown["unseen"] == ["signature decode"]
    words = call(app, "models", "show", halves, "--signature", "decode").stdout
    assert "encode(picture) -> code: --signature encode" in words
    assert "decode(code) -> picture: selected" in words


def test_every_command_takes_a_signature(app: Any, halves: str, tmp_path: Path) -> None:
    chosen = (halves, "--signature", "decode")
    assert read(app, "models", "show", *chosen)["inputs"][0]["shape"] == [1, 200]
    assert read(app, "models", "cuts", *chosen)["layers"] == 5
    parts = read(app, "models", "slice", *chosen, "--cut1", "1", "--cut2", "3", "--out", str(tmp_path))
    assert [part["file"] for part in parts["parts"]] == [
        f"halves.decode-{layers}.tflite" for layers in ("1-1", "2-3", "4-5")
    ]
    assert json.loads((tmp_path / "manifest.json").read_text())["signature"] == "decode"
    verdict = read(app, "models", "verify", *chosen)
    assert (verdict["signature"], verdict["unseen"]) == ("decode", ["signature encode"])
    assert read(app, "profile", *chosen, "--num-runs", "1")["model"] == "halves.decode"
    assert "not looked at: signature decode" in call(app, "models", "verify", halves).stdout


def test_every_command_takes_the_shape_of_an_open_input(app: Any, tmp_path: Path) -> None:
    path = tmp_path / "sound.tflite"
    path.write_bytes(built_models.open_length().to_bytes())
    chosen = (str(path), "--input-shape", "audio=1x20x1x1")
    assert read(app, "models", "show", *chosen)["inputs"][0]["shape"] == [1, 20, 1, 1]
    assert read(app, "models", "cuts", *chosen)["cuts"][1]["tensors"][0]["shape"] == [1, 7, 1, 3]
    assert read(app, "models", "slice", *chosen, "--cut1", "1", "--out", str(tmp_path / "parts"))["parts"]
    assert read(app, "models", "verify", *chosen)["bit_identical"]
    assert read(app, "profile", *chosen, "--num-runs", "1")["layers"]
    with pytest.raises(ModelError, match="sound is open") as caught:
        call(app, "models", "show", str(path))
    assert "--input-shape sound=?x?x1x1" in str(caught.value.remedy)


def test_slice_without_cuts_makes_three_parts(app: Any, tmp_path: Path) -> None:
    parts = read(app, "models", "slice", "lenet", "--out", str(tmp_path))["parts"]
    assert [part["role"] for part in parts] == ["device", "edge", "cloud"]
    assert (parts[0]["first"], parts[-1]["last"]) == (1, 7)
    with pytest.raises(ConfigError, match="--cut2 needs --cut1"):
        call(app, "models", "slice", "lenet", "--cut2", "3", "--out", str(tmp_path))
