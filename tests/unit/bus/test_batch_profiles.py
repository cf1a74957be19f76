"""Measured batches of a profile: what is refused, and how long samples take together."""

from __future__ import annotations

from typing import Any

import pytest

from bus import messages, topics
from bus.messages import NodeAnnounced
from bus.values import BatchSpeed, ModelProfile, Role


def profile(**more: Any) -> ModelProfile:
    return ModelProfile(
        model="m", sha256="0" * 64, platform="p", layer_names=("conv", "fc"), layer_s=(0.004, 0.010),
        cut_bytes=(1_000, 500, 10), **more,
    )  # fmt: skip


BATCHES = (BatchSpeed(batch=2, factors=(1.0, 0.6)), BatchSpeed(batch=4, factors=(0.9, 0.4)))


def test_a_profile_without_batches_looks_as_before() -> None:
    text = messages.encode(NodeAnnounced(node="c1", role=Role.CLOUD, incarnation="i", models=(profile(),)))
    assert not any(word in text for word in (b"accelerator", b"batch", b"executors"))


def test_batches_survive_the_wire() -> None:
    one = profile(batch=BATCHES, executors=2, accelerator="gpu")
    announced = NodeAnnounced(node="c1", role=Role.CLOUD, incarnation="i", models=(one,))
    assert messages.decode(topics.NODES, messages.encode(announced)) == announced
    assert one.without_batches() == profile(accelerator="gpu")


@pytest.mark.parametrize(
    ("samples", "times"),
    [
        (1, (1.0, 1.0)),
        (1.5, (1.5, 1.1)),
        (2, (2.0, 1.2)),
        (3, (2.8, 1.4)),
        (4, (3.6, 1.6)),
        (6, (5.4, 2.4)),  # in batches of four
        (8, (7.2, 3.2)),
    ],
)
def test_samples_together_take_what_was_measured_and_between_it_what_lies_between(
    samples: float, times: tuple[float, float]
) -> None:
    assert profile(batch=BATCHES).together(samples) == pytest.approx(times)


def test_samples_one_by_one_take_as_many_times_as_long() -> None:
    assert profile().together(5) == (5.0, 5.0)
    assert profile().together_s(5, 0, 2) == pytest.approx(0.070)


def test_several_samples_never_take_less_time_than_one() -> None:
    assert profile(batch=(BatchSpeed(batch=8, factors=(0.05, 0.5)),)).together(8) == (1.0, 4.0)


def test_the_time_of_layers_is_that_of_each_in_its_batch() -> None:
    assert profile(batch=BATCHES).together_s(2, 0, 2) == pytest.approx(0.020)
    assert profile(batch=BATCHES).together_s(2, 1, 2) == pytest.approx(0.012)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": ()},
        {"batch": BATCHES[::-1]},
        {"batch": (BATCHES[0], BATCHES[0])},
        {"batch": (BatchSpeed(batch=2, factors=(1.0,)),)},
        {"executors": 0},
        {"accelerator": "tpu"},
    ],
)
def test_impossible_batches_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"batch|executors|accelerator"):
        profile(**wrong)


@pytest.mark.parametrize("wrong", [{"batch": 1, "factors": (1.0,)}, {"batch": 33, "factors": (1.0,)},
                                   {"batch": 2, "factors": (-0.1,)}])  # fmt: skip
def test_a_batch_has_2_to_32_samples(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"batch|factors"):
        BatchSpeed(**wrong)
