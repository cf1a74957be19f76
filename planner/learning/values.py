"""The estimates of nodes, paths and links as values: what is assumed before anything is observed, and how they age.

**Stale estimates.** The planner does not choose a slow node or path, so it gets no new measurement of it. An estimate
without a new observation becomes stale after some tasks and some time. Each record that says so moves the prediction
one step towards the prior. When the stale node or path becomes the best choice, one task tries it. Its placement
removes all steps, so other tasks do not use the node until the result is known. A retry that confirms the estimate
doubles the time to the next retry. When a node measures itself to be faster again (`SpeedEstimate`), its estimates are stale
at once.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from bus.values import Kind
from planner.learning.estimates import Line, Prior, differences, rounded

RETRY_TASKS: Final = 20
"""An estimate becomes stale after this many tasks of the region without a new observation of its own."""
RETRY_S: Final = 60.0
"""It also needs this much ledger time to become stale."""
EARLY_TASKS: Final = 6
EARLY_S: Final = 2.0
"""The two limits for the first retry of an estimate with one observation. The first task on a node is often slow."""
EARLY_STEPS: Final = 3
"""Steps towards the prior that such an estimate takes at its first retry."""
JUMPED_S: Final = 10.0
"""Replaces `RETRY_S` for an estimate that became much worse from one task to the next: the cause may end soon."""
STEP: Final = 0.7
"""The share of its distance from the prior that a prediction keeps in each step."""
_LONGEST: Final = 6  # confirmed retries that double the time to the next one; later ones do not
MOST_STALE: Final = 12
"""Steps after which the prediction equals the prior."""

NODE_PRIOR: Final = Prior(
    Line(1.0, 0.0),
    0.5,  # deviation of the factor
    1e-3,  # deviation of the overhead of a sample, in seconds
    Line(0.02, 0.0),
    Line(1e4, 1e3),
)
NO_PATH: Final = Prior(
    Line(0.0, 0.0),
    1e-2,  # deviation of the overhead of a task, in seconds
    1e-3,  # deviation of the overhead of a sample, in seconds
    Line(-1e3, -1e2),
    Line(1e6, 1e4),
)

NodeKey = tuple[str, str, bool]  # node, model, whether a device runs the whole model
PathKey = tuple[str, str, Kind]  # device, edge or "", one of the four families
LinkKey = tuple[int, str, str]  # link, device or "", edge
SlowTransfers = tuple[tuple[int, int], ...]
"""What a link was granted and carried in its last transfers, oldest first, if it carried less in all of them."""

FAMILIES: Final = (Kind.DEVICE, Kind.DEVICE_EDGE, Kind.DEVICE_CLOUD, Kind.DEVICE_EDGE_CLOUD)
"""The kinds that name the families of placements, by number of the family."""


class Age(NamedTuple):
    """How fresh an estimate is."""

    at_s: float  # ledger time of the last observation, step or retry
    tasks: int  # tasks that had taught the region by then
    steps: int = 0  # steps towards the prior
    confirmed: int = 0  # retries in a row that confirmed the estimate
    tried: bool = False  # whether a retry is under way
    jumped: bool = False  # whether it has got much worse from one task to the next

    def early(self, observations: int) -> bool:
        """Whether it rests on a single observation that no retry has confirmed."""
        return observations == 1 and not self.steps and not self.confirmed

    def due(self, observations: int) -> tuple[int, float]:
        """Count of tasks and ledger time from which the estimate is stale."""
        if self.early(observations):
            return self.tasks + EARLY_TASKS, self.at_s + EARLY_S
        factor = 1 << min(self.confirmed, _LONGEST)
        return self.tasks + RETRY_TASKS * factor, self.at_s + (JUMPED_S if self.jumped else RETRY_S) * factor

    def share(self) -> float:
        """The share of the distance from the prior that counts."""
        if not self.steps:
            return 1.0
        return 0.0 if self.jumped or self.steps >= MOST_STALE else STEP**self.steps


class NodeEstimate(NamedTuple):
    """A model on a node."""

    observed: tuple[tuple[float, int, float], ...]  # time by the profile, samples, busy time; oldest first
    line: Line  # factor, overhead of a sample
    whole_s: float  # time of one sample by the profile; another profile makes the estimate void
    age: Age

    @property
    def used(self) -> Line:
        """The factor and the overhead that predictions use."""
        return towards(self.line, NODE_PRIOR.line, self.age)

    def differences(self) -> list[float]:
        """See `estimates.differences`; without the oldest observation, as the first task on a node is often slow."""
        a, b = self.line
        return differences((busy_s, a * profile_s + b * samples) for profile_s, samples, busy_s in self.observed[1:])


class PathEstimate(NamedTuple):
    """A device, an edge or none, and a family of placements."""

    observed: tuple[tuple[int, float, float, float], ...]  # samples, delay, gap, error; oldest first
    line: Line  # overhead of a task, overhead of a sample
    deviation: float
    age: Age


class SpeedEstimate(NamedTuple):
    """What a node without work measured of a model."""

    factor: float  # relative to the profile
    whole_s: float  # time of one sample by the profile; another profile makes it void


class LinkEstimate(NamedTuple):
    """A link."""

    latency_s: float  # one way
    bps: int | None  # limit of grants; None: as announced
    at_s: float  # ledger time of the last change of the limit


def towards(line: Line, prior: Line, age: Age) -> Line:
    """The estimate, moved towards the prior as far as it is stale, and only where it is the worse one."""
    share = age.share()
    if share == 1.0:
        return line
    a = min(line.a, rounded(prior.a + share * (line.a - prior.a)))
    return Line(a, min(line.b, rounded(prior.b + share * (line.b - prior.b))))


def family_kind(kind: Kind) -> Kind:
    """The kind that names the family of a placement's kind."""
    return _FAMILY_OF.get(kind, kind)


_FAMILY_OF: Final = {
    Kind.EDGE: Kind.DEVICE_EDGE,
    Kind.CLOUD: Kind.DEVICE_CLOUD,
    Kind.EDGE_CLOUD: Kind.DEVICE_EDGE_CLOUD,
}
