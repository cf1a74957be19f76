"""`deepar simulate bound`: how far policies are from what no policy can beat."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bus.text.json_text import json_text
from bus.text.units import format_seconds
from bus.values import Objective
from deploy.commands.simulate.policy_names import Policies, policy_names
from deploy.console_output.option_groups import with_option_groups
from deploy.console_output.options import AsJson
from deploy.console_output.progress import progress_bar
from deploy.console_output.writable import writable_folder
from loadgen.bounds import distance_chart
from loadgen.bounds.distance import FEW, MANY, BoundOptions, Distance, distances
from loadgen.experiments.sweep import Axis
from loadgen.sim import scenario

OUT = Path("runs/bound")


@dataclass(frozen=True, kw_only=True)
class CaseOptions:
    """The cases, and what is compared in them."""

    vary: Annotated[
        list[str] | None,
        typer.Option(help="devices=80,200, within_s=50,300; each combination is a case; may be repeated."),
    ] = None
    scenario_file: Annotated[
        Path | None,
        typer.Option("--scenario", help="A TOML file; by default 200 tasks on 10 edges, with --exact 12 tasks on one."),
    ] = None
    policies: Policies = "deepar"
    objective: Annotated[Objective, typer.Option(help="Delay model of the policies.")] = Objective.PIPELINED
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 5
    exact: Annotated[
        bool,
        typer.Option("--exact", help="The optimum of the paper's own model, for at most 20 tasks (extra `solvers`)."),
    ] = False


@with_option_groups
def bound(
    cases: CaseOptions,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the picture.")] = OUT,
    jobs: Annotated[int | None, typer.Option(min=1, help="Number of processes; default: the number of cores.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare mean delays with a lower bound that holds for every policy, also one that knows all arrivals beforehand.

    Without `--exact` the bound is a linear program for each edge: tasks may use all their routes, change them and their
    bandwidths at any time, and share slots. It needs devices that reach one edge. With `--exact` it is the optimum of the
    paper's own model, which grants once and uses one pair of cuts: a policy that does more may be below it.

    Example: `deepar simulate bound --vary devices=80,200 --policies no-delay,deepar --seeds 5`
    """
    tasks = scenario.read(cases.scenario_file) if cases.scenario_file else FEW if cases.exact else MANY
    with progress_bar(Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)) as bar:
        options = BoundOptions(
            out=writable_folder("--out", out),
            scenario=replace(tasks, objective=cases.objective),
            axes=tuple(Axis.parse(text) for text in cases.vary or ()),
            policies=policy_names(cases.policies),
            seeds=cases.seeds,
            exact=cases.exact,
            jobs=jobs or os.cpu_count() or 1,
            progress=lambda done, total: bar("bound", done, total),
        )
        found = distances(options)
    files = distance_chart.draw(found, out / ("exact" if cases.exact else "bound"))
    if as_json:
        results = [one.as_object() for one in found]
        print(json_text({"exact": cases.exact, "results": results, "files": [str(path) for path in files]}))
    else:
        _print(Console(emoji=False, highlight=False), found, files)


def _print(console: Console, found: Sequence[Distance], files: Sequence[Path]) -> None:
    table = Table(title="Mean delay of a task", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in (*found[0].labels, "policy"):
        table.add_column(name)
    for name in ("mean", "bound", "above the bound"):
        table.add_column(name, justify="right")
    for one in found:
        for policy in one.means_s:
            half = one.half_width(policy)
            error = "" if half is None else f" ± {100 * half:.1f}"
            table.add_row(
                *one.labels.values(),
                policy,
                format_seconds(one.mean_s(policy)),
                format_seconds(one.bound_s),
                f"{100 * (one.ratio(policy) - 1):.1f} %{error}",
            )
    console.print(table)
    for path in files:
        console.print(f"  {path}", markup=False)
