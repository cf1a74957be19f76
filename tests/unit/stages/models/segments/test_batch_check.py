"""Segments that may be computed in batches: their results stay the same to the bit, and the time pays."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from bus.errors import ModelError
from bus.tensors import Array
from stages.models.files.graph_builder import GraphBuilder
from stages.models.model import Model, read_model
from stages.models.runtime import litert, trial_child
from stages.models.runtime.litert import SegmentRunner, SliceTrial
from stages.models.runtime.trial_run import ChildProgram
from stages.models.sandbox import Sandbox
from stages.models.segments.batch_check import NEARLY, BatchCheck, check_batches, known_check, store_check
from stages.models.segments.store import SegmentStore, StoreLimits
from tests.unit.stages import built_models


def load(tmp_path: Path, graph: GraphBuilder) -> Model:
    path = tmp_path / "model.tflite"
    path.write_bytes(graph.to_bytes())
    return read_model(path)


def clock(alone_s: float, together_s: float) -> Callable[[], float]:
    """A clock that is asked around one sample, then in turns around eight samples and the batch of them."""
    turns = count()

    def now() -> float:
        turn = next(turns)
        if turn < 2:
            return turn * alone_s / 8
        full, part = divmod(turn - 2, 3)
        return alone_s + full * (alone_s + together_s) + (0.0, alone_s, alone_s + together_s)[part]

    return now


def samples_of(segment: object, numbers: range) -> list[list[Array]]:
    rng = np.random.default_rng(1)
    specs = segment.inputs  # type: ignore[attr-defined]
    return [[rng.standard_normal(spec.shape).astype(spec.dtype) for spec in specs] for _ in numbers]


@pytest.mark.parametrize("ends", [(0, 7), (2, 7), (4, 6)])
def test_batches_of_lenet_are_its_samples_to_the_bit(lenet: Model, ends: tuple[int, int]) -> None:
    store = SegmentStore(lenet)
    found = check_batches(store, *ends, clock(0.008, 0.002))
    assert (found.exact, found.difference, found.fault) == (True, 0.0, "")
    assert found.speedup == pytest.approx(4.0)
    assert found.most == 32
    assert found.refusal("exact") == ""
    segment = store.prepare(*ends)
    samples = samples_of(segment, range(7))
    for size in (7, 1, 4):  # larger, smaller and single ones in any order
        for values, batched in zip(samples[:size], segment.run_batch(samples[:size]), strict=True):
            for one, other in zip(segment.run(values), batched, strict=True):
                assert one.tobytes() == other.tobytes()


def test_a_batch_that_is_hardly_faster_does_not_pay(lenet: Model) -> None:
    found = check_batches(SegmentStore(lenet), 4, 7, clock(0.008, 0.0075))
    assert "only 1.07 times as fast" in found.refusal("exact")


def test_a_batch_takes_half_a_second_at_most_beyond_the_smallest_useful_one(lenet: Model) -> None:
    assert check_batches(SegmentStore(lenet), 4, 7, clock(0.9, 0.38)).most == 10
    assert check_batches(SegmentStore(lenet), 4, 7, clock(0.9, 0.80)).most == 8


def test_slow_samples_are_compared_in_small_batches_or_not_at_all(lenet: Model) -> None:
    assert check_batches(SegmentStore(lenet), 4, 7, clock(8 * 0.3, 0.8)).most == 3
    assert "alone takes 1.2 s" in check_batches(SegmentStore(lenet), 4, 7, clock(8 * 1.2, 1.0)).refusal("any")


def mixing() -> GraphBuilder:
    """Every sample less the largest values of its batch."""
    graph = GraphBuilder("a layer that looks at the whole batch")
    x, y = graph.input("input", (1, 6)), graph.tensor("less", (1, 6))
    largest = graph.tensor("largest", (1, 6))
    axis = graph.constant("axis", np.array([0], np.int32))
    graph.operator("REDUCE_MAX", [x, axis], [largest], schema.ReducerOptionsT(keepDims=True))
    graph.operator("SUB", [x, largest], [y], schema.SubOptionsT())
    graph.output(y)
    return graph


def test_results_that_depend_on_the_batch_are_found(tmp_path: Path) -> None:
    model = load(tmp_path, mixing())
    found = check_batches(SegmentStore(model), 0, model.graph.depth, clock(0.008, 0.001))
    assert not found.exact
    assert "differ by" in found.refusal("exact")
    assert "differ by" in found.refusal("any")


def test_any_accepts_results_that_differ_slightly() -> None:
    near = BatchCheck(most=8, difference=NEARLY / 2, speedup=2.0)
    assert "differ by" in near.refusal("exact")
    assert near.refusal("any") == ""


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: built_models.reshaped(wanted=(1, 60)), "resized|the shape of"),
        (built_models.stateful, "keeps state"),
    ],
)
def test_models_without_batches_say_why(make: Callable[[], GraphBuilder], fault: str, tmp_path: Path) -> None:
    model = load(tmp_path, make())
    store = SegmentStore(model)
    found = check_batches(store, 0, model.graph.depth)
    assert found.most == 1
    assert re.search(fault, found.refusal("any")), found
    segment = store.prepare(0, model.graph.depth)
    (values,) = samples_of(segment, range(1))
    for one, other in zip(segment.run(values), SegmentStore(model).get(0, model.graph.depth).run(values), strict=True):
        assert one.tobytes() == other.tobytes()  # the attempt left the interpreter usable


def test_a_batch_that_crashes_the_runtime_crashes_the_sandbox_only(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.residual())
    SegmentStore(model).warm()  # single samples pass
    death = ChildProgram("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    found = check_batches(SegmentStore(model, sandbox=Sandbox(model, program=death)), 0, model.graph.depth)
    assert "died of SIGSEGV" in found.refusal("any")


def test_the_largest_batch_runs_in_the_sandbox_first(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.residual())
    SegmentStore(model).warm()
    program = ChildProgram(
        "from tests.unit.stages.models.segments.test_batch_check import crashing_above; crashing_above(8)"
    )
    store = SegmentStore(model, sandbox=Sandbox(model, program=program))
    found = check_batches(store, 0, model.graph.depth, clock(0.008, 0.002))
    assert "died of SIGSEGV" in found.refusal("any")


def crashing_above(batch: int) -> None:
    """The sandbox's child process, which dies in larger batches."""

    class Crashing(SliceTrial):
        def run(self, *args: Any, **order: Any) -> None:
            if order["batch"] > batch:
                os.kill(os.getpid(), signal.SIGSEGV)
            super().run(*args, **order)

    litert.SliceTrial = Crashing  # type: ignore[misc]
    trial_child.slices()


def test_a_sample_of_another_shape_or_type_fails_its_batch(lenet: Model) -> None:
    segment = SegmentStore(lenet).prepare(4, 7)
    good, other = samples_of(segment, range(2))
    for bad in ([np.concatenate([other[0], other[0]])], [other[0].astype(np.float64)]):
        with pytest.raises(ModelError, match="of a sample"):
            segment.run_batch([good, bad])
    assert len(segment.run_batch([good, other])) == 2


def test_a_file_whose_batch_cannot_be_resized_runs_single_samples_afterwards(tmp_path: Path) -> None:
    runner = SegmentRunner(built_models.reshaped(wanted=(1, 60)).to_bytes())
    value = np.ones((1, 3, 5, 2), np.float32)
    before = runner.run([value])
    with pytest.raises(ModelError):
        runner.run([np.repeat(value, 2, axis=0)], batch=2)
    assert runner.run([value], batch=1)[0].tobytes() == before[0].tobytes()


def in_rows() -> GraphBuilder:
    """Twelve values as three rows of four, then in one row again."""
    graph = GraphBuilder("rows")
    x, one = graph.input("input", (1, 12)), graph.tensor("one", (1, 12))
    graph.operator("TANH", [x], [one])
    rows, last = graph.tensor("rows", (3, 4)), graph.tensor("last", (3, 4))
    target = graph.constant("rows/shape", np.array([-1, 4], np.int32))
    graph.operator("RESHAPE", [one, target], [rows], schema.ReshapeOptionsT([-1, 4]))
    graph.operator("LOGISTIC", [rows], [last])
    whole = graph.tensor("whole", (1, 12))
    target = graph.constant("whole/shape", np.array([-1, 12], np.int32))
    graph.operator("RESHAPE", [last, target], [whole], schema.ReshapeOptionsT([-1, 12]))
    graph.output(whole)
    return graph


def test_a_cut_without_a_batch_dimension_fails_batches_but_no_single_sample(tmp_path: Path) -> None:
    """A later task may cut where a tensor counts no samples, within a segment that passed the check."""
    model = load(tmp_path, in_rows())
    store = SegmentStore(model, limits=StoreLimits(joined_bytes=0))
    ends = 0, model.graph.depth
    assert check_batches(store, *ends).exact
    store.prepare(0, 2)
    segment = store.prepare(*ends)
    (values,) = samples_of(segment, range(1))
    before = segment.run(values)
    for size in (2, 3, 6):
        with pytest.raises(ModelError, match="first dimension"):
            segment.run_batch([values] * size)
        assert segment.run(values)[0].tobytes() == before[0].tobytes()


def test_findings_are_kept_for_the_next_start(lenet: Model) -> None:
    store = SegmentStore(lenet)
    found = BatchCheck(most=16, exact=True, speedup=2.5)
    assert known_check(store, 3, 7, 1) is None
    store_check(found, store, 3, 7, 1)
    assert known_check(store, 3, 7, 1) == found
    assert known_check(store, 3, 7, 2) is None  # other threads, another time


def test_a_check_ends_soon_when_the_process_ends(lenet: Model) -> None:
    runs = count()
    found = check_batches(SegmentStore(lenet), 4, 7, stopped=lambda: next(runs) == 5)
    assert "stopped" in found.fault
    assert next(runs) == 6  # nothing ran after that
