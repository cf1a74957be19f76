"""`deepar simulate soak`: a leak test with a day of arrivals and churn in virtual time."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bus.text.json_text import json_text
from deploy.console_output.options import AsJson
from deploy.console_output.progress import progress_bar
from deploy.console_output.writable import writable_folder
from deploy.services.process import EXIT_FAILED, EXIT_MISSED
from loadgen import plots
from loadgen.chaos.soak.slow_cloud import slow_cloud
from loadgen.chaos.soak.soak import SoakResult
from loadgen.chaos.soak.soak import soak as run_soak
from loadgen.chaos.soak.soak_region import SoakScenario

LABELS = {
    "rss_bytes": "memory of the process",
    "python_blocks": "allocated memory blocks",
    "open_files": "open files",
    "coroutines": "coroutines",
    "live_tasks": "tasks of the planner",
    "stage_tasks": "tasks of devices and stages",
    "open_records": "records in progress",
    "broker_bytes": "bytes kept by the broker",
}


def soak(
    hours: Annotated[float, typer.Option(min=0.25, help="Hours of virtual time to simulate.")] = 24.0,
    task_every_s: Annotated[float, typer.Option(min=0.5, help="Seconds between arrivals, on average.")] = 6.0,
    churn_every_s: Annotated[
        float, typer.Option(min=10.0, help="Seconds between kills, restarts, joins and leaves, on average.")
    ] = 300.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for all generated values.")] = 0,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the plot and the numbers.")] = Path(
        "runs/soak"
    ),
    as_json: AsJson = False,
) -> None:
    """Run a region for a day in virtual time with arrivals, kills, leaves and joins, and check that nothing grows.

    The first quarter is a warm-up that fills caches of a fixed size. Of the remaining time, the mean of the second half may
    exceed the mean of the first half only by the allowance that the table shows. A second test runs a cloud that is ten times
    slower than its profile: the device must slow down, and every buffer must stay within its bound. 24 hours take about five
    minutes of one core. Exit code 99 if a measure grew or a buffer exceeded its bound; 1 if a task did not end.

    Example: `deepar simulate soak --hours 2 --out runs/soak`
    """
    log = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    writable_folder("--out", out)
    began_s = time.process_time()
    looks = max(24, min(144, int(6 * hours)))
    scenario = SoakScenario(hours=hours, seed=seed, task_every_s=task_every_s, churn_every_s=churn_every_s, looks=looks)
    with progress_bar(log) as bar:
        result = run_soak(
            scenario, progress=lambda done, total: bar("virtual minutes", int(done * 60), int(total * 60))
        )
    slow = slow_cloud()
    processor_s = time.process_time() - began_s
    out.mkdir(parents=True, exist_ok=True)
    numbers = out / "soak.json"
    files = [numbers, *draw(result, out / "soak")]
    found: dict[str, Any] = {
        "hours": hours,
        "seed": seed,
        "submitted": result.submitted,
        "states": dict(sorted(result.states.items())),
        "unended": result.unended,
        "crashes": result.crashes,
        "churn": dict(sorted(result.churn.items())),
        "remembered_ends": scenario.remember,
        "measures": result.verdict(),
        "flat": result.flat,
        "slow_cloud": slow,
        "processor_s": processor_s,
        "files": [str(path) for path in files],
    }
    numbers.write_text(
        json_text(found | {"looks": [asdict(look) for look in result.looks]}, indent=1), encoding="utf-8"
    )
    if as_json:
        print(json_text(found))
    else:
        _print(Console(emoji=False, highlight=False), found)
    if result.unended or result.crashes:
        raise typer.Exit(EXIT_FAILED)
    if not result.flat or not slow["within"]:
        raise typer.Exit(EXIT_MISSED)


def _print(console: Console, found: dict[str, Any]) -> None:
    states = ", ".join(f"{number} {state}" for state, number in found["states"].items())
    churn = ", ".join(f"{number} x {kind}" for kind, number in found["churn"].items())
    console.print(
        f"{found['hours']:g} virtual hours, {found['submitted']} tasks: {states}; {found['unended']} did not end"
    )
    console.print(f"churn: {churn or 'none'}")
    table = Table("", "measure", "first half", "second half", "allowed")
    for row in found["measures"]:
        verdict = "[green]PASS[/]" if row["flat"] else "[bold red]MISS[/]"
        table.add_row(
            verdict, LABELS[row["measure"]], *(f"{row[name]:,.1f}" for name in ("first", "second", "allowed"))
        )
    console.print(table)
    slow = found["slow_cloud"]
    table = Table("", "buffer", "peak, bytes", "bound, bytes")
    for name, peak in slow["buffers"].items():
        verdict = "[green]PASS[/]" if peak["held_bytes"] <= peak["bound_bytes"] else "[bold red]MISS[/]"
        table.add_row(verdict, name, f"{peak['held_bytes']:,}", f"{peak['bound_bytes']:,}")
    speed = slow["samples_per_s"]
    console.print(
        f"cloud {slow['factor']:g} times slower than its profile: {speed['as_said']:.2f} -> {speed['slow']:.2f} samples/s, "
        f"{slow['under_way']} of {slow['window']} samples under way"
    )
    console.print(table)
    for crash in found["crashes"]:
        console.print(f"died: {crash}", style="bold red", markup=False)
    for path in found["files"]:
        console.print(f"  {path}", markup=False)


def draw(result: SoakResult, stem: Path) -> list[Path]:
    """Draw memory, open files and tasks over the virtual hours; returns the files written."""
    hours = [look.hour for look in result.looks]
    fig, axes = plots.figure(7.0, 6.0, 3, 1, sharex=True)
    memory, files, tasks = axes
    memory.plot(hours, [look.rss_bytes / 2**20 for look in result.looks], color=plots.BLUE, label="process")
    memory.plot(
        hours,
        [look.broker_bytes / 2**20 for look in result.looks],
        color=plots.ORANGE,
        ls="--",
        label="kept by the broker",
    )
    memory.set_ylabel("memory, MiB")
    files.plot(hours, [look.open_files for look in result.looks], color=plots.GREEN, label="open files")
    files.plot(hours, [look.coroutines for look in result.looks], color=plots.PURPLE, ls="--", label="coroutines")
    files.set_ylabel("number")
    tasks.plot(hours, [look.live_tasks for look in result.looks], color=plots.BLUE, label="planner's tasks")
    tasks.plot(
        hours, [look.stage_tasks for look in result.looks], color=plots.VERMILION, ls="--", label="stages' tasks"
    )
    tasks.set_ylabel("number")
    tasks.set_xlabel("virtual hours")
    for panel in axes:
        panel.set_ylim(0, 1.35 * panel.get_ylim()[1])  # room for the legend
        panel.legend(loc="upper right", ncols=2)
    return plots.save(fig, stem, formats=("png",))
