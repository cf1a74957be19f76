"""`deepar demo`: the whole system in one command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bus.errors import ConfigError
from bus.text.json_text import json_text
from bus.text.units import format_rate, format_seconds
from bus.values import Parts
from deploy.console_output import completion
from deploy.console_output.writable import writable_file
from deploy.demo.demo import POLICIES, SLOWDOWN, Demo, Run, digits_right
from deploy.demo.picture import draw_run
from deploy.monitor.phrases import cut_names
from deploy.services.process import EXIT_FAILED, run_on_uvloop
from deploy.services.telemetry.log_setup import configure_logging
from loadgen.replay.outcome import Outcome, Recorder
from planner.search.policies import load_policy


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    picture: Annotated[Path, typer.Option(help="File for the picture of the run (.png or .svg).")] = Path(
        "demo-out/run.png"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the AlexNet pictures.")] = 1,
    policies: Annotated[
        str,
        typer.Option(
            help="Policies to run one after another; the first is reported in full.",
            autocompletion=completion.policies,
        ),
    ] = ", ".join(POLICIES),
) -> None:
    """Watch a device, an edge and a cloud recognise handwritten digits together.

    One cloud, two edges and four devices run in this process with real inference; a dozen tasks of LeNet and AlexNet arrive
    over nine seconds. The same tasks then run on each single place, for comparison. It takes about 45 seconds.

    Example: `deepar demo --policies deepar,neurosurgeon --picture run.svg`
    """
    configure_logging("warning")
    width = None if sys.stderr.isatty() or sys.stdout.isatty() else 100
    console, log = (Console(emoji=False, stderr=stderr, highlight=False, width=width) for stderr in (False, True))
    names = tuple(name.strip() for name in policies.split(",") if name.strip())
    for name in names:
        load_policy(name)  # reports a misspelt name before anything runs
    if not names:
        raise ConfigError("--policies: name at least one")
    writable_file("--picture", picture, suffixes=(".png", ".svg"))
    runs, links = run_on_uvloop(_play(log, seed, names))
    best = runs[0]
    draw_run(best.run, picture)
    report = _report(runs, picture)
    if as_json:
        sys.stdout.write(json_text(report) + "\n")
    else:
        _show(console, runs, report, links)
    unfinished = [outcome.task_id for played in runs for outcome in played.run.outcomes if outcome.delay_s is None]
    digits = report["digits"]
    if unfinished or not digits["equal_to_whole"] or digits["correct"] <= 0.95 * digits["total"]:
        raise typer.Exit(EXIT_FAILED)


class _Played:
    """A run with its number of correctly recognised digits."""

    def __init__(self, run: Run, right: tuple[int, int]) -> None:
        self.run = run
        self.correct, self.total = right


async def _play(console: Console, seed: int, policies: tuple[str, ...]) -> tuple[list[_Played], str]:
    import asyncio

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.fields[doing]}[/]"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        ready = bars.add_task("models: load and measure", total=None, doing="")

        def loading(what: str, done: int, total: int) -> None:
            bars.update(ready, completed=done, total=total, doing=what)

        show = await asyncio.to_thread(Demo, seed, lambda line: bars.update(ready, doing=line), loading)
        bars.update(ready, completed=1, total=1, doing="measured")
        try:
            played = []
            for policy in policies:
                bar = bars.add_task(policy, total=len(show.schedule), doing="")

                def watch(recorder: Recorder, bar: Any = bar) -> None:
                    waiting = recorder.submitted - recorder.ended - recorder.running
                    doing = f"{recorder.running} running, {waiting} waiting"
                    bars.update(bar, completed=recorder.ended, doing=doing)

                run = await show.run(policy, watch)
                bars.update(bar, doing=f"mean delay {format_seconds(run.mean_delay_s)}")
                played.append(_Played(run, digits_right(show.schedule, run)))
            return played, f"link 1 {format_rate(show.link1_bps)}, link 2 {format_rate(show.link2_bps)}"
        finally:
            show.close()


def _report(runs: list[_Played], picture: Path) -> dict[str, Any]:
    """The object that `--json` prints."""
    best = runs[0]
    return {
        "tasks": [_task(outcome, best.run.policy) for outcome in best.run.outcomes],
        "policies": {
            played.run.policy: {"mean_delay_s": played.run.mean_delay_s, "tasks": len(played.run.outcomes)}
            for played in runs
        },
        "digits": {
            "correct": best.correct,
            "total": best.total,
            "equal_to_whole": all(played.run.equal for played in runs),
        },
        "picture": str(picture.resolve()),
    }


def _task(outcome: Outcome, policy: str) -> dict[str, Any]:
    return {
        "task_id": outcome.task_id,
        "model": outcome.model,
        "policy": policy,
        "samples": outcome.samples,
        "placement": None if outcome.placement is None else outcome.placement.model_dump(mode="json"),
        "wait_s": outcome.wait_s,
        "predicted": (outcome.predicted or Parts()).model_dump(mode="json"),
        "measured": (outcome.measured or Parts()).model_dump(mode="json"),
        "predicted_delay_s": outcome.predicted_delay_s,
        "delay_s": outcome.delay_s,
    }


def _show(console: Console, runs: list[_Played], report: dict[str, Any], links: str) -> None:
    best = runs[0]
    table = Table(
        title="What DeePar did with each task", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("task", "runs on", "cut after", "wait\n[green]delay[/]"):
        table.add_column(name, overflow="fold")
    for name in ("device", "link 1", "edge", "link 2", "cloud", "result"):
        table.add_column(name, justify="right")
    for outcome in best.run.outcomes:
        place = outcome.placement
        where = cuts = "-"
        if place is not None:
            where = place.kind.value + (f"\nthrough {place.edge}" if place.edge else "")
            cuts = "\n".join(cut_names(place.kind, place.cut1_name, place.cut2_name)) or "uncut"
        ended = f"[green]{outcome.delay_s:.2f}[/]" if outcome.delay_s is not None else f"[red]{outcome.state}[/]"
        predicted, measured = (outcome.predicted or Parts()).model_dump(), (outcome.measured or Parts()).model_dump()
        table.add_row(
            f"{outcome.task_id}\n[dim]{outcome.samples} x {outcome.model}[/]",
            where,
            cuts,
            f"{outcome.wait_s or 0.0:.2f}\n{ended}",
            *(_pair(predicted[part], measured[part]) for part in predicted),
        )
    console.print(table)
    console.print("[dim]seconds; above what was predicted, below in green what was measured, over all samples[/]")
    digits = report["digits"]
    same = "the same as" if digits["equal_to_whole"] else "[red]not the same as[/]"
    console.print(
        f"\n[bold]{digits['correct']} of {digits['total']}[/] handwritten digits recognised; "
        f"every output is {same} the uncut model's, bit for bit."
    )
    slower = ", ".join(f"{role.value} {factor:g}x" for role, factor in SLOWDOWN.items())
    console.print(f"\n[bold]Mean delay of the same tasks[/] [dim]({slower} slower than this machine; {links})[/]")
    slowest = max(played.run.mean_delay_s for played in runs)
    for played in runs:
        mean_s = played.run.mean_delay_s
        bar = "#" * max(1, round(30 * mean_s / slowest))
        less = 100 * (1 - best.run.mean_delay_s / mean_s)
        note = "" if played is best else f"  DeePar takes {abs(less):.0f} % {'less' if less >= 0 else 'more'}"
        console.print(
            f"  {played.run.policy:<12} {format_seconds(mean_s):>8}  [{'green' if played is best else 'blue'}]{bar}[/]{note}"
        )
    console.print(f"\nChart of the run: [bold]{report['picture']}[/]", soft_wrap=True)
    console.print("Next: [cyan]deepar up deploy/serve.toml[/] and the README, to send input of your own;")
    console.print("      [cyan]deepar broker[/] and the README, for the same as separate processes on Kafka.")


def _pair(predicted_s: float, measured_s: float) -> str:
    """Predicted time above measured time; a dash if this part had no work."""
    return f"{predicted_s:.2f}\n[green]{measured_s:.2f}[/]" if predicted_s or measured_s else "-"
