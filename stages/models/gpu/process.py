"""The node's side of its GPU process: starts it, sends one order at a time, and notices when it dies or hangs."""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from bus.tensors import Array
from stages.models.gpu.messages import receive, send
from stages.models.gpu.shared_area import SharedArea
from stages.models.runtime.trial_run import ChildProgram, child_environment

GPU = ChildProgram("from stages.models.gpu.child import main; main()", longest_s=60.0)
"""Loads and runs files on the GPU; loading VGG-16 takes up to 7 s."""

LONGEST_RUN_S = 10.0
"""Time limit of one batch, which takes milliseconds."""

MOST_DEATHS = 3
"""After this many crashes, the GPU is not used again until the node starts anew."""


class GpuFaultError(Exception):
    """The GPU process failed at an order; the message says why. The CPU computes the samples instead."""


class GpuEndedError(GpuFaultError):
    """The process that held the file has ended; the file can be loaded again."""


class GpuProcess:
    """Starts with the first order; starts again after a crash, at most `MOST_DEATHS` times. All methods are thread-safe."""

    def __init__(self, program: ChildProgram = GPU) -> None:
        self._program = program
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths = 0
        self._absent: str | None = None
        self._closed = False
        self._next_key = 0
        self._living: dict[
            int, tuple[int, int]
        ] = {}  # files that the running process holds: bytes of inputs and outputs
        self._area = SharedArea()
        self.loading = False  # a file is being loaded, which takes seconds: other samples should not wait for it

    def load(self, path: Path, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> int:
        """Load a file whose inputs and outputs have these shapes; returns its key. Raises `GpuFaultError`."""
        with self._turn:
            if self._absent is not None:
                raise GpuFaultError(self._absent)
            self._next_key += 1
            self.loading = True
            try:
                shapes = {"inputs": inputs, "outputs": outputs}
                words = {"do": "load", "key": self._next_key, "path": str(path), **shapes}
                self._order(words, self._program.longest_s, "loading it")
            finally:
                self.loading = False
            self._living[self._next_key] = (_bytes(inputs), _bytes(outputs))
            return self._next_key

    def holds(self, key: int) -> bool:
        """Whether the file is loaded in the process that runs now."""
        return key in self._living

    def run(self, key: int, parts: Sequence[Array], on_wait: Callable[[float], None] = lambda _: None) -> Array:
        """The values of the outputs of one batch, one after the other; `parts` are its inputs. Raises `GpuFaultError`.

        `on_wait` receives the seconds for which other batches delayed this one.
        """
        begin_s = time.monotonic()
        with self._turn:
            on_wait(time.monotonic() - begin_s)
            if key not in self._living:
                raise GpuEndedError("the GPU process ended")
            input_bytes, output_bytes = self._living[key]
            words = {"do": "run", "key": key, "inputs": input_bytes, "outputs": output_bytes}
            try:
                outputs = self._shared(parts, input_bytes, output_bytes)
            except OSError as error:
                raise GpuFaultError(f"no memory to share with the GPU process: {error}") from error
            self._order(words, LONGEST_RUN_S, "computing")
            return outputs.copy()

    def _shared(self, parts: Sequence[Array], input_bytes: int, output_bytes: int) -> Array:
        """Copy the inputs into the shared area; returns where the outputs will be."""
        self._area.grow(input_bytes, output_bytes)
        inputs, outputs = self._area.halves(input_bytes, output_bytes)
        at = 0
        for part in parts:
            inputs[at : at + part.size].reshape(part.shape)[...] = part
            at += part.size
        return outputs

    def unload(self, key: int) -> None:
        """Free the device memory of a file."""
        with self._turn, contextlib.suppress(GpuFaultError):
            if key in self._living:
                del self._living[key]
                self._order({"do": "unload", "key": key}, LONGEST_RUN_S, "freeing memory")

    def close(self) -> None:
        """End the process for good, even in the middle of an order."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._turn:
            self._end()
            self._area.close()

    def _order(self, words: dict[str, Any], limit_s: float, doing: str) -> None:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        answer = None
        late = False
        with contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
            send(cast(Any, process.stdin), words)
            selector.register(process.stdout, selectors.EVENT_READ)
            late = not selector.select(limit_s)
            answer = None if late else receive(cast(Any, process.stdout))
        if answer is None:
            self._deaths += 1
            cause = f"did not answer within {limit_s:.0f} s" if late else self._cause(process)
            self._end()
            raise GpuFaultError(f"the GPU process {cause} while {doing}")
        if "fault" in answer:
            if answer.get("absent"):
                self._absent = str(answer["fault"])
            raise GpuFaultError(str(answer["fault"]))

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            if self._closed:
                raise GpuEndedError("the GPU process was closed")
            if self._deaths >= MOST_DEATHS:
                raise GpuFaultError(f"the GPU process died {self._deaths} times")
            try:
                self._process = self._started()
            except (OSError, ValueError) as error:  # Windows passes no descriptors
                raise GpuFaultError(f"the GPU process cannot be started: {error}") from error
        return self._process

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", self._program.code, str(self._area.descriptor)],
            pass_fds=(self._area.descriptor,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(os.environ),
            start_new_session=True,  # Ctrl-C reaches the node alone, which first finishes its samples
        )

    @staticmethod
    def _cause(process: subprocess.Popen[bytes]) -> str:
        try:
            returncode = process.wait(timeout=LONGEST_RUN_S)
        except subprocess.TimeoutExpired:
            return "closed its output"
        return f"died of {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with {returncode}"

    def _end(self) -> None:
        process, self._process = self._process, None
        self._living.clear()
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


def _bytes(shapes: Sequence[Sequence[int]]) -> int:
    return 4 * sum(math.prod(shape) for shape in shapes)
