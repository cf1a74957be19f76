"""The line of waiting tasks: who may be put before whom on an edge or a device.

A task that cannot start at once is ranked by the time of its admission, corrected twice:

* **Priority**: a task of priority p counts as admitted `HEAD_START_S`/p earlier, so 1 is the most urgent; without a priority
  it has no head start.
* **Fairness** (`CoreOptions.fair`): it counts as admitted later by what its device has waiting on that edge already: the sum
  of their delays, each times the largest share of slots or of a link that the task holds, at most `LONGEST_QUEUED_S`. So
  devices take turns on an edge, in proportion to what they use of it.

Both corrections are bounded, so a task is overtaken only by tasks that are admitted at most two minutes after it. Tasks of
one device keep their order, unless one has the higher priority. Running tasks, sessions, and tasks that go first because they
were moved too often (`planner.search.ledger.reservation.MOVES_BORNE`) are never overtaken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from planner.core.region.records import Task
from planner.search.ledger.accounts import EdgeAccount
from planner.search.ledger.reservation import Rank, Reservation
from planner.search.request import Request

LONGEST_QUEUED_S: Final = 60.0
"""The longest time by which a task counts as admitted later because its device has others waiting."""


class Ahead(NamedTuple):
    """A task's input to Algorithm 1 without the scheduled tasks that it may overtake."""

    request: Request
    rank_s: dict[str | None, float]  # by edge; None: on the device alone
    overtaken: dict[str | None, int]  # number of tasks that are left out

    def counts(self, edge: str | None, device_used: bool) -> int:
        """The number of tasks that a placement overtakes."""
        on_edge = 0 if edge is None else self.overtaken[edge]
        return on_edge + (self.overtaken[None] if device_used else 0)


def ahead(task: Task, request: Request, *, fair: bool) -> Ahead:
    """What a task finds if it is put before all scheduled tasks that rank behind it."""
    mine, sender = task.rank(None), task.submitted.device
    ranks: dict[str | None, float] = {None: mine.waits_as_s}
    overtaken: dict[str | None, int] = {None: 0}
    edges = []
    for option in request.uncapped:
        account = option.account
        rank = mine
        if fair:
            queued_s = sum(_cost_s(r, account) for *_, r in account.queue if _before(r, mine, sender))
            rank = mine._replace(waits_as_s=mine.waits_as_s + min(queued_s, LONGEST_QUEUED_S))
        behind = [r for *_, r in account.queue if _overtakes(rank, sender, r)]
        ranks[account.name], overtaken[account.name] = rank.waits_as_s, len(behind)
        edges.append(option._replace(account=account.without(behind)) if behind else option)
    device = request.device
    if device is not None:
        behind = [r for *_, r in device.queue if _overtakes(mine, sender, r)]
        overtaken[None] = len(behind)
        device = device.without(behind) if behind else device
    return Ahead(request.among(edges, device), ranks, overtaken)


def _before(r: Reservation, mine: Rank, sender: str) -> bool:
    """Whether a scheduled task is of the same device and stays before the task."""
    return r.sender == sender and r.load is None and not _overtakes(mine, sender, r)


def _overtakes(mine: Rank, sender: str, r: Reservation) -> bool:
    """Whether a task with this rank may be put before a scheduled one."""
    other = r.rank
    if other is None or r.load is not None or r.first_served:
        return False
    if r.sender == sender:
        return mine.head_start_s > other.head_start_s and mine.admitted_s < other.admitted_s
    return mine.waits_as_s < other.waits_as_s


def _cost_s(r: Reservation, account: EdgeAccount) -> float:
    """The delay of a task times the largest share of its edge that it holds."""
    shares: Sequence[tuple[int, int]] = (
        (r.slots, account.slots),
        (r.link1_bps, account.link1_capacity_bps),
        (r.link2_bps, account.link2_capacity_bps),
    )
    return r.length_s * max(held / capacity if capacity else 0.0 for held, capacity in shares)
