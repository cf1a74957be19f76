"""The state as a value: to JSON and back, and a check of everything that must hold."""

from __future__ import annotations

import json
from heapq import heappush
from typing import Any, Final

from bus.errors import ConfigError, InvariantError
from bus.messages import NodeAnnounced, NodeJoined, Placed, TaskState, TaskSubmitted
from planner.region_state import RegionState, reservation_of
from planner.tasks import HASH_MASK, NEVER, Task, hash_of

STATE_VERSION: Final = 1


def to_state(region: RegionState) -> dict[str, Any]:
    """Everything that decides what will happen, as JSON can carry it. Equal profiles are written once."""
    profiles: dict[str, int] = {}
    nodes = []
    for node in region.nodes.values():
        models = [[profiles.setdefault(text, len(profiles)), platform] for text, platform in node.profile_texts()]
        announced = node.announced.model_dump(mode="json", exclude={"models"})
        nodes.append({"announced": announced, "models": models})
    tasks = []
    for task in region.tasks.values():
        r = region.ledger.reservations.get(task.task_id)
        tasks.append(
            {
                "submitted": task.submitted.model_dump(mode="json"),
                "seq": task.seq,
                "state": task.state.value,
                "attempt": task.attempt,
                "deadline_s": None if task.deadline_s == NEVER else task.deadline_s,
                "waiting_since_s": task.waiting_since_s,
                "placed": None if task.placed is None else task.placed.model_dump(mode="json"),
                "start_s": None if r is None else r.start_s,
                "end_s": None if r is None else r.end_s,
            }
        )
    return {
        "version": STATE_VERSION,
        "region": region.region,
        "now_s": None if region.now_s == float("-inf") else region.now_s,
        "admitted": region._seq,
        "profiles": [json.loads(text) for text in profiles],
        "nodes": nodes,
        "tasks": tasks,
        "ended": region.ended.to_state(),
    }


def restore(region: RegionState, state: dict[str, Any]) -> None:
    """Take on a state of `to_state`; the core must be new. Leases: see `restart_leases`.

    Raises `ConfigError` for a state of another version or region.
    """
    if state.get("version") != STATE_VERSION or state.get("region") != region.region:
        raise ConfigError(
            f"a state of version {state.get('version')}, region {state.get('region')}; "
            f"wanted {STATE_VERSION}, {region.region}"
        )
    if region.tasks or region.nodes:
        raise InvariantError("only a new core can be restored")
    region.now_s = float("-inf") if state["now_s"] is None else state["now_s"]
    for entry in state["nodes"]:
        models = [{**state["profiles"][index], "platform": platform} for index, platform in entry["models"]]
        region._apply_joined(
            NodeJoined(node=NodeAnnounced.model_validate({**entry["announced"], "models": models})), region.now_s
        )
    for entry in sorted(state["tasks"], key=lambda entry: (entry["waiting_since_s"], entry["seq"])):
        _restore_task(region, entry)
    region._seq = state["admitted"]
    region._hash += region.ended.restore(state["ended"])
    region._changed_edges.clear()
    region._changed_devices.clear()


def _restore_task(region: RegionState, entry: dict[str, Any]) -> None:
    submitted = TaskSubmitted.model_validate(entry["submitted"])
    task = Task(submitted, entry["seq"], entry["waiting_since_s"])
    task.state = TaskState(entry["state"])
    task.attempt = entry["attempt"]
    task.deadline_s = NEVER if entry["deadline_s"] is None else entry["deadline_s"]
    region.tasks[task.task_id] = region._touched[task.task_id] = task
    if task.deadline_s != NEVER:
        heappush(region._deadlines, (task.deadline_s, task.seq, task.task_id))
    if entry["placed"] is None:
        region._waiting[task.task_id] = task
        return
    task.placed = Placed.model_validate(entry["placed"])
    r = reservation_of(task, task.placed)
    r.start_s, r.end_s, r.running = entry["start_s"], entry["end_s"], task.state is TaskState.RUNNING
    region.ledger.reserve(r, region.now_s)
    if r.running:
        region._running += 1
        heappush(region._ends, (r.end_s, task.seq, task.task_id))


def validate(region: RegionState) -> None:
    """All that must hold between events: (8)-(11), one task a device, every reservation a live task's, the hash.

    Raises `InvariantError`. It looks at everything and takes its time; it is for tests.
    """
    region.ledger.audit(region.now_s)
    for task in region.tasks.values():
        r = region.ledger.reservations.get(task.task_id)
        placed = task.placed
        if task.state.ended or (task.state is TaskState.WAITING) != (r is None) or (placed is None) != (r is None):
            raise InvariantError(f"{task!r} holds {r}")
        if (task.state is TaskState.WAITING) != (task.task_id in region._waiting):
            raise InvariantError(f"{task!r} is among the waiting, or is not, against its state")
        if r is None or placed is None:
            continue
        if r.running != (task.state is TaskState.RUNNING):
            raise InvariantError(f"{task!r} holds {r}")
        submitted, placement = task.submitted, placed.placement
        for bps, cap in (
            (placement.link1_bps, submitted.max_link1_bps),
            (placement.link2_bps, submitted.max_link2_bps),
        ):
            if cap is not None and bps > cap:
                raise InvariantError(f"(11) is broken: {task!r} is granted {bps} of {cap}")
        device = region.nodes.get(submitted.device)
        reach = None if device is None else device.announced.reachable_edges
        if device is None or (placement.edge is not None and reach is not None and placement.edge not in reach):
            raise InvariantError(f"(13) is broken: {task!r} on {placement.edge}, reachable {reach}")
    strangers = region.ledger.reservations.keys() - region.tasks.keys()
    if strangers or len(region._waiting) + len(region.ledger.reservations) != len(region.tasks):
        raise InvariantError(f"reservations of nobody: {sorted(strangers)}")
    if region._running != sum(task.state is TaskState.RUNNING for task in region.tasks.values()):
        raise InvariantError("the count of running tasks is wrong")
    reservations = region.ledger.reservations
    expected = region._seq + region.ended.digest() + sum(node.digest for node in region.nodes.values())
    expected += sum(hash_of(task.text(reservations.get(task.task_id))) for task in region.tasks.values())
    if region.state_hash != f"{expected & HASH_MASK:032x}":
        raise InvariantError("the hash that was kept up to date is not that of the state")
