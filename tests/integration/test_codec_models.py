"""Codecs on trained models of others: a face landmark model and an iris landmark model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loadgen.bench.codecs.benchmark import QUICK_SAMPLES, run
from tests.client_environment import Clients


@pytest.fixture(scope="module")
def measured(clients: Clients, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = clients.face_landmark.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPAR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        files = [str(folder / f"{name}.tflite") for name in ("face_landmark", "iris_landmark")]
        return run(model=["lenet_int8", *files], quick=True)


def test_three_trained_models_are_measured(measured: dict[str, Any]) -> None:
    assert measured["models"] == [
        {"model": "lenet_int8", "samples": QUICK_SAMPLES, "compared_by": "class"},
        {"model": "face_landmark", "samples": QUICK_SAMPLES, "compared_by": "relative error"},
        {"model": "iris_landmark", "samples": QUICK_SAMPLES, "compared_by": "relative error"},
    ]


@pytest.mark.parametrize("model", ["face_landmark", "iris_landmark"])
def test_eight_bits_are_four_times_as_small_and_nearly_exact(measured: dict[str, Any], model: str) -> None:
    large = [row for row in measured["results"] if row["model"] == model and row["raw_bytes"] > 50_000]
    eight = [row for row in large if row["codec"] == "q8"]
    assert len(eight) > 20
    assert all(row["ratio"] > 4 and row["agreement"] > 0.99 for row in eight)
    four = {row["cut"]: row for row in large if row["codec"] == "q4"}
    assert all(four[row["cut"]]["ratio"] > 2 * row["ratio"] for row in eight)
    assert sum(four[row["cut"]]["agreement"] < row["agreement"] for row in eight) == len(eight)
