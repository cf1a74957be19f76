"""Who may use the endpoint: bearer tokens, TLS, and the rule that an open port demands both.

Without tokens only the same machine can connect, but so can a page in its browser: a request must then name this machine in
its `Host`, and one with an `Origin` must come from a page of this machine; where an open port is forced, from the same host.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from bus.errors import ConfigError
from stages.serving.values import Fault, ServingError

TOKEN_VARIABLE = "DEEPAR_SERVE_TOKEN"
SHORTEST_TOKEN = 16
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where the endpoint listens and how it is protected."""

    host: str
    port: int  # 0 takes a free one
    tokens: tuple[str, ...] = field(default=(), repr=False)
    certificate: Path | None = None  # PEM files
    key: Path | None = None
    forced: bool = False  # an open port without tokens or TLS is accepted
    flag: str = "--serve"  # the flag with this address, for messages

    def require_safe(self) -> None:
        """Raise `ConfigError` where the address is not the loopback and tokens or TLS are missing."""
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a certificate and its key must be given together: --serve-certificate and --serve-key")
        if is_loopback(self.host) or self.forced:
            return
        missing = [
            words
            for words, there in (
                (f"token (--serve-token-file or {TOKEN_VARIABLE})", self.tokens),
                ("TLS (--serve-certificate and --serve-key)", self.certificate),
            )
            if not there
        ]
        if missing:
            lacks = " and no ".join(missing)
            raise ConfigError(
                f"{self.flag} {self.host}:{self.port}: other machines can connect, but the endpoint has no {lacks}",
                remedy="add it, serve on 127.0.0.1, or accept the risk with --serve-insecure",
            )

    def url(self, port: int) -> str:
        """The address of a listener on `port`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'' if self.certificate is None else 's'}://{host}:{port}"

    def tls(self) -> ssl.SSLContext | None:
        """The TLS context; None: clear text. Raises `ConfigError` where the files cannot be used."""
        if self.certificate is None or self.key is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"--serve-certificate {self.certificate}, --serve-key {self.key}: {error.strerror or error}"
            ) from None
        return context


class Guard:
    """Decides whether a request may be read."""

    def __init__(self, listening: Listening) -> None:
        self._digests = [_digest(token) for token in listening.tokens]
        self._names = LOCAL_NAMES | {listening.host.lower()} if is_loopback(listening.host) else None

    def check(self, *, authorization: str, host: str, origin: str) -> str:
        """The name of the token in the header `Authorization`; empty where no token is needed. Raises `ServingError`."""
        if self._digests:
            return self._token(authorization)
        asked = _host_name(host)
        if self._names is not None and asked not in self._names:
            raise ServingError(Fault.FORBIDDEN, "unknown host: use the address that the endpoint listens on")
        if origin and _host_name(origin.partition("://")[2]) not in (self._names or {asked}):
            raise ServingError(Fault.FORBIDDEN, "pages of other sites may not use this endpoint without a token")
        return ""

    def _token(self, authorization: str) -> str:
        scheme, _, token = authorization.partition(" ")
        given = _digest(token.strip())
        # compare with every token, so that the time does not depend on which one it is
        found = [number for number, digest in enumerate(self._digests, 1) if hmac.compare_digest(digest, given)]
        if scheme.lower() != "bearer" or not found:
            raise ServingError(Fault.UNAUTHENTICATED, "a valid token is needed: Authorization: Bearer TOKEN")
        return f"token {found[0]}"


def read_tokens(file: Path | None) -> tuple[str, ...]:
    """The tokens in a file, one a line, or else in the environment. Raises `ConfigError`."""
    if file is None:
        given = os.environ.get(TOKEN_VARIABLE, "").split()
        shown = TOKEN_VARIABLE
    else:
        shown = f"--serve-token-file {file}"
        try:
            given = file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{shown}: {getattr(error, 'strerror', None) or 'not text'}") from None
        if not given:
            raise ConfigError(f"{shown}: has no token", remedy="write one, for example: openssl rand -hex 32")
    if any(len(token) < SHORTEST_TOKEN for token in given):
        raise ConfigError(
            f"{shown}: a token needs at least {SHORTEST_TOKEN} characters", remedy="for example: openssl rand -hex 32"
        )
    return tuple(given)


def parse_address(text: str, flag: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`. Raises `ConfigError` naming the flag."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise ConfigError(f"{flag} {text}: must be HOST:PORT, like 127.0.0.1:8600")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _digest(token: str) -> bytes:
    """Of equal length for all tokens, so that a comparison does not tell the length."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _host_name(host: str) -> str:
    """The name in a `Host` header, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
