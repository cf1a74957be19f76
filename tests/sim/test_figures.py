"""The paper's figures on the shipped profile: claims, files, numbers that do not depend on how they were
computed.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bus.errors import UnknownNameError
from bus.values import Objective
from deploy import commands_simulate
from loadgen import figures
from loadgen.figure_result import FigureOptions
from loadgen.figures_multi import DEVICES, SEQUENTIAL


def test_fig1a_within_a_percent_with_the_same_cuts(tmp_path: Path) -> None:
    found = figures.make("fig1a", FigureOptions(out=tmp_path))
    assert [claim.line() for claim in found.claims if not claim.passed] == []
    assert len(found.claims) == 5
    by_policy = {point["policy"]: point["mean_delay_s"] for point in found.series}
    assert by_policy["deepar"] == pytest.approx(0.043, rel=0.01)
    assert [path.suffix for path in found.files] == [".csv", ".png", ".svg"]
    assert all(path.stat().st_size > 100 for path in found.files)


def test_fig3_as_stated(tmp_path: Path) -> None:
    found = figures.make("fig3", FigureOptions(out=tmp_path))
    assert [claim.line() for claim in found.claims if not claim.passed] == []
    assert {point["x"] for point in found.series} == {"VGG", "DeepFace", "LeNet"}


@pytest.mark.parametrize("name", ["fig4a", "fig4b", "fig4c"])
def test_fig4_reaches_the_papers_reductions(tmp_path: Path, name: str) -> None:
    """Four seeds here; the ten of the documentation take longer and are steadier."""
    found = figures.make(name, FigureOptions(out=tmp_path, seeds=4, reachable=(1,)))
    assert [claim.line() for claim in found.claims if not claim.passed] == []
    policies = {point["policy"] for point in found.series}
    assert len(found.series) == len(DEVICES) * len(policies)
    with found.files[0].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.series) * 4
    assert all(row["completed"] == row["tasks"] == row["devices"] for row in rows)
    point = next(p for p in found.series if (p["x"], p["policy"], p["reachable"]) == (40, "deepar", 1))
    mine = [
        float(r["mean_delay_s"]) for r in rows if (r["devices"], r["policy"], r["reachable"]) == ("40", "deepar", "1")
    ]
    assert point["mean_delay_s"] == pytest.approx(sum(mine) / 4)


def test_streaming_gains_on_the_same_tasks(tmp_path: Path) -> None:
    options = FigureOptions(
        out=tmp_path, seeds=2, policies=("edge-only", "deepar"), reachable=(1,), objective=Objective.PIPELINED
    )
    found = figures.make("fig4a", options)
    gain = next(claim for claim in found.claims if "streaming" in claim.text)
    assert gain.passed
    assert {point["policy"] for point in found.series} == {"edge-only", "deepar", SEQUENTIAL}
    assert found.files[0].name == "fig4a_pipelined.csv"


def test_the_same_seeds_give_the_same_files(tmp_path: Path) -> None:
    made = []
    for name, jobs in (("one", 1), ("two", 2)):
        options = FigureOptions(out=tmp_path / name, seeds=1, policies=("deepar",), reachable=(1, None), jobs=jobs)
        found = figures.make("fig4b", options)
        made.append([path.read_bytes() for path in found.files])
    assert made[0] == made[1]


def test_an_unknown_figure() -> None:
    with pytest.raises(UnknownNameError, match=r"fig2.*fig1a"):
        figures.make("fig2", FigureOptions(out=Path()))


def test_the_command_prints_one_object_and_nothing_else(tmp_path: Path) -> None:
    result = CliRunner().invoke(commands_simulate.app, ["fig3", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["figure"] == "fig3"
    assert all(set(claim) >= {"text", "paper", "ours", "spread", "pass"} for claim in found["claims"])
    assert all(set(point) >= {"x", "policy", "mean_delay_s", "ci95_s"} for point in found["series"])
    assert all(Path(path).exists() for path in found["files"])


def test_a_missed_claim_is_exit_code_99(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"device-only": 1.0, "edge-only": 64.0, "cloud-only": 314.0, "deepar": 43.0}
    monkeypatch.setattr("loadgen.figures_single.FIG1A_MS", wrong)
    result = CliRunner().invoke(commands_simulate.app, ["fig1a", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 99
    assert [claim["pass"] for claim in json.loads(result.stdout)["claims"]].count(False) == 1


def test_the_sweep_command(tmp_path: Path) -> None:
    arguments = ["sweep", "--vary", "devices=4:8:4", "--policies", "deepar", "--seeds", "1", "--jobs", "1"]
    result = CliRunner().invoke(commands_simulate.app, [*arguments, "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["runs"] == 2
