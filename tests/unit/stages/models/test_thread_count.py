"""`--num-threads auto`: the fewest threads that are about fastest, measured once."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from bus.errors import ConfigError
from bus.tensors import Array
from bus.values import ModelProfile
from stages.litert_runner import LitertRunner, RunnerOptions
from stages.models.compute_options import parse_threads
from stages.models.files.cache import cache_dir
from stages.models.model import Model
from stages.models.profiler import machine_profile, measuring_alone
from stages.models.runtime.litert import InterpreterOptions, SegmentRunner
from stages.models.segments.store import SegmentStore, StoreLimits
from stages.models.thread_count import RUNS, ThreadTimes, candidates, least_time_s, machine_threads


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))


class Times:
    """Stands in for `least_time_s`: the given seconds for each number of threads."""

    def __init__(self, times_s: Mapping[int, float]) -> None:
        self.times_s = times_s
        self.asked: list[int] = []

    def __call__(self, model: Model, num_threads: int) -> float:
        self.asked.append(num_threads)
        return self.times_s[num_threads]


@pytest.mark.parametrize(
    ("times_s", "best"),
    [
        ({1: 4.0, 2: 2.0, 4: 1.0}, 4),
        ({1: 1.0, 2: 2.0, 4: 3.0}, 1),
        ({1: 1.05, 2: 1.0, 4: 1.0}, 1),  # exactly 5 % slower
        ({1: 1.06, 2: 1.0, 4: 0.99}, 2),
        ({4: 1.0, 2: 1.04, 1: 1.2}, 2),  # in any order
        ({1: 0.0, 2: 0.0}, 1),  # too short for the clock
    ],
)
def test_the_fewest_threads_win_that_are_about_fastest(times_s: dict[int, float], best: int) -> None:
    assert ThreadTimes(least_s=times_s).best == best


@pytest.mark.parametrize(
    ("cores", "tried"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_powers_of_two_and_all_cores_are_tried(lenet: Model, cores: int, tried: list[int]) -> None:
    assert candidates(cores) == tried
    time = Times(dict.fromkeys(tried, 1.0))
    machine_threads(lenet, cores=cores, time=time)
    assert time.asked == tried


def test_a_restart_does_not_measure_again_but_tells_the_choice(lenet: Model) -> None:
    time = Times({1: 0.004, 2: 0.002, 4: 0.003})
    said: list[str] = []
    assert machine_threads(lenet, cores=4, time=time, say=said.append) == 2
    chosen = "threads for one inference of lenet: 2 (measured 1: 4 ms, 2: 2 ms, 4: 3 ms)"
    assert said == ["measuring how many threads suit lenet on this machine", chosen]
    assert machine_threads(lenet, cores=4, time=time, say=said.append) == 2
    assert time.asked == [1, 2, 4]
    assert said[2:] == [chosen]


def test_it_is_measured_again_on_demand_and_for_another_model_or_number_of_cores(lenet: Model, alexnet: Model) -> None:
    machine_threads(lenet, cores=2, time=Times({1: 2.0, 2: 1.0}))
    other = Times({1: 1.0, 2: 2.0, 4: 3.0})
    assert machine_threads(lenet, cores=2, time=other, remeasure=True) == 1
    assert machine_threads(lenet, cores=2, time=Times({})) == 1  # the new choice is stored
    assert machine_threads(lenet, cores=4, time=other) == 1
    assert machine_threads(alexnet, cores=2, time=other) == 1
    assert other.asked == [1, 2, 1, 2, 4, 1, 2]


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b'{"least_s": {}}', b'{"least_s": {"0": 1.0}}', b'{"least_s": {"2": -1.0}}']
)
def test_a_damaged_stored_choice_is_measured_again(lenet: Model, damaged: bytes) -> None:
    machine_threads(lenet, cores=2, time=Times({1: 2.0, 2: 1.0}))
    (stored,) = cache_dir("profiles").glob("lenet-threads-*.json")
    stored.write_bytes(damaged)
    assert machine_threads(lenet, cores=2, time=Times({1: 1.0, 2: 2.0})) == 1


def test_a_process_that_waited_for_the_measuring_lock_uses_what_was_stored_meanwhile(lenet: Model) -> None:
    waits = threading.Event()
    chosen: list[int] = []

    def say(line: str) -> None:
        if line.startswith("waiting"):
            waits.set()

    second = threading.Thread(target=lambda: chosen.append(machine_threads(lenet, cores=2, time=Times({}), say=say)))
    machine_threads(lenet, cores=2, time=Times({1: 2.0, 2: 1.0}))
    (stored,) = cache_dir("profiles").glob("lenet-threads-*.json")
    content = stored.read_bytes()
    stored.unlink()
    with measuring_alone():
        second.start()
        assert waits.wait(60)
        stored.write_bytes(content)
    second.join(60)
    assert chosen == [2]


def test_a_choice_that_cannot_be_stored_is_used_all_the_same(lenet: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stages.models.files.cache.tempfile.mkstemp", full)
    said: list[str] = []
    assert machine_threads(lenet, cores=2, time=Times({1: 2.0, 2: 1.0}), say=said.append) == 2
    assert any("not stored" in line and "the disk is full" in line for line in said)


def test_the_shortest_of_several_runs_counts_after_an_untimed_one(
    lenet: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    runs_s = iter([0.001, *(0.5 + 0.125 * abs(run - 3) for run in range(RUNS))])  # the first is not counted
    threads: list[int] = []

    class Whole(SegmentRunner):
        def __init__(self, source: Path, num_threads: int, *, title: str) -> None:
            threads.append(num_threads)
            super().__init__(source, num_threads, title=title)

        def run(self, inputs: object, batch: int | None = None) -> list[Array]:
            nonlocal now_s
            now_s += next(runs_s)
            return []

    monkeypatch.setattr("stages.models.thread_count.SegmentRunner", Whole)
    assert least_time_s(lenet, 2, lambda: now_s) == pytest.approx(0.5)
    assert threads == [2]
    assert next(runs_s, None) is None


def test_a_real_model_runs_with_each_number_of_threads(lenet: Model) -> None:
    assert machine_threads(lenet, cores=2) in (1, 2)


@pytest.mark.parametrize("text", ["0", "-1", "many", "", "1.5", "AUTO"])
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--num-threads .*must be auto or a number from 1 to 1024"):
        parse_threads(text)


def test_values() -> None:
    assert [parse_threads(text) for text in ("auto", "1", "65")] == ["auto", 1, 65]
    with pytest.raises(ConfigError, match="from 1 to 64"):
        parse_threads("65", most=64)


class RecordedStore(SegmentStore):
    """A store that tells the threads of its interpreters."""

    num_threads: ClassVar[list[int]] = []

    def __init__(self, model: Model, *, limits: StoreLimits, options: InterpreterOptions) -> None:
        self.num_threads.append(options.num_threads)
        super().__init__(model, limits=limits, options=options)


async def test_a_runner_computes_and_measures_with_the_chosen_number(
    lenet: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.litert_runner.SegmentStore", RecordedStore)
    monkeypatch.setattr(RecordedStore, "num_threads", [])
    measured_with: list[int] = []
    asked: list[bool] = []

    def measured(model: Model, *, num_threads: int, remeasure: bool, say: None) -> ModelProfile:
        measured_with.append(num_threads)
        return machine_profile(model)

    def threads(model: Model, *, remeasure: bool, say: None) -> int:
        asked.append(remeasure)
        return 3

    for options in (RunnerOptions(num_threads="auto", remeasure=True), RunnerOptions(num_threads=2), RunnerOptions()):
        runner = LitertRunner([lenet], options, measured=measured, threads=threads)
        await runner.remeasure("lenet")
        await runner.close()
    assert measured_with == [3, 3, 2, 2, 1, 1]
    assert RecordedStore.num_threads == [3, 2, 1]
    assert asked == [True]
