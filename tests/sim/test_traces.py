"""A replay on the embedded bus gives one trace a task: the spans of its placement, each the child of the one before."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import defaultdict

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from bus import messages, topics
from bus.headers.tracing import Span, chain, parent_in, span_id, trace_id, traceparent
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import Decision, Placed, SeedInput, TaskCompleted, TaskSubmitted
from bus.port import Record
from bus.values import Placement
from deploy.kafka_local.ports import free_port
from deploy.services import wiring
from deploy.services.telemetry.otel import OtelSink, tracing, wanted
from loadgen.replay.replay import Observers, replay
from loadgen.replay.schedule import Entry, Schedule
from loadgen.sim.virtual_loop import run_virtual
from tests.known import known
from tests.otlp_collector import collecting
from tests.sim.world import World, WorldOptions, task, world

TASKS = 24
POLICIES = ("deepar", "device-only", "edge-only", "cloud-only")


async def _traced(policy: str, sink: OtelSink | None, spans: list[Span] | None = None, tasks: int = TASKS) -> World:
    """A replay of the toy region, told to a sink."""

    def tell(span: Span) -> None:
        if spans is not None:
            spans.append(span)
        if sink is not None:
            sink(span)

    async with world(
        WorldOptions(slots=2, policy=policy), on_span=tell if sink or spans is not None else None
    ) as region:
        entries = tuple(Entry(at_s=n * 0.05, task=task(n, f"d{n % 3 + 1}", samples=6)) for n in range(tasks))
        on_span = tell if sink or spans is not None else None
        await replay(region.bus, Schedule(entries=entries), drain_timeout_s=60.0, observers=Observers(on_span=on_span))
        await asyncio.sleep(1.0)
    return region


async def _records(region: World, topic: str) -> list[Record]:
    async with type(region.bus)(region.broker, "reader") as bus:
        reader = await bus.reader([(topic, n) for n in range(await bus.partitions(topic))], start="start")
        found: list[Record] = []
        while await reader.lag():
            found += await reader.fetch()
        return found


async def _story(region: World) -> tuple[dict[str, Placement], dict[str, TaskCompleted]]:
    placed: dict[str, Placement] = {}
    for record in await _records(region, topics.DECISIONS):
        message = messages.decode(topics.DECISIONS, record.value)
        for change in message.changes if isinstance(message, Decision) else ():
            if isinstance(change, Placed):
                placed[change.task_id] = change.placement
    events = [messages.decode(topics.EVENTS, record.value) for record in await _records(region, topics.EVENTS)]
    return placed, {event.task_id: event for event in events if isinstance(event, TaskCompleted)}


@pytest.mark.parametrize("policy", POLICIES)
def test_each_task_is_one_trace_with_the_spans_of_its_placement(policy: str) -> None:
    exporter = InMemorySpanExporter()

    async def run() -> tuple[dict[str, Placement], dict[str, TaskCompleted]]:
        return await _story(await _traced(policy, OtelSink(SimpleSpanProcessor(exporter), "test")))

    placed, completed = run_virtual(run())
    traces: dict[int, dict[str, ReadableSpan]] = defaultdict(dict)
    for span in exporter.get_finished_spans():
        assert span.context is not None
        assert span.name not in traces[span.context.trace_id], "a span came twice"
        traces[span.context.trace_id][span.name] = span
    assert traces.keys() == {int(trace_id(f"t{n}"), 16) for n in range(TASKS)}
    for name, placement in placed.items():
        spans = traces[int(trace_id(name), 16)]
        parts = chain(placement)
        assert spans.keys() == {"task", "submit", "decision", *parts}
        assert all(known(span.attributes)["deepar.task"] == name for span in spans.values())
        times = {part: (known(span.start_time), known(span.end_time)) for part, span in spans.items()}
        assert all(begin <= end for begin, end in times.values())
        assert spans["task"].parent is None
        for child, parent in (
            ("submit", "task"),
            ("decision", "task"),
            *zip(parts, ("decision", *parts), strict=False),
        ):
            assert known(spans[child].parent).span_id == known(spans[parent].context).span_id, (
                f"{name}: {child} of {parent}"
            )
        for part in parts:
            measured_s = getattr(completed[name].measured, f"{part}_s")
            assert known(spans[part].attributes)["deepar.busy_s"] == pytest.approx(measured_s)
            begin, end = times[part]
            assert end - begin >= measured_s * 1e9 - 1e3
            assert times["task"][0] <= begin
        assert spans["task"].status.status_code is StatusCode.UNSET


def test_headers_carry_the_trace_and_what_each_message_is() -> None:
    async def run() -> dict[str, list[Record]]:
        region = await _traced("cloud-only", None)
        names = (topics.TASKS, topics.DECISIONS, topics.EVENTS, topics.NODES, topics.RESULTS, topics.ACTIVATIONS_CLOUD)
        return {name: await _records(region, name) for name in names}

    records = run_virtual(run())
    seen: set[tuple[bytes, bytes]] = set()
    for topic in (topics.TASKS, topics.DECISIONS, topics.EVENTS, topics.NODES):
        for record in records[topic]:
            headers = dict(record.headers)
            assert headers["content-type"] == b"application/json"
            assert headers["ce_specversion"] == b"1.0"
            assert headers["ce_type"] == f"deepar.{messages.decode(topic, record.value).type}".encode()
            assert headers["ce_source"].startswith(b"/deepar/0/")
            seen.add((headers["ce_source"], headers["ce_id"]))
    assert len(seen) == sum(
        len(records[topic]) for topic in (topics.TASKS, topics.DECISIONS, topics.EVENTS, topics.NODES)
    )
    assert all(parent_in(record.headers, str(record.key)) for record in records[topics.TASKS])
    for topic in (topics.ACTIVATIONS_CLOUD, topics.RESULTS):
        assert sum("traceparent" in dict(record.headers) for record in records[topic]) == TASKS, topic
    for record in records[topics.ACTIVATIONS_CLOUD]:
        if record.headers:
            assert parent_in(record.headers, str(record.key)) in {
                span_id(str(record.key), "link2", 1, edge) for edge in ("e1", "e2")
            }


def test_the_same_run_without_a_sink_is_the_same_run() -> None:
    """What is decided and when does not know of traces."""

    async def run(spans: list[Span] | None) -> list[tuple[float, str, str, str]]:
        return (await _traced("deepar", None, spans)).trace

    told: list[Span] = []
    assert run_virtual(run(None)) == run_virtual(run(told))
    assert len(told) > 3 * TASKS


def test_a_task_that_fails_says_so_in_its_trace() -> None:
    async def run() -> list[Span]:
        spans: list[Span] = []
        async with world(on_span=spans.append) as region:
            unknown = TaskSubmitted(task_id="odd", device="d1", model="none", samples=1, input=SeedInput(seed=1))
            await replay(region.bus, Schedule(entries=(Entry(at_s=0.0, task=unknown),)), drain_timeout_s=30.0)
        return spans

    (root,) = run_virtual(run())
    assert (root.name, root.parent_id) == ("task", None)
    assert root.failed


def test_a_planner_that_takes_over_repeats_nothing_and_knows_when_a_task_began() -> None:
    """The first planner ends after the admission; the second sends the root span once, from the true beginning."""

    async def run() -> tuple[list[Span], list[Span]]:
        broker = MemoryBroker()
        first: list[Span] = []
        second: list[Span] = []
        async with MemoryBus(broker, "test") as bus:
            await wiring.create_missing_topics(bus)
            one, two = (wiring.make_planner(bus, wiring.PlannerSetup(name=name)) for name in ("p1", "p2"))
            one.trace_to(first.append)
            two.trace_to(second.append)
            leading = asyncio.create_task(one.run())
            await asyncio.sleep(0.5)
            waits = TaskSubmitted(
                task_id="t", device="d1", model="toy", samples=1, input=SeedInput(seed=1), deadline_s=20.0
            )
            await bus.send(topics.TASKS, messages.encode(waits), key="t", partition=0)
            await asyncio.sleep(0.5)
            leading.cancel()
            await asyncio.wait({leading})
            taking = asyncio.create_task(two.run())
            await asyncio.sleep(30.0)
            taking.cancel()
            await asyncio.wait({taking})
        return first, second

    first, second = run_virtual(run())
    assert first == []
    (root,) = second
    assert root.name == "task"
    assert root.end_s - root.begin_s == pytest.approx(20.0, abs=0.5)
    assert "EXPIRED" in root.failed


def test_a_foreign_parent_is_taken_and_a_wrong_one_is_not() -> None:
    mine = span_id("t1", "link1", 1, "d1")
    assert parent_in((("traceparent", traceparent("t1", mine)),), "t1") == mine
    foreign = f"00-{trace_id('t1')}-00f067aa0ba902b7-01".encode()
    assert parent_in((("other", b"x"), ("traceparent", foreign)), "t1") == "00f067aa0ba902b7"
    for wrong in (traceparent("t2", mine), b"", b"00-xyz", f"00-{trace_id('t1')}-{'0' * 16}-01".encode()):
        assert parent_in((("traceparent", wrong),), "t1") is None


def test_spans_reach_a_collector_that_the_variables_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with tracing("deepar-test") as sink:
            assert isinstance(sink, OtelSink)
            for number in range(3):
                sink(Span(f"t{number}", "task", span_id(f"t{number}", "task"), None, 0.0, 1.0))

    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        asyncio.run(run())
    for resource, _ in collector.spans:
        assert resource["service.name"] == "deepar-test"
        assert resource["deployment.environment"] == "test"
    names = sorted(span.trace_id.hex() for _, span in collector.spans)
    assert names == sorted(trace_id(f"t{number}") for number in range(3))


def test_a_collector_that_is_away_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")

    async def run() -> float:
        async with tracing("deepar-test", closing_s=0.2) as sink:
            assert sink is not None
            sink(Span("t", "task", span_id("t", "task"), None, 0.0, 1.0))
            return time.monotonic()

    began_s = asyncio.run(run())  # its end waits for the threads of the loop, and must find none
    assert time.monotonic() - began_s < 6.0  # one try of the exporter alone takes ten


def test_off_by_default_and_nothing_imported() -> None:
    assert not wanted({})
    assert not wanted({"OTEL_EXPORTER_OTLP_ENDPOINT": ""})
    assert wanted({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318"})
    assert wanted({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x:4318/v1/traces"})
    assert not wanted({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"})
    assert not wanted({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"})
    script = (
        "import asyncio, sys, deploy.commands.services.stage, deploy.commands.loadgen.replay\n"
        "from deploy.services.telemetry.otel import tracing\n"
        "async def main():\n"
        "    async with tracing('x', {}) as sink:\n"
        "        assert sink is None\n"
        "asyncio.run(main())\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
