"""Segments: between any two cuts, each weight loaded once, in bounded memory, without waiting for another's slicing."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from bus.errors import ConfigError, CutError
from stages.models.model import Model
from stages.models.runtime.litert import InterpreterOptions, SegmentRunner
from stages.models.sandbox import Sandbox
from stages.models.segments.store import SegmentStore, StoreLimits
from stages.models.slicer import SlicedPart
from stages.models.verify import random_inputs
from stages.zoo.registry import load_model
from tests.unit.stages import built_models


@pytest.fixture
def sample(lenet: Model) -> list[np.ndarray]:
    return random_inputs(lenet, np.random.default_rng(3))


def store_of(model: Model, tmp_path: Path, **more: object) -> SegmentStore:
    return SegmentStore(model, tmp_path / "segments", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("delegate", [True, False])
def test_every_pair_of_cuts_runs_as_a_chain_of_shared_pieces(
    lenet: Model, sample: list[np.ndarray], tmp_path: Path, delegate: bool
) -> None:
    store = store_of(lenet, tmp_path, options=InterpreterOptions(delegate=delegate))
    wanted = SegmentRunner(lenet.source, delegate=delegate).run(sample)[0]
    for cut1 in range(8):
        for cut2 in range(cut1, 8):
            values = sample
            for ends in ((0, cut1), (cut1, cut2), (cut2, 7)):
                values = store.prepare(*ends).run(values)
            assert values[0].tobytes() == wanted.tobytes(), (cut1, cut2)


def test_segments_that_overlap_share_their_pieces(lenet: Model, tmp_path: Path) -> None:
    store = store_of(lenet, tmp_path, limits=StoreLimits(joined_bytes=0))
    store.warm()
    whole = store.chain(0, 7)
    assert store.chain(4, 7) == whole[-3:]
    assert sum(piece.size_bytes for piece in whole) == store.loaded_bytes


def test_a_small_segment_runs_as_one_piece_within_a_bound(
    lenet: Model, sample: list[np.ndarray], tmp_path: Path
) -> None:
    generous = store_of(lenet, tmp_path)
    generous.prepare(0, 7)
    whole = generous.joined(0, 7)
    assert whole is not None
    store = store_of(lenet, tmp_path, limits=StoreLimits(joined_bytes=whole.size_bytes))
    segment = store.prepare(0, 7)
    wanted = segment.run(sample)[0].tobytes()
    assert len(store.chain(0, 7)) > 1
    joined = store.joined(0, 7)
    assert joined is not None
    unloaded = weakref.ref(joined)
    del joined
    store.prepare(0, 6)
    assert store.joined(0, 7) is None
    assert segment.run(sample)[0].tobytes() == wanted
    gc.collect()
    assert unloaded() is None  # the segment runs its pieces and no longer holds the joined one


def test_useful_cuts_are_ready_after_warming_and_others_after_preparing(lenet: Model, tmp_path: Path) -> None:
    store = store_of(lenet, tmp_path)
    assert not store.is_ready(0, 7)
    store.warm()
    assert store.is_ready(0, 7)
    assert store.is_ready(4, 7)
    assert not store.is_ready(3, 7)
    store.prepare(3, 7)
    assert store.is_ready(3, 7)


def test_warming_joins_a_small_models_whole_heads_and_tails(lenet: Model, tmp_path: Path) -> None:
    store = store_of(lenet, tmp_path)
    store.warm()
    assert all(store.joined(*ends) is not None for ends in ((0, 7), (0, 5), (4, 7)))
    assert store.joined(4, 6) is None
    whole = store.joined(0, 7)
    assert whole is not None
    tight = store_of(lenet, tmp_path, limits=StoreLimits(joined_bytes=whole.size_bytes))
    tight.warm()
    assert tight.joined(0, 7) is not None
    assert tight.joined(0, 5) is None


async def test_a_prepared_segment_needs_no_thread(lenet: Model, tmp_path: Path) -> None:
    store = store_of(lenet, tmp_path)
    store.warm()
    store.prepare(3, 7)
    store._worker.shutdown()
    assert (await store.ready(0, 7)).end == 7
    assert (await store.ready(3, 7)).begin == 3
    with pytest.raises(RuntimeError, match="shutdown"):
        await store.ready(2, 5)  # not prepared: it would have to slice


def test_a_tasks_first_sample_finds_a_free_interpreter(lenet: Model, sample: list[np.ndarray], tmp_path: Path) -> None:
    """A task with one sample then computes on the event loop, without waking a thread."""
    store = store_of(lenet, tmp_path)
    assert not store.get(0, 4).idle  # not loaded
    store.prepare(0, 4).run(sample)
    assert store.get(0, 4).idle


def test_relaying_computes_nothing(lenet: Model, sample: list[np.ndarray], tmp_path: Path) -> None:
    store = store_of(lenet, tmp_path)
    assert store.prepare(0, 0).run(sample)[0] is sample[0]
    assert store.loaded_bytes == 0


def test_memory_is_bounded_and_what_is_in_use_stays(lenet: Model, sample: list[np.ndarray], tmp_path: Path) -> None:
    store = store_of(lenet, tmp_path, limits=StoreLimits(budget_bytes=1))
    used = store.prepare(3, 5)
    for begin in range(7):
        store.prepare(begin, begin + 1).release()
        assert store.is_ready(3, 5)
    alone = store.chain(3, 5)
    assert store.loaded_bytes <= sum(piece.size_bytes for piece in alone) + max(
        piece.size_bytes for piece in store.chain(0, 7)
    )
    shape = used.inputs[0].shape
    assert used.run([np.ones(shape, np.float32)])[0].shape == (1, 120)


def test_a_segment_whose_bound_was_given_up_still_runs(lenet: Model, sample: list[np.ndarray], tmp_path: Path) -> None:
    store = store_of(lenet, tmp_path, limits=StoreLimits(budget_bytes=1))
    segment = store.prepare(0, 3)
    wanted = segment.run(sample)[0]
    segment.release()
    store.prepare(0, 5).release()
    store.prepare(6, 7)
    assert not store.is_ready(0, 3)
    assert segment.run(sample)[0].tobytes() == wanted.tobytes()


def test_running_tasks_do_not_wait_for_slicing(lenet: Model, sample: list[np.ndarray], tmp_path: Path) -> None:
    slicing, go_on = threading.Event(), threading.Event()
    go_on.set()

    class SlowSandbox(Sandbox):
        def admit(self, part: SlicedPart, source: Path | bytes, batch: int = 1) -> None:
            slicing.set()
            assert go_on.wait(60)
            super().admit(part, source)

    store = store_of(lenet, tmp_path, sandbox=SlowSandbox(lenet))
    store.warm()
    running = store.prepare(0, 7)
    wanted = running.run(sample)[0]
    slicing.clear()
    go_on.clear()
    thread = threading.Thread(target=store.prepare, args=(1, 3))
    thread.start()
    assert slicing.wait(60)
    assert running.run(sample)[0].tobytes() == wanted.tobytes()  # while the other is in the middle of slicing
    go_on.set()
    thread.join(60)
    assert store.is_ready(1, 3)
    assert running.run(sample)[0].tobytes() == wanted.tobytes()


async def test_the_loop_does_not_wait_either(lenet: Model, sample: list[np.ndarray], tmp_path: Path) -> None:
    store = store_of(lenet, tmp_path)
    assert (await store.ready(2, 5)).outputs[0].shape == (1, 120)
    store.close()


def test_many_threads_get_the_same_answer(lenet: Model, sample: list[np.ndarray], tmp_path: Path) -> None:
    store = store_of(lenet, tmp_path, limits=StoreLimits(replicas=2))
    wanted = store.prepare(0, 7).run(sample)[0].tobytes()
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(20):
            cut = seed % 8
            values = store.get(cut, 7).run(store.get(0, cut).run(sample))
            if values[0].tobytes() != wanted:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_large_pieces_are_files_that_a_restart_finds_again(
    lenet: Model, sample: list[np.ndarray], tmp_path: Path
) -> None:
    limits = StoreLimits(in_memory_bytes=1000)
    store = store_of(lenet, tmp_path, limits=limits)
    wanted = store.prepare(0, 7).run(sample)[0]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "segments").glob("*.tflite")}
    assert files
    again = store_of(lenet, tmp_path, limits=limits)
    again.warm()
    assert {path: path.stat().st_mtime_ns for path in files} == files
    damaged = max(files, key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-4])  # cut short by something else
    third = store_of(lenet, tmp_path, limits=limits)
    assert third.prepare(0, 7).run(sample)[0].tobytes() == wanted.tobytes()
    third.prepare(2, 3)
    assert not (tmp_path / "segments" / "1-4.tflite").exists()


def test_every_sample_of_a_model_with_state_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "stateful.tflite"
    path.write_bytes(built_models.stateful().to_bytes())
    store = store_of(load_model(path), tmp_path)
    segment = store.prepare(0, 6)
    ones = [np.ones((1, 4), np.float32)]
    assert segment.run(ones)[0].tobytes() == segment.run(ones)[0].tobytes()
    with pytest.raises(CutError, match="share the state counter"):
        store.prepare(0, 3)


def test_wrong_ends_are_refused(lenet: Model, sample: list[np.ndarray], tmp_path: Path) -> None:
    store = store_of(lenet, tmp_path)
    with pytest.raises(CutError, match="positions 0 to 7, not 8"):
        store.prepare(0, 8)
    with pytest.raises(ConfigError, match="cannot begin at position 5 and end at 3"):
        store.prepare(5, 3)
    with pytest.raises(ConfigError, match=r"lenet 1..3 takes 1 tensors, not 2"):
        store.prepare(0, 3).run([*sample, *sample])
