"""Oracle of the live campaign: checks the guarantees from the raw topics alone.

It shares no code with the product: it decodes JSON and msgpack and implements the rules of `docs/interface.md` a second
time. `DecisionFold` is independent of `bus.decisions` and `bus.region_tasks` on purpose and must not use them: an error
there, in the frames or in the planner's ledger shows as a violation.
`tests/unit/loadgen/chaos/test_live_oracle.py` injects such errors.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgpack

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Holding:
    """Edge resources that a running task holds."""

    edge: str
    slots: int
    link1_bps: int
    link2_bps: int

    @property
    def amounts(self) -> tuple[int, int, int]:
        """Slots, bits/s on link 1 and on link 2."""
        return self.slots, self.link1_bps, self.link2_bps


class DecisionFold:
    """Replays one region's `deepar.decisions` from the first record: valid records, held resources, and task ends."""

    def __init__(self) -> None:
        self.epoch, self.nonce, self.seq = 0, "", 0
        self.openers: dict[str, str] = {}  # nonce -> planner
        self.decisions = 0  # valid decisions
        self.ignored = 0  # records of planners that do not lead, or out of sequence
        self.violations: list[str] = []
        self.ends: dict[str, Json] = {}  # task -> its end
        self.attempts: dict[str, int] = {}
        self.placements: dict[str, Json] = {}  # task -> where it was last placed
        self.retries: Counter[str] = Counter()  # cause -> number of retries
        self.joined: dict[str, Json] = {}  # present node -> its announcement
        self.running: dict[str, Holding | None] = {}  # task -> held resources of an edge
        self._parts: list[list[Json]] = []  # collected parts of the next decision, if it has several records
        self._admitted: set[str] = set()
        self._placed: dict[str, Json] = {}  # of unfinished tasks
        self._grants: dict[str, dict[int, int]] = {}  # task -> link -> bits/s of its newest placement
        self._inputs: dict[str, int] = {}

    @property
    def leader(self) -> str:
        """The planner that opened the current epoch; empty before the first epoch."""
        return self.openers.get(self.nonce, "")

    def read(self, value: bytes | None) -> Json | None:
        """The message of a valid record; None for an ignored one."""
        try:
            message = json.loads(value or b"")
        except ValueError:
            self._say("a record on the decisions is not JSON")
            return None
        kind = message["type"]
        if kind == "epoch_opened":
            if message["epoch"] <= self.epoch:
                self.ignored += 1  # another planner opened the epoch first
                return None
            self.epoch, self.nonce = message["epoch"], message["nonce"]
            if self.nonce in self.openers:
                self._say(f"nonce {self.nonce} was used twice")
            self.openers[self.nonce] = message["planner"]
            self._parts.clear()
            return dict(message)
        if (message["epoch"], message["nonce"]) != (self.epoch, self.nonce):
            self.ignored += 1
            return None
        if kind in ("decision", "decision_part") and not self._follows(message):
            self.ignored += 1
            return None
        if kind == "decision":
            message["changes"] = [change for part in self._parts for change in part] + message["changes"]
            self._parts.clear()
            self.seq = message["seq"]
            self.decisions += 1
            self._judge(message)
        return dict(message)

    def _follows(self, message: Json) -> bool:
        """Whether a decision or a part of one continues the sequence without a gap."""
        if message["seq"] != self.seq + 1:
            return False
        if message["type"] == "decision":
            return bool(message.get("parts", 0) == len(self._parts))
        if message["part"] != len(self._parts) + 1:
            return False
        self._parts.append(message["changes"])
        return True

    def finish(self, acknowledged: Iterable[str]) -> None:
        """Check that every acknowledged task has ended and that no resource is held. Second ends are reported when read."""
        for task_id in acknowledged:
            if task_id not in self._admitted:
                self._say(f"{task_id} was acknowledged and never admitted")
            elif task_id not in self.ends:
                self._say(f"{task_id} has no end")
        for task_id in self.running:
            self._say(f"{task_id} still holds what it was given")

    # --- judging -----------------------------------------------------------------------------------------------------

    def _judge(self, decision: Json) -> None:
        seq = decision["seq"]
        for topic, offset in decision["inputs"].items():
            if offset < self._inputs.get(topic, 0):
                self._say(f"decision {seq} goes back on {topic}, from {self._inputs[topic]} to {offset}")
            self._inputs[topic] = offset
        for change in decision["changes"]:
            self._apply(change, seq)
        for task_id in [change["task_id"] for change in decision["changes"] if change["type"] == "placement"]:
            self._match_grants(task_id, seq)
        self._weigh(seq)

    def _apply(self, change: Json, seq: int) -> None:
        kind, task_id = change["type"], change.get("task_id", "")
        if kind == "admitted":
            task_id = change["task"]["task_id"]
            if task_id in self._admitted:
                self._say(f"decision {seq} admits {task_id} again")
            self._admitted.add(task_id)
            self.attempts[task_id] = 1
        elif kind == "node_joined":
            self.joined[change["node"]["node"]] = change["node"]
        elif kind == "node_lost":
            self._lose(change, seq)
        elif kind == "moved":
            self._move(change, seq)
        elif kind == "circuit_changed":
            pass  # a placement hint of the planner; it holds and frees no resources
        elif kind == "learned":
            self._check_lesson(change, seq)
        elif task_id not in self._admitted or task_id in self.ends:
            self._say(f"decision {seq}: {kind} for {task_id}, which is {'over' if task_id in self.ends else 'unknown'}")
        elif kind == "retried":
            if change["attempt"] != self.attempts[task_id] + 1:
                self._say(
                    f"decision {seq}: {task_id} goes from attempt {self.attempts[task_id]} to {change['attempt']}"
                )
            self.attempts[task_id] = change["attempt"]
            self.retries[change["cause"]] += 1
            self._free(task_id)
        elif kind == "ended":
            self._end(change, seq)
        elif change["attempt"] != self.attempts[task_id]:
            self._say(f"decision {seq}: {kind} for attempt {change['attempt']} of {task_id}, not the present one")
        elif kind == "placement":
            self.placements[task_id] = self._placed[task_id] = change["placement"]
            self._grants[task_id] = {}
        elif kind == "bandwidth_grant":
            self._grants.setdefault(task_id, {})[change["link"]] = change["bps"]
        elif kind == "start":
            self._start(change, seq)
        elif kind == "rerouted":
            self._reroute(change, seq)

    def _start(self, change: Json, seq: int) -> None:
        task_id = change["task_id"]
        if task_id in self.running:
            self._say(f"decision {seq} starts {task_id}, which runs")
        placement = self._placed.get(task_id)
        if placement is None:
            self._say(f"decision {seq} starts {task_id}, which has no place")
            return
        if change["device"] not in self.joined:
            self._say(f"decision {seq} starts {task_id} on {change['device']}, which is not there")
        self.running[task_id] = _holding(placement)

    def _reroute(self, change: Json, seq: int) -> None:
        """A running task goes on with another placement and holds what that one reserves."""
        task_id = change["task_id"]
        if task_id not in self.running:
            self._say(f"decision {seq} reroutes {task_id}, which does not run")
            return
        self.placements[task_id] = self._placed[task_id] = change["placement"]
        self.running[task_id] = _holding(change["placement"])

    def _check_lesson(self, change: Json, seq: int) -> None:
        """Only the current attempt of a task teaches the planner; a heartbeat teaches without a task."""
        task_id = change.get("task_id")
        if task_id is not None and change.get("attempt") != self.attempts.get(task_id):
            self._say(f"decision {seq} learns from attempt {change.get('attempt')} of {task_id}, not the current one")

    def _move(self, change: Json, seq: int) -> None:
        """Check a new start time: allowed only for a placed task that has not started."""
        for task_id in change["task_ids"]:
            if task_id in self.running or task_id not in self._placed:
                self._say(
                    f"decision {seq} moves {task_id}, which {'runs' if task_id in self.running else 'has no place'}"
                )
        if len(change["starts_s"]) != len(change["task_ids"]):
            self._say(f"decision {seq} moves {len(change['task_ids'])} tasks to {len(change['starts_s'])} starts")

    def _end(self, change: Json, seq: int) -> None:
        task_id = change["task_id"]
        held = self.running.get(task_id)
        released = tuple(change.get(f"released_{name}", 0) for name in ("slots", "link1_bps", "link2_bps"))
        if held is not None and released != held.amounts:
            self._say(f"decision {seq}: {task_id} held {held.amounts} and gives back {released}")
        self.ends[task_id] = change
        self._free(task_id)

    def _lose(self, change: Json, seq: int) -> None:
        known = self.joined.pop(change["node"], None)
        if known is None or known["incarnation"] != change["incarnation"]:
            self._say(f"decision {seq} loses {change['node']} {change['incarnation']}, which was not there")

    def _free(self, task_id: str) -> None:
        self.running.pop(task_id, None)
        self._placed.pop(task_id, None)
        self._grants.pop(task_id, None)

    def _match_grants(self, task_id: str, seq: int) -> None:
        """Check that a placement and its grants have the same values."""
        placement = self._placed.get(task_id)
        if placement is not None:
            wanted = {link: placement[f"link{link}_bps"] for link in (1, 2) if placement.get(f"link{link}_bps")}
            if self._grants.get(task_id, {}) != wanted:
                self._say(f"decision {seq}: {task_id} is placed with {wanted} and granted {self._grants.get(task_id)}")

    def _weigh(self, seq: int) -> None:
        """Check the paper's constraints (8) to (10): running tasks fit the capacity that their edge announced."""
        used: dict[str, list[int]] = {}
        for held in self.running.values():
            if held is not None:
                sums = used.setdefault(held.edge, [0, 0, 0])
                for index, amount in enumerate(held.amounts):
                    sums[index] += amount
        for name, sums in used.items():
            node = self.joined.get(name)
            if node is None:
                self._say(f"after decision {seq} tasks run on {name}, which is not there")
                continue
            room = (node["slots"], node["link1_capacity_bps"], node["link2_capacity_bps"])
            if any(amount > most for amount, most in zip(sums, room, strict=True)):
                self._say(f"after decision {seq} edge {name} gives {sums} of {list(room)}")

    def _say(self, what: str) -> None:
        self.violations.append(what)


def _holding(placement: Json) -> Holding | None:
    if placement.get("edge") is None:
        return None
    routes = placement.get("routes") or [placement]
    return Holding(
        placement["edge"],
        int(any(route["cut1"] != route["cut2"] for route in routes)),
        placement.get("link1_bps", 0),
        placement.get("link2_bps", 0),
    )


def frame_head(value: bytes | None) -> Json:
    """The header of a frame. Raises ValueError for an invalid frame."""
    return _unpacked(value)[0]


def _unpacked(value: bytes | None) -> tuple[Json, int]:
    """A frame's header and the offset of its data."""
    payload = value or b""
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=True, max_buffer_size=2 << 20)
    unpacker.feed(payload)
    head: Json = {}
    size_bytes = 0
    try:
        for _ in range(unpacker.read_map_header()):
            key = unpacker.unpack()
            head[key] = unpacker.unpack()
            if key == "data":
                size_bytes = len(head.pop(key))
    except (msgpack.UnpackException, ValueError) as error:
        raise ValueError(f"not a frame: {error}") from None
    return head, len(payload) - size_bytes  # the data comes last


def results_of(value: bytes | None) -> list[tuple[str, int, bytes | None]]:
    """The (task, sample, payload) of each result that begins in a frame; payload None if the result spans several frames.

    Raises ValueError, KeyError, TypeError for an invalid frame.
    """
    head, at = _unpacked(value)
    if head["kind"] != "result":
        return []
    data = memoryview(value or b"")[at:]
    found: list[tuple[str, int, bytes | None]] = []
    for piece in head["pieces"]:
        for sample in piece.get("samples", [piece.get("sample")]):  # equal whole samples share one description
            at, size = piece.get("at", 0), piece["size"]
            length = piece.get("bytes", size)
            if at == 0:
                found.append((head["task"], sample, bytes(data[:length]) if length == size else None))
            data = data[length:]
    return found


@dataclass(frozen=True, slots=True)
class OracleVerdict:
    """Number of violations of each guarantee, and number of suppressed duplicates."""

    tasks: int  # acknowledged
    samples: int  # samples of those tasks
    lost: int  # samples of acknowledged tasks that were never shown
    visible_duplicates: int  # repeated showings of a (task, sample)
    suppressed_duplicates: int  # results on the topic that were not shown
    ledger_violations: tuple[str, ...]


def judge(
    fold: DecisionFold,
    acknowledged: dict[str, int],
    shown: Counter[tuple[str, int]],
    results: Counter[tuple[str, int]],
) -> OracleVerdict:
    """The verdict on tasks (task -> samples) whose results `shown` counts in the devices' files and `results` on the topic.

    A result in a device's file for a task that was never submitted also counts as a visible duplicate.
    """
    wanted = {(task_id, sample) for task_id, samples in acknowledged.items() for sample in range(samples)}
    fold.finish(acknowledged)
    return OracleVerdict(
        tasks=len(acknowledged),
        samples=len(wanted),
        lost=sum(key not in shown for key in wanted),
        visible_duplicates=sum(times - (key in wanted) for key, times in shown.items()),
        suppressed_duplicates=sum(times - 1 for key, times in results.items() if key in wanted),
        ledger_violations=tuple(fold.violations),
    )
