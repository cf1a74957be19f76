"""Apache Kafka with users, TLS and the lists of `deepar acls`: everything works, and what is not allowed is refused."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from bus import topics
from bus.errors import BusError, BusUnavailableError, UnknownTopicError
from bus.kafka import KafkaBus
from bus.values import Role
from deploy import acls, nodes
from loadgen.replay import replay
from loadgen.schedule import Entry, Schedule
from stages.node import Node, NodeSettings
from stages.runner import ModelledRunner
from tests.kafka_broker import apache_required, choose
from tests.secure_kafka import SecureBroker, make_authority
from tests.sim.world import profile, task

# Where the machine is so busy that a request of aiokafka is cut off, its socket is closed by the collector, which says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

EDGES = ("e1", "e2")
USERS = {
    "maker": "admin",
    "planner": "planner",
    "c1": "cloud",
    "e1": "edge:e1",
    "e2": "edge:e2",
    "d1": "device",
    "loadgen": "loadgen",
    "anna": "tools",
}
NAMED_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    """A broker with users; their lists are set and the topics created."""
    if choose().how != "apache":
        message = f"a broker with users cannot be started here: {choose().text}"
        pytest.fail(message) if apache_required() else pytest.skip(message)
    one = SecureBroker(tmp_path_factory.mktemp("secure"), list(USERS))
    one.broker.start()

    async def prepare() -> None:
        granted = acls.for_users(USERS, EDGES)
        assert await acls.apply(one.connection("admin"), granted) == sum(map(len, granted.values()))
        async with KafkaBus(one.connection("maker")) as bus:  # the role admin is enough to create them
            await nodes.create_missing_topics(bus, EDGES)

    asyncio.run(prepare())
    yield one
    one.broker.stop()


async def test_the_whole_pipeline_works_each_as_a_user_of_its_own(secure: SecureBroker) -> None:
    async with AsyncExitStack() as stack:

        async def bus_of(user: str) -> KafkaBus:
            return await stack.enter_async_context(KafkaBus(secure.connection(user)))

        cast = [
            NodeSettings(name="c1", role=Role.CLOUD),
            *(
                NodeSettings(name=name, role=Role.EDGE, slots=2, link1_capacity_bps=10**8, link2_capacity_bps=5 * 10**7)
                for name in EDGES
            ),
            NodeSettings(name="d1", role=Role.DEVICE),
        ]
        buses = {settings.name: await bus_of(settings.name) for settings in cast}
        # Activations go to an edge, from there to the cloud, and results come back: every topic is used.
        service = nodes.make_planner(await bus_of("planner"), policy="cloud-only")
        load = await bus_of("loadgen")
        group = await stack.enter_async_context(nodes.embedded())
        group.create_task(service.run())
        played = [Node(buses[settings.name], settings, ModelledRunner([profile(settings.role)])) for settings in cast]
        for node in played:
            group.create_task(node.run(nodes.make_work(node)))
        async with asyncio.timeout(60.0):
            while not all(node.status.joined for node in played):
                await asyncio.sleep(0.05)
        entries = tuple(Entry(at_s=0.1 * number, task=task(number, samples=4)) for number in range(6))
        result = await replay(load, Schedule(entries=entries), drain_timeout_s=60.0)
        assert [outcome.state for outcome in result.outcomes] == ["COMPLETED"] * len(entries)


async def test_a_device_cannot_write_decisions(secure: SecureBroker) -> None:
    async with KafkaBus(secure.connection("d1")) as bus:
        with pytest.raises(BusError, match=r"not allowed on deepar\.decisions") as caught:
            await bus.send(topics.DECISIONS, b"{}", key="0", partition=0)
    assert "deepar acls" in str(caught.value.remedy)
    assert "Principal = User:d1 is Denied operation = WRITE" in secure.broker.log_tail(60)


async def test_a_device_cannot_read_what_it_sends_to_an_edge(secure: SecureBroker) -> None:
    """It may write there, so it can see the topic, and nothing in it."""
    async with KafkaBus(secure.connection("d1")) as bus:
        reader = await bus.reader([(topics.activations_topic("e1"), 0)], start="start")
        with pytest.raises(BusError, match=r"not allowed on deepar\.activations\.e1"):
            await reader.fetch(timeout_s=5.0)


async def test_an_edge_neither_sees_nor_joins_another(secure: SecureBroker) -> None:
    async with KafkaBus(secure.connection("e2")) as bus:
        with pytest.raises(UnknownTopicError) as caught:
            await bus.reader([(topics.activations_topic("e1"), 0)], start="start")
        assert "may not be ours to see" in str(caught.value.remedy)
        with pytest.raises(BusError, match="not allowed"):
            await _join(bus, acls.edge_group("e1"))


async def _join(bus: KafkaBus, group: str) -> None:
    member = await bus.join([topics.activations_topic("e2")], group=group)
    async with asyncio.timeout(10.0):
        while True:
            await member.fetch(timeout_s=0.5)


async def test_a_name_that_begins_like_another_opens_nothing(secure: SecureBroker) -> None:
    """`e1` has its own topic; `e10`, which begins alike, is not seen by it."""
    async with KafkaBus(secure.connection("admin")) as bus:
        await nodes.create_missing_topics(bus, ["e10"])
    async with KafkaBus(secure.connection("e1")) as bus:
        assert await bus.partitions(topics.activations_topic("e1")) == 1
        with pytest.raises(UnknownTopicError):
            await bus.partitions(topics.activations_topic("e10"))


async def test_a_load_generator_cannot_decide_and_tools_only_read(secure: SecureBroker) -> None:
    async with KafkaBus(secure.connection("loadgen")) as bus:
        with pytest.raises(BusError, match=r"not allowed on deepar\.decisions"):
            await bus.send(topics.DECISIONS, b"{}", key="0", partition=0)
    async with KafkaBus(secure.connection("anna")) as bus:
        await bus.reader([(topics.DECISIONS, 0), (topics.DEAD_LETTER, 0)], start="start")
        with pytest.raises(UnknownTopicError):
            await bus.reader([(topics.RESULTS, 0)], start="start")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("password", "refuses the password of user d1"),
        ("authority", "is not accepted: "),
        ("no TLS", "hangs up on PLAINTEXT|says nothing"),
        ("TLS without a password", "hangs up|refuses us|says nothing|does not answer"),
    ],
)
async def test_what_is_wrong_is_named_within_five_seconds(
    secure: SecureBroker, tmp_path: Path, wrong: str, said: str
) -> None:
    environment = secure.environment("d1")
    planted = "planted-0xC0FFEE"
    match wrong:
        case "password":
            file = tmp_path / "password"
            file.write_text(planted, encoding="ascii")
            environment["KAFKA_SASL_PASSWORD_FILE"] = str(file)
        case "authority":
            environment["KAFKA_SSL_CAFILE"] = str(make_authority(tmp_path))
        case "no TLS":
            environment["KAFKA_SECURITY_PROTOCOL"] = "PLAINTEXT"
        case "TLS without a password":
            environment["KAFKA_SECURITY_PROTOCOL"] = "SSL"
    connection = type(secure.connection("d1")).from_env(environment)
    before_s = time.monotonic()
    with pytest.raises(BusUnavailableError, match=said) as caught:
        async with KafkaBus(connection) as bus:
            await bus.partitions(topics.DECISIONS)
    assert time.monotonic() - before_s < NAMED_WITHIN_S
    assert caught.value.remedy
    told = "".join(traceback.format_exception(caught.value)) + repr(connection)
    assert planted not in told
    assert secure.passwords["d1"] not in told


def test_no_password_is_in_what_a_command_says_at_debug(secure: SecureBroker, tmp_path: Path) -> None:
    for user in ("maker", "anna"):  # one that may, one that is refused
        done = _deepar(secure.environment(user), "--log-level", "debug", "topics", "create")
        assert done.returncode == (0 if user == "maker" else 1), done.stderr
        assert secure.passwords[user] not in done.stdout + done.stderr
        if user == "anna":
            assert "cannot be created" in done.stderr
    planted = tmp_path / "planted"
    planted.write_text("planted-0xC0FFEE\n", encoding="ascii")
    done = _deepar(
        secure.environment("anna") | {"KAFKA_SASL_PASSWORD_FILE": str(planted)},
        "--log-level",
        "debug",
        "topics",
        "create",
    )
    assert done.returncode == 1
    assert "refuses the password of user anna" in done.stderr
    assert "planted-0xC0FFEE" not in done.stdout + done.stderr


def test_the_command_sets_lists(secure: SecureBroker) -> None:
    done = _deepar(secure.environment("admin"), "acls", "--edge", "e3", "--user", "e3=edge:e3", "--apply", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["applied"] == len(told["users"]["e3"]) == 9
    refused = _deepar(secure.environment("anna"), "acls", "--edge", "e3", "--user", "e3=edge:e3", "--apply")
    assert refused.returncode == 1
    assert "refuses to set the lists" in refused.stderr


def test_the_doctor_says_what_its_user_may_not_see(secure: SecureBroker) -> None:
    done = _deepar(secure.environment("anna"), "doctor", "--json")
    assert done.stdout, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["broker"]["ok"], done.stderr
    assert checks["sizes"]["ok"]
    assert "this user may not (DescribeConfigs): " in checks["sizes"]["detail"]
    assert secure.passwords["anna"] not in done.stdout + done.stderr


def _deepar(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
