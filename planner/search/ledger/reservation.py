"""What the placement of one task holds on its edge and its device.

Bandwidth is in integer bits per second, so a release gives back exactly the reserved amount and sums do not drift. A session
(an open-ended task) holds its grants without an end, and a `Load` instead of a slot or its device's processor.
"""

from __future__ import annotations

from typing import Final, NamedTuple

FOREVER: Final = float("inf")
MOVES_BORNE: Final = 10
"""Number of moves to a later start after which no other task is put before a scheduled task on its edge."""
SHORTEST_S: Final = 1e-6
"""Minimum length of a reservation, so that every running task occupies a visible interval."""
LOAD_UNITS: Final = 1024
"""Units of load in one slot, or in one device. Loads are whole units, so that their sums are exact."""

Amounts = tuple[int, int, int]
"""Slots, link 1, link 2."""


def bookable(capacity: int) -> int:
    """The part of a capacity (an edge's or a device's load, or a link) that sessions may hold: 80 %."""
    return capacity * 4 // 5


class Load(NamedTuple):
    """What a session books of the computing time of its nodes, in units."""

    device: int
    edge: int


class Rank(NamedTuple):
    """The place of a scheduled task in the line of waiting tasks."""

    admitted_s: float  # ledger time, less the head start
    head_start_s: float  # of its priority
    waits_as_s: float  # as if admitted at this ledger time: smaller goes first


class Reservation:
    """The resources that one placement holds in [start_s, end_s): a slot or none, bandwidth on both links, and its device.

    That of a session has a load instead of slot and device, and no end.
    """

    __slots__ = (
        "computes",
        "device",
        "edge",
        "end_s",
        "length_s",
        "link1_bps",
        "link2_bps",
        "load",
        "moves",
        "rank",
        "running",
        "sender",
        "seq",
        "slots",
        "start_s",
        "task_id",
    )

    def __init__(
        self,
        task_id: str,
        seq: int,
        edge: str | None,
        device: str | None,
        start_s: float,
        delay_s: float,
        slots: int,
        link1_bps: int,
        link2_bps: int,
        computes: bool = True,
        load: Load | None = None,
    ) -> None:
        # Created once per placement on the hot path, so the values come one by one instead of as an options value.
        self.task_id = task_id
        self.seq = seq  # order of admission; breaks ties between equal starts
        self.edge = edge  # None: the device alone
        self.sender = device  # the device that submitted the task
        self.computes = computes  # whether the device runs layers; False: it only sends its input
        self.device = device  # the device on which the ledger books it; None: it holds nothing on its device
        self.start_s = start_s  # ledger time
        self.length_s = length_s = delay_s if delay_s > SHORTEST_S else SHORTEST_S  # w; FOREVER: a session
        self.end_s = start_s + length_s  # predicted end; an overrun moves it to a later time
        self.slots = slots  # 0 or 1
        self.link1_bps = link1_bps
        self.link2_bps = link2_bps
        self.running = False
        self.moves = 0  # number of moves to a later start
        self.load = load  # of a session
        self.rank: Rank | None = None  # None: it is never overtaken

    @property
    def first_served(self) -> bool:
        """Whether no other task may be put before it on its edge."""
        return self.moves >= MOVES_BORNE and not self.running

    @property
    def key(self) -> tuple[float, int]:
        """The sort key of scheduled tasks."""
        return self.start_s, self.seq

    def __repr__(self) -> str:
        state = "running" if self.running else "scheduled"
        return (
            f"<{self.task_id} {state} [{self.start_s:.6f}, {self.end_s:.6f}) edge={self.edge} device={self.device} "
            f"{self.slots} slot {self.link1_bps}/{self.link2_bps} bps>"
        )
