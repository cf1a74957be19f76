"""Many runs of the core-only driver: a cell is one scenario with one seed, and yields one row of numbers.

Cells are independent and carry everything they need, so they run in this process, on this machine's cores
(`jobs`) or on a Dask cluster, and give the same rows in the same order whichever it is.
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
from loadgen.sim.platforms import platforms
from loadgen.sim.scenario import Scenario
from loadgen.workers import worker_pool

Progress = Callable[[int, int], None]
"""(cells done, cells in all)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run to be made."""

    scenario: Scenario
    seed: int
    labels: dict[str, Any] = field(default_factory=dict)  # columns that say which cell it is


def run_cell(cell: Cell) -> dict[str, Any]:
    """Run one cell. Times in seconds, over the tasks that completed; `delayed_share` is of those that waited
    for a resource.
    """
    outcomes = drive(cell.scenario, cell.seed, platforms(cell.scenario.profile))
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


def run_cells(
    cells: Sequence[Cell], *, jobs: int = 1, cluster: str | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """The rows of all cells, in the order of the cells."""
    rows: dict[int, dict[str, Any]] = {}
    for index, row in run_as_completed(cells, jobs=jobs, cluster=cluster):
        rows[index] = row
        if progress is not None:
            progress(len(rows), len(cells))
    return [rows[index] for index in range(len(cells))]


def run_as_completed(
    cells: Sequence[Cell], *, jobs: int = 1, cluster: str | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index of the cell, its row), as they are done. Raises `ConfigError` where the Dask extra is missing."""
    if cluster is not None:
        yield from _on_cluster(cells, cluster)
    elif jobs <= 1 or len(cells) < 2:
        for index, cell in enumerate(cells):
            yield index, run_cell(cell)
    else:
        with worker_pool(jobs) as pool:
            futures = {pool.submit(run_cell, cell): index for index, cell in enumerate(cells)}
            for future in as_completed(futures):
                yield futures[future], future.result()


def _on_cluster(cells: Sequence[Cell], address: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import distributed
    except ImportError:
        raise ConfigError("--cluster needs Dask", remedy="install the extra: pip install 'deepar[cluster]'") from None
    try:
        client = distributed.Client(address, timeout="5s")  # type: ignore[no-untyped-call]
    except (OSError, TimeoutError, ValueError) as error:  # ValueError: no address at all
        raise ConfigError(
            f"no Dask scheduler answers at {address}: {error}",
            remedy="start one: dask scheduler, then dask worker ADDRESS",
        ) from None
    with client:
        futures = client.map(run_cell, cells, pure=False)
        order = {future.key: index for index, future in enumerate(futures)}
        for future, row in distributed.as_completed(  # type: ignore[no-untyped-call]
            futures, with_results=True
        ):
            yield order[future.key], row
