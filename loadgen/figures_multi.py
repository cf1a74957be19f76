"""Figure 4: many tasks at once. The paper's mean delay over the number of devices, with spread, and its
claims beside ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bus.values import Objective
from loadgen import claims as rules
from loadgen import plots
from loadgen.cells import Cell, run_cells
from loadgen.claims import Claim, Reductions
from loadgen.figure_result import FigureOptions, FigureResult, finish, write_csv
from loadgen.metrics import half_width_95
from loadgen.scenario import Scenario

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEVICES = (20, 40, 60, 80)
"""The x axis of Figure 4."""

SEQUENTIAL = "deepar (sequential)"
"""What `deepar` is called beside itself when the figure is made for the other objective."""

NOTES = (
    (
        "arrivals uniform in the interval, one task a device; only G(0), N, the caps and the edges are drawn, other sizes "
        "are the model's"
    ),
    "left: one random reachable edge a device (claims); middle: two; right: every edge. Bars: mean over seeds, 95 % interval",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """What tells (a), (b) and (c) apart."""

    figure: str
    edges: int
    within_s: float
    title: str


SETTINGS = {
    "fig4a": Setting("fig4a", 10, 300.0, "10 edges, arrivals within 300 s"),
    "fig4b": Setting("fig4b", 10, 50.0, "10 edges, arrivals within 50 s"),
    "fig4c": Setting("fig4c", 40, 50.0, "40 edges, arrivals within 50 s"),
}


def make(name: str, options: FigureOptions) -> FigureResult:
    """Run and draw `fig4a`, `fig4b` or `fig4c`: CSV (a row a run), PNG, SVG."""
    setting = SETTINGS[name]
    cells = _cells(setting, options)
    rows = run_cells(cells, jobs=options.jobs, cluster=options.cluster, progress=options.tell(name))
    table = _Table(rows, options.seeds, options.reachable)
    claims = tuple(_claims(setting, table, options))
    fig, grid = plots.figure(11.0, 3.7, 1, len(options.reachable), sharey=True, squeeze=False)
    axes = grid[0]
    for panel, reachable in zip(axes, options.reachable, strict=True):
        _draw(panel, table, reachable)
    axes[0].set_ylabel("mean delay of a task (s)")
    axes[0].set_ylim(bottom=0)
    title = f"Fig. 4({name[-1]}): {setting.title}"
    if options.objective is not Objective.SEQUENTIAL:
        title += f"; {options.objective.value} objective, streaming stages"
    finish(fig, title, claims, NOTES, legend=axes[0])
    stem = options.out / f"{name}{options.suffix}"
    files = [write_csv(stem.with_suffix(".csv"), rows), *plots.save(fig, stem)]
    return FigureResult(name, options.seeds, claims, tuple(table.series()), tuple(files), NOTES)


def _cells(setting: Setting, options: FigureOptions) -> list[Cell]:
    cells = []
    columns = [(policy, policy, options.objective) for policy in options.policies]
    if options.objective is not Objective.SEQUENTIAL and "deepar" in options.policies:
        columns.append((SEQUENTIAL, "deepar", Objective.SEQUENTIAL))
    for reachable in options.reachable:
        for devices in DEVICES:
            for column, policy, objective in columns:
                for seed in range(options.seeds):
                    scenario = Scenario(
                        name=setting.figure,
                        devices=devices,
                        edges=setting.edges,
                        within_s=setting.within_s,
                        reachable=reachable,
                        policy=policy,
                        objective=objective,
                        profile=options.profile,
                    )
                    labels = {"reachable": reachable or "all", "devices": devices, "policy": column}
                    cells.append(Cell(scenario, seed, labels))
    return cells


class _Table:
    """Mean delays by (reachable, policy), as arrays of shape (seeds, x)."""

    def __init__(self, rows: list[dict[str, Any]], seeds: int, reachable_edges: tuple[int | None, ...]) -> None:
        self.rows = rows
        self.reachable = reachable_edges
        self.policies = list(dict.fromkeys(row["policy"] for row in rows))
        self.means: dict[tuple[str, str], np.ndarray] = {}
        self.waited: dict[tuple[str, str], float] = {}
        for reachable in self.reachable:
            for policy in self.policies:
                mine = [r for r in rows if r["policy"] == policy and r["reachable"] == (reachable or "all")]
                mine.sort(key=lambda row: (row["seed"], row["devices"]))
                values = np.array([row["mean_delay_s"] for row in mine], dtype=float)
                self.means[_key(reachable, policy)] = values.reshape(seeds, len(DEVICES))
                self.waited[_key(reachable, policy)] = float(np.mean([row["delayed_share"] for row in mine]))

    def of(self, policy: str, reachable: int | None = 1) -> np.ndarray:
        return self.means[_key(reachable, policy)]

    @property
    def judged(self) -> int | None:
        """E_i of the claims."""
        return self.reachable[0]

    def has(self, *policies: str) -> bool:
        return all(policy in self.policies for policy in policies)

    def series(self) -> list[dict[str, Any]]:
        found = []
        for reachable in self.reachable:
            for policy in self.policies:
                values = self.of(policy, reachable)
                for index, devices in enumerate(DEVICES):
                    column = values[:, index]
                    found.append(
                        {
                            "x": devices,
                            "policy": policy,
                            "mean_delay_s": float(column.mean()),
                            "ci95_s": half_width_95(column.tolist()),
                            "reachable": reachable or "all",
                        }
                    )
        return found


def _key(reachable: int | None, policy: str) -> tuple[str, str]:
    return (str(reachable or "all"), policy)


def _draw(axes: Axes, table: _Table, reachable: int | None) -> None:
    means = {policy: table.of(policy, reachable).mean(axis=0).tolist() for policy in table.policies}
    errors = {
        policy: [half_width_95(column.tolist()) for column in table.of(policy, reachable).T]
        for policy in table.policies
    }
    plots.grouped_bars(axes, [str(devices) for devices in DEVICES], means, errors)
    names = {1: "one reachable edge", 2: "two reachable edges", None: "every edge reachable"}
    edges = names.get(reachable, f"{reachable} reachable edges")
    axes.set(title=edges, xlabel="number of devices")


def _claims(setting: Setting, table: _Table, options: FigureOptions) -> list[Claim]:
    wanted: dict[str, list[tuple[str, rules.Rule, float]]] = {
        "fig4a": [
            ("device-only", rules.over, 60),
            ("cloud-only", rules.over, 60),
            ("edge-only", rules.about, 20),
        ],
        "fig4b": [("cloud-only", rules.about, 70), ("edge-only", rules.up_to, 30)],
        "fig4c": [("device-only", rules.about, 80), ("edge-only", rules.about, 40)],
    }
    if not table.has("deepar"):
        return []
    deepar = table.of("deepar", table.judged)
    claims = []
    for baseline, rule, percent in wanted[setting.figure]:
        if table.has(baseline):
            found = Reductions.of(deepar, table.of(baseline, table.judged))
            claims.append(rule(f"DeePar's delay below {baseline}", found, percent))
    baselines = [policy for policy in ("device-only", "edge-only", "cloud-only") if table.has(policy)]
    if baselines:
        worst = min(
            float((table.of(policy, table.judged).mean(axis=0) - deepar.mean(axis=0)).min()) for policy in baselines
        )
        best = "best at every x" if worst > 0 else "beaten at some x"
        claims.append(rules.is_true("DeePar best of the paper's four", "best", best, worst > 0))
    if table.has("no-delay"):
        claims.append(_waiting(setting, Reductions.of(deepar, table.of("no-delay", table.judged)), table))
    if table.has(SEQUENTIAL):
        claims.append(_streaming(Reductions.of(deepar, table.of(SEQUENTIAL, table.judged))))
    return claims


def _waiting(setting: Setting, found: Reductions, table: _Table) -> Claim:
    """Waiting must pay somewhere, or it was not tested; with one edge it does in (a) and (b)."""
    judged = setting.figure != "fig4c"
    waited = 100 * table.waited[_key(table.judged, "deepar")]
    return Claim(
        text="waiting pays: DeePar's delay below no-delay",
        paper=0.0 if judged else "-",
        ours=found.mean,
        spread=found.spread,
        passed=found.mean > 0 or not judged,
        unit="%",
        rule="over" if judged else "",
        remark=f"best x {found.best:.1f} %; {waited:.0f} % of the tasks waited",
    )


def _streaming(found: Reductions) -> Claim:
    return Claim(
        text="streaming lowers DeePar's delay on the same tasks",
        paper="-",
        ours=found.mean,
        spread=found.spread,
        passed=found.mean > 0,
        unit="%",
    )
