"""The GPU's form of a normalisation computes the same as the operator, to rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from stages.models.difference import relative_difference
from stages.models.files.operators import kind_of
from stages.models.gpu.normalization import MOST_CHANNELS, for_gpu
from stages.models.model import Model
from stages.models.runtime.litert import SegmentRunner
from stages.models.slicer import SlicedPart, slice_model
from stages.zoo.registry import load_model
from tests.unit.stages import built_models

REPLACEMENT = ["SQUARE", "CONV_2D", "POW", "MUL"]


def load(tmp_path: Path, **options: float) -> Model:
    path = tmp_path / "normalizing.tflite"
    path.write_bytes(built_models.normalizing(**options).to_bytes())  # type: ignore[arg-type]
    return load_model(path)


def kinds(part: SlicedPart) -> list[str]:
    model = schema.ModelT.InitFromPackedBuf(part.to_bytes(), 0)
    return [kind_of(model.operatorCodes[operator.opcodeIndex]) for operator in model.subgraphs[0].operators]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"radius": 0},
        {"radius": 3, "beta": 0.75},
        {"radius": 9, "beta": 0.5},
        {"bias": 2.0, "alpha": 1e-4, "beta": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_it_computes_the_same(tmp_path: Path, options: dict[str, float], scale: float) -> None:
    part = slice_model(load(tmp_path, **options), 1, 4)
    replaced = for_gpu(part)
    assert kinds(replaced) == [*REPLACEMENT, "CONV_2D", *REPLACEMENT, "CONV_2D"]
    assert (replaced.reads, replaced.makes) == (part.reads, part.makes)
    sample = np.float32(scale) * np.random.default_rng(4).standard_normal((1, 5, 4, 7), dtype=np.float32)
    (found,), (right,) = (SegmentRunner(one.to_bytes()).run([sample]) for one in (replaced, part))
    assert relative_difference(found, right) < 2e-6


def test_the_form_for_the_cpu_keeps_its_bytes(tmp_path: Path, alexnet: Model) -> None:
    part = slice_model(load(tmp_path), 1, 4)
    before = part.to_bytes()
    for_gpu(part)
    assert part.to_bytes() == before
    assert "LOCAL_RESPONSE_NORMALIZATION" in kinds(slice_model(alexnet, 1, 3))


def test_a_part_without_normalisation_keeps_its_bytes(lenet: Model) -> None:
    part = slice_model(lenet, 1, 7)
    assert for_gpu(part).to_bytes() == part.to_bytes()


def test_too_many_channels_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_CHANNELS >= 256, "AlexNet's second normalisation has 256 channels"
    monkeypatch.setattr("stages.models.gpu.normalization.MOST_CHANNELS", 6)
    part = slice_model(load(tmp_path), 1, 4)
    assert for_gpu(part).to_bytes() == part.to_bytes()
