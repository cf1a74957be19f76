"""Alarms and dashboard ask for numbers that services really give, and every alarm is explained."""

from __future__ import annotations

import json
import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

import deploy
from bus import topics
from bus.frames import MAX_FRAME_BYTES
from bus.messages import LinkMeasurement
from deploy.services.planner_process import planner_counters
from deploy.services.telemetry.learned_gauges import MOST, by_region, learned_gauges
from deploy.services.telemetry.probes import Health, _Collector
from planner.core.core import PlannerCore
from planner.service.task_statistics import TaskStatistics
from stages.membership.status import ALARMED
from tests.prometheus import configuration, find_programs
from tests.unit.planner.core.test_learning import Region, Truth
from tests.unit.planner.scenes import RandomRegion, device, edge

ROOT = Path(deploy.__file__).parents[1]
ALARMS = ROOT / "deploy" / "prometheus" / "alarms.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "deepar.json"


def metrics_text() -> str:
    """/metrics with a value of everything that any service counts."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "stages").rglob("*.py"))
    counted = set(re.findall(r"\.count\(\"(\w+)\"", text)) | {*ALARMED}
    counted |= set(re.findall(r"\"(link\d_bytes)\":", text))
    counted |= {f"{part}_busy_seconds" for part in ("device", "link1", "edge", "link2", "cloud", "result")}
    text += "".join(
        (ROOT / "deploy" / "services" / file).read_text(encoding="utf-8")
        for file in ("wiring.py", "planner_process.py")
    )
    counted |= planner_counters([]).keys()
    counted |= set(re.findall(r"counters\[\"(\w+)\"\]", text))
    gauges = set(re.findall(r"\"(tasks|failing_nodes)\":", text))
    registry = CollectorRegistry()
    statistics = TaskStatistics()
    for decision in RandomRegion(PlannerCore(0), 1, validate=False).run().log:
        statistics.record(decision)
    health = Health(
        ready=True,
        detail={},
        gauges=dict.fromkeys(gauges, 1.0),
        counters=dict.fromkeys(counted, 1.0),
        leading={"0": True},
        statistics={"0": statistics, "7": statistics},
        learned=by_region({"0": taught()}),
    ).without({})
    registry.register(_Collector(lambda: health, {"role": "edge", "node": "e1", "region": "0"}, lambda: 0.0))
    return generate_latest(registry).decode()


def taught(edges: int = 1) -> PlannerCore:
    """A planner that has learned the speed of nodes and the latency of links."""
    names = [f"e{number}" for number in range(1, edges + 1)]
    region = Region(Truth(factor={"e1": 3.0}), *(edge(name) for name in names), device(), policy="edge-only")
    for name in names:
        region.heartbeat(LinkMeasurement(link=1, edge=name, latency_s=0.02))
        region.heartbeat(LinkMeasurement(link=2, edge=name, latency_s=0.04), node=name)
    region.run(4)
    return region.core


def test_what_was_learned_is_exported_with_names_of_nodes_models_and_links() -> None:
    core = taught(edges=2)
    found = learned_gauges(core)
    factors = {series.labels: series.value for series in found.factors}
    assert factors == {
        (node, model, str(alone).lower()): core.estimates.node(node, model, alone).a
        for node, model, alone in core.estimates.nodes
    }
    assert any(value != 1.0 for value in factors.values())
    assert [series.labels for series in found.latencies_s] == [
        ("2", "", "e1"), ("2", "", "e2"), ("1", "d1", "e1"), ("1", "d1", "e2"),
    ]  # fmt: skip
    assert [series.value for series in found.latencies_s] == [0.04, 0.04, 0.02, 0.02]
    text = metrics_text()
    assert (
        'deepar_learned_latency_seconds{device="d1",edge="e1",link="1",node="e1",region="0",role="edge"} 0.02' in text
    )


def test_the_number_of_learned_series_is_bounded_and_edges_come_before_devices() -> None:
    core = taught(edges=MOST)
    assert len(core.estimates.links) == 2 * MOST
    found = learned_gauges(core)
    assert len(found.latencies_s) == MOST
    assert {series.labels[0] for series in found.latencies_s} == {"2"}


def given() -> set[str]:
    """The metrics of all services, by name, as /metrics prints them."""
    return set(re.findall(r"^(deepar_\w+)\{", metrics_text(), re.M))


def test_every_metric_has_a_sentence_that_says_more_than_its_name() -> None:
    helps = dict(re.findall(r"^# HELP (\w+) (.*)$", metrics_text(), re.M))
    assert len(helps) > 20
    assert len(set(helps.values())) == len(helps)
    for name, sentence in helps.items():
        words = name.removeprefix("deepar_").removesuffix("_total").replace("_", " ")
        assert re.fullmatch(r"[A-Z1].{20,}\.", sentence), (name, sentence)
        assert sentence.lower().rstrip(".") != words


def test_histograms_are_cumulative_and_stand_under_their_own_region() -> None:
    samples = re.findall(
        r"^deepar_(task_delay_seconds|prediction_ratio)_bucket\{(.*)\} ([0-9.]+)$", metrics_text(), re.M
    )
    series: dict[tuple[str, frozenset[tuple[str, str]]], list[float]] = {}
    for name, labels, value in samples:
        others = frozenset(pair for pair in re.findall(r'(\w+)="([^"]*)"', labels) if pair[0] != "le")
        assert {"role", "node", "region", "kind"} <= {label for label, _ in others}
        series.setdefault((name, others), []).append(float(value))
    for counts in series.values():
        assert counts == sorted(counts)
        assert counts[-1] > 0
    assert {(name, dict(labels)["region"]) for name, labels in series} == {
        (name, region) for name in ("task_delay_seconds", "prediction_ratio") for region in ("0", "7")
    }


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


def promtool(*words: str | Path) -> None:
    """Prometheus' own checker must be content."""
    done = subprocess.run([find_programs().promtool, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_accepts_the_configuration_and_the_alarms(tmp_path: Path) -> None:
    promtool("check", "config", configuration(tmp_path, {"planner": 1}))
    promtool("check", "rules", ALARMS)


E1 = '{role="edge", node="e1", region="0"}'
PLANNER = '{role="planner", node="p1", region="0"}'
ANOTHER_REGION_S = '{role="planner", node="p2", region="1"}'
NOBODY = "no planner leads {}: tasks wait, nothing is decided"
D1 = '{role="device", node="d1", region="0"}'
WHEN_IT_FIRES = {
    "NobodyLeads": (f"deepar_leading{PLANNER}", "1 1 1 1 0 0 0 0 0 0", "25s", "45s"),
    "ServiceDown": ('up{job="deepar", instance="e1:9464"}', "1 1 1 1 0 0 0 0 0 0", "25s", "45s"),
    "NotReady": (f"deepar_ready{E1}", "1 1 1 1 0 0 0 0 0 0 0 0 0 0", "45s", "65s"),
    "TopicMissing": (f"deepar_missing_topics{E1}", "0 0 0 0 1 1 1 1 1 1", "30s", "40s"),
    "DeadLetters": (f"deepar_dead_letters_total{E1}", "0 0 0 0 1 1 1 1 1 1", "15s", "25s"),
    "PolicyErrors": (f"deepar_policy_errors_total{PLANNER}", "0 0 0 0 1 1 1 1 1 1", "15s", "25s"),
    "InputFailures": (f"deepar_input_failures_total{PLANNER}", "0 0 0 0 1 1 1 1 1 1", "15s", "25s"),
    "WrongIdentity": (f"deepar_wrong_identity_total{PLANNER}", "0 0 0 0 1 1 1 1 1 1", "15s", "25s"),
    "DeclaredLost": (f"deepar_declared_lost_total{E1}", "0 0 0 1 5 5 5 5 5 5", "15s", "25s"),
    "LoopLag": (f"deepar_loop_lag_seconds{E1}", "0 0 0.1 0.1 0.6 0.6 0.6 0.6 0.6 0.6", "25s", "45s"),
    "RecordsLost": (f"deepar_decisions_missed_total{D1}", "0 0 0 0 1 1 1 1 1 1", "15s", "25s"),
    "TasksFail": (
        'deepar_task_delay_seconds_count{role="planner", node="p1", region="0", outcome="failed", kind="edge"}',
        "0 0 0 0 5 5 5 5 5 5",
        "15s",
        "25s",
    ),
    "PredictionsWrong": (f"deepar_prediction_error_median{PLANNER}", "0.5x4 0.6 0.6 0.6 0.6 0.6", "20s", "30s"),
    "AttemptsKeepFailing": (f"deepar_failing_nodes{PLANNER}", "0 0 0 0 1 1 1 1 1 1", "25s", "45s"),
    "StalledAttempts": (f"deepar_stalled_attempts_total{D1}", "0 0 0 0 1 1 1 1 1 1", "15s", "25s"),
}
"""For each alarm a series, its values every five seconds, a moment before it is due and one after."""


def label_in(labels: dict[str, str], match: re.Match[str]) -> str:
    """What stands for a label in an alarm's text."""
    return labels[match[1]]


def ratio_counts(*counts: int) -> list[dict[str, str]]:
    """How many tasks of each kind the planner has compared with their predictions."""
    kinds = zip(("device", "edge", "cloud"), counts, strict=False)
    name = "deepar_prediction_ratio_count"
    return [
        {"series": f'{name}{{role="planner", node="p1", region="0", kind="{kind}"}}', "values": f"{number}x20"}
        for kind, number in kinds
    ]


def test_each_alarm_fires_when_it_is_due_and_not_before(tmp_path: Path) -> None:
    rules = yaml.safe_load(ALARMS.read_text(encoding="utf-8"))["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} == WHEN_IT_FIRES.keys()
    tests = []
    for name, (series, values, before, after) in WHEN_IT_FIRES.items():
        labels = dict(re.findall(r'(\w+)="([^"]*)"', series))
        if name in ("NobodyLeads", "TasksFail"):  # of a region, not of one service
            labels = {"region": "0"}
        told = next(rule for rule in rules if rule["alert"] == name)["annotations"]["summary"]
        told = NOBODY.format("region 0") if name == "NobodyLeads" else told
        told = re.sub(r"{{ \$labels\.(\w+) }}", partial(label_in, labels), told)
        others = [] if name == "NobodyLeads" else [{"series": f"deepar_leading{PLANNER}", "values": "1x20"}]
        if name == "PredictionsWrong":
            others += ratio_counts(20, 30)
        tests.append(
            {
                "interval": "5s",
                "input_series": [{"series": series, "values": values}, *others],
                "alert_rule_test": [
                    {"eval_time": before, "alertname": name, "exp_alerts": []},
                    {
                        "eval_time": after,
                        "alertname": name,
                        "exp_alerts": [{"exp_labels": labels, "exp_annotations": {"summary": told}}],
                    },
                ],
            }
        )
    file = tmp_path / "alarms_test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALARMS)], "evaluation_interval": "5s", "tests": tests}))
    promtool("test", "rules", file)


@pytest.mark.parametrize(
    ("series", "region"),
    [
        ({"up": "1x10"}, None),  # no planner exists
        ({f"deepar_ready{E1}": "1x10"}, "0"),  # stages without a planner
        # Each region has a planner of its own, and one of them is killed: Prometheus marks its series as stale.
        (
            {
                f"deepar_leading{PLANNER}": "1 1 stale",
                f"deepar_ready{E1}": "1x10",
                f"deepar_leading{ANOTHER_REGION_S}": "1x10",
                f"deepar_ready{ANOTHER_REGION_S}": "1x10",
            },
            "0",
        ),
        # A process that plans for both leads one of them only.
        ({f"deepar_leading{PLANNER}": "0x10", f"deepar_leading{ANOTHER_REGION_S}": "1x10"}, "0"),
    ],
    ids=["nobody there", "no planner", "one region's planner", "one region of two"],
)
def test_nobody_leads(series: dict[str, str], region: str | None, tmp_path: Path) -> None:
    told = NOBODY.format("any region" if region is None else f"region {region}")
    due = {
        "eval_time": "35s",
        "alertname": "NobodyLeads",
        "exp_alerts": [
            {"exp_labels": {} if region is None else {"region": region}, "exp_annotations": {"summary": told}}
        ],
    }
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    tests = [{"interval": "5s", "input_series": inputs, "alert_rule_test": [due]}]
    file = tmp_path / "alarms_test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALARMS)], "evaluation_interval": "5s", "tests": tests}))
    promtool("test", "rules", file)


@pytest.mark.parametrize(
    ("series", "fires"),
    [
        ([{"series": f"deepar_leading{PLANNER}", "values": "1x20"}, *ratio_counts(20, 30)], True),
        ([{"series": f"deepar_leading{PLANNER}", "values": "1x20"}, *ratio_counts(20, 29)], False),
        # a deposed planner keeps the median of the tasks that it had seen
        ([{"series": f"deepar_leading{PLANNER}", "values": "0x20"}, *ratio_counts(20, 30)], False),
    ],
    ids=["fifty tasks", "fewer", "another leads"],
)
def test_predictions_are_judged_by_the_leader_after_fifty_tasks(
    series: list[dict[str, str]], fires: bool, tmp_path: Path
) -> None:
    told = "half of the last 50 tasks of region 0 took over 50 % more or less than predicted"
    labels = dict(re.findall(r'(\w+)="([^"]*)"', PLANNER))
    due = [{"exp_labels": labels, "exp_annotations": {"summary": told}}]
    tests = [
        {
            "interval": "5s",
            "input_series": [{"series": f"deepar_prediction_error_median{PLANNER}", "values": "0.51x20"}, *series],
            "alert_rule_test": [
                {"eval_time": "30s", "alertname": "PredictionsWrong", "exp_alerts": due if fires else []}
            ],
        }
    ]
    file = tmp_path / "alarms_test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALARMS)], "evaluation_interval": "5s", "tests": tests}))
    promtool("test", "rules", file)


def test_the_console_decodes_the_topics_that_hold_frames_and_no_others() -> None:
    """Redpanda Console 2: `kafka.messagePack`, names in slashes are patterns; `console.maxDeserializationPayloadSize`."""
    config = yaml.safe_load((ROOT / "deploy" / "console" / "config.yml").read_text(encoding="utf-8"))
    assert config["kafka"]["messagePack"]["enabled"] is True
    names = config["kafka"]["messagePack"]["topicNames"]
    assert config["console"]["maxDeserializationPayloadSize"] >= MAX_FRAME_BYTES

    def decodes(topic: str) -> bool:
        return any(re.search(name.strip("/"), topic) if name.startswith("/") else name == topic for name in names)

    for spec in topics.specs(["e1"]):
        assert decodes(spec.name) is (topics.row(spec.name).encoding is topics.Encoding.MSGPACK), spec.name
    for line in (ROOT / "deploy" / "docker-compose.yml").read_text(encoding="utf-8").splitlines():
        if "redpandadata/console" in line:
            assert ":v2." in line, "version 3 has these settings elsewhere (serde)"
