"""The benchmark of codecs measures trained models at every cut, and says which ones it left out."""

from __future__ import annotations

import numpy as np
import pytest

from bus.errors import ConfigError
from loadgen.bench.codecs import benchmark, quantized_lenet
from loadgen.bench.codecs.benchmark import LANDMARKS, QUICK_SAMPLES, run
from loadgen.bench.codecs.portraits import EYE, FACE, Piece, portrait_pieces
from stages.models.runtime.litert import SegmentRunner
from stages.zoo.registry import digits, load_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def test_lenet_reaches_its_aim_and_every_cut_has_its_codecs() -> None:
    found = run(model=["lenet"], quick=True)
    assert {row["cut"] for row in found["results"]} == set(range(7))
    for row in found["results"]:
        assert row["ratio"] > 1
        assert row["encode_bytes_per_s"] > 0
        assert row["decode_bytes_per_s"] > 0
        assert 0 <= row["agreement"] <= 1
    assert found["models"] == [{"model": "lenet", "samples": QUICK_SAMPLES, "compared_by": "class"}]
    (aim,) = found["aims"]
    best = [row["ratio"] for row in found["results"] if row["cut"] in (0, 4, 5, 6) and row["agreement"] >= 0.995]
    assert aim["value"] == max(best)
    assert aim["pass"]


def test_an_agreement_below_the_aim_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "AGREEMENT_AIM", 1.1)
    (aim,) = run(model=["lenet"], quick=True)["aims"]
    assert (aim["value"], aim["pass"]) == (0.0, False)


def test_models_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "PACKAGE", "no_such_package")
    found = run(quick=True)
    assert [one["model"] for one in found["models"]] == ["lenet", "lenet_int8"]
    assert all(name in found["note"] for name in LANDMARKS)
    assert found["aims"][0]["value"] == 2
    assert not found["aims"][0]["pass"]
    with pytest.raises(ConfigError, match="face_landmark: the package no_such_package is not installed"):
        run(model=["face_landmark"], quick=True)


def test_networks_with_random_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="no calibration samples"):
        run(model=["alexnet"], quick=True)


@pytest.mark.parametrize("piece", [FACE, EYE])
def test_portraits_differ_and_repeat_with_their_seed(piece: Piece) -> None:
    one, two, again = (portrait_pieces(piece, 3, np.random.default_rng(seed)) for seed in (1, 2, 1))
    assert [array.shape for (array,) in one] == [(1, piece.size, piece.size, 3)] * 3
    assert all(array.min() >= 0 and array.max() <= 1 and array.std() > 0.05 for (array,) in one)
    assert not np.array_equal(one[0][0], one[1][0])
    assert not np.array_equal(one[0][0], two[0][0])
    assert all(np.array_equal(left[0], right[0]) for left, right in zip(one, again, strict=True))


def test_the_quantised_classifier_agrees_with_the_network_that_it_was_made_from() -> None:
    model, float_model = quantized_lenet.quantized_lenet(), load_model("lenet")
    assert all(spec.dtype == "int8" and spec.scales for cut in model.manifest.cuts for spec in cut.tensors)
    small, large = SegmentRunner(model.source), SegmentRunner(float_model.source)
    images, labels = (array[quantized_lenet.RANGED :] for array in digits())
    best = [int(small.run(sample)[0].argmax()) for sample in quantized_lenet.int8_digits()]
    whole = [int(large.run([image[None]])[0].argmax()) for image in images]
    assert len(best) == len(whole) == 400
    assert sum(one == other for one, other in zip(best, whole, strict=True)) >= 398
    assert sum(one == label for one, label in zip(best, labels, strict=True)) >= 395


def test_eight_bit_tensors_are_not_quantised_again_to_eight_bits() -> None:
    found = run(model=["lenet_int8"], quick=True)
    assert {row["codec"] for row in found["results"]} == {"zstd", "q4"}
    assert {row["cut"] for row in found["results"]} == set(range(7))
