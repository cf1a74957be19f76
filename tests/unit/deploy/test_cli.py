"""The command line: errors become a line that says what to do, and an exit code that means something."""

from __future__ import annotations

import gc
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from deploy import cli
from deploy.kafka_local.ports import free_port

TRACE = str(Path(__file__).parents[2] / "data" / "traces" / "4g_foot.csv")


def _unprepared(log_level: str) -> None:
    """Leave the signals and the logging of the test process unchanged."""


def run(
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
    columns: int = 200,
    prepare: Callable[[str], None] = _unprepared,
) -> int:
    """Run `deepar ARGUMENTS` in this process; return the exit code."""
    monkeypatch.setattr("sys.argv", ["deepar", *arguments])
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        cli.main(prepare)
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


def leaves() -> Iterator[tuple[str, Any]]:
    """Every command that does something, as it is typed."""
    todo: list[tuple[str, Any]] = [("deepar", cli.whole())]
    while todo:
        name, one = todo.pop()
        inner = getattr(one, "commands", None)
        if inner is None:
            yield name, one
        else:
            todo += [(f"{name} {word}", command) for word, command in inner.items()]


@pytest.mark.parametrize(("name", "command"), [pytest.param(*leaf, id=leaf[0]) for leaf in leaves()])
def test_the_help_of_every_command_has_an_example_that_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, command: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.npz").touch()  # `models build` asks for it
    examples = re.findall(r"Example[^:`]*: `([^`]+)`", inspect.cleandoc(command.help or ""))
    assert examples, command.help
    for example in examples:
        assert example == name or example.startswith(f"{name} ")
        command.make_context(name, shlex.split(example)[len(name.split()) :])


@pytest.mark.parametrize("name", [name for name, _ in leaves()])
def test_no_word_of_a_help_is_cut_off_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(monkeypatch, *name.split()[1:], "--help", columns=80) == 0
    shown = capsys.readouterr().out
    assert "Usage" in shown
    assert [line for line in shown.splitlines() if "…" in line] == []


@pytest.mark.parametrize(("name", "command"), [pytest.param(*leaf, id=leaf[0]) for leaf in leaves()])
def test_help_is_whole_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, command: Any
) -> None:
    assert run(monkeypatch, *name.split()[1:], "--help", columns=80) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    for parameter in command.params:
        names = [*parameter.opts, *([parameter.envvar] if isinstance(parameter.envvar, str) else [])]
        assert all(word in shown for word in names if word.startswith("--") or word.isupper()), names


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
        (("stage", "edge", "--name", "e 1"), 2, "--name: 'e 1' is not a valid name"),
        (("loadgen", "bench", "bus", "--bus", "pigeon"), 2, "pigeon"),
        (("loadgen", "replay", "--scenario", "Server", "-b", "127.0.0.1:1"), 2, "--request-rate"),
        (("loadgen", "replay", "--time-scale", "0", "-b", "127.0.0.1:1"), 2, "time scale"),
        (("simulate", "sweep", "--vary", "devices=many"), 2, "'many' is not a number"),
        (("simulate", "sweep", "--scenario", "/nonexistent.toml"), 2, "/nonexistent.toml: No such file"),
        (("simulate", "sweep", "--vary", "devices=9:1"), 2, "START:END:STEP"),
        (("simulate", "sweep", "--policies", "no_such_module:X"), 2, "no_such_module:X"),
        (("simulate", "compare", "-b", "nonsense"), 2, "'nonsense' is not host:port"),
        (("healthcheck", "http://127.0.0.1:1", "--timeout", "-1"), 2, "--timeout"),
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


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("demo", "--picture", "PLACE/run.png"), "--picture"),
        (("plan", "alexnet", "--plot", "PLACE/plan.png"), "--plot"),
        (("models", "slice", "lenet", "--cut1", "2", "--out", "PLACE/parts"), "--out"),
        (("loadgen", "replay", "-b", "127.0.0.1:1", "--out", "PLACE/run"), "--out"),
        (("loadgen", "chaos", "-b", "127.0.0.1:1", "--out", "PLACE/run"), "--out"),
        (("simulate", "fig4a", "--out", "PLACE/figures"), "--out"),
        (("simulate", "sweep", "--out", "PLACE/sweep"), "--out"),
        (("simulate", "compare", "--out", "PLACE/compare"), "--out"),
        (("simulate", "soak", "--out", "PLACE/soak"), "--out"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_where_nothing_can_be_written_is_said_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    flag: str,
) -> None:
    place = tmp_path / "a file"  # a folder cannot be made below it, not even by root
    place.touch()
    assert run(monkeypatch, *(word.replace("PLACE", str(place)) for word in arguments)) == 2
    shown = capsys.readouterr()
    assert f"{flag} {place}" in shown.err
    assert "cannot be written" in shown.err
    assert not shown.out


def test_a_file_that_cannot_be_opened_is_a_line_and_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a file").touch()
    assert run(monkeypatch, "broker", "--data", str(tmp_path / "a file" / "kafka")) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'a file' / 'kafka'}: Not a directory")


def test_an_interrupt_has_an_exit_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(log_level: str) -> None:
        raise KeyboardInterrupt

    assert run(monkeypatch, "planner", prepare=interrupted) == 105
    assert gc.isenabled()


def test_a_command_runs_with_garbage_collection_which_passes_over_what_was_imported() -> None:
    program = "import gc\nfrom deploy import cli\ngc.disable()\ncli.prepare_process('info')\n"
    program += "print(gc.isenabled(), gc.get_freeze_count() > 1000)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60.0, check=True)
    assert said.stdout.split() == ["True", "True"]


@pytest.mark.parametrize(
    "words",
    [
        ("device",),
        ("device", "--link", "50Mbps"),
        ("device", "--link1-latency", "20ms"),
        ("device", "--link1-trace", TRACE),
        ("edge",),
        ("edge", "--link1", "0.5Gbps", "--link2", "30 Mbps"),
        ("edge", "--link2-latency", "40 ms"),
        ("edge", "--link2-trace", TRACE),
        ("cloud",),
        ("cloud", "--link2-latency", "0"),
        ("cloud", "--link2-trace", TRACE),
    ],
    ids=" ".join,
)
def test_a_stage_takes_its_flags_and_its_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    """Valid flags lead to the connection attempt, which fails with exit code 1; a wrong flag would give 2."""
    address = f"127.0.0.1:{free_port()}"
    assert run(monkeypatch, "stage", *words, "--runner", "modelled", "--profile", "paper", "-b", address) == 1
    assert address in capsys.readouterr().err


def test_a_broken_file_names_the_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "region.toml"
    file.write_text('[[edge]]\nname = "e1"\nslotz = 2\n', encoding="utf-8")
    assert run(monkeypatch, "up", str(file)) == 2
    assert "edge.1.slotz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "other processes cannot submit tasks"),  # and no device serves clients
        (("-b", "127.0.0.1:9092"), "a broker is given: 127.0.0.1:9092"),
    ],
)
def test_a_bus_inside_the_process_is_refused_where_it_cannot_be_meant(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    said: str,
) -> None:
    file = tmp_path / "region.toml"
    file.write_text('[bus]\nkind = "memory"\n[[device]]\nname = "d1"\n', encoding="utf-8")
    assert run(monkeypatch, "up", str(file), *words) == 2
    assert said in capsys.readouterr().err


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
