"""Connection settings for Kafka, and a check that explains why a broker cannot be used."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

from aiokafka.client import AIOKafkaClient
from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.errors import (
    IllegalSaslStateError,
    IncompatibleBrokerVersion,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
from aiokafka.helpers import create_ssl_context
from aiokafka.protocol.metadata import MetadataRequest
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from bus.errors import BusUnavailableError, ConfigError, DeeparError
from bus.kafka import aiokafka_patches
from bus.limits import MAX_RECORD_BYTES

aiokafka_patches.apply()

CHECK_TIMEOUT_S = 10.0
"""Timeout of the handshake with one broker, Kafka's own for a connection. On an overloaded machine it has taken 8 s."""

REQUEST_S = 5.0
"""Timeout of a request about topics or offsets, including retries, while no broker can be reached."""

FAILOVER_S = 60.0
"""Timeout of such a request while brokers can be reached, Kafka's own (`default.api.timeout.ms`).

A dead broker is replaced after `broker.session.timeout.ms` (9 s), a dead controller after an election (2-4 s). On an
overloaded machine live brokers then miss their deadlines as well, and requests have taken up to 35 s.
"""

HANG_UP_S = 1.0
"""Timeout for closing the connections of a client; see `hang_up`."""

_LIST_RETRY_S = 0.25
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
_ENVIRONMENT = {
    "KAFKA_BOOTSTRAP_SERVERS": "bootstrap_servers",
    "KAFKA_SECURITY_PROTOCOL": "security_protocol",
    "KAFKA_SASL_MECHANISM": "sasl_mechanism",
    "KAFKA_SASL_USERNAME": "sasl_username",
    "KAFKA_SSL_CAFILE": "ssl_cafile",
    "KAFKA_SSL_CERTFILE": "ssl_certfile",
    "KAFKA_SSL_KEYFILE": "ssl_keyfile",
    "DEEPAR_KAFKA_CLIENT_ID": "client_id",
    "DEEPAR_KAFKA_REPLICATION": "replication",
    "DEEPAR_KAFKA_ALLOW_CLEAR_TEXT_PASSWORD": "allow_clear_text_password",
}


class KafkaConnection(BaseModel):
    """Settings of the connection to Kafka.

    `routes` places topics on the brokers of other sites. A key is a topic or a prefix: `deepar.activations` covers
    `deepar.activations.e1`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bootstrap_servers: str = Field("localhost:9092", min_length=1)  # host:port, separated by commas
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    sasl_username: str | None = None
    sasl_password: SecretStr | None = None
    ssl_cafile: Path | None = None  # certificate authorities, PEM; None: those of the system
    ssl_certfile: Path | None = None  # the client's certificate, PEM
    ssl_keyfile: Path | None = None  # the client's key, PEM
    client_id: str = "deepar"  # the name in the broker's logs and quotas
    routes: Mapping[str, str] = {}  # topic prefix -> host:port of the site that holds those topics
    allow_clear_text_password: bool = False  # send a password without TLS to another machine
    max_record_bytes: int = Field(MAX_RECORD_BYTES, gt=0)  # the brokers' message.max.bytes
    replication: int | None = Field(None, ge=1)  # replicas of created topics; None: one per broker, at most 3
    delivery_timeout_s: float = Field(30.0, gt=0)  # timeout for the acknowledgement of a post

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.security_protocol.startswith("SASL"):
            if not self.sasl_username or self.sasl_password is None:
                raise ValueError(f"{self.security_protocol} needs a user name and a password")
            everywhere = [self.bootstrap_servers, *self.routes.values()]
            if self.security_protocol == "SASL_PLAINTEXT" and not self.allow_clear_text_password:
                remote = [server for servers in everywhere for server in servers.split(",") if not _is_loopback(server)]
                if remote:
                    raise ValueError(
                        f"SASL_PLAINTEXT would send the password to {remote[0]} without encryption; "
                        "use SASL_SSL, or set DEEPAR_KAFKA_ALLOW_CLEAR_TEXT_PASSWORD=true"
                    )
        for file in (self.ssl_cafile, self.ssl_certfile, self.ssl_keyfile):
            if file is not None and not file.is_file():
                raise ValueError(f"there is no file {file}")
        return self

    @classmethod
    def from_env(cls, environment: Mapping[str, str] | None = None, **overrides: Any) -> KafkaConnection:
        """The connection that the `KAFKA_*` environment variables describe; `overrides` that are not None replace them.

        `KAFKA_SASL_PASSWORD_FILE` names the file with the password. `DEEPAR_KAFKA_ROUTES` holds `topic=host:port` pairs,
        separated by commas. Raises `ConfigError`, which names the variable or field.
        """
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {
            field: environment[name] for name, field in _ENVIRONMENT.items() if environment.get(name)
        }
        if password_file := environment.get("KAFKA_SASL_PASSWORD_FILE"):
            try:
                values["sasl_password"] = Path(password_file).read_text(encoding="utf-8").rstrip("\r\n")
            except OSError as error:
                raise ConfigError(f"KAFKA_SASL_PASSWORD_FILE: {error}") from error
        if routes := environment.get("DEEPAR_KAFKA_ROUTES"):
            pairs = [route.partition("=") for route in routes.split(",")]
            if not all(prefix and server for prefix, _, server in pairs):
                raise ConfigError(f"DEEPAR_KAFKA_ROUTES={routes!r}: must be topic=host:port pairs, separated by commas")
            values["routes"] = {prefix.strip(): server.strip() for prefix, _, server in pairs}
        values.update({name: value for name, value in overrides.items() if value is not None})
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            names = [name for name, known in _ENVIRONMENT.items() if known == field]
            where = f"{names[0] if names else field}: " if field else ""
            raise ConfigError(f"{where}{first['msg'].removeprefix('Value error, ')}") from None

    def servers_of(self, topic: str, *, beside: str | None = None) -> str:
        """The bootstrap servers of the site that holds a topic.

        The longest route that matches the topic decides. A topic without a route is at the site of the topic `beside`, if
        that is given, else at the site of the control topics.
        """
        fitting = [prefix for prefix in self.routes if topic == prefix or topic.startswith(prefix.rstrip(".") + ".")]
        if fitting:
            return self.routes[max(fitting, key=len)]
        return self.bootstrap_servers if beside is None else self.servers_of(beside)

    @property
    def sites(self) -> tuple[str, ...]:
        """The bootstrap servers of every site; the site of the control topics comes first."""
        return tuple(dict.fromkeys([self.bootstrap_servers, *self.routes.values()]))

    def client_settings(self, servers: str) -> dict[str, Any]:
        """The settings that aiokafka's producer, consumer and admin client share."""
        settings: dict[str, Any] = {
            "bootstrap_servers": servers,
            "client_id": self.client_id,
            "security_protocol": self.security_protocol,
            # So that clients notice within seconds that a partition's leader moved or that a broker is silent.
            "metadata_max_age_ms": 5000,
            "request_timeout_ms": 5000,
            "retry_backoff_ms": 50,
        }
        settings.update(self._security())
        return settings

    async def check(self, servers: str | None = None) -> None:
        """Check that one of the given brokers answers, and one of the addresses that it advertises.

        Raises `BusUnavailableError` with the cause and a remedy.
        """

        async def usable(server: str) -> None:
            found = await self._shake_hands(server)
            if server not in found and (wrong := await _all_failed(self._look(server, address) for address in found)):
                raise wrong[0]

        wrong = await _all_failed(usable(server) for server in addresses(servers or self.bootstrap_servers))
        if wrong:  # that of a server that answers tells more
            raise next((error for error in wrong if isinstance(error.__cause__, DeeparError)), wrong[0])

    async def connect(self, server: str, request_s: float) -> AIOKafkaConnection:
        """A connection to one broker, on which a request may take `request_s`. Raises `KafkaError` or `OSError`."""
        host, port = _host_and_port(server)
        return await create_conn(
            host,
            port,
            client_id=self.client_id,
            security_protocol=self.security_protocol,
            request_timeout_ms=int(request_s * 1000),
            **self._security(),
        )

    async def unreachable(self, servers: str | None = None) -> list[BusUnavailableError]:
        """An error for each address that cannot be used, of those given and those that the brokers advertise."""
        wrong: list[BusUnavailableError] = []
        advertised: dict[str, str] = {}  # address -> the broker that advertises it
        given = addresses(servers or self.bootstrap_servers)
        for server in given:
            try:
                for address in await self._shake_hands(server):
                    advertised.setdefault(address, server)
            except BusUnavailableError as error:
                wrong.append(error)
        for address, server in advertised.items():
            if address not in given:
                wrong += await self._unreachable(server, [address])
        return wrong

    async def _unreachable(self, server: str, advertised: Iterable[str]) -> list[BusUnavailableError]:
        """An error for each address that `server` advertises and that cannot be used."""
        found = await asyncio.gather(*(self._look(server, address) for address in advertised), return_exceptions=True)
        wrong = [error for error in found if error is not None]
        for error in wrong:
            if not isinstance(error, BusUnavailableError):
                raise error
        return [error for error in wrong if isinstance(error, BusUnavailableError)]

    async def _look(self, server: str, address: str) -> None:
        """Check an address that `server` advertises. Raises `BusUnavailableError`."""
        try:
            await self._shake_hands(address)
        except (BusUnavailableError, ConfigError) as error:
            raise BusUnavailableError(
                f"{server} answers but advertises {address}, which cannot be used from this machine: {error}",
                remedy=f"set advertised.listeners of that broker (KAFKA_ADVERTISED_LISTENERS in containers) to an"
                f" address that this machine reaches, such as {server}; or make {address} reachable",
            ) from error

    async def _shake_hands(self, server: str) -> list[str]:
        """The addresses (host:port) that the cluster behind `server` advertises. Raises `BusUnavailableError`."""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                connection = await self.connect(server, CHECK_TIMEOUT_S)
                try:
                    brokers = await _listed(connection)
                finally:
                    connection.close()
        except (OSError, KafkaError, EOFError, asyncio.IncompleteReadError) as error:  # TimeoutError is an OSError
            raise self._explain(server, error) from error
        if not brokers:
            raise _serves_no_clients(server)
        return brokers

    def _security(self) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if self.security_protocol.endswith("SSL"):
            try:
                settings["ssl_context"] = create_ssl_context(
                    cafile=self.ssl_cafile, certfile=self.ssl_certfile, keyfile=self.ssl_keyfile
                )
            except (ssl.SSLError, OSError) as error:
                raise ConfigError(f"the TLS files cannot be loaded: {error}") from error
        if self.security_protocol.startswith("SASL"):
            assert self.sasl_password is not None
            settings["sasl_mechanism"] = self.sasl_mechanism
            settings["sasl_plain_username"] = self.sasl_username
            settings["sasl_plain_password"] = self.sasl_password.get_secret_value()
        return settings

    def _explain(self, server: str, error: BaseException) -> BusUnavailableError:
        """Translate an error of aiokafka or the system into a cause and a remedy."""
        tls = self.security_protocol.endswith("SSL")
        cause = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return BusUnavailableError(
                    f"the certificate of {server} was rejected: {cause.verify_message}",
                    remedy="set KAFKA_SSL_CAFILE to the authority that signed it; the certificate must contain the host name",
                )
            if isinstance(cause, ssl.SSLError):
                hint = "the port seems to use no TLS" if "WRONG_VERSION_NUMBER" in str(cause) else str(cause)
                return BusUnavailableError(
                    f"TLS handshake with {server} failed: {hint}", remedy="check KAFKA_SECURITY_PROTOCOL and the port"
                )
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        if isinstance(error, SaslAuthenticationFailed):
            return BusUnavailableError(
                f"{server} rejected the password of user {self.sasl_username}",
                remedy="check KAFKA_SASL_USERNAME and the file that KAFKA_SASL_PASSWORD_FILE names",
            )
        if isinstance(error, UnsupportedSaslMechanismError):
            return BusUnavailableError(
                f"{server} does not support {self.sasl_mechanism}", remedy="check KAFKA_SASL_MECHANISM"
            )
        if isinstance(error, IncompatibleBrokerVersion):
            return _serves_no_clients(server)
        if isinstance(error, IllegalSaslStateError):
            return BusUnavailableError(
                f"{server} does not ask for a password", remedy="check KAFKA_SECURITY_PROTOCOL and the port"
            )
        if isinstance(error, TimeoutError):
            return BusUnavailableError(
                f"{server} accepts connections but sends nothing for {CHECK_TIMEOUT_S:g} s"
                if not tls
                else f"{server} does not answer within {CHECK_TIMEOUT_S:g} s",
                remedy="check that it is a running Kafka broker with "
                f"{self.security_protocol} on this port; `deepar broker` starts one on this machine",
            )
        if isinstance(error, KafkaConnectionError | EOFError | ConnectionResetError):
            return BusUnavailableError(
                f"{server} closed the {self.security_protocol} connection",
                remedy="it may require TLS or a password: check KAFKA_SECURITY_PROTOCOL and the port",
            )
        if isinstance(error, OSError):
            return BusUnavailableError(
                f"no broker at {server}: {error.strerror or error}",
                remedy="start one with `deepar broker`, or set KAFKA_BOOTSTRAP_SERVERS to another",
            )
        return BusUnavailableError(f"{server} refused the connection: {error!r}")


def _serves_no_clients(server: str) -> BusUnavailableError:
    return BusUnavailableError(
        f"{server} answers like Kafka but lists no broker for clients",
        remedy="wait if it is still starting; if this is a controller's port, use the clients' port from its `listeners`",
    )


def addresses(servers: str) -> list[str]:
    """The addresses of a comma-separated list. Raises `ConfigError` if one is not host:port."""
    found = [server.strip() for server in servers.split(",") if server.strip()]
    for server in found:
        _host_and_port(server)
    return found


def _host_and_port(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"{server!r} is not host:port", remedy="see KAFKA_BOOTSTRAP_SERVERS, or --bootstrap-servers")
    return host.strip("[]"), int(port)


def address_of(host: str, port: int) -> str:
    """host:port, also of an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def advertised(answer: Any) -> list[str]:
    """The addresses of the brokers that an answer to `MetadataRequest` lists."""
    return [address_of(host, port) for _node, host, port, *_rack in answer.brokers]


async def _listed(connection: AIOKafkaConnection) -> list[str]:
    """The brokers that the cluster lists; asked again for `REQUEST_S` if there is none, as it may lack CPU time."""
    for _ in range(int(REQUEST_S / _LIST_RETRY_S)):
        if brokers := advertised(await connection.send(MetadataRequest([]))):
            return brokers
        await asyncio.sleep(_LIST_RETRY_S)
    return []


def patience_s(client: AIOKafkaClient) -> float:
    """Timeout for a request to the cluster: longer if another broker may replace a dead one.

    The brokers that are listed now do not decide alone: one that lacked CPU time is not listed for some seconds.
    """
    cluster = client.cluster
    replicas = [len(one.replicas) for topic in cluster._partitions.values() for one in topic.values()]
    known = max(len(cluster.brokers()), len(client.hosts), *replicas, 0)
    return FAILOVER_S if known > 1 else REQUEST_S


async def _all_failed(checks: Iterable[Coroutine[Any, Any, None]]) -> list[BusUnavailableError]:
    """The error of each check, or an empty list as soon as one has passed; the others are then cancelled."""
    tasks = [asyncio.ensure_future(check) for check in checks]
    try:
        for finished in asyncio.as_completed(tasks):
            with suppress(BusUnavailableError):
                await finished
                return []
        return [error for task in tasks if isinstance(error := task.exception(), BusUnavailableError)]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def hang_up(client: AIOKafkaClient) -> None:
    """Close the remaining connections of an aiokafka client within two seconds, without raising.

    If the client's `stop` was interrupted, it has cancelled the futures that report a closed connection (TLS on uvloop
    sometimes closes late). Awaiting those futures directly would raise `CancelledError` here although this task was not
    cancelled.
    """
    closing = asyncio.ensure_future(client.close())
    done, _ = await asyncio.wait([closing], timeout=HANG_UP_S)
    if not done:
        closing.cancel()
        await asyncio.wait([closing], timeout=HANG_UP_S)
    if closing.done():
        _look_at(closing)
    else:
        closing.add_done_callback(_look_at)


def _look_at(closed: asyncio.Future[None]) -> None:
    """Retrieve the outcome, so that asyncio reports no unhandled exception."""
    if not closed.cancelled():
        closed.exception()


def _is_loopback(server: str) -> bool:
    return server.strip().rpartition(":")[0] in _LOOPBACK
