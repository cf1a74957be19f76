"""The state of a region as JSON: `Image` writes it in pieces, `restore` reads it, `validate` checks the region.

An `Image` is taken in one step and written piece by piece while the region goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from math import isfinite
from typing import Any

from bus.errors import ConfigError, InvariantError
from bus.messages import NodeAnnounced, NodeJoined, Placed, TaskState, TaskSubmitted
from bus.snapshots import STATE_VERSION
from planner.core.region.circuits import Circuit
from planner.core.region.records import HASH_MASK, NEVER, hash_of
from planner.core.region.state import RegionState, SavedRegion, SavedTask
from planner.search.ledger.audit import audit

Lists = dict[str, list[bytes]]
"""Parts of the long lists of the state, by list name; each entry is JSON."""


class Image:
    """A copy of all region state that affects later decisions, as it is at this moment.

    Taking it costs about one microsecond per task, because it only keeps references to immutable values. Converting it to
    JSON costs ten times as much; it can be done in steps while the region goes on.
    """

    def __init__(self, region: RegionState) -> None:
        saved = region.export()
        self.head: dict[str, Any] = {
            "version": STATE_VERSION,
            "region": region.region,
            "now_s": None if saved.now_s == float("-inf") else saved.now_s,
            "admitted": saved.admitted,
            "circuits": [[name, *circuit] for name, circuit in saved.circuits],
            "taught": saved.taught,
        }
        self._nodes = list(region.nodes.values())
        self._tasks = saved.tasks
        self._ended = saved.ended
        self._estimates = saved.estimates

    def pieces(self, size_bytes: int) -> Iterator[Lists]:
        """The long lists in pieces of about `size_bytes` of JSON; at least one piece. Equal profiles are written once."""
        piece: Lists = {}
        held = 0
        for name, entry in self._entries():
            if held and held + len(entry) > size_bytes:
                yield piece
                piece, held = {}, 0
            piece.setdefault(name, []).append(entry)
            held += len(entry) + 1
        yield piece

    def _entries(self) -> Iterator[tuple[str, bytes]]:
        profiles: dict[str, int] = {}
        nodes = []
        for node in self._nodes:
            models = [[profiles.setdefault(text, len(profiles)), platform] for text, platform in node.profile_texts()]
            announced = node.announced.model_dump(mode="json", exclude={"models"})
            nodes.append(json.dumps({"announced": announced, "models": models}).encode())
        for text in profiles:
            yield "profiles", text.encode()
        for entry in nodes:
            yield "nodes", entry
        for (
            submitted,
            seq,
            state,
            attempt,
            deadline_s,
            waiting_since_s,
            placed,
            avoided,
            held,
            uncounted,
            admitted_s,
        ) in self._tasks:
            rest = {
                "seq": seq,
                "state": state.value,
                "attempt": attempt,
                "deadline_s": None if deadline_s == NEVER else deadline_s,
                "waiting_since_s": waiting_since_s,
                "admitted_s": admitted_s,
                "avoided": avoided,
                "start_s": None if held is None else held[0],
                "end_s": None
                if held is None or held[1] == NEVER
                else held[1],  # null also for a session, which has none
                "moves": 0 if held is None else held[2],
                **({"uncounted": uncounted} if uncounted else {}),
            }
            placed_text = b"null" if placed is None else placed.__pydantic_serializer__.to_json(placed)
            submitted_text = submitted.__pydantic_serializer__.to_json(submitted, exclude_none=True)
            yield (
                "tasks",
                b'{"submitted":%b,"placed":%b,%b' % (submitted_text, placed_text, json.dumps(rest).encode()[1:]),
            )
        for pair in self._ended:
            yield "ended", json.dumps(pair).encode()
        for estimate in self._estimates:
            yield "estimates", json.dumps(estimate).encode()

    def to_state(self) -> dict[str, Any]:
        """The whole state in one piece."""
        (lists,) = self.pieces(1 << 62)
        state = dict(self.head)
        for name in ("profiles", "nodes", "tasks", "ended", "estimates"):
            state[name] = [json.loads(entry) for entry in lists.get(name, ())]
        return state


def spliced(payload: bytes, lists: Lists) -> bytes:
    """The JSON of a message whose last field is `state`, with these lists appended to that field."""
    inside = b",".join(b'"%b":[%b]' % (name.encode(), b",".join(entries)) for name, entries in lists.items())
    comma = b"," if inside and not payload.endswith(b"{}}") else b""
    return payload[:-2] + comma + inside + payload[-2:]


def restore(region: RegionState, state: dict[str, Any]) -> None:
    """Load a state of `to_state` into a new core. Leases: see `restart_leases`.

    Raises `ConfigError` for a state of another version or region, other errors for one that no planner wrote.
    """
    if state.get("version") != STATE_VERSION or state.get("region") != region.region:
        raise ConfigError(
            f"the state has version {state.get('version')} and region {state.get('region')}; "
            f"this planner reads version {STATE_VERSION} and region {region.region}"
        )
    if region.tasks or region.nodes:
        raise InvariantError("cannot restore a state into a core that has tasks or nodes; create a new core")
    now_s = _time_s(state["now_s"])
    profiles = state.get("profiles", [])
    for entry in state.get("nodes", []):
        models = [{**profiles[index], "platform": platform} for index, platform in entry["models"]]
        announced = NodeAnnounced.model_validate({**entry["announced"], "models": models})
        region.apply(NodeJoined(node=announced), now_s)
    tasks = sorted(state.get("tasks", []), key=lambda entry: (entry["waiting_since_s"], entry["seq"]))
    circuits = [(name, Circuit(*circuit)) for name, *circuit in state.get("circuits", [])]
    region.load(
        SavedRegion(
            now_s,
            state["admitted"],
            circuits,
            [_saved_task(entry) for entry in tasks],
            state.get("ended", []),
            state.get("taught", 0),
            state.get("estimates", []),
        )
    )


def _time_s(saved: object) -> float:
    """A ledger time; None: before all others. Raises `ValueError`."""
    if saved is None:
        return float("-inf")
    if not isinstance(saved, int | float) or not isfinite(saved):
        raise ValueError(f"{saved!r} is not a time")
    return saved


def _saved_task(entry: dict[str, Any]) -> SavedTask:
    placed = None if entry["placed"] is None else Placed.model_validate(entry["placed"])
    end_s = entry["end_s"]
    return SavedTask(
        submitted=TaskSubmitted.model_validate(entry["submitted"]),
        seq=entry["seq"],
        state=TaskState(entry["state"]),
        attempt=entry["attempt"],
        deadline_s=NEVER if entry["deadline_s"] is None else entry["deadline_s"],
        waiting_since_s=entry["waiting_since_s"],
        placed=placed,
        avoided=tuple(entry.get("avoided", ())),
        uncounted=entry.get("uncounted", 0),
        admitted_s=entry.get("admitted_s", entry["waiting_since_s"]),
        held=None if placed is None else (entry["start_s"], NEVER if end_s is None else end_s, entry.get("moves", 0)),
    )


def validate(region: RegionState) -> None:
    """Check the invariants that hold between events.

    These are (8)-(11) and (13), one computing task per device, a live task for every reservation, the counts, and the hash.
    Raises `InvariantError`. The check visits the whole state and is slow; it is meant for tests.
    """
    audit(region.ledger, region.now_s)
    for task in region.tasks.values():
        r = region.ledger.reservations.get(task.task_id)
        placed = task.placed
        if task.state.ended or (task.state is TaskState.WAITING) != (r is None) or (placed is None) != (r is None):
            raise InvariantError(f"{task!r} holds {r}")
        if (task.state is TaskState.WAITING) != (task.task_id in region.waiting):
            raise InvariantError(f"{task!r}: its entry in the list of waiting tasks contradicts its state")
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
                raise InvariantError(f"(11) is violated: {task!r} is granted {bps} bit/s, its cap is {cap}")
        device = region.nodes.get(submitted.device)
        reach = None if device is None else device.announced.reachable_edges
        if device is None or (placement.edge is not None and reach is not None and placement.edge not in reach):
            raise InvariantError(f"(13) is violated: {task!r} uses {placement.edge}, its device reaches {reach}")
    strangers = region.ledger.reservations.keys() - region.tasks.keys()
    if strangers or len(region.waiting) + len(region.ledger.reservations) != len(region.tasks):
        raise InvariantError(
            f"reservations and waiting tasks do not match the live tasks; unknown: {sorted(strangers)}"
        )
    if region.running != sum(task.state is TaskState.RUNNING for task in region.tasks.values()):
        raise InvariantError("the count of running tasks is wrong")
    queued = Counter(task.submitted.device for task in region.tasks.values() if task.state is not TaskState.RUNNING)
    if region.queued_by_device != queued:
        raise InvariantError("the count of a device's queued tasks is wrong")
    reservations = region.ledger.reservations
    expected = region.admitted + region.ended.digest() + sum(node.digest for node in region.nodes.values())
    expected += sum(hash_of(circuit.text(name)) for name, circuit in region.circuits.items())
    expected += region.estimates.full_digest()
    expected += sum(hash_of(task.text(reservations.get(task.task_id))) for task in region.tasks.values())
    if region.state_hash != f"{expected & HASH_MASK:032x}":
        raise InvariantError("the incrementally updated state hash differs from the hash of the state")
