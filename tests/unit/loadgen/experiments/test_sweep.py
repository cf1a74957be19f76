"""Sweeps: axes, tidy rows, going on where one stopped, the same bytes however it is run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bus.errors import ConfigError, UnknownNameError
from loadgen.experiments import sweep as sweeps
from loadgen.experiments.figure_result import RAW
from loadgen.experiments.paired import paired_gains
from loadgen.experiments.run_key import RunKeys
from loadgen.experiments.runs import Cell, Workers, run_cell, run_cells
from loadgen.experiments.sweep import Axis, SweepOptions, sweep
from loadgen.sim.scenario import Scenario
from planner.search.profiles import profile_text
from tests.unit.loadgen.machines import machines

POLICIES = ("edge-only", "deepar")


def run(cell: Cell) -> dict[str, Any]:
    """Run a cell on made-up machines."""
    return run_cell(cell, machines())


def options(out: Path, *axes: str, **more: object) -> SweepOptions:
    more = {"run": run} | more
    return SweepOptions(
        out=out,
        scenario=Scenario(devices=6, edges=2, within_s=5),
        axes=tuple(Axis.parse(axis) for axis in axes or ("devices=4:12:4",)),
        policies=POLICIES,
        seeds=2,
        **more,  # type: ignore[arg-type]
    )


def test_with_codecs_every_policy_has_them_and_deepar_runs_without_them_too(tmp_path: Path) -> None:
    coded = Scenario(devices=4, edges=2, within_s=5, codecs=True, min_agreement=0.995)
    wanted = replace(options(tmp_path / "a", "devices=4,8"), scenario=coded, run=run_cell)
    found = sweep(wanted)
    raw = sweep(replace(options(tmp_path / "b", "devices=4,8"), run=run_cell, policies=("deepar",)))
    assert [row["policy"] for row in found.rows[:6:2]] == [*POLICIES, RAW]
    columns = {name: [row["mean_delay_s"] for row in found.rows if row["policy"] == name] for name in (*POLICIES, RAW)}
    assert columns[RAW] == [row["mean_delay_s"] for row in raw.rows]
    assert all(with_codecs < without for with_codecs, without in zip(columns["deepar"], columns[RAW], strict=True))
    assert {(one.policy, one.against) for one in paired_gains(found.rows, ["devices"])} == {
        ("edge-only", RAW),
        ("deepar", RAW),
    }
    assert ["codecs are assumed" in note for note in found.notes] == [True]
    assert raw.notes == ()
    again = sweep(wanted)
    assert (again.reused, again.rows) == (12, found.rows)


def test_axes() -> None:
    assert Axis.parse("devices=20:100:20").values == (20, 40, 60, 80, 100)
    assert Axis.parse("noise=0:0.3:0.1").values == pytest.approx((0, 0.1, 0.2, 0.3))
    assert Axis.parse("edges=10,40").values == ("10", "40")
    assert Axis.parse("reachable=1,2,all").values == ("1", "2", "all")
    assert Axis.parse("samples=1..10,1..1000").values == ("1..10", "1..1000")
    assert Axis.parse("max_link1_bps=20Mbps..300Mbps").values == ("20Mbps..300Mbps",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("devices", "write it like"),
        ("device=3", "did you mean devices"),
        ("devices=9:1:2", "rising"),
        ("devices=1:9:0", "rising"),
        ("devices=a:b", "numbers"),
        ("devices=many", "devices"),
        ("policy=deepar", "--policies"),
        ("seed=1,2", "--seeds"),
        ("devices=nan:3:1", "finite"),
        ("devices=1:inf:1", "finite"),
        ("noise=0:1:nan", "finite"),
        ("devices=1:1e18:1", "more than"),
        ("noise=0:1:1e-300", "more than"),
    ],
)
def test_a_broken_axis_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Axis.parse(text)


def test_one_tidy_row_a_run(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    done = sweep(options(tmp_path, "devices=4:12:4", "edges=1,2", progress=lambda *n: told.append(n)))
    rows, files = done.rows, done.files
    assert len(rows) == 3 * 2 * 2 * 2
    assert [path.name for path in files] == ["sweep.csv", "sweep.json", "sweep.png", "sweep.svg"]
    assert all(path.exists() for path in files)
    with files[0].open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[:4] == ["devices", "edges", "policy", "seed"]
    keys = [(row["devices"], row["edges"], row["policy"], row["seed"]) for row in table]
    assert len(set(keys)) == len(keys) == 24
    assert all(row["tasks"] == row["devices"] == row["completed"] for row in table)
    assert told[-1] == (24, 24)


def test_a_row_is_the_run_of_its_scenario(tmp_path: Path) -> None:
    rows = sweep(options(tmp_path, "devices=5,9")).rows
    wanted = run(Cell(Scenario(devices=9, edges=2, within_s=5, policy="deepar"), 1, {}))
    row = next(r for r in rows if (r["devices"], r["policy"], r["seed"]) == ("9", "deepar", 1))
    assert row["mean_delay_s"] == wanted["mean_delay_s"]


def test_an_interrupted_sweep_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = sweep(options(tmp_path / "whole")).rows
    started: list[int] = []

    def dies(cell: Cell) -> dict[str, object]:
        started.append(1)
        if len(started) == 6:
            raise KeyboardInterrupt
        return run(cell)

    with pytest.raises(KeyboardInterrupt):
        sweep(options(tmp_path / "part", run=dies))
    # As a kill would: the last line is cut short.
    path = tmp_path / "part" / "sweep.csv"
    path.write_text(path.read_text()[:-20])
    started.clear()

    def counted(cell: Cell) -> dict[str, object]:
        started.append(1)
        return run(cell)

    again = sweep(options(tmp_path / "part", run=counted))
    assert len(started) == 12 - 4
    assert (again.reused, again.stale) == (4, 0)
    assert again.rows == whole
    assert path.read_bytes() == (tmp_path / "whole" / "sweep.csv").read_bytes()


def test_another_sweep_is_not_mixed_in(tmp_path: Path) -> None:
    sweep(options(tmp_path))
    with pytest.raises(ConfigError, match="another sweep"):
        sweep(options(tmp_path, "edges=1,2"))
    more = options(tmp_path, "devices=4:16:4")  # more values of the same axis belong to the same sweep
    done = sweep(more)
    assert len(done.rows) == 16
    assert (done.reused, done.stale) == (12, 0)


def test_every_panel_shows_all_of_its_points(tmp_path: Path) -> None:
    """The panels share an axis, and the last ones may be the highest."""
    made = options(tmp_path, "devices=4,8", "within_s=300,1")
    axes: Any = sweeps.picture(made, sweep(made).rows).axes
    tops = [max(max(line.get_ydata()) for line in panel.lines) for panel in axes]
    assert tops[1] > 1.2 * tops[0]
    for panel, top in zip(axes, tops, strict=True):
        assert panel.get_ylim()[0] == 0
        assert panel.get_ylim()[1] > top


def policy_file(folder: Path, body: str, name: str = "mine") -> None:
    """A policy `MODULE:Mine` that imports a module of its own."""
    head = f"from {name}_rules import CHOSEN\n\n\nclass Mine:\n    name = 'mine'\n\n"
    (folder / f"{name}.py").write_text(f"{head}    def place(self, algorithm):\n        {body}\n")


RUN = """
import sys
from tests.unit.loadgen.experiments import test_sweep as here
done = here.sweep(here.replace(here.options(here.Path(sys.argv[1])), policies=("edge-only", "mine:Mine"), seeds=1))
print(done.reused, done.stale, [row["mean_delay_s"] for row in done.rows if row["policy"] == "mine:Mine"])
"""


def fresh_process(out: Path, modules: Path) -> tuple[int, int, list[float]]:
    """(reused, stale, delays) of a sweep in a process of its own, as a user who edits a policy runs it."""
    path = os.pathsep.join((str(modules), str(Path(__file__).parents[4])))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(out)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    reused, stale, delays = done.stdout.split(" ", 2)
    return int(reused), int(stale), json.loads(delays)


def test_an_edited_policy_or_a_module_that_it_imports_runs_again(tmp_path: Path) -> None:
    modules, out = tmp_path / "modules", tmp_path / "out"
    modules.mkdir()
    policy_file(modules, "return algorithm.best(CHOSEN)")
    rules = modules / "mine_rules.py"
    rules.write_text("from planner.search.families import DEVICE\n\nCHOSEN = {DEVICE}\n")
    first = fresh_process(out, modules)
    assert first[:2] == (0, 0)
    assert fresh_process(out, modules) == (6, 0, first[2])
    rules.write_text("from planner.search.families import DEVICE_EDGE\n\nCHOSEN = {DEVICE_EDGE}\n")
    second = fresh_process(out, modules)
    assert second[:2] == (3, 3)  # the built-in policy's runs are reused
    assert second[2] != first[2]
    policy_file(modules, "return algorithm.best(CHOSEN, device_computes=False)")
    assert fresh_process(out, modules)[:2] == (3, 3)


def test_a_changed_profile_or_version_runs_again(tmp_path: Path) -> None:
    profile = tmp_path / "mine.json"
    profile.write_text(profile_text("paper"))
    made = replace(options(tmp_path / "out"), scenario=Scenario(devices=6, edges=2, within_s=5, profile=str(profile)))
    sweep(made)
    assert sweep(made).reused == 12
    profile.write_text(profile_text("paper").replace('"link1_bps": 2', '"link1_bps": 1'))
    done = sweep(made)
    assert (done.reused, done.stale) == (0, 12)
    assert sweep(made, RunKeys(numpy_version="9.9")).stale == 12


def test_rows_of_a_version_that_wrote_no_keys_run_again(tmp_path: Path) -> None:
    done = sweep(options(tmp_path))
    with done.files[0].open(newline="") as file:
        rows = [{name: value for name, value in row.items() if name != "run_key"} for row in csv.DictReader(file)]
    with done.files[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    again = sweep(options(tmp_path))
    assert (again.reused, again.stale, again.rows) == (0, 12, done.rows)


def test_too_many_runs_are_refused_before_they_begin(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runs are more than"):
        sweeps.cells_of(options(tmp_path, "devices=1:1000", "edges=1:1000"))


def test_an_axis_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given twice"):
        sweeps.cells_of(options(tmp_path, "devices=4", "edges=2", "devices=8"))


def test_a_model_without_times_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"profile paper called 'alexnett'; did you mean alexnet"):
        sweep(options(tmp_path / "out", "models=lenet,alexnett"))
    assert not (tmp_path / "out").exists()


def test_runs_in_which_tasks_do_not_complete_are_counted(tmp_path: Path) -> None:
    late = replace(options(tmp_path), scenario=Scenario(devices=6, edges=2, within_s=5, deadline_s=1e-6))
    done = sweep(late)
    assert len(done.incomplete) == len(done.rows) == 12
    assert {row["mean_delay_s"] for row in done.rows} == {None}


def test_cells_keep_their_order_and_report(tmp_path: Path) -> None:
    wanted = [Cell(Scenario(devices=3, edges=1, within_s=5), seed, {"n": seed}) for seed in range(4)]
    told: list[tuple[int, int]] = []
    rows = run_cells(wanted, Workers(run=run), progress=lambda *n: told.append(n))
    assert [row["n"] for row in rows] == [0, 1, 2, 3]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(row["completed"] == 3 for row in rows)
    assert all(sum(int(part.split(":")[1]) for part in row["kinds"].split("+")) == 3 for row in rows)
