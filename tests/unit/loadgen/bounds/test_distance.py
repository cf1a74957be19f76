"""Distances of policies to a bound: their numbers and picture, and the errors of the command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bus.errors import ConfigError
from deploy.commands.simulate.figures import app
from loadgen.bounds.distance import FEW, BoundOptions, Distance, bound_cell, complete_means, distances
from loadgen.bounds.exact_optimum import MOST_TASKS
from loadgen.experiments.runs import Cell
from loadgen.experiments.sweep import Axis
from loadgen.sim.scenario import Scenario

SMALL = Scenario(devices=4, edges=2, samples=(1, 50), within_s=10.0)


def test_every_case_has_the_bound_of_its_own_tasks(tmp_path: Path) -> None:
    axes = (Axis.parse("devices=3,4"), Axis.parse("within_s=5"))
    found = distances(BoundOptions(out=tmp_path, scenario=SMALL, axes=axes, policies=("no-delay", "deepar"), seeds=2))
    assert [one.labels for one in found] == [{"devices": "3", "within_s": "5"}, {"devices": "4", "within_s": "5"}]
    for one, devices in zip(found, (3, 4), strict=True):
        for seed, row in enumerate(one.bounds):
            own = bound_cell(Cell(replace(SMALL, devices=devices, within_s=5.0), seed), exact=False)
            assert row == own
        assert all(one.ratio(policy) >= 1 for policy in ("no-delay", "deepar"))


def test_ratio_and_interval() -> None:
    one = Distance({}, ({"seed": 0, "bound_s": 10.0}, {"seed": 1, "bound_s": 30.0}), {"deepar": (11.0, 36.0)})
    assert (one.bound_s, one.mean_s("deepar")) == (20.0, 23.5)
    assert one.ratio("deepar") == pytest.approx(1.175)
    assert one.half_width("deepar") == pytest.approx(12.706 * 0.05, rel=1e-3)  # ratios 1.1 and 1.2, t with one degree
    assert one.as_object()["runs"][1] == {"seed": 1, "bound_s": 30.0, "means_s": {"deepar": 36.0}}


def test_the_command_prints_one_object_and_draws(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text("devices = 3\nedges = 1\nsamples = [1, 20]\n", encoding="utf-8")
    options = ["--scenario", str(tmp_path / "small.toml"), "--vary", "within_s=1,20", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["bound", *options, "--seeds", "2", "--jobs", "1", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [one["case"] for one in told["results"]] == [{"within_s": "1"}, {"within_s": "20"}]
    assert {one["policy"] for one in told["results"][0]["policies"]} == {"deepar"}
    assert all(Path(path).stat().st_size > 1000 for path in told["files"])


def test_exact_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools", None)
    with pytest.raises(ConfigError) as raised:
        bound_cell(Cell(FEW, 0), exact=True)
    assert "deepar[solvers]" in str(raised.value.remedy)
    assert "requirements-solvers.lock" in str(raised.value.remedy)


def test_exact_refuses_many_tasks(tmp_path: Path) -> None:
    many = replace(FEW, devices=MOST_TASKS + 1)
    with pytest.raises(ConfigError, match="are more than"):
        distances(BoundOptions(out=tmp_path, scenario=many, exact=True))


def test_a_policy_that_leaves_tasks_undone_has_no_distance() -> None:
    rows = [{"tasks": 4, "completed": 4, "mean_delay_s": 2.0}, {"tasks": 4, "completed": 3, "mean_delay_s": 1.0}]
    runs = [Cell(SMALL, 7), Cell(SMALL, 8)]
    assert complete_means(runs[:1], rows[:1]) == [2.0]
    with pytest.raises(ConfigError, match="seed 8: 3 of 4 tasks completed"):
        complete_means(runs, rows)


def test_tasks_that_may_not_complete_are_refused_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="deadline_s"):
        distances(BoundOptions(out=tmp_path, scenario=replace(SMALL, deadline_s=1e-3)))
