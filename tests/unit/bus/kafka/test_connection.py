"""Settings, routes, and the check before starting: each thing that can be wrong is named as what it is.

The peers here are small servers on loopback that behave as a broker, or something else, would.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bus.errors import BusUnavailableError, ConfigError
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.kafka.connection import CHECK_TIMEOUT_S

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def peer(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    talks: list[asyncio.Task[None]] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.append(task)
        try:
            await handler(reader, writer)
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in talks:
            task.cancel()
        if talks:
            await asyncio.wait(talks)
        for _ in range(10):  # transports close on the loop's next turns
            await asyncio.sleep(0)


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(-1)


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(4)


def broker_that(*advertised: str, serves_clients: bool = True, unlisted: int = 0) -> Handler:
    """Answers `ApiVersions` and `Metadata`, knows SCRAM, and refuses every password.

    It advertises the given addresses, or its own if none is given. The first `unlisted` answers list no broker at all.
    """
    left_out = iter(range(unlisted))

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = "{}:{}".format(*writer.get_extra_info("sockname")[:2])
        try:
            while True:
                (length,) = struct.unpack(">i", await reader.readexactly(4))
                request = await reader.readexactly(length)
                api, version, correlation = struct.unpack(">hhi", request[:8])
                if api == 18:  # ApiVersions v0: error, [key, min, max]
                    supported = [(0, 0, 8), (17, 0, 1), (18, 0, 0), (36, 0, 0)] + [(3, 0, 1)] * serves_clients
                    body = struct.pack(">hi", 0, len(supported)) + b"".join(
                        struct.pack(">hhh", *each) for each in supported
                    )
                elif api == 3:  # Metadata v1: [node, host, port, rack], controller, [topic]
                    named = advertised or (own,)
                    if next(left_out, None) is not None:
                        named = ()
                    body = struct.pack(">i", len(named))
                    for node, address in enumerate(named):
                        host, _, port = address.rpartition(":")
                        body += struct.pack(">i", node) + _string(host) + struct.pack(">ih", int(port), -1)
                    body += struct.pack(">ii", 0, 0)
                elif api == 17:  # SaslHandshake: error, [mechanism]
                    body = struct.pack(">hi", 0, 1) + _string("SCRAM-SHA-512")
                elif api == 36:  # SaslAuthenticate v0: error, message, bytes
                    body = struct.pack(">h", 58) + _string("Authentication failed") + struct.pack(">i", 0)
                else:
                    raise AssertionError(f"unexpected request {api} v{version}")
                answer = struct.pack(">i", correlation) + body
                writer.write(struct.pack(">i", len(answer)) + answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass

    return talk


broker = broker_that()


def _string(text: str) -> bytes:
    return struct.pack(">h", len(text)) + text.encode()


async def complaint(server: str, **settings: object) -> BusUnavailableError:
    """What entering the bus says."""
    connection = KafkaConnection.from_env({}, bootstrap_servers=server, **settings)
    begun = asyncio.get_running_loop().time()
    with pytest.raises(BusUnavailableError) as refused:
        await KafkaBus(connection).__aenter__()
    assert asyncio.get_running_loop().time() - begun < 3.5
    assert refused.value.remedy
    return refused.value


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1: file, key."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed, which makes the certificate of this test")
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def tls(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


# --- the check -------------------------------------------------------------------------------------------------------


async def test_a_broker_that_answers_passes() -> None:
    async with peer(broker) as server:
        await KafkaConnection(bootstrap_servers=server).check()


async def test_a_broker_that_is_not_listed_for_a_moment_passes() -> None:
    """A live broker that lacked CPU time missed its heartbeats: its cluster lists it again after the next one."""
    async with peer(broker_that(unlisted=2)) as server:
        await KafkaConnection(bootstrap_servers=server).check()


async def test_nobody_listens() -> None:
    async with peer(silent) as server:
        pass
    error = await complaint(server)
    assert f"no broker at {server}" in str(error)
    assert "deepar broker" in str(error.remedy)


async def test_one_of_several_is_enough() -> None:
    async with peer(silent) as closed:
        pass
    async with peer(broker) as server:
        await KafkaConnection(bootstrap_servers=f"{closed},{server}").check()


async def test_an_advertised_address_that_does_not_resolve_is_named() -> None:
    async with peer(broker_that("kafka-0.inside.invalid:9092")) as server:
        error = await complaint(server)
    assert f"{server} answers but advertises kafka-0.inside.invalid:9092" in str(error)
    assert "advertised.listeners" in str(error.remedy)
    assert server in str(error.remedy)


async def test_an_advertised_address_where_nobody_listens_is_named() -> None:
    async with peer(silent) as closed:
        pass
    async with peer(broker_that(closed)) as server:
        error = await complaint(server)
    assert f"advertises {closed}" in str(error)
    assert "advertised.listeners" in str(error.remedy)


async def test_one_advertised_address_of_several_is_enough_and_the_others_can_be_told() -> None:
    async with peer(silent) as closed:
        pass
    async with peer(broker) as other, peer(broker_that(closed, other)) as server:
        connection = KafkaConnection(bootstrap_servers=server)
        await connection.check()
        (wrong,) = await connection.unreachable()
    assert f"advertises {closed}" in str(wrong)


async def test_a_bootstrap_address_that_is_dead_can_be_told() -> None:
    async with peer(silent) as closed:
        pass
    async with peer(broker) as server:
        (wrong,) = await KafkaConnection(bootstrap_servers=f"{closed},{server}").unreachable()
    assert f"no broker at {closed}" in str(wrong)


async def test_the_port_of_a_controller() -> None:
    async with peer(broker_that(serves_clients=False)) as server:
        error = await complaint(server)
    assert "lists no broker for clients" in str(error)
    assert "controller" in str(error.remedy)


async def test_a_name_that_does_not_exist() -> None:
    assert "no broker at" in str(await complaint("does-not-exist.invalid:9092"))


async def test_a_peer_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bus.kafka.connection.CHECK_TIMEOUT_S", 1.0)
    async with peer(silent) as server:
        error = await complaint(server)
    assert "sends nothing for 1 s" in str(error)


async def test_a_peer_that_says_nothing_delays_no_other() -> None:
    async with peer(silent) as first, peer(silent) as second, peer(broker) as server:
        async with asyncio.timeout(CHECK_TIMEOUT_S / 2):
            await KafkaConnection(bootstrap_servers=f"{first},{second},{server}").check()
    async with peer(silent) as other, peer(broker) as advertised, peer(broker_that(other, advertised)) as server:
        async with asyncio.timeout(CHECK_TIMEOUT_S / 2):
            await KafkaConnection(bootstrap_servers=server).check()


async def test_of_several_that_fail_the_one_that_answers_is_named() -> None:
    async with peer(silent) as closed:
        pass
    async with peer(broker_that(closed)) as server:
        error = await complaint(f"{closed},{server}")
    assert f"{server} answers but advertises {closed}" in str(error)


async def test_a_peer_that_hangs_up() -> None:
    async with peer(hang_up) as server:
        error = await complaint(server)
    assert "closed the PLAINTEXT connection" in str(error)
    assert "KAFKA_SECURITY_PROTOCOL" in str(error.remedy)


async def test_a_wrong_password_is_named_and_not_shown() -> None:
    async with peer(broker) as server:
        error = await complaint(
            server, security_protocol="SASL_PLAINTEXT", sasl_username="edge-1", sasl_password="s3cr3t-word"
        )
    assert "rejected the password of user edge-1" in str(error)
    assert "KAFKA_SASL_PASSWORD_FILE" in str(error.remedy)
    assert "s3cr3t-word" not in f"{error} {error.remedy}"


async def test_a_mechanism_that_the_broker_does_not_know() -> None:
    async with peer(broker) as server:
        error = await complaint(
            server,
            security_protocol="SASL_PLAINTEXT",
            sasl_mechanism="PLAIN",
            sasl_username="edge-1",
            sasl_password="word",
        )
    assert "does not support PLAIN" in str(error)


async def test_an_unknown_authority(tls: ssl.SSLContext) -> None:
    async with peer(broker, tls) as server:
        error = await complaint(server, security_protocol="SSL")
    assert "certificate" in str(error)
    assert "self-signed" in str(error)
    assert "KAFKA_SSL_CAFILE" in str(error.remedy)


async def test_a_known_authority_passes(certificate: tuple[Path, Path], tls: ssl.SSLContext) -> None:
    async with peer(broker, tls) as server:
        connection = KafkaConnection(bootstrap_servers=server, security_protocol="SSL", ssl_cafile=certificate[0])
        await connection.check()


async def test_a_certificate_of_another_host(certificate: tuple[Path, Path], tls: ssl.SSLContext) -> None:
    async with peer(broker, tls) as server:
        port = server.partition(":")[2]
        error = await complaint(f"localhost:{port}", security_protocol="SSL", ssl_cafile=certificate[0])
    assert "certificate" in str(error)
    assert "host name" in str(error.remedy)


async def test_clear_text_to_a_port_that_wants_tls(tls: ssl.SSLContext) -> None:
    async with peer(broker, tls) as server:
        error = await complaint(server)
    assert "PLAINTEXT" in str(error)
    assert "TLS" in str(error.remedy)


async def test_tls_to_a_port_that_speaks_clear_text() -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()

    async with peer(speak) as server:
        error = await complaint(server, security_protocol="SSL")
    assert "TLS handshake with" in str(error)
    assert "use no TLS" in str(error)


@pytest.mark.parametrize(
    "server", ["localhost", "localhost:", ":9092", "localhost:http", "http://localhost:9092", "localhost:99999"]
)
async def test_an_address_that_is_none(server: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        await KafkaConnection(bootstrap_servers=server).check()


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_environment_says_everything(tmp_path: Path) -> None:
    for name in ("password", "ca", "cert", "key"):
        (tmp_path / name).write_text(f"{name}\n")
    connection = KafkaConnection.from_env(
        {
            "KAFKA_BOOTSTRAP_SERVERS": "a:1,b:2",
            "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "KAFKA_SASL_MECHANISM": "SCRAM-SHA-256",
            "KAFKA_SASL_USERNAME": "planner",
            "KAFKA_SASL_PASSWORD_FILE": str(tmp_path / "password"),
            "KAFKA_SSL_CAFILE": str(tmp_path / "ca"),
            "KAFKA_SSL_CERTFILE": str(tmp_path / "cert"),
            "KAFKA_SSL_KEYFILE": str(tmp_path / "key"),
            "DEEPAR_KAFKA_ROUTES": "deepar.activations.cloud=far:9092, deepar.results=far:9093",
            "DEEPAR_KAFKA_CLIENT_ID": "e1",
        }
    )
    assert connection.bootstrap_servers == "a:1,b:2"
    assert connection.sasl_password is not None
    assert connection.sasl_password.get_secret_value() == "password"
    assert "password" not in repr(connection).replace("sasl_password", "").replace("clear_text_password", "")
    assert connection.ssl_keyfile == tmp_path / "key"
    assert connection.client_id == "e1"
    assert connection.servers_of("deepar.activations.cloud") == "far:9092"
    assert connection.servers_of("deepar.results") == "far:9093"
    assert connection.servers_of("deepar.activations.cloudy") == "a:1,b:2"


def test_an_empty_environment_means_this_machine_and_overrides_win() -> None:
    assert KafkaConnection.from_env({}).bootstrap_servers == "localhost:9092"
    environment = {"KAFKA_BOOTSTRAP_SERVERS": "a:1"}
    assert KafkaConnection.from_env(environment, bootstrap_servers="b:2").bootstrap_servers == "b:2"
    assert KafkaConnection.from_env(environment, bootstrap_servers=None).bootstrap_servers == "a:1"


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"KAFKA_SECURITY_PROTOCOL": "TLS"}, "KAFKA_SECURITY_PROTOCOL"),
        ({"KAFKA_SASL_MECHANISM": "GSSAPI"}, "KAFKA_SASL_MECHANISM"),
        ({"KAFKA_SASL_PASSWORD_FILE": "/nowhere/secret"}, "KAFKA_SASL_PASSWORD_FILE"),
        ({"KAFKA_SSL_CAFILE": "/nowhere/ca.pem"}, "/nowhere/ca.pem"),
        ({"KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}, "password"),
        ({"DEEPAR_KAFKA_ROUTES": "deepar.results"}, "DEEPAR_KAFKA_ROUTES"),
        ({"DEEPAR_KAFKA_REPLICATION": "0"}, "DEEPAR_KAFKA_REPLICATION"),
    ],
)
def test_a_wrong_setting_is_named(environment: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        KafkaConnection.from_env(environment)


def test_a_password_goes_in_clear_text_to_this_machine_only_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("word")
    environment = {
        "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "KAFKA_SASL_USERNAME": "planner",
        "KAFKA_SASL_PASSWORD_FILE": str(tmp_path / "password"),
    }
    for here in ("localhost:9092", "127.0.0.1:1", "[::1]:2"):
        KafkaConnection.from_env(environment | {"KAFKA_BOOTSTRAP_SERVERS": here})
    for there in ("10.0.0.7:9092", "localhost:9092,kafka:9092"):
        with pytest.raises(ConfigError, match="without encryption"):
            KafkaConnection.from_env(environment | {"KAFKA_BOOTSTRAP_SERVERS": there})
    with pytest.raises(ConfigError, match="without encryption"):
        KafkaConnection.from_env(environment, routes={"deepar.results": "far:9092"})
    forced = environment | {"KAFKA_BOOTSTRAP_SERVERS": "kafka:9092", "DEEPAR_KAFKA_ALLOW_CLEAR_TEXT_PASSWORD": "true"}
    assert KafkaConnection.from_env(forced).allow_clear_text_password


def test_the_longest_route_wins() -> None:
    routes = {"deepar": "all:1", "deepar.activations": "sites:1", "deepar.activations.cloud": "cloud:1"}
    connection = KafkaConnection(bootstrap_servers="home:1", routes=routes)
    assert connection.servers_of("deepar.tasks") == "all:1"
    assert connection.servers_of("deepar.activations.e1") == "sites:1"
    assert connection.servers_of("deepar.activations.cloud") == "cloud:1"
    assert connection.servers_of("other") == "home:1"


def test_what_has_no_route_stands_beside_what_has_one() -> None:
    routes = {"deepar.activations.e1": "site1:1", "deepar.activations.e2": "site2:1"}
    connection = KafkaConnection(bootstrap_servers="home:1", routes=routes)
    assert connection.servers_of("deepar.results", beside="deepar.activations.e2") == "site2:1"
    assert connection.servers_of("deepar.results", beside="deepar.activations.e3") == "home:1"
    assert connection.servers_of("deepar.results") == "home:1"
    assert connection.sites == ("home:1", "site1:1", "site2:1")
    routed = connection.model_copy(update={"routes": routes | {"deepar.results": "all:1"}})
    assert routed.servers_of("deepar.results", beside="deepar.activations.e2") == "all:1"
