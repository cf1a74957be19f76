"""The README's commands as separate processes on Kafka: digits are recognised, and faults are reported and stay contained."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from bus import messages, topics
from bus.decisions import DecisionLog
from bus.headers.tracing import chain, trace_id
from bus.kafka.bus import KafkaBus
from bus.kafka.connection import KafkaConnection
from bus.messages import Decision, LinkMeasurement, NodeHeartbeat, NodeJoined, NodeLost, Placed
from bus.port import Record
from deploy.kafka_local.ports import free_port
from tests import prometheus
from tests.documented import README, lines_of
from tests.integration.deepar_processes import Processes
from tests.kafka_broker import OwnBroker, choose, start_broker
from tests.otlp_collector import Collector, collecting
from tests.prometheus import Prometheus

REPLAY = "deepar loadgen replay --tasks 20 --within 20s"
MORE = {"d3": ("--results", "d3.jsonl")}
"""Arguments added to a command of the README, so that its results can be checked."""


def documented_services() -> list[str]:
    """The README's commands that start the planner and the stages."""
    return [line.text for line in lines_of(README) if line.text.startswith(("deepar planner", "deepar stage"))]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnBroker]:
    """A broker for this module alone, so that no other test uses its region."""
    made = start_broker(choose(), tmp_path_factory.mktemp("kafka"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """A receiver of the region's traces."""
    with collecting() as made:
        yield made


@pytest.fixture(scope="module")
def region(broker: OwnBroker, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Planner, cloud, two edges and three devices, all ready and sending their traces."""
    with Processes(broker.bootstrap, tmp_path_factory.mktemp("region")) as processes:
        processes.environment |= {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.address,
            "OTEL_BSP_SCHEDULE_DELAY": "300",
        }
        places = {"DEEPAR_MODELS": "lenet", "DEEPAR_HTTP_HOST": "127.0.0.1"}
        started = []
        for text in documented_services():
            words = text.split()[1:]
            name = words[-1] if words[-1] in ("planner", "cloud") else words[words.index("--name") + 1]
            started.append(processes.start(name, *words, *MORE.get(name, ()), environment=places))
        assert {one.name for one in started} == {"planner", "cloud", "e1", "e2", "d1", "d2", "d3"}
        for one in started:
            one.wait_ready()
        yield processes


@pytest.fixture(scope="module")
def scraping(region: Processes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus | None]:
    """Prometheus with the compose file's configuration, scraping the region; None if it is not installed."""
    programs = prometheus.available()
    if programs is None:
        yield None
        return
    folder = tmp_path_factory.mktemp("prometheus")
    config = prometheus.configuration(folder, {one.name: one.http_port for one in region.all}, scrape="1s")
    with prometheus.running(programs, config, folder) as made:
        yield made


def read_all(bootstrap: str, topic: str) -> list[Record]:
    """All records of a topic."""

    async def read() -> list[Record]:
        records: list[Record] = []
        async with KafkaBus(KafkaConnection(bootstrap_servers=bootstrap)) as bus:
            ends = await bus.end_offsets(topic)
            reader = await bus.reader([(topic, partition) for partition in ends], start="start")
            while await reader.lag():
                records += await reader.fetch(timeout_s=0.5)
            await reader.close()
        return records

    return asyncio.run(read())


def send_all(bootstrap: str, records: list[tuple[str, bytes, str | None]]) -> None:
    """Send (topic, value, key) records."""

    async def send() -> None:
        async with KafkaBus(KafkaConnection(bootstrap_servers=bootstrap)) as bus:
            for topic, value, key in records:
                await bus.send(topic, value, key=key)

    asyncio.run(send())


def test_twenty_tasks_complete_and_every_step_stands_on_the_topics(
    region: Processes, scraping: Prometheus | None
) -> None:
    assert REPLAY in {line.text for line in lines_of(README)}
    done = region.run(*REPLAY.split()[1:], "--samples", "20", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["submitted"], summary["completed"]) == (20, 20)

    tailed = region.run("tail", "decisions", "--json", "--exit")
    assert tailed.returncode == 0, tailed.stderr
    lines = [json.loads(line) for line in tailed.stdout.splitlines()]
    assert lines[0].keys() == {"topic", "partition", "offset", "timestamp", "key", "value"}
    changes = [change for line in lines for change in line["value"].get("changes", [])]
    placed = [change for change in changes if change["type"] == "placement"]
    assert len(placed) == 20
    assert sum(change["type"] == "start" for change in changes) == 20
    grants = sum(change["type"] == "bandwidth_grant" for change in changes)
    assert grants == sum(bool(p["placement"][f"link{n}_bps"]) for p in placed for n in (1, 2))
    ended = [change["task_id"] for change in changes if change["type"] == "ended"]
    assert len(ended) == len(set(ended)) == 20


def test_each_task_is_one_trace_across_the_processes(
    region: Processes, broker: OwnBroker, collector: Collector
) -> None:
    placed = {}
    for record in read_all(broker.bootstrap, topics.DECISIONS):
        message = messages.decode(topics.DECISIONS, record.value)
        for change in message.changes if isinstance(message, Decision) else ():
            if isinstance(change, Placed):
                placed[trace_id(change.task_id)] = change.placement
    assert len(placed) == 20
    wanted = {trace: {"task", "submit", "decision", *chain(placement)} for trace, placement in placed.items()}
    until_s = time.monotonic() + 20
    found: dict[str, dict[str, tuple[str, Span]]] = {}
    while {trace: spans.keys() for trace, spans in found.items()} != wanted and time.monotonic() < until_s:
        time.sleep(0.2)
        found = {}
        for known, span in list(collector.spans):
            found.setdefault(span.trace_id.hex(), {})[span.name] = (known["service.name"], span)
    assert {trace: spans.keys() for trace, spans in found.items()} == wanted
    for trace, spans in found.items():
        parts = chain(placed[trace])
        for child, parent in (
            ("submit", "task"),
            ("decision", "task"),
            *zip(parts, ("decision", *parts), strict=False),
        ):
            assert spans[child][1].parent_span_id == spans[parent][1].span_id
        services = {name: service for name, (service, _) in spans.items()}
        assert (services["submit"], services["task"]) == ("deepar-loadgen", "deepar-planner")
        assert all(services[part] == f"deepar-{part}" for part in parts if part in ("device", "edge", "cloud"))


def test_every_node_reports_plausible_latencies_of_its_links(region: Processes, broker: OwnBroker) -> None:
    """A device measures link 1 to each edge, an edge link 2 to the cloud."""
    wanted = {*((device, 1, edge) for device in ("d1", "d2", "d3") for edge in ("e1", "e2"))}
    wanted |= {(edge, 2, edge) for edge in ("e1", "e2")}
    found: dict[tuple[str, int, str], LinkMeasurement] = {}
    until_s = time.monotonic() + 10
    while found.keys() != wanted and time.monotonic() < until_s:
        events = [messages.decode(topics.EVENTS, record.value) for record in read_all(broker.bootstrap, topics.EVENTS)]
        heartbeats = [event for event in events if isinstance(event, NodeHeartbeat)]
        found = {(beat.node, one.link, one.edge): one for beat in heartbeats for one in beat.links}
    assert found.keys() == wanted
    assert all(0 < one.latency_s < 1 for one in found.values()), found


def test_results_come_back_to_their_device_each_once(region: Processes) -> None:
    lines = [json.loads(line) for line in (region.folder / "d3.jsonl").read_text().splitlines()]
    shown = [(line["task_id"], line["sample"]) for line in lines]
    assert shown
    assert len(shown) == len(set(shown))
    assert len(shown) % 20 == 0


def test_every_service_runs_on_uvloop_and_says_so(region: Processes) -> None:
    for one in region.all:
        assert one.wait_ready()["loop"] == "uvloop"
        first = next(json.loads(line) for line in one.text().splitlines() if '"starting"' in line)
        assert first["loop"] == "uvloop"


def test_garbage_on_any_topic_is_dead_lettered_with_its_cause_and_the_rest_goes_on(
    region: Processes, broker: OwnBroker
) -> None:
    garbage = msgpack.packb({"v": 99})
    written = [
        (topics.TASKS, b"garbage", "x"),
        (topics.EVENTS, b"\xff\xfe", None),
        (topics.NODES, b'{"type":"node_announced","v":7}', "x"),
        (topics.DECISIONS, b"garbage", "0"),
        (topics.activations_topic("e1"), garbage, "x"),
        (topics.ACTIVATIONS_CLOUD, b"", "x"),
        (topics.RESULTS, b"garbage", "d1"),
    ]
    send_all(broker.bootstrap, written)
    wanted = {topic for topic, *_ in written}
    until_s = time.monotonic() + 30
    buried: dict[str, dict[str, str]] = {}
    while time.monotonic() < until_s and buried.keys() < wanted:
        for record in read_all(broker.bootstrap, topics.DEAD_LETTER):
            headers = {key: value.decode() for key, value in record.headers}
            buried[headers["deepar_origin"].split("/")[0]] = headers
    assert buried.keys() == wanted
    assert {headers["deepar_cause"] for headers in buried.values()} == {"undecodable", "unknown_version"}
    again = region.run("loadgen", "replay", "--tasks", "4", "--within", "1s", "--seed", "9", "--json")
    assert json.loads(again.stdout)["completed"] == 4, again.stderr


def test_prometheus_has_data_for_every_panel_and_raises_the_alarm_that_is_due(
    region: Processes, scraping: Prometheus | None
) -> None:
    """After two replays, and the garbage that each node found."""
    if scraping is None:
        pytest.skip("Prometheus is not installed (DEEPAR_TEST_DOCKER=required fetches it)")
    targets = scraping.ask("targets")["activeTargets"]
    assert [target["health"] for target in targets] == ["up"] * len(region.all), targets
    dashboard = json.loads((prometheus.DEPLOY / "grafana/dashboards/deepar.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            found = scraping.value(target["expr"])
            assert found, f"panel {panel['title']}: {target['expr']} has no data"
            labels = {name for entry in found for name in entry["metric"]}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, panel["title"]

    def rules() -> dict[str, dict[str, Any]]:
        groups = scraping.ask("rules")["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    scraping.until(lambda: rules()["DeadLetters"]["state"] == "firing", "the alarm DeadLetters")
    known = rules()
    assert {rule["health"] for rule in known.values()} == {"ok"}
    alarmed = {alert["labels"]["node"] for alert in known["DeadLetters"]["alerts"]}
    assert alarmed == {"planner", "e1", "c1", "d1"}
    for name in ("NobodyLeads", "ServiceDown", "NotReady", "DeclaredLost", "WrongIdentity", "StalledAttempts"):
        assert known[name]["state"] == "inactive", known[name]


def test_a_model_that_no_device_has_is_refused_before_anything_is_submitted(region: Processes) -> None:
    failed = region.run("loadgen", "replay", "--tasks", "1", "--within", "1s", "--models", "lenett", "--json")
    assert failed.returncode == 2, failed.stderr
    assert "lenett" in failed.stderr
    assert "did you mean lenet" in failed.stderr.lower()
    assert failed.stdout == ""


def test_a_broker_that_is_not_there_is_named_within_seconds(region: Processes) -> None:
    address = f"127.0.0.1:{free_port()}"
    before_s = time.monotonic()
    failed = region.run("tail", "decisions", "-b", address)
    assert time.monotonic() - before_s < 10
    assert failed.returncode == 1
    assert address in failed.stderr
    assert "deepar broker" in failed.stderr


def test_a_service_ends_politely_when_asked_and_stages_say_first_that_they_drain(
    region: Processes, broker: OwnBroker
) -> None:
    planner, *stages = region.all
    before_s = time.monotonic()
    assert all(one.end() == 0 for one in (*stages, planner))
    assert time.monotonic() - before_s < 30
    assert [one.text()[one.text().index("Traceback") :][:3000] for one in region.all if "Traceback" in one.text()] == []
    told: dict[str, list[str]] = {}
    log = DecisionLog()
    for record in read_all(broker.bootstrap, topics.DECISIONS):
        decision = log.read(record)
        for change in decision.changes if isinstance(decision, Decision) else ():
            if isinstance(change, NodeJoined):
                story = told.setdefault(change.node.node, [])
                standing = "drains" if change.node.draining else "joined"
                if story[-1:] != [standing]:  # a stage that measured its profile anew announces itself again
                    story.append(standing)
            elif isinstance(change, NodeLost):
                told[change.node].append(change.cause)
    assert len(told) == len(stages)
    assert all(story == ["joined", "drains", "left"] for story in told.values()), told
