"""The compose file, run for real: images built, services healthy, records kept over kills, a quick and clean end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from deploy.kafka_local.handshake import ask
from deploy.kafka_local.ports import free_port
from tests import compose_engine
from tests.compose_engine import COMPOSE_FILE, Engine, NoEngineError
from tests.integration.topic_ends import held_by_site, topic_ends

DOWN_LIMIT_S = 15.0
KILLED = 137
"""The exit code of what SIGKILL ended."""
CLUSTER_FILE = COMPOSE_FILE.with_name("docker-compose.cluster.yml")
SITES_FILE = COMPOSE_FILE.with_name("docker-compose.sites.yml")
TASKS = 20
SERVICES = ("broker", "planner", "cloud", "e1", "e2", "d1", "d2", "d3")
ARRIVALS_S = 50
HEALTHY_S = 240.0
"""What a service that was killed may take to be healthy again."""
MORE = ("--scale", "device=2")
"""Devices beside those that are named."""


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A Docker engine with Compose. If it is missing, the test is skipped, or fails with DEEPAR_TEST_DOCKER=required."""
    capture = request.config.pluginmanager.get_plugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            print(f"\ndocker: {line}", file=sys.stderr, flush=True)

    try:
        started = compose_engine.start(say)
    except NoEngineError as error:
        if compose_engine.required():
            pytest.fail(f"DEEPAR_TEST_DOCKER=required, but: {error}", pytrace=False)
        pytest.skip(f"{error} (DEEPAR_TEST_DOCKER=required installs what is missing)")
    yield started
    started.stop()


class Deployment:
    """Compose files as a project of its own, with a broker port of its own."""

    def __init__(self, engine: Engine, *files: Path) -> None:
        self.engine = engine
        self.files = files or (COMPOSE_FILE,)
        self.port = free_port()
        self.env = {
            "COMPOSE_PROJECT_NAME": f"deepar-test-{os.getpid()}",
            "DEEPAR_KAFKA_PORT": str(self.port),
            "DEEPAR_MODELS": "lenet",  # AlexNet's weights would take each container a minute
            "COMPOSE_PROFILES": "devices",
            **compose_engine.base_images(engine),
        }

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __call__(self, *words: str, limit_s: float = 600, check: bool = True) -> str:
        """Output of `docker compose WORDS`."""
        return self.engine.compose(*words, files=self.files, env=self.env, limit_s=limit_s, check=check)

    def container(self, service: str) -> dict[str, Any]:
        """What `docker inspect` says of a service's container."""
        name = self("ps", "--all", "--quiet", service).split()[-1]
        found: list[dict[str, Any]] = json.loads(self.engine.docker("inspect", name))
        return found[0]

    def await_healthy(self, service: str, limit_s: float = HEALTHY_S) -> None:
        """Return once a service's health check says so."""
        name = self.container(service)["Id"]
        deadline = time.monotonic() + limit_s
        while (state := self.engine.docker("inspect", "-f", "{{.State.Health.Status}}", name).strip()) != "healthy":
            assert time.monotonic() < deadline, f"{service} is {state} {limit_s:.0f} s after its kill"
            time.sleep(0.5)

    def end(self) -> None:
        """Asks every service to end, in the time that the file gives, and removes everything: `docker compose down`, with a
        look in between. Raises AssertionError where one did not heed it, or all of it took too long.
        """
        started_s = time.monotonic()
        self("stop", limit_s=300)
        stopped_s = time.monotonic()
        containers = json.loads(self.engine.docker("inspect", *self("ps", "--all", "--quiet").split()))
        codes = {one["Config"]["Labels"]["com.docker.compose.service"]: one["State"]["ExitCode"] for one in containers}
        assert KILLED not in codes.values(), codes
        looked_s = time.monotonic()
        self.down()
        took_s = time.monotonic() - looked_s + stopped_s - started_s
        print(f"down in {took_s:.1f} s")
        assert took_s < DOWN_LIMIT_S, codes
        assert not self("ps", "--all", "--quiet").strip()

    def down(self) -> None:
        """Removes everything."""
        self("down", "--volumes", "--remove-orphans", limit_s=120)


@pytest.fixture
def deployment(engine: Engine) -> Iterator[Deployment]:
    """A deployment that is not up yet, and is gone after the test."""
    one = Deployment(engine)
    yield one
    one.down()


@pytest.fixture
def two_sites(engine: Engine) -> Iterator[Deployment]:
    """The file of two sites, not up yet, and gone after the test."""
    one = Deployment(engine, SITES_FILE)
    one.env |= {"DEEPAR_EDGE_KAFKA_PORT": str(free_port()), "DEEPAR_POLICY": "cloud-only"}
    yield one
    one.down()


@pytest.fixture
def three_brokers(engine: Engine) -> Iterator[Deployment]:
    """The files of three brokers, not up yet, and gone after the test."""
    one = Deployment(engine, COMPOSE_FILE, CLUSTER_FILE)
    one.env |= {f"DEEPAR_KAFKA_PORT{number}": str(free_port()) for number in (2, 3)} | {"COMPOSE_PROFILES": ""}
    yield one
    one.down()


def _services(engine: Engine, file: Path = COMPOSE_FILE) -> dict[str, dict[str, Any]]:
    said = engine.compose("config", "--format", "json", files=(file,))
    services: dict[str, dict[str, Any]] = json.loads(said[said.index("{") :])["services"]
    return services


def test_every_service_is_confined(engine: Engine) -> None:
    """Read-only, without capabilities or new privileges, bounded in memory and processes, ended gently."""
    for name, service in [*_services(engine).items(), *_services(engine, SITES_FILE).items()]:
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["mem_limit"]) <= 1 << 30, name
        assert 0 < service["pids_limit"] <= 512, name
        assert not service.get("privileged"), name
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", f"{name}: a port without a password is open to others"


def test_every_service_waits_for_what_it_needs(engine: Engine) -> None:
    """Long-running services have a health check; nothing starts before what it depends on is healthy or done."""
    files = {COMPOSE_FILE: {"e2", "d2", "d3"}, SITES_FILE: {"edge-broker"}}
    for file, more in files.items():
        services = _services(engine, file)
        assert set(services) == {"broker", "topics", "planner", "cloud", "e1", "d1"} | more
        for name, service in services.items():
            assert ("healthcheck" in service) is (name != "topics"), name
            assert ("depends_on" in service) is ("broker" not in name), name
            for needed, how in service.get("depends_on", {}).items():
                done = "service_completed_successfully" if needed == "topics" else "service_healthy"
                assert how["condition"] == done, f"{name} on {needed}"


def test_a_whole_deployment_survives_the_kill_of_each_service(deployment: Deployment, tmp_path: Path) -> None:
    """Everything healthy; each service killed while twenty tasks run; every one of them completes; a quick, clean end."""
    deployment("up", "--build", "--wait", *MORE, limit_s=900)
    assert len(deployment("ps", "--quiet", "device").split()) == 2
    devices = _devices(deployment)
    assert devices >= {"d1", "d2", "d3"}
    assert len(devices) == 5, devices
    for service in SERVICES:
        inspected = deployment.container(service)
        assert inspected["State"]["Health"]["Status"] == "healthy", service
        assert inspected["Config"]["User"] == "10001:10001", service

    with _replaying(deployment, tmp_path) as replay:
        _await_first_task(deployment)
        for service in SERVICES:
            name = deployment.container(service)["Id"]
            deployment.engine.docker("kill", name)  # Docker starts no container again that a person killed: we do
            deployment.engine.docker("start", name)
            deployment.await_healthy(service)
        said, errors = replay.communicate(timeout=240)
    assert replay.returncode == 0, errors
    summary = json.loads(said)
    # The replay tries to submit for longer than a service may take to come back: so every task was accepted, and is done.
    assert summary["submitted"] == TASKS, summary
    assert summary["completed"] == TASKS, summary

    deployment("up", "--wait", *MORE, limit_s=180)  # all of them came back
    deployment("up", "--wait", "--scale", "device=0", limit_s=60)
    assert not deployment("ps", "--quiet", "device").strip()
    deployment.end()


def _replaying(deployment: Deployment, folder: Path) -> subprocess.Popen[str]:
    """`deepar loadgen replay` on the host, over the port that the compose file opens."""
    command = ["loadgen", "replay", "--tasks", str(TASKS), "--within", f"{ARRIVALS_S}s"]
    command += ["--submit-timeout", f"{HEALTHY_S + 60:g}s"]
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", *command, "--samples", "10", "--out", str(folder), "--json"],
        env={**os.environ, "KAFKA_BOOTSTRAP_SERVERS": deployment.bootstrap},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _devices(deployment: Deployment) -> set[str]:
    """The names under which devices have announced themselves."""
    command = [sys.executable, "-m", "deploy.cli", "tail", "nodes", "--offset", "start", "--exit", "--json"]
    said = compose_engine.run(command, env={"KAFKA_BOOTSTRAP_SERVERS": deployment.bootstrap}, limit_s=60)
    values = [json.loads(line)["value"] for line in said.splitlines() if line.startswith("{")]
    return {value["node"] for value in values if value.get("role") == "device"}


def _await_first_task(deployment: Deployment) -> None:
    """Return once a task of the replay has been submitted."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        command = [
            sys.executable,
            "-m",
            "deploy.cli",
            "tail",
            "tasks",
            "--offset",
            "start",
            "--exit",
            "-n",
            "1",
            "--json",
        ]
        if compose_engine.run(command, env={"KAFKA_BOOTSTRAP_SERVERS": deployment.bootstrap}, limit_s=60).strip():
            return
    raise AssertionError("the replay did not submit a task within a minute")


def test_profiles_and_the_cluster_are_valid(engine: Engine) -> None:
    """Files with foreign images, which cannot be pulled everywhere: Compose accepts them, what they mount is there."""
    everything = {"COMPOSE_PROFILES": "console,metrics,devices"}
    said = engine.compose("config", "--format", "json", env=everything)
    services = json.loads(said[said.index("{") :])["services"]
    assert {"console", "prometheus", "grafana", "device"} <= set(services)
    for name in ("console", "prometheus", "grafana"):
        assert services[name]["read_only"], name
        assert all(port["host_ip"] == "127.0.0.1" for port in services[name]["ports"]), name
        binds = [volume["source"] for volume in services[name]["volumes"] if volume["type"] == "bind"]
        assert binds, name
        assert all(Path(source).exists() for source in binds), binds

    said = engine.compose("config", "--format", "json", files=(COMPOSE_FILE, CLUSTER_FILE))
    services = json.loads(said[said.index("{") :])["services"]
    brokers = [services[name] for name in ("broker", "broker2", "broker3")]
    assert len({broker["environment"]["KAFKA_NODE_ID"] for broker in brokers}) == 3
    assert len({broker["environment"]["KAFKA_CLUSTER_ID"] for broker in brokers}) == 1
    assert len({port["published"] for broker in brokers for port in broker["ports"]}) == 3
    for name in ("topics", *SERVICES[1:]):
        assert services[name]["environment"]["KAFKA_BOOTSTRAP_SERVERS"].count(":29092") == 3, name


def test_the_services_of_two_sites_share_no_network_but_at_the_brokers(engine: Engine) -> None:
    networks = {name: set(service["networks"]) for name, service in _services(engine, SITES_FILE).items()}
    assert networks == {
        "broker": {"edge", "cloud"},
        "edge-broker": {"edge", "cloud"},
        **{name: {"cloud"} for name in ("topics", "planner", "cloud")},
        **{name: {"edge"} for name in ("e1", "d1")},
    }


def test_two_sites_work_together_over_their_brokers(two_sites: Deployment, tmp_path: Path) -> None:
    """Tasks go from the device over its site's broker to the edge, over the other's to the cloud, and results back."""
    two_sites("up", "--build", "--wait", limit_s=900)
    for here, there in (("d1", "planner"), ("cloud", "e1")):
        script = f"import socket; socket.create_connection(({there!r}, 9464), 2)"
        said = two_sites("exec", "-T", here, "python3", "-c", script, check=False)
        assert "gaierror" in said, f"{here} must not even know the name of {there}: {said}"
    _complete_tasks(two_sites, tmp_path, tasks=3)
    edge_port = two_sites.env["DEEPAR_EDGE_KAFKA_PORT"]
    edge = asyncio.run(topic_ends(f"127.0.0.1:{edge_port}", ["e1"]))
    held_by_site(edge, asyncio.run(topic_ends(two_sites.bootstrap, ["e1"])), "e1")
    two_sites.end()


def test_of_three_brokers_one_may_be_killed(three_brokers: Deployment, tmp_path: Path) -> None:
    """The cluster's file for real: work goes on with two, also before they have noticed."""
    three_brokers(
        "up", "--build", "--wait", "broker", "broker2", "broker3", "planner", "cloud", "e1", "d1", limit_s=900
    )
    three_brokers("kill", "broker2")
    _complete_tasks(three_brokers, tmp_path, tasks=3)
    three_brokers.down()  # not judged: what is left of the quorum may wait for it until its grace is over


def _complete_tasks(deployment: Deployment, folder: Path, *, tasks: int) -> None:
    """Send a few tasks; every one is done."""
    command = ["loadgen", "replay", "--tasks", str(tasks), "--within", "1s", "--samples", "10", "--out", str(folder)]
    said = compose_engine.run(
        [sys.executable, "-m", "deploy.cli", *command],
        env={"KAFKA_BOOTSTRAP_SERVERS": deployment.bootstrap},
        limit_s=300,  # it ends a hang and judges no speed: on an overloaded machine a failover has taken 100 s
    )
    assert json.loads((folder / "summary.json").read_text())["completed"] == tasks, said


async def test_the_broker_serves_both_sides_and_keeps_its_records(deployment: Deployment) -> None:
    deployment("up", "--build", "--wait", "broker", limit_s=900)
    reply = ask(deployment.bootstrap)
    assert (reply.advertised, reply.is_kraft) == (deployment.bootstrap, True)
    container = deployment.container("broker")
    assert container["Config"]["User"] == "10001:10001"

    admin = AIOKafkaAdminClient(bootstrap_servers=deployment.bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic("kept", num_partitions=1, replication_factor=1)])
    await admin.close()
    assert await _append(deployment.bootstrap) == 0

    # From inside, clients are sent to the inner listener.
    inner = _metadata_over("29092", deployment)
    assert inner == "broker:29092"

    deployment("kill", "--signal", "SIGKILL", "broker")
    deployment("up", "--wait", "broker", limit_s=120)
    assert await _append(deployment.bootstrap) == 1
    deployment.end()


async def _append(bootstrap: str) -> int:
    """Appends one record; its offset, which counts the records that were there."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all")
    await producer.start()
    try:
        return int((await producer.send_and_wait("kept", b"x")).offset)
    finally:
        await producer.stop()


def _metadata_over(port: str, deployment: Deployment) -> str:
    """The address that the broker advertises on one of its listeners, asked from within its container."""
    script = (
        f"exec 3<>/dev/tcp/127.0.0.1/{port}; "
        r"printf '\0\0\0\24\0\3\0\1\0\0\0\3\0\6deepar\0\0\0\0' >&3; timeout 3 head -c 32 <&3 | od -An -v -tx1 -w99"
    )
    reply = bytes.fromhex(deployment("exec", "-T", "broker", "bash", "-c", script))
    at = 4 + 4 + 4 + 4  # length, correlation, count of brokers, node id
    size = int.from_bytes(reply[at : at + 2], "big")
    host = reply[at + 2 : at + 2 + size]
    return f"{host.decode()}:{int.from_bytes(reply[at + 2 + size : at + 6 + size], 'big')}"


def test_the_compose_file_names_the_settings_that_the_launcher_uses() -> None:
    """One settings file: the image copies it, the launcher reads it."""
    assert "COPY server.properties" in (Path(COMPOSE_FILE).parent / "kafka" / "Dockerfile").read_text()
    assert "./server.properties" not in COMPOSE_FILE.read_text()
