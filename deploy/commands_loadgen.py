"""`deepar loadgen replay | bench | chaos`: submit tasks to a running system, measure this machine, break processes."""

from __future__ import annotations

import importlib
import inspect
import json
import time
from collections.abc import Callable, Sequence, Set
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from bus.errors import ConfigError, UnknownNameError
from bus.messages import NodeAnnounced
from bus.port import Bus
from bus.signed import signed
from bus.units import format_seconds, parse_duration, parse_rate
from bus.values import Role
from deploy.commands_faults import chaos
from deploy.identities import KeyFile, submitter_of
from deploy.nodes import kafka_bus, require_region
from deploy.otel import tracing
from deploy.outputs import writable_folder
from deploy.process import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISSED, run_on_uvloop
from loadgen import arrivals, metrics, report, schedule
from loadgen.metrics import Threshold
from loadgen.outcome import Recorder
from loadgen.replay import ReplayResult, await_planner, find_nodes, utc_now
from loadgen.replay import replay as play
from loadgen.scenario import parse_size
from loadgen.source import PAPER_MIX, Mix, Range, parse_models

PLANNER_TIMEOUT_S = 10.0
"""A planner in charge speaks at least once a second or so; silence for this long means there is none."""

TELL_EVERY_S = 10.0
"""How often a replay whose stderr is no terminal says how far it is."""

app = typer.Typer(
    no_args_is_help=True, help="Submit tasks to a running system, measure this machine, break real processes."
)
app.command()(chaos)


class BenchBus(StrEnum):
    """What a benchmark's records travel over."""

    MEMORY = "memory"
    KAFKA = "kafka"


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
    request_rate: Annotated[float | None, typer.Option(help="Tasks per second, in the place of --within.")] = None,
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
        str, typer.Option(help="A mix: lenet, or lenet=3,alexnet=1, or paper (the paper's four and its parameters).")
    ] = "lenet",
    samples: Annotated[str | None, typer.Option(help="Samples a task: 10, or drawn from 1..1000.")] = None,
    max_link1: Annotated[
        str | None, typer.Option(help="A task's cap on link 1: 100Mbps, or drawn from 20Mbps..300Mbps.")
    ] = None,
    max_link2: Annotated[str | None, typer.Option(help="A task's cap on link 2.")] = None,
    input_size: Annotated[str | None, typer.Option(help="Bytes of one input: 600KB, or drawn from 10KB..1MB.")] = None,
    deadline: Annotated[str | None, typer.Option(help="A task that is not done by then is EXPIRED.")] = None,
    devices: Annotated[
        str | None, typer.Option(help="Devices to submit for, a,b,c; else all that announced themselves.")
    ] = None,
    random_seed: Annotated[
        int, typer.Option("--random-seed", "--seed", min=0, help="Of everything that is drawn.")
    ] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="Tasks that run first and are left out of the summary.")] = 0,
    time_scale: Annotated[float, typer.Option(help="Stretches every arrival: 0.1 plays ten times as fast.")] = 1.0,
    region: Annotated[int, typer.Option(min=0, envvar="DEEPAR_REGION", help="Whose planner is to decide.")] = 0,
    bootstrap_servers: Annotated[
        str | None,
        typer.Option("--bootstrap-servers", "-b", envvar="KAFKA_BOOTSTRAP_SERVERS", help="Kafka, host:port."),
    ] = None,
    drain_timeout: Annotated[
        str, typer.Option(help="Give up when no task has ended for so long after the last arrival.")
    ] = "120s",
    out: Annotated[
        Path | None,
        typer.Option(envvar="DEEPAR_REPLAY_OUT", help="Folder for the files; by default runs/replay-SEED-TIME."),
    ] = None,
    identity_key: KeyFile = None,
    max_mean: Annotated[str | None, typer.Option(help="Exit with 99 when the mean delay is above.")] = None,
    max_p50: Annotated[str | None, typer.Option(help="Exit with 99 when the median delay is above.")] = None,
    max_p90: Annotated[str | None, typer.Option(help="Exit with 99 when the 90th percentile is above.")] = None,
    max_p99: Annotated[str | None, typer.Option(help="Exit with 99 when the 99th percentile is above.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Submit tasks on Kafka, open loop, and report what came of each.

    Delays count from the instant at which a task was due. Files: profile_export.jsonl (a line a task),
    summary.json, summary.csv, report.html. Exit code 99 when a --max-... was missed; 1 when a task had no end, or none
    completed.

    Example: `deepar loadgen replay --models lenet=3,alexnet=1 --tasks 100 --request-rate 5 --max-p99 2s`
    """
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    limits = _thresholds(max_mean=max_mean, max_p50=max_p50, max_p90=max_p90, max_p99=max_p99)
    paper = models.strip() == "paper"
    default_samples = PAPER_MIX.samples if paper else (scenario.samples,) * 2 if scenario else (10.0, 10.0)
    mix = Mix(
        models=parse_models(models),
        samples=_range(samples, float) or default_samples,
        max_link1_bps=_range(max_link1, parse_rate) or (PAPER_MIX.max_link1_bps if paper else None),
        max_link2_bps=_range(max_link2, parse_rate) or (PAPER_MIX.max_link2_bps if paper else None),
        input_bytes=_range(input_size, parse_size) or (PAPER_MIX.input_bytes if paper else None),
        deadline_s=None if deadline is None else parse_duration(deadline),
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

    wait_s = parse_duration(drain_timeout)
    make(["d1"])  # what is wrong with the flags is said before anything is connected
    folder = writable_folder("--out", out or Path(f"runs/replay-{random_seed}-{utc_now():%Y%m%dT%H%M%SZ}"))
    named = None if devices is None else [name.strip() for name in devices.split(",")]
    bus = signed(kafka_bus(bootstrap_servers), submitter_of(identity_key))
    needed = frozenset(mix.models if schedule_file is None else ())
    run = ReplayRun(bus, region, named, needed, make, wait_s, log)
    interrupted = run.play()
    summary = run.result.summary
    files = report.write_files(folder, run.result.outcomes, summary, began_at=run.began_at)
    summary["files"] = [str(path) for path in files]
    if as_json:
        print(json.dumps(summary))
    else:
        print_summary(Console(highlight=False), summary)
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


class ReplayRun:
    """One replay with a live display; keeps what was seen when it is interrupted."""

    def __init__(
        self,
        bus: Bus,
        region: int,
        devices: list[str] | None,
        models: frozenset[str],
        make: Callable[[list[str]], schedule.Schedule],
        drain_timeout_s: float,
        console: Console,
    ) -> None:
        self.bus, self.region, self.devices, self.models, self.make = bus, region, devices, models, make
        self.drain_timeout_s, self.console = drain_timeout_s, console
        self.recorder = Recorder()
        self.seed = 0
        self.total = 0
        self.began_at = utc_now()
        self._began_s = self._told_s = time.monotonic()

    @property
    def result(self) -> ReplayResult:
        """What has been seen so far."""
        return ReplayResult(
            outcomes=tuple(self.recorder.outcomes.values()), seed=self.seed, dropped_records=0, unreadable_records=0
        )

    def play(self) -> bool:
        """Run to the end; True when Ctrl-C cut it short."""
        try:
            run_on_uvloop(self._play())
        except KeyboardInterrupt:
            if not self.recorder.outcomes:
                raise
            return True
        return False

    async def _play(self) -> None:
        async with tracing("deepar-loadgen") as on_span, self.bus:
            await require_region(self.bus, self.region)
            await await_planner(self.bus, self.region, timeout_s=PLANNER_TIMEOUT_S)
            found = await find_nodes(self.bus, self.region, [Role.DEVICE])
            there = [node.node for node in found]
            names = devices_for(self.models, found) if self.devices is None else self.devices
            if not names:
                raise ConfigError(
                    f"no device has announced itself in region {self.region}",
                    remedy="start one: deepar stage device",
                )
            if self.devices is None and len(names) < len(there):
                left_out = ", ".join(sorted({*there} - {*names}))
                line = f"left out, for they do not have {' and '.join(sorted(self.models))}: {left_out}"
                self.console.print(line, style="yellow", markup=False)
            if absent := [name for name in names if name not in there]:
                line = f"not there, so their tasks wait: {', '.join(absent)}; deepar stage device --name {absent[0]}"
                self.console.print(line, style="yellow", markup=False)
            plan = self.make(names)
            self.seed, self.total = plan.seed, len(plan)
            self.console.print(f"seed {plan.seed}; streams: {plan.streams or 'from the file'}", style="dim")
            self.began_at, self._began_s = utc_now(), time.monotonic()
            self._told_s = self._began_s
            with Live(console=self.console, get_renderable=self._table, refresh_per_second=4, transient=True):
                await play(
                    self.bus,
                    plan,
                    region=self.region,
                    drain_timeout_s=self.drain_timeout_s,
                    recorder=self.recorder,
                    wall_clock=utc_now,
                    on_span=on_span,
                    progress=None if self.console.is_terminal else self._tell,
                )

    def _tell(self, recorder: Recorder) -> None:
        """For logs: a line in ten seconds."""
        now_s = time.monotonic()
        if now_s - self._told_s >= TELL_EVERY_S:
            self._told_s = now_s
            mean = _short(metrics.distribution(list(recorder.delays_s))["mean"])
            counts = (
                f"{recorder.submitted} of {self.total} submitted, {recorder.running} running, {recorder.ended} ended"
            )
            self.console.print(f"{now_s - self._began_s:.0f} s: {counts}, mean delay {mean}", style="dim")

    def _table(self) -> Table:
        recorder, delays = self.recorder, list(self.recorder.delays_s)
        table = Table(box=None, padding=(0, 1, 0, 0))
        for name in ("time", "submitted", "running", "ended", "mean", "p50", "p90", "p99"):
            table.add_column(name, justify="right", no_wrap=True)
        found = metrics.distribution(delays)
        cells = [_short(found[name]) for name in ("mean", "p50", "p90", "p99")]
        elapsed = f"{time.monotonic() - self._began_s:.0f} s"
        counts = (f"{recorder.submitted}/{self.total}", str(recorder.running), str(recorder.ended))
        table.add_row(elapsed, *counts, *cells)
        return table


def devices_for(models: Set[str], found: Sequence[NodeAnnounced]) -> list[str]:
    """The names of the devices that have every model, or of all where none has."""
    able = [node.node for node in found if models <= {profile.model for profile in node.models}]
    return able or [node.node for node in found]


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """The summary as people read it."""
    states = ", ".join(
        f"{summary[name]} {name}"
        for name in ("completed", "rejected", "failed", "expired", "unfinished")
        if summary[name]
    )
    console.print(
        f"{summary['submitted']} tasks submitted: {states}; policy {summary['policy']}; seed {summary['seed']}"
    )
    if summary["causes"]:
        causes = ", ".join(f"{cause}: {count}" for cause, count in summary["causes"].items())
        console.print(f"causes: {causes}", markup=False)
    title = "Delay, counted from when each task was due"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "tasks", "mean", "p50", "p90", "p99", "p99.9"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name), overflow="fold")
    delay = summary["delay_s"]
    table.add_row("all", str(summary["completed"]), *(_short(delay[k]) for k in ("mean", "p50", "p90", "p99", "p99_9")))
    for group in ("by_kind", "by_model"):
        table.add_section()
        for name, row in summary[group].items():
            cells = (_short(row[k]) for k in ("mean_delay_s", "p50_s", "p90_s", "p99_s", "p99_9_s"))
            table.add_row(name, str(row["tasks"]), *cells)
    console.print(table)
    for path in summary.get("files", []):
        console.print(f"  {path}", markup=False)


def _short(seconds: float | None) -> str:
    return "-" if seconds is None else format_seconds(seconds)


def _range(text: str | None, parse: Callable[[str], float]) -> Range | None:
    if text is None:
        return None
    low, dots, high = text.partition("..")
    try:
        return (parse(low), parse(high if dots else low))
    except ValueError:
        raise ConfigError(f"{text!r} is neither a number nor a range LOW..HIGH") from None


def _thresholds(**flags: str | None) -> list[Threshold]:
    return [
        Threshold(name.replace("_", "-"), name.removeprefix("max_"), parse_duration(text))
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
        return arrivals.bursts(burst_size, parse_duration(burst_every))
    if rate is not None:
        return arrivals.constant(rate) if distribution is Distribution.CONSTANT else arrivals.poisson(rate)
    return arrivals.uniform(parse_duration(within))


BENCHES = {
    "slices": "the parts of a cut model over the whole",
    "planner": "search and decision times",
    "bus": "hops and streams over the bare library",
    "decision": "task submitted to decision received",
    "pipeline": "streams through modelled stages over the bottleneck",
    "simulator": "a million tasks through the core",
}
"""Benchmark -> what it measures; each is `run` of the module `loadgen.bench_NAME`."""


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="; ".join(f"{name}: {what}" for name, what in BENCHES.items()))],
    bus: Annotated[BenchBus | None, typer.Option(help="Where the benchmark has both.")] = None,
    bootstrap_servers: Annotated[
        str | None,
        typer.Option("--bootstrap-servers", "-b", envvar="KAFKA_BOOTSTRAP_SERVERS", help="Kafka, host:port."),
    ] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Of simulator: how many tasks.")] = None,
    random_seed: Annotated[int | None, typer.Option("--random-seed", "--seed", min=0, help="Of what is drawn.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure this machine. Exit code 99 when an aim is missed.

    Example: `deepar loadgen bench decision --bus memory --json`
    """
    if name not in BENCHES:
        raise UnknownNameError(f"there is no benchmark {name!r}; there are {', '.join(BENCHES)}")
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    measure = importlib.import_module(f"loadgen.bench_{name}").run
    wanted = {"bus": bus and bus.value, "bootstrap": bootstrap_servers, "tasks": tasks, "seed": random_seed}
    takes = inspect.signature(measure).parameters
    given = {key: value for key, value in wanted.items() if value is not None and key in takes}
    found: dict[str, Any] = measure(progress=lambda line: log.print(line, style="dim", markup=False), **given)
    if as_json:
        print(json.dumps(found))
    else:
        print_bench(Console(highlight=False), found)
    if not all(aim["pass"] for aim in found["aims"]):
        raise typer.Exit(EXIT_MISSED)


def print_bench(console: Console, found: dict[str, Any]) -> None:
    """A benchmark's results as people read them: one table for each shape of row, then the aims."""
    console.print(f"{found['bench']} on {found['machine']}", markup=False)
    shapes: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in found["results"]:
        shapes.setdefault(tuple(row), []).append(row)
    for columns, rows in shapes.items():
        table = Table(*columns)
        for row in rows:
            table.add_row(*(_cell(key, row[key]) for key in columns))
        console.print(table)
    aims = Table("", "aim", "value", "to reach")
    for aim in found["aims"]:
        verdict = "[green]PASS[/]" if aim["pass"] else "[bold red]MISS[/]"
        aims.add_row(verdict, aim["name"], _cell("", aim["value"]), _cell("", aim["aim"]))
    console.print(aims)
    if found.get("note"):
        console.print(found["note"], style="yellow", markup=False)


def _cell(key: str, value: Any) -> str:
    if isinstance(value, float):
        return format_seconds(value) if key.endswith("_s") and "per_s" not in key else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
