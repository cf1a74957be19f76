"""External monitor of a live region: reads valid decisions, senders of frames, and the devices' result files."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bus import topics
from loadgen.chaos.live.expected_results import Answers
from loadgen.chaos.live.faults import Target
from loadgen.chaos.live.oracle import DecisionFold, Json, frame_head, results_of

TAIL_S = 0.02
"""Interval at which the devices' result files are read."""


def shown_lines(data: bytes) -> Iterator[tuple[str, int, int]]:
    """The (task, sample, largest output) of each line of a result file; incomplete lines are skipped."""
    for line in data.splitlines():
        try:
            entry = json.loads(line)
            yield str(entry["task_id"]), int(entry["sample"]), int(entry["top"])
        except (ValueError, KeyError, TypeError):
            continue


@dataclass(slots=True)
class Sign:
    """A pending wait for proof that a target works: which target, and the earliest time that counts."""

    target: Target
    name: str
    after_s: float  # the loop's clock
    seen: asyncio.Future[float]


class LiveMonitor:
    """Follows a live region. All times are on the event loop's clock."""

    def __init__(self, results: dict[str, Path], region: int = 0) -> None:
        self.fold = DecisionFold()
        self.region = region
        self.shown = 0  # lines in the devices' files
        self._files = results
        self._read_bytes = dict.fromkeys(results, 0)
        self._loop = asyncio.get_running_loop()
        self._wall_s = time.time() - self._loop.time()
        self._sign: Sign | None = None
        self._lost_s: dict[str, float] = {}  # node -> time of the decision that declared it lost

    def await_sign(self, target: Target, name: str, after_s: float) -> asyncio.Future[float]:
        """A future that resolves with the time of the target's first proof of work after `after_s`.

        The proof is a valid decision for the planner, a shown result for a device, and a sent frame for an edge or cloud,
        each of a current attempt. For the broker it is a result that any device shows of a task that crosses the broker.
        """
        self._sign = Sign(target, name, after_s, self._loop.create_future())
        return self._sign.seen

    def lost_after(self, name: str, since_s: float) -> float | None:
        """Time from `since_s` until the node was declared lost; None if it was not."""
        lost_s = self._lost_s.get(name, float("-inf"))
        return lost_s - since_s if lost_s > since_s else None

    def take(self, record: Any) -> None:
        """Take a record of the decisions, the results or the activations for the cloud."""
        sent_s = record.timestamp / 1000 - self._wall_s
        if record.topic == topics.DECISIONS:
            if record.partition == self.region:
                self._decision(self.fold.read(record.value), sent_s)
            return
        try:
            head = frame_head(record.value)
        except ValueError:
            return
        if self._present(head["task"], head["attempt"]):
            self._proof((Target.EDGE, Target.CLOUD), head["from"], sent_s)

    async def tail(self) -> None:
        """Follow the devices' files until cancelled."""
        while True:
            for device, path in self._files.items():
                self._tail(device, path)
            await asyncio.sleep(TAIL_S)

    def _tail(self, device: str, path: Path) -> None:
        try:
            with path.open("rb") as handle:
                handle.seek(self._read_bytes[device])
                data = handle.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._read_bytes[device] += len(whole)
        now = self._loop.time()
        for task_id, _, _ in shown_lines(whole):
            self.shown += 1
            if self._present(task_id, None):
                self._proof((Target.DEVICE,), device, now)
            if self.fold.placements.get(task_id, {}).get("edge") is not None:
                self._proof((Target.BROKER,), "broker", now)

    def _decision(self, message: Json | None, sent_s: float) -> None:
        if message is None or message["type"] != "decision":
            return
        for change in message["changes"]:
            if change["type"] == "node_lost":
                self._lost_s[change["node"]] = sent_s
        if message["changes"]:
            self._proof((Target.PLANNER,), None, sent_s)

    def _present(self, task_id: str, attempt: int | None) -> bool:
        """Whether the task runs under this attempt. Output of an earlier attempt proves nothing."""
        return task_id in self.fold.running and attempt in (None, self.fold.attempts.get(task_id))

    def _proof(self, targets: tuple[Target, ...], name: str | None, at_s: float) -> None:
        """Resolve pending waits for these targets; `name` None matches any process of the target."""
        sign = self._sign
        if sign is not None and sign.target in targets and name in (None, sign.name) and at_s >= sign.after_s:
            self._sign = None
            if not sign.seen.done():
                sign.seen.set_result(at_s)


class Tally:
    """Final count of everything on the topics and in the result files, read again from the beginning."""

    def __init__(self, answers: Answers, region: int = 0) -> None:
        self.fold = DecisionFold()
        self.results: Counter[tuple[str, int]] = Counter()  # results on the topic
        self.shown: Counter[tuple[str, int]] = Counter()  # results in the files
        self.wrong = 0  # results that differ from the uncut model, on the topic or in a file
        self.unreadable = 0  # frames that cannot be decoded; none is injected on purpose
        self._answers, self._region = answers, region

    def take(self, record: Any) -> None:
        """Take a record of the decisions or the results."""
        if record.topic == topics.DECISIONS:
            if record.partition == self._region:
                self.fold.read(record.value)
            return
        try:
            for task_id, sample, payload in results_of(record.value):
                self.results[task_id, sample] += 1
                answer = self._answers.of(task_id, sample)
                self.wrong += answer is not None and payload != answer.payload
        except (ValueError, KeyError, TypeError):
            self.unreadable += 1

    def look_at(self, files: dict[str, Path]) -> None:
        """Count the results in the devices' files."""
        for path in files.values():
            for task_id, sample, top in shown_lines(path.read_bytes() if path.exists() else b""):
                self.shown[task_id, sample] += 1
                answer = self._answers.of(task_id, sample)
                self.wrong += answer is not None and top != answer.top
