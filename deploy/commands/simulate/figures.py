"""`deepar simulate FIGURE | all | sweep | compare`: the paper's experiments, sweeps beyond them, and
simulation against life.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bus.errors import ConfigError
from bus.kafka.bus import KafkaConnection
from bus.kafka.connection import addresses
from bus.text.json_text import json_text
from bus.text.units import format_seconds, parse_duration
from bus.values import Objective
from deploy.commands.simulate.bound import bound
from deploy.commands.simulate.chaos import chaos
from deploy.commands.simulate.gain_table import gain_table
from deploy.commands.simulate.policy_names import Policies, policy_names
from deploy.commands.simulate.robustness import robustness
from deploy.commands.simulate.soak import soak
from deploy.console_output.option_groups import with_option_groups
from deploy.console_output.options import AsJson, Codecs, MinAgreement, checked_agreement
from deploy.console_output.progress import progress_bar
from deploy.console_output.writable import writable_folder
from deploy.kafka_local.broker import KafkaBroker
from deploy.services.process import EXIT_MISSED
from deploy.services.telemetry.log_setup import configure_logging
from loadgen.experiments import figures
from loadgen.experiments.claims import Claim
from loadgen.experiments.comparison import compare as compared
from loadgen.experiments.comparison import compare_chart
from loadgen.experiments.figure_check import check_figures
from loadgen.experiments.figure_result import POLICIES, FigureOptions, FigureResult, write_csv
from loadgen.experiments.paired import paired_gains
from loadgen.experiments.sweep import Axis, SweepOptions, SweepResult
from loadgen.experiments.sweep import sweep as run_sweep
from loadgen.sim import scenario
from loadgen.sim.platforms import platforms
from stages.network.trace import is_trace_file

app = typer.Typer(no_args_is_help=True, help="Run the paper's experiments, one command each, and sweeps beyond them.")

Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds.")]
Out = Annotated[Path, typer.Option(file_okay=False, envvar="DEEPAR_FIGURES", help="Folder for CSV, PNG and SVG.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Number of processes; default: the number of cores.")]
Cluster = Annotated[str | None, typer.Option(help="Address of a Dask scheduler, tcp://host:8786 (extra `cluster`).")]
Profile = Annotated[str, typer.Option(help="Profile with the speeds of device, edge and cloud: `paper`, or a file.")]
Plain = Annotated[bool, typer.Option("--plain", help="Draw pictures without title, claims and notes, for a paper.")]
ObjectiveFlag = Annotated[
    Objective,
    typer.Option(help="Delay model: `sequential` as in the paper; `pipelined` streams samples through the stages."),
]


app.command()(bound)
app.command()(chaos)
app.command()(robustness)
app.command()(soak)

FIGURES, SWEEP, COMPARE = Path("figures"), Path("runs/sweep"), Path("runs/compare")
ALL_POLICIES = ", ".join(POLICIES)
MOST_POINTS = 20
"""Maximum number of points of a sweep that are printed."""


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """Which policies are compared, over how many seeds, and for which delay."""

    seeds: Seeds = 10
    policies: Policies = ALL_POLICIES
    objective: ObjectiveFlag = Objective.SEQUENTIAL
    codecs: Codecs = False
    min_agreement: MinAgreement = None


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Where runs are computed."""

    jobs: Jobs = None
    cluster: Cluster = None

    def processes(self) -> int:
        """The number of processes on this machine."""
        return self.jobs or os.cpu_count() or 1


def _figure_command(name: str, doc: str) -> None:
    @with_option_groups
    def command(
        compared: ComparisonOptions,
        out: Out = FIGURES,
        profile: Profile = "paper",
        *,
        workers: WorkerOptions,
        plain: Plain = False,
        as_json: AsJson = False,
    ) -> None:
        options = FigureOptions(
            out=out,
            seeds=compared.seeds,
            policies=policy_names(compared.policies),
            objective=compared.objective,
            codecs=compared.codecs,
            min_agreement=checked_agreement(compared.min_agreement, codecs=compared.codecs),
            profile=profile,
            jobs=workers.processes(),
            cluster=workers.cluster,
            plain=plain,
        )
        make_figures((name,), options, as_json=as_json)

    example = f"Example: `deepar simulate {name} --seeds 30 --policies edge-only,no-delay,deepar --out figures`"
    judged = (
        "Exit code 99 if a claim of the paper is missed for any number of reachable edges; own claims that are not shown do "
        "not change it. Verdicts use means over the seeds: use ten or more seeds."
    )
    app.command(name, help=f"{doc}\n\n{judged}\n\n{example}")(command)


@app.command("fig1a")
def fig1a(
    out: Out = FIGURES,
    profile: Profile = "paper",
    live: Annotated[bool, typer.Option("--live", help="Measure AlexNet on this machine.")] = False,
    plain: Plain = False,
    as_json: AsJson = False,
) -> None:
    """AlexNet, one sample: on the device, the edge, the cloud, and cut between them.

    Example: `deepar simulate fig1a --live --out figures`
    """
    make_figures(("fig1a",), FigureOptions(out=out, profile=profile, live=live, plain=plain), as_json=as_json)


@app.command("fig1b")
def fig1b(out: Out = FIGURES, profile: Profile = "paper", plain: Plain = False, as_json: AsJson = False) -> None:
    """AlexNet, each layer's delay and output size; measures this machine beside the paper's.

    Example: `deepar simulate fig1b --out figures`
    """
    make_figures(("fig1b",), FigureOptions(out=out, profile=profile, plain=plain), as_json=as_json)


@app.command("fig3")
def fig3(out: Out = FIGURES, profile: Profile = "paper", plain: Plain = False, as_json: AsJson = False) -> None:
    """VGG, DeepFace and LeNet, one sample, four ways of running each.

    Example: `deepar simulate fig3 --json --out figures`
    """
    make_figures(("fig3",), FigureOptions(out=out, profile=profile, plain=plain), as_json=as_json)


_figure_command("fig4a", "Many tasks: 10 edges, 20-80 devices, arrivals within 300 s.")
_figure_command("fig4b", "Many tasks: 10 edges, 20-80 devices, arrivals within 50 s.")
_figure_command("fig4c", "Many tasks: 40 edges, 20-80 devices, arrivals within 50 s.")
_figure_command("all", "Every figure of the paper.")


def make_figures(names: tuple[str, ...], options: FigureOptions, *, as_json: bool) -> None:
    """Make figures and print their claims; exit with 99 if a claim of the paper is missed."""
    log = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    everything = names == ("all",)
    results: list[FigureResult] = []
    with progress_bar(log) as tell:
        options = replace(options, out=writable_folder("--out", options.out), progress=tell)
        results += [figures.make(name, options) for name in (figures.FIGURES if everything else names)]
    if as_json:
        found = [result.as_object() for result in results]
        print(json_text({"figures": found} if everything else found[0]))
    else:
        console = Console(emoji=False, highlight=False)
        for result in results:
            _print_claims(console, result)
    if any(result.missed for result in results):
        raise typer.Exit(EXIT_MISSED)


@dataclass(frozen=True, kw_only=True)
class SweepInput:
    """What a sweep varies, and how many runs each point has."""

    vary: Annotated[
        list[str] | None,
        typer.Option(help="devices=20:200:20 (both ends), edges=10,40, reachable=1,2,all; may be repeated."),
    ] = None
    scenario_file: Annotated[Path | None, typer.Option("--scenario", help="A TOML file with the scenario to vary.")] = (
        None
    )
    policies: Policies = ALL_POLICIES
    seeds: Seeds = 10
    codecs: Codecs = False
    min_agreement: MinAgreement = None

    def scenario(self) -> scenario.Scenario:
        """The scenario to vary. Raises `ConfigError`."""
        file = self.scenario_file
        found = scenario.Scenario() if file is None else scenario.read(file)
        if not self.codecs and self.min_agreement is None:
            return found
        return found.varied(codecs=True, min_agreement=checked_agreement(self.min_agreement, codecs=self.codecs))


@app.command()
@with_option_groups
def sweep(
    varied: SweepInput,
    out: Out = SWEEP,
    *,
    workers: WorkerOptions,
    as_json: AsJson = False,
) -> None:
    """Run every combination of the given parameters; write one tidy CSV and small multiples. Resumes if interrupted.

    Runs that the folder holds already are reused as long as nothing that they depend on has changed: scenario, seed,
    source of the policy, profile, version.

    Example: `deepar simulate sweep --vary devices=20:200:20 --vary edges=10,40 --policies no-delay,deepar --out runs/city`
    """
    log = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    with progress_bar(log) as tell:
        options = SweepOptions(
            out=writable_folder("--out", out),
            scenario=varied.scenario(),
            axes=tuple(Axis.parse(text) for text in varied.vary or ()),
            policies=policy_names(varied.policies),
            seeds=varied.seeds,
            jobs=workers.processes(),
            cluster=workers.cluster,
            progress=lambda done, total: tell("sweep", done, total),
        )
        done = run_sweep(options)
    gains = paired_gains(done.rows, [axis.name for axis in options.axes])
    if as_json:
        counts = {
            "runs": len(done.rows),
            "reused": done.reused,
            "stale": done.stale,
            "incomplete": len(done.incomplete),
        }
        more = {"notes": list(done.notes), "files": [str(path) for path in done.files]}
        print(json_text({**counts, "gains": [asdict(gain) for gain in gains], **more}))
        return
    console = Console(emoji=False, highlight=False)
    _print_means(console, done.rows, [axis.name for axis in options.axes])
    if gains:
        console.print(gain_table(gains[:MOST_POINTS]))
    console.print(_runs_text(done))
    if done.incomplete:
        console.print(_incomplete_text(done), style="yellow", markup=False)
    for note in done.notes:
        console.print(f"note: {note}", style="dim", markup=False)
    for path in done.files:
        console.print(f"  {path}", markup=False)


def _incomplete_text(done: SweepResult) -> str:
    tasks = sum(row["tasks"] - row["completed"] for row in done.incomplete)
    policies = ", ".join(dict.fromkeys(row["policy"] for row in done.incomplete))
    return f"{tasks} task{'s' * (tasks != 1)} did not complete ({policies}); the means are over those that did"


def _runs_text(done: SweepResult) -> str:
    total = len(done.rows)
    if not done.reused and not done.stale:
        return f"{total} run{'s' * (total != 1)}"
    text = f"reused {done.reused} of {total} runs"
    return text + (f"; {done.stale} ran again: policy, profile or version has changed" if done.stale else "")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The network that the nodes of both runs play; each option replaces the scenario's value."""

    link1_latency: Annotated[
        str | None, typer.Option(help="One-way latency of link 1 for every device, like 20ms, or a CSV file.")
    ] = None
    link2_latency: Annotated[
        str | None,
        typer.Option(help="One-way latency of link 2 for every edge and the cloud, like 40ms, or a CSV file."),
    ] = None
    link1_trace: Annotated[
        Path | None,
        typer.Option(help="CSV file (t_s,bps,latency_s) that every device plays on link 1; it repeats."),
    ] = None
    link2_trace: Annotated[
        Path | None,
        typer.Option(help="CSV file (t_s,bps,latency_s) that every edge and the cloud play on link 2."),
    ] = None

    def of(self, tasks: scenario.Scenario) -> scenario.Scenario:
        """The scenario with these networks. Raises `ConfigError`."""
        changes: dict[str, Any] = {"link1_trace": self.link1_trace, "link2_trace": self.link2_trace}
        for link, text in (("link1", self.link1_latency), ("link2", self.link2_latency)):
            if text is not None and is_trace_file(text):
                if changes[f"{link}_trace"] is not None:
                    raise ConfigError(
                        f"--{link}-latency and --{link}-trace both name a trace", remedy="leave out one of them"
                    )
                changes[f"{link}_trace"] = Path(text)
            elif text is not None:
                changes[f"{link}_latency_s"] = parse_duration(text, f"--{link}-latency")
        return tasks.varied(**{key: value for key, value in changes.items() if value is not None})


@app.command()
@with_option_groups
def compare(
    network: NetworkOptions,
    scenario_file: Annotated[Path | None, typer.Option("--scenario", help="A TOML file; by default 60 tasks.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for all generated values.")] = 0,
    bootstrap_servers: Annotated[
        str | None,
        typer.Option("--bootstrap-servers", "-b", help="Idle Kafka broker, host:port; by default a broker is started."),
    ] = None,
    out: Out = COMPARE,
    as_json: AsJson = False,
) -> None:
    """Run the same tasks in simulation and live on Apache Kafka with modelled machines, and compare the results.

    With latencies or traces both runs play the same network; the planner knows the latencies.

    Exit code 99 unless 95 % of the tasks are placed the same, means agree within 5 % and the median error of
    a task is at most 10 %. It takes about five minutes.

    Example: `deepar simulate compare --seed 1 --link1-latency 20ms --link2-latency 40ms --out runs/compare`
    """
    log = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    configure_logging("warning")
    tasks = network.of(compared.SCENARIO if scenario_file is None else scenario.read(scenario_file))
    writable_folder("--out", out)
    machines = platforms(tasks.profile, codecs=tasks.codecs)
    machines.require(tasks.models)
    if bootstrap_servers is not None:
        addresses(bootstrap_servers)
    with contextlib.ExitStack() as stack, progress_bar(log) as tell:
        if bootstrap_servers is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deepar-compare-")))
            broker = stack.enter_context(KafkaBroker(folder, started_by="started by deepar simulate compare"))
            bootstrap_servers = broker.bootstrap
        found = compared.compare(
            machines,
            KafkaConnection.from_env(bootstrap_servers=bootstrap_servers),
            scenario=tasks,
            seed=seed,
            say=lambda line: log.print(line, style="dim", markup=False),
            progress=lambda recorder: tell("live", recorder.ended, len(recorder.outcomes)),
        )
    files = [write_csv(out / "compare.csv", compare_chart.rows(found)), *compare_chart.draw(found, out / "compare")]
    numbers = found.as_object() | {"files": [str(path) for path in files]}
    if as_json:
        print(json_text(numbers))
    else:
        console = Console(emoji=False, highlight=False)
        for name, value in numbers.items():
            console.print(f"{name}: {value}", markup=False)
    if not found.agrees:
        raise typer.Exit(EXIT_MISSED)


@app.command()
def check(
    devices: Annotated[int, typer.Option(min=1, help="Number of devices in Figure 4's settings.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for all generated values.")] = 0,
    profile: Profile = "paper",
    as_json: AsJson = False,
) -> None:
    """Compare the live code in virtual time with the core-only driver that makes the figures, one seed per figure.

    Exit code 99 unless placements are the same and mean delays within a percent.

    Example: `deepar simulate check --devices 40 --seed 1`
    """
    log = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    configure_logging("warning")  # logs of services in virtual time are noise
    checks = check_figures(
        devices=devices, seed=seed, profile=profile, say=lambda line: log.print(line, style="dim", markup=False)
    )
    if as_json:
        print(json_text({"seed": seed, "checks": [one.as_row() for one in checks]}))
    else:
        table = Table("", "figure", "case", "tasks", "same placement", "mean ratio", "largest error")
        for one in checks:
            verdict = "[green]PASS[/]" if one.passed else "[bold red]MISS[/]"
            numbers = (f"{100 * one.same_placement:.0f} %", f"{one.mean_ratio:.4f}", f"{100 * one.largest_error:.2f} %")
            table.add_row(verdict, one.figure, one.case, str(one.tasks), *numbers)
        Console(emoji=False, highlight=False).print(table)
    if not all(one.passed for one in checks):
        raise typer.Exit(EXIT_MISSED)


def _print_means(console: Console, rows: list[dict[str, Any]], axes: list[str]) -> None:
    """The mean delay of each policy at each point of a sweep, over the seeds."""
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        if row["mean_delay_s"] not in ("", None):
            point = found.setdefault(tuple(str(row[name]) for name in axes), {})
            point.setdefault(row["policy"], []).append(float(row["mean_delay_s"]))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    table = Table(title="Mean delay of a task", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in axes:
        table.add_column(name, no_wrap=True)
    for name in policies:
        table.add_column(name, justify="right", overflow="fold")
    for values, delays in list(found.items())[:MOST_POINTS]:
        means = (format_seconds(fmean(delays[name])) if name in delays else "-" for name in policies)
        table.add_row(*values, *means)
    console.print(table)
    if len(found) > MOST_POINTS:
        console.print(f"and {len(found) - MOST_POINTS} more points in the files")


def _print_claims(console: Console, result: FigureResult) -> None:
    console.print(f"{result.figure}, {len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''}")
    paper = [claim for claim in result.claims if not claim.own]
    own = [claim for claim in result.claims if claim.own]
    if paper:
        table = _claim_table("Claims of the paper", "paper", "ours", "spread")
        for claim in paper:
            table.add_row(*_claim_cells(claim), claim.paper_text, claim.ours_text, claim.spread_text)
        console.print(table)
    if own:
        table = _claim_table(
            "Claims of our own: each holds if its 95 % interval lies above zero", "ours", "95 % interval"
        )
        for claim in own:
            table.add_row(*_claim_cells(claim), claim.ours_text, claim.ci95_text)
        console.print(table)
    if not result.claims:
        for point in result.series:
            mean_s = point["mean_delay_s"]
            delay = format_seconds(mean_s) if math.isfinite(mean_s) else "no task completed"
            console.print(f"{point['x']}  {point['policy']}: {delay}")
    for note in result.notes:
        console.print(f"note: {note}", style="dim", markup=False)
    for path in result.files:
        console.print(f"  {path}", markup=False)


def _claim_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "claim", *columns):
        table.add_column(name, overflow="fold", no_wrap=not name)
    return table


COLOURS = {"misses": "bold red", "not shown": "bold red", "exceeds": "yellow"}


def _claim_cells(claim: Claim) -> tuple[str, str]:
    colour = COLOURS.get(claim.verdict.value, "green")
    return f"[{colour}]{claim.verdict_text}[/]", f"{claim.text}, {claim.case}" if claim.case else claim.text
