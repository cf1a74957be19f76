"""New shares of a task's routes from what its stages measure.

Each station's busy time is compared with the one that the plan predicts for the same samples. The ratio scales the plan's
times of all routes at that station, and the shares are solved again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from bus.frames import PREDICTED
from bus.routes.shares import solve_shares
from bus.values import DELAY_PARTS, Route, StationSeconds
from stages.devices.sample_queue import SampleQueue

SOLVE_EVERY: Final = 25
"""Results after which the shares are solved again."""

TRUST: Final = 0.5
"""Weight of the last measurement against earlier ones. The first one replaces the plan's prediction."""

LEAST_SHARE: Final = 0.5
"""A measurement counts if it covers this share of a sample's time at the station."""

_PART_OF: Final = (*DELAY_PARTS, DELAY_PARTS[-1])  # of the seven stations: the result crosses two links


class ShareFeedback:
    """Changes the shares in the queue of one attempt."""

    def __init__(
        self, routes: Sequence[Route], queue: SampleQueue, measured: Callable[[], Mapping[str, float]]
    ) -> None:
        """`measured` returns totals: for each part busy seconds, and what the plan predicts. What it returns now is of an
        earlier plan of the attempt, and does not count.
        """
        self._planned = [route.stations_s for route in routes]
        self._queue, self._measured = queue, measured
        self._results = 0
        self._scales: dict[str, float] = {}  # measured over planned times, by part
        before = measured()
        self._seen = {part: _totals(before, part) for part in DELAY_PARTS}  # at the last measurement

    def result(self) -> None:
        """A result came: after some, the shares are solved again."""
        self._results += 1
        if self._results % SOLVE_EVERY or not self._queue:
            return
        self._learn(self._measured())
        scales = [self._scales.get(part, 1.0) for part in _PART_OF]
        stations_s = [_scaled(planned_s, scales) for planned_s in self._planned]
        best = solve_shares([sum(route_s) for route_s in stations_s], stations_s, len(self._queue))
        self._queue.change(stations_s, best.shares)

    def _learn(self, measured: Mapping[str, float]) -> None:
        for number, part in enumerate(DELAY_PARTS):
            (busy_s, predicted_s), seen_s = _totals(measured, part), self._seen[part]
            longest_s = max(stations_s[number] for stations_s in self._planned)
            if longest_s and max(busy_s - seen_s[0], predicted_s - seen_s[1]) >= LEAST_SHARE * longest_s:
                self._seen[part] = busy_s, predicted_s
                ratio = (busy_s - seen_s[0]) / max(predicted_s - seen_s[1], 1e-9)
                trust = TRUST if part in self._scales else 1.0
                self._scales[part] = (1.0 - trust) * self._scales.get(part, 1.0) + trust * ratio


def _totals(measured: Mapping[str, float], part: str) -> tuple[float, float]:
    """Busy and predicted seconds of a part."""
    return measured.get(f"{part}_s", 0.0), measured.get(f"{part}{PREDICTED}", 0.0)


def _scaled(stations_s: StationSeconds, scales: Sequence[float]) -> StationSeconds:
    s1, s2, s3, s4, s5, s6b, s6a = (s * scale for s, scale in zip(stations_s, scales, strict=True))
    return s1, s2, s3, s4, s5, s6b, s6a
