"""The table of transitions."""

import pytest

from bus.errors import InvariantError
from bus.messages import TaskState
from planner.core.region.transitions import TRANSITIONS, Step, next_state


def test_a_missing_transition_names_the_task_the_states_and_the_history() -> None:
    with pytest.raises(InvariantError) as caught:
        next_state(
            "t7",
            TaskState.COMPLETED,
            Step.START,
            [(None, Step.ADMITTED, 1.0), (TaskState.RUNNING, Step.COMPLETED, 2.5)],
        )
    for word in ("t7", "COMPLETED", "start", "unknown -> WAITING", "RUNNING -> COMPLETED by COMPLETED at 2.5"):
        assert word in str(caught.value)


def test_nothing_follows_an_end_and_every_live_state_has_ends() -> None:
    assert not [key for key in TRANSITIONS if key[0] is not None and key[0].ended]
    for state in (TaskState.WAITING, TaskState.SCHEDULED, TaskState.RUNNING):
        ends = {to for (of, _), to in TRANSITIONS.items() if of is state and to.ended}
        assert {TaskState.COMPLETED, TaskState.FAILED, TaskState.EXPIRED} <= ends
