"""The four families of placements of Section IV-A: which stations and links a placement uses."""

from __future__ import annotations

from typing import Final

DEVICE: Final = 0
DEVICE_EDGE: Final = 1
DEVICE_CLOUD: Final = 2
ALL_THREE: Final = 3
"""w_0, w_j, w_(j+m), w_(j+2m). In `DEVICE_CLOUD` the edge only relays."""


def family_of(cut1: int, cut2: int, layers: int) -> int:
    """The family of a pair of cuts, by x, y, z of (17)-(19)."""
    if cut1 == layers:
        return DEVICE
    if cut2 == layers:
        return DEVICE_EDGE
    return DEVICE_CLOUD if cut1 == cut2 else ALL_THREE
