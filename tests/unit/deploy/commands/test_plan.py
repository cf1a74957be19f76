"""`deepar plan` and `deepar explain` as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bus.errors import ConfigError, DeeparError, UnknownNameError
from bus.messages import EpochOpened, LinkMeasurement
from bus.text.units import parse_duration
from bus.values import BatchSpeed, Codec, CodecProfile, Objective
from deploy.commands.explain import explain
from deploy.commands.plan import plan
from planner.core.core import PlannerCore
from planner.search.profiles import load_profile
from tests.unit.planner.core.test_learning import Region, Truth
from tests.unit.planner.scenes import RandomRegion, Traffic, cloud, device, edge, profile, task
from tests.unit.planner.test_explain import records

app = typer.Typer()
app.command("plan")(plan)
app.command("explain")(explain)


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, DeeparError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_alexnet_on_the_paper_profile_is_cut_where_the_paper_cuts_it() -> None:
    found = json.loads(run("plan", "alexnet", "--profile", "paper", "--top", "2", "--json"))
    first = found["plans"][0]
    assert (first["cut1_name"], first["cut2_name"], first["kind"]) == ("maxpool_1", "maxpool_3", "device+edge+cloud")
    assert first["delay_s"] == pytest.approx(0.043, rel=0.01)
    assert sum(first["parts"].values()) == pytest.approx(first["delay_s"])
    assert (found["model"], found["objective"], found["samples"]) == ("alexnet", "sequential", 1)
    assert len(found["plans"]) == 2


def test_flags_become_constraints() -> None:
    kept = json.loads(run("plan", "alexnet", "--keep-on-device", "conv_2", "--forbid", "cloud", "--json"))["plans"][0]
    assert kept["cut1"] >= 4
    assert "cloud" not in kept["kind"]
    alone = json.loads(run("plan", "lenet", "--forbid", "edge", "--forbid", "cloud", "--json"))["plans"][0]
    assert (alone["kind"], alone["edge"], alone["link1_bps"]) == ("device", None, 0)
    many = json.loads(
        run("plan", "vgg16", "--samples", "100", "--objective", "pipelined", "--link1", "100Mbps", "--json")
    )
    assert many["link1_bps"] == 100_000_000


def test_codecs_are_used_with_consent_and_the_assumption_is_noted() -> None:
    def best(*flags: str) -> Any:
        return json.loads(run("plan", "alexnet", *flags, "--json"))["plans"][0]

    raw, lossless, lossy = best(), best("--codecs"), best("--codecs", "--min-agreement", "0.995")
    assert "routes" not in raw
    assert lossless["routes"][0]["codec1"] == "zstd"
    assert lossy["routes"][0]["codec1"] in ("q8", "q4")
    assert raw["delay_s"] > lossless["delay_s"] > lossy["delay_s"]
    [route] = lossy["routes"]
    assert (route["cut1"], route["cut2"], route["share"]) == (lossy["cut1"], lossy["cut2"], 1.0)
    result = CliRunner().invoke(app, ["plan", "alexnet", "--codecs"])
    assert "codecs are assumed" in result.stderr
    assert "zstd, zstd" in result.stdout


def test_nothing_is_assumed_where_every_tier_has_a_profile_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    profile = load_profile("paper").device["alexnet"]
    codec = CodecProfile(position=1, codec=Codec.ZSTD, bytes=1_000, encode_s=0.0, decode_s=0.0)
    file.write_text(profile.model_copy(update={"codecs": (codec,)}).model_dump_json(exclude_none=True))
    tiers = [word for tier in ("--device", "--edge", "--cloud") for word in (tier, str(file))]
    words = ["plan", "alexnet", *tiers, "--codecs", "--json", "--top", "1000"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert "assumed" not in result.stderr
    routes = [route for one in json.loads(result.stdout)["plans"] for route in one.get("routes", ())]
    assert {route["cut1"] for route in routes if route["codec1"] == "zstd"} == {1}


@pytest.mark.parametrize("flags", [("--min-agreement", "0.9"), ("--codecs", "--min-agreement", "1.5")])
def test_an_agreement_is_a_share_of_lossy_codecs(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--min-agreement"):
        run("plan", "alexnet", *flags)


def test_a_plan_of_several_routes_comes_first_with_the_share_of_each() -> None:
    several = ("plan", "alexnet", "--policy", "routes", "--objective", "pipelined", "--samples", "200", "--top", "2")
    first, second = json.loads(run(*several, "--json"))["plans"]
    assert first["delay_s"] < 0.8 * second["delay_s"]
    assert len(first["routes"]) > 1
    assert sum(route["share"] for route in first["routes"]) == pytest.approx(1.0)
    assert set(first["routes"][0]) == {"cut1", "cut2", "codec1", "codec2", "share"}
    assert [route["share"] for route in second["routes"]] == [1.0]
    assert "device alone" in run(*several)
    with pytest.raises(ConfigError, match="pipelined"):
        run("plan", "alexnet", "--policy", "routes")
    with pytest.raises(UnknownNameError, match="did you mean routes"):
        run("plan", "alexnet", "--policy", "route")


def test_no_plan_is_exit_code_1_and_says_so() -> None:
    assert json.loads(run("plan", "alexnet", "--max-delay", "1ms", "--json", code=1))["plans"] == []


def test_a_platform_of_ones_own_and_one_that_does_not_match(tmp_path: Path) -> None:
    mine = load_profile("paper").edge["alexnet"]
    path = tmp_path / "edge.json"
    path.write_text(mine.model_copy(update={"layer_s": tuple(s / 10 for s in mine.layer_s)}).model_dump_json())
    fast = json.loads(run("plan", "alexnet", "--edge", str(path), "--json"))["plans"][0]
    assert fast["delay_s"] < 0.043
    path.write_text(mine.model_copy(update={"sha256": "1" * 64}).model_dump_json())
    with pytest.raises(ConfigError, match="another alexnet"):
        run("plan", "alexnet", "--edge", str(path))
    with pytest.raises(ConfigError, match=r"edge.json is a profile of alexnet, not of vgg16"):
        run("plan", "vgg16", "--edge", str(path))
    with pytest.raises(UnknownNameError, match=r"'alexnett'; did you mean alexnet\?") as caught:
        run("plan", "alexnett")
    assert "lenet" in str(caught.value.remedy)


def test_the_plot_is_written(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    run("plan", "alexnet", "--plot", str(path))
    assert path.stat().st_size > 10_000


def test_a_plot_of_several_routes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    with pytest.raises(ConfigError, match="--plot") as caught:
        run("plan", "alexnet", "--objective", "pipelined", "--policy", "routes", "--plot", str(path))
    assert "--policy routes" in str(caught.value.remedy)
    assert not path.exists()


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RandomRegion]:
    world = RandomRegion(PlannerCore(0), 3, Traffic(rate=6.0), validate=False).run()
    path = tmp_path_factory.mktemp("dump") / "decisions.jsonl"
    opened = EpochOpened(region=0, epoch=1, nonce="n", planner="p", lease_s=1.0)
    lines = [opened.model_dump_json(), *('{"value":' + d.model_dump_json() + "}" for d in world.log)]
    path.write_text("\n".join(lines) + "\n")
    return path, world


def test_explain_reads_a_dump_of_tail(dump: tuple[Path, RandomRegion]) -> None:
    path, world = dump
    task_id = next(name for name, placed in world.placed.items() if placed.wait_s > 0)
    found = json.loads(run("explain", task_id, "--from", str(path), "--json"))
    assert found["task_id"] == task_id
    assert found["waited_for"]
    chosen = [c for c in found["candidates"] if c["chosen"]]
    assert chosen[0]["placement"] == found["decided"]["placement"]
    assert {"placement", "start_in_s", "delay_s", "lacked"} <= set(chosen[0])
    assert task_id in run("explain", task_id, "--from", str(path))


@pytest.mark.parametrize("columns", [60, 80, 119, 200])
def test_what_a_candidate_lacked_can_be_read_on_every_terminal(
    dump: tuple[Path, RandomRegion], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    path, world = dump
    task_id = next(name for name, placed in world.placed.items() if placed.wait_s > 0)
    monkeypatch.setenv("COLUMNS", str(columns))
    found = json.loads(run("explain", task_id, "--from", str(path), "--json"))
    shown = " ".join(run("explain", task_id, "--from", str(path)).split())
    lacked = {c["lacked"] for c in found["candidates"] if c["lacked"]}
    assert lacked
    if columns < 120:
        assert all(text in shown for text in lacked)
    assert ("What each lacked for an immediate start:" in shown) is (columns < 120)


def test_explain_refuses_what_is_no_dump(tmp_path: Path, dump: tuple[Path, RandomRegion]) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("not json\n")
    with pytest.raises(ConfigError, match="line 1"):
        run("explain", "t1", "--from", str(broken))
    with pytest.raises(ConfigError, match="No such file"):
        run("explain", "t1", "--from", str(tmp_path / "none"))
    with pytest.raises(UnknownNameError, match="t999"):
        run("explain", "t999", "--from", str(dump[0]))


def test_explain_says_what_a_task_waits_for_and_since_when(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    waiting = records(edge(), device("d1"), task("t1", "d1"), device("d2"), policy="cloud-only")
    path.write_text("\n".join(decision.model_dump_json() for decision in waiting))
    shown = " ".join(run("explain", "t1", "--from", str(path)).split())
    assert "It waits for a cloud to join, since" in shown
    assert "10 ms before the last record" in shown
    found = json.loads(run("explain", "t1", "--from", str(path), "--json"))
    assert (found["state"], found["waits_for"], found["waiting_since_s"]) == ("WAITING", ["a cloud to join"], 0.02)


def test_explain_says_which_batches_were_predicted(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    fixed = tuple(BatchSpeed(batch=size, factors=(1 / size,) * 3) for size in (2, 4, 8, 16, 32))
    batching = edge(slots=9, models=(profile(layer_s=(0.001,) * 3).model_copy(update={"batch": fixed}),))
    tasks = [task(f"t{number}", f"d{number}", samples=100) for number in range(3)]
    nodes = [batching, *(device(f"d{number}", models=(profile(layer_s=(9.0,) * 3),)) for number in range(3))]
    decided = records(*nodes, *tasks, policy="edge-only", objective=Objective.PIPELINED)
    path.write_text("\n".join(decision.model_dump_json() for decision in decided))
    for number, with_others, batch, share, every in (
        (0, "with no other task", "8", "375 us", "375 us"),
        (2, "with 2 other tasks", "24", "125 us", "375 us"),
    ):
        shown = " ".join(run("explain", f"t{number}", "--from", str(path)).split())
        assert f"Predicted for e1, {with_others}: {batch} samples in a batch, each with a share of {share};" in shown
        assert f"a sample of this task every {every}." in shown
    found = json.loads(run("explain", "t2", "--from", str(path), "--json"))
    assert found["decided"]["placement"]["edge_batch"] == {"tasks": 3, "batch": 24.0, "apart": 3.0}
    assert found["decided"]["placement"]["cloud_batch"] is None


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_latency_is_shown_and_the_shares_add_up_to_the_delay(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    far = (
        "plan",
        "alexnet",
        "--link1",
        "100Mbps",
        "--link2",
        "20Mbps",
        "--top",
        "1",
        "--forbid",
        "cloud",
        "--pin",
        "edge",
    )
    text = run(*far, "--link1-latency", "20ms", "--link2-latency", "40ms")
    assert "links 100 Mbps with 20 ms and 20 Mbps with 40 ms" in " ".join(text.split())
    heading = next(line for line in text.splitlines() if "latency" in line)
    row = [line for line in text.splitlines() if re.match(r" *[0-9.]+ m?s ", line)][-1]
    delay, *shares = (parse_duration(found) for found in re.findall(r"[0-9.]+ (?:us|ms|s)\b", row))
    assert shares[-1] == pytest.approx(0.040), "there and back over link 1, which is all that this plan uses"
    if columns == 60:
        assert "device+edge" in row
        assert "link 1" not in heading
    else:
        assert sum(shares) == pytest.approx(delay, rel=0.01)
        assert "cloud" not in heading, "no plan uses it"
    assert "latency" not in run(*far)


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_explain_names_the_tiers_of_each_candidate_and_shows_what_was_learned(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    region = Region(Truth(task_s=0.05), edge(), cloud(), device())
    region.heartbeat(LinkMeasurement(link=1, edge="e1", latency_s=0.02))
    region.run(4)
    path = tmp_path / "decisions.jsonl"
    path.write_text("\n".join(record.model_dump_json() for record in region.records))
    text = run("explain", "t4", "--from", str(path))
    assert max(map(len, text.splitlines())) <= columns
    table = text[text.index("Candidates") : text.index("Predicted")]
    heading = table.splitlines()[2]
    assert heading.split()[:7] == [
        "on",
        "cut",
        "after",
        "starts",
        "in",
        "takes",
        *(["overheads"] if columns == 80 else ["latency"]),
    ]
    assert ("done in" in heading) is (columns >= 100)
    rows = {line.removeprefix(" =>").split()[0] for line in table.splitlines()[2:] if line.strip(" ─")}
    assert {"e1", "device"} <= rows
    assert rows & {"(e1)+cloud", "device+(e1)+cloud"}, "an edge that only passes on is told from one that computes"
    shown = " ".join(text.split())
    assert "took" in shown
    assert re.search(r"d1 - e1 20 ms one way probes", shown)
    assert re.search(r"delay [0-9.]+ ms [0-9.]+ ms [+-][0-9.]+ [mu]s [+-]?<?[0-9]+ %", shown)
    found = json.loads(run("explain", "t4", "--from", str(path), "--json"))
    assert found["measured_delay_s"] == region.delays[3]
    assert found["error"] == pytest.approx(region.delays[3] / found["decided"]["delay_s"] - 1.0)
    assert {"node", "model", "factor", "overhead_s", "tasks"} <= found["learned"][-2].keys() | found["learned"][
        0
    ].keys()
    chosen = next(candidate for candidate in found["candidates"] if candidate["chosen"])
    overhead = found["decided"]["overhead"]
    assert (chosen["latency_s"], chosen["overhead_s"]) == (overhead["latency_s"], overhead["task_s"])
