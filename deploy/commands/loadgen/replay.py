"""`deepar loadgen replay | bench | chaos`: submit tasks to a running system, measure this machine, break processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from bus.errors import ConfigError
from bus.identity.signed_bus import signed
from bus.text.json_text import json_text
from bus.text.units import parse_duration
from deploy.commands.loadgen.bench import bench
from deploy.commands.loadgen.chaos import chaos
from deploy.commands.loadgen.replay_options import (
    ArrivalOptions,
    LimitOptions,
    MixOptions,
    ScheduleOptions,
    SubmissionOptions,
)
from deploy.console_output.option_groups import with_option_groups
from deploy.console_output.options import AsJson
from deploy.console_output.replay_run import ReplayRequest, ReplayRun, print_summary
from deploy.console_output.writable import writable_folder
from deploy.services.identities import submitter_of
from deploy.services.process import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISSED
from deploy.services.wiring import kafka_bus
from loadgen.replay import report
from loadgen.replay import schedule as schedules
from loadgen.replay.metrics import Threshold
from loadgen.replay.replay import utc_now
from loadgen.replay.task_mix import Mix

app = typer.Typer(
    no_args_is_help=True, help="Submit tasks to a running system, measure this machine, break real processes."
)
app.command()(chaos)


@dataclass(frozen=True, slots=True)
class Player:
    """How a replay is played. A test passes another one as the object of the context."""

    play: Callable[[ReplayRun], bool] = ReplayRun.play  # runs to the end; returns whether it was interrupted


@with_option_groups
def replay(
    context: typer.Context,
    arriving: ArrivalOptions,
    tasks: MixOptions,
    drawing: ScheduleOptions,
    submission: SubmissionOptions,
    limits: LimitOptions,
    as_json: AsJson = False,
) -> None:
    """Submit tasks on Kafka at scheduled times (open loop) and report the outcome of each.

    Delays count from the time at which a task was due. Files: profile_export.jsonl (one line per task), summary.json,
    summary.csv, report.html. Exit code 99 if a --max-... limit is exceeded; 1 if a task did not end or none completed.

    Example: `deepar loadgen replay --models lenet=3,alexnet=1 --tasks 100 --request-rate 5 --max-p99 2s`
    """
    log = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    thresholds = limits.thresholds()
    mix = tasks.mix(arriving.scenario)
    seed, file = drawing.random_seed, arriving.schedule_file
    make = _maker(arriving, drawing, mix)
    wait_s = parse_duration(submission.drain_timeout, "--drain-timeout")
    submit_s = parse_duration(submission.submit_timeout, "--submit-timeout")
    named = drawing.named_devices()
    make(named or ["d1"])  # reports invalid options before connecting
    folder = writable_folder("--out", submission.out or Path(f"runs/replay-{seed}-{utc_now():%Y%m%dT%H%M%SZ}"))
    connected = kafka_bus(submission.bootstrap_servers, delivery_timeout_s=submit_s)
    bus = signed(connected, submitter_of(submission.identity_key))
    needed = frozenset(mix.models if file is None else ())
    asked = ReplayRequest(region=submission.region, devices=named, models=needed, drain_timeout_s=wait_s)
    run = ReplayRun(bus, asked, make, log)
    player = context.find_object(Player) or Player()
    interrupted = player.play(run)
    summary = run.result.summary
    files = report.write_files(folder, run.result.outcomes, summary, began_at=run.began_at)
    summary["files"] = [str(path) for path in files]
    if as_json:
        print(json_text(summary))
    else:
        print_summary(Console(emoji=False, highlight=False), summary)
    if code := _exit_code(summary, thresholds, interrupted, log):
        raise typer.Exit(code)


app.command()(replay)
app.command()(bench)


def _maker(arriving: ArrivalOptions, drawing: ScheduleOptions, mix: Mix) -> Callable[[list[str]], schedules.Schedule]:
    """A function that makes the schedule for the devices it is given. Raises `ConfigError`."""
    file, seed, warmup = arriving.schedule_file, drawing.random_seed, drawing.warmup
    if file is not None and not file.exists():
        raise ConfigError(f"--schedule {file}: no such file")
    pattern, scenario = arriving.pattern(), arriving.scenario
    prefix = f"replay-{utc_now():%Y%m%dT%H%M%S}-{seed}"

    def make(names: list[str]) -> schedules.Schedule:
        if file is not None:
            schedule = schedules.read(file, names, seed=seed, prefix=prefix)
        else:
            count = arriving.tasks + warmup
            schedule = schedules.make(count, pattern, mix, names, seed=seed, prefix=prefix)
            schedule = replace(schedule, closed=scenario is not None and scenario.closed)
        return schedule.with_warmup(warmup).scaled(drawing.time_scale)

    return make


def _exit_code(summary: dict[str, Any], limits: list[Threshold], interrupted: bool, log: Console) -> int:
    """The exit code of a replay; prints each missed limit, or why the replay failed."""
    missed = [sentence for limit in limits if (sentence := limit.missed(summary))]
    for sentence in missed:
        log.print(f"missed: {sentence}", style="bold red", markup=False)
    if interrupted:
        return EXIT_INTERRUPTED
    if missed:
        return EXIT_MISSED
    if summary["unfinished"] or not summary["completed"]:
        what = f"{summary['unfinished']} of {summary['submitted']} tasks did not end"
        log.print(f"failed: {what if summary['unfinished'] else 'no task completed'}", style="bold red")
        return EXIT_FAILED
    return 0
