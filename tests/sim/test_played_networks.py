"""Latencies and traces in virtual time: predictions hold with them, and the stages play what a file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from bus.errors import ConfigError
from bus.messages import TaskState
from bus.values import Kind, Objective
from loadgen.replay.outcome import Outcome
from loadgen.sim.core_driver import drive
from loadgen.sim.scenario import Scenario
from loadgen.sim.simulator import simulate
from tests.known import known
from tests.unit.loadgen.machines import machines

TRACES = Path(__file__).parents[1] / "data" / "traces"
BUSY = Scenario(devices=12, edges=2, within_s=3, samples=(1, 30), slots=(1, 2))
FAR = {"link1_latency_s": "20ms", "link2_latency_s": "40ms"}


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("policy", ["deepar", "cloud-only"])
def test_with_latencies_life_in_virtual_time_agrees_with_the_driver(policy: str, objective: Objective) -> None:
    scenario = BUSY.varied(policy=policy, objective=objective, **FAR)
    expected = drive(scenario, 0, machines())
    found = simulate(scenario, 0, machines(), horizon_s=100_000).outcomes
    same = sum(a.where == b.where for a, b in zip(expected, found, strict=True))
    assert same >= 0.95 * len(expected)
    assert all(outcome.state is TaskState.COMPLETED for outcome in found)
    found_s, expected_s = ([known(outcome.delay_s) for outcome in outcomes] for outcomes in (found, expected))
    assert sum(found_s) / sum(expected_s) == pytest.approx(1.0, abs=0.01)
    near = drive(BUSY.varied(policy=policy, objective=objective), 0, machines())
    assert sum(expected_s) > sum(known(outcome.delay_s) for outcome in near), "the latency costs nothing"


def alone(**changes: object) -> Outcome:
    """One task of ten samples on the cloud, through links of 20 Mbit/s."""
    scenario = Scenario(
        devices=1,
        edges=1,
        within_s=1,
        arrivals="offline",
        models={"alexnet": 1.0},
        samples=(10, 10),
        input_bytes=(250_000, 250_000),
        max_link1_bps=(20e6, 20e6),
        max_link2_bps=(20e6, 20e6),
        policy="cloud-only",
    ).varied(**changes)
    (outcome,) = simulate(scenario, 0, machines(), horizon_s=10_000).outcomes
    assert outcome.state is TaskState.COMPLETED
    assert known(outcome.placement).kind is Kind.CLOUD
    return outcome


@pytest.mark.parametrize(("objective", "round_trips"), [("sequential", 10), ("pipelined", 1)])
def test_a_latency_is_paid_there_and_back_and_does_not_fill_the_link(objective: str, round_trips: int) -> None:
    near, far = alone(objective=objective), alone(objective=objective, **FAR)
    assert known(far.delay_s) - known(near.delay_s) == pytest.approx(2 * 0.06 * round_trips, rel=0.01)
    assert known(far.predicted_delay_s) == pytest.approx(known(far.device_delay_s), rel=0.01)
    measured, before = known(far.measured), known(near.measured)
    assert measured.link1_s == pytest.approx(before.link1_s, rel=0.01), "a latency is no time on the link"
    assert measured.link2_s == pytest.approx(before.link2_s, rel=0.01)


def test_a_long_pipeline_keeps_its_stations_busy_whatever_is_in_flight() -> None:
    """The round trip is sixty times the slowest station; a window of a few samples would make it ten times slower."""
    outcome = alone(
        objective="pipelined", samples=(400, 400), input_bytes=(2_500, 2_500), link1_latency_s=2.0, link2_latency_s=1.0
    )
    assert known(outcome.device_delay_s) == pytest.approx(known(outcome.predicted_delay_s), rel=0.01)


@pytest.mark.parametrize(("link", "late_s"), [(1, 0.0), (2, 0.1)])
def test_an_outage_of_a_link_stalls_a_task_and_it_goes_on(link: int, late_s: float, tmp_path: Path) -> None:
    """Ten samples of 0.1 s each on the link: 0.5 s at full speed, an outage of 20 s, then a tenth of the speed.

    Link 2 begins when the edge has the first sample, 0.1 s after link 1.
    """
    trace = tmp_path / "outage.csv"
    trace.write_text("t_s,bps\n0,20000000\n0.5,0\n20.5,2000000\n100,2000000\n", encoding="utf-8")
    near, stopped = alone(objective="pipelined"), alone(objective="pipelined", **{f"link{link}_trace": trace})
    begun_s = known(near.started_s)
    assert known(stopped.delay_s) == pytest.approx(known(near.delay_s) + 20 + 9 * (0.5 + begun_s + late_s), rel=0.01)


def test_recordings_are_played_and_the_same_twice() -> None:
    def run() -> list[float]:
        scenario = BUSY.varied(
            link1_trace=TRACES / "4g_foot.csv", link2_trace=TRACES / "3g_outage.csv", policy="edge-only"
        )
        found = simulate(scenario, 0, machines(), horizon_s=100_000).outcomes
        assert all(outcome.state is TaskState.COMPLETED for outcome in found)
        return [known(outcome.delay_s) for outcome in found]

    played = run()
    assert played == run()
    constant = simulate(BUSY.varied(policy="edge-only"), 0, machines(), horizon_s=100_000).outcomes
    assert sum(played) > sum(known(outcome.delay_s) for outcome in constant)


def test_the_driver_of_predictions_refuses_traces() -> None:
    with pytest.raises(ConfigError, match="no prediction knows a trace"):
        drive(BUSY.varied(link1_trace=TRACES / "4g_tram.csv"), 0, machines())
