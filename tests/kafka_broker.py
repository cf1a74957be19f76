"""Pytest fixtures with the broker of the tests.

`kafka` is one broker for the whole session, started when a test first asks for it; its topics outlive a test, so every test
uses topics of its own. `kafka_own` is a fresh broker for a test that stops or kills it. The tests use the first of these that
is available:

1. the running broker that KAFKA_BOOTSTRAP_SERVERS names (never for `kafka_own`);
2. Apache Kafka, started here with Java 17 and jars that Maven fetches once, as in continuous integration;
3. `noida-db`, a small stand-in for Kafka, only on machines without Java, Maven and Docker.

With DEEPAR_TEST_KAFKA=apache, a test that needs a broker fails unless it is Apache Kafka. The header of the report names the
broker.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import pytest

from bus.errors import DeeparError
from deploy.kafka_local.artifacts import KAFKA_VERSION, find_java, find_maven, have_jars
from deploy.kafka_local.broker import BrokerStartError, KafkaBroker
from deploy.kafka_local.handshake import ask
from deploy.kafka_local.ports import free_port

STARTED_BY = "started by the tests"


class Broker(Protocol):
    """A running broker, as the fixtures yield it."""

    @property
    def kind(self) -> str: ...  # e.g. "Apache Kafka 4.3.0 (KRaft, started by the tests)"

    @property
    def bootstrap(self) -> str: ...  # host:port


class OwnBroker(Broker, Protocol):
    """A broker that a test may stop and start; it keeps its data and port. `start` and `restart` return seconds."""

    def start(self) -> float: ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...

    def restart(self) -> float: ...


@dataclass(frozen=True)
class RunningBroker:
    """The broker that KAFKA_BOOTSTRAP_SERVERS names."""

    bootstrap: str
    kind: str


class StandInBroker:
    """noida-db, with the methods of `KafkaBroker`. After a SIGKILL, records that it had not saved are lost."""

    def __init__(self, data_dir: Path) -> None:
        self.kind = f"noida-db {version('noida-db')} (a stand-in, not Kafka; {STARTED_BY})"
        self._data_dir = data_dir
        self._port = free_port()
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> float:
        if self._child is not None:
            return 0.0
        started = time.monotonic()
        spec = importlib.util.find_spec("noida_db")
        assert spec is not None
        assert spec.origin is not None
        program = Path(spec.origin).with_name("noida-db")
        program.chmod(0o755)
        self._data_dir.mkdir(parents=True, exist_ok=True)
        with (self._data_dir / "broker.log").open("ab") as log:
            command = [str(program), "start", "--only", "kafka", "--kafka-port", str(self._port)]
            self._child = subprocess.Popen(
                [*command, "--data-dir", str(self._data_dir)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while time.monotonic() < started + 20:
            try:
                ask(self.bootstrap, 1.0)
            except OSError:
                time.sleep(0.02)
            else:
                return time.monotonic() - started
        self.kill()
        raise BrokerStartError(f"noida-db does not serve; see {self._data_dir / 'broker.log'}")

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def restart(self) -> float:
        self.stop()
        return self.start()

    def _end(self, how: signal.Signals) -> None:
        if self._child is not None:
            self._child.send_signal(how)
            self._child.wait(20)
            self._child = None


@dataclass(frozen=True)
class Choice:
    """The broker that the tests will use."""

    how: str  # running, apache, stand-in or none
    text: str  # for people: the broker, or why there is none

    @property
    def is_apache(self) -> bool:
        return self.how == "apache" or (self.how == "running" and "Apache Kafka" in self.text)


def choose() -> Choice:
    """Choose by the environment and the installed programs, without starting anything."""
    named = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
    if named:
        try:
            reply = ask(named, 3.0)
        except (OSError, ValueError) as error:
            return Choice("none", f"KAFKA_BOOTSTRAP_SERVERS={named}, where no broker answers ({error})")
        what = "Apache Kafka (KRaft" if reply.is_kraft else "not Apache Kafka in KRaft mode ("
        return Choice("running", f"{what}, running at {named})")
    try:
        _, java = find_java()
        if not have_jars():
            find_maven()
    except DeeparError as error:
        if any(map(shutil.which, ("java", "mvn", "docker"))):
            return Choice("none", f"{error}; {error.remedy}")
        if importlib.util.find_spec("noida_db") is None:
            return Choice("none", "neither Java, Maven nor Docker is installed, nor the stand-in `noida-db`")
        return Choice("stand-in", f"noida-db {version('noida-db')}, a stand-in: no Java, Maven or Docker here")
    return Choice("apache", f"Apache Kafka {KAFKA_VERSION} (KRaft, {STARTED_BY} on first use), Java {java}")


def apache_required() -> bool:
    """Whether tests must run on Apache Kafka. Raises pytest.UsageError for an unknown value of DEEPAR_TEST_KAFKA."""
    wanted = os.environ.get("DEEPAR_TEST_KAFKA", "")
    if wanted not in ("", "any", "apache"):
        raise pytest.UsageError(f"DEEPAR_TEST_KAFKA={wanted!r}: it may be 'apache', 'any' or unset")
    return wanted == "apache"


def pytest_report_header() -> str:
    demanded = "; Apache Kafka is required" if apache_required() else ""
    return f"kafka: {choose().text}{demanded}"


def pytest_sessionstart(session: pytest.Session) -> None:
    """With -q pytest omits the header, so print the broker here."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and session.config.get_verbosity() < 0:
        reporter.write_line(pytest_report_header())


def start_broker(choice: Choice, data_dir: Path) -> OwnBroker:
    """Start the chosen broker on `data_dir`; fail the test if there is none or it does not start."""
    if apache_required() and not choice.is_apache:
        pytest.fail(f"DEEPAR_TEST_KAFKA=apache requires Apache Kafka, but: {choice.text}", pytrace=False)
    if choice.how == "none":
        pytest.fail(f"no broker for this test: {choice.text}", pytrace=False)
    broker: KafkaBroker | StandInBroker
    broker = KafkaBroker(data_dir, started_by=STARTED_BY) if choice.how == "apache" else StandInBroker(data_dir)
    try:
        broker.start()
    except DeeparError as error:
        pytest.fail(f"{broker.kind} did not start: {error}\n{error.remedy or ''}", pytrace=False)
    return broker


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One broker for all tests. Do not stop it; use `kafka_own` for that."""
    choice = choose()
    if choice.how == "running" and (choice.is_apache or not apache_required()):
        yield RunningBroker(os.environ["KAFKA_BOOTSTRAP_SERVERS"], choice.text)
        return
    broker = start_broker(choice, tmp_path_factory.mktemp("kafka"))
    yield broker
    died = isinstance(broker, KafkaBroker) and not broker.running
    tail = broker.log_tail() if isinstance(broker, KafkaBroker) else ""
    broker.kill()  # a clean stop takes half a second of processor time
    if died:
        pytest.fail(f"the session's broker died during the tests; its log ends:\n{tail}", pytrace=False)


@pytest.fixture
def kafka_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnBroker]:
    """A fresh broker for one test, which may stop, kill and restart it. Starting takes 4-5 s."""
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)
    broker = start_broker(choose(), tmp_path / "kafka")
    yield broker
    broker.kill()
