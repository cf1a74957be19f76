"""Sweeps: axes, tidy rows, going on where one stopped, the same bytes however it is run."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bus.errors import ConfigError
from loadgen import cells
from loadgen import sweep as sweeps
from loadgen.cells import Cell, run_cell, run_cells
from loadgen.scenario import Scenario
from loadgen.sweep import Axis, SweepOptions, sweep
from tests.unit.loadgen.machines import machines

POLICIES = ("edge-only", "deepar")


@pytest.fixture(autouse=True)
def made_up_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "platforms", lambda profile: machines())


def options(out: Path, *axes: str, **more: object) -> SweepOptions:
    return SweepOptions(
        out=out,
        scenario=Scenario(devices=6, edges=2, within_s=5),
        axes=tuple(Axis.parse(axis) for axis in axes or ("devices=4:12:4",)),
        policies=POLICIES,
        seeds=2,
        **more,  # type: ignore[arg-type]
    )


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
        ("device=3", "no such parameter"),
        ("devices=9:1:2", "rising"),
        ("devices=1:9:0", "rising"),
        ("devices=a:b", "numbers"),
        ("devices=many", "devices"),
        ("policy=deepar", "--policies"),
        ("seed=1,2", "--seeds"),
    ],
)
def test_a_broken_axis_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Axis.parse(text)


def test_one_tidy_row_a_run(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    rows, files = sweep(options(tmp_path, "devices=4:12:4", "edges=1,2", progress=lambda *n: told.append(n)))
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
    rows, _ = sweep(options(tmp_path, "devices=5,9"))
    wanted = run_cell(Cell(Scenario(devices=9, edges=2, within_s=5, policy="deepar"), 1, {}))
    row = next(r for r in rows if (r["devices"], r["policy"], r["seed"]) == ("9", "deepar", 1))
    assert row["mean_delay_s"] == wanted["mean_delay_s"]


def test_an_interrupted_sweep_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = sweep(options(tmp_path / "whole"))
    runs: list[int] = []
    original = cells.run_cell

    def dies(cell: Cell) -> dict[str, object]:
        runs.append(1)
        if len(runs) == 6:
            raise KeyboardInterrupt
        return original(cell)

    monkeypatch.setattr(cells, "run_cell", dies)
    with pytest.raises(KeyboardInterrupt):
        sweep(options(tmp_path / "part"))
    # As a kill would: the last line is cut short.
    path = tmp_path / "part" / "sweep.csv"
    path.write_text(path.read_text()[:-20])
    runs.clear()

    def counted(cell: Cell) -> dict[str, object]:
        runs.append(1)
        return original(cell)

    monkeypatch.setattr(cells, "run_cell", counted)
    again, _ = sweep(options(tmp_path / "part"))
    assert len(runs) == 12 - 4
    assert again == whole
    assert path.read_bytes() == (tmp_path / "whole" / "sweep.csv").read_bytes()


def test_another_sweep_is_not_mixed_in(tmp_path: Path) -> None:
    sweep(options(tmp_path))
    with pytest.raises(ConfigError, match="another sweep"):
        sweep(options(tmp_path, "edges=1,2"))
    more = options(tmp_path, "devices=4:16:4")  # more values of the same axis belong to the same sweep
    rows, _ = sweep(more)
    assert len(rows) == 16


def test_too_many_runs_are_refused_before_they_begin(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runs are more than"):
        sweeps.plan(options(tmp_path, "devices=1:1000", "edges=1:1000"))


def test_cells_keep_their_order_and_report(tmp_path: Path) -> None:
    wanted = [Cell(Scenario(devices=3, edges=1, within_s=5), seed, {"n": seed}) for seed in range(4)]
    told: list[tuple[int, int]] = []
    rows = run_cells(wanted, progress=lambda *n: told.append(n))
    assert [row["n"] for row in rows] == [0, 1, 2, 3]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(row["completed"] == 3 for row in rows)
    assert all(sum(int(part.split(":")[1]) for part in row["kinds"].split("+")) == 3 for row in rows)
