"""The commands of the user's pages that need a broker, run for real."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.kafka_local.ports import free_port
from tests.documented import ROOT
from tests.integration.deepar_processes import Processes
from tests.integration.test_docs import SERVED, Shell, pasted
from tests.kafka_broker import OwnBroker


def start(processes: Processes, text: str, environment: Mapping[str, str] | None = None) -> None:
    """Start a service as a page says, and wait until it is ready."""
    words = shlex.split(text)
    extra = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
    arguments = [word for word in words if "=" not in word][1:]
    processes.start(arguments[0], *arguments, environment=extra | dict(environment or {}))


def look(port: int) -> dict[str, Any]:
    """The state that the page of `deepar ui` receives; an empty one before it listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/state.json", timeout=5.0) as answer:
            return dict(json.load(answer))
    except OSError:
        return {"nodes": [], "counts": {}}


def test_commands_that_need_a_broker(kafka_own: OwnBroker, tmp_path: Path) -> None:
    """Own model and own policy as processes, then the quick start, its views, and the tool in plain Kafka."""
    shell = Shell(tmp_path, KAFKA_BOOTSTRAP_SERVERS=kafka_own.bootstrap)
    with Processes(kafka_own.bootstrap, tmp_path) as processes:
        for text in sorted(SERVED - {"deepar ui", "deepar up deploy/example.toml"}):
            start(processes, text)
        for one in processes.all:
            one.wait_ready()
        assert "5 completed" in shell.run("deepar loadgen replay --models MODEL --tasks 5")
        assert '"private-first"' in shell.run("deepar tail decisions --exit")
        for one in processes.all:
            one.end()

        port = free_port()
        start(processes, "deepar ui", {"DEEPAR_UI_PORT": str(port)})
        start(processes, "deepar up deploy/example.toml")
        until_s = time.monotonic() + 120.0
        while {"c1", "e1", "e2", "d1", "d2", "d3"} - {
            n["name"] for n in look(port)["nodes"] if n["standing"] == "joined"
        }:
            assert time.monotonic() < until_s, [one.text() for one in processes.all]
            time.sleep(0.2)
        printed = shell.run("deepar loadgen replay --tasks 20 --within 10s")
        shown = pasted("20 tasks submitted")
        assert printed.startswith(shown[: shown.index("tasks     mean")].rstrip())  # numbers differ
        seen = json.loads(shell.run("deepar top --json"))
        assert seen["counts"]["COMPLETED"] == 25
        assert {node["name"] for node in seen["nodes"] if node["standing"] == "joined"} >= {
            "c1",
            "e1",
            "e2",
            "d1",
            "d2",
        }
        for text in ("deepar top", "deepar top --once", "deepar top --replay --speed 5"):
            assert "25 completed" in shell.run(text)
        assert look(port)["counts"]["COMPLETED"] == 25
        # LeNet is fastest on the device, so only tasks of AlexNet send frames
        assert "2 completed" in shell.run(
            "deepar loadgen replay --models alexnet --devices d2,d3 --tasks 2 --within 2s"
        )
    tool = subprocess.run(
        [sys.executable, str(ROOT / "docs/examples/watch.py"), kafka_own.bootstrap],
        capture_output=True,
        text=True,
        timeout=120.0,
        cwd=tmp_path,
        check=False,
    )
    assert tool.returncode == 0, tool.stderr
    assert tool.stdout.count(": COMPLETED") == 27
    assert "frame of " in tool.stdout
    assert "float32" in tool.stdout
