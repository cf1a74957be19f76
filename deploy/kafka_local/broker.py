"""A local Apache Kafka broker: one KRaft node with a bounded heap and its jars in the cache folder.

`deepar broker` and the tests use the same class. The settings come from `deploy/kafka/server.properties`, which
docker-compose uses too; this module adds only addresses and folders. The data folder contains `server.properties` (the
settings in effect), `broker.log` (Kafka's log, kept across restarts) and `kafka-data/` (the records).
"""

from __future__ import annotations

import base64
import fcntl
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from bus.errors import BusUnavailableError, ConfigError
from deploy.kafka_local.artifacts import KAFKA_VERSION, SETTINGS_DIR, Progress, ensure_jars, find_java
from deploy.kafka_local.child_process import tied_to_us
from deploy.kafka_local.handshake import BrokerReply, NotReadyError, ask
from deploy.kafka_local.ports import free_port, require_free

START_LIMIT_S = 60.0  # a start takes 3-5 s; after a SIGKILL the old session must expire first
STOP_LIMIT_S = 20.0  # a clean stop takes 1.5 s
HEAP_MIB = 512
LOG_KEPT_BYTES = 16 << 20  # a longer log is moved aside at the next start


class BrokerStartError(BusUnavailableError):
    """Kafka did not start; the message contains the end of its log."""


class BrokerDiedError(BusUnavailableError):
    """Kafka ended unexpectedly."""


class DataInUseError(ConfigError):
    """Another broker runs on the same data folder."""


def new_cluster_id() -> str:
    """16 random bytes in base64url, Kafka's format; the first character is fixed because Kafka does not allow "-" there."""
    return "A" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode("ascii").rstrip("=")[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerOptions:
    """Addresses, settings and memory of one broker."""

    host: str = "127.0.0.1"  # address to listen on
    port: int | None = None  # for clients; None: a free port
    controller_port: int | None = None  # for other controllers; None: a free port
    within: tuple[str, ...] = ()  # prefix of the serving command, e.g. `ip netns exec NAME`; needs a `ready` of its own
    settings: Mapping[str, str] = field(default_factory=dict)  # override server.properties
    cluster_id: str | None = None  # the same for all nodes of a cluster; None: a new one
    # Arguments for `StorageTool format`, e.g. users. Its output is then discarded, because it prints password verifiers.
    format_arguments: tuple[str, ...] = ()
    heap_mib: int = HEAP_MIB


DEFAULT_OPTIONS = BrokerOptions()


class KafkaBroker:
    """One Apache Kafka node that this process can start, stop, kill and restart on the same data and port.

    `ready` checks whether the broker serves; it raises OSError or BusUnavailableError if not (default: a handshake).
    `progress` receives status lines. All methods block and are not thread-safe. The broker ends with this process (see
    `tied_to_us`). `start` raises MissingProgramError, ArtifactsError, PortTakenError, DataInUseError or BrokerStartError.
    """

    def __init__(
        self,
        data_dir: Path,
        options: BrokerOptions = DEFAULT_OPTIONS,
        *,
        started_by: str = "started by deepar",
        ready: Callable[[], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.log_file = self.data_dir / "broker.log"
        self._records = self.data_dir / "kafka-data"
        self.kind = f"Apache Kafka {KAFKA_VERSION} (KRaft, {started_by})"
        self._options = options
        self._port = options.port
        self._controller_port = options.controller_port
        self._ready = ready or self._check_handshake
        self._progress: Progress = progress or (lambda line: None)
        self._child: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None
        self._log_start = 0  # where this run's part of the log begins

    def __repr__(self) -> str:
        state = f"running, pid {self.pid}" if self.running else "stopped"
        return f"<{self.kind} at {self._port and self.bootstrap}, {state}>"

    @property
    def bootstrap(self) -> str:
        """`HOST:PORT`, for `bootstrap_servers`; known from the first start on."""
        if self._port is None:
            raise BrokerStartError("the broker has no address before its first start")
        return f"{self._options.host}:{self._port}"

    @property
    def pid(self) -> int | None:
        """The process id of Java, or None when it does not run."""
        return self._child.pid if self.running and self._child else None

    @property
    def running(self) -> bool:
        """Whether the process is running; it may not accept requests."""
        return self._child is not None and self._child.poll() is None

    def start(self, limit_s: float = START_LIMIT_S) -> float:
        """Start the broker and wait until it serves. Returns the seconds taken, without fetching jars."""
        if self.running:
            return 0.0
        try:
            for attempt in range(3):
                started = self.launch()
                try:
                    self.wait(started + limit_s)
                    return time.monotonic() - started
                except BrokerStartError as error:
                    self.kill()
                    # Another process may take a free port before Kafka binds it: choose another, unless the caller
                    # chose the port.
                    if "BindException" not in str(error) or self._options.port is not None or attempt == 2:
                        raise
                    self._port = self._controller_port = None
            raise AssertionError("unreachable")
        except BaseException:  # a Ctrl-C during the start must not leave a Java process
            self.kill()
            raise

    def launch(self) -> float:
        """Start without waiting, as nodes of a cluster need each other. Returns the start time, for `wait`."""
        java, _ = find_java()
        self._prepare_data_dir()  # before fetching jars, so that an unusable folder is reported at once
        jars = ensure_jars(self._progress)
        started = time.monotonic()
        self._choose_ports()
        self._launch(java, jars)
        return started

    def wait(self, deadline: float) -> None:
        """Wait until the broker serves. Raises BrokerStartError at `deadline` (`time.monotonic`) or if it ends."""
        assert self._child is not None
        last: Exception | None = None
        while time.monotonic() < deadline:
            code = self._child.poll()
            if code is not None:
                raise BrokerStartError(f"Kafka ended with code {code} while starting:\n{self.log_tail()}")
            try:
                self._ready()
            except (OSError, BusUnavailableError) as error:
                last = error
                time.sleep(0.05)
            else:
                return
        raise BrokerStartError(f"Kafka does not serve at {self.bootstrap} ({last}); its log ends:\n{self.log_tail()}")

    def stop(self, limit_s: float = STOP_LIMIT_S) -> None:
        """Send SIGTERM and wait; after `limit_s`, kill the process."""
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(limit_s)
            except subprocess.TimeoutExpired:
                self._child.kill()
        self._reap()

    def kill(self) -> None:
        """Send SIGKILL, to simulate a power failure."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGKILL)
        self._reap()

    def restart(self, limit_s: float = START_LIMIT_S) -> float:
        """Stop the broker if it runs and start it on the same data and port. Returns the seconds until it serves."""
        self.stop()
        return self.start(limit_s)

    def erase(self) -> None:
        """Delete topics, records and logs, but no other file. Raises DataInUseError while a broker runs."""
        self._prepare_data_dir()
        self._release()
        shutil.rmtree(self._records, ignore_errors=True)
        for name in ("server.properties", "broker.log", "broker.log.1"):
            (self.data_dir / name).unlink(missing_ok=True)

    def ask(self, timeout_s: float = 2.0) -> BrokerReply:
        """Perform a handshake; raises OSError if the broker does not serve."""
        return ask(self.bootstrap, timeout_s)

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of Kafka's log of this run."""
        if not self.log_file.exists():
            return "(it wrote no log)"
        with self.log_file.open("rb") as log:
            log.seek(max(self._log_start, self.log_file.stat().st_size - 200 * lines))
            return b"\n".join(log.read().splitlines()[-lines:]).decode("utf-8", "replace")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _prepare_data_dir(self) -> None:
        """Create the data folder and lock it against other brokers and `erase`."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        if self._lock is not None:
            return
        lock = (self.data_dir / "lock").open("w", encoding="ascii")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise DataInUseError(
                f"another broker runs on {self.data_dir}",
                remedy="stop it, or name another folder with --data",
            ) from error
        self._lock = lock

    def _choose_ports(self) -> None:
        if self._options.port is not None and not self._options.within:
            require_free(self._options.port)
        self._port = self._port or free_port()
        self._controller_port = self._controller_port or free_port()

    def _launch(self, java: Path, jars: Path) -> None:
        """Write the settings, format the data folder if it is new, and start Java."""
        properties = self._write_properties()
        run = [str(java), "-cp", f"{jars}/*", "-Dorg.slf4j.simpleLogger.showDateTime=true",
               "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX"]  # fmt: skip
        if self.log_file.exists() and self.log_file.stat().st_size > LOG_KEPT_BYTES:
            self.log_file.replace(self.log_file.with_name("broker.log.1"))
        with self.log_file.open("ab") as log:
            self._log_start = log.seek(0, os.SEEK_END)
            if not (self._records / "meta.properties").exists():
                self._format([*run, "-Xmx128m", "kafka.tools.StorageTool", "format"], properties, log)
            heap = f"-Xmx{self._options.heap_mib}m"
            serve = [*self._options.within, *run, heap, "-XX:+ExitOnOutOfMemoryError", "kafka.Kafka"]
            self._progress("starting Apache Kafka")
            # Its own session: a Ctrl-C at the terminal reaches only this process, which then stops Kafka cleanly.
            self._child = subprocess.Popen(
                tied_to_us([*serve, str(properties)]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.data_dir,
                start_new_session=True,
            )

    def _write_properties(self) -> Path:
        """The shared settings followed by the settings of this broker: a later line overrides an earlier one."""
        added = {
            "listeners": f"CLIENTS://{self.bootstrap},CONTROLLER://127.0.0.1:{self._controller_port}",
            "advertised.listeners": f"CLIENTS://{self.bootstrap}",
            "listener.security.protocol.map": "CLIENTS:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "CLIENTS",
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller_port}",
            "log.dirs": str(self._records),
        } | dict(self._options.settings)
        shared = (SETTINGS_DIR / "server.properties").read_text(encoding="ascii")
        lines = "".join(f"{key}={value}\n" for key, value in added.items())
        properties = self.data_dir / "server.properties"
        properties.write_text(f"{shared}\n# Added by deploy/kafka_local/broker.py\n{lines}", encoding="utf-8")
        return properties

    def _format(self, tool: list[str], properties: Path, log: IO[bytes]) -> None:
        """Format the data folder for Kafka. Raises BrokerStartError."""
        self._progress("formatting the data folder")
        shutil.rmtree(self._records, ignore_errors=True)  # left by an interrupted format
        words = ["-t", self._options.cluster_id or new_cluster_id(), "-c", str(properties)]
        words += self._options.format_arguments
        said = subprocess.DEVNULL if self._options.format_arguments else log
        done = subprocess.run([*tool, *words], stdin=subprocess.DEVNULL, stdout=said, stderr=log, check=False)
        if done.returncode != 0:
            raise BrokerStartError(f"Kafka refused to format {self._records}:\n{self.log_tail()}")

    def _check_handshake(self) -> None:
        """Check that the broker answers and advertises its own address. Raises OSError."""
        advertised = self.ask(1.0).addresses
        if self.bootstrap not in advertised:
            raise NotReadyError(f"{self.bootstrap} is not among the advertised brokers: {', '.join(advertised)}")

    def _reap(self) -> None:
        if self._child is not None:
            self._child.wait()
            self._child = None
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
