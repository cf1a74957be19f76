"""An input whose handling fails does not stop the planner: it is rolled back and dead-lettered, and its task ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bus import messages, topics
from bus.messages import Change, Ended, NodeAnnounced, TaskCompleted, TaskState, TaskSubmitted
from bus.values import Role
from deploy.commands.kafka.dead_letter import DeadLetter, read_dead_letters
from loadgen.sim.virtual_loop import run_virtual
from planner.core.core import Event, PlannerCore, Unhandled
from planner.service.input_filter import InputFilter
from planner.service.service import Standing
from tests.sim.planners import FOREVER_S, Process, Story, Town, town
from tests.sim.world import profile

TASKS = 6
HORIZON_S = 3600.0


class Brittle(PlannerCore):
    """A planted bug: handling some inputs changes the state and then raises an error."""

    def __init__(self, *fatal: type[Any], victim: str = "t3") -> None:
        super().__init__(0)
        self.fatal, self.victim = fatal, victim

    def handle(self, event: Event, now: float) -> list[Change]:
        changes = super().handle(event, now)
        subject = event.message if isinstance(event, Unhandled) else event
        named = getattr(subject, "task_id", getattr(subject, "node", ""))
        if isinstance(event, self.fatal) and named == self.victim:
            raise ZeroDivisionError("planted")
        return changes


async def dead_letters_of(place: Town) -> list[DeadLetter]:
    return [letter for letter in await read_dead_letters(place.bus) if letter.cause == "planner_error"]


def ends_of(story: Story) -> dict[str, Ended]:
    """The end of each task; every task ends once."""
    found = [change for decision in story.decisions for change in decision.changes if isinstance(change, Ended)]
    assert len({end.task_id for end in found}) == len(found)
    return {end.task_id: end for end in found}


async def lives(process: Process) -> None:
    """Wait until the planner leads, then check its state."""
    async with asyncio.timeout(60.0):
        while process.service.standing is not Standing.LEADING:
            await asyncio.sleep(0.1)
    process.service.core.validate()


@pytest.mark.parametrize(
    ("kind", "state"),
    [(TaskSubmitted, TaskState.REJECTED), (TaskCompleted, TaskState.FAILED)],
)
def test_a_task_whose_input_cannot_be_handled_ends_with_the_cause_and_all_others_complete(
    kind: type[Any], state: TaskState
) -> None:
    async def run() -> None:
        async with town() as place:
            place.make_core = lambda: Brittle(kind)
            first = place.start("first")
            await place.submit(range(TASKS))
            story = await place.until_ended(TASKS)
            await lives(first)
            assert first.service.core.state_hash == (await place.story()).core.state_hash
            ends = {task_id: end.state for task_id, end in ends_of(story).items()}
            assert ends == {f"t{number}": state if number == 3 else TaskState.COMPLETED for number in range(TASKS)}
            assert ends_of(story)["t3"].cause == "planner_error"
            assert ends_of(story)["t3"].detail.startswith("ZeroDivisionError at test_unhandled_inputs.py:")
            (letter,) = await dead_letters_of(place)
            assert (
                messages.decode(topics.TASKS if kind is not TaskCompleted else topics.EVENTS, letter.value).task_id
                == "t3"
            )
            assert first.service.counters.input_failures == 1
            # The next leader does not read the input again.
            await first.stop()
            second = place.start("second")
            await lives(second)
            await place.submit(range(TASKS, TASKS + 2))
            await place.until_ended(TASKS + 2)
            assert second.service.counters.input_failures == 0
            assert len(await dead_letters_of(place)) == 1

    run_virtual(run(), horizon_s=HORIZON_S)


def test_where_ending_the_task_fails_as_well_the_planner_goes_on_without_it() -> None:
    async def run() -> None:
        async with town() as place:
            place.make_core = lambda: Brittle(TaskSubmitted, Unhandled)
            process = place.start()
            await place.submit(range(TASKS))
            story = await place.until_ended(TASKS - 1)
            await lives(process)
            assert "t3" not in ends_of(story)
            assert {end.state for end in ends_of(story).values()} == {TaskState.COMPLETED}
            assert process.service.counters.input_failures == 2
            assert len(await dead_letters_of(place)) == 2  # one for each attempt to handle it

    run_virtual(run(), horizon_s=HORIZON_S)


def test_a_node_whose_announcement_cannot_be_handled_is_not_there() -> None:
    async def run() -> None:
        async with town() as place:
            place.make_core = lambda: Brittle(NodeAnnounced, victim="e9")
            process = place.start()
            await place.submit(range(3))
            announced = NodeAnnounced(
                node="e9", role=Role.EDGE, incarnation="i", lease_s=FOREVER_S, slots=9, models=(profile(Role.EDGE),)
            )
            await place.tell(topics.NODES, announced, "e9")
            await place.submit(range(3, TASKS))
            story = await place.until_ended(TASKS)
            await lives(process)
            assert {end.state for end in ends_of(story).values()} == {TaskState.COMPLETED}
            assert "e9" not in process.service.core.nodes
            (letter,) = await dead_letters_of(place)
            assert messages.decode(topics.NODES, letter.value) == announced

    run_virtual(run(), horizon_s=HORIZON_S)


def test_a_record_that_breaks_the_reader_is_a_dead_letter() -> None:
    class BrokenFilter(InputFilter):
        def read(self, record: Any, core: PlannerCore) -> Any:
            if record.key == "t3":
                raise RecursionError("planted")
            return super().read(record, core)

    async def run() -> None:
        async with town() as place:
            process = place.start()
            process.service.context.input_filter = BrokenFilter(None)
            await place.submit(range(TASKS))
            story = await place.until_ended(TASKS - 1)
            await lives(process)
            assert "t3" not in ends_of(story)
            assert len(await dead_letters_of(place)) == 1

    run_virtual(run(), horizon_s=HORIZON_S)


def test_killed_while_it_passes_an_input_over_the_next_planner_does_the_same() -> None:
    async def run(fuse: int) -> None:
        async with town() as place:
            place.make_core = lambda: Brittle(TaskSubmitted)
            place.start("first", fuse=fuse)
            place.start("second")
            await place.submit(range(TASKS))
            story = await place.until_ended(TASKS)
            assert [end.cause for end in ends_of(story).values() if end.state is not TaskState.COMPLETED] == [
                "planner_error"
            ]
            assert 1 <= len(await dead_letters_of(place)) <= 2

    for fuse in range(40, 120, 4):
        run_virtual(run(fuse), horizon_s=HORIZON_S)


def test_a_users_policy_that_fails_is_counted_and_the_planner_goes_on() -> None:
    class Crashing:
        name = "crashing"

        def place(self, algorithm: Any) -> Any:
            if algorithm.request.task_id == "t3":
                raise KeyError("e7")
            return algorithm.best()

    async def run() -> None:
        async with town() as place:
            place.make_core = lambda: PlannerCore(0, Crashing())
            process = place.start()
            await place.submit(range(TASKS))
            story = await place.until_ended(TASKS)
            await lives(process)
            failed = ends_of(story)["t3"]
            assert (failed.state, failed.cause) == (TaskState.REJECTED, "policy_error")
            assert failed.detail.startswith("policy crashing (test_unhandled_inputs.py:")
            assert failed.detail.endswith("KeyError: 'e7'")
            assert sum(end.state is TaskState.COMPLETED for end in ends_of(story).values()) == TASKS - 1
            assert (process.service.counters.policy_errors, process.service.counters.input_failures) == (1, 0)

    run_virtual(run(), horizon_s=HORIZON_S)


@pytest.mark.parametrize("ended", [False, True])
def test_a_task_id_that_comes_again_with_other_content_is_a_dead_letter(ended: bool) -> None:
    async def run() -> None:
        async with town() as place:
            process = place.start()
            (first,) = await place.submit([0])
            if ended:
                await place.until_ended(1)
            again = first.model_copy(update={"submitted_at": "2026-01-01T00:00:00Z"})
            other = first.model_copy(update={"samples": first.samples + 1})
            for one in (again, other, again):
                await place.tell(topics.TASKS, one, one.task_id)
            await place.submit(range(1, 4))
            await place.until_ended(4)
            (letter,) = await read_dead_letters(place.bus)
            assert (letter.cause, letter.task_id) == ("task_id_taken", "t0")
            assert messages.decode(topics.TASKS, letter.value) == other
            assert process.service.counters.input_failures == 0

    run_virtual(run(), horizon_s=HORIZON_S)
