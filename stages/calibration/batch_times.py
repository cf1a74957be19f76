"""How fast this machine computes several samples of a model together, layer by layer, and whether the results stay the same.

Each layer is cut out and timed on batches, as `stages.models.profiler` times it on one sample. The findings are stored
beside the profiles, and stages that compute in batches announce them. Each segment is still checked before it is computed in
batches (`stages.models.segments.batch_check`); what is measured here says only how fast that will be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final

import numpy as np
from pydantic import Field

from bus.errors import ModelError
from bus.tensors import Array, bytes_in
from bus.values import BatchSpeed, Frozen, ModelProfile
from stages.models.compute_options import BatchMode
from stages.models.difference import relative_difference
from stages.models.files.cache import measured_path, write_whole
from stages.models.model import Model
from stages.models.profiler import Say, Step, measuring_alone, processor_name
from stages.models.runtime.litert import SegmentRunner
from stages.models.sandbox import Sandbox
from stages.models.segments.batch_check import ACTIVATION_BYTES, NEARLY
from stages.models.slicer import SlicedPart, slice_model
from stages.models.thread_count import usable_cores
from stages.models.verify import random_inputs, run_part

METHOD = 1
"""Version of the method. Increase it when measuring changes: measurements of other versions are ignored."""

SIZES: Final = (2, 4, 8, 16, 32)
"""The batches that are measured."""

LONG_S = 0.1
"""Batches larger than one that takes so long count as equally fast per sample: such a layer gains no more."""

RUNS = 3
"""Timed runs of each batch; the shortest counts."""

Factor = Annotated[float, Field(ge=0, le=100)]


class LayerBatches(Frozen):
    """One layer in batches."""

    factors: tuple[Factor, ...] = ()  # time per sample over that of one alone, in batches of the first sizes of `SIZES`
    difference: float | None = (
        None  # largest one of a result, relative to the largest value; None: no batches are possible
    )

    def same(self, mode: BatchMode) -> bool:
        """Whether the results are the same, as far as a mode demands."""
        return self.difference is not None and self.difference <= (NEARLY if mode == "any" else 0.0)


class MeasuredBatches(Frozen):
    """The batches of one model on one machine."""

    sha256: str  # of the model file
    layers: tuple[LayerBatches, ...]

    def speeds(self, mode: BatchMode) -> tuple[BatchSpeed, ...] | None:
        """The batches of a profile; None if the model has none.

        A segment with a layer whose results differ is computed one by one. Most segments in a cloud reach to the last layer,
        so no layer before such a one counts as faster.
        """
        differing = [at for at, layer in enumerate(self.layers, start=1) if not layer.same(mode)]
        first = max(differing, default=0)
        if first == len(self.layers):
            return None
        return tuple(
            BatchSpeed(
                batch=size,
                factors=tuple(
                    1.0 if at < first or not layer.factors else layer.factors[min(number, len(layer.factors) - 1)]
                    for at, layer in enumerate(self.layers)
                ),
            )
            for number, size in enumerate(SIZES)
        )

    def added_to(self, profile: ModelProfile, mode: BatchMode, num_threads: int) -> ModelProfile:
        """A profile of the same model with these batches."""
        speeds = self.speeds(mode)
        if speeds is None:
            return profile.without_batches()
        executors = max(1, usable_cores() // num_threads)
        return ModelProfile.model_validate(profile.model_copy(update={"batch": speeds, "executors": executors}))


def measure_batches(
    model: Model,
    *,
    num_threads: int = 1,
    step: Step | None = None,
    time_s: Callable[[SegmentRunner, Sequence[Array]], float] = SegmentRunner.timed,
) -> MeasuredBatches:
    """Time every layer in batches of 2 to 32 samples. Raises `ModelError` if the model cannot run here.

    `time_s` takes a runner and its inputs, and returns the seconds that one computation takes.
    """
    graph, layers = model.graph, list[LayerBatches]()
    rng = np.random.default_rng(0)
    samples = [random_inputs(model, rng) for _ in range(2)]
    bounds = [position for position in range(graph.depth + 1) if position not in graph.blocked]
    with Sandbox(model) as sandbox:
        for number, (begin, end) in enumerate(pairwise(bounds)):
            if step is not None:
                step(graph.layers[begin].name, number, len(bounds) - 1)
            part = slice_model(model, begin + 1, end)
            data = part.to_bytes()
            sandbox.admit(part, data)
            runner = SegmentRunner(data, num_threads, title=f"{model.name} {begin + 1}..{end}")
            inputs = [_read(part, sample) for sample in samples]
            samples = [run_part(part, runner, sample) for sample in samples]
            found = LayerBatches()
            if not graph.stateful and all(value.ndim and value.shape[0] == 1 for value in inputs[0]) and inputs[0]:
                results = [runner.run(one) for one in inputs]
                fits = ACTIVATION_BYTES // max(1, bytes_in(inputs[0]) + bytes_in(results[0]))
                sizes = [size for size in SIZES if size <= fits]
                with contextlib.suppress(ModelError):  # it cannot be computed in batches
                    sandbox.admit(part, data, max(sizes, default=1))
                    found = _measured(runner, list(zip(inputs, results, strict=True)), sizes, time_s)
            layers += [found] * (end - begin)
    if step is not None:
        step("done", len(bounds) - 1, len(bounds) - 1)
    return MeasuredBatches(sha256=model.sha256, layers=tuple(layers))


def _read(part: SlicedPart, sample: Sequence[Array]) -> list[Array]:
    known = {spec.name: value for spec, value in zip(part.inputs, sample, strict=True)}
    return [known[name] for name in part.reads]


def _measured(
    runner: SegmentRunner,
    samples: Sequence[tuple[list[Array], list[Array]]],
    sizes: Sequence[int],
    time_s: Callable[[SegmentRunner, Sequence[Array]], float],
) -> LayerBatches:
    """One layer in batches of these samples, by turns; of each its inputs and its results."""
    alone_s = min(time_s(runner, samples[0][0]) for _ in range(RUNS))
    factors, difference = list[float](), 0.0
    for size in sizes:
        turns = [samples[at % len(samples)] for at in range(size)]
        batch = [np.concatenate(values) for values in zip(*(inputs for inputs, _ in turns), strict=True)]
        rights = [np.concatenate(values) for values in zip(*(results for _, results in turns), strict=True)]
        for made, right in zip(runner.run(batch, size), rights, strict=True):
            if made.shape != right.shape:
                return LayerBatches()
            if made.tobytes() != right.tobytes():
                found = relative_difference(made.astype(np.float64), right.astype(np.float64))
                difference = min(1e9, max(difference, found, 1e-12))
        took_s = min(time_s(runner, batch) for _ in range(RUNS))
        factors.append(float(f"{min(100.0, took_s / size / max(alone_s, 1e-9)):.4g}"))
        if took_s > LONG_S:
            break
    return LayerBatches(factors=tuple(factors), difference=difference if factors else None)


# --- storing ----------------------------------------------------------------------------------------------------------


def stored_batches(model: Model, num_threads: int) -> MeasuredBatches | None:
    """What was measured on this machine with `num_threads` threads an inference; None: nothing was."""
    with contextlib.suppress(OSError, ValueError):
        found = MeasuredBatches.model_validate_json(_path(model, num_threads).read_bytes())
        if found.sha256 == model.sha256:
            return found
    return None


def measure_and_store_batches(
    model: Model, num_threads: int, *, step: Step | None = None, say: Say | None = None
) -> MeasuredBatches:
    """Measure a model's batches, and store them if the disk allows. The caller holds `measuring_alone`."""
    found = measure_batches(model, num_threads=num_threads, step=step)
    try:
        write_whole(_path(model, num_threads), [found.model_dump_json().encode()], durable=False)
    except ModelError as error:
        if say is not None:
            say(f"the batches were not stored: {error}")
    return found


def measure_missing_batches(model: Model, num_threads: int, *, say: Say | None = None) -> MeasuredBatches:
    """The stored batches of a model, measured now if there are none, while no other process of this user measures."""
    with measuring_alone(say):
        found = stored_batches(model, num_threads)
        return measure_and_store_batches(model, num_threads, say=say) if found is None else found


def with_batches(
    profile: ModelProfile,
    model: Model,
    mode: BatchMode,
    num_threads: int,
    *,
    remeasure: bool = False,
    say: Say | None = None,
) -> ModelProfile:
    """The profile with the batches that were measured on this machine, unchanged if none were, or where they are not used.

    They are not used if the mode is off or the GPU computes. `remeasure` measures them again.
    """
    found = None if mode == "off" or profile.accelerator == "gpu" else stored_batches(model, num_threads)
    if found is None:
        return profile
    if remeasure:
        if say is not None:
            say(f"measuring batches of {model.name} on this machine")
        with measuring_alone(say):
            found = measure_and_store_batches(model, num_threads, say=say)
    return found.added_to(profile, mode, num_threads)


def _path(model: Model, num_threads: int) -> Path:
    known_by = [str(METHOD), processor_name(), str(num_threads), model.sha256, metadata.version("ai-edge-litert")]
    return measured_path(model.name, known_by, ".batches.json")
