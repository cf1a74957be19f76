"""Arrival patterns, mixes, schedules: what is drawn, in which range, from which seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bus.errors import ConfigError, UnknownNameError
from loadgen.random_streams import Streams
from loadgen.replay import arrivals, schedule
from loadgen.replay.task_mix import PAPER_MIX, PAPER_MODELS, Mix, draw, parse_models
from tests.known import known


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_papers_arrivals_fill_the_interval_in_order() -> None:
    instants = arrivals.uniform(300)(2000, rng())
    assert instants == sorted(instants)
    assert 0 <= instants[0] < 3
    assert 297 < instants[-1] <= 300
    assert np.mean(instants) == pytest.approx(150, abs=6)


def test_constant_and_poisson_rates() -> None:
    assert arrivals.constant(4)(5, rng()) == [0, 0.25, 0.5, 0.75, 1.0]
    instants = arrivals.poisson(10)(20_000, rng())
    gaps = np.diff(instants)
    assert instants == sorted(instants)
    assert gaps.mean() == pytest.approx(0.1, rel=0.03)
    assert gaps.std() == pytest.approx(0.1, rel=0.04)  # exponential: as much spread as mean


def test_bursts_intervals_and_offline() -> None:
    assert arrivals.bursts(2, 10)(5, rng()) == [0, 0, 10, 10, 20]
    assert arrivals.intervals([1, 2])(5, rng()) == [1, 3, 4, 6, 7]
    assert arrivals.at_once()(3, rng()) == [0, 0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: arrivals.constant(0), "request rate"),
        (lambda: arrivals.poisson(-1), "request rate"),
        (lambda: arrivals.uniform(float("nan")), "interval"),
        (lambda: arrivals.bursts(0, 1), "burst"),
        (lambda: arrivals.intervals([]), "list of request intervals is empty"),
        (lambda: arrivals.intervals([1, -1]), "interval 1"),
    ],
)
def test_impossible_arrivals_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_interval_files_as_lines_and_as_json(tmp_path: Path) -> None:
    lines = tmp_path / "gaps.txt"
    lines.write_text("# recorded\n0.5\n1.25 # a pause\n\n2\n")
    assert arrivals.read_intervals(lines) == [0.5, 1.25, 2.0]
    listed = tmp_path / "gaps.json"
    listed.write_text("[0.5, 1]")
    assert arrivals.read_intervals(listed) == [0.5, 1.0]
    lines.write_text("0.5\nsoon\n")
    with pytest.raises(ConfigError, match=r"gaps\.txt:2: 'soon'"):
        arrivals.read_intervals(lines)
    with pytest.raises(ConfigError, match="cannot be read"):
        arrivals.read_intervals(tmp_path / "missing")


def test_mlperf_scenarios() -> None:
    assert arrivals.LoadgenScenario.SINGLE_STREAM.closed
    assert arrivals.LoadgenScenario.MULTI_STREAM.closed
    assert not arrivals.LoadgenScenario.SERVER.closed
    assert arrivals.LoadgenScenario.MULTI_STREAM.samples == 8
    assert arrivals.LoadgenScenario("Offline").samples == 1


def test_the_papers_mix_stays_in_its_ranges_and_fills_them() -> None:
    tasks = draw(PAPER_MIX, 4000, ["d0", "d1"], Streams(5))
    for low, high, values in (
        (1, 1000, [task.samples for task in tasks]),
        (20e6, 300e6, [known(task.max_link1_bps) for task in tasks]),
        (10e6, 50e6, [known(task.max_link2_bps) for task in tasks]),
        (10_000, 1_000_000, [known(task.input_bytes) for task in tasks]),
    ):
        assert min(values) >= low
        assert max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, rel=0.03)
    for model in PAPER_MODELS:
        assert sum(task.model == model for task in tasks) == pytest.approx(1000, abs=90)
    assert [task.device for task in tasks[:3]] == ["d0", "d1", "d0"]


def test_each_quantity_has_a_stream_of_its_own() -> None:
    everything = draw(PAPER_MIX, 50, ["d"], Streams(7))
    fewer = draw(Mix(models=PAPER_MIX.models, samples=(1, 1000)), 50, ["d"], Streams(7))
    assert [task.model for task in everything] == [task.model for task in fewer]
    assert [task.samples for task in everything] == [task.samples for task in fewer]
    assert fewer[0].max_link1_bps is None
    # More tasks do not change the first ones.
    assert [t.samples for t in draw(PAPER_MIX, 80, ["d"], Streams(7))][:50] == [t.samples for t in everything]


def test_the_same_seed_gives_the_same_schedule_and_another_does_not() -> None:
    one = schedule.make(40, arrivals.uniform(50), PAPER_MIX, ["d0"], seed=3)
    assert one == schedule.make(40, arrivals.uniform(50), PAPER_MIX, ["d0"], seed=3)
    assert one.entries != schedule.make(40, arrivals.uniform(50), PAPER_MIX, ["d0"], seed=4).entries
    assert "arrivals" in one.streams
    assert "samples" in one.streams


def test_weights_of_a_mix() -> None:
    assert parse_models("paper") == dict.fromkeys(PAPER_MODELS, 1.0)
    assert parse_models("lenet=3, alexnet=1") == {"lenet": 3.0, "alexnet": 1.0}
    tasks = draw(Mix(models={"a": 3, "b": 1}), 4000, ["d"], Streams(1))
    assert sum(task.model == "a" for task in tasks) == pytest.approx(3000, abs=120)
    with pytest.raises(ConfigError, match="weight of lenet"):
        parse_models("lenet=much")
    with pytest.raises(ConfigError, match="greater than 0"):
        parse_models("lenet=0")
    with pytest.raises(UnknownNameError, match=r"'lenett'.*lenet"):
        parse_models("lenett", known=["lenet"])
    with pytest.raises(ConfigError, match="no device"):
        draw(PAPER_MIX, 1, [], Streams(1))
    with pytest.raises(ConfigError, match="samples"):
        Mix(models={"a": 1}, samples=(5, 1))


def test_data_sets_name_the_input() -> None:
    task = draw(Mix(models={"lenet": 1}, datasets={"lenet": "digits"}), 1, ["d"], Streams(1))[0]
    assert task.input.type == "dataset"
    assert task.input.name == "digits"


def test_a_schedule_survives_its_file(tmp_path: Path) -> None:
    one = schedule.make(20, arrivals.poisson(2), PAPER_MIX, ["d0", "d1"], seed=9).with_warmup(2)
    schedule.write(one, tmp_path / "s.jsonl")
    back = schedule.read(tmp_path / "s.jsonl", [])
    assert back.entries == one.entries


def test_a_short_schedule_file(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    lines = [
        {"timestamp": "2026-01-01T10:00:05Z", "model": "alexnet", "device": "d9", "samples": 4},
        {"timestamp": "2026-01-01T10:00:07.5Z", "model": "lenet"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    plan = schedule.read(path, ["d1", "d2"], prefix="x")
    assert [entry.at_s for entry in plan.entries] == [0.0, 2.5]
    assert [entry.task.device for entry in plan.entries] == ["d9", "d2"]
    assert [entry.task.task_id for entry in plan.entries] == ["x-1", "x-2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"s\.jsonl:1: not JSON"),
        ("[1]", "not a JSON object"),
        ('{"model": "a"}', "missing `at_s` or `timestamp`"),
        ('{"at_s": "now", "model": "a"}', "at_s is 'now'"),
        ('{"at_s": 1, "model": "a", "samples": 0}', "samples"),
        ('{"at_s": 1}', "model"),
        ('{"timestamp": "noon", "model": "a"}', "'noon'"),
        ("", "contains no tasks"),
    ],
)
def test_a_broken_schedule_names_its_line_and_key(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=message):
        schedule.read(path, ["d"])


def test_time_scale_and_order() -> None:
    one = schedule.make(3, arrivals.constant(1), PAPER_MIX, ["d"], seed=0)
    assert [entry.at_s for entry in one.scaled(0.1).entries] == pytest.approx([0, 0.1, 0.2])
    assert one.span_s == 2
    with pytest.raises(ConfigError, match="time scale"):
        one.scaled(0)
    with pytest.raises(ConfigError, match="earlier than the previous task"):
        schedule.Schedule(entries=one.entries[::-1])
    with pytest.raises(ConfigError, match="duplicate task id"):
        schedule.Schedule(entries=(one.entries[0], one.entries[0]))
