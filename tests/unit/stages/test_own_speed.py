"""What a node measures of its own speed: only while idle, within its share of time, and what it reports of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import structlog

from bus.errors import ModelError
from bus.values import ModelProfile
from loadgen.sim.virtual_loop import run_virtual
from stages.measuring.own_speed import CHECK_S, LONGEST_S, RESERVE_S, SHARE, OwnSpeed

WHOLE_S = 0.010


class Machine:
    """Runs models in virtual time; `factor` of the time in their profiles."""

    def __init__(self, *profiles: ModelProfile) -> None:
        self.models = profiles
        self.factor: Callable[[int], float] = lambda run: 1.0  # by number of the run
        self.idle = True
        self.busy_s = 0.0
        self.runs = 0
        self.calls = 0
        self.broken = False
        self.speed = OwnSpeed(lambda: self.models, self.run, lambda: self.idle, self.called, structlog.get_logger())

    async def run(self, profile: ModelProfile) -> float:
        if self.broken:
            raise ModelError(profile.model, "cannot be loaded")
        took_s = sum(profile.layer_s) * self.factor(self.runs)
        self.runs += 1
        self.busy_s += took_s
        await asyncio.sleep(took_s)
        return took_s

    def called(self) -> None:
        self.calls += 1

    def heartbeat(self) -> dict[str, float]:
        """What the next heartbeat carries; it is acknowledged."""
        news = self.speed.news()
        self.speed.told(news)
        return {one.model: one.factor for one in news}


def profile(model: str = "m", whole_s: float = WHOLE_S) -> ModelProfile:
    return ModelProfile(
        model=model, sha256="0" * 64, platform="p", layer_names=("a",), layer_s=(whole_s,), cut_bytes=(4, 4)
    )


def played(machine: Machine, *steps: Callable[[], object], each_s: float = 20.0) -> list[object]:
    """What the steps return, each after some time of measuring."""

    async def run() -> list[object]:
        measuring = asyncio.create_task(machine.speed.run())
        found = []
        for step in steps:
            await asyncio.sleep(each_s)
            found.append(step())
        measuring.cancel()
        await asyncio.wait([measuring])
        return found

    return run_virtual(run())


def test_a_slower_node_says_so_once_and_so_does_a_recovered_one() -> None:
    machine = Machine(profile())

    def slower() -> None:
        machine.factor = lambda run: 3.0

    def recovered() -> None:
        machine.factor = lambda run: 1.0

    heard = played(
        machine, machine.heartbeat, slower, machine.heartbeat, machine.heartbeat, recovered, machine.heartbeat
    )
    assert heard == [{}, None, {"m": pytest.approx(3.0)}, {}, None, {"m": pytest.approx(1.0)}]
    assert machine.calls >= 2, "a heartbeat follows at once"


@pytest.mark.parametrize(("factor", "told"), [(1.08, False), (1.15, True), (0.85, True)])
def test_changes_of_a_tenth_are_not_reported(factor: float, told: bool) -> None:
    machine = Machine(profile())
    machine.factor = lambda run: factor
    assert played(machine, machine.heartbeat) == [{"m": pytest.approx(factor)} if told else {}]


def test_changes_that_no_task_would_notice_are_not_reported() -> None:
    machine = Machine(profile(whole_s=0.000_03))
    machine.factor = lambda run: 4.0
    assert played(machine, machine.heartbeat) == [{}]


def test_a_moment_of_load_is_not_reported() -> None:
    machine = Machine(profile())
    machine.factor = lambda run: (
        5.0 if run == 10 else 1.0
    )  # this run is longer than a measurement, so it is the only one
    assert played(machine, machine.heartbeat, each_s=60.0) == [{}]
    assert machine.calls == 0
    assert machine.runs > 20


def test_an_idle_node_spends_a_hundredth_of_its_time_on_itself() -> None:
    machine = Machine(profile("short", 0.001), profile("long", LONGEST_S * 0.9), profile("longer", LONGEST_S * 1.1))
    hour_s = 3600.0
    played(machine, machine.heartbeat, each_s=hour_s)
    assert 0.5 * SHARE * hour_s < machine.busy_s < 1.05 * SHARE * hour_s


def test_a_short_model_is_measured_every_few_seconds() -> None:
    machine = Machine(profile(whole_s=0.001))
    played(machine, machine.heartbeat, each_s=60.0)
    assert machine.runs == pytest.approx(5 * 60.0 / CHECK_S, abs=5)


@pytest.mark.parametrize("slow_at_s", [20.0, 21.0, 22.0, 23.0, 24.0])
def test_a_short_slowdown_and_the_recovery_are_told_within_seconds(slow_at_s: float) -> None:
    """Slow runs and their confirmations take long; a pause for all of them would end long after the recovery."""
    again_at_s = slow_at_s + 13.0
    told_s: dict[tuple[str, float], float] = {}

    async def run() -> None:
        machine = Machine(profile("small", 0.008), profile("large", 0.008))
        clock = asyncio.get_running_loop().time
        begin_s = clock()
        machine.factor = lambda run: 3.0 if slow_at_s <= clock() - begin_s < again_at_s else 1.0
        measuring = asyncio.create_task(machine.speed.run())
        while clock() - begin_s < again_at_s + 30.0:
            await asyncio.sleep(0.1)
            for model, factor in machine.heartbeat().items():
                told_s[model, round(factor, 3)] = clock() - begin_s
        measuring.cancel()

    run_virtual(run())
    assert told_s.keys() == {(model, factor) for model in ("small", "large") for factor in (3.0, 1.0)}
    for (_, factor), at_s in told_s.items():
        assert at_s - (slow_at_s if factor > 1.0 else again_at_s) < CHECK_S + 3.0


def test_a_node_whose_speed_changes_all_the_time_spends_at_most_two_hundredths_of_its_time() -> None:
    machine = Machine(profile("a", 0.05), profile("b", 0.05), profile("c", 0.05))
    machine.factor = lambda run: 3.0 if run % 8 < 4 else 1.0
    minute_s, minutes = 60.0, 30
    told = played(machine, *[machine.heartbeat] * minutes, each_s=minute_s)
    assert sum(map(bool, told)) > 5
    assert machine.busy_s < 2.1 * SHARE * minute_s * minutes + RESERVE_S


def test_a_node_with_work_measures_nothing() -> None:
    machine = Machine(profile())
    machine.idle, machine.factor = False, lambda run: 3.0
    assert played(machine, machine.heartbeat) == [{}]
    assert machine.runs == 0


def test_a_measurement_in_which_a_task_starts_does_not_count() -> None:
    machine = Machine(profile())

    def task_starts(run: int) -> float:
        machine.idle = run < 2
        return 3.0

    machine.factor = task_starts
    assert played(machine, machine.heartbeat) == [{}]
    assert machine.runs == 3


def test_a_model_that_cannot_run_does_not_end_the_measurements() -> None:
    machine = Machine(profile())
    machine.broken, machine.factor = True, lambda run: 3.0

    def mended() -> None:
        machine.broken = False

    assert played(machine, machine.heartbeat, mended, machine.heartbeat)[2] == {"m": pytest.approx(3.0)}


def test_everything_is_told_again_to_a_planner_that_has_forgotten_it() -> None:
    machine = Machine(profile())
    machine.factor = lambda run: 3.0
    heard = played(machine, machine.heartbeat, machine.speed.forget, machine.heartbeat)
    assert heard[0] == heard[2] == {"m": pytest.approx(3.0)}


def test_another_profile_makes_what_was_told_void() -> None:
    machine = Machine(profile())
    machine.factor = lambda run: 3.0

    def measured_again() -> None:
        machine.models, machine.factor = (profile(whole_s=3 * WHOLE_S),), lambda run: 1.0

    assert played(machine, machine.heartbeat, measured_again, machine.heartbeat)[2] == {}


def test_a_heartbeat_carries_a_bounded_number_of_models() -> None:
    machine = Machine(*(profile(f"m{number}", 0.001) for number in range(130)))
    machine.factor = lambda run: 3.0
    first, second = played(machine, machine.heartbeat, machine.heartbeat, each_s=400.0)
    assert (len(dict(first)), len(dict(second))) == (100, 30)  # type: ignore[call-overload]
