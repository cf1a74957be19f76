"""`deepar loadgen replay | bench | chaos`: submit tasks to a running system, measure this machine, break processes."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bus.errors import ConfigError
from bus.identity.signed_bus import signed
from bus.text.json_text import json_text
from bus.text.units import parse_duration, parse_rate, parse_size
from deploy.commands.loadgen.bench import bench
from deploy.commands.loadgen.chaos import chaos
from deploy.console_output import completion
from deploy.console_output.options import AsJson, BootstrapFromEnv
from deploy.console_output.replay_run import ReplayRun, print_summary
from deploy.console_output.writable import writable_folder
from deploy.services.identities import KeyFile, submitter_of
from deploy.services.process import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISSED
from deploy.services.settings import node_name
from deploy.services.wiring import kafka_bus
from loadgen.replay import arrivals, report, schedule
from loadgen.replay.metrics import Threshold
from loadgen.replay.replay import utc_now
from loadgen.replay.task_mix import PAPER_MIX, Mix, Range, parse_models

app = typer.Typer(
    no_args_is_help=True, help="Submit tasks to a running system, measure this machine, break real processes."
)
app.command()(chaos)


class Distribution(StrEnum):
    """How requests of a given mean rate are spread."""

    CONSTANT = "constant"
    POISSON = "poisson"


@app.command()
def replay(
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks, warm-up not counted.")] = 20,
    within: Annotated[
        str, typer.Option(help="The paper's arrivals: all tasks at uniformly drawn instants within this time.")
    ] = "10s",
    request_rate: Annotated[float | None, typer.Option(help="Tasks per second, instead of --within.")] = None,
    request_distribution: Annotated[
        Distribution, typer.Option(help="How tasks of --request-rate are spread.")
    ] = Distribution.POISSON,
    request_intervals: Annotated[
        Path | None, typer.Option(help="A file with the gaps between tasks in seconds: one a line, or a JSON list.")
    ] = None,
    burst_size: Annotated[
        int | None, typer.Option(min=1, help="Tasks that arrive at once, every --burst-every.")
    ] = None,
    burst_every: Annotated[str, typer.Option(help="Time from burst to burst.")] = "10s",
    scenario: Annotated[
        arrivals.Scenario | None,
        typer.Option(help="An MLPerf scenario; Server takes its rate from --request-rate.", case_sensitive=False),
    ] = None,
    schedule_file: Annotated[
        Path | None, typer.Option("--schedule", help='JSON Lines: {"at_s": 1.5, "model": "lenet", ...} a task.')
    ] = None,
    models: Annotated[
        str,
        typer.Option(
            help="A mix: lenet, or lenet=3,alexnet=1, or paper (the paper's four and its parameters).",
            autocompletion=completion.models,
        ),
    ] = "lenet",
    samples: Annotated[str | None, typer.Option(help="Samples a task: 10, or drawn from 1..1000.")] = None,
    max_link1: Annotated[
        str | None, typer.Option(help="A task's cap on link 1: 100Mbps, or drawn from 20Mbps..300Mbps.")
    ] = None,
    max_link2: Annotated[str | None, typer.Option(help="A task's cap on link 2, like --max-link1.")] = None,
    input_size: Annotated[str | None, typer.Option(help="Bytes of one input: 600KB, or drawn from 10KB..1MB.")] = None,
    deadline: Annotated[
        str | None, typer.Option(help="Time after which an unfinished task ends as EXPIRED: 30s.")
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Devices to submit for, a,b,c; else all that announced themselves.", autocompletion=completion.devices
        ),
    ] = None,
    random_seed: Annotated[
        int, typer.Option("--random-seed", "--seed", min=0, help="Random seed for all generated values.")
    ] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="Tasks that run first and are left out of the summary.")] = 0,
    time_scale: Annotated[
        float, typer.Option(help="Factor on all arrival times: 0.1 submits ten times as fast.")
    ] = 1.0,
    region: Annotated[
        int, typer.Option(min=0, envvar="DEEPAR_REGION", help="Region to submit to: a partition of the control topics.")
    ] = 0,
    bootstrap_servers: BootstrapFromEnv = None,
    drain_timeout: Annotated[
        str, typer.Option(help="Give up when no task has ended for this long after the last arrival.")
    ] = "120s",
    submit_timeout: Annotated[
        str,
        typer.Option(
            help="Time to keep trying to submit a task while the broker is away; then it is not_acknowledged."
        ),
    ] = "30s",
    out: Annotated[
        Path | None,
        typer.Option(envvar="DEEPAR_REPLAY_OUT", help="Folder for the files; by default runs/replay-SEED-TIME."),
    ] = None,
    identity_key: KeyFile = None,
    max_mean: Annotated[str | None, typer.Option(help="Exit with 99 when the mean delay is above.")] = None,
    max_p50: Annotated[str | None, typer.Option(help="Exit with 99 when the median delay is above.")] = None,
    max_p90: Annotated[str | None, typer.Option(help="Exit with 99 when the 90th percentile is above.")] = None,
    max_p99: Annotated[str | None, typer.Option(help="Exit with 99 when the 99th percentile is above.")] = None,
    as_json: AsJson = False,
) -> None:
    """Submit tasks on Kafka, open loop, and report what came of each.

    Delays count from the instant at which a task was due. Files: profile_export.jsonl (a line a task),
    summary.json, summary.csv, report.html. Exit code 99 when a --max-... was missed; 1 when a task had no end, or none
    completed.

    Example: `deepar loadgen replay --models lenet=3,alexnet=1 --tasks 100 --request-rate 5 --max-p99 2s`
    """
    log = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    limits = _thresholds(max_mean=max_mean, max_p50=max_p50, max_p90=max_p90, max_p99=max_p99)
    paper = models.strip() == "paper"
    default_samples = PAPER_MIX.samples if paper else (scenario.samples,) * 2 if scenario else (10.0, 10.0)
    mix = Mix(
        models=parse_models(models),
        samples=_range(samples, _number, "--samples") or default_samples,
        max_link1_bps=_range(max_link1, parse_rate, "--max-link1") or (PAPER_MIX.max_link1_bps if paper else None),
        max_link2_bps=_range(max_link2, parse_rate, "--max-link2") or (PAPER_MIX.max_link2_bps if paper else None),
        input_bytes=_range(input_size, parse_size, "--input-size") or (PAPER_MIX.input_bytes if paper else None),
        deadline_s=None if deadline is None else parse_duration(deadline, "--deadline"),
        datasets={"lenet": "digits"},
    )
    if schedule_file is not None and not schedule_file.exists():
        raise ConfigError(f"--schedule {schedule_file}: no such file")
    pattern = _pattern(
        tasks=tasks, within=within, rate=request_rate, distribution=request_distribution,
        gaps=request_intervals, burst_size=burst_size, burst_every=burst_every, scenario=scenario,
    )  # fmt: skip
    prefix = f"replay-{utc_now():%Y%m%dT%H%M%S}-{random_seed}"

    def make(names: list[str]) -> schedule.Schedule:
        if schedule_file is not None:
            plan = schedule.read(schedule_file, names, seed=random_seed, prefix=prefix).with_warmup(warmup)
        else:
            plan = schedule.make(
                tasks + warmup, pattern, mix, names, seed=random_seed, prefix=prefix, warmup=warmup,
                closed=scenario is not None and scenario.closed,
            )  # fmt: skip
        return plan.scaled(time_scale)

    wait_s = parse_duration(drain_timeout, "--drain-timeout")
    submit_s = parse_duration(submit_timeout, "--submit-timeout")
    named = None if devices is None else [node_name(name.strip(), "--devices") for name in devices.split(",")]
    make(named or ["d1"])  # what is wrong with the flags is said before anything is connected
    folder = writable_folder("--out", out or Path(f"runs/replay-{random_seed}-{utc_now():%Y%m%dT%H%M%SZ}"))
    bus = signed(kafka_bus(bootstrap_servers, delivery_timeout_s=submit_s), submitter_of(identity_key))
    needed = frozenset(mix.models if schedule_file is None else ())
    run = ReplayRun(bus, region, named, needed, make, wait_s, log)
    interrupted = run.play()
    summary = run.result.summary
    files = report.write_files(folder, run.result.outcomes, summary, began_at=run.began_at)
    summary["files"] = [str(path) for path in files]
    if as_json:
        print(json_text(summary))
    else:
        print_summary(Console(emoji=False, highlight=False), summary)
    missed = [sentence for limit in limits if (sentence := limit.missed(summary))]
    for sentence in missed:
        log.print(f"missed: {sentence}", style="bold red", markup=False)
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if missed:
        raise typer.Exit(EXIT_MISSED)
    if summary["unfinished"] or not summary["completed"]:
        what = f"{summary['unfinished']} of {summary['submitted']} tasks had no end"
        log.print(f"failed: {what if summary['unfinished'] else 'no task completed'}", style="bold red")
        raise typer.Exit(EXIT_FAILED)


app.command()(bench)


def _range(text: str | None, parse: Callable[[str, str], float], flag: str) -> Range | None:
    """A number, or a range LOW..HIGH to draw from."""
    if text is None:
        return None
    low, dots, high = text.partition("..")
    return (parse(low, flag), parse(high if dots else low, flag))


def _number(text: str, flag: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{flag} {text}: not a number", remedy="write it like 10, or as a range: 1..1000") from None


def _thresholds(**flags: str | None) -> list[Threshold]:
    return [
        Threshold(
            name.replace("_", "-"), name.removeprefix("max_"), parse_duration(text, f"--{name.replace('_', '-')}")
        )
        for name, text in flags.items()
        if text is not None
    ]


def _pattern(
    *,
    tasks: int,
    within: str,
    rate: float | None,
    distribution: Distribution,
    gaps: Path | None,
    burst_size: int | None,
    burst_every: str,
    scenario: arrivals.Scenario | None,
) -> arrivals.Arrivals:
    given = [
        name
        for name, on in (
            ("--request-intervals", gaps is not None),
            ("--burst-size", burst_size is not None),
            ("--scenario", scenario is not None),
        )
        if on
    ]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other")
    if scenario is arrivals.Scenario.SERVER:
        if rate is None:
            raise ConfigError("--scenario Server needs --request-rate")
        return arrivals.poisson(rate)
    if scenario is not None:
        return arrivals.at_once()
    if gaps is not None:
        return arrivals.intervals(arrivals.read_intervals(gaps))
    if burst_size is not None:
        return arrivals.bursts(burst_size, parse_duration(burst_every, "--burst-every"))
    if rate is not None:
        return arrivals.constant(rate) if distribution is Distribution.CONSTANT else arrivals.poisson(rate)
    return arrivals.uniform(parse_duration(within, "--within"))
