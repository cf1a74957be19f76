"""`deepar simulate robustness`: whether waiting pays when predictions are wrong."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bus.text.json_text import json_text
from bus.text.units import format_seconds
from deploy.console_output.options import AsJson
from deploy.console_output.progress import progress_bar
from deploy.services.process import EXIT_MISSED
from loadgen.experiments.robustness import SCENARIO, Robustness, RobustnessOptions
from loadgen.experiments.robustness import robustness as run_robustness
from loadgen.sim.platforms import FIRST_VERDICT_SEED


def robustness(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 30,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices; each submits one task.")] = SCENARIO.devices,
    noise: Annotated[
        float, typer.Option(min=0.0, help="Standard deviation of log(actual / predicted) of a task's times.")
    ] = SCENARIO.noise,
    drift: Annotated[
        float,
        typer.Option(min=0.0, help="Standard deviation of log(actual / declared) of the speed of a node or link."),
    ] = SCENARIO.drift,
    within: Annotated[str, typer.Option(help="Interval in which the tasks arrive.")] = f"{SCENARIO.within_s:g}s",
    tasks: Annotated[int | None, typer.Option(min=1, help="Number of tasks; default: one for each device.")] = None,
    learn: Annotated[bool, typer.Option(help="The planner learns from completed tasks.")] = SCENARIO.learn,
    jobs: Annotated[int | None, typer.Option(min=1, help="Number of processes; default: the number of cores.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare `deepar` with `no-delay` where tasks take longer or shorter than predicted, and nodes and links drift.

    Both policies get the same tasks with the same noise and drift, and learn alike: they differ in waiting for edges only.
    Exit code 99 if waiting costs time on the mean over the seeds, or more than 5 % with any seed.

    Example: `deepar simulate robustness --seeds 30`
    """
    scenario = SCENARIO.varied(devices=devices, noise=noise, drift=drift, within_s=within, tasks=tasks, learn=learn)
    with progress_bar(Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)) as bar:
        found = run_robustness(
            RobustnessOptions(
                scenario=scenario,
                seeds=tuple(range(FIRST_VERDICT_SEED, FIRST_VERDICT_SEED + seeds)),
                jobs=jobs or os.cpu_count() or 1,
                progress=lambda done, total: bar("robustness", done, total),
            )
        )
    if as_json:
        print(json_text(found.as_json()))
    else:
        _print(Console(emoji=False, highlight=False), found)
    if not found.passed:
        raise typer.Exit(EXIT_MISSED)


def _print(console: Console, found: Robustness) -> None:
    table = Table(title="Mean delay of a task", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("seed", "no-delay", "deepar", "tasks that waited", "gain"):
        table.add_column(name, justify="right")
    for one in found.gains:
        delays = (format_seconds(one.not_waiting_s), format_seconds(one.waiting_s))
        table.add_row(str(one.seed), *delays, f"{100 * one.waited:.1f} %", f"{one.gain:.1f} %")
    console.print(table)
    interval = "" if found.ci95 is None else f" (95 % interval {found.ci95[0]:.1f} to {found.ci95[1]:.1f} %)"
    console.print(
        f"{'PASS' if found.passed else 'MISS'}: waiting gains {found.mean:.1f} % on the mean{interval}, "
        f"{found.worst.gain:.1f} % with the worst seed, {found.worst.seed}"
    )
