"""The input of Algorithm 1 for one task: the edges that its device reaches, their searches, and the task's limits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from copy import copy
from typing import Final, NamedTuple

from bus.messages import TaskSubmitted
from bus.values import Objective, Role
from planner.search.codec_search import PathSearch
from planner.search.cost import NO_OVERHEADS, Overheads, PlatformRow
from planner.search.families import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE
from planner.search.ledger.accounts import DeviceAccount, EdgeAccount
from planner.search.waiting import NO_DEVIATIONS, Deviations

EVERY_FAMILY: Final = frozenset({DEVICE, DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE})


def families_of(tiers: Collection[Role]) -> frozenset[int]:
    """The families in which only these tiers compute. Without the device, only their cut1 = 0 remains."""
    needs = {
        DEVICE: {Role.DEVICE},
        DEVICE_EDGE: {Role.EDGE},
        DEVICE_CLOUD: {Role.CLOUD},
        ALL_THREE: {Role.EDGE, Role.CLOUD},
    }
    return frozenset(family for family, needed in needs.items() if needed <= set(tiers))


class EdgeOption(NamedTuple):
    """An edge that a task may use: its account, and the prepared search through it."""

    account: EdgeAccount
    search: PathSearch
    max_link1_bps: int  # min of the task's B1, the device's own limit and the edge's capacity
    max_link2_bps: int  # min of the task's B2 and the edge's capacity
    overheads: Overheads = NO_OVERHEADS  # latencies and overheads of a task of this device through this edge


class EdgeKind(NamedTuple):
    """Edges with the same platforms, overheads and caps. A result at full caps holds for all of them."""

    search: PathSearch
    max_link1_bps: int
    max_link2_bps: int
    overheads: Overheads
    computes: bool  # whether the edges have any slots
    accounts: tuple[EdgeAccount, ...]  # in order of name


class Reached:
    """The edges and searches that a device can use for one model. Valid until a node joins or is lost."""

    __slots__ = (
        "alone",
        "by_search",
        "device_search",
        "edges",
        "least_link1_bps",
        "least_link2_bps",
        "overheads",
        "row",
    )

    def __init__(
        self,
        row: PlatformRow,
        device_search: PathSearch,
        edges: Sequence[EdgeOption],
        *,
        alone: bool = True,
        overheads: Overheads = NO_OVERHEADS,
    ) -> None:
        self.row = row
        self.alone = alone
        self.device_search = device_search
        self.overheads = overheads  # of the device alone
        self.edges = edges  # without the caps of a task, in order of name
        self.least_link1_bps = min([option.max_link1_bps for option in edges], default=0)
        self.least_link2_bps = min([option.max_link2_bps for option in edges], default=0)
        self.by_search = grouped(
            [EdgeOption(option.account, option.search, 0, 0, option.overheads) for option in edges]
        )


class Request:
    """The input of Algorithm 1 for one task."""

    __slots__ = (
        "_edges",
        "_reached",
        "alone",
        "deviations",
        "device",
        "device_computes",
        "device_row",
        "device_search",
        "families",
        "input_bytes",
        "max_link1_bps",
        "max_link2_bps",
        "objective",
        "others",
        "overheads",
        "samples",
        "task_id",
    )

    def __init__(
        self,
        submitted: TaskSubmitted,
        reached: Reached,
        device: DeviceAccount | None,
        objective: Objective,
        deviations: Deviations = NO_DEVIATIONS,
        others: int = 0,
    ) -> None:
        self.task_id = submitted.task_id
        self.samples = submitted.samples
        self.input_bytes = submitted.input_bytes  # G(0); None: the model's own
        self.max_link1_bps = submitted.max_link1_bps  # the task's caps B1 and B2; None: no cap
        self.max_link2_bps = submitted.max_link2_bps
        self.device_row = reached.row
        self.device_search = reached.device_search  # without edge and cloud: w_0
        self.overheads = reached.overheads  # of the device alone
        tiers = submitted.tiers
        self.families = EVERY_FAMILY if tiers is None else families_of(tiers)
        self.device_computes = tiers is None or Role.DEVICE in tiers  # False: only cut1 = 0
        self.alone = reached.alone and DEVICE in self.families  # whether the device may run it alone
        self.device = device  # the device's reservations; None: it has none
        self.objective = objective
        self.others = others  # number of the device's other tasks that are running or scheduled
        self.deviations = deviations  # of the predictions for the tasks of edges and devices; empty: taken as exact
        self._reached = reached
        self._edges: Sequence[EdgeOption] | None = None

    @property
    def edges(self) -> Sequence[EdgeOption]:
        """The edges of E_i that are present, in order of name, with this task's caps."""
        if self._edges is None:
            self._edges = [self._capped(option) for option in self._reached.edges]
        return self._edges

    def edge(self, name: str | None) -> EdgeOption | None:
        """The edge with this name, with this task's caps, or None."""
        for option in self._reached.edges:
            if option.account.name == name:
                return self._capped(option)
        return None

    def through(self, option: EdgeOption | None) -> Request:
        """The same task with one edge, or none."""
        other = copy(self)
        other._edges = () if option is None else (option,)
        other._reached = Reached(
            self.device_row, self.device_search, other._edges, alone=self.alone, overheads=self.overheads
        )
        return other

    @property
    def uncapped(self) -> Sequence[EdgeOption]:
        """The edges of E_i that are present, in order of name, without this task's caps."""
        return self._reached.edges

    def among(self, edges: Sequence[EdgeOption], device: DeviceAccount | None) -> Request:
        """The same task with other views of its edges (without its caps) and its device."""
        other = copy(self)
        other._edges, other.device = None, device
        other._reached = Reached(self.device_row, self.device_search, edges, alone=self.alone, overheads=self.overheads)
        return other

    def rest(self, samples: int) -> Request:
        """The request for the last `samples` samples of this task, which is running."""
        other = copy(self)
        other.samples = samples
        other.others = max(0, self.others - 1)  # the task itself counts, too
        return other

    def kinds(self) -> Sequence[EdgeKind]:
        """The edges, grouped by platforms and caps."""
        cap1, cap2, reached = self.max_link1_bps, self.max_link2_bps, self._reached
        if cap1 is None or cap2 is None or cap1 > reached.least_link1_bps or cap2 > reached.least_link2_bps:
            return grouped(self.edges)
        # No edge has a lower limit than the task's caps, so all edges of one search share these caps.
        return [
            EdgeKind(search, cap1, cap2, overheads, computes, accounts)
            for search, _, _, overheads, computes, accounts in reached.by_search
        ]

    def _capped(self, option: EdgeOption) -> EdgeOption:
        account, search, b1, b2, overheads = option
        cap1, cap2 = self.max_link1_bps, self.max_link2_bps
        return EdgeOption(
            account,
            search,
            b1 if cap1 is None or b1 < cap1 else cap1,
            b2 if cap2 is None or b2 < cap2 else cap2,
            overheads,
        )


def grouped(edges: Iterable[EdgeOption]) -> list[EdgeKind]:
    """Group edges that have the same search, caps and overheads, and slots or none."""
    kinds: dict[tuple[PathSearch, int, int, Overheads, bool], list[EdgeAccount]] = {}
    for account, search, b1, b2, overheads in edges:
        kinds.setdefault((search, b1, b2, overheads, account.slots >= 1), []).append(account)
    return [EdgeKind(*kind, tuple(accounts)) for kind, accounts in kinds.items()]
