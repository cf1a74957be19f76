"""The view of a region, from hand-made records."""

from __future__ import annotations

import re
from itertools import count

import pytest
from rich.console import Console

from bus import messages, topics
from bus.messages import (
    Admitted,
    Decision,
    Ended,
    EpochOpened,
    Learned,
    LearnedLink,
    LearnedNode,
    Message,
    Moved,
    NodeAnnounced,
    NodeHeartbeat,
    NodeJoined,
    NodeLost,
    Overran,
    Placed,
    PlacedOverhead,
    PlannerHeartbeat,
    PlannerLeft,
    Retried,
    SeedInput,
    Start,
    TaskFailed,
    TaskState,
    TaskSubmitted,
)
from bus.port import Record
from bus.values import STATIONS, Execution, Kind, Objective, Parts, Placement, Role
from deploy.monitor import region_view
from deploy.monitor.region_feed import SilenceWatch, in_order
from deploy.monitor.region_report import changed_tasks, report
from deploy.monitor.region_view import RegionView
from deploy.monitor.top import screen
from deploy.monitor.ui.page_message import page_message

DEVICE = NodeAnnounced(node="d1", role=Role.DEVICE, incarnation="i1")
EDGE = NodeAnnounced(
    node="e1", role=Role.EDGE, incarnation="i2", slots=1, link1_capacity_bps=10_000_000, link2_capacity_bps=4_000_000
)
PARTS = Parts(device_s=1.0, link1_s=2.0, edge_s=3.0, link2_s=4.0, cloud_s=5.0)
PLACE = Placement(
    kind=Kind.DEVICE_EDGE_CLOUD, edge="e1", cut1=1, cut2=2, cut1_name="conv", cut2_name="pool",
    link1_bps=6_000_000, link2_bps=3_000_000,
)  # fmt: skip


class Topics:
    """Writes records as the region would."""

    def __init__(self, keep_ended: int = region_view.KEEP_ENDED) -> None:
        self.view = RegionView(keep_ended=keep_ended)
        self.offsets = count()
        self.seq = 0
        self.clock_ms = 1_000_000
        self.send(topics.DECISIONS, EpochOpened(region=0, epoch=1, nonce="n", planner="p1", lease_s=5.0))

    def record(self, topic: str, message: Message | bytes) -> Record:
        value = message if isinstance(message, bytes) else messages.encode(message)
        return Record(topic, 0, next(self.offsets), self.clock_ms, None, value)

    def send(self, topic: str, message: Message | bytes) -> None:
        self.view.read(self.record(topic, message))

    def decide(self, now_s: float, *changes: object) -> None:
        self.seq += 1
        self.clock_ms = 1_000_000 + round(now_s * 1000)
        self.send(
            topics.DECISIONS,
            Decision(
                region=0, epoch=1, nonce="n", seq=self.seq, now_s=now_s, inputs={}, changes=changes, ledger_hash="h"
            ),
        )  # fmt: skip


def admitted(name: str, device: str = "d1") -> Admitted:
    return Admitted(task=TaskSubmitted(task_id=name, device=device, model="toy", samples=5, input=SeedInput(seed=1)))


def placed(name: str, start_s: float, now_s: float, placement: Placement = PLACE, attempt: int = 1) -> Placed:
    return Placed(
        task_id=name, attempt=attempt, device="d1", model="toy", sha256="0" * 64, samples=5, policy="deepar",
        objective=Objective.PIPELINED, execution=Execution.STREAMING, placement=placement, start_s=start_s,
        wait_s=start_s - now_s, delay_s=15.0, parts=PARTS,
    )  # fmt: skip


def start(name: str, at_s: float, attempt: int = 1) -> Start:
    return Start(task_id=name, attempt=attempt, device="d1", at_s=at_s)


def completed(name: str) -> Ended:
    return Ended(task_id=name, attempt=1, state=TaskState.COMPLETED, measured=PARTS, delay_s=14.5)


@pytest.fixture
def region() -> Topics:
    return with_nodes(Topics())


def with_nodes(made: Topics) -> Topics:
    made.decide(0.0, NodeJoined(node=DEVICE), NodeJoined(node=EDGE))
    return made


def test_links_and_slots_fill_with_what_runs_and_empty_at_its_end(region: Topics) -> None:
    view = region.view
    region.decide(1.0, admitted("t1"), placed("t1", 1.0, 1.0))
    assert view.link("e1", 1).granted_bps == 0, "scheduled holds nothing yet"
    region.decide(1.0, start("t1", 1.0))
    assert view.link("e1", 1).granted == {"t1": 6_000_000}
    assert view.link("e1", 2).share == pytest.approx(0.75)
    assert view.slot_holders("e1") == ["t1"]
    assert view.flow() == dict.fromkeys(STATIONS, 1)
    region.decide(15.5, completed("t1"))
    assert (view.link("e1", 1).granted, view.slot_holders("e1")) == ({}, [])
    assert view.ended[TaskState.COMPLETED] == 1
    assert view.tasks["t1"].delay_s == 14.5
    assert report(view)["delay_s"]["mean"] == pytest.approx(14.5)


def test_a_relayed_task_takes_no_slot(region: Topics) -> None:
    relayed = PLACE.model_copy(update={"kind": Kind.DEVICE_CLOUD, "cut2": 1})
    region.decide(1.0, admitted("t1"), placed("t1", 1.0, 1.0, relayed), start("t1", 1.0))
    assert region.view.slot_holders("e1") == []
    assert region.view.link("e1", 2).granted_bps == 3_000_000


def test_a_waiting_task_names_what_it_lacks(region: Topics) -> None:
    region.decide(1.0, admitted("t1"), placed("t1", 1.0, 1.0), start("t1", 1.0))
    region.decide(2.0, admitted("t2"), placed("t2", 16.0, 2.0))
    region.decide(2.0, admitted("t3", "d9"))
    view = region.view
    assert view.waits_for(view.tasks["t2"]) == (
        "d1 to finish t1 and a slot of e1 (held by t1) and "
        "6 Mbps of link 1 of e1 (4 Mbps free) and 3 Mbps of link 2 of e1 (1 Mbps free)"
    )
    assert view.waits_for(view.tasks["t3"]) == "d9 to join"
    assert view.waits_for(view.tasks["t1"]) == ""
    region.decide(3.0, completed("t1"))
    assert view.waits_for(view.tasks["t2"]) == "its turn on e1, after tasks placed before it"


def test_a_device_computes_one_task_at_a_time(region: Topics) -> None:
    alone = Placement(kind=Kind.DEVICE, cut1=3, cut2=3, cut1_name="out", cut2_name="out")
    region.decide(1.0, admitted("t1"), placed("t1", 1.0, 1.0, alone), start("t1", 1.0))
    region.decide(2.0, admitted("t2"), placed("t2", 16.0, 2.0, alone))
    assert region.view.waits_for(region.view.tasks["t2"]) == "d1 to finish t1"


def test_a_lost_node_and_another_attempt(region: Topics) -> None:
    region.decide(1.0, admitted("t1"), placed("t1", 1.0, 1.0), start("t1", 1.0))
    region.decide(
        5.0,
        NodeLost(node="e1", incarnation="i2", cause="lease_expired"),
        Retried(task_id="t1", attempt=2, cause="node_lost"),
    )
    task = region.view.tasks["t1"]
    assert region.view.nodes["e1"].standing == "lost"
    assert (task.state, task.attempt, task.placement) == (TaskState.WAITING, 2, None)
    assert region.view.link("e1", 1).granted_bps == 0


def test_records_that_do_not_count_change_nothing(region: Topics) -> None:
    before = region.view.version
    stale = Decision(
        region=0, epoch=1, nonce="other", seq=2, now_s=9.0, inputs={}, changes=(admitted("t9"),), ledger_hash="h"
    )
    region.send(topics.DECISIONS, stale)
    region.send(topics.EVENTS, b"{ no json")
    region.send(topics.NODES, b"\xff\xff")
    assert region.view.version == before
    assert "t9" not in region.view.tasks
    assert (region.view.log.dropped, region.view.unreadable) == (1, 2)


def test_time_goes_on_with_the_planners_heartbeats(region: Topics) -> None:
    region.decide(7.0, admitted("t1"))
    region.clock_ms += 2500
    region.send(topics.DECISIONS, PlannerHeartbeat(region=0, epoch=1, nonce="n"))
    assert region.view.now_s == pytest.approx(9.5)


def test_an_announced_node_is_not_yet_joined_and_heartbeats_do_not_grow_the_version(region: Topics) -> None:
    region.send(topics.NODES, NodeAnnounced(node="e2", role=Role.EDGE, incarnation="i3", slots=1))
    assert region.view.nodes["e2"].standing == "announced"
    region.send(topics.NODES, EDGE)
    assert region.view.nodes["e1"].standing == "joined"
    before = region.view.version
    region.send(topics.EVENTS, NodeHeartbeat(node="e1", incarnation="i2"))
    assert region.view.version == before
    assert region.view.nodes["e1"].heard_ms == region.clock_ms


def test_a_failure_that_a_stage_reports_becomes_a_line(region: Topics) -> None:
    region.send(topics.EVENTS, TaskFailed(task_id="t1", attempt=1, node="e1", cause="bad_frame"))
    assert (region.view.lines[-1].who, region.view.lines[-1].what) == ("t1", "failed")


def test_lines_of_a_start_and_a_move_tell_where_and_after_whom(region: Topics) -> None:
    region.decide(1.0, admitted("t1"), placed("t1", 1.0, 1.0), start("t1", 1.0))
    region.decide(2.0, admitted("t2"), placed("t2", 16.0, 2.0))
    region.decide(3.0, Overran(task_id="t1", attempt=1, from_s=16.0, to_s=18.0))
    region.decide(3.0, Moved(task_ids=("t2",), starts_s=(18.0,)))
    assert region.view.lines[-1].details == "later by 2 s, after t1 (d1)"
    region.decide(17.0, completed("t1"), start("t2", 17.0))
    assert region.view.lines[-1].details == "d1 -6 Mbps-> e1 -3 Mbps-> cloud"


def test_memory_is_bounded() -> None:
    region = with_nodes(Topics(keep_ended=3))
    for number in range(10):
        region.decide(
            float(number), admitted(f"t{number}"), placed(f"t{number}", number, number), start(f"t{number}", number)
        )
        region.decide(number + 0.5, completed(f"t{number}"))
    assert list(region.view.tasks) == ["t7", "t8", "t9"]
    assert report(region.view)["counts"]["COMPLETED"] == 10
    # an id that is used again while its first task is still shown
    region.decide(20.0, admitted("t8"))
    region.decide(21.0, admitted("t10"), completed("t10"))
    region.decide(22.0, admitted("t11"), completed("t11"))
    assert region.view.tasks["t8"].state is TaskState.WAITING


def test_a_report_since_a_version_holds_only_what_changed(region: Topics) -> None:
    region.decide(1.0, admitted("t1"), admitted("t2"))
    first = report(region.view)
    region.decide(2.0, placed("t1", 2.0, 2.0))
    later = report(region.view, since=first["version"], lines_since=first["last_line"])
    assert [task["task_id"] for task in later["tasks"]] == ["t1"]
    assert [line["what"] for line in later["lines"]] == ["placed #1"]
    assert changed_tasks(region.view, region.view.version) == []


def test_a_run_played_again_keeps_each_topics_order() -> None:
    def record(topic: str, offset: int, at_ms: int) -> Record:
        return Record(topic, 0, offset, at_ms, None, b"")

    mixed = [record("a", 0, 100), record("a", 1, 50), record("a", 2, 120), record("b", 0, 110), record("b", 1, 115)]
    assert [(r.topic, r.offset) for r, _ in in_order(mixed)] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2)]


def shown(view: RegionView, rows: int, columns: int = 160) -> str:
    console = Console(width=columns)
    with console.capture() as capture:
        console.print(screen(view, rows=rows, columns=columns))
    return capture.get()


def test_names_on_the_screen_are_text_and_not_markup(region: Topics) -> None:
    detail = "[red]boo[/] [link=http://x]"
    region.send(topics.EVENTS, TaskFailed(task_id="t1", attempt=1, node="e1", cause="x", detail=detail))
    assert detail in shown(region.view, 30)


@pytest.mark.parametrize("rows", [26, 40, 60])
def test_the_screen_fits_its_rows(region: Topics, rows: int) -> None:
    for number in range(60):
        region.decide(1.0, admitted(f"t{number}"), placed(f"t{number}", 5.0, 1.0))
    for number in range(30):
        region.decide(2.0, start(f"t{number}", 2.0))
    lines = shown(region.view, rows).splitlines()
    assert rows * 0.8 <= len(lines) <= rows, "\n".join(lines)


@pytest.mark.parametrize("columns", [60, 80, 100, 149, 160])
def test_no_number_is_cut_off_where_the_terminal_is_narrow(region: Topics, columns: int) -> None:
    name = "replay-20261125T211743-0-17"
    region.decide(1.0, admitted(name), placed(name, 1.0, 1.0), start(name, 1.0))
    lines = shown(region.view, 30, columns).splitlines()
    assert max(map(len, lines)) <= columns
    tasks = lines[next(number for number, line in enumerate(lines) if "tasks: " in line) + 1 :]
    (row,) = [line for line in tasks if "-0-17 " in line and "starts" not in line]
    assert "…" not in row.replace("…125T211743-0-17", "")
    assert ("15 s" in row) is (columns >= 80)  # what was predicted
    (edge,) = [line for line in lines if line.startswith(("│ e1 ", "│  e1 "))]
    assert "…" not in edge


class Clocks:
    """This machine's two clocks, set by hand."""

    def __init__(self, today_s: float) -> None:
        self.monotonic_s, self.today_s = 50.0, today_s

    def pass_time(self, seconds: float) -> None:
        self.monotonic_s += seconds
        self.today_s += seconds

    def watch(self, view: RegionView) -> SilenceWatch:
        return SilenceWatch(view, lambda: self.monotonic_s, lambda: self.today_s)


def heartbeat(region: Topics) -> None:
    region.send(topics.DECISIONS, PlannerHeartbeat(region=0, epoch=1, nonce="n"))


def test_a_planner_that_died_silently_is_shown_as_silent_and_since_when(region: Topics) -> None:
    region.decide(7.0, admitted("t1"))
    clocks = Clocks(today_s=region.clock_ms / 1000)
    watch = clocks.watch(region.view)
    watch.look()
    assert region.view.silent_s is None, "the history was not read to its end"
    watch.go_live()
    for _ in range(5):
        clocks.pass_time(1.0)
        watch.look()
    assert region.view.planner_text() == "region 0, led by p1, epoch 1", "within its lease"
    before = region.view.version
    clocks.pass_time(9.5)
    watch.look()
    assert region.view.planner_text() == "region 0, led by p1, epoch 1; silent since 7.0 s, for 14 s"
    assert report(region.view)["planner"]["silent_s"] == 14
    assert region.view.version > before, "the page is told although no record came"
    watch.look()
    clocks.pass_time(0.1)
    watch.look()
    assert region.view.version == before + 1, "and only when the text changes"
    heartbeat(region)
    watch.look()
    assert region.view.planner_text() == "region 0, led by p1, epoch 1"


def test_a_screen_that_starts_after_the_death_shows_the_silence_at_once(region: Topics) -> None:
    clocks = Clocks(today_s=region.clock_ms / 1000 + 3600)
    watch = clocks.watch(region.view)
    watch.go_live()
    watch.look()
    assert region.view.planner_text().endswith("silent since 0.0 s, for 60 min")
    assert "for 60 min" in shown(region.view, 30)


@pytest.mark.parametrize("off_s", [-300.0, 300.0])
def test_a_planner_with_a_wrong_clock_looks_silent_for_one_heartbeat_at_most(region: Topics, off_s: float) -> None:
    clocks = Clocks(today_s=region.clock_ms / 1000 + off_s)
    watch = clocks.watch(region.view)
    watch.go_live()
    for _ in range(20):
        clocks.pass_time(1.0)
        heartbeat(region)
        watch.look()
        assert region.view.silent_s is None


def test_a_planner_that_left_is_not_silent(region: Topics) -> None:
    region.send(topics.DECISIONS, PlannerLeft(region=0, epoch=1, nonce="n"))
    region.view.note_silence(100.0)
    assert region.view.planner_text() == "region 0, the planner has left"


def learned(task_id: str = "t1") -> Learned:
    return Learned(
        task_id=task_id,
        nodes=(LearnedNode(
            node="e1", model="toy", samples=5, profile_s=1.0, busy_s=3.0, factor=3.0, overhead_s=0.02, kept=1
        ),),
        links=(LearnedLink(link=2, edge="e1", latency_s=0.04, bps=2_000_000),),
    )  # fmt: skip


def test_predictions_stand_beside_what_was_measured(region: Topics) -> None:
    overhead = PlacedOverhead(latency_s=0.3, task_s=0.2)
    plan = placed("t1", 1.0, 1.0).model_copy(
        update={"objective": Objective.SEQUENTIAL, "delay_s": 15.5, "overhead": overhead}
    )
    region.decide(1.0, admitted("t1"), plan, start("t1", 1.0))
    end = completed("t1").model_copy(update={"delay_s": 18.6})
    region.decide(19.6, end, learned())
    view = region.view
    entry = next(task for task in report(view)["tasks"] if task["task_id"] == "t1")
    assert (entry["predicted_delay_s"], entry["delay_s"]) == (15.5, 18.6)
    assert entry["error"] == pytest.approx(0.2)
    assert entry["predicted_rest_s"] == pytest.approx(0.5), "latency and overheads"
    assert entry["measured_rest_s"] == pytest.approx(3.6), "what 15 s of busy times leave of 18.6 s"
    assert report(view)["prediction_error"] == {"median": pytest.approx(0.2), "tasks": 1}
    text = shown(view, 40)
    assert "error   median 20 % of the prediction, last 1 task\n" in re.sub(" +\n", "\n", text)
    assert re.search(r"t1 .* 15.5 s .* 18.6 s +\+20 %", text)
    assert re.search(r"toy on e1 +3 x profile \+ 20 ms a sample", text)
    assert re.search(r"e1 - cloud +40 ms one way, carries 2 Mbps", text)


def test_the_page_gets_what_was_learned_once_with_the_names_of_tasks(region: Topics) -> None:
    region.decide(1.0, admitted("t1"), learned("t0"))
    first = page_message(region.view)
    assert {"what": "toy on e1", "text": "3 x profile + 20 ms a sample", "source": "from 1 task, the last t0"} in first[
        "learned"
    ]
    region.decide(2.0, admitted("t2"))
    assert page_message(region.view, since=first["version"])["learned"] is None
    assert len(page_message(region.view)["learned"]) == len(first["learned"]) == 2
    assert report(region.view)["learned"][-1]["tasks"] == ["t0"]


def test_a_task_that_failed_has_no_error(region: Topics) -> None:
    region.decide(1.0, admitted("t1"), placed("t1", 1.0, 1.0), start("t1", 1.0))
    region.decide(2.0, Ended(task_id="t1", attempt=1, state=TaskState.FAILED, cause="other"))
    assert (region.view.tasks["t1"].error, region.view.errors.median) == (None, None)
    assert "no prediction has been compared yet" in shown(region.view, 40)


@pytest.mark.parametrize("rows", [26, 40, 60])
def test_the_screen_fits_its_rows_with_what_was_learned(region: Topics, rows: int) -> None:
    for number in range(60):
        region.decide(1.0, admitted(f"t{number}"), placed(f"t{number}", 5.0, 1.0))
        region.decide(1.0, Learned(links=(LearnedLink(link=1, device=f"d{number}", edge="e1", latency_s=0.1),)))
    lines = shown(region.view, rows).splitlines()
    assert len(lines) <= rows, "\n".join(lines)
