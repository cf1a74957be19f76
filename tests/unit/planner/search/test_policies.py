"""The paper's policies, and the door for others."""

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bus.errors import ConfigError, UnknownNameError
from bus.messages import Ended, NodeLeft, Placed, TaskState
from bus.values import Kind
from planner.core.core import PlannerCore
from planner.search.algorithm1 import Algorithm
from planner.search.families import DEVICE, DEVICE_EDGE
from planner.search.placements import Choice
from planner.search.policies import Policy, load_policy, policy_names
from tests.unit.planner.scenes import RandomRegion, cloud, device, edge, only, profile, task


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
    world = RandomRegion(PlannerCore(0, policy), 3).run()
    assert {placed.placement.kind for placed in world.placed.values()} <= kinds
    assert world.counts["placement"] > 50


def test_names_of_policies() -> None:
    wanted = ["deepar", "no-delay", "device-only", "edge-only", "cloud-only", "neurosurgeon", "routes", "elastic"]
    assert policy_names()[:8] == wanted
    assert load_policy("deepar").name == "deepar"
    with pytest.raises(UnknownNameError, match=r"did you mean edge-only\?"):
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
def test_a_task_for_which_a_policy_chooses_nonsense_is_rejected(nonsense: dict[str, Any]) -> None:
    class Muddled:
        name = "muddled"

        def place(self, algorithm: Algorithm) -> Choice | None:
            choice = algorithm.best({DEVICE_EDGE}, device_computes=False)
            return choice and choice._replace(**nonsense)

    rejected(Muddled(), r"policy muddled \(test_policies.py:\d+\): it chose ")


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


def test_a_task_for_which_a_policy_takes_what_is_not_free_is_rejected() -> None:
    rejected(Greedy(), r"policy greedy \(test_policies.py:\d+\): it chose for t1 what cannot be, or is not free")


def rejected(policy: Policy, why: str) -> None:
    """The task is rejected for it, nothing is held, and the planner goes on."""
    core = PlannerCore(0, policy)
    for node in (edge(), device()):
        core.handle(node, 0.0)
    for now in (0.0, 1.0):
        ended = only(core.handle(task(f"t{now + 1:.0f}"), now), Ended)
        assert (ended.state, ended.cause) == (TaskState.REJECTED, "policy_error")
        assert re.match(why.replace("t1", "t[12]"), ended.detail), ended.detail
    assert not core.ledger.reservations
    core.validate()


class Nested:
    name = "nested"

    def place(self, algorithm: Algorithm) -> Any:
        return self.divide(0)

    def divide(self, by: int) -> Any:
        return 1 / by


class Quitting:
    name = "quitting"

    def place(self, algorithm: Algorithm) -> Choice | None:
        sys.exit("no")


class Wordy:
    name = "wordy"

    def place(self, algorithm: Algorithm) -> Any:
        return "edge, please" * 1000


class Nan:
    name = "nan"

    def place(self, algorithm: Algorithm) -> Any:
        choice = algorithm.best()
        return choice and choice._replace(delay_s=float("nan"))


class Numbered:
    name = "numbered"

    def place(self, algorithm: Algorithm) -> Any:
        choice = algorithm.best({DEVICE_EDGE})
        return choice and choice._replace(edge=7)  # type: ignore[arg-type]


class Cloudy:
    """Cuts for a cloud that is not there, without bandwidth to it."""

    name = "cloudy"

    def place(self, algorithm: Algorithm) -> Any:
        choice = algorithm.best({DEVICE_EDGE}, device_computes=False)
        return choice and choice._replace(cut2=choice.cut2 - 1)


@pytest.mark.parametrize("policy", [Nested(), Quitting(), Wordy(), Nan(), Numbered(), Cloudy()], ids=lambda p: p.name)
def test_whatever_a_policy_does_the_planner_goes_on(policy: Policy) -> None:
    rejected(policy, rf"policy {policy.name} \(test_policies.py:\d+\): ")


def test_an_error_names_the_line_that_raised_it() -> None:
    line = Nested.divide.__code__.co_firstlineno + 1
    rejected(Nested(), rf"policy nested \(test_policies.py:{line}\): ZeroDivisionError: division by zero$")


def test_a_policy_that_fails_while_tasks_are_planned_again_ends_only_them() -> None:
    class Fragile:
        name = "fragile"

        def place(self, algorithm: Algorithm) -> Choice | None:
            if len(algorithm.request.edges) < 2:
                raise RuntimeError("only one edge")
            return algorithm.best({DEVICE_EDGE}, device_computes=False)

    core = PlannerCore(0, Fragile())
    for node in (edge("e1", speed=8.0), edge("e2"), device(lease_s=1e6)):
        core.handle(node, 0.0)
    placed = only(core.handle(task(), 0.0), Placed)
    ended = only(core.handle(NodeLeft(node=placed.placement.edge or "", incarnation="i1"), 0.1), Ended)
    assert (ended.state, ended.cause) == (TaskState.REJECTED, "policy_error")
    assert ended.detail.endswith("RuntimeError: only one edge")
    core.validate()


def test_a_policy_that_cannot_be_made_or_imported_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_policies.py").write_text("1 / 0\n", encoding="utf-8")
    (tmp_path / "needy_policies.py").write_text("class Needy:\n    def __init__(self, gain): ...\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="broken_policies:Any cannot be imported: ZeroDivisionError"):
        load_policy("broken_policies:Any")
    with pytest.raises(ConfigError, match="needy_policies:Needy cannot be made: TypeError"):
        load_policy("needy_policies:Needy")


@pytest.mark.parametrize(
    ("source", "attribute", "message", "remedy"),
    [
        (None, "Mine", "Python finds no module", "PYTHONPATH"),
        ("import no_such_package", "Mine", "imports no_such_package, which is not installed", ""),
        ("1 / 0", "Mine", "ZeroDivisionError: division by zero .*mine.py, line 1", ""),
        ("def broken(:", "Mine", "SyntaxError", ""),
        ("class Mime:\n    name = 'm'\n    def place(self, algorithm): ...", "Mine", "did you mean Mime", ""),
        ("class Mine:\n    def __init__(self): raise OSError('no file')", "Mine", "OSError: no file .*, line 2", ""),
        ("", "", "module:name", ""),
    ],
)
def test_what_is_wrong_with_a_policy_of_the_users_is_said(
    source: str | None, attribute: str, message: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    if source is not None:
        (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_policy(f"mine:{attribute}")
    assert remedy in (caught.value.remedy or "")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
