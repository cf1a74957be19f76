"""Other servers of models, for the serving benchmark: MLServer and KServe, where a Python has them installed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from bus.errors import DeeparError
from bus.text.json_text import json_text
from deploy.kafka_local.child_process import tied_to_us
from deploy.kafka_local.ports import free_port

READY_S = 60.0
STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A running server with one model."""

    name: str  # mlserver, kserve
    rest: tuple[str, int]
    grpc: tuple[str, int]
    pid: int


def has(python: Path, package: str) -> bool:
    """Whether a Python can import a package."""
    found = subprocess.run([python, "-c", f"import {package}"], capture_output=True, check=False)
    return found.returncode == 0


@contextlib.contextmanager
def mlserver(
    python: Path, model: str, file: Path, folder: Path, *, name: str = "mlserver", workers: int | None = None
) -> Iterator[Peer]:
    """MLServer with the model; `workers`: processes that compute, None for its default, 0 to compute in the server's own.

    Raises `DeeparError` if it does not become ready.
    """
    folder.mkdir()
    runtime = resources.files("loadgen.bench.peers") / "mlserver_runtime.py"
    (folder / "tflite_runtime_model.py").write_text(runtime.read_text(encoding="utf-8"), encoding="utf-8")
    rest, grpc = free_port(), free_port()
    settings = {
        "host": "127.0.0.1", "http_port": rest, "grpc_port": grpc, "metrics_port": free_port(),
        "debug": False, "metrics_endpoint": None,
    } | ({} if workers is None else {"parallel_workers": workers})  # fmt: skip
    described = {
        "name": model,
        "implementation": "tflite_runtime_model.TfliteModel",
        "parameters": {"uri": str(file)},
    }
    (folder / "settings.json").write_text(json_text(settings), encoding="utf-8")
    (folder / "model-settings.json").write_text(json_text(described), encoding="utf-8")
    command = [str(python), "-c", "from mlserver.cli import main; main()", "start", str(folder)]
    with _running(name, command, folder, rest, grpc, model) as peer:
        yield peer


@contextlib.contextmanager
def kserve(python: Path, model: str, file: Path, folder: Path) -> Iterator[Peer]:
    """KServe's server with the model, in one process. Raises `DeeparError` if it does not become ready."""
    folder.mkdir()
    rest, grpc = free_port(), free_port()
    with resources.as_file(resources.files("loadgen.bench.peers") / "kserve_server.py") as script:
        command = [str(python), str(script), model, str(file), str(rest), str(grpc)]
        with _running("kserve", command, folder, rest, grpc, model) as peer:
            yield peer


@contextlib.contextmanager
def _running(name: str, command: list[str], folder: Path, rest: int, grpc: int, model: str) -> Iterator[Peer]:
    own = {key: value for key, value in os.environ.items() if not key.startswith(("DEEPAR_", "KAFKA_", "PYTHON"))}
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            tied_to_us(command), cwd=folder, env=own, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        until_s = time.monotonic() + READY_S
        while not _ready(rest, model):
            if process.poll() is not None or time.monotonic() > until_s:
                lines = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise DeeparError(f"{name} did not become ready; its last lines:\n{lines}")
            time.sleep(0.1)
        yield Peer(name, ("127.0.0.1", rest), ("127.0.0.1", grpc), process.pid)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(port: int, model: str) -> bool:
    address = f"http://127.0.0.1:{port}/v2/models/{model}/ready"
    with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2) as answer:
        return bool(answer.status == 200)
    return False
