"""Prometheus' own programs, run on our configuration.

They are taken from PATH. If they are missing and DEEPAR_TEST_DOCKER=required, Debian's package is fetched and unpacked into
the user's cache folder; it is not installed, because that would start a system service.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.kafka_local.artifacts import cache_root
from deploy.kafka_local.child_process import tied_to_us
from deploy.kafka_local.ports import free_port
from tests.compose_engine import CommandError, packages_locked, required, run

DEPLOY = Path(__file__).parents[1] / "deploy"
CONFIG, ALARMS = DEPLOY / "prometheus" / "prometheus.yml", DEPLOY / "prometheus" / "alarms.yml"


@dataclass(frozen=True)
class Programs:
    """The paths of both programs."""

    prometheus: Path
    promtool: Path


def find_programs() -> Programs:
    """Both programs. If they are missing, the test is skipped, or fails with DEEPAR_TEST_DOCKER=required."""
    found = available()
    if found is None:
        pytest.skip("Prometheus is not installed (DEEPAR_TEST_DOCKER=required fetches it)")
    return found


def available() -> Programs | None:
    """Both programs, or None if they are missing. Fails with DEEPAR_TEST_DOCKER=required."""
    here = {name: shutil.which(name) for name in ("prometheus", "promtool")}
    if all(here.values()):
        return Programs(Path(here["prometheus"] or ""), Path(here["promtool"] or ""))
    kept = cache_root() / "prometheus"
    found = Programs(kept / "usr" / "bin" / "prometheus", kept / "usr" / "bin" / "promtool")
    if found.prometheus.exists() and found.promtool.exists():
        return found
    if not required():
        return None
    try:
        _unpack(kept)
    except (CommandError, OSError) as error:
        pytest.fail(f"DEEPAR_TEST_DOCKER=required, but Prometheus cannot be fetched: {error}", pytrace=False)
    return found


def _unpack(kept: Path) -> None:
    with packages_locked(), tempfile.TemporaryDirectory() as work:
        try:
            run(["apt-get", "download", "-q", "prometheus"], cwd=Path(work))
        except CommandError:  # the package lists may be outdated or missing
            run(["apt-get", "update", "-q"])
            run(["apt-get", "download", "-q", "prometheus"], cwd=Path(work))
        (package,) = Path(work).glob("prometheus_*.deb")
        run(["dpkg-deb", "-x", package, Path(work) / "files"])
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copytree(Path(work) / "files" / "usr" / "bin", kept / "usr" / "bin", dirs_exist_ok=True)


def configuration(folder: Path, targets: Mapping[str, int], scrape: str = "5s") -> Path:
    """The configuration that the compose file mounts, but scraping ports of this machine instead of containers.

    `targets` maps services of the compose file to ports. Raises AssertionError for a service that the file does not scrape.
    """
    text = CONFIG.read_text(encoding="utf-8")
    named = re.findall(r'"([\w-]+):9464"', text)
    assert set(targets) <= set(named), f"{CONFIG.name} scrapes {named}, not all of {list(targets)}"
    text = re.sub(
        r"targets: \[.*\]", f"targets: {json.dumps([f'127.0.0.1:{port}' for port in targets.values()])}", text
    )
    text = text.replace("/etc/prometheus/alarms.yml", str(ALARMS)).replace("_interval: 5s", f"_interval: {scrape}")
    path = folder / "prometheus.yml"
    path.write_text(text, encoding="utf-8")
    return path


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self._log = log

    def ask(self, path: str, **words: str) -> Any:
        """The `data` of an answer of the HTTP API. Raises AssertionError with the error in the answer."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(words)}"
        try:
            with urllib.request.urlopen(url, timeout=10.0) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {words}: {error.read().decode()}") from error

    def value(self, expression: str) -> list[dict[str, Any]]:
        """The present value of an expression: one entry for each series."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def until(self, holds: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        """Wait until `holds` is true. Raises AssertionError with the end of the log after `timeout_s`."""
        until_s = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < until_s, f"{what}: not within {timeout_s} s\n{self._log.read_text()[-2000:]}"
            time.sleep(0.2)


@contextmanager
def running(programs: Programs, config: Path, folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus with a configuration while the block runs."""
    port, log = free_port(), folder / "prometheus.log"
    command = [str(programs.prometheus), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with log.open("wb") as sink:
        child = subprocess.Popen(
            tied_to_us([*command, f"--web.listen-address=127.0.0.1:{port}"]), stdout=sink, stderr=sink, cwd=folder
        )
    made = Prometheus(port, log)
    try:
        made.until(lambda: child.poll() is None and _ready(port), "Prometheus answers")
        yield made
    finally:
        child.terminate()
        child.wait(20.0)


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=2.0):
            return True
    except OSError:
        return False
