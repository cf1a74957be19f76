"""Measured codecs in the cache, and in the profiles that stages announce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bus.values import Codec, CodecProfile, ModelProfile
from stages.calibration.measurement import MeasuredCodecs
from stages.calibration.samples import Calibration
from stages.calibration.stored import CodecCache, with_codecs
from stages.litert_runner import LitertRunner, RunnerOptions
from stages.models.model import Model
from stages.zoo.registry import digits


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))


def measured(model: Model, encode_s: float = 1e-6, file: str | None = None) -> MeasuredCodecs:
    codec = CodecProfile(position=1, codec=Codec.Q8, bytes=2_600, encode_s=encode_s, decode_s=2e-6, agreement=1.0)
    return MeasuredCodecs(
        sha256=model.sha256, codecs=(codec,), agreements=(), samples=3, classes=True, calibration_file=file
    )


def profile(model: Model) -> ModelProfile:
    cuts = tuple(cut.cut_bytes for cut in model.manifest.cuts)
    names = tuple(cut.name for cut in model.manifest.cuts[1:])
    return ModelProfile(
        model=model.name, sha256=model.sha256, platform="here", layer_names=names,
        layer_s=(0.001,) * len(names), cut_bytes=cuts,
    )  # fmt: skip


def test_a_profile_gets_the_codecs_that_were_measured_here(lenet: Model) -> None:
    plain = profile(lenet)
    assert with_codecs(plain, lenet) is plain
    CodecCache(processor="another").store(lenet, measured(lenet))
    CodecCache(method=-1).store(lenet, measured(lenet))
    assert with_codecs(plain, lenet) is plain
    CodecCache().store(lenet, measured(lenet))
    found = with_codecs(plain, lenet)
    assert (found.codecs, found.calibration_samples) == (measured(lenet).codecs, 3)
    assert found.agreement((1, Codec.Q8), (1, Codec.Q8)) == 1.0


def test_they_are_measured_again_on_the_same_samples(lenet: Model, tmp_path: Path) -> None:
    asked: list[Calibration] = []

    def again(model: Model, calibration: Calibration) -> MeasuredCodecs:
        asked.append(calibration)
        return measured(model, 5e-6, str(calibration.file))

    said: list[str] = []
    assert with_codecs(profile(lenet), lenet, remeasure=True, measure=again) == profile(lenet)  # nothing to repeat
    file = tmp_path / "two.npz"
    np.savez(file, digits()[0][:2])
    CodecCache().store(lenet, measured(lenet, file=str(file)))
    found = with_codecs(profile(lenet), lenet, remeasure=True, say=said.append, measure=again)
    assert [len(one.samples) for one in asked] == [2]
    assert found.codecs is not None
    assert found.codecs[0].encode_s == 5e-6
    assert with_codecs(profile(lenet), lenet) == found

    file.unlink()
    assert with_codecs(profile(lenet), lenet, remeasure=True, say=said.append, measure=again) == found
    assert len(asked) == 1
    assert "lenet were not measured again" in said[-1]
    assert "two.npz" in said[-1]


async def test_a_runner_announces_them_at_the_speed_of_the_machine_that_it_plays(lenet: Model) -> None:
    CodecCache().store(lenet, measured(lenet))

    def here(model: Model, **_: Any) -> ModelProfile:
        return profile(model)

    runner = LitertRunner([lenet], RunnerOptions(slowdown=3.0, platform="slow"), measured=here)
    (announced,) = runner.profiles()
    assert announced.codecs is not None
    assert announced.codecs[0].encode_s == pytest.approx(3e-6)
    assert announced.codecs[0].decode_s == pytest.approx(6e-6)
    assert announced.codecs[0].bytes == 2_600
    assert announced.layer_s[0] == pytest.approx(0.003)
    await runner.close()
