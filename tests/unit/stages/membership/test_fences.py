"""What a stage drops: ended tasks, older attempts; and what it keeps: everything it has not heard of."""

from __future__ import annotations

import pytest

from bus.messages import Admitted, Decision, Ended, Placed, Rerouted, Retried, SeedInput, TaskState, TaskSubmitted
from bus.snapshots import STATE_VERSION
from bus.values import Execution, Kind, Objective, Parts, Placement
from stages.membership.fences import Fences, revision_of

TASK = TaskSubmitted(task_id="t", device="d", model="m", samples=2, input=SeedInput(seed=1))


def placed(attempt: int) -> Placed:
    return Placed(
        task_id="t",
        attempt=attempt,
        device="d",
        model="m",
        sha256="0" * 64,
        samples=2,
        policy="p",
        objective=Objective.PIPELINED,
        execution=Execution.STREAMING,
        placement=Placement(kind=Kind.DEVICE, cut1=1, cut2=1, cut1_name="a", cut2_name="a"),
        start_s=0.0,
        wait_s=0.0,
        delay_s=1.0,
        parts=Parts(),
    )


def decision(seq: int, *changes: object) -> Decision:
    return Decision(region=0, epoch=1, nonce="n", seq=seq, now_s=0.0, inputs={}, changes=changes, ledger_hash="h")


def test_an_older_attempt_is_fenced_and_a_newer_or_unknown_one_is_not() -> None:
    fences = Fences()
    assert fences.apply(decision(1, Admitted(task=TASK), placed(1))) == set()
    assert not fences.fenced("t", 1)
    assert fences.apply(decision(2, Retried(task_id="t", attempt=2, cause="node_lost"))) == {"t"}
    assert fences.fenced("t", 1)
    assert not fences.fenced("t", 2)
    assert not fences.fenced("stranger", 1)
    assert fences.placed("t") is None


def test_what_has_ended_is_fenced_whatever_its_attempt() -> None:
    fences = Fences()
    fences.apply(decision(1, Admitted(task=TASK), placed(1)))
    assert fences.apply(decision(2, Ended(task_id="t", attempt=1, state=TaskState.COMPLETED))) == {"t"}
    assert fences.fenced("t", 1)
    assert fences.fenced("t", 7)
    assert (fences.tasks, fences.placed("t"), fences.attempt("t")) == ({}, None, 0)


def test_a_snapshot_brings_live_tasks_and_those_that_are_over() -> None:
    fences = Fences()
    live = {"submitted": TASK.model_dump(mode="json"), "attempt": 3, "placed": placed(3).model_dump(mode="json")}
    fences.restore({"version": STATE_VERSION, "tasks": [live], "ended": [["old", "COMPLETED"]]})
    assert fences.fenced("t", 2)
    assert fences.placed("t") == placed(3)
    assert fences.fenced("old", 1)


def test_earlier_plans_of_a_rerouted_attempt_are_known_after_a_restart() -> None:
    """Frames that were under way when the task was rerouted arrive at a stage that reads a snapshot."""
    cuts = [Placement(kind=Kind.DEVICE, cut1=cut, cut2=cut, cut1_name="a", cut2_name="a") for cut in (1, 2, 3)]
    now = placed(1)
    for samples, placement in zip((9, 5), cuts[1:], strict=True):
        change = Rerouted(
            task_id="t", attempt=1, device="d", placement=placement, from_s=1.0, samples=samples, delay_s=1.0, parts=Parts()
        )  # fmt: skip
        now = change.applied_to(now, 0.0)
    fences = Fences()
    live = {"submitted": TASK.model_dump(mode="json"), "attempt": 1, "placed": now.model_dump(mode="json")}
    fences.restore({"version": STATE_VERSION, "tasks": [live], "ended": []})
    found = [fences.revised("t", 1, revision) for revision in range(4)]
    assert [one and one.placement for one in found] == [*cuts, None]
    assert [revision_of(one) for one in found if one is not None] == [0, 1, 2]
    assert fences.revised("t", 2, 0) is None


@pytest.mark.parametrize("state", [{}, {"version": STATE_VERSION + 1, "jobs": []}])
def test_a_state_of_another_version_is_not_taken_for_an_empty_one(state: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="version"):
        Fences().restore(state)
