"""`deepar loadgen bench`: measure this machine."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bus.errors import unknown_name
from bus.text.json_text import json_text
from bus.text.units import format_seconds
from deploy.console_output.option_groups import with_option_groups
from deploy.console_output.options import AsJson, BootstrapFromEnv
from deploy.services.process import EXIT_MISSED

BENCHES = {
    "slices": "time of the parts of a cut model, relative to the whole model",
    "planner": "times of searches and decisions",
    "routes": "time to find the best mix of routes, compared with HiGHS",
    "bus": "hops and streams, compared with the bare Kafka library",
    "decision": "time from the submission of a task to its decision",
    "pipeline": "throughput of modelled stages, relative to the slowest station",
    "simulator": "a million tasks through the planner's core",
    "path": "time of each step of a task in a running region",
    "regret": "delays of the learning planner, relative to the best fixed policy",
    "codecs": "size, speed and agreement of codecs on trained models",
    "accelerators": "segments in batches on the GPU, on the CPU and in PyTorch",
    "batches": "a cloud stage that computes samples of several tasks together, compared with one by one",
    "serve": "requests a second of a device's endpoint, compared with other servers",
}
"""Benchmark -> what it measures."""

STARTS_PROCESSES = ("regret", "serve")
"""Benchmarks whose `run` is in `deploy.commands.loadgen.NAME`, because they start processes; else `loadgen.bench.NAME`."""


class BenchBus(StrEnum):
    """The bus that a benchmark measures."""

    MEMORY = "memory"
    KAFKA = "kafka"


def benchmark(name: str) -> Callable[..., dict[str, Any]]:
    """The function that runs a benchmark; its module is imported only then."""
    wing = "deploy.commands.loadgen" if name in STARTS_PROCESSES else "loadgen.bench"
    run: Callable[..., dict[str, Any]] = importlib.import_module(f"{wing}.{name}").run
    return run


@dataclass(frozen=True, kw_only=True)
class CellOptions:
    """What the benchmarks `regret`, `codecs` and `accelerators` measure."""

    network: Annotated[
        list[str] | None, typer.Option(help="Network (lan, wifi, lte) of benchmark regret; repeatable. Default: all.")
    ] = None
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Model of benchmarks regret, codecs and accelerators; repeatable."),
    ] = None
    samples: Annotated[
        list[int] | None, typer.Option(min=1, metavar="N", help="Samples of a task of benchmark regret; repeatable.")
    ] = None
    segment: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYERS", help="Segment of benchmark accelerators: whole, or 3..7; repeatable."),
    ] = None
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Samples in a batch of benchmark accelerators; repeatable."),
    ] = None
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Measure fewer cases (benchmarks regret, serve, codecs, accelerators, batches)."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """What the benchmark `serve` compares with."""

    peer_python: Annotated[
        Path | None,
        typer.Option(help="Python interpreter that has ai-edge-litert and mlserver or kserve (benchmark serve)."),
    ] = None


@dataclass(frozen=True, slots=True)
class BenchmarkSource:
    """Where benchmarks come from. A test passes another one as the object of the context."""

    find: Callable[[str], Callable[..., dict[str, Any]]] = benchmark


@with_option_groups
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="; ".join(f"{name}: {what}" for name, what in BENCHES.items()))],
    bus: Annotated[BenchBus | None, typer.Option(help="Bus to measure, for benchmarks that run on both.")] = None,
    bootstrap_servers: BootstrapFromEnv = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Number of tasks (simulator), or of tasks per policy in a cell (regret).")
    ] = None,
    random_seed: Annotated[
        int | None, typer.Option("--random-seed", "--seed", min=0, help="Random seed for all generated values.")
    ] = None,
    *,
    cells: CellOptions,
    peers: PeerOptions,
    as_json: AsJson = False,
) -> None:
    """Measure this machine. Exit code 99 when an aim is missed.

    Example: `deepar loadgen bench decision --bus memory --json`
    """
    if name not in BENCHES:
        raise unknown_name("benchmark", name, BENCHES)
    log = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    source = context.find_object(BenchmarkSource) or BenchmarkSource()
    measure = source.find(name)
    wanted: dict[str, Any] = {
        "bus": bus and bus.value,
        "bootstrap": bootstrap_servers,
        "tasks": tasks,
        "seed": random_seed,
    }
    wanted |= {"network": cells.network, "model": cells.model, "samples": cells.samples, "quick": cells.quick or None}
    wanted |= {"segment": cells.segment, "batch": cells.batch}
    wanted["peer_python"] = peers.peer_python
    takes = inspect.signature(measure).parameters
    given = {key: value for key, value in wanted.items() if value is not None and key in takes}
    found: dict[str, Any] = measure(progress=lambda line: log.print(line, style="dim", markup=False), **given)
    if as_json:
        print(json_text(found))
    else:
        print_bench(Console(emoji=False, highlight=False), found)
    if not all(aim["pass"] for aim in found["aims"]):
        raise typer.Exit(EXIT_MISSED)


def print_bench(console: Console, found: dict[str, Any]) -> None:
    """A benchmark's results as people read them: one table for each shape of row, then the aims."""
    console.print(f"{found['bench']} on {found['machine']}", markup=False)
    shapes: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in (*found["results"], *found.get("policies", ()), *found.get("streams", ())):
        row = _with_cell(row)
        shapes.setdefault(tuple(row), []).append(row)
    for columns, rows in shapes.items():
        table = Table(*(column.replace("_", " ") for column in columns))
        for row in rows:
            table.add_row(*(_cell(key, row[key]) for key in columns))
        console.print(table)
    aims = Table("", "aim", "value", "to reach")
    for aim in found["aims"]:
        verdict = "[green]PASS[/]" if aim["pass"] else "[bold red]MISS[/]"
        aims.add_row(verdict, aim["name"], _cell("", aim["value"]), _cell("", aim["aim"]))
    if found["aims"]:
        console.print(aims)
    if found.get("note"):
        console.print(found["note"], style="yellow", markup=False)


def _with_cell(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the columns that say what was measured in one, so that it fits a terminal."""
    if row.keys() >= {"network", "model", "samples"}:
        return {"cell": f"{row['network']} {row['model']} x{row['samples']}"} | _without(
            row, "network", "model", "samples"
        )
    if row.keys() >= {"model", "cut", "codec"}:
        rates = {f"{verb}_MB_per_s": row[f"{verb}_bytes_per_s"] / 1e6 for verb in ("encode", "decode")}
        left = {key: row[key] for key in ("codec", "raw_bytes", "ratio")}
        return {"cut": f"{row['model']} {row['cut']}"} | left | rates | {"agreement": row["agreement"]}
    if row.keys() >= {"protocol", "model", "placement", "mode", "concurrency", "input_bytes"}:
        case = f"{row['protocol']} {row['model']} x{row['concurrency']}, {row['mode']}, {row['placement'] or 'nowhere'}"
        left = _without(row, "protocol", "model", "placement", "mode", "concurrency", "input_bytes")
        return {"case": case} | {key.replace("requests_per_s", "per_s"): value for key, value in left.items()}
    if row.keys() >= {"segment", "platform", "accelerator", "batch"}:
        on = row["platform"] if row["platform"] == row["accelerator"] else f"{row['platform']}, {row['accelerator']}"
        left = _without(row, "model", "segment", "platform", "accelerator", "batch", "reason")
        return {"segment": f"{row['model']} {row['segment']} x{row['batch']}, {on}"} | left
    return row


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in names}


def _cell(key: str, value: Any) -> str:
    if isinstance(value, float):
        seconds = (key.endswith("_s") and "per_s" not in key) or "_s_per_" in key
        return format_seconds(value) if seconds else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
