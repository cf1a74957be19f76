"""What the other stages of an attempt report to its device: their busy times.

A stage reports once at the end of a task. In a session it reports every few seconds what came since its last report, with the
number of samples; in a task of several routes every few samples, with the busy times that the plan predicts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

from bus.frames import BATCHES, MORE, PREDICTED, SAMPLES, AttemptPlan, Frame
from bus.values import DELAY_PARTS, Parts, Placement, is_node_name

KEYS = frozenset(
    {"edge" + BATCHES, "cloud" + BATCHES, *(part + ending for part in DELAY_PARTS for ending in ("_s", PREDICTED))}
)
"""What a report says of a part. Other keys, for example of a later version, are ignored."""

REPORTS_S = 1.0
"""Timeout for the reports of the other stages, counted from the last result."""


class StageReports:
    """The reports of one attempt."""

    def __init__(self, plan: AttemptPlan) -> None:
        self.cloud: str | None = None  # the cloud node that reported
        self._revision = plan.number
        self._most_batches = float(plan.samples)  # each sample in a batch of its own
        self._expected = _reported_parts(plan.placement)
        self._busy_s: dict[str, float] = {}  # by part
        self._present: dict[str, float] = {}  # by key of a report: totals under the present revision
        self._samples: Counter[str] = Counter()  # by part, where reports say it
        self._last: set[str] = set()  # parts in reports that no other one follows
        self._complete = asyncio.Event()
        if not self._expected:
            self._complete.set()

    def take(self, frame: Frame) -> None:
        """Add a report."""
        samples = frame.report.get(SAMPLES, 0.0)
        for key, value in frame.report.items():
            if key in KEYS:
                self.add(key, value, int(samples))
                if frame.revision == self._revision:
                    self._present[key] = self._present.get(key, 0.0) + value
        if MORE not in frame.report and frame.revision == self._revision:
            self._last |= frame.report.keys()
        if "cloud_s" in frame.report and is_node_name(frame.source):
            self.cloud = frame.source
        if self._expected <= self._last:
            self._complete.set()

    def follow(self, plan: AttemptPlan) -> None:
        """Expect the last reports of a later revision of the plan."""
        self._revision, self._expected, self._last = plan.number, _reported_parts(plan.placement), set()
        self._present.clear()
        self._complete.clear()
        if not self._expected:
            self._complete.set()

    def add(self, part: str, busy_s: float, samples: int = 0) -> None:
        """Add a busy time of one part, or what the plan predicts for it."""
        self._busy_s[part] = self._busy_s.get(part, 0.0) + busy_s
        self._samples[part] += samples

    @property
    def measured(self) -> dict[str, float]:
        """Totals so far under the present revision of the plan, by key of a report."""
        return dict(self._present)

    async def arrive(self) -> None:
        """Wait until every stage of the placement has reported, for a limited time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPORTS_S):
                await self._complete.wait()

    def batches(self, part: str) -> float | None:
        """Sum of 1/n over the samples that a stage computed in batches of n; None: one by one."""
        found = min(self._busy_s.get(f"{part}{BATCHES}", 0.0), self._most_batches)
        return found or None

    def parts(self) -> Parts:
        """All busy times; in a session the means per sample."""
        means = {part: busy_s / max(1, self._samples[part]) for part, busy_s in self._busy_s.items()}
        return Parts(**{part: mean for part, mean in means.items() if part in Parts.model_fields})


def _reported_parts(placement: Placement) -> set[str]:
    """Names of the parts that other stages report."""
    parts: set[str] = set()
    if placement.uses_slot:
        parts.add("edge_s")
    if placement.uses_cloud:
        parts |= {"link2_s", "cloud_s"}
    if placement.edge is not None:
        parts.add("result_s")
    return parts
