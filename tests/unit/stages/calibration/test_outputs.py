"""Agreement of outputs: by the best class, or by the relative error."""

from __future__ import annotations

import numpy as np
import pytest

from bus.tensors import Array
from bus.values import TensorSpec
from stages.calibration.outputs import ReferenceOutputs

LOGITS = TensorSpec(name="logits", dtype="float32", shape=(1, 3))
POINT = TensorSpec(name="point", dtype="float32", shape=(1, 2))
LEVELS = TensorSpec(name="levels", dtype="uint8", shape=(1, 3), scales=(0.5,), zero_points=(128,))


def row(*values: float, dtype: str = "float32") -> list[Array]:
    return [np.array([values], dtype)]


def test_classes_agree_where_the_best_one_is_the_same() -> None:
    outputs = ReferenceOutputs([row(1, 5, 2), row(9, 0, 0), row(0, 1, 2), row(3, 1, 1)], [LOGITS], classes=True)
    assert outputs.agreement([row(4, 5, 0), row(1, 0, 0), row(0, 2, 1), row(2, 1, 1)]) == 0.75
    assert outputs.classes


def test_without_classes_the_relative_error_counts() -> None:
    outputs = ReferenceOutputs([row(3, 4), row(0, 0)], [POINT], classes=False)
    assert outputs.agreement([row(3, 4), row(0, 0)]) == 1.0
    assert outputs.agreement([row(3, 4.5), row(0, 0)]) == pytest.approx(0.9)
    assert outputs.agreement([row(30, 40), row(0, 0)]) == 0.0
    assert outputs.agreement([row(float("nan"), 4), row(0, 0)]) == 0.0


def test_the_output_that_differs_most_counts() -> None:
    score = TensorSpec(name="score", dtype="float32", shape=(1, 1))
    outputs = ReferenceOutputs([row(3, 4) + row(2)], [POINT, score], classes=False)
    assert outputs.agreement([row(3, 4) + row(1)]) == 0.5
    assert outputs.agreement([row(0, 0) + row(2)]) == 0.0


def test_an_output_of_zeros_must_stay_zero() -> None:
    outputs = ReferenceOutputs([row(0, 0)], [POINT], classes=False)
    assert outputs.agreement([row(0, 0)]) == 1.0
    assert outputs.agreement([row(0, 1e-9)]) == 0.0


def test_quantised_outputs_are_compared_without_their_zero_point() -> None:
    outputs = ReferenceOutputs([row(131, 132, 128, dtype="uint8")], [LEVELS], classes=False)
    assert outputs.agreement([row(131, 137, 128, dtype="uint8")]) == 0.0
    assert outputs.agreement([row(131, 130, 128, dtype="uint8")]) == pytest.approx(0.6)


def test_a_single_number_is_no_class() -> None:
    score = TensorSpec(name="score", dtype="float32", shape=(1, 1))
    outputs = ReferenceOutputs([row(2)], [score], classes=True)
    assert not outputs.classes
    assert outputs.agreement([row(1)]) == 0.5
