"""Who may use the endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bus.errors import ConfigError
from stages.serving.security import Guard, Listening, is_loopback, parse_address, read_tokens
from stages.serving.values import Fault, ServingError

TOKEN = "0123456789abcdef"
PAIR: dict[str, Any] = {"certificate": Path("c.pem"), "key": Path("k.pem")}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST"])
def test_the_loopback_needs_neither_token_nor_tls(host: str) -> None:
    assert is_loopback(host)
    Listening(host=host, port=1).require_safe()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", "127.0.0.1.example.org", ""])
def test_other_addresses_need_both_unless_forced(host: str) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "no token .* and no TLS"),
        ({"tokens": (TOKEN,)}, "no TLS"),
        (PAIR, "no token"),
    ]
    for given, missing in cases:
        with pytest.raises(ConfigError, match=missing) as refused:
            Listening(host=host, port=1, **given).require_safe()
        assert "--serve-insecure" in (refused.value.remedy or "")
    Listening(host=host, port=1, tokens=(TOKEN,), **PAIR).require_safe()
    Listening(host=host, port=1, forced=True).require_safe()


def test_a_certificate_needs_its_key_and_files_that_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="together"):
        Listening(host="::1", port=1, certificate=Path("c.pem")).require_safe()
    (tmp_path / "c.pem").write_text("no certificate", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"c\.pem"):
        Listening(host="::1", port=1, certificate=tmp_path / "c.pem", key=tmp_path / "c.pem").tls()


def test_any_of_the_tokens_is_valid_and_nothing_else() -> None:
    guard = Guard(Listening(host="0.0.0.0", port=1, tokens=(TOKEN, "another-long-token"), forced=True))
    assert guard.check(authorization=f"Bearer {TOKEN}", host="x", origin="https://any.example") == "token 1"
    assert guard.check(authorization="bearer  another-long-token ", host="x", origin="") == "token 2"
    for wrong in ("", TOKEN, "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer \udcff"):
        with pytest.raises(ServingError) as refused:
            guard.check(authorization=wrong, host="127.0.0.1", origin="")
        assert refused.value.fault is Fault.UNAUTHENTICATED
        assert TOKEN[:-1] not in str(refused.value)


@pytest.mark.parametrize(
    ("host", "origin", "allowed"),
    [
        ("127.0.0.1:8600", "", True),
        ("localhost", "http://localhost:3000", True),
        ("[::1]:8600", "", True),
        ("rebound.example", "", False),
        ("127.0.0.1:8600", "https://evil.example", False),
        ("127.0.0.1:8600", "null", False),
        ("", "", False),
        ("[", "", False),
        ("127.0.0.1", "http://[", False),
    ],
)
def test_without_tokens_pages_of_other_sites_are_refused(host: str, origin: str, allowed: bool) -> None:
    guard = Guard(Listening(host="127.0.0.1", port=1))
    if allowed:
        assert guard.check(authorization="", host=host, origin=origin) == ""
        return
    with pytest.raises(ServingError) as refused:
        guard.check(authorization="", host=host, origin=origin)
    assert refused.value.fault is Fault.FORBIDDEN


def test_pages_of_other_sites_are_refused_also_where_an_open_port_is_forced() -> None:
    guard = Guard(Listening(host="0.0.0.0", port=1, forced=True))
    assert guard.check(authorization="", host="robot.example:8600", origin="") == ""
    assert guard.check(authorization="", host="robot.example:8600", origin="http://robot.example:8600") == ""
    with pytest.raises(ServingError) as refused:
        guard.check(authorization="", host="robot.example:8600", origin="https://evil.example")
    assert refused.value.fault is Fault.FORBIDDEN


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokens"
    monkeypatch.setenv("DEEPAR_SERVE_TOKEN", "from-the-environment")
    assert read_tokens(None) == ("from-the-environment",)
    file.write_text(f"{TOKEN}\n\nanother-long-token\n", encoding="utf-8")
    assert read_tokens(file) == (TOKEN, "another-long-token")
    for text, words in (("", "has no token"), ("short\n", "at least 16")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=words):
            read_tokens(file)
    with pytest.raises(ConfigError, match="No such file"):
        read_tokens(tmp_path / "none")
    monkeypatch.delenv("DEEPAR_SERVE_TOKEN")
    assert read_tokens(None) == ()


def test_an_address_has_a_host_and_a_port() -> None:
    assert parse_address("127.0.0.1:8600", "--serve") == ("127.0.0.1", 8600)
    assert parse_address("[::1]:0", "--serve") == ("::1", 0)
    for wrong in ("8600", ":8600", "localhost", "localhost:", "localhost:x", "localhost:70000", "h:-1"):
        with pytest.raises(ConfigError, match="--serve"):
            parse_address(wrong, "--serve")


def test_a_token_is_not_shown() -> None:
    assert TOKEN not in repr(Listening(host="127.0.0.1", port=1, tokens=(TOKEN,)))
