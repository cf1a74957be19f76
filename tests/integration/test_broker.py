"""The launcher against the real thing: Apache Kafka started, killed, started again, and its command."""

from __future__ import annotations

import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from deploy.kafka_local.artifacts import SETTINGS_DIR, jars_dir
from deploy.kafka_local.broker import BrokerOptions, DataInUseError, KafkaBroker
from deploy.kafka_local.ports import PortTakenError, free_port
from tests.kafka_broker import Broker, OwnBroker, apache_required, choose

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def apache() -> None:
    """For tests of the launcher itself: Apache Kafka can be started here."""
    choice = choose()
    if choice.how != "apache" and not (choice.how == "running" and jars_dir().exists()):
        message = f"the launcher cannot be tried here: {choice.text}"
        pytest.fail(message) if apache_required() else pytest.skip(message)


async def _create_topic(bootstrap: str, name: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, num_partitions=1, replication_factor=1)])
    finally:
        await admin.close()


async def _produce(bootstrap: str, topic: str, first: int, count: int) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True)
    await producer.start()
    try:
        for number in range(first, first + count):
            await producer.send_and_wait(topic, str(number).encode())
    finally:
        await producer.stop()


async def _read_all(bootstrap: str, topic: str) -> list[int]:
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)
    await consumer.start()
    try:
        partition = TopicPartition(topic, 0)
        consumer.assign([partition])
        await consumer.seek_to_beginning(partition)
        end = (await consumer.end_offsets([partition]))[partition]
        values: list[int] = []
        while await consumer.position(partition) < end:
            for records in (await consumer.getmany(timeout_ms=200)).values():
                values += [int(record.value or b"-1") for record in records]
        return values
    finally:
        await consumer.stop()


async def test_acknowledged_records_survive_a_sigkill_and_clean_restarts(kafka_own: OwnBroker) -> None:
    if not isinstance(kafka_own, KafkaBroker):
        pytest.skip(f"{kafka_own.kind} does not promise it")
    address = kafka_own.bootstrap
    await _create_topic(address, "survivors")
    await _produce(address, "survivors", 0, 50)
    kafka_own.kill()
    assert not kafka_own.running
    kafka_own.start()
    await _produce(address, "survivors", 50, 50)
    kafka_own.restart()
    assert kafka_own.bootstrap == address
    assert await _read_all(address, "survivors") == list(range(100))


async def test_the_broker_runs_with_the_settings_that_compose_uses(kafka: Broker) -> None:
    """Every line of deploy/kafka/server.properties, read back from the broker itself."""
    if not kafka.kind.startswith("Apache Kafka") or "started by the tests" not in kafka.kind:
        pytest.skip(f"{kafka.kind} has settings of its own")
    lines = (SETTINGS_DIR / "server.properties").read_text().splitlines()
    wanted = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    try:
        (response,) = await admin.describe_configs([ConfigResource(ConfigResourceType.BROKER, "1")])
    finally:
        await admin.close()
    in_force = {entry[0]: entry[1] for entry in response.resources[0][4]}
    assert {key: in_force.get(key) for key in wanted} == wanted


def test_the_heap_is_bounded(apache: None, tmp_path: Path) -> None:
    with KafkaBroker(tmp_path) as broker:
        command = Path(f"/proc/{broker.pid}/cmdline").read_text().split("\0")
        resident = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{broker.pid}/status").read_text())
    assert "-Xmx512m" in command
    assert resident is not None
    assert int(resident[1]) < 800 * 1024


def test_one_data_folder_one_broker(apache: None, tmp_path: Path) -> None:
    with KafkaBroker(tmp_path) as broker:
        with pytest.raises(DataInUseError, match="another broker runs"):
            KafkaBroker(tmp_path).start()
        with pytest.raises(DataInUseError):
            KafkaBroker(tmp_path).erase()
        with pytest.raises(PortTakenError, match="a Kafka broker answers"):
            KafkaBroker(tmp_path / "other", BrokerOptions(port=int(broker.bootstrap.split(":")[1]))).start()
        assert broker.ask().brokers == 1
    (tmp_path / "mine.txt").write_text("kept")
    KafkaBroker(tmp_path).erase()
    assert not (tmp_path / "kafka-data").exists()
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_port_of_another_program_is_named(apache: None, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"port {port} is taken by another program"):
            KafkaBroker(tmp_path, BrokerOptions(port=port)).start()


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's parent-death signal")
def test_the_broker_ends_with_whoever_started_it(apache: None, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from deploy.kafka_local.broker import KafkaBroker\n"
        "broker = KafkaBroker(Path(sys.argv[1])); broker.start(); print(broker.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}/cmdline").exists()
        parent.kill()
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """A zombie process counts as ended."""
    try:
        return re.search(r"^State:\s+[ZX]", Path(f"/proc/{pid}/status").read_text(), re.M) is None
    except FileNotFoundError:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="this user is an ordinary one already: every test here shows it")
def test_an_ordinary_user_can_run_it(apache: None) -> None:
    nobody = pwd.getpwnam("nobody")
    script = (
        "import sys; from pathlib import Path; from deploy.kafka_local.broker import KafkaBroker\n"
        "with KafkaBroker(Path(sys.argv[1])) as broker: print(broker.ask().brokers)"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        # Copies: root's own cache, checkout and Python may be closed to others.
        for name, sources in {"cache": [jars_dir()], "code": [REPOSITORY / "bus", REPOSITORY / "deploy"]}.items():
            (Path(folder) / name).mkdir()
            subprocess.run(["cp", "-r", *sources, f"{folder}/{name}"], check=True)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["/usr/bin/env", *command],
                cwd=f"{folder}/code",
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": folder,
                    "DEEPAR_CACHE_DIR": f"{folder}/cache",
                    "PYTHONPATH": sysconfig.get_path("platlib"),
                },
                user=nobody.pw_uid,
                group=nobody.pw_gid,
                extra_groups=[],
                capture_output=True,
                text=True,
                check=False,
            )

        pythons = (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}")
        usable = [python for python in pythons if run(python, "-c", "import pydantic").returncode == 0]
        if not usable:
            pytest.skip("no Python here that an ordinary user may run")
        done = run(usable[0], "-c", script, f"{folder}/data")
        assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
        assert (Path(folder) / "data" / "kafka-data").stat().st_uid == nobody.pw_uid


@pytest.fixture
def command(apache: None, heeds_interrupts: None, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`deepar broker` in a process of its own, ready."""
    script = "import typer; from deploy.commands.kafka.broker import broker; typer.run(broker)"
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            script,
            "--port",
            str(free_port()),
            "--data",
            str(tmp_path / "data"),
            "--fresh",
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 105), (signal.SIGTERM, 0)])
def test_the_command_says_when_it_is_ready_and_ends_cleanly(
    command: subprocess.Popen[str], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    assert command.stdout is not None
    first = command.stdout.readline()
    found = re.fullmatch(r"Apache Kafka \S+ \(KRaft, .*\) is ready after [\d.]+ s: (127\.0\.0\.1:\d+)\n", first)
    assert found, first
    with socket.create_connection(("127.0.0.1", int(found[1].split(":")[1])), timeout=2):
        command.send_signal(number)
    said = command.stdout.read()
    assert command.wait(30) == code
    assert f"KAFKA_BOOTSTRAP_SERVERS={found[1]} deepar" in said
    # A clean stop leaves a marker, so that the next start need not recover the logs.
    assert (tmp_path / "data" / "kafka-data" / ".kafka_cleanshutdown").exists()
