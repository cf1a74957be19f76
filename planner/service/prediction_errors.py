"""The errors of the last predictions: how far measured delays were from predicted ones."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

LAST: Final = 50
"""Number of completed tasks that a median covers."""


class PredictionErrors:
    """The relative errors of the last tasks."""

    def __init__(self) -> None:
        self._errors: deque[float] = deque(maxlen=LAST)

    def observe(self, measured_s: float, predicted_s: float) -> None:
        """Add one completed task; a prediction of 0 s has no relative error and is left out."""
        if predicted_s > 0:
            self._errors.append(abs(measured_s / predicted_s - 1.0))

    def __len__(self) -> int:
        """Number of tasks that the median covers."""
        return len(self._errors)

    @property
    def median(self) -> float | None:
        """Median of |measured / predicted - 1|; None before the first completed task."""
        return median(self._errors) if self._errors else None


__all__ = ["LAST", "PredictionErrors"]
