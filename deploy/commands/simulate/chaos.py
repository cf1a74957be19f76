"""`deepar simulate chaos`: random fault injection into a region in virtual time."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from bus.errors import ConfigError
from bus.text.json_text import json_text
from deploy.console_output.options import AsJson
from deploy.console_output.progress import progress_bar
from deploy.services.process import EXIT_FAILED
from loadgen.chaos.simulated import campaign as simulated
from loadgen.chaos.simulated import crash_points
from loadgen.sim.programs import REAL, Programs


def chaos(
    context: typer.Context,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="First random seed; the others follow it.")] = 0,
    jobs: Annotated[int | None, typer.Option(min=1, help="Number of processes; default: the number of cores.")] = None,
    awaits: Annotated[
        bool,
        typer.Option(
            "--awaits",
            help="Instead of random faults, kill each process once before and once after every await of "
            "planner and stages, in a small region.",
        ),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(allow_dash=True, help="Write the events of one seed, in order, to a file; - is stdout."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Inject faults into a region, then verify that nothing is lost or shown twice and the ledger holds at every record.

    Real planner, real stages, modelled machines. Processes are killed between any two steps, frozen, cut off, terminated;
    the broker stops; records are lost, doubled, corrupted, late, delivered again; clocks jump; garbage and forged snapshots
    stand on the topics; a batch of several tasks has a bad sample, or its process is killed. Exit code 1 when a guarantee did
    not hold; each violation comes with the command that replays it.

    Example, everything, on all cores: `deepar simulate chaos --seeds 10000`

    Example, one seed, step by step: `deepar simulate chaos --seeds 1 --seed 4711 --trace -`
    """
    log = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    programs = context.find_object(Programs) or REAL  # a test passes planted bugs
    if trace is not None:
        if seeds != 1 or awaits or (as_json and str(trace) == "-"):
            raise ConfigError("--trace shows one seed", remedy="add --seeds 1, and write to a file beside --json")
        with _open(trace) as file:
            for at_s, *what in simulated.run_seed(seed, programs=programs).trace:
                print(f"{at_s:10.4f}  {'  '.join(str(word) for word in what if word != '')}", file=file)
    with progress_bar(log) as bar:

        def tell(done: int, total: int) -> None:
            bar("chaos", done, total)

        found = _sweep(range(seed, seed + seeds), tell) if awaits else _run(seed, seeds, jobs, tell, programs)
    if as_json:
        print(json_text(found))
    else:
        _print(Console(emoji=False, highlight=False), found)
    if found["violations"]:
        raise typer.Exit(EXIT_FAILED)


def _run(
    seed: int, seeds: int, jobs: int | None, tell: Callable[[int, int], None], programs: Programs
) -> dict[str, Any]:
    jobs = jobs or os.cpu_count() or 1
    return simulated.run(range(seed, seed + seeds), jobs=jobs, progress=tell, programs=programs)


def _sweep(seeds: range, tell: Callable[[int, int], None]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []

    def told(done: int, total: int) -> None:
        tell(len(parts) * total + done, len(seeds) * total)

    for seed in seeds:
        part = crash_points.sweep(seed, progress=told)
        parts.append(part)
    roles = sorted({role for part in parts for role in part["awaits"]})
    return {
        "seeds": len(parts),
        "awaits": {role: sum(part["awaits"].get(role, 0) for part in parts) for role in roles},
        "violations": [violation for part in parts for violation in part["violations"]],
    }


def _print(console: Console, found: dict[str, Any]) -> None:
    if "awaits" in found:
        table = Table("process", "killed before or after an await")
        for role, times in found["awaits"].items():
            table.add_row(role, str(times))
    else:
        silent = found["replanned_s"]
        console.print(
            f"{found['seeds']} seeds, {found['simulated_hours']:.2f} simulated hours, {found['retries']} further attempts, "
            f"{found['suppressed_duplicates']} duplicates suppressed, "
            f"{found['rejected_queue_full']} tasks rejected by a full queue; {found['sessions']} sessions, "
            f"{found['frames'].get('answered', 0)} of their frames answered; "
            f"{found['batches_of_several_tasks'].get('computed', 0)} batches of samples of several tasks"
        )
        if silent["times"]:
            console.print(
                f"{silent['times']} silent nodes lost; planned again after at most {silent['max']:.2f} s "
                f"(lease {silent['lease']:g} s, without the planner's own absence)"
            )
        table = Table("fault", "times")
        for kind, times in found["faults"].items():
            table.add_row(kind, str(times))
    console.print(table)
    for violation in found["violations"]:
        console.print(f"[bold red]{violation['guarantee']}[/]", end=" ")
        console.print(f"{violation['what']}; replay: {violation['replay']}", markup=False)
    if not found["violations"]:
        console.print("no violation", style="green")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    if str(path) == "-":
        yield sys.stdout
        return
    try:
        with path.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"--trace {path}: {error.strerror}") from None
