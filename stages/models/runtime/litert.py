"""Running `.tflite` files on LiteRT: the one module that imports the runtime.

An interpreter belongs to one thread at a time: `SegmentRunner` refuses a second caller by waiting for the first. `invoke`
releases the GIL, so runners work side by side. The interpreter copies inputs in and results out; tensors that only pass over
a segment never come here.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from bus.errors import ModelError

Array: TypeAlias = np.ndarray[Any, Any]


_FINE_THREAD_CLOCK = sys.platform != "win32"
"""Windows counts a thread's processor time in steps of 16 ms."""


class SegmentRunner:
    """One `.tflite` file, loaded and ready to run.

    `source` is a path, which is mapped and so shared with the page cache, or bytes, which are kept. With `delegate` off
    the runtime's default delegate (XNNPACK, which repacks weights into memory of its own) is not used. `renew` says that
    the model writes resource variables, which only a new interpreter forgets. Raises `ModelError` where the runtime
    refuses the model.
    """

    def __init__(
        self,
        source: Path | str | bytes,
        num_threads: int = 1,
        *,
        delegate: bool = True,
        title: str | None = None,
        renew: bool = False,
    ) -> None:
        self.title = title or (str(source) if isinstance(source, (Path, str)) else "a model in memory")
        self._turn = threading.Lock()
        self._source, self._num_threads, self._delegate, self._renew = source, num_threads, delegate, renew
        self._interpreter = self._loaded()
        # in the file's order, which is the order of the boundary in the manifest
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
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ModelError(self.title, f"the runtime refuses it: {_first_line(error)}") from error
        return interpreter

    @property
    def input_names(self) -> tuple[str, ...]:
        """The file's inputs, in order."""
        return tuple(name for name, _ in self._inputs)

    def run(self, inputs: Mapping[str, Array] | Sequence[Array]) -> list[Array]:
        """Runs once; the results are copies that the caller owns.

        `inputs` are in the file's order, or by tensor name. Raises `ModelError` where one is missing, has another type or
        shape, or the computation fails.
        """
        values: Sequence[Array]
        # Asked for the list first: whether something is a mapping takes as long as a small computation.
        if isinstance(inputs, list) or not isinstance(inputs, Mapping):
            values = inputs
        else:
            values = [inputs[name] for name in self.input_names]
        if len(values) != len(self._inputs):
            raise ModelError(self.title, f"takes {len(self._inputs)} inputs, not {len(values)}")
        with self._turn:
            try:
                for (_, index), value in zip(self._inputs, values, strict=True):
                    self._interpreter.set_tensor(index, value)
                self._interpreter.invoke()
                return [self._interpreter.get_tensor(index) for _, index in self._outputs]
            except (ValueError, RuntimeError) as error:
                raise ModelError(self.title, f"the computation failed: {_first_line(error)}") from error

    def timed(self, inputs: Sequence[Array]) -> float:
        """Seconds that one computation takes, without copying inputs in or results out.

        With one thread, the time that other processes had the processor does not count.
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
        """Forgets the state of earlier samples, where the model keeps any."""
        with self._turn:
            if self._renew:
                self._interpreter = self._loaded()
            else:
                self._interpreter.reset_all_variables()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def examine(path: str, doing: Callable[[str], None]) -> dict[str, Any]:
    """Runs a whole model once on zeros, without and with the default delegate, and reports what only running shows.

    For `stages.models.runtime.trial_run`, in a process that may die of it. `doing` is told what is under way.
    Returns `shapes` (tensor -> shape,
    where the runtime knows it beforehand), `late` (tensor -> shape where it only turned out; None where two inputs led to two
    shapes, or to none), `missing_kernels`, and `fault` where the runtime refuses.
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
        warnings.simplefilter("ignore")  # "preserve all tensors is for debugging", which this is
        return Interpreter(
            model_path=path,
            num_threads=1,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
        )


class SliceTrial:
    """Runs slices of a model once each, on the values of a run of the whole on zeros.

    For `stages.models.sandbox`, in a process that may die of it. Where the whole cannot run (an operator has no
    kernel), the slices
    run on zeros.
    """

    def __init__(self, path: str) -> None:
        self._whole: Any = None
        with contextlib.suppress(ValueError, RuntimeError):
            whole = _that_keeps_all_tensors(path)
            whole.allocate_tensors()
            _invoke_on(whole, 0)
            self._whole = whole

    def run(self, path: str, reads: Sequence[int], *, delegate: bool) -> None:
        """Runs the slice in file `path`, whose inputs are the tensors `reads` of the whole."""
        resolver = OpResolverType.BUILTIN if delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        with contextlib.suppress(ValueError, RuntimeError):
            part = Interpreter(model_path=path, num_threads=1, experimental_op_resolver_type=resolver)
            part.allocate_tensors()
            if self._whole is None:
                _invoke_on(part, 0)
                return
            for detail, tensor in zip(part.get_input_details(), reads, strict=True):
                if not _is_text(detail):
                    part.set_tensor(detail["index"], self._whole.get_tensor(tensor))
            part.invoke()


_MISSING_KERNEL = re.compile(r"unresolved custom op: (\S+?)\.?(?:\s|$)|Didn't find op for builtin opcode '(\w+)'")


def missing_kernel(model: bytes) -> str | None:
    """The first operator of a model that the runtime has no kernel for: a custom code, or a builtin's kind."""
    try:
        Interpreter(model_content=model, num_threads=1).allocate_tensors()
    except (ValueError, RuntimeError) as error:
        found = _MISSING_KERNEL.search(str(error))
        return next(filter(None, found.groups())) if found else None
    return None


def _allocated(interpreter: Any) -> dict[int, list[int]]:
    """The shapes of all tensors that have memory now. Strings and resources are not looked at: that crashes the runtime."""
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
