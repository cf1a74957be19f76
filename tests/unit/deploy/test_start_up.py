"""How the program starts: soon, with its own packages, under three names; and what TAB offers."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import deepar
from bus import messages, topics
from bus.memory.bus import MemoryBus
from bus.topics import Partitions
from deepar.__main__ import ROOMS
from deploy import cli
from deploy.console_output import completion
from deploy.kafka_local.ports import free_port
from tests.unit.planner.scenes import device, edge, task

ROOT = Path(__file__).parents[3]
LEAST = "import typer, rich"
"""What no command line of this kind can do without; the measure of the others."""


def python(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own in `folder`, to its end."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DEEPAR_", "KAFKA_"))}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def processor_s(*words: str, folder: Path) -> float:
    """Processor time of a Python, the least of several: other processes make it longer, never shorter."""
    least = float("inf")
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = python(*words, folder=folder, PYTHONPATH=str(ROOT))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        least = min(least, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return least


def test_the_list_of_commands_comes_at_once(tmp_path: Path) -> None:
    least = processor_s("-c", LEAST, folder=tmp_path)
    assert processor_s("-m", "deepar", "--help", folder=tmp_path) < 6 * least
    assert processor_s("-m", "deepar", "--version", folder=tmp_path) < 5 * least


SLOW = {"scipy", "matplotlib", "aiohttp", "sklearn", "opentelemetry", "distributed"}
HELPS = """
import os, sys, typer, rich
for name in sys.argv[1:]:
    sys.stdout.flush()
    if os.fork() == 0:
        sys.argv[1:] = [name, "--help"]
        from deploy import cli
        try: cli.main()
        finally: print(name, *sys.modules, file=sys.stderr)
    os.wait()
"""


@pytest.mark.parametrize("part", range(5))
def test_the_help_of_a_command_waits_for_nothing_that_takes_long(part: int, tmp_path: Path) -> None:
    names = {command.name for command in cli.COMMANDS[part::5]}
    done = python("-c", HELPS, *names, folder=tmp_path, PYTHONPATH=str(ROOT))
    imported = {name: set(modules) for name, *modules in map(str.split, done.stderr.splitlines())}
    assert imported.keys() == names, done.stderr
    assert {name: modules & SLOW for name, modules in imported.items() if modules & SLOW} == {}
    assert [name for name in names if f"deepar {name}" not in done.stdout] == []


def test_it_has_three_names_and_one_version(tmp_path: Path) -> None:
    for words in (("-m", "deepar", "--version"), ("-c", "from deepar.__main__ import main; main()", "--version")):
        done = python(*words, folder=tmp_path, PYTHONPATH=str(ROOT))
        assert (done.returncode, done.stdout) == (0, f"deepar {deepar.__version__}\n"), done.stderr
    assert metadata.version("deepar") == deepar.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"deepar": "deepar.__main__:main"}


@pytest.mark.parametrize("name", ROOMS)
@pytest.mark.parametrize("kind", ["package", "module", "folder"])
def test_a_package_of_the_users_that_hides_ours_is_named(name: str, kind: str, tmp_path: Path) -> None:
    if kind == "module":
        hiding = tmp_path / f"{name}.py"
        hiding.touch()
    else:
        hiding = tmp_path / name
        hiding.mkdir()
        (hiding / ("__init__.py" if kind == "package" else "data.csv")).touch()
    # Ours is behind the folder, as a site-packages is; a folder without __init__.py does not hide it from there.
    done = python("-m", "deepar", "--version", folder=tmp_path, PYTHONPATH=str(ROOT))
    if kind == "folder":
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 2
    assert f"{hiding} hides DeePar's own package `{name}`" in done.stderr
    assert "rename" in done.stderr
    assert "Traceback" not in done.stderr
    assert python("-P", "-m", "deepar", "--version", folder=tmp_path, PYTHONPATH=str(ROOT)).returncode == 0


def tab(folder: Path, typed: str, **environment: str) -> list[str]:
    """What bash is offered when TAB is pressed behind `typed`."""
    done = python(
        "-m",
        "deepar",
        folder=folder,
        PYTHONPATH=str(ROOT),
        _DEEPAR_COMPLETE="complete_bash",
        COMP_WORDS=typed,
        COMP_CWORD=str(len(typed.split()) - (not typed.endswith(" "))),
        **environment,
    )
    assert done.returncode == 0
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("deepar sim", ["simulate"]),
        ("deepar stage d", ["device"]),
        ("deepar planner --policy e", ["edge-only", "elastic"]),
        ("deepar simulate fig4a --policies deepar,no", ["deepar,no-delay"]),
        ("deepar plan alex", ["alexnet"]),
        ("deepar models show mi", ["mine.tflite"]),
        ("deepar loadgen replay --models lenet,alex", ["lenet,alexnet"]),
    ],
)
def test_tab_offers_what_there_is(typed: str, offered: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.tflite").touch()
    (tmp_path / "mine.txt").touch()
    assert tab(tmp_path, typed) == offered


@pytest.mark.parametrize(
    "typed", ["deepar explain ", "deepar stage device --edge ", "deepar loadgen replay --devices d1,"]
)
@pytest.mark.parametrize("silent", [False, True])
def test_tab_says_nothing_and_returns_where_the_broker_does_not_answer(
    typed: str, silent: bool, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and never says a word
        port = server.getsockname()[1] if silent else free_port()
        assert tab(tmp_path, typed, KAFKA_BOOTSTRAP_SERVERS=f"127.0.0.1:{port}") == []


def test_tab_offers_the_nodes_and_the_tasks_of_the_region() -> None:
    bus = MemoryBus()

    async def fill() -> None:
        async with bus:
            await bus.create_topics(topics.specs(partitions=Partitions(regions=2)))
            for node in (edge("e1"), edge("e2"), device("d1"), device("d2")):
                await bus.send(topics.NODES, messages.encode(node), key=node.node, partition=1)
            for task_id in ("old", "new"):
                await bus.send(topics.TASKS, messages.encode(task(task_id)), key=task_id, partition=1)
            await bus.send(topics.TASKS, b"garbage", key="x", partition=1)

    asyncio.run(fill())
    names = completion.RegionNames(lambda bootstrap_servers: bus)

    def context(region: int) -> Any:
        return SimpleNamespace(params={"region": region})

    assert names.edges(context(1), "") == ["e1", "e2"]
    assert names.devices(context(1), "d1,d") == ["d1,d1", "d1,d2"]
    assert names.tasks(context(1), "") == ["new", "old"]
    assert names.tasks(context(1), "o") == ["old"]
    assert names.tasks(context(0), "") == []
    assert names.tasks(context(7), "") == []
