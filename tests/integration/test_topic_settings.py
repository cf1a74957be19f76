"""On a real Kafka: topics that are set wrong are refused, named by the doctor, and repaired by one command."""

from __future__ import annotations

import asyncio
import time
import uuid
from functools import partial
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from bus import topics
from bus.errors import MessageTooLargeError
from bus.kafka.bus import KafkaBus
from bus.kafka.connection import KafkaConnection
from bus.topics import TopicSpec
from deploy.commands.doctor import examine
from deploy.kafka_local.broker import BrokerOptions, KafkaBroker
from deploy.kafka_local.handshake import ask
from deploy.kafka_local.ports import free_port
from deploy.services import wiring
from tests.integration.deepar_processes import Processes
from tests.kafka_broker import Broker, OwnBroker, choose

PLANTED = {
    topics.DECISIONS: {"cleanup.policy": "compact"},
    topics.SNAPSHOTS: {"cleanup.policy": "delete", "segment.bytes": "1048576"},
    topics.TASKS: {"retention.ms": "60000", "max.message.bytes": "5000"},
    topics.RESULTS: {"compression.type": "lz4"},
}


async def test_topics_that_are_set_wrong_are_refused_named_and_repaired(kafka_own: OwnBroker, tmp_path: Path) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_own.bootstrap)
    await admin.start()
    try:
        await admin.create_topics(
            [NewTopic(name, 1, 1, topic_configs=settings) for name, settings in PLANTED.items()]
            + [NewTopic(topics.EVENTS, 2, 1)]
        )
    finally:
        await admin.close()
    connection = KafkaConnection(bootstrap_servers=kafka_own.bootstrap)
    with Processes(kafka_own.bootstrap, tmp_path) as processes:
        for command in (("planner",), ("stage", "cloud", "--model", "lenet")):
            ended = processes.run(*command)
            assert ended.returncode == 2, ended.stderr
            for said in (
                "deepar.decisions has cleanup.policy=compact, required is delete",
                "deepar.tasks has retention.ms=60000, required is 604800000 or more",
                "deepar.tasks has max.message.bytes=5000",
                "deepar.results has compression.type=lz4, required is one of producer",
                "deepar.tasks has partitions=1, required is 2",
                "deepar topics repair",
                f"kafka-configs.sh --bootstrap-server {kafka_own.bootstrap} --alter",
                "--entity-name deepar.decisions --add-config cleanup.policy=delete",
            ):
                assert said in ended.stderr, ended.stderr
            assert "Traceback" not in ended.stderr
        checks = [check for check in await examine(connection, []) if check.name == "topics" and not check.ok]
        assert {check.detail.split()[0] for check in checks} == {
            topics.NODES, topics.TASKS, topics.DECISIONS, topics.SNAPSHOTS, topics.RESULTS
        }  # fmt: skip
        assert all(check.remedy.startswith("deepar topics repair, or: kafka-") for check in checks)
        repaired = processes.run("topics", "repair")
        assert repaired.returncode == 0, repaired.stderr
        assert "deepar.decisions  cleanup.policy=delete (was compact)" in repaired.stdout
        again = processes.run("topics", "repair")
        assert "all topics have the required settings" in again.stdout, again.stdout + again.stderr
    async with KafkaBus(connection) as bus:
        await wiring.require_region(bus, 1)
        (snapshots,) = await bus.found_topics([topics.SNAPSHOTS])
    assert snapshots.partitions == 2
    checks = [check for check in await examine(connection, []) if check.name in ("topics", "sizes")]
    assert [check.state for check in checks] == ["ok"] * len(checks), checks


async def test_a_record_of_a_machine_whose_clock_is_days_ahead_is_taken(kafka: Broker) -> None:
    async with KafkaBus(KafkaConnection(bootstrap_servers=kafka.bootstrap)) as bus:
        topic = f"ahead-{uuid.uuid4().hex[:8]}"
        await bus.create_topics([TopicSpec(topic, 1)])
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap)
    await producer.start()
    try:
        tomorrow_ms = int((time.time() + 3 * 86400) * 1000)
        assert (await producer.send_and_wait(topic, b"x", timestamp_ms=tomorrow_ms)).offset == 0
    finally:
        await producer.stop()


async def test_every_command_names_an_advertised_address_that_does_not_resolve(tmp_path: Path) -> None:
    if choose().how != "apache":
        pytest.skip(f"an Apache Kafka of our own is needed: {choose().text}")
    port = free_port()
    broker = KafkaBroker(
        tmp_path / "kafka",
        BrokerOptions(port=port, settings={"advertised.listeners": "CLIENTS://kafka.inside.invalid:9092"}),
        ready=partial(_answers, f"127.0.0.1:{port}"),
    )
    broker.start()
    try:
        with Processes(broker.bootstrap, tmp_path) as processes:
            for command in (("planner",), ("topics", "create"), ("tail", "nodes", "--exit"), ("top", "--json")):
                ended = await asyncio.to_thread(processes.run, *command)
                assert ended.returncode == 1, ended.stderr
                assert f"{broker.bootstrap} answers but advertises kafka.inside.invalid:9092" in ended.stderr
                assert "set advertised.listeners" in ended.stderr
                assert "never retrieved" not in ended.stderr
                assert len(ended.stderr.splitlines()) == 2, ended.stderr
        checks = await examine(KafkaConnection(bootstrap_servers=broker.bootstrap), [])
        (wrong,) = (check for check in checks if check.name == "broker")
        assert not wrong.ok
        assert "kafka.inside.invalid:9092" in wrong.detail
    finally:
        broker.stop()


def _answers(bootstrap: str) -> None:
    ask(bootstrap, 1.0)


async def test_a_record_that_the_broker_refuses_is_told_with_its_topics_own_limit(kafka: Broker) -> None:
    topic = f"small-{uuid.uuid4().hex[:8]}"
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1, topic_configs={"max.message.bytes": "100000"})])
    await admin.close()
    async with KafkaBus(KafkaConnection(bootstrap_servers=kafka.bootstrap)) as bus:
        with pytest.raises(
            MessageTooLargeError, match=r"a record of 130,\d+ bytes is over the limit of 100,000"
        ) as refused:
            await bus.send(topic, bytes(130_000))
        assert refused.value.limit_bytes == 100_000
        assert (await bus.send(topic, bytes(90_000))).offset == 0
