"""The page of the region in the compose file: a command that `deepar ui` takes, on this machine's address only."""

from __future__ import annotations

from pathlib import Path

import yaml

import deploy
from deploy import cli

FILE = Path(deploy.__file__).parent / "docker-compose.yml"


def test_the_page_is_served_to_this_machine_only_and_asked_where_it_listens() -> None:
    service = yaml.safe_load(FILE.read_text(encoding="utf-8"))["services"]["ui"]
    name, *words = service["command"]
    made = cli.whole().commands[name].make_context(name, words)
    port = made.params["port"]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert made.params["host"] == "0.0.0.0", "the container's own address is not known beforehand"
    assert f'HTTPConnection("127.0.0.1", {port},' in service["healthcheck"]["test"][-1]
    assert service["profiles"] == [name]
    assert service["environment"]["KAFKA_BOOTSTRAP_SERVERS"] == "broker:29092"
