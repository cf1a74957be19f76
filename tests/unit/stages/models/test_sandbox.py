"""The first run of every slice: in a child, whose death is an error and not ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from bus.errors import ModelError
from stages.models.model import Model
from stages.models.profiler import TimedRuns, measure
from stages.models.runtime.trial_run import ChildProgram, findings_file, trial_folder
from stages.models.sandbox import Sandbox
from stages.models.segments.store import SegmentStore
from stages.models.slicer import slice_model
from stages.models.verify import random_inputs, verify
from stages.zoo.registry import load_model
from tests.unit.stages import built_models

DEATH = ChildProgram("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
"""A child that crashes as soon as it starts."""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A foreign model; no slice of it was tried yet."""
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "model.tflite"
    path.write_bytes(built_models.blockwise().to_bytes())
    return load_model(path)


def with_stale_scales(data: bytes) -> bytes:
    """The slice as it would be if the index of its scales had not been renumbered."""
    part = schema.ModelT.InitFromPackedBuf(data, 0)
    for tensor in part.subgraphs[0].tensors:
        if tensor.quantization is not None and tensor.quantization.details is not None:
            tensor.quantization.details.scales = 1_000_000
    return built_models.packed(part)


@pytest.mark.parametrize("delegate", [True, False])
def test_a_slice_that_kills_the_runtime_is_an_error_that_names_its_layers(model: Model, delegate: bool) -> None:
    part = slice_model(model, 1, 2)
    with Sandbox(model, delegate=delegate) as sandbox:
        for _ in range(2):  # a death is not remembered as a verdict, and the next child lives
            with pytest.raises(
                ModelError, match=r"model\.tflite: a trial run of layers 1 to 2 (died of SIG|ended with)"
            ):
                sandbox.admit(part, with_stale_scales(part.to_bytes()))
        sandbox.admit(part, part.to_bytes())


Work = Callable[[Model, Sandbox], object]


def prepared(model: Model, sandbox: Sandbox) -> object:
    return SegmentStore(model, sandbox=sandbox).prepare(1, 3)


def warmed(model: Model, sandbox: Sandbox) -> object:
    SegmentStore(model, sandbox=sandbox).warm()
    return None


def got(model: Model, sandbox: Sandbox) -> object:
    return SegmentStore(model, sandbox=sandbox).get(0, 4).run(random_inputs(model, np.random.default_rng(0)))


def verified(model: Model, sandbox: Sandbox) -> object:
    return verify(model, [(1, 3)], [random_inputs(model, np.random.default_rng(0))], sandbox=sandbox)


def measured(model: Model, sandbox: Sandbox) -> object:
    return measure(model, TimedRuns(num_runs=1), sandbox=sandbox)


@pytest.mark.parametrize("work", [verified, measured, prepared, warmed, got])
def test_everything_that_runs_slices_tries_them_first(work: Work, model: Model) -> None:
    with pytest.raises(ModelError, match=r"a trial run of layers? .* died of SIGSEGV while starting"):
        work(model, Sandbox(model, program=DEATH))
    work(model, Sandbox(model))
    work(model, Sandbox(model, program=DEATH))  # a slice that passed is not tried again by another sandbox


@pytest.mark.parametrize(
    ("work", "layers"),
    [
        (lambda model: SegmentStore(model).prepare(1, 3), (2, 3)),
        (lambda model: verify(model, [(1, 3)], [random_inputs(model, np.random.default_rng(0))]), (2, 3)),
        (lambda model: measure(model, TimedRuns(num_runs=1)), (2, 2)),
    ],
    ids=["prepared", "verified", "measured"],
)
def test_slices_are_tried_without_asking_for_it(
    work: Callable[[Model], object], layers: tuple[int, int], model: Model
) -> None:
    work(model)
    part = slice_model(model, *layers)
    Sandbox(model, program=DEATH).admit(part, part.to_bytes())


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{}", b"3", b"null", b"\xff\xfe", b'{"shapes": ', b"\0" * 64])
def test_damaged_findings_are_found_again(model: Model, damaged: bytes) -> None:
    with Sandbox(model) as sandbox:
        part = slice_model(model, 1, 2)
        sandbox.admit(part, part.to_bytes())
    stored = [findings_file(model.sha256, kind) for kind in ("json", "slices")]
    before = stored[0].read_bytes()
    for file in stored:
        assert file.stat().st_size > 0
        file.write_bytes(damaged)
    again = load_model(model.path)
    assert stored[0].read_bytes() == before
    with Sandbox(again) as sandbox:
        sandbox.admit(part, part.to_bytes())


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path / "other"))
    trials = tmp_path / "other" / "trials"
    trials.mkdir(parents=True)
    old, fresh, findings = (trials / name for name in ("tmpold.tflite", "tmpnew.tflite", "0123-2.3.0-3.slices"))
    for file in (old, fresh, findings):
        file.touch()
    for file in (old, findings):
        os.utime(file, (1.0, 1.0))
    assert trial_folder() == trials
    assert (old.exists(), fresh.exists(), findings.exists()) == (False, True, True)


def test_a_child_that_hangs_is_given_up(model: Model) -> None:
    sleeper = ChildProgram("import time; time.sleep(60)", longest_s=0.2)
    with Sandbox(model, program=sleeper) as sandbox, pytest.raises(ModelError, match="layer 1 did not end within"):
        sandbox.admit(slice_model(model, 1, 1), slice_model(model, 1, 1).to_bytes())


def test_deepar_s_own_models_are_not_tried(lenet: Model) -> None:
    verified(lenet, Sandbox(lenet, program=DEATH))
