"""`models verify --accelerator gpu` says of each part whether the GPU may compute it."""

from __future__ import annotations

import numpy as np
import pytest

from stages.models.gpu.accelerator import Accelerator, AcceleratorOptions
from stages.models.gpu.process import GpuProcess
from stages.models.gpu.verdicts import verify_on_gpu
from stages.models.model import Model
from stages.models.runtime.trial_run import ChildProgram
from stages.models.segments.store import SegmentStore
from tests.unit.stages.models.gpu.drivers import program

PAIRS = [(0, 0), (2, 4), (4, 4)]
PARTS = [(0, 2), (0, 4), (0, 7), (2, 4), (4, 7)]


@pytest.mark.parametrize(
    ("child", "tolerance", "reason"),
    [
        (program("scripted", error=1e-5), 1e-4, ""),
        (program("scripted", error=1e-3), 1e-4, "differs from the CPU's"),
        (program("scripted", error=1e-3), 1e-2, ""),
        (program("absent"), 1e-4, "no usable GPU"),
    ],
)
def test_each_part_has_a_verdict(lenet: Model, child: ChildProgram, tolerance: float, reason: str) -> None:
    store, process = SegmentStore(lenet), GpuProcess(child)
    accelerator = Accelerator(AcceleratorOptions(tolerance=tolerance, batches=()), process)
    rng = np.random.default_rng(1)
    samples = [[rng.standard_normal((1, 28, 28, 1), dtype=np.float32)] for _ in range(2)]
    steps: list[tuple[int, int]] = []
    found = verify_on_gpu(store, PAIRS, samples, accelerator, step=lambda *numbers: steps.append(numbers))
    accelerator.close()
    store.close()
    assert [(verdict.begin, verdict.end) for verdict in found] == PARTS
    assert steps == [(number, 5) for number in range(6)]
    for verdict in found:
        assert (reason in verdict.reason) if reason else (verdict.reason == "")
        if reason:
            assert verdict.max_rel_diff is None
        else:
            assert verdict.max_rel_diff == pytest.approx(tolerance / 10, rel=0.2)


def test_samples_that_the_gpu_computes_wrongly_are_found_though_random_ones_were_right(lenet: Model) -> None:
    store, process = SegmentStore(lenet), GpuProcess(program("scripted", wrong_above=100.0))
    accelerator = Accelerator(AcceleratorOptions(batches=()), process)
    sample = np.full((1, 28, 28, 1), 1000.0, np.float32)
    (verdict,) = verify_on_gpu(store, [(0, 0)], [[sample]], accelerator)
    accelerator.close()
    store.close()
    assert verdict.max_rel_diff == pytest.approx(0.5, rel=0.01)
    assert "the results differ by 0.5 of the largest value, more than 0.0001" in verdict.reason
