"""A child process that runs each slice of an untrusted model once before this process loads it.

A slice can crash the process that runs it even if the trial run of the whole model passed. The child runs the whole model on
zeros, keeps all tensor values, and runs each slice on the values that it would receive. If the child dies, the slice is
rejected with a `ModelError`. An ordinary error of the runtime is ignored here, because the real run raises it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from bus.errors import ModelError
from stages.models.model import Model
from stages.models.runtime.trial_run import ChildProgram, child_environment, findings_file, last_words, trial_folder
from stages.models.slicer import SlicedPart

SLICES = ChildProgram("from stages.models.runtime.trial_child import slices; slices()")
"""Runs each slice that it receives."""

STARTING = "starting"


class Sandbox:
    """The child process and the slices that passed. The child starts with the first new slice and ends with `close`.

    Slices of a trusted model skip the child. Passed slices are recorded in the cache. `admit` is thread-safe.
    """

    def __init__(self, model: Model, *, delegate: bool = True, program: ChildProgram = SLICES) -> None:
        self._model, self._delegate, self._program = model, delegate, program
        self._turn = threading.Lock()
        self._child: _Child | None = None
        self._indices = {} if model.trusted else {name: index for index, name in enumerate(model.graph.names)}
        self._path = findings_file(model.sha256, "slices")
        self._admitted: set[str] = set()
        if not model.trusted:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                self._admitted.update(self._path.read_text(encoding="utf-8").split())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stops the child. The next new slice starts another one."""
        with self._turn:
            if self._child is not None:
                self._child.end()
                self._child = None

    def admit(self, part: SlicedPart, source: Path | bytes, batch: int = 1) -> None:
        """Runs the slice with the file `source` in the child, on `batch` samples together, unless it passed before.

        Raises `ModelError` if the child dies or does not answer in time.
        """
        if self._model.trusted:
            return
        with self._turn:
            # the structure identifies the slice: its weights are the model's, whose hash is in the name of the record
            head = next(iter(part.chunks()))
            verdict = f"{hashlib.sha256(head).hexdigest()}{'' if self._delegate else '-plain'}"
            verdict += f"-batch{batch}" if batch > 1 else ""
            if verdict in self._admitted:
                return
            self._run(part, source, batch)
            self._admitted.add(verdict)
            with contextlib.suppress(OSError), open(self._path, "a", encoding="utf-8") as file:
                file.write(f"{verdict}\n")

    def _run(self, part: SlicedPart, source: Path | bytes, batch: int) -> None:
        if self._child is None:
            self._child = _Child(self._model, self._program)
        reads = [self._indices[name] for name in part.reads]
        fault = self._child.run({"reads": reads, "delegate": self._delegate, "batch": batch}, source)
        if fault is not None:
            self._child.end()
            self._child = None
            layers = f"layer {part.first}" if part.first == part.last else f"layers {part.first} to {part.last}"
            raise ModelError(
                str(self._model.path),
                f"a trial run of {layers} {fault}",
                remedy="cut the model elsewhere, or run it in one piece",
            )


class _Child:
    """The running process: one line of JSON in each direction per slice."""

    def __init__(self, model: Model, program: ChildProgram) -> None:
        self._longest_s = program.longest_s
        self._files = contextlib.ExitStack()
        self._complaints = self._files.enter_context(_scratch_file())
        self._process = subprocess.Popen(
            [sys.executable, "-c", program.code, str(self._files.enter_context(_file_of(model.source)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=child_environment(os.environ),
            bufsize=0,  # unbuffered, so that `select` sees every line
        )

    def run(self, order: dict[str, Any], source: Path | bytes) -> str | None:
        """Runs the slice in `source` in the child; `order` has the other parameters of `SliceTrial.run`.

        Returns None if the child survived, else a description of what happened.
        """
        with _file_of(source) as path:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"path": str(path), **order}).encode() + b"\n")
                self._process.stdin.flush()
            return self._fate()

    def _fate(self) -> str | None:
        doing = STARTING
        words = self._process.stdout
        assert words is not None
        with selectors.DefaultSelector() as selector:
            selector.register(words, selectors.EVENT_READ)
            while selector.select(self._longest_s):
                line = words.readline()
                if not line:
                    break
                with contextlib.suppress(ValueError):
                    word: dict[str, Any] = json.loads(line)
                    if word.get("done"):
                        return None
                    doing = str(word["doing"])
            else:
                return f"did not end within {self._longest_s:.0f} s while {doing}"
        returncode = self._process.wait()
        if returncode < 0:
            return f"died of {signal.Signals(-returncode).name} while {doing}"
        self._complaints.seek(0)
        return f"ended with {returncode} while {doing}: {last_words(self._complaints.read())}"

    def end(self) -> None:
        """Stops the process and removes its files."""
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._files.close()


@contextlib.contextmanager
def _file_of(source: Path | bytes) -> Iterator[Path]:
    """The path of a file with the model; a temporary file is removed when the block ends."""
    if isinstance(source, Path):
        yield source
        return
    with tempfile.NamedTemporaryFile(suffix=".tflite", dir=trial_folder()) as file:
        file.write(source)
        file.flush()
        yield Path(file.name)


@contextlib.contextmanager
def _scratch_file() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile(dir=trial_folder()) as file:  # /tmp may be read-only
        yield file
