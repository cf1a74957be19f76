"""Which broker the tests take, and that they never take a lesser one silently."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from deploy.kafka_local.handshake import ask
from tests import kafka_broker


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No program on PATH but those that a test puts into the folder; nothing cached, nothing named."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("JAVA_HOME", "KAFKA_BOOTSTRAP_SERVERS", "DEEPAR_TEST_KAFKA"):
        monkeypatch.delenv(name, raising=False)
    return folder


def _install(folder: Path, name: str, script: str = "exit 0") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_java_and_maven_give_apache_kafka(bare_machine: Path) -> None:
    _install(bare_machine, "java", "echo 'openjdk version \"17.0.1\"' >&2")
    _install(bare_machine, "mvn")
    choice = kafka_broker.choose()
    assert choice.is_apache
    assert choice.text.startswith("Apache Kafka 4.3.0 (KRaft, started by the tests on first use), Java 17.0.1")


def test_the_stand_in_is_taken_only_on_a_bare_machine(bare_machine: Path) -> None:
    pytest.importorskip("noida_db")
    choice = kafka_broker.choose()
    assert choice.how == "stand-in"
    assert not choice.is_apache
    for program in ("docker", "mvn"):
        _install(bare_machine, program)
        lacking = kafka_broker.choose()
        assert lacking.how == "none"
        assert "openjdk-17" in lacking.text
        (bare_machine / program).unlink()


def test_a_broker_that_is_named_but_absent_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", address)
    choice = kafka_broker.choose()
    assert choice.how == "none"
    assert address in choice.text


def test_apache_on_demand_fails_with_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPAR_TEST_KAFKA", "apache")
    with pytest.raises(pytest.fail.Exception, match="requires Apache Kafka"):
        kafka_broker.start_broker(kafka_broker.Choice("stand-in", "a stand-in"), tmp_path)


def test_a_demand_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPAR_TEST_KAFKA", "apach")
    with pytest.raises(pytest.UsageError, match="'apach'"):
        kafka_broker.apache_required()


def test_the_stand_in_starts_and_ends(tmp_path: Path) -> None:
    pytest.importorskip("noida_db")
    broker = kafka_broker.StandInBroker(tmp_path)
    broker.start()
    try:
        assert not ask(broker.bootstrap).is_kraft
    finally:
        broker.stop()
    with pytest.raises(ConnectionRefusedError):
        ask(broker.bootstrap)
