"""`deepar simulate chaos`: the region in virtual time, broken in every way that a seed can think of."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from deploy.process import EXIT_FAILED
from loadgen import chaos as simulated


def chaos(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="The first seed; the others follow it.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Break the whole region, heal it, and judge: nothing lost, nothing shown twice, the ledger held at every record.

    Real planner, real stages, modelled machines. Processes are killed between any two steps, frozen, cut off, terminated;
    the broker stops; records are lost, doubled, late, delivered again; garbage stands on the topics. Exit code 1 when a
    guarantee did not hold; each violation comes with the command that replays it.
    """
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    steps = iter(track(range(seeds), "chaos", console=log, disable=not log.is_terminal, transient=True))
    next(steps)

    def tell(done: int, total: int) -> None:
        next(steps, None)

    found = simulated.run(range(seed, seed + seeds), progress=tell)
    if as_json:
        print(json.dumps(found))
    else:
        console = Console(highlight=False)
        console.print(
            f"{found['seeds']} seeds, {found['simulated_hours']:.2f} simulated hours, {found['retries']} further attempts, "
            f"{found['suppressed_duplicates']} duplicates suppressed"
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
    if found["violations"]:
        raise typer.Exit(EXIT_FAILED)
