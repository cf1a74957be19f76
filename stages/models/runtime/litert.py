"""Runners of `.tflite` files on LiteRT; the only module that imports the runtime.

An interpreter serves one thread at a time: a second caller of a `SegmentRunner` waits for the first. `invoke` releases the
GIL, so several runners work in parallel. The interpreter copies inputs in and results out.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from bus.errors import ModelError
from bus.tensors import Array

_FINE_THREAD_CLOCK = sys.platform != "win32"
"""False on Windows, which counts a thread's processor time in steps of 16 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterpreterOptions:
    """How LiteRT runs a model and its parts."""

    num_threads: int = 1  # threads per inference
    delegate: bool = True  # whether to use the default delegate (XNNPACK)


DEFAULT_INTERPRETER = InterpreterOptions()


class SegmentRunner:
    """One `.tflite` file, loaded and ready to run.

    `source` is a path, which the runtime maps, or bytes, which stay in memory. `delegate` enables the runtime's default
    delegate (XNNPACK, which repacks weights into its own memory). `renew` means that the model writes resource variables,
    which only a new interpreter resets. `batch` becomes the first dimension of every input, for files whose own is 1; `run`
    may change it later. Raises `ModelError` if the runtime refuses the model.
    """

    def __init__(
        self,
        source: Path | str | bytes,
        num_threads: int = 1,
        *,
        delegate: bool = True,
        title: str | None = None,
        renew: bool = False,
        batch: int = 1,
    ) -> None:
        self.title = title or (str(source) if isinstance(source, (Path, str)) else "a model in memory")
        self._turn = threading.Lock()
        self._source, self._num_threads, self._delegate, self._renew = source, num_threads, delegate, renew
        self._batch = batch
        self._interpreter = self._loaded()
        # in file order
        self._inputs = [(detail["name"], detail["index"]) for detail in self._interpreter.get_input_details()]
        self._outputs = [(detail["name"], detail["index"]) for detail in self._interpreter.get_output_details()]

    def _loaded(self) -> Any:
        source = self._source
        resolver = OpResolverType.BUILTIN if self._delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            interpreter = Interpreter(
                model_path=None if isinstance(source, bytes) else str(source),
                model_content=source if isinstance(source, bytes) else None,
                num_threads=self._num_threads,
                experimental_op_resolver_type=resolver,
            )
            self._shapes = _input_shapes(interpreter)
            if self._batch > 1:
                _set_batch(interpreter, self._shapes, self._batch)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ModelError(self.title, f"the runtime refuses it: {_first_line(error)}") from error
        return interpreter

    def _resize(self, batch: int) -> None:
        """Changes the first dimension of every input; the weights stay packed."""
        if batch > 1 and any(tuple(shape[:1]) != (1,) for shape in self._shapes.values()):
            raise ModelError(self.title, "its batch dimension cannot be resized: an input has no first dimension of 1")
        before, self._batch = self._batch, batch
        try:
            _set_batch(self._interpreter, self._shapes, batch)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            self._batch = before
            self._interpreter = self._loaded()  # half resized, it cannot be used any more
            raise ModelError(self.title, f"its batch dimension cannot be resized: {_first_line(error)}") from error

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the file's inputs, in file order."""
        return tuple(name for name, _ in self._inputs)

    def run(self, inputs: Mapping[str, Array] | Sequence[Array], batch: int | None = None) -> list[Array]:
        """Runs once and returns copies of the results.

        `inputs` are a sequence in file order or a mapping by tensor name. `batch`: the first dimension of every input from
        now on, for files whose own is 1; None keeps it. Raises `ModelError` if their number, a type or a shape is wrong, or
        if the computation fails.
        """
        values: Sequence[Array]
        # The list check comes first: an `isinstance` check for a mapping takes as long as running a small model.
        if isinstance(inputs, list) or not isinstance(inputs, Mapping):
            values = inputs
        else:
            values = [inputs[name] for name in self.input_names]
        if len(values) != len(self._inputs):
            raise ModelError(self.title, f"takes {len(self._inputs)} inputs, not {len(values)}")
        with self._turn:
            if batch is not None and batch != self._batch:
                self._resize(batch)
            try:
                for (_, index), value in zip(self._inputs, values, strict=True):
                    self._interpreter.set_tensor(index, value)
                self._interpreter.invoke()
                return [self._interpreter.get_tensor(index) for _, index in self._outputs]
            except (ValueError, RuntimeError) as error:
                raise ModelError(self.title, f"the computation failed: {_first_line(error)}") from error

    def timed(self, inputs: Sequence[Array]) -> float:
        """Seconds that one computation takes, without copying inputs in or results out.

        With one thread, time that the processor spends on other processes is excluded.
        """
        with self._turn:
            try:
                for (_, index), value in zip(self._inputs, inputs, strict=True):
                    self._interpreter.set_tensor(index, value)
                own_s = time.thread_time()
                begin_s = time.perf_counter()
                self._interpreter.invoke()
                took_s = time.perf_counter() - begin_s
                return (
                    min(took_s, time.thread_time() - own_s) if _FINE_THREAD_CLOCK and self._num_threads == 1 else took_s
                )
            except (ValueError, RuntimeError) as error:
                raise ModelError(self.title, f"the computation failed: {_first_line(error)}") from error

    def reset(self) -> None:
        """Resets the state that earlier samples left in the model."""
        with self._turn:
            if self._renew:
                self._interpreter = self._loaded()
            else:
                self._interpreter.reset_all_variables()


def _input_shapes(interpreter: Any) -> dict[int, list[int]]:
    """The shape of each input, by its index."""
    return {detail["index"]: [int(size) for size in detail["shape"]] for detail in interpreter.get_input_details()}


def _set_batch(interpreter: Any, shapes: Mapping[int, Sequence[int]], batch: int) -> None:
    """Resizes every input for a batch; `shapes` are those in the file."""
    for index, shape in shapes.items():
        interpreter.resize_tensor_input(index, [batch, *shape[1:]] if batch > 1 else list(shape))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def examine(path: str, doing: Callable[[str], None]) -> dict[str, Any]:
    """Runs a whole model without the default delegate on zeros and on ones, then with it on zeros, and reports the findings.

    The child process of `stages.models.runtime.trial_run` calls it, because a model may crash the process. `doing` receives
    each step. Returns `shapes` (tensor -> shape that the runtime knows before running), `late` (tensor -> shape found by
    running; None if the two runs differ or found none), `missing_kernels`, and `fault` if the runtime refuses the model.
    """
    report: dict[str, Any] = {"shapes": {}, "late": {}, "missing_kernels": [], "fault": None}
    try:
        plain = _that_keeps_all_tensors(path)
        doing("planning its memory")
        plain.allocate_tensors()
        before = _allocated(plain)
        doing("running it")
        runs = []
        for fill in (0, 1):
            _invoke_on(plain, fill)
            runs.append(_allocated(plain))
        for detail in plain.get_tensor_details():
            index = detail["index"]
            one, two = (run.get(index) for run in runs)
            if one == two == before.get(index) is not None:
                report["shapes"][index] = one
            else:
                report["late"][index] = one if one == two else None
        del plain
        doing("running it with the default delegate")
        usual = Interpreter(model_path=path, num_threads=1)
        usual.allocate_tensors()
        _invoke_on(usual, 0)
    except (ValueError, RuntimeError) as error:
        missing = _MISSING_KERNEL.search(str(error))
        if missing:
            report["missing_kernels"] = [next(filter(None, missing.groups()))]
        else:
            report["fault"] = f"the runtime refuses it: {_first_line(error)}"
    return report


def _that_keeps_all_tensors(path: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runtime warns that preserving all tensors is for debugging
        return Interpreter(
            model_path=path,
            num_threads=1,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
        )


class SliceTrial:
    """Runs each slice of a model once, on the values that a run of the whole model on zeros computes.

    The child process of `stages.models.sandbox` uses it, because a slice may crash the process. If the whole model cannot
    run, for example because an operator has no kernel, the slices run on zeros.
    """

    def __init__(self, path: str) -> None:
        self._whole: Any = None
        with contextlib.suppress(ValueError, RuntimeError):
            whole = _that_keeps_all_tensors(path)
            whole.allocate_tensors()
            _invoke_on(whole, 0)
            self._whole = whole

    def run(self, path: str, reads: Sequence[int], *, delegate: bool, batch: int) -> None:
        """Runs the slice in file `path`; `reads` are the whole model's tensors that are its inputs.

        `batch` above 1 repeats each input that many times along its first dimension.
        """
        resolver = OpResolverType.BUILTIN if delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        with contextlib.suppress(ValueError, RuntimeError):
            part = Interpreter(model_path=path, num_threads=1, experimental_op_resolver_type=resolver)
            if batch > 1:
                _set_batch(part, _input_shapes(part), batch)
            part.allocate_tensors()
            if self._whole is None:
                _invoke_on(part, 0)
                return
            for detail, tensor in zip(part.get_input_details(), reads, strict=True):
                if not _is_text(detail):
                    part.set_tensor(detail["index"], np.repeat(self._whole.get_tensor(tensor), batch, axis=0))
            part.invoke()


_MISSING_KERNEL = re.compile(r"unresolved custom op: (\S+?)\.?(?:\s|$)|Didn't find op for builtin opcode '(\w+)'")


def missing_kernel(model: bytes) -> str | None:
    """The first operator of a model without a kernel in the runtime: its custom code or builtin kind."""
    try:
        Interpreter(model_content=model, num_threads=1).allocate_tensors()
    except (ValueError, RuntimeError) as error:
        found = _MISSING_KERNEL.search(str(error))
        return next(filter(None, found.groups())) if found else None
    return None


def _allocated(interpreter: Any) -> dict[int, list[int]]:
    """The shapes of all allocated tensors, except strings and resources, whose access crashes the runtime."""
    shapes = {}
    for detail in interpreter.get_tensor_details():
        if np.dtype(detail["dtype"]).kind not in "fiubc":
            continue
        with contextlib.suppress(ValueError, RuntimeError):
            interpreter.tensor(detail["index"])()
            shapes[detail["index"]] = [int(size) for size in detail["shape"]]
    return shapes


def _invoke_on(interpreter: Any, fill: int) -> None:
    for detail in interpreter.get_input_details():
        if not _is_text(detail):
            interpreter.set_tensor(detail["index"], np.full(detail["shape"], fill, detail["dtype"]))
    interpreter.invoke()


def _is_text(detail: Mapping[str, Any]) -> bool:
    return detail["dtype"] in (np.bytes_, np.object_, np.str_)
