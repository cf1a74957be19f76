"""Regret benchmark (`deepar loadgen bench regret`): the cells, the networks that they play, and what is computed.

A *cell* is a network, a model and a number of samples. In each cell the tasks of the learning planner alternate with the same
tasks under every fixed policy (`loadgen.bench.choices.rounds`), so that a drift of the machine falls on all alike.

* regret: mean delay of `deepar` over the mean delay of the best fixed policy
* error: median of |measured / predicted - 1| over the tasks of `deepar`

`_first` is over the first five tasks, while the planner still learns; the other values are over the later ones. `_s` is the
same difference in seconds, `_se` the standard error of a regret. A delay counts from the device's start of the task to its
last result, on the device's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import hypot, sqrt
from statistics import fmean, median, stdev
from typing import Any, Final

from bus.errors import unknown_name

FIRST: Final = 5
"""Number of tasks that count as the first ones: the planner has hardly learned yet."""
LATER: Final = slice(FIRST, None)
"""The other tasks."""

LEARNING: Final = "deepar"
FIXED: Final = ("device-only", "edge-only", "cloud-only", "neurosurgeon")
"""The fixed policies: they decide by the measured profiles and the declared bandwidths, and never learn."""

REGRET_AIM, REGRET_S_AIM = 1.05, 0.003
ERROR_AIM, ERROR_S_AIM = 0.15, 0.005
REGRET_FIRST_AIM = 1.3


@dataclass(frozen=True, slots=True)
class Network:
    """The links of a cell, in the words of the stages' options."""

    name: str
    link1: str  # bandwidth between device and edge
    link1_latency: str  # one way
    link2: str  # bandwidth between edge and cloud
    link2_latency: str  # one way


NETWORKS: Final = (
    # The values are typical ones, rounded, and not measurements of ours.
    # Gigabit Ethernet in one building: a round trip of about half a millisecond. The cloud is a data centre of the same city.
    Network("lan", "1Gbps", "0.2ms", "500Mbps", "2.5ms"),
    # Wi-Fi 5, shared with others: 80 Mbit/s of goodput and a round trip of 4 ms. The cloud is behind an office line.
    Network("wifi", "80Mbps", "2ms", "100Mbps", "10ms"),
    # LTE upload at good reception: 12 Mbit/s and a round trip of 50 ms. The edge is at the operator, the cloud further away.
    Network("lte", "12Mbps", "25ms", "100Mbps", "10ms"),
)
MODELS: Final = ("lenet", "alexnet", "mobilenet")
SAMPLES: Final = (1, 10, 100)


@dataclass(frozen=True, slots=True)
class Cell:
    """One case of the benchmark."""

    network: Network
    model: str
    samples: int

    def __str__(self) -> str:
        return f"{self.network.name} {self.model} x{self.samples}"


def every_cell(
    networks: Sequence[str] | None = None, models: Sequence[str] | None = None, samples: Sequence[int] | None = None
) -> list[Cell]:
    """All combinations; None stands for all values of the benchmark. Raises `UnknownNameError` for an unknown network."""
    known = {network.name: network for network in NETWORKS}
    for name in networks or ():
        if name not in known:
            raise unknown_name("network", name, known)
    return [
        Cell(known[network], model, count)
        for network in networks or known
        for model in models or MODELS
        for count in samples or SAMPLES
    ]


QUICK: Final = (("lan", "lenet", 10), ("wifi", "mobilenet", 10), ("lte", "mobilenet", 10), ("wifi", "alexnet", 1))
"""The cells of `--quick`."""


def quick_cells() -> list[Cell]:
    """The cells of `--quick`."""
    return [cell for network, model, count in QUICK for cell in every_cell([network], [model], [count])]


@dataclass(frozen=True, slots=True)
class Run:
    """One finished task."""

    delay_s: float  # from the device's start to its last result
    ended_s: float  # from due to ended
    predicted_s: float  # the delay that the planner predicted
    where: str  # the placement in words


HOPELESS_S: Final = 0.010
"""Difference below which no policy is hopeless: the first task on a node may take some milliseconds longer."""


def drop_hopeless(runs: Mapping[str, Sequence[Run]], factor: float) -> set[str]:
    """The fixed policies whose fastest task took more than `factor` times the mean of the best one, and `HOPELESS_S` more.

    They are not run again in a cell: the mean of the best policy does not depend on them.
    """
    fixed = {policy: runs[policy] for policy in FIXED if runs.get(policy)}
    best_s = min(fmean(run.delay_s for run in tasks) for tasks in fixed.values())
    limit_s = factor * best_s + HOPELESS_S
    return {policy for policy, tasks in fixed.items() if min(run.delay_s for run in tasks) > limit_s}


@dataclass(frozen=True, slots=True)
class _Means:
    """Mean delays over a part of the tasks: of `LEARNING` and of the best fixed policy, with their standard errors."""

    ours_s: float
    ours_se_s: float
    best_s: float
    best_se_s: float
    best: str  # the fixed policy with the least mean

    @classmethod
    def of(cls, runs: Mapping[str, Sequence[Run]], part: slice) -> _Means:
        """The means over a part of each policy's tasks; over all of its tasks where that part is empty."""
        delays_s = {policy: [run.delay_s for run in tasks[part] or tasks] for policy, tasks in runs.items() if tasks}
        means_s = {policy: fmean(delays_s[policy]) for policy in FIXED if policy in delays_s}
        best = min(means_s, key=means_s.__getitem__)
        ours_s = fmean(delays_s[LEARNING])
        return cls(ours_s, _standard_error(delays_s[LEARNING]), means_s[best], _standard_error(delays_s[best]), best)

    @property
    def regret(self) -> float:
        return self.ours_s / self.best_s

    @property
    def regret_se(self) -> float:
        return self.regret * hypot(self.ours_se_s / self.ours_s, self.best_se_s / self.best_s)

    @property
    def known(self) -> bool:
        """Whether the tasks show that the aim is reached or missed: it is two standard errors away."""
        over_s = self.ours_s - max(REGRET_AIM * self.best_s, self.best_s + REGRET_S_AIM)
        return abs(over_s) >= 2.0 * hypot(self.ours_se_s, self.best_se_s)


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def known(runs: Mapping[str, Sequence[Run]]) -> bool:
    """Whether the tasks show that the aim of `regret` is reached or missed; more tasks would hardly change that."""
    return _Means.of(runs, LATER).known


def judge(cell: Cell, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """The row of a cell. `runs` has the tasks of `LEARNING` and of each policy of `FIXED`, in the order of the rounds."""
    ours = runs[LEARNING]
    first, later = ours[:FIRST], ours[LATER] or ours
    means, means_first = _Means.of(runs, LATER), _Means.of(runs, slice(FIRST))
    return {
        "network": cell.network.name,
        "model": cell.model,
        "samples": cell.samples,
        "regret_first": means_first.regret,
        "regret_first_se": means_first.regret_se,
        "regret_first_s": means_first.ours_s - means_first.best_s,
        "regret": means.regret,
        "regret_se": means.regret_se,
        "regret_s": means.ours_s - means.best_s,
        "error_first": median(abs(run.delay_s / run.predicted_s - 1.0) for run in first),
        "error": median(abs(run.delay_s / run.predicted_s - 1.0) for run in later),
        "error_s": median(abs(run.delay_s - run.predicted_s) for run in later),
        "best_policy": means.best,
        "tasks": len(ours),
    }


def policy_rows(cell: Cell, runs: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """What each policy did in a cell: the means over its tasks after the first five, where it has as many."""
    rows = []
    for policy, tasks in runs.items():
        later = tasks[LATER] or tasks
        rows.append(
            {
                "network": cell.network.name,
                "model": cell.model,
                "samples": cell.samples,
                "policy": policy,
                "tasks": len(tasks),
                "mean_delay_s": fmean(run.delay_s for run in later),
                "mean_ended_s": fmean(run.ended_s for run in later),
                "mean_predicted_s": fmean(run.predicted_s for run in later),
                "first_delay_s": fmean(run.delay_s for run in tasks[:FIRST]),
                "where": later[-1].where,
            }
        )
    return rows


def task_rows(cell: Cell, runs: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """Every task of a cell, by policy and round."""
    name = {"network": cell.network.name, "model": cell.model, "samples": cell.samples}
    return [name | {"policy": policy} | asdict(run) for policy, tasks in runs.items() for run in tasks]


def aims(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The aims of every cell."""
    found = []
    for row in rows:
        cell = f"{row['network']} {row['model']} x{row['samples']}"
        reached = {
            "regret": (REGRET_AIM, row["regret"] <= REGRET_AIM or row["regret_s"] <= REGRET_S_AIM),
            "error": (ERROR_AIM, row["error"] <= ERROR_AIM or row["error_s"] <= ERROR_S_AIM),
            "regret_first": (REGRET_FIRST_AIM, row["regret_first"] <= REGRET_FIRST_AIM),
        }
        found += [
            {"name": f"{cell}: {key}", "value": round(row[key], 3), "aim": aim, "pass": bool(passed)}
            for key, (aim, passed) in reached.items()
        ]
    return found
