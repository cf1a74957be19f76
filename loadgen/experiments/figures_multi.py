"""Figure 4 (many concurrent tasks): mean delay over the number of devices, with spread, and the paper's claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bus.values import Objective
from loadgen import plots
from loadgen.experiments import claims as rules
from loadgen.experiments.captions import Caption, finish
from loadgen.experiments.claims import Claim, Reductions
from loadgen.experiments.figure_result import RAW, FigureOptions, FigureResult, write_csv
from loadgen.experiments.runs import Cell, Workers, run_cells
from loadgen.replay.metrics import half_width_95
from loadgen.sim.platforms import Platforms, platforms
from loadgen.sim.scenario import Scenario

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEVICES = (20, 40, 60, 80)
"""The x axis of Figure 4."""

SEQUENTIAL = "deepar (sequential)"
"""Name of the sequential `deepar` beside the pipelined one, when the figure is made for the pipelined objective."""

ASSUMPTIONS = (
    "arrivals uniform in the interval, one task a device; only G(0), N, the caps and the edges are drawn at random, other "
    "sizes are the model's"
)


@dataclass(frozen=True, slots=True)
class Setting:
    """The parameters in which (a), (b) and (c) differ."""

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
    """Run and draw `fig4a`, `fig4b` or `fig4c`: CSV (one row per run), PNG, SVG."""
    setting = SETTINGS[name]
    platform = platforms(options.profile, codecs=options.codecs)
    seeds = platform.unused_seeds(options.seeds)
    cells = _cells(setting, options, seeds)
    rows = run_cells(cells, Workers(options.jobs, options.cluster), options.tell(name))
    table = _Table(rows, seeds, options.reachable)
    fitted = name in platform.fitted_to
    claims = tuple(claim for reachable in options.reachable for claim in _claims(name, table, reachable, fitted))
    notes = (*_notes(seeds, platform), *_incomplete(rows))
    fig, grid = plots.figure(11.0, 3.7, 1, len(options.reachable), sharey=True, squeeze=False)
    axes = grid[0]
    for panel, reachable in zip(axes, options.reachable, strict=True):
        _draw(panel, table, reachable)
    axes[0].set_ylabel("mean delay of a task (s)")
    axes[0].set_ylim(bottom=0)
    title = f"Fig. 4({name[-1]}): {setting.title}"
    if options.objective is not Objective.SEQUENTIAL:
        title += f"; {options.objective.value} objective, streaming stages"
    if options.codecs:
        title += "; codecs on the links"
    finish(fig, Caption(title=title, claims=claims, notes=notes, plain=options.plain), legend=axes[0])
    stem = options.out / f"{name}{options.suffix}"
    files = [write_csv(stem.with_suffix(".csv"), rows), *plots.save(fig, stem)]
    return FigureResult(name, seeds, claims, tuple(table.series()), tuple(files), notes)


def _notes(seeds: tuple[int, ...], platform: Platforms) -> tuple[str, ...]:
    fit = f"; the fit used {number_text(platform.fit_seeds)}" if platform.fit_seeds else ""
    interval = (
        "bars: mean over the seeds with its 95 % interval" if len(seeds) > 1 else "one seed: no interval is known"
    )
    return (ASSUMPTIONS, f"{interval}; seeds {number_text(seeds)}{fit}", platform.origin)


def _incomplete(rows: list[dict[str, Any]]) -> list[str]:
    """A note for each policy under which tasks did not complete."""
    notes = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        tasks = sum(row["tasks"] for row in rows if row["policy"] == policy)
        done = sum(row["completed"] for row in rows if row["policy"] == policy)
        if done < tasks:
            notes.append(
                f"{policy}: {tasks - done} of {tasks} tasks did not complete; the means are over those that did"
            )
    return notes


def number_text(numbers: Sequence[int]) -> str:
    """Ascending whole numbers with runs shortened: `0, 4-12`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _cells(setting: Setting, options: FigureOptions, seeds: Sequence[int]) -> list[Cell]:
    cells = []
    columns = [(policy, policy, options.objective, options.codecs) for policy in options.policies]
    if options.objective is not Objective.SEQUENTIAL and "deepar" in options.policies:
        columns.append((SEQUENTIAL, "deepar", Objective.SEQUENTIAL, options.codecs))
    if options.codecs and "deepar" in options.policies:
        columns.append((RAW, "deepar", options.objective, False))
    for reachable in options.reachable:
        for devices in DEVICES:
            for column, policy, objective, codecs in columns:
                for seed in seeds:
                    scenario = Scenario(
                        name=setting.figure,
                        devices=devices,
                        edges=setting.edges,
                        within_s=setting.within_s,
                        reachable=reachable,
                        policy=policy,
                        objective=objective,
                        codecs=codecs,
                        min_agreement=options.min_agreement if codecs else None,
                        profile=options.profile,
                    )
                    labels = {"reachable": reachable or "all", "devices": devices, "policy": column}
                    cells.append(Cell(scenario, seed, labels))
    return cells


class _Table:
    """Mean delays by (reachable, policy), as arrays of shape (seeds, x)."""

    def __init__(
        self, rows: list[dict[str, Any]], seeds: Sequence[int], reachable_edges: tuple[int | None, ...]
    ) -> None:
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
                self.means[_key(reachable, policy)] = values.reshape(len(seeds), len(DEVICES))
                self.waited[_key(reachable, policy)] = float(np.mean([row["delayed_share"] or 0.0 for row in mine]))

    def of(self, policy: str, reachable: int | None) -> np.ndarray:
        return self.means[_key(reachable, policy)]

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
    axes.set(title=f"{edges} ({_case(reachable)})", xlabel="number of devices")


def _case(reachable: int | None) -> str:
    return f"E_i = {reachable or 'all'}"


PAPER_SAYS: dict[str, tuple[tuple[str, rules.Rule, float], ...]] = {
    "fig4a": (("device-only", rules.over, 60), ("cloud-only", rules.over, 60), ("edge-only", rules.about, 20)),
    "fig4b": (("cloud-only", rules.about, 70), ("edge-only", rules.up_to, 30)),
    "fig4c": (("device-only", rules.about, 80), ("edge-only", rules.about, 40)),
}
"""Figure -> baseline, the paper's wording, and the percentage by which DeePar's delay is below the baseline."""


def _claims(figure: str, table: _Table, reachable: int | None, fitted: bool) -> list[Claim]:
    if not table.has("deepar"):
        return []
    # The paper has neither stages that stream, as with the pipelined objective, nor codecs.
    paper = (
        []
        if table.has(SEQUENTIAL) or table.has(RAW)
        else rules.as_fitted(_paper_claims(figure, table, reachable), fitted)
    )
    return [dataclasses.replace(claim, case=_case(reachable)) for claim in (*paper, *_own_claims(table, reachable))]


def _paper_claims(figure: str, table: _Table, reachable: int | None) -> list[Claim]:
    deepar = table.of("deepar", reachable)
    claims = [
        rule(f"DeePar's delay below {baseline}", Reductions.of(deepar, table.of(baseline, reachable)), percent)
        for baseline, rule, percent in PAPER_SAYS[figure]
        if table.has(baseline)
    ]
    baselines = [policy for policy in ("device-only", "edge-only", "cloud-only") if table.has(policy)]
    if baselines:
        means = [table.of(policy, reachable).mean(axis=0) for policy in baselines]
        best = all(bool((deepar.mean(axis=0) < mean).all()) for mean in means)
        ours = "best at every x" if best else "beaten at some x"
        claims.append(rules.is_true("DeePar best of the paper's four", "best", ours, best))
    return claims


def _own_claims(table: _Table, reachable: int | None) -> list[Claim]:
    deepar = table.of("deepar", reachable)
    claims = []
    if table.has("no-delay"):
        found = Reductions.of(deepar, table.of("no-delay", reachable))
        waited = 100 * table.waited[_key(reachable, "deepar")]
        remark = f"best x {found.best:.1f} %; {waited:.0f} % of the tasks waited"
        claims.append(rules.pays("waiting pays: DeePar's delay below no-delay", found, remark))
    if table.has(SEQUENTIAL):
        found = Reductions.of(deepar, table.of(SEQUENTIAL, reachable))
        claims.append(rules.pays("streaming lowers DeePar's delay on the same tasks", found))
    if table.has("routes"):
        found = Reductions.of(table.of("routes", reachable), deepar)
        claims.append(rules.pays("several routes lower DeePar's delay on the same tasks", found))
    if table.has(RAW):
        found = Reductions.of(deepar, table.of(RAW, reachable))
        claims.append(rules.pays("codecs lower DeePar's delay on the same tasks", found))
    return claims
