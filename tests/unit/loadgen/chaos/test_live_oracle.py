"""The oracle of `deepar loadgen chaos`: it obeys the reading rule, and each planted mistake is a violation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgpack
import numpy as np
import pytest

from bus.frames import Frame, encode_frame
from bus.messages import Change, DatasetInput, TaskSubmitted
from bus.tensors import to_pieces
from loadgen.chaos.live.expected_results import Answers
from loadgen.chaos.live.monitor import Tally
from loadgen.chaos.live.oracle import DecisionFold, frame_head, judge, results_of
from tests.known import known

Json = dict[str, Any]
Mistake = Callable[[list[Any]], list[Any]]
"""Makes a wrong log of an honest one."""
LINK1, LINK2 = 1000, 300


def opened(epoch: int, nonce: str) -> Json:
    return {"type": "epoch_opened", "v": 1, "region": 0, "epoch": epoch, "nonce": nonce, "planner": "p", "lease_s": 5.0}


def decision(seq: int, changes: list[Json], *, epoch: int = 1, nonce: str = "a", events: int | None = None) -> Json:
    inputs = {"deepar.events": seq if events is None else events}
    head = {"type": "decision", "v": 1, "region": 0, "epoch": epoch, "nonce": nonce, "seq": seq, "now_s": float(seq)}
    return head | {"inputs": inputs, "changes": changes, "ledger_hash": "h"}


def joined(node: str, incarnation: str = "i1", **capacities: int) -> Json:
    room = {"slots": 0, "link1_capacity_bps": 0, "link2_capacity_bps": 0} | capacities
    return {"type": "node_joined", "node": {"node": node, "incarnation": incarnation} | room}


def lost(node: str, incarnation: str = "i1") -> Json:
    return {"type": "node_lost", "node": node, "incarnation": incarnation, "cause": "lease_expired"}


EDGE = joined("e1", slots=2, link1_capacity_bps=LINK1, link2_capacity_bps=LINK2)


def admitted(task: str) -> Json:
    return {"type": "admitted", "task": {"task_id": task, "device": "d1", "samples": 2}}


def placed(task: str, attempt: int = 1, link1: int = 400, link2: int = 100) -> list[Json]:
    placement = {
        "kind": "device+edge+cloud",
        "edge": "e1",
        "cut1": 2,
        "cut2": 4,
        "link1_bps": link1,
        "link2_bps": link2,
    }
    grants = [
        {"type": "bandwidth_grant", "task_id": task, "attempt": attempt, "edge": "e1", "link": link, "bps": bps}
        for link, bps in ((1, link1), (2, link2))
    ]
    return [{"type": "placement", "task_id": task, "attempt": attempt, "placement": placement}, *grants]


def start(task: str, attempt: int = 1) -> Json:
    return {"type": "start", "task_id": task, "attempt": attempt, "device": "d1", "at_s": 0.0}


def ended(task: str, attempt: int = 1, link1: int = 400, link2: int = 100, slots: int = 1) -> Json:
    released = {"released_slots": slots, "released_link1_bps": link1, "released_link2_bps": link2}
    return {"type": "ended", "task_id": task, "attempt": attempt, "state": "COMPLETED", "cause": ""} | released


def retried(task: str, attempt: int) -> Json:
    return {"type": "retried", "task_id": task, "attempt": attempt, "cause": "node_lost"}


def moved(*tasks: str) -> Json:
    return {"type": "moved", "task_ids": list(tasks), "starts_s": [9.0 for _ in tasks]}


def overran(task: str) -> Json:
    return {"type": "overran", "task_id": task, "attempt": 1, "from_s": 1.0, "to_s": 2.0}


def rerouted(task: str, attempt: int = 1, link1: int = 400, link2: int = 100) -> Json:
    placement = placed(task, attempt, link1, link2)[0]["placement"]
    return {"type": "rerouted", "task_id": task, "attempt": attempt, "device": "d1", "placement": placement}


def circuit(node: str) -> Json:
    return {"type": "circuit_changed", "node": node, "failures": 1, "until_s": None}


def learned(task: str | None = None, attempt: int | None = None) -> Json:
    return {"type": "learned", "nodes": [], "paths": [], "links": [], "stale": []} | (
        {} if task is None else {"task_id": task, "attempt": attempt}
    )


def honest() -> list[Json]:
    """Two tasks at once, one of them through a loss of its edge. It has a change of every type."""
    returned = EDGE | {"node": EDGE["node"] | {"incarnation": "i2"}}
    return [
        opened(1, "a"),
        decision(1, [joined("d1"), EDGE]),
        decision(2, [admitted("t1"), *placed("t1"), start("t1")]),
        decision(3, [admitted("t2"), *placed("t2"), start("t2"), overran("t1")]),
        decision(4, [rerouted("t1", link1=500), learned("t1", 1), ended("t1", link1=500), learned()]),
        decision(5, [retried("t2", 2), lost("e1"), circuit("e1")]),
        decision(6, [returned, *placed("t2", 2), moved("t2"), start("t2", 2)]),
        decision(7, [ended("t2", 2)]),
    ]


def folded(messages: list[Json]) -> DecisionFold:
    fold = DecisionFold()
    for message in messages:
        fold.read(json.dumps(message).encode())
    return fold


@pytest.mark.parametrize(("released", "honest_end"), [(1, True), (0, False)])
def test_a_slot_is_held_if_any_of_several_routes_computes_on_the_edge(released: int, honest_end: bool) -> None:
    change, *grants = placed("t1")
    routes = [{"cut1": 2, "cut2": 2, "share": 0.7}, {"cut1": 2, "cut2": 4, "share": 0.3}]
    change["placement"] |= {"cut2": 2, "routes": routes}
    log = [
        opened(1, "a"),
        decision(1, [joined("d1"), EDGE]),
        decision(2, [admitted("t1"), change, *grants, start("t1")]),
    ]
    fold = folded([*log, decision(3, [ended("t1", slots=released)])])
    assert (fold.violations == []) == honest_end


def test_an_honest_log_has_no_violation_and_everything_is_known() -> None:
    fold = folded(honest())
    fold.finish(["t1", "t2"])
    assert fold.violations == []
    assert fold.decisions == 7
    assert fold.ends.keys() == {"t1", "t2"}
    assert fold.attempts == {"t1": 1, "t2": 2}
    assert fold.retries == {"node_lost": 1}
    assert fold.running == {}


def test_the_honest_log_has_a_change_of_every_type() -> None:
    """A new type of change must be judged here, too, or be known to hold and free nothing."""
    types = {get_args(kind.model_fields["type"].annotation)[0] for kind in get_args(get_args(Change)[0])}
    assert {change["type"] for message in honest()[1:] for change in message["changes"]} == types


def in_parts(whole: Json, *, lacks: int | None = None) -> list[Json]:
    """A decision whose every change but the last is a part of its own; one of them is not there."""
    *before, last = whole["changes"]
    head = {key: whole[key] for key in ("v", "region", "epoch", "nonce", "seq")}
    parts = [
        head | {"type": "decision_part", "part": number, "changes": [change]}
        for number, change in enumerate(before, 1)
        if number != lacks
    ]
    return [*parts, whole | {"changes": [last]} | ({"parts": len(before)} if before else {})]


def test_a_decision_of_several_records_counts_when_it_is_whole() -> None:
    first, *rest = honest()
    fold = folded([first, *(record for whole in rest for record in in_parts(whole))])
    fold.finish(["t1", "t2"])
    assert fold.violations == []
    assert (fold.decisions, fold.ignored) == (7, 0)
    fold = folded([first, rest[0], *in_parts(rest[1], lacks=2)])
    assert fold.decisions == 1
    assert fold.ignored == 3  # what stands behind the part that is not there, and the decision


def test_the_reading_rule() -> None:
    fold = folded(
        [
            opened(1, "a"),
            decision(1, []),
            opened(2, "b"),
            opened(2, "c"),  # lost the race
            decision(2, [], epoch=2, nonce="c"),  # of a planner that does not lead
            decision(2, [], epoch=1, nonce="a"),  # of one that was deposed
            decision(3, [], epoch=2, nonce="b"),  # after one that never came
            decision(2, [], epoch=2, nonce="b"),
        ]
    )
    assert (fold.epoch, fold.nonce, fold.seq, fold.decisions, fold.ignored) == (2, "b", 2, 2, 4)
    assert fold.violations == []


def insert(at: int, *messages: Json) -> Mistake:
    """The honest log with a decision put in; what follows is numbered on."""

    def change(log: list[Json]) -> list[Json]:
        after = [message | {"seq": message["seq"] + len(messages)} for message in log[at:]]
        return log[:at] + list(messages) + after

    return change


def replaced(at: int, message: Json) -> Mistake:
    return lambda log: [*log[:at], message, *log[at + 1 :]]


WRONG: dict[str, Mistake] = {
    "goes back on deepar.events": replaced(4, decision(4, [ended("t1")], events=1)),
    "admits t1 again": insert(5, decision(5, [admitted("t1")])),
    "which is over": insert(5, decision(5, [ended("t1")])),
    "which is unknown": insert(5, decision(5, [start("t9")])),
    "starts t2, which runs": insert(4, decision(4, [start("t2")])),
    "reroutes t2, which does not run": insert(6, decision(6, [rerouted("t2", 2)])),
    "edge e1 gives [2, 1101, 200]": insert(4, decision(4, [rerouted("t2", link1=701)])),
    "moves t2, which runs": insert(4, decision(4, [moved("t2")])),
    "moves t1, which has no place": insert(5, decision(5, [moved("t1")])),
    "moves 1 tasks to 0 starts": replaced(
        6, decision(6, [EDGE, *placed("t2", 2), moved("t2") | {"starts_s": []}, start("t2", 2)])
    ),
    "which has no place": replaced(2, decision(2, [admitted("t1"), start("t1")])),
    "on d1, which is not there": replaced(1, decision(1, [EDGE])),
    "not the present one": replaced(6, decision(6, [EDGE, *placed("t2", 1), start("t2", 1)])),
    "goes from attempt 1 to 3": replaced(5, decision(5, [retried("t2", 3), lost("e1")])),
    "and gives back (1, 400, 99)": replaced(4, decision(4, [ended("t1", link2=99)])),
    "edge e1 gives [2, 1100, 200]": replaced(3, decision(3, [admitted("t2"), *placed("t2", link1=700), start("t2")])),
    "edge e1 gives [2, 800, 400]": replaced(3, decision(3, [admitted("t2"), *placed("t2", link2=300), start("t2")])),
    "edge e1 gives [3,": insert(
        4,
        decision(4, [admitted("t3"), *placed("t3", link1=1, link2=1), start("t3")]),
    ),
    "is placed with": replaced(2, decision(2, [admitted("t1"), *placed("t1")[:2], start("t1")])),
    "tasks run on e1, which is not there": replaced(5, decision(5, [lost("e1")])),
    "loses e1 i9, which was not there": replaced(5, decision(5, [retried("t2", 2), lost("e1", "i9")])),
    "t2 has no end": lambda log: log[:-1],
    "t2 was acknowledged and never admitted": replaced(3, decision(3, [])),
    "still holds": lambda log: log[:-1],
    "is not JSON": lambda log: [*log, "poison"],
    "learns from attempt 1 of t2": insert(6, decision(6, [learned("t2", 1)])),
    "learns from attempt 1 of t9": insert(5, decision(5, [learned("t9", 1)])),
    "was used twice": lambda log: [*log, opened(2, "a")],
}


@pytest.mark.parametrize("what", WRONG)
def test_each_mistake_is_a_violation(what: str) -> None:
    log = WRONG[what](honest())
    fold = DecisionFold()
    for message in log:
        fold.read(b"{poison" if isinstance(message, str) else json.dumps(message).encode())
    fold.finish(["t1", "t2"])
    assert any(what in violation for violation in fold.violations), fold.violations


def test_a_frame_is_read_without_our_code() -> None:
    three, four = np.arange(4, dtype=np.float32), np.arange(4, 8, dtype=np.float32)
    frame = encode_frame(Frame("result", "t1", 2, "c1", (*to_pieces(3, [three], 100), *to_pieces(4, [four], 100))))
    head = frame_head(frame)
    assert (head["task"], head["attempt"], head["from"]) == ("t1", 2, "c1")
    assert results_of(frame) == [("t1", 3, three.tobytes()), ("t1", 4, four.tobytes())]
    first, second = to_pieces(5, [np.zeros(40, np.float32)], 100)
    assert results_of(encode_frame(Frame("result", "t1", 2, "c1", (first,)))) == [("t1", 5, None)]
    assert results_of(encode_frame(Frame("result", "t1", 2, "c1", (second,)))) == []  # counted once
    assert results_of(encode_frame(Frame("report", "t1", 2, "c1", report={"edge_s": 1.0}))) == []
    for poison in (None, b"", b"\x93abc", msgpack.packb(7)):
        with pytest.raises(ValueError, match="not a frame"):
            frame_head(poison)


def test_a_result_that_is_not_the_uncut_models_is_wrong(tmp_path: Path) -> None:
    answers = Answers()
    task = TaskSubmitted(
        task_id="t1", device="d1", model="lenet", samples=2, input=DatasetInput(name="digits", start=7)
    )
    answers.expect(task)
    right = [known(answers.of("t1", sample)) for sample in range(2)]
    assert right[0].payload != right[1].payload
    assert answers.of("t9", 0) is None

    def record(*payloads: bytes) -> SimpleNamespace:
        outputs = [np.frombuffer(payload, np.float32).reshape(1, -1) for payload in payloads]
        pieces = [piece for sample, output in enumerate(outputs) for piece in to_pieces(sample, [output], 4096)]
        value = encode_frame(Frame("result", "t1", 1, "c1", tuple(pieces)))
        return SimpleNamespace(topic="deepar.results", partition=0, value=value)

    tally = Tally(answers)
    tally.take(record(right[0].payload, right[1].payload))
    assert (tally.wrong, tally.results) == (0, {("t1", 0): 1, ("t1", 1): 1})
    tally.take(record(right[1].payload))
    assert tally.wrong == 1
    tally.take(SimpleNamespace(topic="deepar.results", partition=0, value=b"poison"))
    assert tally.unreadable == 1

    shown = tmp_path / "d1.jsonl"
    lines: list[Json] = [{"task_id": "t1", "sample": n, "top": answer.top} for n, answer in enumerate(right)]
    shown.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"task_id": "t1", "sam')
    tally.look_at({"d1": shown, "d2": tmp_path / "d2.jsonl"})
    assert (tally.wrong, tally.shown) == (1, {("t1", 0): 1, ("t1", 1): 1})
    shown.write_text(json.dumps(lines[0] | {"top": lines[0]["top"] + 1}))
    tally.look_at({"d1": shown})
    assert tally.wrong == 2


def test_the_verdict_counts_what_is_lost_shown_twice_and_suppressed() -> None:
    shown = Counter({("t1", 0): 1, ("t1", 1): 2, ("t2", 0): 1, ("ghost", 0): 1})
    results = Counter({("t1", 0): 3, ("t1", 1): 1, ("of another run", 0): 5})
    verdict = judge(folded(honest()), {"t1": 2, "t2": 2}, shown, results)
    assert (verdict.tasks, verdict.samples) == (2, 4)
    assert verdict.lost == 1
    assert verdict.visible_duplicates == 2
    assert verdict.suppressed_duplicates == 2
    assert verdict.ledger_violations == ()
