"""Scenarios: what they draw, what a file may say, what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bus.errors import ConfigError
from bus.text.units import parse_size
from bus.values import Execution, Objective, Role
from loadgen.sim.scenario import Scenario, coerce, read
from tests.unit.loadgen.machines import machines


def by_role(scenario: Scenario, seed: int = 0) -> dict[Role, list[Any]]:
    nodes = scenario.nodes(seed, machines().profiles)
    return {role: [node for node in nodes if node.role is role] for role in Role}


def test_edges_are_drawn_from_the_papers_ranges() -> None:
    edges = by_role(Scenario(edges=2000))[Role.EDGE]
    for low, high, values in (
        (1, 10, [edge.slots for edge in edges]),
        (5e9, 20e9, [edge.link1_capacity_bps for edge in edges]),
        (0.1e9, 5e9, [edge.link2_capacity_bps for edge in edges]),
    ):
        assert low <= min(values)
        assert max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, rel=0.04)
    assert {edge.slots for edge in edges} == set(range(1, 11))


def test_reachable_edges_are_spread_and_nested() -> None:
    one = by_role(Scenario(devices=500, edges=10, reachable=1))[Role.DEVICE]
    two = by_role(Scenario(devices=500, edges=10, reachable=2))[Role.DEVICE]
    assert {len(device.reachable_edges) for device in one} == {1}
    assert all(a.reachable_edges[0] == b.reachable_edges[0] for a, b in zip(one, two, strict=True))
    counts = np.bincount([int(device.reachable_edges[0][-2:]) for device in one], minlength=10)
    assert counts.min() > 25
    assert by_role(Scenario(reachable=None))[Role.DEVICE][0].reachable_edges is None


def test_scenarios_that_differ_in_one_parameter_share_the_rest() -> None:
    few, many = Scenario(devices=20), Scenario(devices=80, edges=40, reachable=3)
    first = [entry.task for entry in few.schedule(4).entries]
    assert first == [entry.task for entry in many.schedule(4).entries][:20]
    assert by_role(few)[Role.EDGE] == by_role(many)[Role.EDGE][:10]


def test_one_task_a_device_unless_told_otherwise() -> None:
    assert len(Scenario(devices=7).schedule(0)) == 7
    tasks = Scenario(devices=2, tasks=5).schedule(0)
    assert [entry.task.device for entry in tasks.entries] == [f"device-{i:05d}" for i in (0, 1, 0, 1, 0)]


@pytest.mark.parametrize("pattern", ["uniform", "poisson", "constant", "bursts", "offline"])
def test_every_arrival_pattern_has_the_mean_rate_of_the_interval(pattern: str) -> None:
    instants = [e.at_s for e in Scenario(devices=400, within_s=100, arrivals=pattern).schedule(1).entries]
    assert len(instants) == 400
    assert instants[-1] == (0 if pattern == "offline" else pytest.approx(100, rel=0.2))


def test_a_file_may_write_units_and_ranges(tmp_path: Path) -> None:
    path = tmp_path / "city.toml"
    path.write_text(
        'devices = 120\nedges = 12\nreachable = "all"\nwithin_s = "2min"\nmax_link1_bps = ["20Mbps", "300Mbps"]\n'
        'input_bytes = "600KB"\nmodels = { alexnet = 3, lenet = 1 }\nobjective = "pipelined"\nnoise = 0.2\n'
    )
    scenario = read(path)
    assert scenario.name == "city"
    assert scenario.reachable is None
    assert scenario.within_s == 120
    assert scenario.max_link1_bps == (20_000_000, 300_000_000)
    assert scenario.input_bytes == (600_000, 600_000)
    assert scenario.models == {"alexnet": 3.0, "lenet": 1.0}
    assert scenario.objective is Objective.PIPELINED
    assert scenario.runs_as is Execution.STREAMING
    assert scenario.noise == 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device = 3", "no parameter .* called 'device'; did you mean devices"),
        ("devices = 0", "devices: 0"),
        ("devices = 2.5", "devices: 2.5 is not a whole number"),
        ("reachable = 20", "20 of 10 edges"),
        ('within_s = "soon"', "within_s: 'soon'"),
        ("samples = [5, 1]", r"samples: 5\.\.1"),
        ("slots = [1, 2, 3]", "slots"),
        ("slots = [0.2, 0.4]", "slots: 0.2..0.4 must start at 1 or more"),
        ("samples = [0.5, 3]", "must start at 1 or more"),
        ("deadline_s = 0", "deadline_s must be greater than 0, not 0"),
        ("devices = true", "devices: True is not a number"),
        ('arrivals = "monsoon"', "monsoon"),
        ('objective = "best"', "objective"),
        ("devices = ", "invalid"),
    ],
)
def test_a_broken_file_names_itself_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"(?is)s\.toml: .*{message}"):
        read(path)


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        read(Path("/nowhere/s.toml"))


def test_sizes_and_ranges() -> None:
    assert parse_size("4KiB") == 4096
    assert parse_size("1.5MB") == 1_500_000
    assert coerce("samples", "1..10") == (1, 10)
    assert coerce("reachable", "all") is None
    assert coerce("tasks", "12") == 12


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("execution", [None, *Execution])
def test_a_scenario_takes_the_execution_that_goes_with_its_objective(
    objective: Objective, execution: Execution | None
) -> None:
    if execution in (None, objective.execution):
        assert Scenario(objective=objective, execution=execution).runs_as is objective.execution
    else:
        with pytest.raises(ConfigError, match=f"objective {objective} requires execution {objective.execution}"):
            Scenario(objective=objective, execution=execution)
