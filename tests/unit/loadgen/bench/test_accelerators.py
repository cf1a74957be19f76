"""The accelerator benchmark says for each segment and batch how fast and how exact the GPU is, or why it is not used."""

from __future__ import annotations

from typing import Any

import pytest

from bus.errors import ConfigError
from loadgen.bench import accelerators
from stages.models.gpu.process import GpuProcess
from stages.models.runtime.trial_run import ChildProgram
from tests.unit.stages.models.gpu.drivers import program

KEYS = {
    "model", "segment", "platform", "accelerator", "batch", "samples_per_s", "ratio_to_cpu", "max_rel_diff", "trusted",
    "reason",
}  # fmt: skip

PYTORCH = ChildProgram(
    'import sys; print(\'{"device": "cuda", "rates": [%s]}\' % \', \'.join(3 * number for number in sys.argv[3:]))'
)
"""Answers three digits of the batch as the samples a second of each batch."""


def measured(error: float = 1e-5, **options: Any) -> list[dict[str, Any]]:
    found = accelerators.run(quick=True, process=GpuProcess(program("scripted", error=error)), **options)
    rows: list[dict[str, Any]] = found["results"]
    return rows


@pytest.mark.parametrize(("error", "trusted"), [(1e-5, True), (1e-2, False)])
def test_each_segment_has_a_row_for_each_platform_and_batch(error: float, trusted: bool) -> None:
    rows = measured(error, model=["lenet"], segment=["whole", "6..7"], batch=[4, 1])
    assert [(row["segment"], row["platform"], row["batch"]) for row in rows] == [
        (segment, platform, batch) for segment in ("1..7", "6..7") for platform in ("cpu", "gpu") for batch in (1, 4)
    ]
    assert all(row.keys() == KEYS for row in rows)
    by_cell = {(row["segment"], row["batch"], row["platform"]): row for row in rows}
    for (segment, batch, platform), row in by_cell.items():
        cpu = by_cell[segment, batch, "cpu"]
        assert row["ratio_to_cpu"] == pytest.approx(row["samples_per_s"] / cpu["samples_per_s"])
        if platform == "gpu":
            assert row["max_rel_diff"] == pytest.approx(error, rel=0.1)
            assert row["trusted"] == trusted
            assert ("differ from the CPU's" in row["reason"]) != trusted


def test_a_driver_that_dies_leaves_rows_that_say_so() -> None:
    found = accelerators.run(model=["lenet"], segment=["6..7"], quick=True, process=GpuProcess(program("crashing")))
    gpu = [row for row in found["results"] if row["platform"] == "gpu"]
    assert [row["samples_per_s"] for row in gpu] == [None, None]
    assert all("died of SIGSEGV while loading it" in row["reason"] for row in gpu)


@pytest.mark.parametrize("segment", ["0..3", "3..9", "3..2", "3", "head"])
def test_a_segment_that_does_not_exist_is_an_error(segment: str) -> None:
    with pytest.raises(ConfigError, match=r"lenet has layers 1\.\.7"):
        measured(model=["lenet"], segment=[segment])


def test_rows_of_pytorch_are_compared_with_the_cpu() -> None:
    rows = measured(model=["lenet"], segment=["whole", "6..7"], torch=PYTORCH)
    cpu, mine = (
        {row["batch"]: row for row in rows if row["platform"] == platform and row["segment"] == "1..7"}
        for platform in ("cpu", "pytorch")
    )
    assert {batch: row["samples_per_s"] for batch, row in mine.items()} == {1: 111, 8: 888}
    for batch, row in mine.items():
        assert (row["accelerator"], row["max_rel_diff"], row["trusted"]) == ("gpu", None, True)
        assert row["ratio_to_cpu"] == pytest.approx(row["samples_per_s"] / cpu[batch]["samples_per_s"])
    assert not [row for row in rows if row["platform"] == "pytorch" and row["segment"] != "1..7"]


def test_pytorch_that_fails_has_rows_with_the_reason() -> None:
    rows = measured(model=["lenet"], segment=["whole"], torch=ChildProgram("raise SystemExit('no driver')"))
    mine = [row for row in rows if row["platform"] == "pytorch"]
    assert [row["samples_per_s"] for row in mine] == [None, None]
    assert all("PyTorch failed: no driver" in row["reason"] for row in mine)


def row(platform: str, rate: float, ratio: float, **values: Any) -> dict[str, Any]:
    names = {"model": "vgg16", "segment": "1..21", "platform": platform, "accelerator": "gpu", "batch": 1}
    return names | {"samples_per_s": rate, "ratio_to_cpu": ratio, "trusted": True} | values


@pytest.mark.parametrize(
    ("rows", "passed"),
    [
        ([row("gpu", 400.0, 16.0), row("pytorch", 900.0, 36.0)], [True, True]),
        ([row("gpu", 300.0, 14.0), row("pytorch", 900.0, 36.0)], [False, False]),
        ([row("gpu", 400.0, 16.0, trusted=False), row("pytorch", 900.0, 36.0)], [False, False]),
        ([row("gpu", 400.0, 16.0), row("pytorch", 900.0, 36.0, accelerator="cpu")], []),  # no GPU, or a software driver
        ([row("gpu", 400.0, 16.0, batch=8), row("pytorch", 900.0, 36.0, batch=8)], []),
        ([row("gpu", 400.0, 16.0, segment="1..3"), row("pytorch", 900.0, 36.0)], []),
    ],
)
def test_aims_are_judged_where_pytorch_finds_a_gpu(rows: list[dict[str, Any]], passed: list[bool]) -> None:
    assert [aim["pass"] for aim in accelerators.aims(rows)] == passed
