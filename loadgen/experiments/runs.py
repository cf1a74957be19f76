"""Many runs of the core-only driver: a cell is one scenario with one seed, and its result is one row of numbers.

Cells are independent, so they run in this process, on the cores of this machine or on a Dask cluster. All three give the
same rows in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from typing import Any

from bus.errors import ConfigError
from loadgen.replay.metrics import distribution
from loadgen.sim.core_driver import completed, drive
from loadgen.sim.platforms import Platforms, platforms
from loadgen.sim.scenario import Scenario
from loadgen.workers import worker_pool

Progress = Callable[[int, int], None]
"""Called with the number of finished cells and the total."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: a scenario and a seed."""

    scenario: Scenario
    seed: int
    labels: dict[str, Any] = field(default_factory=dict)  # columns that identify the cell


Row = dict[str, Any]
"""The numbers of one cell, by column."""


def run_cell(cell: Cell, machines: Platforms | None = None) -> Row:
    """Run one cell on these machines; None: those of the scenario's profile.

    Times are in seconds, over the tasks that completed; `delayed_share` is the share that waited for a resource.
    """
    outcomes = drive(
        cell.scenario, cell.seed, machines or platforms(cell.scenario.profile, codecs=cell.scenario.codecs)
    )
    done = completed(outcomes)
    delays = distribution([outcome.delay_s for outcome in done if outcome.delay_s is not None])
    waits = [outcome.wait_s or 0.0 for outcome in done]
    kinds = Counter(outcome.kind for outcome in done)
    return {
        **cell.labels,
        "seed": cell.seed,
        "tasks": len(outcomes),
        "completed": len(done),
        "mean_delay_s": delays["mean"],
        "p50_s": delays["p50"],
        "p90_s": delays["p90"],
        "p99_s": delays["p99"],
        "max_s": delays["max"],
        "mean_wait_s": sum(waits) / len(waits) if waits else None,
        "delayed_share": sum(wait > 0 for wait in waits) / len(waits) if waits else None,
        "kinds": "+".join(f"{kind.replace('+', '&')}:{kinds[kind]}" for kind in sorted(kinds)),
    }


@dataclass(frozen=True, slots=True)
class Workers:
    """Where cells run, and the function that runs one."""

    jobs: int = 1  # processes on this machine
    cluster: str | None = None  # address of a Dask scheduler, used instead
    run: Callable[[Cell], Row] = run_cell


IN_PROCESS = Workers()


def run_cells(cells: Sequence[Cell], workers: Workers = IN_PROCESS, progress: Progress | None = None) -> list[Row]:
    """The rows of all cells, in the order of the cells."""
    rows: dict[int, Row] = {}
    for index, row in run_as_completed(cells, workers):
        rows[index] = row
        if progress is not None:
            progress(len(rows), len(cells))
    return [rows[index] for index in range(len(cells))]


def run_as_completed(cells: Sequence[Cell], workers: Workers) -> Iterator[tuple[int, Row]]:
    """Each cell's index and row, in the order of completion. Raises `ConfigError` if the Dask extra is not installed."""
    if workers.cluster is not None:
        yield from _on_cluster(cells, workers.run, workers.cluster)
    elif workers.jobs <= 1 or len(cells) < 2:
        for index, cell in enumerate(cells):
            yield index, workers.run(cell)
    else:
        with worker_pool(workers.jobs) as pool:
            futures = {pool.submit(workers.run, cell): index for index, cell in enumerate(cells)}
            for future in as_completed(futures):
                yield futures[future], future.result()


def _on_cluster(cells: Sequence[Cell], run: Callable[[Cell], Row], address: str) -> Iterator[tuple[int, Row]]:
    try:
        import distributed
    except ImportError:
        raise ConfigError("--cluster needs Dask", remedy="install the extra: pip install 'deepar[cluster]'") from None
    try:
        client = distributed.Client(address, timeout="5s")  # type: ignore[no-untyped-call]
    except (OSError, TimeoutError, ValueError) as error:  # ValueError: not an address
        raise ConfigError(
            f"no Dask scheduler answers at {address}: {error}",
            remedy="start one: dask scheduler, then dask worker ADDRESS",
        ) from None
    with client:
        futures = client.map(run, cells, pure=False)
        order = {future.key: index for index, future in enumerate(futures)}
        for future, row in distributed.as_completed(  # type: ignore[no-untyped-call]
            futures, with_results=True
        ):
            yield order[future.key], row
