"""The check that a cut model and the whole model give bit-identical outputs.

For each pair of cuts, the three parts run in sequence and their final outputs are compared with the whole model's, byte by
byte. A part that already ran on the same input is not run again, because kernels are deterministic; this shortcut is off for
models that keep state.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from bus.errors import ConfigError, CutError, ModelError
from bus.tensors import Array
from bus.values import TensorSpec
from stages.models.files.operators import UNREPEATABLE
from stages.models.model import Model
from stages.models.runtime.litert import DEFAULT_INTERPRETER, InterpreterOptions, SegmentRunner
from stages.models.sandbox import Sandbox
from stages.models.slicer import SlicedPart, slice_model

Pair: TypeAlias = tuple[int, int]

Step: TypeAlias = Callable[[int, int], None]
"""pairs checked, pairs in total"""


@dataclass(frozen=True)
class Report:
    """The result of a verification, as `deepar models verify` prints it."""

    model: str  # its name
    positions: int  # l + 1
    checked: int  # number of pairs of cuts that were run
    bit_identical: bool  # whether all pairs' outputs equal the whole model's
    max_abs_diff: float  # the largest difference found
    worst: Pair | None  # the pair with that difference; None if none differs
    uncuttable: tuple[tuple[int, str], ...]  # positions that cannot be cut, with the reason
    explanation: str | None = None  # the proven cause of a difference; parts of the file that were not run
    explained: bool = False  # whether the runtime, not the cut, is proven to cause the difference
    differing: tuple[Pair, ...] = ()  # all pairs that differ
    signature: str | None = None  # the signature that was run; None if the model has none
    unseen: tuple[str, ...] = ()  # descriptions of the parts of the file that were not run


def pairs_of(model: Model, cuts: str, seed: int) -> list[Pair]:
    """The pairs of cuts (cut1 <= cut2) that the option `--cuts` selects.

    `all` selects every pair, `single` one pair per position (cut1 = cut2), a number N all single pairs and N random others.
    Blocked positions are skipped. Raises `ConfigError` for any other value.
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
        raise ConfigError(f"--cuts {cuts} is invalid: give all, single, or a number of random pairs")
    double = [pair for pair in every if pair[0] < pair[1]]
    chosen = random.Random(seed).sample(double, min(int(cuts), len(double)))
    return single + sorted(chosen)


def random_inputs(model: Model, rng: np.random.Generator) -> list[Array]:
    """One random sample: floats in 0..1, integers of up to 16 bits over their full range, wider integers 0 or 1."""
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
    # wide integers are usually indices, and an index out of range crashes the model
    return rng.integers(0, 2, spec.shape).astype(dtype)


def named_inputs(model: Model, given: Mapping[str, Array]) -> list[list[Array]]:
    """Samples from arrays named after the input tensors or after the signature's inputs; a single array may have any name.

    An array has the tensor's shape, or one more leading dimension for several samples. Raises `ConfigError`.
    """
    specs = model.manifest.cuts[0].tensors
    aliases = model.graph.input_aliases
    if len(specs) == 1 and len(given) == 1:
        given = {specs[0].name: next(iter(given.values()))}
    stacks = []
    for spec in specs:
        name = spec.name if spec.name in given else aliases.get(spec.name, spec.name)
        if name not in given:
            raise ConfigError(f"the inputs file lacks the array {name}; it contains {', '.join(given) or 'no arrays'}")
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
        raise ConfigError("the arrays of the inputs file have different numbers of samples: give each the same number")
    return [list(sample) for sample in zip(*stacks, strict=True)]


def verify(
    model: Model,
    pairs: Sequence[Pair],
    samples: Sequence[Sequence[Array]],
    options: InterpreterOptions = DEFAULT_INTERPRETER,
    *,
    step: Step | None = None,
    sandbox: Sandbox | None = None,
) -> Report:
    """Runs the whole model and the parts of every pair on every sample, and compares their outputs.

    `sandbox` admits the parts before they run; the default is a new one.
    Raises `ModelError` if the whole model cannot run, for example without a kernel, and `CutError` for a blocked position.
    """
    limit = runnable_depth(model)
    pairs = [pair for pair in pairs if pair[1] <= limit]
    worst: Pair | None = None
    largest, differing = 0.0, []
    with sandbox or Sandbox(model, delegate=options.delegate) as sandbox:
        bench = _Bench(model, options, limit, sandbox)
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
    cause = _cause(model, differing, samples, options)
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

    Raises `ModelError` if it cannot run the first layers up to any position.
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
    model: Model, differing: Sequence[Pair], samples: Sequence[Sequence[Array]], options: InterpreterOptions
) -> str | None:
    """The proven cause of a difference between parts and whole; None if nothing differs or the cause is unknown."""
    if not differing:
        return None
    drawing = sorted({kind for kind in model.graph.kinds if kind in UNREPEATABLE})
    if drawing:
        return f"the model does not repeat itself even in one piece: it draws random numbers ({', '.join(drawing)})"
    if not options.delegate:
        return None
    again = verify(model, differing[:20], samples, replace(options, delegate=False))
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
    """Whether two arrays have the same type, shape and bytes."""
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def difference(left: Array, right: Array) -> float:
    """The largest absolute difference; infinite if shapes or types differ, or if only one of two values is NaN."""
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
    """Runs the whole model and its parts, and caches the outputs of parts by their input."""

    def __init__(self, model: Model, options: InterpreterOptions, limit: int, sandbox: Sandbox) -> None:
        self._model, self._options = model, options
        self._sandbox = sandbox
        self._limit = limit
        self._stateful = model.graph.stateful
        self._outcomes: dict[tuple[int, int, int], tuple[list[bytes], list[Array]]] = {}

    def whole(self, samples: Sequence[Sequence[Array]]) -> list[list[Array]]:
        """The uncut model's outputs, in the manifest's order, computed up to the last position that can run."""
        graph = self._model.graph
        if self._limit < graph.depth:
            part = slice_model(self._model, 1, self._limit)
            runner = self._runner(part)
            return [run_part(part, runner, sample) for sample in samples]
        runner = SegmentRunner(
            self._model.source,
            self._options.num_threads,
            delegate=self._options.delegate,
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
        """The outputs after running the parts between the cuts in sequence."""
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
        return SegmentRunner(data, self._options.num_threads, delegate=self._options.delegate, title=title)


def run_part(part: SlicedPart, runner: SegmentRunner, values: Sequence[Array]) -> list[Array]:
    """Computes the tensors of a part's output boundary from those of its input boundary, each in boundary order."""
    if len(values) != len(part.inputs):
        raise CutError(f"layers {part.first} to {part.last} take {len(part.inputs)} tensors, not {len(values)}")
    known = {spec.name: value for spec, value in zip(part.inputs, values, strict=True)}
    made = runner.run([known[name] for name in part.reads])
    known.update(zip(part.makes, made, strict=True))
    return [known[spec.name] for spec in part.outputs]
