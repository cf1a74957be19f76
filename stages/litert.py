"""Running `.tflite` files on LiteRT: the one module that imports the runtime.

An interpreter belongs to one thread at a time: `SegmentRunner` refuses a second caller by waiting for the first. `invoke`
releases the GIL, so runners work side by side. The interpreter copies inputs in and results out; tensors that only pass over
a segment never come here.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bus.errors import ModelError

try:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType
except ImportError:  # 32-bit boards have only the runtime's older package
    from tflite_runtime.interpreter import Interpreter, OpResolverType  # type: ignore[import-not-found,no-redef]

Array: TypeAlias = np.ndarray[Any, Any]


class SegmentRunner:
    """One `.tflite` file, loaded and ready to run.

    `source` is a path, which is mapped and so shared with the page cache, or bytes, which are kept. With `delegate` off the
    runtime's default delegate (XNNPACK, which repacks weights into memory of its own) is not used. Raises `ModelError` where
    the runtime refuses the model.
    """

    def __init__(
        self, source: Path | str | bytes, num_threads: int = 1, *, delegate: bool = True, title: str | None = None
    ) -> None:
        self.title = title or (str(source) if isinstance(source, (Path, str)) else "a model in memory")
        self._turn = threading.Lock()
        resolver = OpResolverType.BUILTIN if delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            self._interpreter = Interpreter(
                model_path=None if isinstance(source, bytes) else str(source),
                model_content=source if isinstance(source, bytes) else None,
                num_threads=num_threads,
                experimental_op_resolver_type=resolver,
            )
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ModelError(self.title, f"the runtime refuses it: {_first_line(error)}") from error
        # list() keeps the file's order, which is the order of the boundary in the manifest
        self._inputs = [(detail["name"], detail["index"]) for detail in self._interpreter.get_input_details()]
        self._outputs = [(detail["name"], detail["index"]) for detail in self._interpreter.get_output_details()]

    @property
    def input_names(self) -> tuple[str, ...]:
        """The file's inputs, in order."""
        return tuple(name for name, _ in self._inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The file's outputs, in order."""
        return tuple(name for name, _ in self._outputs)

    def run(self, inputs: Mapping[str, Array] | Sequence[Array]) -> list[Array]:
        """Runs once; the results are copies that the caller owns.

        `inputs` are in the file's order, or by tensor name. Raises `ModelError` where one is missing, has another type or
        shape, or the computation fails.
        """
        values = [inputs[name] for name in self.input_names] if isinstance(inputs, Mapping) else list(inputs)
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

    def reset(self) -> None:
        """Forgets the state of earlier samples, where the model keeps any."""
        with self._turn:
            self._interpreter.reset_all_variables()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
