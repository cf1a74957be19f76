"""Messages that are built unchecked differ in nothing from those that are validated."""

import copy
import pickle

import pytest
from pydantic import Field, ValidationError

from bus.messages import Ended, Placed, SeedInput, TaskState, TaskSubmitted
from bus.unchecked_constructors import maker
from bus.values import Execution, Frozen, Kind, Objective, Parts, Placement

PLACE = {
    "kind": Kind.DEVICE_EDGE,
    "edge": "e1",
    "cut1": 1,
    "cut2": 3,
    "cut1_name": "a",
    "cut2_name": "c",
    "link1_bps": 5,
}
VALUES = [
    (Parts, {}),
    (Parts, {"device_s": 1.5, "result_s": 0.25}),
    (Placement, PLACE),
    (TaskSubmitted, {"task_id": "t1", "device": "d1", "model": "m", "samples": 3, "input": SeedInput(seed=1)}),
    (Ended, {"task_id": "t1", "attempt": 2, "state": TaskState.COMPLETED, "measured": Parts(edge_s=1.0)}),
    (
        Placed,
        {
            "task_id": "t1",
            "attempt": 1,
            "device": "d1",
            "model": "m",
            "sha256": "0" * 64,
            "samples": 3,
            "policy": "deepar",
            "objective": Objective.PIPELINED,
            "execution": Execution.STREAMING,
            "placement": Placement(**PLACE),
            "start_s": 1.0,
            "wait_s": 0.0,
            "delay_s": 2.0,
            "parts": Parts(),
        },
    ),
]


@pytest.mark.parametrize(("message", "fields"), VALUES)
def test_it_is_the_validated_one(message: type[Frozen], fields: dict[str, object]) -> None:
    made, built = maker(message)(**fields), message(**fields)
    assert made == built
    assert type(made) is message
    assert hash(made) == hash(built)
    assert repr(made) == repr(built)
    assert made.model_dump_json() == built.model_dump_json()
    assert list(made.model_dump()) == list(built.model_dump())
    assert message.model_validate(made) is made
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == built


def test_it_is_frozen_and_can_be_copied() -> None:
    made = maker(Parts)(edge_s=1.0)
    with pytest.raises(ValidationError, match="frozen"):
        made.edge_s = 2.0  # type: ignore[misc]
    other = made.model_copy(update={"edge_s": 3.0})
    assert (made.edge_s, other.edge_s) == (1.0, 3.0)
    assert maker(Parts)() == Parts()


def test_it_checks_names_and_nothing_else() -> None:
    make = maker(Parts)
    assert make(edge_s=-1.0).edge_s == -1.0
    with pytest.raises(TypeError, match="edge_ms"):
        make(edge_ms=1.0)
    with pytest.raises(TypeError, match="seed"):
        maker(SeedInput)()  # type: ignore[call-arg]


def test_a_default_that_must_be_computed_cannot_be_made() -> None:
    class Fresh(Frozen):
        values: list[int] = Field(default_factory=list)

    with pytest.raises(TypeError, match=r"Fresh\.values"):
        maker(Fresh)
