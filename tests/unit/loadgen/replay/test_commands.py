"""`deepar loadgen`: what the flags mean, exit codes, one JSON object on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bus.errors import ConfigError, UnknownNameError
from bus.kafka.connection import KafkaConnection
from bus.messages import NodeAnnounced, TaskState
from bus.values import Kind, Parts, Placement, Role
from deploy.commands.loadgen import replay
from deploy.commands.loadgen.bench import BenchmarkSource
from deploy.console_output.replay_run import PLANNER_TIMEOUT_S, ReplayRun, devices_for, require_models
from loadgen.replay import arrivals, schedule
from loadgen.replay.schedule import Schedule
from loadgen.replay.task_mix import Mix, parse_models
from planner.search.profiles import load_profile

PLACEMENT = Placement(kind=Kind.EDGE, edge="e1", cut1=0, cut2=5, cut1_name="input", cut2_name="fc_3")


class PlayedReplays:
    """Plays replays at once: every task takes a tenth of a second per sample. Keeps the schedules."""

    def __init__(self) -> None:
        self.seen: list[Schedule] = []

    def __getitem__(self, index: int) -> Schedule:
        return self.seen[index]

    def __call__(self, run: ReplayRun) -> bool:
        schedule = run.make(run.request.devices or ["d1", "d2"])
        self.seen.append(schedule)
        run.seed = schedule.seed
        for entry in schedule.entries:
            outcome = run.recorder.expect(entry)
            run.recorder.submit(entry.task.task_id, entry.at_s)
            outcome.started_s, outcome.policy, outcome.placement = entry.at_s, "deepar", PLACEMENT
            outcome.predicted = outcome.measured = Parts(edge_s=0.1 * entry.task.samples)
            outcome.ended_s, outcome.state = entry.at_s + 0.1 * entry.task.samples, TaskState.COMPLETED
        return False


@pytest.fixture
def replays() -> PlayedReplays:
    return PlayedReplays()


def invoke(play: Callable[[ReplayRun], bool], tmp_path: Path, *arguments: str) -> Any:
    return CliRunner().invoke(
        replay.app, ["replay", "--out", str(tmp_path / "out"), *arguments], obj=replay.Player(play)
    )


def test_one_object_on_stdout_with_the_keys_that_scripts_read(tmp_path: Path, replays: PlayedReplays) -> None:
    result = invoke(replays, tmp_path, "--tasks", "8", "--samples", "5", "--random-seed", "3", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["seed"], found["policy"], found["submitted"], found["completed"]) == (3, "deepar", 8, 8)
    assert (found["rejected"], found["failed"], found["expired"]) == (0, 0, 0)
    assert set(found["delay_s"]) >= {"mean", "p50", "p90", "p99", "max"}
    assert found["delay_s"]["mean"] == pytest.approx(0.5)
    assert found["by_kind"]["edge"]["tasks"] == 8
    assert all(Path(path).exists() for path in found["files"])


@pytest.mark.parametrize(
    ("arguments", "instants"),
    [
        (["--request-rate", "2", "--request-distribution", "constant"], [0, 0.5, 1.0]),
        (["--burst-size", "2", "--burst-every", "4s"], [0, 0, 4]),
        (["--scenario", "Offline"], [0, 0, 0]),
        (["--request-rate", "1", "--request-distribution", "constant", "--time-scale", "0.1"], [0, 0.1, 0.2]),
    ],
)
def test_arrivals(tmp_path: Path, replays: PlayedReplays, arguments: list[str], instants: list[float]) -> None:
    assert invoke(replays, tmp_path, "--tasks", "3", *arguments).exit_code == 0
    assert [entry.at_s for entry in replays[0].entries] == pytest.approx(instants)


def test_the_papers_mix_and_its_parameters(tmp_path: Path, replays: PlayedReplays) -> None:
    assert invoke(replays, tmp_path, "--tasks", "60", "--models", "paper", "--within", "300s").exit_code == 0
    tasks = [entry.task for entry in replays[0].entries]
    assert {task.model for task in tasks} == {"alexnet", "vgg16", "deepface", "lenet"}
    assert all(20e6 <= (task.max_link1_bps or 0) <= 300e6 for task in tasks)
    assert all(10e6 <= (task.max_link2_bps or 0) <= 50e6 for task in tasks)
    assert max(task.samples for task in tasks) > 500


def test_mlperf_multi_stream_is_closed_with_eight_samples(tmp_path: Path, replays: PlayedReplays) -> None:
    assert invoke(replays, tmp_path, "--tasks", "4", "--scenario", "multistream").exit_code == 0
    assert replays[0].closed
    assert {entry.task.samples for entry in replays[0].entries} == {8}


def test_devices_warm_up_and_caps(tmp_path: Path, replays: PlayedReplays) -> None:
    flags = ["--devices", "x, y", "--warmup", "2", "--max-link2", "10Mbps..20Mbps", "--deadline", "1min"]
    flags += ["--min-agreement", "0.995"]
    result = invoke(replays, tmp_path, "--tasks", "4", *flags, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["submitted"] == 4
    assert len(replays[0]) == 6
    assert {entry.task.device for entry in replays[0].entries} == {"x", "y"}
    assert {entry.task.deadline_s for entry in replays[0].entries} == {60.0}
    assert {entry.task.min_agreement for entry in replays[0].entries} == {0.995}
    assert all(10e6 <= (entry.task.max_link2_bps or 0) <= 20e6 for entry in replays[0].entries)


def test_a_planner_may_be_silent_for_as_long_as_its_records_may_wait_for_a_broker() -> None:
    """With Kafka's defaults a dead broker is replaced after 9 s, later on a busy machine; until then no planner can write."""
    assert KafkaConnection().delivery_timeout_s <= PLANNER_TIMEOUT_S


@pytest.mark.parametrize(("limit", "code"), [("400ms", 99), ("600ms", 0)])
def test_a_missed_threshold_is_exit_code_99(tmp_path: Path, replays: PlayedReplays, limit: str, code: int) -> None:
    result = invoke(replays, tmp_path, "--samples", "5", "--max-p99", limit)
    assert result.exit_code == code
    assert ("missed: --max-p99" in result.stderr) is (code == 99)


def test_tasks_without_an_end_are_a_failure(tmp_path: Path) -> None:
    def play(run: ReplayRun) -> bool:
        for entry in run.make(["d1"]).entries:
            run.recorder.expect(entry)
            run.recorder.submit(entry.task.task_id, entry.at_s)
        return False

    assert invoke(play, tmp_path).exit_code == 1


def test_an_interrupted_replay_writes_what_it_has(tmp_path: Path) -> None:
    def play(run: ReplayRun) -> bool:
        return bool(run.recorder.expect(run.make(["d1"]).entries[0]))

    assert invoke(play, tmp_path).exit_code == 105
    assert (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--within", "soon"], "soon"),
        (["--scenario", "Server"], "needs --request-rate"),
        (["--burst-size", "2", "--scenario", "Offline"], "exclude each other"),
        (["--samples", "many"], "many"),
        (["--max-link1", "fast"], "--max-link1 fast"),
        (["--max-link1", "100"], "--max-link1 100: a rate without a unit"),
        (["--max-link2", "20..300Mbps"], "--max-link2 20: a rate without a unit"),
        (["--input-size", "600"], "--input-size 600: a size without a unit"),
        (["--within", "10"], "--within 10: a duration without a unit"),
        (["--burst-size", "2", "--burst-every", "5"], "--burst-every 5: a duration without a unit"),
        (["--deadline", "3"], "--deadline 3: a duration without a unit"),
        (["--min-agreement", "1.1"], "min_agreement must be above 0 and at most 1, not 1.1"),
        (["--max-p99", "2"], "--max-p99 2: a duration without a unit"),
        (["--drain-timeout", "60"], "--drain-timeout 60: a duration without a unit"),
        (["--models", "lenet=x"], "weight of lenet"),
        (["--schedule", "nowhere.jsonl"], "no such file"),
        (["--time-scale", "0"], "time scale"),
    ],
)
def test_wrong_input_is_named(tmp_path: Path, replays: PlayedReplays, arguments: list[str], message: str) -> None:
    result = invoke(replays, tmp_path, *arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_a_benchmark_prints_its_object_and_fails_when_an_aim_is_missed() -> None:
    def run(*, tasks: int = 5, progress: object = None) -> dict[str, Any]:
        aims = [{"name": "a", "value": tasks, "aim": 3, "pass": tasks <= 3}]
        return {"bench": "simulator", "machine": "m", "results": [{"tasks": tasks, "seconds": 1.0}], "aims": aims}

    source = BenchmarkSource(lambda name: {"simulator": run}[name])
    result = CliRunner().invoke(replay.app, ["bench", "simulator", "--tasks", "2", "--json"], obj=source)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["results"] == [{"tasks": 2, "seconds": 1.0}]
    assert CliRunner().invoke(replay.app, ["bench", "simulator"], obj=source).exit_code == 99
    unknown = CliRunner().invoke(replay.app, ["bench", "speed"])
    assert isinstance(unknown.exception, UnknownNameError)


def test_a_model_that_no_device_has_is_told_before_anything_is_submitted() -> None:
    known = tuple(load_profile("paper").device[model] for model in ("lenet", "alexnet"))
    found = [NodeAnnounced(node="d1", role=Role.DEVICE, region=0, incarnation="i", lease_s=10.0, models=known)]

    def drawn(models: str, device: str) -> Schedule:
        return schedule.make(9, arrivals.at_once(), Mix(models=parse_models(models)), [device], seed=0)

    with pytest.raises(UnknownNameError, match=r"'lenett'; did you mean lenet\?") as caught:
        require_models(drawn("alexnet,lenett", "d1"), found)
    assert caught.value.remedy == "there are: alexnet, lenet"
    with pytest.raises(UnknownNameError, match=r"no model on any device called 'zebra'$"):
        require_models(drawn("zebra", "d1"), found)
    require_models(drawn("lenet,alexnet", "d1"), found)
    require_models(drawn("zebra", "later"), found)


def test_a_replay_leaves_out_devices_that_lack_a_model() -> None:
    def device(name: str, *models: str) -> NodeAnnounced:
        known = [load_profile("paper").device[model] for model in models]
        return NodeAnnounced(node=name, role=Role.DEVICE, region=0, incarnation="i", lease_s=10.0, models=tuple(known))

    found = [device("d1", "lenet", "alexnet"), device("d2", "lenet"), device("d3", "vgg16")]
    assert devices_for({"lenet"}, found) == ["d1", "d2"]
    assert devices_for({"lenet", "alexnet"}, found) == ["d1"]
    assert devices_for({"lenet", "vgg16"}, found) == ["d1", "d2", "d3"]  # its tasks are rejected with a cause
