"""A segment runs on the GPU only where it is right there, and on the CPU after anything goes wrong."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bus.tensors import Array
from stages.models.difference import relative_difference
from stages.models.gpu.accelerator import CHECKS, Accelerator, AcceleratorOptions, _GpuSegment
from stages.models.gpu.process import LONGEST_RUN_S, MOST_DEATHS, GpuProcess
from stages.models.model import Model
from stages.models.runtime.trial_run import ChildProgram
from stages.models.segments.segment import OnWait, Segment
from stages.models.segments.store import SegmentStore
from stages.models.slicer import slice_model
from stages.zoo.registry import load_model
from tests.unit.stages import built_models
from tests.unit.stages.models.gpu.drivers import program

DEPTH = 7


@pytest.fixture
def store(lenet: Model) -> Iterator[SegmentStore]:
    store = SegmentStore(lenet)
    yield store
    store.close()


@contextlib.contextmanager
def accelerator(child: ChildProgram, clock: Callable[[], float] | None = None, **options: Any) -> Iterator[Accelerator]:
    wanted = AcceleratorOptions(**{"batches": ()} | options)
    made = Accelerator(wanted, GpuProcess(child), clock or itertools.count().__next__)
    try:
        yield made
    finally:
        made.close()


def sample(seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((1, 28, 28, 1), dtype=np.float32)


def on_cpu(store: SegmentStore, end: int = DEPTH) -> Array:
    (output,) = store.get(0, end).run([sample()])
    return output


def computed(accelerator: Accelerator, store: SegmentStore, end: int = DEPTH) -> Array:
    segment = accelerator.segment("lenet", store.get(0, end))
    (output,) = segment.run([sample()])
    segment.release()
    return output


def test_a_segment_that_is_right_runs_on_the_gpu(store: SegmentStore) -> None:
    with accelerator(program("scripted", error=1e-5)) as gpu:
        gpu.prepare(store, 0, DEPTH)
        output, expected = computed(gpu, store), on_cpu(store)
        assert output.tobytes() != expected.tobytes(), "the CPU computed it"
        assert relative_difference(output, expected) < 2e-5
        assert gpu.placements()["lenet", 0, DEPTH].files is not None


@pytest.mark.parametrize(("tolerance", "right"), [(1e-4, False), (1e-2, True)])
def test_the_tolerance_decides_what_is_right(store: SegmentStore, tolerance: float, right: bool) -> None:
    with accelerator(program("scripted", error=1e-3), tolerance=tolerance) as gpu:
        gpu.prepare(store, 0, DEPTH)
        assert (computed(gpu, store).tobytes() != on_cpu(store).tobytes()) == right
        placed = gpu.placements()["lenet", 0, DEPTH]
        assert (placed.files is not None) == right
        assert ("fc_3 differs" in placed.reason) != right


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (program("crashing"), "the GPU process died of SIGSEGV while loading it"),
        (program("hanging", longest_s=0.5), "did not answer"),
        (program("refusing"), "unknown operator"),
        (program("absent"), "no usable GPU"),
        (program("scripted", dies_at=2), "the GPU process died of SIGSEGV while computing"),
        (ChildProgram("raise SystemExit(3)"), "ended with 3"),
    ],
)
def test_a_driver_that_fails_leaves_the_segment_on_the_cpu(
    store: SegmentStore, driver: ChildProgram, reason: str
) -> None:
    with accelerator(driver) as gpu:
        gpu.prepare(store, 0, DEPTH)
        assert reason in gpu.placements()["lenet", 0, DEPTH].reason
        assert "Set some option" not in gpu.placements()["lenet", 0, DEPTH].reason
        assert computed(gpu, store).tobytes() == on_cpu(store).tobytes()


def test_a_driver_that_dies_in_the_middle_loses_no_sample_and_other_segments_return(store: SegmentStore) -> None:
    with accelerator(program("scripted", error=1e-5, dies_at=2 * CHECKS + 2)) as gpu:
        for end in (2, 3):
            gpu.prepare(store, 0, end)
        segments = {end: gpu.segment("lenet", store.get(0, end)) for end in (2, 3)}
        first, second = (segments[3].run([sample()])[0] for _ in range(2))
        expected = on_cpu(store, 3)
        assert first.tobytes() != expected.tobytes()
        assert second.tobytes() == expected.tobytes()
        assert "died of SIGSEGV while computing" in gpu.placements()["lenet", 0, 3].reason
        assert segments[2].run([sample()])[0].tobytes() == on_cpu(store, 2).tobytes()
        assert not gpu.is_ready("lenet", 0, 2)
        gpu.prepare(store, 0, 2)
        assert segments[2].run([sample()])[0].tobytes() != on_cpu(store, 2).tobytes()


def test_a_batch_that_the_cpu_computes_reports_its_waiting_time(store: SegmentStore) -> None:
    class Busy(Segment):
        """Other tasks use its interpreters for a second each time."""

        def run_batch(self, samples: Sequence[Sequence[Array]], on_wait: OnWait | None = None) -> list[list[Array]]:
            if on_wait is not None:
                on_wait(1.0)
            return super().run_batch(samples, on_wait)

    waits_s: list[float] = []
    with accelerator(program("scripted", dies_at=CHECKS + 1)) as gpu:
        gpu.prepare(store, 0, DEPTH)
        segment = gpu.segment("lenet", Busy(store, 0, DEPTH))
        outputs = segment.run_batch([[sample()], [sample()]], waits_s.append)
        assert [output.tobytes() for (output,) in outputs] == [on_cpu(store).tobytes()] * 2
        assert waits_s[-2:] == [1.0, 1.0]


def test_a_driver_that_dies_again_and_again_is_not_started_again(store: SegmentStore) -> None:
    with accelerator(program("crashing")) as gpu:
        for end in range(1, MOST_DEATHS + 2):
            gpu.prepare(store, 0, end)
        reasons = [placed.reason for placed in gpu.placements().values()]
        assert [f"died {MOST_DEATHS} times" in reason for reason in reasons] == [False] * MOST_DEATHS + [True]


def test_auto_uses_the_gpu_only_where_it_is_faster(store: SegmentStore) -> None:
    for cpu_s, gpu_s in ((1.0, 2.0), (2.0, 1.0)):
        times = itertools.accumulate(itertools.cycle((0.0, cpu_s, gpu_s)))
        with accelerator(program("scripted"), clock=times.__next__, only_if_faster=True) as gpu:
            gpu.prepare(store, 0, DEPTH)
            placed = gpu.placements()["lenet", 0, DEPTH]
            assert (placed.files is not None) == (gpu_s < cpu_s)
            assert ("the CPU is faster: 1e+03 ms, the GPU 2e+03 ms" in placed.reason) == (cpu_s < gpu_s)


def test_segments_that_no_task_uses_make_room_for_others(store: SegmentStore) -> None:
    with accelerator(program("scripted"), most_segments=1) as gpu:
        gpu.prepare(store, 0, 1)
        used = gpu.segment("lenet", store.get(0, 1))
        gpu.prepare(store, 0, 2)
        assert gpu.placements()["lenet", 0, 2].reason == "the segments in use fill the GPU"
        used.release()
        used.release()  # a second release counts once
        gpu.prepare(store, 0, 3)
        assert gpu.placements()["lenet", 0, 3].files is not None
        assert ("lenet", 0, 1) not in gpu.placements()


def batched(gpu: Accelerator, store: SegmentStore, count: int) -> list[Array]:
    """The outputs of samples that are given at once; each must be right."""
    segment = gpu.segment("lenet", store.get(0, DEPTH))
    assert isinstance(segment, _GpuSegment)
    outputs = [output for (output,) in segment.run_batch([[sample(seed)] for seed in range(count)])]
    for seed, output in enumerate(outputs):
        (expected,) = store.get(0, DEPTH).run([sample(seed)])
        assert relative_difference(output, expected) < 2e-5, f"sample {seed}"
    segment.release()
    return outputs


def test_samples_that_are_given_at_once_are_computed_in_batches(store: SegmentStore) -> None:
    with accelerator(program("scripted", error=1e-5), batches=(4, 8)) as gpu:
        gpu.prepare(store, 0, DEPTH)
        files = gpu.placements()["lenet", 0, DEPTH].files
        assert files is not None
        assert sorted(files.times_s) == [1, 4, 8]
        assert files.most_at_once == 8
        assert len(batched(gpu, store, 15)) == 15


def test_batches_are_used_only_where_they_pay(store: SegmentStore) -> None:
    times = itertools.accumulate(itertools.chain([0.0, 1.0, 1.0] * CHECKS, itertools.cycle([0.0, 3.8])))
    with accelerator(program("scripted"), clock=times.__next__, batches=(4, 8)) as gpu:
        gpu.prepare(store, 0, DEPTH)  # one sample takes 1 s, a batch of any size 3.8 s
        files = gpu.placements()["lenet", 0, DEPTH].files
        assert files is not None
        assert sorted(files.times_s) == [1, 8]
        assert len(batched(gpu, store, 3)) == 3


def test_batches_whose_samples_have_other_results_are_not_used(store: SegmentStore) -> None:
    with accelerator(program("scripted", batch_error=1e-3), batches=(4,)) as gpu:
        gpu.prepare(store, 0, DEPTH)
        assert gpu.segment("lenet", store.get(0, DEPTH)).most_at_once == 1  # type: ignore[attr-defined]
        assert len(batched(gpu, store, 5)) == 5


def test_a_batch_that_would_exceed_the_time_limit_is_not_tried(store: SegmentStore) -> None:
    times = itertools.accumulate(itertools.cycle([0.0, 1.0, LONGEST_RUN_S / 6]))
    with accelerator(program("scripted", dies_at=CHECKS + 4 + 3), clock=times.__next__, batches=(4, 8)) as gpu:
        gpu.prepare(store, 0, DEPTH)  # a batch of 8 would end the process
        files = gpu.placements()["lenet", 0, DEPTH].files
        assert files is not None
        assert files.loaded
        assert 8 not in files.times_s


def test_batches_that_end_the_process_are_not_tried_again(store: SegmentStore) -> None:
    with accelerator(program("scripted", dies_at=CHECKS + 5, error=1e-5), batches=(4,)) as gpu:
        gpu.prepare(store, 0, DEPTH)  # dies in the first batch
        assert not gpu.is_ready("lenet", 0, DEPTH)
        gpu.prepare(store, 0, DEPTH)
        files = gpu.placements()["lenet", 0, DEPTH].files
        assert files is not None
        assert files.most_at_once == 1
        assert computed(gpu, store).tobytes() != on_cpu(store).tobytes()


class Counting(GpuProcess):
    """Counts the files in the device's memory."""

    files = 0

    def load(self, *args: Any) -> int:
        key = super().load(*args)
        self.files += 1
        return key

    def unload(self, key: int) -> None:
        self.files -= self.holds(key)
        super().unload(key)


@pytest.mark.parametrize(("fails_at", "files"), [(CHECKS + 5, 1), (CHECKS + 7, 0)])
def test_files_that_failed_leave_the_memory_of_the_device(store: SegmentStore, fails_at: int, files: int) -> None:
    """A batch fails while it is tried, or a sample after the check."""
    process = Counting(program("scripted", fails_at=fails_at))
    with contextlib.closing(Accelerator(AcceleratorOptions(batches=(4,)), process)) as gpu:
        gpu.prepare(store, 0, DEPTH)
        computed(gpu, store)
        assert process.files == files
        placed = gpu.placements()["lenet", 0, DEPTH]
        assert (placed.files is None) == (files == 0)


def test_without_room_for_a_batch_single_samples_run_on_the_gpu(store: SegmentStore) -> None:
    part_bytes = slice_model(store.model, 1, DEPTH).size_bytes
    with accelerator(program("scripted"), batches=(4, 8), most_bytes=2 * part_bytes) as gpu:
        gpu.prepare(store, 0, DEPTH)
        files = gpu.placements()["lenet", 0, DEPTH].files
        assert files is not None
        assert sorted(files.times_s) == [1, 4]


@pytest.mark.parametrize(("build", "reason"), [("stateful", "keeps state"), ("quantized", "int8")])
def test_models_that_a_gpu_does_not_suit_run_on_the_cpu(tmp_path: Path, build: str, reason: str) -> None:
    path = tmp_path / f"{build}.tflite"
    path.write_bytes(getattr(built_models, build)().to_bytes())
    store = SegmentStore(load_model(path))
    with accelerator(program("scripted")) as gpu:
        gpu.prepare(store, 0, store.model.graph.depth)
        ((_, placed),) = gpu.placements().items()
        assert reason in placed.reason
    store.close()


def test_differences_are_relative_to_the_largest_value_and_infinite_where_one_is_not_finite() -> None:
    right = np.array([0.001, -10.0, np.inf], np.float32)
    assert relative_difference(np.array([0.002, -10.0, np.inf], np.float32), right) == pytest.approx(1e-4)
    assert relative_difference(np.array([0.001, np.nan, np.inf], np.float32), right) == np.inf
    assert relative_difference(np.array([0.001, -10.0, -np.inf], np.float32), right) == np.inf
    assert relative_difference(np.array([0.001, -10.0, 1.0], np.float32), right) == np.inf
    zeros = np.zeros(2, np.float32)
    assert relative_difference(zeros + 1, zeros) == 1.0
