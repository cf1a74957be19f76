"""A broker that knows its users: SCRAM-SHA-512 over TLS and access control lists, with the settings of
`deploy/kafka/secure.properties` and certificates that last for the test.

Made with the `openssl` program, as docs/security.md shows it.
"""

from __future__ import annotations

import asyncio
import secrets
import string
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bus.kafka.connection import KafkaConnection
from deploy.kafka_local.artifacts import SETTINGS_DIR
from deploy.kafka_local.broker import BrokerOptions, KafkaBroker
from deploy.kafka_local.ports import free_port

STARTED_BY = "with users, started by the tests"


def openssl(folder: Path, *words: str) -> None:
    """Run `openssl` in a folder. Raises CalledProcessError with what it said."""
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, text=True)


def make_authority(folder: Path) -> Path:
    """`ca.pem` and its key in `folder`; the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    openssl(
        folder, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem",
        "-days", "2", "-subj", "/CN=deepar test authority", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
    )  # fmt: skip
    return folder / "ca.pem"


def make_broker_certificate(folder: Path) -> None:
    """`broker.pem` in `folder`: key and certificate of the broker, for 127.0.0.1 and localhost, signed by `ca.pem`."""
    openssl(
        folder, "req", "-newkey", "rsa:2048", "-nodes", "-keyout", "broker.key", "-out", "broker.csr", "-subj", "/CN=broker"
    )  # fmt: skip
    (folder / "broker.ext").write_text(
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n", encoding="ascii"
    )
    openssl(
        folder, "x509", "-req", "-in", "broker.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
        "-days", "2", "-extfile", "broker.ext", "-out", "broker.crt",
    )  # fmt: skip
    both = (folder / "broker.key").read_text(encoding="ascii") + (folder / "broker.crt").read_text(encoding="ascii")
    (folder / "broker.pem").write_text(both, encoding="ascii")
    (folder / "broker.pem").chmod(0o600)


class SecureBroker:
    """Apache Kafka with the users named, `admin` and `broker` beside them; each with a password of its own."""

    def __init__(self, folder: Path, users: Sequence[str]) -> None:
        self.folder = folder
        self.certificates = folder / "certificates"
        self.cafile = make_authority(self.certificates)
        make_broker_certificate(self.certificates)
        alphabet = string.ascii_letters + string.digits
        everyone = ("broker", "admin", *users)
        self.passwords = {user: "".join(secrets.choice(alphabet) for _ in range(24)) for user in everyone}
        self.port = free_port()
        controller = free_port()
        text = (SETTINGS_DIR / "secure.properties").read_text(encoding="ascii").replace("\\\n", "")
        text = text.replace("${CERTIFICATES}", str(self.certificates))
        lines = text.replace("${BROKER_PASSWORD}", self.passwords["broker"]).splitlines()
        pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
        self.broker = KafkaBroker(
            folder / "kafka",
            BrokerOptions(
                port=self.port,
                controller_port=controller,
                settings={key: value for key, _, value in pairs},
                format_arguments=tuple(
                    word
                    for user, password in self.passwords.items()
                    for word in ("--add-scram", f"SCRAM-SHA-512=[name={user},password={password}]")
                ),
            ),
            ready=self._lets_the_admin_in,
            started_by=STARTED_BY,
        )

    @property
    def bootstrap(self) -> str:
        return self.broker.bootstrap

    def _lets_the_admin_in(self) -> None:
        asyncio.run(self.connection("admin").check())

    def environment(self, user: str) -> dict[str, str]:
        """The variables with which `user` gets in; the password is in a file."""
        file = self.folder / f"{user}.password"
        if not file.exists():
            file.touch(mode=0o600)
            file.write_text(self.passwords[user] + "\n", encoding="ascii")
        return {
            "KAFKA_BOOTSTRAP_SERVERS": self.bootstrap,
            "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
            "KAFKA_SASL_USERNAME": user,
            "KAFKA_SASL_PASSWORD_FILE": str(file),
            "KAFKA_SSL_CAFILE": str(self.cafile),
        }

    def connection(self, user: str, **overrides: object) -> KafkaConnection:
        """The same as a connection."""
        return KafkaConnection.from_env(self.environment(user), **overrides)
