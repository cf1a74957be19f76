"""What an operator reads: who got what, where, with which bandwidth, and who waits for what."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from bus import messages, topics
from bus.messages import (
    Admitted,
    BandwidthGrant,
    CircuitChanged,
    Decision,
    Ended,
    EpochOpened,
    Learned,
    LearnedLink,
    LearnedNode,
    LearnedPath,
    Moved,
    NodeAnnounced,
    NodeJoined,
    NodeLost,
    Overran,
    Placed,
    Rerouted,
    Retried,
    SeedInput,
    Start,
    TaskFailed,
    TaskProgress,
    TaskState,
    TaskSubmitted,
)
from bus.port import Record
from bus.region_tasks import RegionTasks
from bus.values import Execution, Kind, Objective, Parts, Placement, Role
from deploy.commands.kafka.tail import Table, json_line
from deploy.monitor.decision_lines import lines_of, path_text
from planner.service.record_split import split_decision


def placed(
    task_id: str,
    *,
    device: str = "d1",
    edge: str | None = "e1",
    kind: Kind = Kind.DEVICE_EDGE_CLOUD,
    start_s: float = 0.0,
    wait_s: float = 0.0,
    delay_s: float = 2.0,
    cuts: tuple[int, int] = (1, 2),
) -> Placed:
    names = ("input", "conv", "pool", "dense")
    return Placed(
        task_id=task_id,
        attempt=1,
        device=device,
        model="toy",
        sha256="0" * 64,
        samples=3,
        policy="deepar",
        objective=Objective.SEQUENTIAL,
        execution=Execution.SEQUENTIAL,
        placement=Placement(
            kind=kind,
            edge=edge,
            cut1=cuts[0],
            cut2=cuts[1],
            cut1_name=names[cuts[0]],
            cut2_name=names[cuts[1]],
            link1_bps=0 if edge is None else 117_000_000,
            link2_bps=20_000_000 if "cloud" in kind.value else 0,
        ),
        start_s=start_s,
        wait_s=wait_s,
        delay_s=delay_s,
        parts=Parts(),
    )


def decision(*changes: Any, seq: int = 1, now_s: float = 0.0, nonce: str = "n", epoch: int = 1) -> Decision:
    return Decision(
        region=0, epoch=epoch, nonce=nonce, seq=seq, now_s=now_s, inputs={}, changes=changes, ledger_hash="0"
    )


def admitted(task_id: str) -> Admitted:
    return Admitted(
        task=TaskSubmitted(task_id=task_id, device="d1", model="toy", samples=3, input=SeedInput(seed=1), deadline_s=9)
    )


def grants(task_id: str) -> list[BandwidthGrant]:
    return [
        BandwidthGrant(task_id=task_id, attempt=1, edge="e1", link=link, bps=bps, from_s=0)
        for link, bps in ((1, 117_000_000), (2, 20_000_000))
    ]


def start(task_id: str, at_s: float = 0.0) -> Start:
    return Start(task_id=task_id, attempt=1, device="d1", at_s=at_s)


def test_a_task_that_starts_at_once_is_one_line_with_place_cuts_and_bandwidth() -> None:
    lines = list(lines_of(decision(admitted("t1"), placed("t1"), *grants("t1"), start("t1"))))
    assert len(lines) == 1
    style, who, what, details = lines[0]
    assert (style, who, what) == ("bold green", "t1", "starts")
    assert details.split("  ")[0] == "d1 -117 Mbps-> e1 -20 Mbps-> cloud"
    assert "cut after conv | pool" in details
    assert details.endswith("2 s expected, 3 x toy")


@pytest.mark.parametrize(
    ("kind", "edge", "cuts", "text"),
    [
        (Kind.DEVICE, None, (3, 3), "d1"),
        (Kind.DEVICE_EDGE, "e1", (1, 3), "d1 -117 Mbps-> e1"),
        (Kind.DEVICE_CLOUD, "e1", (1, 1), "d1 -117 Mbps-> (e1) -20 Mbps-> cloud"),
        (Kind.EDGE, "e1", (0, 3), "(d1) -117 Mbps-> e1"),
        (Kind.CLOUD, "e1", (0, 0), "(d1) -117 Mbps-> (e1) -20 Mbps-> cloud"),
    ],
)
def test_who_only_passes_on_stands_in_parentheses(
    kind: Kind, edge: str | None, cuts: tuple[int, int], text: str
) -> None:
    assert path_text(placed("t1", kind=kind, edge=edge, cuts=cuts)) == text


def test_a_task_that_waits_names_whose_end_it_waits_for_and_what_they_share() -> None:
    held = RegionTasks()
    list(lines_of(decision(placed("t1"), *grants("t1"), start("t1")), held))
    list(lines_of(decision(placed("t2", edge="e2"), start("t2")), held))  # ends then too, elsewhere, on another device
    ((style, who, what, details),) = lines_of(
        decision(placed("t3", device="d9", start_s=2.0, wait_s=2.0), *grants("t3")), held
    )
    assert (style, who, what) == ("bold yellow", "t3", "waits 2 s")
    assert details.endswith("after t1 (slot, link 1, link 2 of e1)")
    ((*_, details),) = lines_of(
        decision(placed("t4", kind=Kind.DEVICE, edge=None, cuts=(3, 3), start_s=2.0, wait_s=2.0)), held
    )
    assert details.endswith("after t1 (d1), t2 (d1)")
    # t1 takes longer; who waited for it is moved, and starts in the end where it was to
    (overran, moved) = lines_of(
        decision(
            Overran(task_id="t1", attempt=1, from_s=2.0, to_s=2.5),
            Moved(task_ids=("t3",), starts_s=(2.5,)),
            now_s=2.1,
        ),
        held,
    )
    assert overran == ("yellow", "t1", "overran", "by 100 ms so far; given 400 ms more")
    assert moved == ("yellow", "t3", "waits 400 ms", "later by 500 ms, after t1 (slot, link 1, link 2 of e1)")
    ended, started = lines_of(
        decision(
            Ended(
                task_id="t1",
                attempt=1,
                state=TaskState.COMPLETED,
                edge="e1",
                released_slots=1,
                released_link1_bps=117_000_000,
                released_link2_bps=20_000_000,
                delay_s=2.4,
            ),
            start("t3", 2.4),
        ),
        held,
    )
    assert ended == ("green", "t1", "COMPLETED", "in 2.4 s (frees a slot, 117 Mbps, 20 Mbps of e1)")
    assert started == ("green", "t3", "starts", "d9 -117 Mbps-> e1 -20 Mbps-> cloud")


@pytest.mark.parametrize(
    ("cause", "detail", "told"),
    [("config", "profile x is missing", "config: profile x is missing"), ("stalled", "", "stalled")],
)
def test_causes_are_told_the_same_way_wherever_they_stand(cause: str, detail: str, told: str) -> None:
    changes = [
        Retried(task_id="t1", attempt=2, cause=cause, detail=detail),
        Ended(task_id="t1", attempt=2, state=TaskState.FAILED, cause=cause, detail=detail),
    ]
    failed = TaskFailed(task_id="t1", attempt=1, node="e1", cause=cause, detail=detail)
    found = [details for message in (failed, decision(*changes)) for *_, details in lines_of(message)]
    assert found == [f"at e1, {told}", f"planned again after {told}", told]


def test_what_is_counted_is_singular_where_it_is_one() -> None:
    node = NodeAnnounced(node="e1", role=Role.EDGE, incarnation="i", slots=1)
    lines = [*lines_of(TaskProgress(task_id="t1", attempt=1, node="d1", done=1)), *lines_of(node)]
    assert [details for *_, details in lines] == ["1 sample done", "edge, 1 slot"]


def test_reading_may_begin_in_the_middle() -> None:
    changes = [start("t7"), Moved(task_ids=("t8", "t6"), starts_s=(1.0, 2.0)), *grants("t9")[:1]]
    lines = list(lines_of(decision(*changes)))
    assert [(who, what) for _, who, what, _ in lines] == [("t7", "starts"), ("t8", "waits 1 s"), ("t9", "granted")]
    assert lines[1][3] == "moved, and 1 more task moved with it"


def test_every_type_of_change_has_words_of_its_own() -> None:
    node = NodeAnnounced(node="d1", role=Role.DEVICE, incarnation="i", link1_capacity_bps=5_000_000)
    lines = {
        who: (what, details)
        for _, who, what, details in lines_of(
            decision(
                admitted("t1"),
                Retried(task_id="t2", attempt=2, cause="node_lost", detail="e1: lease_expired"),
                Ended(task_id="t3", attempt=1, state=TaskState.REJECTED, cause="queue_full"),
                NodeJoined(node=node),
                NodeLost(node="e1", incarnation="i", cause="lease_expired"),
            )
        )
    }
    assert lines["t1"] == ("admitted", "3 x toy from d1, within 9 s")
    assert lines["t2"] == ("attempt 2", "planned again after node_lost: e1: lease_expired")
    assert lines["t3"] == ("REJECTED", "queue_full")
    assert lines["d1"] == ("joined", "device, link 1 at most 5 Mbps")
    assert lines["e1"] == ("lost", "lease_expired")
    assert len(lines) == 5


def record(offset: int, message: messages.Message) -> Record:
    return Record(topics.DECISIONS, 0, offset, 1_700_000_000_000, "0", messages.encode(message))


def test_the_table_shows_what_nobody_obeys_as_ignored() -> None:
    written = io.StringIO()
    table = Table(topics.DECISIONS, heartbeats=False, console=Console(file=written, width=200, no_color=True))
    opened = [EpochOpened(region=0, epoch=e, nonce=n, planner=f"p{e}", lease_s=5.0) for e, n in ((1, "n"), (2, "m"))]
    table(record(0, opened[0]))
    table(record(1, decision(placed("t1"), start("t1"))))
    table(record(2, opened[1]))
    table(record(3, decision(placed("t2"), start("t2"), seq=2)))  # of the first, which was frozen
    table(record(4, decision(placed("t3"), start("t3"), seq=2, nonce="m", epoch=2)))
    lines = written.getvalue().splitlines()
    assert "reserved bandwidth" in lines[0]  # the legend
    assert [line.split()[2:4] for line in lines[2:]] == [
        ["p1", "leads"],
        ["t1", "starts"],
        ["p2", "leads"],
        ["planner", "ignored"],
        ["t3", "starts"],
    ]
    assert "stale_epoch" in lines[5]


def test_the_table_may_begin_in_the_middle_of_an_epoch() -> None:
    written = io.StringIO()
    table = Table(topics.DECISIONS, heartbeats=False, console=Console(file=written, width=200, no_color=True))
    table(record(40, messages.PlannerHeartbeat(region=0, epoch=3, nonce="n")))
    table(record(41, decision(placed("t5"), start("t5"), seq=17, epoch=3)))
    table(record(42, decision(placed("t6"), start("t6"), seq=18, epoch=3)))
    assert [line.split()[2:4] for line in written.getvalue().splitlines()[2:]] == [["t5", "starts"], ["t6", "starts"]]


def test_the_table_shows_a_decision_of_several_records_when_it_is_whole() -> None:
    def lines(first: int) -> list[list[str]]:
        written = io.StringIO()
        table = Table(topics.DECISIONS, heartbeats=False, console=Console(file=written, width=200, no_color=True))
        large = decision(placed("t1"), start("t1"), placed("t2"), start("t2"), placed("t3"), start("t3"), seq=17)
        parts, last = split_decision(large, 1_000)
        assert len(parts) == 2
        for offset, message in enumerate([*parts, last, decision(placed("t4"), start("t4"), seq=18)]):
            if offset >= first:
                table(record(offset, message))
        return [line.split()[2:4] for line in written.getvalue().splitlines()[2:]]

    part, ignored = ["planner", "part"], ["planner", "ignored"]
    assert lines(0) == [part, part, *([f"t{n}", "starts"] for n in (1, 2, 3, 4))]
    assert lines(1) == [ignored, ignored, ["t4", "starts"]]  # reading began in its midst


def test_a_node_that_drains_is_told_apart() -> None:
    node = NodeAnnounced(node="e1", role=Role.EDGE, incarnation="i")
    draining = node.model_copy(update={"draining": True})
    told = [next(iter(lines_of(message)))[1:3] for message in (node, draining)]
    told += [next(iter(lines_of(decision(NodeJoined(node=one)))))[1:3] for one in (node, draining)]
    assert told == [("e1", "announced"), ("e1", "will drain"), ("e1", "joined"), ("e1", "drains")]


def test_piped_a_record_stays_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    message = decision(placed("t1"), start("t1"))
    json_line(record(7, message))
    line = json.loads(capsys.readouterr().out)
    assert (line["topic"], line["partition"], line["offset"], line["key"]) == (topics.DECISIONS, 0, 7, "0")
    assert line["value"] == json.loads(messages.encode(message))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (CircuitChanged(node="e1", failures=1), "e1 failed 1 attempt in a row failed there"),
        (
            CircuitChanged(node="e1", failures=3, until_s=61.0),
            "e1 avoided for 60 s: 3 attempts in a row failed there",
        ),
        (CircuitChanged(node="e1", failures=0), "e1 works an attempt succeeded there again"),
    ],
)
def test_a_node_at_which_attempts_fail_has_a_line(change: CircuitChanged, line: str) -> None:
    decision = Decision(
        region=0, epoch=1, nonce="n", seq=1, now_s=1.0, inputs={}, changes=(change,), ledger_hash="0" * 32
    )
    assert [" ".join(found[1:]) for found in lines_of(decision)] == [line]


def test_what_was_learned_has_a_line_for_a_task_and_one_for_each_link() -> None:
    learned = Learned(
        task_id="t1",
        nodes=(
            LearnedNode(
                node="e1", model="lenet", samples=10, profile_s=1.0, busy_s=3.2, factor=3.0, overhead_s=0.02, kept=2
            ),
        ),
        paths=(
            LearnedPath(
                device="d1",
                edge="e1",
                kind=Kind.DEVICE_EDGE,
                samples=10,
                delay_s=0.5,
                gap_s=0.1,
                error=0.25,
                task_s=0.1,
                sample_s=0.0,
                deviation=0.1,
                kept=1,
            ),
        ),
        links=(
            LearnedLink(link=1, device="d1", edge="e1", latency_s=0.02),
            LearnedLink(link=2, edge="e1", latency_s=0.04, bps=5_000_000),
        ),
    )
    decision = Decision(
        region=0, epoch=1, nonce="n", seq=1, now_s=1.0, inputs={}, changes=(learned,), ledger_hash="0" * 32
    )
    assert [" ".join(found[1:]) for found in lines_of(decision)] == [
        (
            "t1 learned took 25 % more time than predicted, lenet on e1 3 x profile + 20 ms a sample, "
            "d1 - e1 100 ms a task, off by 10 %"
        ),
        "d1 learned d1 - e1 20 ms one way",
        "e1 learned e1 - cloud 40 ms one way, carries 5 Mbps",
    ]


def test_a_rerouted_task_shows_where_it_goes_on_and_how_long() -> None:
    where = placed("t1", cuts=(1, 3)).placement
    change = Rerouted(
        task_id="t1", attempt=1, device="d1", placement=where, from_s=1.0, samples=5, delay_s=0.25, parts=Parts()
    )
    known = RegionTasks()
    list(lines_of(decision(placed("t1", kind=Kind.DEVICE, edge=None, cuts=(3, 3)), start("t1")), known))
    ((style, who, what, details),) = lines_of(decision(change), known)
    assert (style, who, what) == ("green", "t1", "rerouted")
    assert details.startswith("d1 -117 Mbps-> e1")
    assert details.endswith("250 ms more expected")
    ((*_, details),) = lines_of(decision(change), RegionTasks())  # a reader that has not seen the placement
    assert details == f"to {where.kind}, 250 ms more expected"
