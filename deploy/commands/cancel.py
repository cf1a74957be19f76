"""`deepar cancel`: end tasks before they are done."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from bus.identity.signed_bus import signed
from bus.text.json_text import json_text
from bus.text.units import parse_duration
from deploy.console_output import completion
from deploy.console_output.options import AsJson, BootstrapFromEnv
from deploy.services.cancellation import End
from deploy.services.cancellation import cancel as cancel_tasks
from deploy.services.identities import KeyFile, submitter_of
from deploy.services.process import EXIT_FAILED, run_on_uvloop
from deploy.services.wiring import kafka_bus, require_region


def cancel(
    tasks: Annotated[
        list[str], typer.Argument(metavar="TASK...", help="Ids of tasks.", autocompletion=completion.tasks)
    ],
    region: Annotated[int, typer.Option(min=0, envvar="DEEPAR_REGION", help="Region of the tasks.")] = 0,
    timeout: Annotated[str, typer.Option(help="Give up if the planner has not answered within this time.")] = "30s",
    bootstrap_servers: BootstrapFromEnv = None,
    identity_key: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Cancel tasks: each ends as FAILED, cause `cancelled`, and its reservations are released.

    A task that has already ended keeps its state, so cancelling twice is safe. Exit code 1 if the region does not know a
    task. `deepar tail tasks --exit` lists the tasks.

    Example: `deepar cancel t1 t2`
    """
    timeout_s = parse_duration(timeout, "--timeout")
    bus = signed(kafka_bus(bootstrap_servers), submitter_of(identity_key))

    async def run() -> list[End]:
        async with bus:
            await require_region(bus, region)
            return await cancel_tasks(bus, region, tasks, timeout_s=timeout_s)

    ends = run_on_uvloop(run())
    if as_json:
        print(json_text({"tasks": [_row(end) for end in ends]}))
    console = Console(emoji=False, highlight=False, soft_wrap=True)
    log = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    for end in ends:
        if end.state is None:
            what = f"region {region} does not know task {end.task_id}, or the task ended long ago"
            log.print(f"[bold red]error:[/] {what}", markup=True)
        elif not as_json:
            console.print(f"{end.task_id}: {_words(end)}", markup=False)
    if any(end.state is None for end in ends):
        log.print("  deepar tail tasks --offset start --exit", style="cyan")
        raise typer.Exit(EXIT_FAILED)


def _words(end: End) -> str:
    if end.cancelled:
        return "already cancelled" if end.before else "cancelled"
    cause = f" ({end.cause})" if end.cause else ""
    return (
        f"already ended: {end.state}{cause}"
        if end.before
        else f"ended before it could be cancelled: {end.state}{cause}"
    )


def _row(end: End) -> dict[str, object]:
    state = None if end.state is None else end.state.value
    return {
        "task_id": end.task_id,
        "state": state,
        "cause": end.cause,
        "cancelled": end.cancelled,
        "before": end.before,
    }
