"""Alarms and dashboard ask for numbers that services really give, and every alarm is explained."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

import deploy
from deploy.probes import Health, _Collector

ROOT = Path(deploy.__file__).parents[1]
ALARMS = ROOT / "deploy" / "prometheus" / "alarms.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "deepar.json"


def given() -> set[str]:
    """The metrics of all services, by name, as /metrics prints them."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "stages").glob("*.py"))
    counted = set(re.findall(r"\.count\(\"(\w+)\"", text))
    counted |= {f"{part}_busy_seconds" for part in ("device", "link1", "edge", "link2", "cloud", "result")}
    text = (ROOT / "deploy" / "nodes.py").read_text(encoding="utf-8")
    counted |= set(re.findall(r"\"(link\d_bytes|decisions|wrong_identity)\":", text)) | set(
        re.findall(r"counters\[\"(\w+)\"\]", text)
    )
    gauges = set(re.findall(r"\"(leading|tasks)\":", text))
    registry = CollectorRegistry()
    health = Health(True, {}, dict.fromkeys(gauges, 1.0), dict.fromkeys(counted, 1.0))
    registry.register(_Collector(lambda: health, {"role": "edge", "node": "e1", "region": "0"}, lambda: 0.0))
    return set(re.findall(r"^(deepar_\w+)\{", generate_latest(registry).decode(), re.M))


@pytest.mark.parametrize("file", [ALARMS, DASHBOARD], ids=lambda file: file.name)
def test_what_is_asked_for_is_there(file: Path) -> None:
    asked = set(re.findall(r"deepar_\w+", file.read_text(encoding="utf-8")))
    assert asked
    assert not asked - given()


def test_the_dashboard_finds_its_source() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    uids = {panel["datasource"]["uid"] for panel in dashboard["panels"]}
    assert uids == {"prometheus"}
    assert "uid: prometheus" in (DASHBOARD.parents[1] / "datasource.yml").read_text(encoding="utf-8")


def test_every_alarm_is_explained() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    names = re.findall(r"alert: (\w+)", ALARMS.read_text(encoding="utf-8"))
    assert len(names) >= 6
    for name in names:
        assert f"`{name}`" in page, name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus' own checker is not installed")
def test_prometheus_accepts_the_alarms() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", ALARMS], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
