"""A policy of one's own: raw inputs never leave the device, and the cloud is used only where it pays well.

PYTHONPATH=docs/examples deepar planner --policy private_first:PrivateFirst
"""

from planner.search.algorithm1 import Algorithm
from planner.search.families import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE
from planner.search.placements import Choice

NEAR = frozenset({DEVICE, DEVICE_EDGE})
FAR = frozenset({DEVICE_CLOUD, ALL_THREE})


class PrivateFirst:
    """Decides for one task at a time; a pure function of the ledger that it is shown."""

    name = "private-first"

    def __init__(self, gain: float = 2.0) -> None:
        self.gain = gain  # how many times sooner the cloud must be done

    def place(self, algorithm: Algorithm) -> Choice | None:
        """The best of device and edge, unless one with the cloud ends `gain` times sooner."""
        near = algorithm.best(NEAR)
        if near is not None and near.family == DEVICE_EDGE and near.cut1 == 0:
            near = algorithm.best({DEVICE})  # cut1 = 0 would send the input itself
        far = algorithm.best(FAR)
        if far is None or far.cut1 == 0:
            return near
        if near is None or self.ends(far, algorithm) * self.gain < self.ends(near, algorithm):
            return far
        return near

    @staticmethod
    def ends(choice: Choice, algorithm: Algorithm) -> float:
        """Seconds from now to its end."""
        return choice.start_s - algorithm.now + choice.delay_s
