"""A process in which slices of a foreign model run for the first time.

The trial of the whole model says nothing about its slices: one that the slicer made wrongly, or that a kernel takes badly,
may kill whoever runs it. So each is loaded and run once by a child before this process does. The child keeps the values of a
run of the whole model on zeros, so that a slice is tried on what it would see. If the child dies, the slice is refused with a
`ModelError`. An ordinary complaint of the runtime is left to the real run, which says the same.
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
from stages.models.runtime.trial_run import LONGEST_S, child_environment, findings_file, last_words, trial_folder
from stages.models.slicer import SlicedPart

CHILD = "from stages.models.runtime.trial_child import slices; slices()"
STARTING = "starting"


class Sandbox:
    """The child and what it found. It starts with the first slice that is new, and ends with `close` or the `with` block.

    Slices of a model that DeePar brings are not tried. Verdicts are remembered in the cache. Any thread may call `admit`.
    """

    def __init__(self, model: Model, *, delegate: bool = True) -> None:
        self._model, self._delegate = model, delegate
        self._turn = threading.Lock()
        self._child: _Child | None = None
        self._indices = {} if model.trusted else {name: index for index, name in enumerate(model.graph.names)}
        self._path = findings_file(model.sha256, "slices")
        self._admitted: set[str] = set()
        if not model.trusted:
            with contextlib.suppress(OSError):
                self._admitted.update(self._path.read_text(encoding="utf-8").split())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child. The next new slice starts another."""
        with self._turn:
            if self._child is not None:
                self._child.end()
                self._child = None

    def admit(self, part: SlicedPart, source: Path | bytes) -> None:
        """Returns once the slice, whose file is `source`, ran in the child, now or earlier.

        Raises `ModelError` where the child died or did not answer in time.
        """
        if self._model.trusted:
            return
        with self._turn:
            head = next(
                iter(part.chunks())
            )  # the weights behind it are the model's, whose hash names the file of verdicts
            verdict = f"{hashlib.sha256(head).hexdigest()}{'' if self._delegate else '-plain'}"
            if verdict in self._admitted:
                return
            self._run(part, source)
            self._admitted.add(verdict)
            with contextlib.suppress(OSError), open(self._path, "a", encoding="utf-8") as file:
                file.write(f"{verdict}\n")

    def _run(self, part: SlicedPart, source: Path | bytes) -> None:
        if self._child is None:
            self._child = _Child(self._model)
        reads = [self._indices[name] for name in part.reads]
        fault = self._child.run(source, reads, self._delegate)
        if fault is not None:
            self._child.end()
            self._child = None
            layers = f"layer {part.first}" if part.first == part.last else f"layers {part.first} to {part.last}"
            raise ModelError(
                str(self._model.path),
                f"a trial run of {layers} {fault}",
                remedy="cut it elsewhere, or run the model in one piece",
            )


class _Child:
    """The running process: one line of JSON each way for a slice."""

    def __init__(self, model: Model) -> None:
        self._files = contextlib.ExitStack()
        self._complaints = self._files.enter_context(_scratch_file())
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(self._files.enter_context(_file_of(model.source)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=child_environment(os.environ),
            bufsize=0,  # `select` sees what a buffer would hide
        )

    def run(self, source: Path | bytes, reads: list[int], delegate: bool) -> str | None:
        """Has a slice run; None if the child lived, else what happened to it."""
        with _file_of(source) as path:
            order = {"path": str(path), "reads": reads, "delegate": delegate}
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
            return self._fate()

    def _fate(self) -> str | None:
        doing = STARTING
        words = self._process.stdout
        assert words is not None
        with selectors.DefaultSelector() as selector:
            selector.register(words, selectors.EVENT_READ)
            while selector.select(LONGEST_S):
                line = words.readline()
                if not line:
                    break
                with contextlib.suppress(ValueError):
                    word: dict[str, Any] = json.loads(line)
                    if word.get("done"):
                        return None
                    doing = str(word["doing"])
            else:
                return f"did not end within {LONGEST_S:.0f} s while {doing}"
        returncode = self._process.wait()
        if returncode < 0:
            return f"died of {signal.Signals(-returncode).name} while {doing}"
        self._complaints.seek(0)
        return f"ended with {returncode} while {doing}: {last_words(self._complaints.read())}"

    def end(self) -> None:
        """Ends the process and removes its files."""
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
    """A file with the model, for as long as the block lasts."""
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
