"""`deepar loadgen bench regret`: the benchmark's broker, its folder, and what it measures."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bus.errors import ConfigError
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.topics import Partitions
from deploy.kafka_local.broker import KafkaBroker
from deploy.services.paired_regions import SLOWDOWN, PairedRegions
from deploy.services.process import run_on_uvloop
from deploy.services.wiring import create_missing_topics
from loadgen.bench.choices.regret import Cell, every_cell, quick_cells
from loadgen.bench.choices.rounds import Effort, measure
from loadgen.bench.cpu_load import BusynessWatch
from stages.models.profiler import machine_profile
from stages.zoo.registry import load_model

QUICK = Effort(tasks=10, most_tasks=20, limit_s=20.0)
"""The effort of `--quick`."""


def run(
    *,
    network: Sequence[str] = (),
    model: Sequence[str] = (),
    samples: Sequence[int] = (),
    quick: bool = False,
    tasks: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Measure the cells on a broker of its own. Raises `DeeparError`."""
    chosen = bool(network or model or samples)
    if quick and chosen:
        raise ConfigError("--quick has cells of its own: leave out --network, --model and --samples")
    cells = quick_cells() if quick else every_cell(network or None, model or None, samples or None)
    effort = QUICK if quick else Effort()
    if tasks is not None:
        effort = replace(effort, tasks=tasks, most_tasks=tasks, least_tasks=min(tasks, effort.least_tasks))
    folder = Path(tempfile.mkdtemp(prefix="deepar-regret-"))
    progress(f"logs of the processes, kept if a task fails: {folder}")
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(cell.model for cell in cells):
            machine_profile(load_model(name), say=progress)  # now, while nothing else runs
        broker = KafkaBroker(folder / "kafka", started_by="started by deepar loadgen bench regret", progress=progress)
        stack.callback(broker.kill)
        progress(f"{broker.kind} is ready after {broker.start():.1f} s")
        found = run_on_uvloop(_measure(cells, effort, seed, folder, broker, progress))
    shutil.rmtree(folder, ignore_errors=True)
    return found


async def _measure(
    cells: Sequence[Cell],
    effort: Effort,
    seed: int,
    folder: Path,
    broker: KafkaBroker,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    watch = BusynessWatch()
    # Our own broker needs no password, so the connection settings of the environment are ignored.
    async with KafkaBus(KafkaConnection.from_env({}, bootstrap_servers=broker.bootstrap)) as bus:
        await create_missing_topics(bus, partitions=Partitions(regions=2 * len(cells)))
        async with watch:
            found = await measure(PairedRegions(bus, broker, folder), cells, effort, seed, progress)
    slowdowns = ", ".join(f"{role} {factor:g}x" for role, factor in SLOWDOWN.items())
    machine = (
        f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, slowed: {slowdowns}"
    )
    seen = watch.seen()
    return {
        "bench": "regret",
        "machine": machine,
        **found,
        "seed": seed,
        "busyness": seen.as_json(),
        "judgeable": not seen.too_busy,
        "note": "the machine was too busy to judge" if seen.too_busy else "",
    }
