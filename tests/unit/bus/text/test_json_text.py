"""JSON that every reader understands."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from bus.text.json_text import json_text


def strict(text: str) -> Any:
    """What a reader that holds to RFC 8259 reads."""

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_finite_values_are_written_as_json_writes_them() -> None:
    value = {"name": "LeNet", "numbers": [1, 2.5, None, True], "inner": {"size": 0}}
    assert json_text(value) == json.dumps(value)
    assert json_text(value, indent=2) == json.dumps(value, indent=2)
    assert json_text(value, compact=True) == json.dumps(value, separators=(",", ":"))


def test_numbers_that_are_not_finite_become_null_with_a_reason() -> None:
    inf, nan = float("inf"), float("nan")
    value = {"gap": inf, "rows": [{"mean": nan}, {"mean": 1.5}, {"mean": np.float64(-inf)}], "pair": (nan, 1)}
    for text in (json_text(value), json_text(value, indent=1), json_text(value, compact=True)):
        assert strict(text) == {
            "gap": None,
            "rows": [{"mean": None}, {"mean": 1.5}, {"mean": None}],
            "pair": [None, 1],
            "not_finite": {
                "gap": "infinity",
                "rows.0.mean": "not a number",
                "rows.2.mean": "-infinity",
                "pair.0": "not a number",
            },
        }
    assert strict(json_text([inf, 1])) == [None, 1]
    assert value["gap"] == inf  # the caller's value is left alone


def test_what_json_has_no_words_for_is_an_error() -> None:
    with pytest.raises(TypeError):
        json_text({"when": object()})
