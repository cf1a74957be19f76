"""What a region that demands proofs is tried with: a master, and what d1 says as another."""

from __future__ import annotations

import asyncio

from bus import topics
from bus.identity.keys import Master
from bus.messages import (
    Message,
    NodeAnnounced,
    NodeHeartbeat,
    NodeLeft,
    NodeLost,
    TaskCancelled,
    TaskCompleted,
    TaskFailed,
)
from bus.values import Parts, Role
from deploy.commands.kafka.dead_letter import DeadLetter, read_dead_letters
from planner.service.service import Standing
from tests.decision_story import Story
from tests.sim.planners import Town
from tests.sim.world import profile, task

MASTER = Master(bytes(range(32)))
HORIZON_S = 3600.0
TASKS = 6
IDS = {f"t{number}" for number in range(TASKS)}

FORGERIES: dict[str, tuple[str, Message, str]] = {
    "announcement": (
        topics.NODES,
        NodeAnnounced(node="d2", role=Role.DEVICE, incarnation="forged", models=(profile(Role.DEVICE),)),
        "device:d1 speaks as d2 in a node_announced",
    ),
    "announcement as an edge": (
        topics.NODES,
        NodeAnnounced(node="d1", role=Role.EDGE, incarnation="forged", slots=9, models=(profile(Role.EDGE),)),
        "device:d1 announces itself as edge",
    ),
    "farewell": (topics.NODES, NodeLeft(node="d2", incarnation="d2-1"), "device:d1 speaks as d2 in a node_left"),
    "heartbeat": (
        topics.EVENTS,
        NodeHeartbeat(node="d2", incarnation="d2-1"),
        "device:d1 speaks as d2 in a node_heartbeat",
    ),
    "completion": (
        topics.EVENTS,
        TaskCompleted(task_id="t0", attempt=1, node="d2", measured=Parts(), delay_s=0.1),
        "device:d1 speaks as d2 in a task_completed",
    ),
    "failure": (
        topics.EVENTS,
        TaskFailed(task_id="t0", attempt=1, node="d2", cause="bad_frame"),
        "device:d1 speaks as d2 in a task_failed",
    ),
    "failure in its own name": (
        topics.EVENTS,
        TaskFailed(task_id="t0", attempt=1, node="d1", cause="bad_frame"),
        "device:d1 sends a task_failed of t0, in which it has no part",
    ),
    "cancellation": (
        topics.TASKS,
        TaskCancelled(task_id="t0"),
        "device:d1 sends a task_cancelled of t0, in which it has no part",
    ),
    "submission": (topics.TASKS, task(77, "d2"), "device:d1 speaks as d2 in a task_submitted"),
}


async def leading(place: Town) -> None:
    while not any(one.service.standing is Standing.LEADING for one in place.processes):
        await asyncio.sleep(0.1)


async def dead_letters_of(place: Town) -> list[DeadLetter]:
    return [letter for letter in await read_dead_letters(place.bus) if letter.cause == "wrong_identity"]


def lost_in(story: Story) -> list[str]:
    return [change.node for d in story.decisions for change in d.changes if isinstance(change, NodeLost)]
