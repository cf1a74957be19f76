"""The command line: errors become a line that says what to do, and an exit code that means something."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import typer

from deploy import cli
from deploy.ports import free_port


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`deepar ARGUMENTS` in this process, its logging left alone; the exit code."""
    monkeypatch.setattr("sys.argv", ["deepar", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli, "configure_logging", lambda level: None)
    monkeypatch.setattr(cli.app, "registered_commands", [])
    monkeypatch.setattr(cli.app, "registered_groups", [])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_of_the_table_is_there_and_teaches(command: cli._Command) -> None:
    found = getattr(importlib.import_module(command.module), command.attribute)
    assert isinstance(found, typer.Typer) or (found.__doc__ and len(found.__doc__) > 40)


def test_help_lists_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(command.name in shown for command in cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "code", "wanted"),
    [
        (("stage", "edge", "--name", "cloud"), 2, "cloud"),
        (("stage", "device", "--runner", "abacus"), 2, "abacus"),
        (("stage", "device", "--link", "fast"), 2, "fast"),
        (("planner", "--policy", "nope"), 2, "nope"),
        (("planner", "--lease", "soon"), 2, "soon"),
        (("tail", "decisions", "--nonsense"), 2, "nonsense"),
        (("--log-level", "loud", "topics", "list"), 2, "loud"),
        (("nosuchcommand",), 2, "nosuchcommand"),
        (("up", "/nonexistent.toml"), 2, "nonexistent.toml"),
    ],
)
def test_wrong_usage_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    wanted: str,
) -> None:
    assert run(monkeypatch, *arguments) == code
    assert wanted in capsys.readouterr().err


def test_an_interrupt_has_an_exit_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(bootstrap_servers: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deploy.commands_services.nodes.kafka_bus", interrupted)
    assert run(monkeypatch, "planner") == 105


def test_a_broken_file_names_the_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "region.toml"
    file.write_text('[[edge]]\nname = "e1"\nslotz = 2\n', encoding="utf-8")
    assert run(monkeypatch, "up", str(file)) == 2
    assert "edge.1.slotz" in capsys.readouterr().err


def test_a_dead_broker_says_what_to_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{free_port()}"
    assert run(monkeypatch, "tail", "nodes", "-b", address) == 1
    shown = capsys.readouterr().err
    assert address in shown
    assert "deepar broker" in shown


def test_a_service_that_does_not_answer_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "healthcheck", f"http://127.0.0.1:{free_port()}/readyz") == 1


def test_the_table_of_topics_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "topics", "list") == 0
    assert "deepar.decisions" in capsys.readouterr().out
