"""The paper's figures with the shipped profile: claims, files, and equal numbers with any number of processes."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import planner
from bus.errors import ConfigError, UnknownNameError
from bus.values import Objective
from deploy.commands.simulate import figures as commands_simulate
from loadgen.experiments import figures, fit_paper
from loadgen.experiments.claims import Verdict
from loadgen.experiments.figure_result import RAW, FigureOptions
from loadgen.experiments.figures_multi import DEVICES, SEQUENTIAL


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
    """One reachable edge and the ten seeds of the documentation: with fewer, a verdict near its limit changes."""
    found = figures.make(name, FigureOptions(out=tmp_path, seeds=10, reachable=(1,)))
    assert [claim.line() for claim in found.claims if claim.verdict is Verdict.MISSES] == []
    assert {(claim.own, claim.fitted) for claim in found.claims} == {(False, True), (True, False)}
    policies = {point["policy"] for point in found.series}
    assert len(found.series) == len(DEVICES) * len(policies)
    with found.files[0].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.series) * 10
    assert all(row["completed"] == row["tasks"] == row["devices"] for row in rows)
    point = next(p for p in found.series if (p["x"], p["policy"], p["reachable"]) == (40, "deepar", 1))
    mine = [
        float(r["mean_delay_s"]) for r in rows if (r["devices"], r["policy"], r["reachable"]) == ("40", "deepar", "1")
    ]
    assert point["mean_delay_s"] == pytest.approx(sum(mine) / 10)


def test_each_number_of_reachable_edges_has_verdicts_on_held_out_seeds(tmp_path: Path) -> None:
    options = FigureOptions(out=tmp_path, seeds=10, policies=("device-only", "edge-only", "deepar"), jobs=2)
    found = figures.make("fig4c", options)
    verdicts = {claim.case: claim.verdict for claim in found.claims if claim.text.endswith("below edge-only")}
    assert verdicts == {"E_i = 1": "agrees", "E_i = 2": "misses", "E_i = all": "misses"}
    assert found.missed
    with found.files[0].open() as file:
        seeds = {int(row["seed"]) for row in csv.DictReader(file)}
    assert seeds == set(found.seeds)
    assert len(seeds) == 10
    assert not seeds & set(fit_paper.FIGURE_4_SEEDS)


def test_a_profile_that_was_not_fitted_is_not_called_so(tmp_path: Path) -> None:
    shipped = json.loads((Path(planner.__file__).with_name("data") / "paper.json").read_text())
    mine = tmp_path / "mine.json"
    mine.write_text(
        json.dumps({**shipped, "name": "mine", "origin": "a stopwatch", "fitted_to": [], "fit_seeds": [11]})
    )
    options = FigureOptions(out=tmp_path, seeds=2, policies=("edge-only", "deepar"), profile=str(mine), reachable=(1,))
    for name in ("fig1a", "fig3", "fig4b"):
        found = figures.make(name, options)
        assert found.claims
        assert not any(claim.fitted for claim in found.claims)
        assert any("a stopwatch" in note for note in found.notes)
        assert name != "fig4b" or found.seeds == (10, 12)


def test_one_seed_has_no_interval_and_shows_nothing(tmp_path: Path) -> None:
    options = FigureOptions(out=tmp_path, seeds=1, policies=("no-delay", "deepar"), reachable=(1,))
    found = figures.make("fig4b", options)
    assert {point["ci95_s"] for point in found.series} == {None}
    assert [claim.verdict for claim in found.claims if claim.own] == ["not shown"]


def test_a_policy_that_completes_no_task_is_reported_and_is_null_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "class Idle:\n    name = 'idle'\n\n    def place(self, algorithm):\n        return None\n"
    (tmp_path / "idle_policy.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [
        "fig4c",
        "--policies",
        "idle_policy:Idle,deepar",
        "--seeds",
        "2",
        "--jobs",
        "1",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(commands_simulate.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {point["mean_delay_s"] for point in found["series"] if point["policy"] == "idle_policy:Idle"} == {None}
    assert any("idle_policy:Idle: 1200 of 1200 tasks did not complete" in note for note in found["notes"])
    printed = CliRunner().invoke(commands_simulate.app, arguments).output
    assert "20  idle_policy:Idle: no task completed" in printed


def test_a_plain_figure_has_no_claims_inside(tmp_path: Path) -> None:
    texts = {}
    for plain in (False, True):
        options = FigureOptions(out=tmp_path / str(plain), plain=plain)
        found = figures.make("fig3", options)
        assert found.claims
        # matplotlib writes each text of an SVG into a comment beside its outlines
        texts[plain] = next(path for path in found.files if path.suffix == ".svg").read_text()
    for word in ("AGREES", "Claims of the paper", "Note:", "Fig. 3"):
        assert (word in texts[False], word in texts[True]) == (True, False)
    assert "inference delay (ms)" in texts[True]


def test_streaming_gains_on_the_same_tasks(tmp_path: Path) -> None:
    options = FigureOptions(
        out=tmp_path, seeds=2, policies=("edge-only", "deepar"), reachable=(1,), objective=Objective.PIPELINED
    )
    found = figures.make("fig4a", options)
    gain = next(claim for claim in found.claims if "streaming" in claim.text)
    assert gain.verdict is Verdict.HOLDS
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
    with pytest.raises(UnknownNameError, match=r"fig2.*fig3") as raised:
        figures.make("fig2", FigureOptions(out=Path()))
    assert "fig1a" in (raised.value.remedy or "")


def test_the_command_prints_one_object_and_nothing_else(tmp_path: Path) -> None:
    result = CliRunner().invoke(commands_simulate.app, ["fig3", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["figure"] == "fig3"
    keys = {"text", "paper", "ours", "spread", "pass", "verdict", "fitted"}
    assert all(set(claim) >= keys for claim in found["claims"])
    assert {(claim["verdict"], claim["fitted"]) for claim in found["claims"]} == {("agrees", True)}
    assert all(set(point) >= {"x", "policy", "mean_delay_s", "ci95_s"} for point in found["series"])
    assert all(Path(path).exists() for path in found["files"])


def test_a_missed_claim_is_exit_code_99(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"device-only": 1.0, "edge-only": 64.0, "cloud-only": 314.0, "deepar": 43.0}
    monkeypatch.setattr("loadgen.experiments.figures_single.FIG1A_MS", wrong)
    result = CliRunner().invoke(commands_simulate.app, ["fig1a", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 99
    assert [claim["pass"] for claim in json.loads(result.stdout)["claims"]].count(False) == 1


def test_a_claim_of_our_own_that_is_not_shown_is_no_miss(tmp_path: Path) -> None:
    arguments = ["fig4b", "--seeds", "1", "--policies", "no-delay,deepar", "--jobs", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(commands_simulate.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert {claim["verdict"] for claim in json.loads(result.stdout)["claims"]} == {"not shown"}


def test_the_table_says_fitted_beside_the_verdict_and_keeps_our_own_claims_apart(tmp_path: Path) -> None:
    arguments = [
        "fig4b",
        "--seeds",
        "2",
        "--policies",
        "edge-only,no-delay,deepar",
        "--jobs",
        "1",
        "--out",
        str(tmp_path),
    ]
    printed = CliRunner().invoke(commands_simulate.app, arguments, env={"COLUMNS": "200"}).output
    paper, own = printed.split("Claims of our own")
    assert "EXCEEDS, fitted" in paper
    assert "waiting pays" not in paper
    assert "waiting pays" in own
    assert "below edge-only" not in own
    assert "fitted by loadgen/experiments/fit_paper.py" in own  # a note under the tables


def test_the_sweep_command(tmp_path: Path) -> None:
    arguments = ["sweep", "--vary", "devices=4:8:4", "--policies", "deepar", "--seeds", "1", "--jobs", "1"]
    result = CliRunner().invoke(commands_simulate.app, [*arguments, "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["runs"] == 2


def test_a_sweep_of_several_routes_says_what_they_gain(tmp_path: Path) -> None:
    arguments = ["sweep", "--vary", "objective=pipelined", "--vary", "devices=10,20", "--policies", "deepar,routes"]
    arguments += ["--seeds", "3", "--jobs", "1", "--out", str(tmp_path)]
    found = json.loads(CliRunner().invoke(commands_simulate.app, [*arguments, "--json"]).stdout)["gains"]
    assert [(one["point"], one["policy"], one["against"], one["seeds"]) for one in found] == [
        (["pipelined", devices], "routes", "deepar", 3) for devices in ("10", "20")
    ]
    for one in found:
        low, high = one["mean"]["ci95"]
        assert 0.05 < low <= one["mean"]["share"] <= high < 0.4
    printed = CliRunner().invoke(commands_simulate.app, arguments, env={"COLUMNS": "120"}).output
    assert "delays are below those of deepar" in " ".join(printed.split())
    assert f"{100 * found[0]['mean']['share']:.1f} % (" in printed


def test_figure_4_judges_whether_several_routes_pay(tmp_path: Path) -> None:
    options = FigureOptions(
        out=tmp_path, seeds=3, policies=("deepar", "routes"), objective=Objective.PIPELINED, reachable=(1,)
    )
    claims = {claim.text: claim for claim in figures.make("fig4b", options).claims}
    assert claims["several routes lower DeePar's delay on the same tasks"].verdict is Verdict.HOLDS


def test_a_figure_with_codecs_has_files_of_its_own_and_says_what_is_assumed(tmp_path: Path) -> None:
    options = FigureOptions(
        out=tmp_path, seeds=2, policies=("edge-only", "deepar"), codecs=True, min_agreement=0.995, reachable=(1,)
    )
    found = figures.make("fig4b", options)
    assert {path.name for path in found.files} == {"fig4b_codecs.csv", "fig4b_codecs.png", "fig4b_codecs.svg"}
    assert any("codecs are assumed" in note and "LeNet" in note for note in found.notes)
    means = {point["policy"]: point["mean_delay_s"] for point in found.series if point["x"] == 80}
    assert means["deepar"] < 0.8 * means[RAW]
    raw = figures.make("fig4b", replace(options, codecs=False, min_agreement=None))
    assert means[RAW] == next(
        point["mean_delay_s"] for point in raw.series if (point["x"], point["policy"]) == (80, "deepar")
    )
    assert [claim.text for claim in found.claims] == ["codecs lower DeePar's delay on the same tasks"]
    assert found.claims[0].verdict is Verdict.HOLDS
    assert not any("assumed" in note for note in raw.notes)


@pytest.mark.parametrize("command", ["fig4a", "sweep"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--min-agreement", "0.9"), "--codecs"), (("--codecs", "--min-agreement", "0"), "above 0 and at most 1")],
)
def test_an_agreement_is_for_codecs(tmp_path: Path, command: str, flags: tuple[str, ...], message: str) -> None:
    arguments = [command, *flags, "--out", str(tmp_path)]
    result = CliRunner().invoke(commands_simulate.app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in f"{result.exception} {result.exception.remedy}"
