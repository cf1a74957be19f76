"""The accelerator benchmark says for each segment how fast and how exact the GPU is, or why it is not used."""

from __future__ import annotations

import pytest

from loadgen.bench import accelerators
from stages.models.gpu.process import GpuProcess
from tests.unit.stages.models.gpu.drivers import program


@pytest.mark.parametrize(("error", "used"), [(1e-5, True), (1e-2, False)])
def test_each_segment_has_a_row_for_each_platform(error: float, used: bool) -> None:
    found = accelerators.run(model=["lenet"], quick=True, process=GpuProcess(program("scripted", error=error)))
    rows = found["results"]
    assert [(row["segment"], row["platform"]) for row in rows[:2]] == [("1..7", "cpu"), ("1..7", "gpu")]
    assert len(rows) == 6
    cpu, gpu = rows[::2], rows[1::2]
    assert {row["ratio_to_cpu"] for row in cpu} == {1.0}
    for mine, other in zip(gpu, cpu, strict=True):
        assert mine["segment"] == other["segment"]
        if used:
            assert mine["ratio_to_cpu"] == pytest.approx(mine["samples_per_s"] / other["samples_per_s"])
            assert mine["max_rel_diff"] == pytest.approx(error, rel=0.1)
        else:
            assert mine["samples_per_s"] is None
            assert "differs from the CPU's" in mine["reason"]
