"""The reports of an edge or cloud stage: what it measured of one attempt, for the attempt's device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from bus import topics
from bus.errors import BusError
from bus.frames import MORE, SAMPLES, AttemptPlan, Frame, encode_frame
from bus.port import Bus
from stages.node import Node

FIRST_REPORT_S, REPORT_EVERY_S = 0.1, 2.0
"""A session's first report, and the largest interval between two."""

LEAST_PAUSE_S = 0.05
"""Least interval between two reports of a task of several routes."""


class StageReporter:
    """Sends what is new since the last report. Reports are not shaped, because they are not task data."""

    def __init__(self, node: Node, plan: AttemptPlan, bus: Bus, measured: Callable[[], Mapping[str, float]]) -> None:
        """`measured` returns totals since the attempt began, by key of a report."""
        self._node, self._plan, self._bus, self._measured = node, plan, bus, measured
        self._reported: dict[str, float] = {}  # totals

    async def report(self, *, more: bool = False) -> bool:
        """Send a report, and return whether the bus has it. `more`: another one follows."""
        news = {name: total - self._reported.get(name, 0.0) for name, total in self._measured().items()}
        self._add(news, 1.0)  # before the report is sent, because another one may be sent meanwhile
        plan, node = self._plan, self._node
        content = news | ({MORE: 1.0} if more else {})
        frame = Frame("report", plan.task_id, plan.attempt, node.settings.name, report=content, revision=plan.number)
        try:
            await self._bus.send(topics.RESULTS, encode_frame(frame), key=plan.device)
        except BusError as error:
            node.log.warning("report not sent", task=plan.task_id, error=str(error))
            self._add(news, -1.0)
            return False
        return True

    def _add(self, news: Mapping[str, float], sign: float) -> None:
        for name, value in news.items():
            self._reported[name] = self._reported.get(name, 0.0) + sign * value

    async def report_session(self) -> None:
        """Report a session until cancelled, where samples came: soon at first, since a session may be short."""
        pause_s = FIRST_REPORT_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = min(REPORT_EVERY_S, 2.0 * pause_s)
            if self._measured()[SAMPLES] > self._reported.get(SAMPLES, 0.0):
                await self.report()

    async def report_at(self, due: asyncio.Event) -> None:
        """Report a task whenever `due` is set, until cancelled."""
        while True:
            await due.wait()
            due.clear()
            await self.report(more=True)
            await asyncio.sleep(LEAST_PAUSE_S)
