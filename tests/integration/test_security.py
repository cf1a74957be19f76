"""Apache Kafka with users, TLS and the lists of `deepar acls`: everything works, and what is not allowed is refused."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from bus import messages, topics
from bus.errors import BusError, BusUnavailableError, UnknownTopicError
from bus.frames import Frame, encode_frame
from bus.identity.keys import IDENTITY_HEADER, PROOF_HEADER, Master, Speaker, write_secret
from bus.identity.signed_bus import signed
from bus.kafka.bus import KafkaBus
from bus.messages import NodeAnnounced, NodeHeartbeat, NodeLeft, TaskFailed, TaskSubmitted
from bus.port import Bus
from bus.values import Role
from deploy.generated_docs import acls
from deploy.services import wiring
from loadgen.replay.replay import replay
from loadgen.replay.schedule import Entry, Schedule
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.runner import ModelledRunner
from tests.integration.deepar_processes import Processes
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
    "d2": "device",
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
            await wiring.create_missing_topics(bus, EDGES)

    asyncio.run(prepare())
    yield one
    one.broker.stop()
    gc.collect()  # warns of sockets that were cut off here, where that is expected, and not in another module


@asynccontextmanager
async def region(secure: SecureBroker, master: Master | None = None) -> AsyncIterator[Callable[[str], Bus]]:
    """A planner and everybody else, each as a user of its own and, with a `master`, with a key of its own; all have joined.

    Gives the bus of `device:d1`, or of whom else, as that user and with that key.
    """
    cast = [
        NodeSettings(name="c1", role=Role.CLOUD),
        *(
            NodeSettings(name=name, role=Role.EDGE, slots=2, link1_capacity_bps=10**8, link2_capacity_bps=5 * 10**7)
            for name in EDGES
        ),
        NodeSettings(name="d1", role=Role.DEVICE),
        NodeSettings(name="d2", role=Role.DEVICE),
    ]
    async with AsyncExitStack() as stack:
        buses: dict[str, Bus] = {}
        for speaker in (*(f"{settings.role.value}:{settings.name}" for settings in cast), "loadgen:loadgen"):
            bus = await stack.enter_async_context(KafkaBus(secure.connection(speaker.partition(":")[2])))
            buses[speaker] = signed(bus, None if master is None else master.key(Speaker.parse(speaker)))
        planner = await stack.enter_async_context(KafkaBus(secure.connection("planner")))
        # Activations go to an edge, from there to the cloud, and results come back: every topic is used.
        setup = wiring.PlannerSetup(policy="cloud-only", master=master, trust_everybody=master is None)
        service = wiring.make_planner(planner, setup)
        group = await stack.enter_async_context(wiring.embedded())
        group.create_task(service.run())
        played = []
        for settings in cast:
            bus_of_node = buses[f"{settings.role.value}:{settings.name}"]
            played.append(Node(bus_of_node, settings, ModelledRunner([profile(settings.role)])))
            group.create_task(played[-1].run(wiring.make_work(played[-1])))
        async with asyncio.timeout(60.0):
            while not all(node.status.joined for node in played):
                await asyncio.sleep(0.05)
        yield buses.__getitem__


async def test_the_whole_pipeline_works_each_as_a_user_of_its_own(secure: SecureBroker) -> None:
    async with region(secure) as bus_of:
        entries = tuple(Entry(at_s=0.1 * number, task=task(number, samples=4)) for number in range(6))
        result = await replay(bus_of("loadgen:loadgen"), Schedule(entries=entries), drain_timeout_s=60.0)
        assert [outcome.state for outcome in result.outcomes] == ["COMPLETED"] * len(entries)


async def test_what_a_device_says_as_another_is_refused_and_seen(secure: SecureBroker) -> None:
    """The whole pipeline where proofs are demanded, of frames too, while d1's user speaks as d2 with all that it has, and
    e2's shows d1 results in e1's name.
    """
    master = Master.new(frames=True)
    forged: list[tuple[str, NodeLeft | NodeAnnounced | NodeHeartbeat | TaskSubmitted | TaskFailed, str]] = [
        (topics.NODES, NodeLeft(node="d2", incarnation="x"), "d2"),
        (topics.NODES, NodeAnnounced(node="d2", role=Role.DEVICE, incarnation="x"), "d2"),
        (topics.EVENTS, NodeHeartbeat(node="d2", incarnation="x"), "d2"),
        (topics.TASKS, task(999, "d2"), "t999"),
        *(
            (topics.EVENTS, TaskFailed(task_id=f"t{n}", attempt=1, node="d2", cause="x"), f"t{n}")
            for n in range(100, 104)
        ),
    ]
    async with region(secure, master) as bus_of:
        entries = tuple(Entry(at_s=0.2 * n, task=task(100 + n, f"d{n % 2 + 1}", samples=4)) for n in range(4))
        load = bus_of("loadgen:loadgen")
        replaying = asyncio.create_task(replay(load, Schedule(entries=entries), drain_timeout_s=60.0))
        for topic, message, key in forged:
            await bus_of("device:d1").send(topic, messages.encode(message), key=key, partition=0)
            await asyncio.sleep(0.1)
        # and once more without its own proof, under d2's name
        stolen = ((IDENTITY_HEADER, b"device:d2"), (PROOF_HEADER, b"0" * 64))
        async with KafkaBus(secure.connection("d1")) as plain:
            await plain.send(topics.NODES, messages.encode(forged[0][1]), key="d2", partition=0, headers=stolen)
        async with KafkaBus(secure.connection("e2")) as plain:
            result_of_e1 = encode_frame(Frame("result", "t100", 1, "e1"))
            for headers in ((), ((IDENTITY_HEADER, b"edge:e1"), stolen[1])):
                await plain.send(topics.RESULTS, result_of_e1, key="d1", headers=headers)
        result = await replaying
        assert [outcome.state for outcome in result.outcomes] == ["COMPLETED"] * len(entries)
        reader = await load.reader([(topics.DECISIONS, 0)], start="start")
        said = b""
        while await reader.lag():
            said += b"".join(record.value or b"" for record in await reader.fetch())
        await reader.close()
        assert b"t999" not in said
        assert f'"identity":"{master.fingerprint}"'.encode() in said
    listed = await asyncio.to_thread(_deepar, secure.environment("anna"), "dead-letter", "list", "--json")
    refused = [letter for letter in json.loads(listed.stdout)["letters"] if letter["cause"] == "wrong_identity"]
    letters = [letter for letter in refused if "d2" in letter["error"]]  # others: heartbeats of before the demand
    # Topics are read side by side, so only within each is there an order.
    assert Counter(letter["error"] for letter in letters) == Counter(
        [
            *(f"device:d1 speaks as d2 in a {message.type}" for _, message, _ in forged),
            "the proof is not that of device:d2",
        ]
    )
    assert [(letter["topic"], letter["error"]) for letter in refused if letter["by"] == "d1"] == [
        (topics.RESULTS, "no header deepar_identity: the record is not signed"),
        (topics.RESULTS, "the proof is not that of edge:e1"),
    ]
    assert all(letter["by"] == "planner" and letter["size_bytes"] for letter in letters)
    assert {letter["topic"] for letter in letters} == {topics.NODES, topics.EVENTS, topics.TASKS}


UP = """
models = ["lenet"]
[bus]
kind = "kafka"
[[cloud]]
name = "c1"
[[edge]]
name = "e1"
[[edge]]
name = "e2"
[[device]]
name = "d1"
""".replace("name", 'runner = "modelled"\nprofile = "paper"\nname')


def test_commands_prove_who_they_are_and_tell_nobody_how(secure: SecureBroker, tmp_path: Path) -> None:
    """`deepar up` with the master, a device and a load generator with keys, as processes, at debug. One that has no key, and
    one whose key is of another master, end by themselves and say what they lack.
    """
    (tmp_path / "up.toml").write_text(UP, encoding="ascii")
    master = Master.new()
    keys = {name: master.key(Speaker.parse(name)) for name in ("device:d2", "loadgen:x")}
    keys["other"] = Master.new().key(Speaker("device", "d1"))
    write_secret(tmp_path / "master", master.to_text())
    for name, key in keys.items():
        write_secret(tmp_path / name, key.to_text())
    debug = ("--log-level", "debug")
    stage = ["stage", "device", "--model", "lenet", "--runner", "modelled", "--profile", "paper"]
    with Processes(secure.bootstrap, tmp_path) as processes:
        up = processes.start(
            "up", *debug, "up", "up.toml", "--identity-master", "master", environment=secure.environment("admin")
        )
        proving = {"DEEPAR_IDENTITY_KEY_FILE": "device:d2"}
        d2 = processes.start("d2", *debug, *stage, "--name", "d2", environment=secure.environment("d2") | proving)
        until_s = time.monotonic() + 90.0
        while not (d2.ready() or {}).get("joined"):
            assert time.monotonic() < until_s, up.text() + d2.text()
            time.sleep(0.1)
        processes.environment |= secure.environment("loadgen")
        replay = ["loadgen", "replay", "--devices", "d1,d2", "--tasks", "4", "--within", "1s", "--json"]
        done = processes.run(*debug, *replay, "--identity-key", "loadgen:x")
        assert json.loads(done.stdout)["completed"] == 4, done.stderr + up.text() + d2.text()
        said = done.stdout + done.stderr
        processes.environment |= secure.environment("d1")
        for more, lacks in (
            ((), "device d1 has no key"),
            (("--identity-key", "other"), f"{master.fingerprint}, and that of device:d1 is of"),
        ):
            done = processes.run(*debug, *stage, *more)
            assert done.returncode == 2, done.stderr
            assert lacks in done.stderr
            assert "DEEPAR_IDENTITY_KEY_FILE" in done.stderr
            said += done.stdout + done.stderr
        said += up.text() + d2.text()
    for secret in (master.to_text().split()[1], *(key.secret.hex() for key in keys.values())):
        assert secret not in said


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
        assert "may exist but be hidden" in str(caught.value.remedy)
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
        await wiring.create_missing_topics(bus, ["e10"])
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
        ("password", "rejected the password of user d1"),
        ("authority", "was rejected: "),
        ("no TLS", "closed the PLAINTEXT connection|sends nothing"),
        ("TLS without a password", "closed the|refused the connection|sends nothing|does not answer"),
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
    assert "rejected the password of user anna" in done.stderr
    assert "planted-0xC0FFEE" not in done.stdout + done.stderr


def test_the_command_sets_lists(secure: SecureBroker) -> None:
    done = _deepar(secure.environment("admin"), "acls", "--edge", "e3", "--user", "e3=edge:e3", "--apply", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["applied"] == len(told["users"]["e3"]) == 17  # each of eight topics twice: use, settings; and its group
    refused = _deepar(secure.environment("anna"), "acls", "--edge", "e3", "--user", "e3=edge:e3", "--apply")
    assert refused.returncode == 1
    assert "rejected the access control lists" in refused.stderr


def test_the_doctor_says_what_its_user_may_not_see(secure: SecureBroker) -> None:
    done = _deepar(secure.environment("anna"), "doctor", "--json")
    assert done.stdout, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["broker"]["ok"], done.stderr
    assert checks["sizes"]["ok"]
    assert "this user lacks the permission DescribeConfigs: " in checks["sizes"]["detail"]
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
