"""What people read of what was learned: the latest values, the tasks behind them, and the text."""

from __future__ import annotations

import tracemalloc

import pytest

from bus.messages import Learned, LearnedLink, LearnedNode, LearnedPath, NodeAnnounced, StaleEstimate
from bus.values import Kind, Role
from planner.learning.lessons import Lessons, error_text, lines, name_of, text_of
from tests.sim.world import profile


def speed(node: str = "e1", factor: float = 3.0, kept: int = 2, model: str = "toy") -> LearnedNode:
    return LearnedNode(
        node=node, model=model, samples=5, profile_s=1.0, busy_s=3.0, factor=factor, overhead_s=0.0, kept=kept
    )


def path(kind: Kind, edge: str | None = "e1", **values: float) -> LearnedPath:
    costs = {"task_s": 0.0, "sample_s": 0.0, "deviation": 0.0, **values}
    return LearnedPath(device="d1", edge=edge, kind=kind, samples=5, delay_s=1.0, gap_s=0.1, error=0.2, kept=1, **costs)


def taught(*tasks: str, factor: float = 3.0, kept: int = 2) -> Lessons:
    lessons = Lessons()
    for task in tasks:
        lessons.learn(Learned(task_id=task, nodes=(speed(factor=factor, kept=kept),)))
    return lessons


def test_an_estimate_names_the_tasks_whose_observations_it_uses() -> None:
    assert taught("t1", "t2", "t3", kept=2).nodes["e1", "toy", False].tasks == ("t2", "t3")
    lessons = taught("t1", "t2", "t3", kept=3)
    assert lessons.nodes["e1", "toy", False].tasks == ("t1", "t2", "t3")
    lessons.learn(Learned(task_id="t4", nodes=(speed(factor=9.0, kept=1),)))  # the world has changed
    (last,) = lessons.newest(1)
    assert last.tasks == ("t4",)
    assert text_of(last.value) == "9 x profile"


def test_what_heartbeats_taught_names_no_task() -> None:
    lessons = Lessons()
    lessons.learn(Learned(links=(LearnedLink(link=1, device="d1", edge="e1", latency_s=0.02),)))
    assert lessons.links[1, "d1", "e1"].tasks == ()


def test_the_newest_come_first_whatever_they_are_about() -> None:
    lessons = taught("t1")
    lessons.learn(Learned(links=(LearnedLink(link=2, edge="e1", latency_s=0.02),)))
    lessons.learn(Learned(task_id="t2", paths=(path(Kind.DEVICE_EDGE),), nodes=(speed("d1"),)))
    assert [name_of(lesson.value) for lesson in lessons.newest(9)] == [
        "d1 - e1",
        "toy on d1",
        "e1 - cloud",
        "toy on e1",
    ]
    assert [name_of(lesson.value) for lesson in lessons.newest(1)] == ["d1 - e1"]
    lessons.learn(Learned(task_id="t3", nodes=(speed("e1"),)))
    assert name_of(lessons.newest(1)[0].value) == "toy on e1"


def test_the_number_of_lessons_is_bounded_and_the_oldest_goes_first() -> None:
    lessons = Lessons(limit=3)
    for number in range(5):
        lessons.learn(Learned(task_id=f"t{number}", nodes=(speed(f"e{number}"),)))
    assert [node for node, _, _ in lessons.nodes] == ["e2", "e3", "e4"]
    assert len(lessons) == 3


def test_nodes_that_come_once_are_forgotten() -> None:
    lessons = Lessons(limit=10)
    node = NodeAnnounced(node="e1", role=Role.EDGE, incarnation="i1", models=(profile(Role.EDGE),))
    tracemalloc.start()
    try:
        for i in range(3_000):
            lessons.join(node.model_copy(update={"node": f"e{i}"}))
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held_bytes < 100_000


def test_another_profile_makes_a_lesson_void_and_the_same_one_does_not() -> None:
    node = NodeAnnounced(node="e1", role=Role.EDGE, incarnation="i1", models=(profile(Role.EDGE),))
    lessons = taught("t1")
    lessons.join(node)
    lessons.join(node.model_copy(update={"incarnation": "i2"}))
    assert lessons.nodes
    lessons.join(node.model_copy(update={"models": (profile(Role.EDGE, scale=2.0),)}))
    assert not lessons.nodes


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        (speed(factor=1.436), "toy on e1", "1.44 x profile"),
        (speed().model_copy(update={"overhead_s": 0.02}), "toy on e1", "3 x profile + 20 ms a sample"),
        (path(Kind.DEVICE_EDGE), "d1 - e1", "no overhead, off by 0 %"),
        (path(Kind.DEVICE, None, task_s=0.003, deviation=0.12), "d1 alone", "3 ms a task, off by 12 %"),
        (
            path(Kind.DEVICE_CLOUD, task_s=-0.003, sample_s=2e-4),
            "d1 - (e1) - cloud",
            "-3 ms a task + 200 us a sample, off by 0 %",
        ),
        (path(Kind.DEVICE_EDGE_CLOUD, sample_s=2e-4), "d1 - e1 - cloud", "200 us a sample, off by 0 %"),
        (LearnedLink(link=1, device="d1", edge="e1", latency_s=0.02), "d1 - e1", "20 ms one way"),
        (LearnedLink(link=2, edge="e1", latency_s=0, bps=10**6), "e1 - cloud", "0 s one way, carries 1 Mbps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_estimates_in_words(value: LearnedNode | LearnedPath | LearnedLink, name: str, text: str) -> None:
    assert (name_of(value), text_of(value)) == (name, text)


def test_an_estimate_that_is_tried_again_has_a_line() -> None:
    stale = Learned(
        stale=(StaleEstimate(node="e1", model="toy"), StaleEstimate(node="d1", edge="e1", kind=Kind.DEVICE_EDGE))
    )
    assert lines(stale) == [
        ("e1", "toy on e1 was not measured for long: its prediction moves towards that of the profile"),
        ("d1", "d1 - e1 was not measured for long: its prediction moves towards that of other paths"),
    ]


def test_slow_transfers_that_show_no_limit_have_no_line() -> None:
    slow = LearnedLink(link=2, edge="e1", latency_s=0.02, slow=((10, 5),))
    assert lines(Learned(task_id="t1", links=(slow,))) == []
    assert lines(Learned(task_id="t1", links=(slow.model_copy(update={"slow": (), "bps": 10**6}),)))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (0.25, "took 25 % more time than predicted"),
        (-0.2, "took 20 % less time than predicted"),
        (49.0, "took 4,900 % more time than predicted"),
        (0.004, "took as long as predicted"),
    ],
)
def test_errors_in_words(error: float, text: str) -> None:
    assert error_text(error) == text
