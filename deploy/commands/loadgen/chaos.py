"""`deepar loadgen chaos`: real processes on a real broker, killed, stopped and terminated in turn while tasks run."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bus.errors import BusUnavailableError, ConfigError
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.text.json_text import json_text
from bus.text.units import format_seconds, parse_duration
from deploy.console_output.option_groups import with_option_groups
from deploy.console_output.options import AsJson
from deploy.console_output.writable import writable_folder
from deploy.kafka_local.broker import KafkaBroker
from deploy.services.live_region import LiveRegion, RegionOptions, result_file
from deploy.services.process import EXIT_FAILED, EXIT_MISSED, run_on_uvloop
from deploy.services.settings import lease_of
from deploy.services.wiring import create_missing_topics
from loadgen.chaos.live.campaign import Campaign, CampaignLoad, LiveChaos, Say
from loadgen.chaos.live.faults import FLOW_AIM_S, FaultTiming, Findings, parse_faults
from loadgen.replay.readiness import await_planner
from loadgen.replay.replay import utc_now

LISTEN_S = 3.0
"""Listening time; a leading planner sends a record about once a second."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The minimum load."""

    tasks: Annotated[int, typer.Option(min=1, help="Minimum number of tasks.")] = 100
    samples: Annotated[int, typer.Option(min=1, help="Minimum number of samples, spread evenly over the tasks.")] = (
        20_000
    )


@dataclass(frozen=True, kw_only=True)
class FaultOptions:
    """Which faults are injected, and their times."""

    faults: Annotated[
        str,
        typer.Option(help="Faults: all, kinds (kill, stop, terminate), targets (planner, device, ...) or KIND:TARGET."),
    ] = "all"
    stop_for: Annotated[str, typer.Option(help="Duration of a stop fault.")] = "30s"
    pause: Annotated[str, typer.Option(help="Undisturbed work before each fault.")] = "2s"
    grace: Annotated[str, typer.Option(help="Time after SIGTERM before a second one is sent.")] = "10s"

    def timing(self) -> FaultTiming:
        """The times of the faults. Raises `ConfigError`."""
        return FaultTiming(
            stop_s=parse_duration(self.stop_for, "--stop-for"),
            pause_s=parse_duration(self.pause, "--pause"),
            grace_s=parse_duration(self.grace, "--grace"),
        )


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Which processes run, and when they count as lost."""

    lease: Annotated[str, typer.Option(help="Silence after which a node counts as lost.")] = "10s"
    planner_lease: Annotated[str, typer.Option(help="Silence after which the planner counts as lost.")] = "5s"
    planners: Annotated[int, typer.Option(min=1, help="Number of planners; faults hit the leading one.")] = 1
    devices: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 2
    edges: Annotated[int, typer.Option(min=1, help="Number of edges.")] = 2

    def region(self) -> RegionOptions:
        """The region of these processes. Raises `ConfigError`."""
        return RegionOptions(
            planners=self.planners,
            devices=self.devices,
            edges=self.edges,
            lease_s=lease_of(self.lease),
            planner_lease_s=lease_of(self.planner_lease, "--planner-lease"),
        )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How one run submits tasks, which broker it uses, and where its files go."""

    in_flight: Annotated[int, typer.Option(min=1, help="Maximum number of unfinished tasks per device.")] = 4
    random_seed: Annotated[
        int,
        typer.Option("--random-seed", "--seed", min=0, help="Random seed for tasks, fault order and fault targets."),
    ] = 0
    bootstrap_servers: Annotated[
        str | None,
        typer.Option(
            "--bootstrap-servers", "-b", help="Use this broker (host:port) without breaking it; default: start one."
        ),
    ] = None
    out: Annotated[Path | None, typer.Option(help="Folder for logs and results; by default runs/chaos-SEED-TIME.")] = (
        None
    )


@with_option_groups
def chaos(
    context: typer.Context,
    load: LoadOptions,
    faults: FaultOptions,
    processes: ProcessOptions,
    run: RunOptions,
    as_json: AsJson = False,
) -> None:
    """Inject faults into real processes while tasks run; verify that nothing is lost, shown twice or granted twice.

    Starts Apache Kafka, a planner, a cloud worker, edges and devices as separate processes. Kills (SIGKILL), stops (SIGSTOP,
    later SIGCONT) and terminates (SIGTERM) each of planner, device, edge, cloud and broker in turn, and restarts processes
    that ended. Then an oracle that shares no code with them checks the raw topics and the devices' result files.

    recovered_s is the time from the end of the target (kill, terminate) or its SIGCONT (stop) to its first proof of work: a
    valid decision of the planner, a result shown by the device, a frame of the edge or cloud; for the broker, a result shown
    by any device. flow_after_ready_s is the part of the broker's time after it answered again (goal: 1 s). lost_after_s is
    the time from SIGSTOP until the planner declared the node lost.

    Exit code 1 if a sample was lost, shown twice or wrong, the ledger was violated, a task did not complete, a target did not
    recover or a process ended on its own; 99 if only the goal was missed.

    Example: `deepar loadgen chaos --faults kill:broker,stop:edge --stop-for 10s --samples 2000`
    """
    log = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # an unavailable broker is expected here
    seed = run.random_seed
    folder = writable_folder("--out", run.out or Path(f"runs/chaos-{seed}-{utc_now():%Y%m%dT%H%M%SZ}"))
    options = processes.region()
    campaign = Campaign(
        load=CampaignLoad(tasks=load.tasks, samples=load.samples, in_flight=run.in_flight),
        pace=faults.timing(),
        faults=tuple(parse_faults(faults.faults, seed)),
        seed=seed,
    )
    injector = context.find_object(Injector) or Injector()
    findings = injector.inject(options, folder, campaign, run.bootstrap_servers, log)
    summary = findings.summary()
    (folder / "summary.json").write_text(json_text(summary, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json_text(summary))
    else:
        print_summary(Console(emoji=False, highlight=False), summary, folder)
    failed = [sentence for sentence in failures(findings) if sentence]
    for sentence in failed:
        log.print(f"failed: {sentence}", style="bold red", markup=False)
    for record in findings.flows_late:
        log.print(
            f"missed: results flowed {record.flow_after_ready_s:.2f} s after the broker was ready again "
            f"({record.fault.kind}), not within {FLOW_AIM_S:g} s",
            style="bold red",
            markup=False,
        )
    if failed:
        raise typer.Exit(EXIT_FAILED)
    if findings.flows_late:
        raise typer.Exit(EXIT_MISSED)


def break_region(
    options: RegionOptions, folder: Path, campaign: Campaign, bootstrap: str | None, log: Console
) -> Findings:
    """Start the region, inject faults, judge the results, end all processes. Raises `DeeparError`, KeyboardInterrupt."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, options.devices + 1):
        if result_file(folder, f"d{number}").exists():
            raise ConfigError(f"{folder} holds the results of another run", remedy="name another folder with --out")

    def say(line: str) -> None:
        log.print(line, style="dim", markup=False)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_terminated_like_interrupted())
        broker = None
        if bootstrap is None:
            data = folder / "kafka"
            stack.callback(_tidy, data, folder)
            broker = KafkaBroker(data, started_by="started by deepar loadgen chaos", progress=say)
            stack.callback(broker.kill)
            say(f"{broker.kind} is ready after {broker.start():.1f} s")
            bootstrap = broker.bootstrap
        return run_on_uvloop(_break(options, folder, campaign, bootstrap, broker, say))


@dataclass(frozen=True, slots=True)
class Injector:
    """How a campaign is run. A test passes another one as the object of the context."""

    inject: Callable[[RegionOptions, Path, Campaign, str | None, Console], Findings] = break_region


async def _break(
    options: RegionOptions, folder: Path, campaign: Campaign, bootstrap: str, broker: KafkaBroker | None, say: Say
) -> Findings:
    # Our own broker needs no password, so the connection settings of the environment are ignored.
    connection = KafkaConnection.from_env({} if broker else None, bootstrap_servers=bootstrap)
    async with KafkaBus(connection) as bus:
        region = LiveRegion(options, folder, bootstrap, broker)
        await create_missing_topics(bus, [f"e{number}" for number in range(1, options.edges + 1)])
        if broker is None:
            await _require_no_planner(bus)
        async with region:
            run = LiveChaos(region, bus, connection.client_settings(bootstrap), campaign, say)
            return await run.run()


async def _require_no_planner(bus: KafkaBus) -> None:
    """Raise `ConfigError` if a planner already leads the region that faults are injected into."""
    with contextlib.suppress(BusUnavailableError):
        log = await await_planner(bus, 0, timeout_s=LISTEN_S)
        raise ConfigError(
            f"{log.planner or 'a planner'} leads region 0 on this broker: faults would break its work",
            remedy="stop it, or leave --bootstrap-servers out for a broker of its own",
        )


def _tidy(data: Path, folder: Path) -> None:
    """Keep the broker's log and delete its records."""
    with contextlib.suppress(OSError):
        (data / "broker.log").replace(folder / "broker.log")
    shutil.rmtree(data, ignore_errors=True)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that all processes are cleaned up."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def failures(findings: Findings) -> list[str]:
    """The violated guarantees, as sentences."""
    verdict = findings.verdict
    found = [
        f"{verdict[key]} {what}"
        for key, what in (
            ("lost", "samples of acknowledged tasks are shown nowhere"),
            ("visible_duplicates", "results are shown again"),
            ("ledger_violations", "rules of the decisions are broken"),
            ("wrong_results", "results are not those of the uncut model"),
            ("unreadable_frames", "frames on deepar.results cannot be read"),
        )
        if verdict[key]
    ]
    if others := verdict["tasks"] - verdict["ends"].get("COMPLETED", 0):
        found.append(f"{others} tasks did not end COMPLETED")
    found += verdict["violations"]
    found += [
        f"{record.name} did not recover after {record.fault.kind}"
        for record in findings.faults
        if record.recovered_s is None
    ]
    return found


def print_summary(console: Console, summary: dict[str, Any], folder: Path) -> None:
    """Print the findings on a terminal."""
    table = Table("fault", "process", "at", "recovered after", "")
    for fault in summary["faults"]:
        more = [
            f"{key} {format_seconds(fault[key])}" for key in ("flow_after_ready_s", "lost_after_s") if fault.get(key)
        ]
        recovered = "never" if fault["recovered_s"] is None else format_seconds(fault["recovered_s"])
        table.add_row(fault["kind"], fault["name"], f"{fault['at_s']:.1f} s", recovered, ", ".join(more))
    console.print(table)
    recovery = {key: "-" if value is None else format_seconds(value) for key, value in summary["recovery_s"].items()}
    console.print(
        f"{summary['tasks']} tasks, {summary['samples']:,} samples in {summary['elapsed_s']:.0f} s: {summary['lost']} lost, "
        f"{summary['visible_duplicates']} shown twice, {summary['suppressed_duplicates']:,} duplicates suppressed, "
        f"{summary['ledger_violations']} violations of the ledger; recovery p50 {recovery['p50']}, p99 {recovery['p99']}"
    )
    console.print(f"  logs and results: {escape(str(folder))}")
