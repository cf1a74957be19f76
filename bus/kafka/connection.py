"""Where the brokers are and how to get in: settings, and a check that names the true cause when one cannot."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from aiokafka.client import AIOKafkaClient
from aiokafka.conn import create_conn
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

from bus.errors import BusUnavailableError, ConfigError
from bus.kafka import aiokafka_patches
from bus.limits import MAX_RECORD_BYTES

aiokafka_patches.apply()

CHECK_TIMEOUT_S = 3.0
"""How long a broker may take to shake hands when we start."""

REQUEST_S = 5.0
"""What a request about topics or offsets may take, retries included, where there is one broker."""

FAILOVER_S = 20.0
"""The same where there are several: a dead one is missed after `broker.session.timeout.ms` (9 s), then others lead."""

HANG_UP_S = 1.0

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
    """How to reach Kafka. `routes` sends topics to other brokers: a name, or all below it (`deepar.activations`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bootstrap_servers: str = Field("localhost:9092", min_length=1)  # host:port, several with commas
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    sasl_username: str | None = None
    sasl_password: SecretStr | None = None
    ssl_cafile: Path | None = None  # PEM; the system's authorities where there is none
    ssl_certfile: Path | None = None  # PEM, of the client
    ssl_keyfile: Path | None = None  # PEM, of the client
    client_id: str = "deepar"  # shows in the broker's logs and quotas
    routes: Mapping[str, str] = {}  # topic prefix -> host:port of the site that holds those topics
    allow_clear_text_password: bool = False  # send a password without TLS to another machine
    max_record_bytes: int = Field(MAX_RECORD_BYTES, gt=0)  # the brokers' message.max.bytes
    replication: int | None = Field(None, ge=1)  # copies of topics we create; None: as many as brokers, at most 3
    delivery_timeout_s: float = Field(30.0, gt=0)  # then a post that nobody acknowledged has failed

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
                        f"SASL_PLAINTEXT would send the password readable to {remote[0]}; "
                        "use SASL_SSL, or DEEPAR_KAFKA_ALLOW_CLEAR_TEXT_PASSWORD=true"
                    )
        for file in (self.ssl_cafile, self.ssl_certfile, self.ssl_keyfile):
            if file is not None and not file.is_file():
                raise ValueError(f"there is no file {file}")
        return self

    @classmethod
    def from_env(cls, environment: Mapping[str, str] | None = None, **overrides: Any) -> KafkaConnection:
        """The connection that `KAFKA_*` variables describe; `overrides` (those not None) win.

        The password is read from the file that `KAFKA_SASL_PASSWORD_FILE` names; `DEEPAR_KAFKA_ROUTES` is
        `topic=host:port` pairs with commas between them. Raises `ConfigError` naming the variable or field.
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
                raise ConfigError(
                    f"DEEPAR_KAFKA_ROUTES={routes!r}: it is topic=host:port pairs with commas between them"
                )
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
        """The bootstrap servers of the site that holds a topic: those of the longest route that fits; where none does,
        those of the topic that it stands `beside`, if one is named.
        """
        fitting = [prefix for prefix in self.routes if topic == prefix or topic.startswith(prefix.rstrip(".") + ".")]
        if fitting:
            return self.routes[max(fitting, key=len)]
        return self.bootstrap_servers if beside is None else self.servers_of(beside)

    @property
    def sites(self) -> tuple[str, ...]:
        """The bootstrap servers of every site, those of the control topics first."""
        return tuple(dict.fromkeys([self.bootstrap_servers, *self.routes.values()]))

    def client_settings(self, servers: str) -> dict[str, Any]:
        """What aiokafka's producer, consumer and admin client have in common."""
        settings: dict[str, Any] = {
            "bootstrap_servers": servers,
            "client_id": self.client_id,
            "security_protocol": self.security_protocol,
            # A leader that has moved is noticed within seconds, a peer that has fallen silent too.
            "metadata_max_age_ms": 5000,
            "request_timeout_ms": 5000,
            "retry_backoff_ms": 50,
        }
        settings.update(self._security())
        return settings

    async def check(self, servers: str | None = None) -> None:
        """Shake hands with one of the brokers, and with one of those that it sends its clients on to.

        Raises `BusUnavailableError` with the cause and what to do about it.
        """
        failures: list[BusUnavailableError] = []
        for server in addresses(servers or self.bootstrap_servers):
            try:
                advertised = await self._shake_hands(server)
            except BusUnavailableError as error:
                failures.append(error)
                continue
            if server in advertised:
                return
            wrong = await self._unreachable(server, advertised)
            if len(wrong) < len(advertised):
                return
            raise wrong[0]
        raise failures[0]

    async def unreachable(self, servers: str | None = None) -> list[BusUnavailableError]:
        """What is wrong with each address that cannot be reached: those given, and those that the brokers advertise."""
        wrong: list[BusUnavailableError] = []
        advertised: dict[str, str] = {}  # by address, who sends clients on to it
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
        """Of the addresses that a broker sends its clients on to, what is wrong with each that cannot be reached."""

        async def look(address: str) -> BusUnavailableError | None:
            try:
                await self._shake_hands(address)
            except (BusUnavailableError, ConfigError) as error:
                return BusUnavailableError(
                    f"{server} answers, and sends its clients on to {address}, which cannot be used here: {error}",
                    remedy=f"set advertised.listeners of that broker (KAFKA_ADVERTISED_LISTENERS in containers) to an"
                    f" address that this machine reaches, such as {server}; or make {address} one",
                )
            return None

        return [wrong for wrong in await asyncio.gather(*map(look, advertised)) if wrong is not None]

    async def _shake_hands(self, server: str) -> list[str]:
        """The addresses (host:port) of the brokers of the cluster that answers there. Raises `BusUnavailableError`."""
        host, port = _host_and_port(server)
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                connection = await create_conn(
                    host,
                    port,
                    client_id=self.client_id,
                    security_protocol=self.security_protocol,
                    request_timeout_ms=int(CHECK_TIMEOUT_S * 1000),
                    **self._security(),
                )
                try:
                    answer = await connection.send(MetadataRequest([]))
                finally:
                    connection.close()
        except (OSError, KafkaError, EOFError, asyncio.IncompleteReadError) as error:  # TimeoutError is an OSError
            raise self._explain(server, error) from error
        brokers = [_address(host, port) for _node, host, port, *_rack in answer.brokers]
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
                raise ConfigError(f"the TLS files cannot be used: {error}") from error
        if self.security_protocol.startswith("SASL"):
            assert self.sasl_password is not None
            settings["sasl_mechanism"] = self.sasl_mechanism
            settings["sasl_plain_username"] = self.sasl_username
            settings["sasl_plain_password"] = self.sasl_password.get_secret_value()
        return settings

    def _explain(self, server: str, error: BaseException) -> BusUnavailableError:
        """aiokafka's and the system's errors in words, with what to do."""
        tls = self.security_protocol.endswith("SSL")
        cause = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return BusUnavailableError(
                    f"the certificate of {server} is not accepted: {cause.verify_message}",
                    remedy="KAFKA_SSL_CAFILE names the authority that signed it, and the host name must be in it",
                )
            if isinstance(cause, ssl.SSLError):
                hint = "it seems to speak clear text" if "WRONG_VERSION_NUMBER" in str(cause) else str(cause)
                return BusUnavailableError(
                    f"no TLS with {server}: {hint}", remedy="check KAFKA_SECURITY_PROTOCOL and the port"
                )
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        if isinstance(error, SaslAuthenticationFailed):
            return BusUnavailableError(
                f"{server} refuses the password of user {self.sasl_username}",
                remedy="check KAFKA_SASL_USERNAME and the file that KAFKA_SASL_PASSWORD_FILE names",
            )
        if isinstance(error, UnsupportedSaslMechanismError):
            return BusUnavailableError(
                f"{server} does not know {self.sasl_mechanism}", remedy="check KAFKA_SASL_MECHANISM"
            )
        if isinstance(error, IncompatibleBrokerVersion):
            return _serves_no_clients(server)
        if isinstance(error, IllegalSaslStateError):
            return BusUnavailableError(
                f"{server} does not ask for a password", remedy="check KAFKA_SECURITY_PROTOCOL and the port"
            )
        if isinstance(error, TimeoutError):
            return BusUnavailableError(
                f"{server} takes connections but says nothing for {CHECK_TIMEOUT_S:g} s"
                if not tls
                else f"{server} does not answer within {CHECK_TIMEOUT_S:g} s",
                remedy="is it a Kafka broker, does it speak "
                f"{self.security_protocol}, and is it up? `deepar broker` starts one here",
            )
        if isinstance(error, KafkaConnectionError | EOFError | ConnectionResetError):
            return BusUnavailableError(
                f"{server} hangs up on {self.security_protocol}",
                remedy="it may want TLS or a password: check KAFKA_SECURITY_PROTOCOL and the port",
            )
        if isinstance(error, OSError):
            return BusUnavailableError(
                f"no broker at {server}: {error.strerror or error}",
                remedy="`deepar broker` starts one; KAFKA_BOOTSTRAP_SERVERS names another",
            )
        return BusUnavailableError(f"{server} refuses us: {error!r}")


def _serves_no_clients(server: str) -> BusUnavailableError:
    return BusUnavailableError(
        f"{server} speaks Kafka, but names no broker for clients",
        remedy="is it still starting, or is this port a controller's? see `listeners` in its settings for the clients' port",
    )


def addresses(servers: str) -> list[str]:
    """Each host:port of a list with commas. Raises `ConfigError` for one that is none."""
    found = [server.strip() for server in servers.split(",") if server.strip()]
    for server in found:
        _host_and_port(server)
    return found


def _host_and_port(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"{server!r} is not host:port", remedy="see KAFKA_BOOTSTRAP_SERVERS, or --bootstrap-servers")
    return host.strip("[]"), int(port)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def patience_s(client: AIOKafkaClient) -> float:
    """How long to wait for a cluster's answer, by how many brokers it said it has."""
    return FAILOVER_S if len(client.cluster.brokers()) > 1 else REQUEST_S


async def hang_up(client: AIOKafkaClient) -> None:
    """Close what connections a client of aiokafka still has, within two seconds, and never fail.

    Where its own `stop` was cut short it has cancelled the futures that tell of a closed connection (TLS on uvloop closes
    late now and then), and waiting for them would look as if we were cancelled ourselves.
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
    """Take note of how it ended, so that nobody complains."""
    if not closed.cancelled():
        closed.exception()


def _is_loopback(server: str) -> bool:
    return server.strip().rpartition(":")[0] in _LOOPBACK
