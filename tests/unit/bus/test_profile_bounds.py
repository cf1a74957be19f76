"""Profiles are bounded when they come in, so that nothing computed from them overflows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bus import messages, topics
from bus.errors import ProtocolError
from bus.messages import NodeAnnounced
from bus.values import MAX_LAYERS, MAX_MODEL_S, ModelProfile


def announcement(**values: Any) -> bytes:
    layers = values.pop("layers", 2)
    slots = values.pop("slots", 1)
    model = {
        "model": "m",
        "sha256": "0" * 64,
        "platform": "x",
        "layer_names": [f"l{j}" for j in range(layers)],
        "layer_s": [0.001] * layers,
        "cut_bytes": [10] * (layers + 1),
        **values,
    }
    record = {"v": 1, "type": "node_announced", "node": "d1", "role": "edge", "incarnation": "i", "slots": slots}
    return json.dumps({**record, "models": [model]}).encode()


@pytest.mark.parametrize(
    "values",
    [
        {"layer_s": [1e308, 1e308]},
        {"layer_s": [1e305, 0.0]},
        {"layer_s": [MAX_MODEL_S, 1.0]},
        {"layer_s": [float("inf"), 0.0]},
        {"layer_s": [float("nan"), 0.0]},
        {"layer_s": [-1.0, 0.0]},
        {"whole_s": 1e305},
        {"cut_bytes": [10, 10, 1 << 41]},
        {"cut_bytes": [10, 10, 10**400]},
        {"layers": MAX_LAYERS + 1},
        {"slots": 10**400},
        {"slots": 1_000_001},
    ],
    ids=lambda values: next(iter(values)),
)
def test_what_is_beyond_all_bounds_is_refused_when_it_comes_in(values: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        messages.decode(topics.NODES, announcement(**values))


@pytest.mark.parametrize("values", [{}, {"layers": MAX_LAYERS}, {"layer_s": [MAX_MODEL_S, 0.0]}, {"slots": 1_000_000}])
def test_what_is_at_the_bound_is_taken(values: dict[str, Any]) -> None:
    assert isinstance(messages.decode(topics.NODES, announcement(**values)), NodeAnnounced)


def test_the_message_says_which_model_and_which_bound() -> None:
    with pytest.raises(ValueError, match=r"m has 1,025 layers, the limit is 1,024"):
        ModelProfile.model_validate(json.loads(announcement(layers=1025))["models"][0])
    with pytest.raises(ValueError, match=r"m takes 2e\+06 s for one sample, the limit is 1000000 s"):
        ModelProfile.model_validate(json.loads(announcement(layer_s=[1e6, 1e6]))["models"][0])
