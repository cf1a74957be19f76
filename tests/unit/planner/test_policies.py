"""The paper's policies, and the door for others."""

import sys
import types
from typing import Any

import numpy as np
import pytest

from bus.errors import ConfigError, InvariantError, UnknownNameError
from bus.messages import Placed
from bus.values import Kind
from planner import Algorithm, Choice, PlannerCore, load_policy, policy_names
from planner.search import DEVICE, DEVICE_EDGE
from tests.unit.planner.scenes import World, cloud, device, edge, only, profile, task


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        ("device-only", {Kind.DEVICE}),
        ("edge-only", {Kind.EDGE}),
        ("cloud-only", {Kind.CLOUD}),
        ("neurosurgeon", {Kind.DEVICE, Kind.DEVICE_CLOUD, Kind.CLOUD}),
    ],
)
def test_a_baseline_places_only_as_it_may(policy: str, kinds: set[Kind]) -> None:
    world = World(PlannerCore(0, policy), seed=3).run()
    assert {placed.placement.kind for placed in world.placed.values()} <= kinds
    assert world.counts["placement"] > 50


def test_names_of_policies() -> None:
    wanted = ["deepar", "no-delay", "device-only", "edge-only", "cloud-only", "neurosurgeon"]
    assert policy_names()[:6] == wanted
    assert load_policy("deepar").name == "deepar"
    with pytest.raises(UnknownNameError, match="edge-only"):
        load_policy("edge-onyl")
    with pytest.raises(UnknownNameError):
        load_policy("no_such_module_here:Policy")


class Thrifty:
    """Never uses the cloud."""

    name = "thrifty"

    def place(self, algorithm: Algorithm) -> Choice | None:
        return algorithm.best({DEVICE, DEVICE_EDGE})


class Greedy:
    """Claims what is not there."""

    name = "greedy"

    def place(self, algorithm: Algorithm) -> Choice | None:
        layers = algorithm.request.device_row.layers
        return Choice(DEVICE_EDGE, "e1", 0, layers, 10**12, 0, algorithm.now, 1.0)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    found = types.ModuleType("users_policies")
    found.Thrifty = Thrifty  # type: ignore[attr-defined]
    found.nothing = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_policies", found)
    return "users_policies"


def test_a_users_policy_comes_in_by_module_and_name(module: str) -> None:
    core = PlannerCore(0, f"{module}:Thrifty")
    for node in (edge(), cloud(speed=1000.0), device(models=(profile(cut_bytes=(100, 100, 100, 100)),))):
        core.handle(node, 0.0)
    placed = only(core.handle(task(), 0.0), Placed)
    assert placed.policy == "thrifty"
    assert "cloud" not in placed.placement.kind


def test_what_is_no_policy_is_refused(module: str) -> None:
    with pytest.raises(ConfigError, match="nothing"):
        load_policy(f"{module}:nothing")


@pytest.mark.parametrize(
    "nonsense",
    [
        {"cut1": 2, "cut2": 1},  # the edge before the device
        {"edge": None},  # cuts through no edge
        {"cut1": 3, "cut2": 3},  # the device alone, through an edge
        {"cut2": 4},  # a layer that is not there
        {"link1_bps": 1.5},  # half a bit
        {"delay_s": float("inf")},
        {"delay_s": -1.0},
        {"start_s": -1.0},
    ],
)
def test_a_policy_that_chooses_nonsense_is_stopped(nonsense: dict[str, Any]) -> None:
    class Muddled:
        name = "muddled"

        def place(self, algorithm: Algorithm) -> Choice | None:
            choice = algorithm.best({DEVICE_EDGE}, device_computes=False)
            return choice and choice._replace(**nonsense)

    core = PlannerCore(0, Muddled())
    for node in (edge(), device()):
        core.handle(node, 0.0)
    with pytest.raises(InvariantError, match="muddled"):
        core.handle(task(), 0.0)


def test_numbers_of_another_make_become_plain_ones() -> None:
    class Numeric:
        name = "numeric"

        def place(self, algorithm: Algorithm) -> Choice | None:
            choice = algorithm.best({DEVICE_EDGE})
            assert choice is not None
            foreign: dict[str, Any] = {
                "cut1": np.int64(choice.cut1),
                "link1_bps": np.int64(choice.link1_bps),
                "start_s": 0,
            }
            return choice._replace(**foreign)

    core = PlannerCore(0, Numeric())
    for node in (edge(), device()):
        core.handle(node, 0.0)
    placed = only(core.handle(task(), 0), Placed)
    assert type(placed.placement.cut1) is int
    assert type(placed.start_s) is float
    assert Placed.model_validate_json(placed.model_dump_json()) == placed


def test_a_policy_that_takes_what_is_not_free_is_stopped() -> None:
    core = PlannerCore(0, Greedy())
    for node in (edge(), device()):
        core.handle(node, 0.0)
    with pytest.raises(InvariantError, match="greedy"):
        core.handle(task(), 0.0)
