"""A Dask cluster and this machine's cores give the same rows as one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from bus.errors import ConfigError
from loadgen.experiments.runs import Cell, Workers, run_cells
from loadgen.experiments.sweep import Axis, SweepOptions, sweep
from loadgen.sim.scenario import Scenario

CELLS = [
    Cell(Scenario(devices=5, edges=2, within_s=5, policy=policy), seed, {"policy": policy})
    for policy in ("edge-only", "deepar")
    for seed in range(3)
]


def test_two_processes_give_the_same_rows() -> None:
    assert run_cells(CELLS, Workers(jobs=2)) == run_cells(CELLS)


@pytest.mark.filterwarnings("default")  # Dask's own, which are not ours to mend
def test_a_cluster_of_two_workers_gives_the_same_rows_and_files(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        address = cluster.scheduler_address
        assert run_cells(CELLS, Workers(cluster=address)) == run_cells(CELLS)

        def swept(name: str, cluster: str | None) -> bytes:
            axes = (Axis.parse("devices=4,6"),)
            sweep(
                SweepOptions(
                    out=tmp_path / name,
                    scenario=Scenario(edges=2),
                    axes=axes,
                    policies=("deepar",),
                    seeds=2,
                    cluster=cluster,
                )
            )
            return (tmp_path / name / "sweep.csv").read_bytes()

        assert swept("cluster", address) == swept("alone", None)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense"])
def test_a_scheduler_that_is_not_there_is_named(address: str) -> None:
    pytest.importorskip("distributed")
    with pytest.raises(ConfigError, match="no Dask scheduler answers"):
        run_cells(CELLS, Workers(cluster=address))
