"""Checking that a model in parts says what the model in one piece says, bit for bit.

For a pair of cuts the three parts run one after the other on what crosses the cuts, and every output is compared with the
whole's by its bytes. A part that was given bit-identical input before is not run again: the kernels are functions of
their input (models that keep state are never shortened like this), so it would say the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from bus.errors import ConfigError, CutError, ModelError
from bus.values import TensorSpec
from stages.models.files.operators import UNREPEATABLE
from stages.models.model import Model
from stages.models.runtime.litert import SegmentRunner
from stages.models.sandbox import Sandbox
from stages.models.slicer import SlicedPart, slice_model

Array: TypeAlias = np.ndarray[Any, Any]
Pair: TypeAlias = tuple[int, int]

Step: TypeAlias = Callable[[int, int], None]
"""pairs checked, pairs in total"""


@dataclass(frozen=True)
class Report:
    """What `deepar models verify` prints."""

    model: str  # its name
    positions: int  # l + 1
    checked: int  # pairs of cuts that were run
    bit_identical: bool  # whether all outputs of all pairs equal the whole's
    max_abs_diff: float  # the largest difference found, in the outputs' units
    worst: Pair | None  # the pair that showed it, None where there is no difference
    uncuttable: tuple[tuple[int, str], ...]  # positions and why
    explanation: str | None = None  # what makes the difference, where that was shown; and what was not run
    explained: bool = False  # whether the difference was shown to come from the runtime and not from the cut
    differing: tuple[Pair, ...] = ()  # all pairs that differ
    signature: str | None = None  # the one that was run; None where the model has none
    unseen: tuple[str, ...] = ()  # what of the file was not run, in words


def pairs_of(model: Model, cuts: str, seed: int) -> list[Pair]:
    """The pairs of cuts (cut1 <= cut2) that a user asks for.

    `all` is every pair, `single` every position once (cut1 = cut2), a number N that many random pairs after all single ones.
    Positions that cannot be cut are left out. Raises `ConfigError` for anything else.
    """
    depth = model.graph.depth
    positions = [position for position in range(depth + 1) if position not in model.graph.blocked]
    every = [(first, second) for first in positions for second in positions if first <= second]
    if cuts == "all":
        return every
    single = [(position, position) for position in positions]
    if cuts == "single":
        return single
    if not cuts.isdecimal():
        raise ConfigError(f"--cuts takes all, single or a number of random pairs, not {cuts}")
    double = [pair for pair in every if pair[0] < pair[1]]
    chosen = random.Random(seed).sample(double, min(int(cuts), len(double)))
    return single + sorted(chosen)


def random_inputs(model: Model, rng: np.random.Generator) -> list[Array]:
    """One random sample for the model's inputs: floats in 0..1, small integers their whole range, large ones 0 or 1."""
    return [_random(spec, rng) for spec in model.manifest.cuts[0].tensors]


def _random(spec: TensorSpec, rng: np.random.Generator) -> Array:
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return rng.random(spec.shape).astype(dtype)
    if dtype.kind == "c":
        return (rng.random(spec.shape) + 1j * rng.random(spec.shape)).astype(dtype)
    if dtype.kind in "iu" and dtype.itemsize <= 2:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, spec.shape, dtype, endpoint=True)
    # wide integers are indices as a rule, and an index out of range is the model's end
    return rng.integers(0, 2, spec.shape).astype(dtype)


def named_inputs(model: Model, given: Mapping[str, Array]) -> list[list[Array]]:
    """Samples out of arrays by tensor name, or by the name that the model's signature has for it (one input: any name).

    An array has the tensor's shape, or one more dimension in front for several samples. Raises `ConfigError`.
    """
    specs = model.manifest.cuts[0].tensors
    aliases = model.graph.input_aliases
    if len(specs) == 1 and len(given) == 1:
        given = {specs[0].name: next(iter(given.values()))}
    stacks = []
    for spec in specs:
        name = spec.name if spec.name in given else aliases.get(spec.name, spec.name)
        if name not in given:
            raise ConfigError(f"the inputs file has no {name}; it has {', '.join(given) or 'nothing'}")
        array = given[name]
        stack = array
        if array.shape == spec.shape:
            stack = array[None]
        elif array.ndim == len(spec.shape) and array.shape[1:] == spec.shape[1:] and spec.shape[0] == 1:
            stack = array[:, None]
        if stack.shape[1:] != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise ConfigError(
                f"input {spec.name} is {array.dtype}{list(array.shape)}, the model takes {spec.dtype}{list(spec.shape)}"
            )
        stacks.append(stack)
    if len({len(stack) for stack in stacks}) != 1:
        raise ConfigError("the arrays of the inputs file hold different numbers of samples")
    return [list(sample) for sample in zip(*stacks, strict=True)]


def verify(
    model: Model,
    pairs: Sequence[Pair],
    samples: Sequence[Sequence[Array]],
    *,
    num_threads: int = 1,
    delegate: bool = True,
    step: Step | None = None,
) -> Report:
    """Runs the whole and the parts of every pair on every sample, and compares.

    Raises `ModelError` where the whole cannot run (an operator without a kernel, say), `CutError` where a pair cannot be cut.
    """
    limit = runnable_depth(model)
    pairs = [pair for pair in pairs if pair[1] <= limit]
    worst: Pair | None = None
    largest, differing = 0.0, []
    with Sandbox(model, delegate=delegate) as sandbox:
        bench = _Bench(model, num_threads, delegate, limit, sandbox)
        wanted = bench.whole(samples)
        for done, pair in enumerate(pairs):
            if step is not None:
                step(done, len(pairs))
            for number, sample in enumerate(samples):
                found = bench.chained(pair, number, sample)
                gap = max((difference(a, b) for a, b in zip(wanted[number], found, strict=True)), default=0.0)
                if gap > 0 or any(not identical(a, b) for a, b in zip(wanted[number], found, strict=True)):
                    differing.append(pair)
                    if worst is None or gap > largest:
                        worst, largest = pair, max(largest, gap)
    if step is not None:
        step(len(pairs), len(pairs))
    cause = _cause(model, differing, samples, num_threads, delegate)
    return Report(
        model=model.name,
        positions=model.graph.depth + 1,
        checked=len(pairs),
        bit_identical=not differing,
        max_abs_diff=largest,
        worst=worst,
        uncuttable=tuple(sorted(model.graph.blocked.items())),
        differing=tuple(dict.fromkeys(differing)),
        explanation=_explained(model, limit, cause),
        explained=cause is not None,
        signature=model.contents.meant,
        unseen=model.contents.unseen,
    )


def runnable_depth(model: Model) -> int:
    """The last position up to which this runtime can run the model: l, unless an operator has no kernel.

    Raises `ModelError` where not even one layer can be run.
    """
    graph = model.graph
    missing = model.facts.missing_kernels
    first = next((p for p, layer in enumerate(graph.layers, 1) if layer.kind.removeprefix("CUSTOM:") in missing), None)
    limit = graph.depth if first is None else next(p for p in range(first - 1, -1, -1) if p not in graph.blocked)
    if limit == 0:
        raise ModelError(
            str(model.path),
            f"cannot be run: there is no kernel for {', '.join(sorted(missing))}",
            remedy="its slices are valid for a runtime that has the operator",
        )
    return limit


def _cause(
    model: Model, differing: Sequence[Pair], samples: Sequence[Sequence[Array]], num_threads: int, delegate: bool
) -> str | None:
    """Why parts and whole differ, where that can be shown; None where it cannot, or they do not."""
    if not differing:
        return None
    drawing = sorted({kind for kind in model.graph.kinds if kind in UNREPEATABLE})
    if drawing:
        return f"the model does not repeat itself even in one piece: it draws random numbers ({', '.join(drawing)})"
    if not delegate:
        return None
    again = verify(model, differing[:20], samples, num_threads=num_threads, delegate=False)
    if not again.bit_identical:
        return None
    return (
        "the default delegate (XNNPACK) computes stretches of operators in another order than the parts of a stretch; "
        "without the delegate the same parts are bit-identical to the whole"
    )


def _explained(model: Model, limit: int, cause: str | None) -> str | None:
    words = [cause] if cause else []
    if limit < model.graph.depth:
        missing = ", ".join(sorted(model.facts.missing_kernels))
        words.append(f"layers behind {limit} were not run: this runtime has no kernel for {missing}")
    if model.contents.unseen:
        meant = f"signature {model.contents.meant}" if model.contents.meant else "the main subgraph"
        words.append(f"this is about {meant} alone; not looked at: {', '.join(model.contents.unseen)}")
    return "; ".join(words) or None


def identical(left: Array, right: Array) -> bool:
    """Whether two arrays are the same bits."""
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def difference(left: Array, right: Array) -> float:
    """The largest absolute difference; infinite where shapes differ or one is a number where the other is not."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return float("inf")
    if identical(left, right) or not left.size:
        return 0.0
    wide = np.complex128 if left.dtype.kind == "c" else np.float64
    gap = np.abs(left.astype(wide) - right.astype(wide))
    both_nan = np.isnan(left.astype(wide)) & np.isnan(right.astype(wide))
    largest = float(np.where(both_nan, 0.0, gap).max())
    return float("inf") if np.isnan(largest) else largest


class _Bench:
    """Loaded parts, and what they said to which input."""

    def __init__(self, model: Model, num_threads: int, delegate: bool, limit: int, sandbox: Sandbox) -> None:
        self._model, self._num_threads, self._delegate = model, num_threads, delegate
        self._sandbox = sandbox
        self._limit = limit
        self._stateful = model.graph.stateful
        self._outcomes: dict[tuple[int, int, int], tuple[list[bytes], list[Array]]] = {}

    def whole(self, samples: Sequence[Sequence[Array]]) -> list[list[Array]]:
        """The model's outputs in one piece, in the manifest's order: from the file as it is, where all of it can be run."""
        graph = self._model.graph
        if self._limit < graph.depth:
            part = slice_model(self._model, 1, self._limit)
            runner = self._runner(part)
            return [run_part(part, runner, sample) for sample in samples]
        runner = SegmentRunner(
            self._model.source,
            self._num_threads,
            delegate=self._delegate,
            title=str(self._model.path),
            renew=self._stateful,
        )
        found = []
        for sample in samples:
            given = dict(zip(graph.inputs, sample, strict=True))
            if self._stateful:
                runner.reset()
            made = dict(zip(graph.whole_outputs, runner.run([given[t] for t in graph.whole_inputs]), strict=True))
            found.append([made[tensor] for tensor in graph.outputs])
        return found

    def chained(self, pair: Pair, number: int, sample: Sequence[Array]) -> list[Array]:
        """The outputs of the parts between the cuts, one after the other."""
        bounds = sorted({0, *pair, self._limit})
        values = list(sample)
        for begin, end in pairwise(bounds):
            values = self._outcome(begin + 1, end, number, values)
        return values

    def _outcome(self, first: int, last: int, number: int, values: list[Array]) -> list[Array]:
        given = [value.tobytes() for value in values] if self._keeps(values) else []
        key = (first, last, number)
        if given and key in self._outcomes and self._outcomes[key][0] == given:
            return self._outcomes[key][1]
        part = slice_model(self._model, first, last)
        found = run_part(part, self._runner(part), values)
        if given:
            self._outcomes[key] = (given, found)
        return found

    def _keeps(self, values: list[Array]) -> bool:
        return not self._stateful and sum(value.nbytes for value in values) < 1 << 24

    def _runner(self, part: SlicedPart) -> SegmentRunner:
        title = f"{self._model.name} {part.first}-{part.last}"
        data = part.to_bytes()
        self._sandbox.admit(part, data)
        return SegmentRunner(data, self._num_threads, delegate=self._delegate, title=title)


def run_part(part: SlicedPart, runner: SegmentRunner, values: Sequence[Array]) -> list[Array]:
    """Runs a part on what crosses its front, in the order of its boundary, and returns what crosses its back."""
    if len(values) != len(part.inputs):
        raise CutError(f"layers {part.first} to {part.last} take {len(part.inputs)} tensors, not {len(values)}")
    known = {spec.name: value for spec, value in zip(part.inputs, values, strict=True)}
    made = runner.run([known[name] for name in part.reads])
    known.update(zip(part.makes, made, strict=True))
    return [known[spec.name] for spec in part.outputs]
