"""`deepar doctor` finds what was planted, names it, and says what to do; on a real Kafka, a real disk, a real runtime."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from bus import messages, topics
from bus.decisions import DecisionLog
from bus.kafka.bus import KafkaBus
from bus.kafka.connection import KafkaConnection
from bus.messages import EpochOpened, Message, NodeAnnounced, NodeHeartbeat, NodeLeft
from bus.values import Role
from deploy.commands.doctor import examine
from deploy.doctor.machine_checks import Check
from deploy.kafka_local.ports import free_port
from deploy.services import wiring
from planner.service.service import Standing
from tests.kafka_broker import Broker, apache_required, choose
from tests.kafka_broker import start_broker as start
from tests.unit.stages import built_models


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker of our own: what is planted here would be found by others' tests."""
    if choose().how != "apache":
        message = f"an Apache Kafka of our own is needed: {choose().text}"
        pytest.fail(message) if apache_required() else pytest.skip(message)
    one = start(choose(), tmp_path_factory.mktemp("kafka"))
    yield one
    one.stop()


@pytest.fixture
async def connection(broker: Broker) -> KafkaConnection:
    """The broker with every topic that a region needs."""
    connection = KafkaConnection(bootstrap_servers=broker.bootstrap)
    async with KafkaBus(connection) as bus:
        await wiring.create_missing_topics(bus)
    return connection


async def bad(connection: KafkaConnection, name: str) -> list[Check]:
    """What the doctor finds wrong under a name."""
    return [check for check in await examine(connection, ["lenet"]) if check.name == name and not check.ok]


@asynccontextmanager
async def admin_of(connection: KafkaConnection) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=connection.bootstrap_servers)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


Put = Callable[[str, Message, float], Awaitable[None]]


@pytest.fixture
async def put(connection: KafkaConnection) -> AsyncIterator[Put]:
    """Write a record from a machine whose clock shows this many seconds since 1970."""
    producer = AIOKafkaProducer(bootstrap_servers=connection.bootstrap_servers)
    await producer.start()

    async def write(topic: str, message: Message, sent_s: float) -> None:
        value, key = messages.encode(message), getattr(message, "node", "0").encode()
        await producer.send_and_wait(topic, value, key=key, partition=0, timestamp_ms=int(sent_s * 1000))

    yield write
    await producer.stop()


async def test_sizes_that_do_not_agree_are_named_topic_by_topic(connection: KafkaConnection) -> None:
    assert await bad(connection, "sizes") == []
    planted = {"deepar.activations.tiny": "1000", "deepar.activations.huge": "16777216"}
    async with admin_of(connection) as admin:
        await admin.create_topics(
            [NewTopic(name, 1, 1, topic_configs={"max.message.bytes": size}) for name, size in planted.items()]
        )
        try:
            found = {check.detail.split()[0]: check for check in await bad(connection, "sizes")}
        finally:
            await admin.delete_topics(list(planted))
    assert found.keys() == planted.keys()
    tiny, huge = (found[name] for name in planted)
    assert "refuses records over 1,000 bytes" in tiny.detail
    assert "takes records up to 16,777,216 bytes" in huge.detail
    assert "our consumers fetch 4,194,304" in huge.detail
    for name, check in found.items():
        assert check.remedy.startswith("kafka-configs.sh")
        assert f"--entity-name {name} --alter --add-config max.message.bytes=10" in check.remedy


async def test_a_producer_that_is_held_too_low_is_named(connection: KafkaConnection) -> None:
    low = connection.model_copy(update={"max_record_bytes": 500_000})
    (found,) = await bad(low, "sizes")
    assert "our producer refuses records over 500,000 bytes" in found.detail


async def test_a_lock_whose_planner_is_gone_is_stale_and_its_remedy_helps(
    connection: KafkaConnection, put: Put
) -> None:
    async with KafkaBus(connection) as bus:
        gone = EpochOpened(region=0, epoch=await _epoch(bus) + 1, nonce="gone", planner="p-gone", lease_s=1.0)
        await put(topics.DECISIONS, gone, time.time() - 7200)
        (found,) = await bad(connection, "planner")
        assert f"stale planner lock: p-gone holds epoch {gone.epoch}" in found.detail
        assert "(2.0 h ago)" in found.detail
        assert found.remedy.startswith("deepar planner --region 0 --take-over")

        # A clock that runs ahead must not hide it, nor one that is behind accuse a planner that works.
        await put(topics.DECISIONS, gone.model_copy(update={"epoch": gone.epoch + 1}), time.time() + 600)
        (found,) = await bad(connection, "planner")
        assert "ahead of this machine's clock" in found.detail

        service = wiring.make_planner(bus, wiring.PlannerSetup(name="p-new", lease_s=1.0, take_over=True))
        async with wiring.embedded() as group:
            group.create_task(service.run())
            async with asyncio.timeout(30):
                while service.standing is not Standing.LEADING:
                    await asyncio.sleep(0.05)
            checks = await examine(connection, [])
            (led,) = (check for check in checks if check.name == "planner")
            assert led.ok, led
            assert f"p-new leads epoch {gone.epoch + 2}" in led.detail
        (left,) = await bad(connection, "planner")
        assert "has left" in left.detail


async def _epoch(bus: KafkaBus) -> int:
    log = DecisionLog()
    reader = await bus.reader([(topics.DECISIONS, 0)], start="start")
    while await reader.lag():
        for record in await reader.fetch():
            log.read(record)
    await reader.close()
    return log.epoch


@pytest.mark.parametrize(("off_s", "said"), [(-600.0, "behind"), (600.0, "ahead")])
async def test_a_node_whose_clock_is_off_is_named(
    connection: KafkaConnection, put: Put, off_s: float, said: str
) -> None:
    async def beat(name: str, off_s: float) -> None:
        announced = NodeAnnounced(node=name, role=Role.CLOUD, incarnation="i1", lease_s=1.0)
        await put(topics.NODES, announced, time.time() + off_s)
        heartbeat = NodeHeartbeat(node=name, incarnation="i1")
        while True:
            await put(topics.EVENTS, heartbeat, time.time() + off_s)
            await asyncio.sleep(0.1)

    async with wiring.embedded() as group:
        beating = [group.create_task(beat("c-right", 0.0)), group.create_task(beat("c-wrong", off_s))]
        await asyncio.sleep(0.5)
        checks = await examine(connection, [])
        for task in beating:
            task.cancel()
    for name in ("c-right", "c-wrong"):
        await put(topics.NODES, NodeLeft(node=name, incarnation="i1"), time.time())
    (clocks,) = (check for check in checks if check.name == "clocks")
    assert not clocks.ok
    assert (
        "c-wrong 10.0 min " in clocks.detail or "c-wrong 600 s " in clocks.detail or "c-wrong 10 min" in clocks.detail
    )
    assert said in clocks.detail
    assert "c-right" not in clocks.detail
    assert "NTP" in clocks.remedy
    (there,) = (check for check in checks if check.name == "nodes")
    assert there.ok
    assert "silent" not in there.detail


def doctor(*words: str, **environment: str) -> tuple[int, dict[str, dict[str, object]]]:
    """`deepar doctor --json` as a process: its exit code, and its checks by name."""
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "doctor", "--json", *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout, done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert all(check.keys() == {"name", "ok", "state", "detail", "remedy"} for check in checks)
    assert all(check["state"] == "ok" or check["remedy"] for check in checks)
    assert all(check["ok"] == (check["state"] != "failed") for check in checks)
    return done.returncode, {check["name"]: check for check in checks}


def test_no_broker_and_no_runtime_are_both_named(tmp_path: Path) -> None:
    """The doctor itself must not need what it looks for."""
    for package in ("ai_edge_litert", "tflite_runtime"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('libfoo.so.1: cannot open')\n")
    port = free_port()
    code, checks = doctor("--bootstrap-servers", f"127.0.0.1:{port}", PYTHONPATH=str(tmp_path))
    assert code == 1
    assert "no broker at 127.0.0.1" in str(checks["broker"]["detail"])
    assert "deepar broker" in str(checks["broker"]["remedy"])
    assert "libfoo.so.1" in str(checks["litert"]["detail"])
    assert "ai-edge-litert" in str(checks["litert"]["remedy"])
    assert checks["python"]["ok"]


def test_an_operator_without_a_kernel_is_named(tmp_path: Path) -> None:
    model = tmp_path / "odd.tflite"
    model.write_bytes(built_models.custom().to_bytes())
    code, checks = doctor("--model", str(model), "--bootstrap-servers", f"127.0.0.1:{free_port()}")
    assert code == 1
    assert "no kernel for Strange" in str(checks["kernels"]["detail"])
    assert checks["litert"]["ok"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """On a file system of one megabyte, in a mount namespace of its own."""
    command = "mount -t tmpfs -o size=1m none {0} && head -c 2m /dev/zero >{0}/filler 2>/dev/null; exec {1}"
    python = f"{sys.executable} -m deploy.cli doctor --json --bootstrap-servers 127.0.0.1:{free_port()}"
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting needs root")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command.format(tmp_path, python)],
        env=os.environ | {"DEEPAR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert not checks["disk"]["ok"]
    assert "the disk is full" in checks["disk"]["detail"]
    assert "DEEPAR_CACHE_DIR" in checks["disk"]["remedy"]
