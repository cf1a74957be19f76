"""The page of `deepar ui` in a real headless Chromium, fed by a real region on the embedded bus."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console

from bus import messages, topics
from bus.messages import Message, NodeHeartbeat, NodeJoined, TaskFailed
from bus.port import Record
from bus.text.units import format_seconds
from deploy.monitor.region_feed import follow
from deploy.monitor.region_report import report
from deploy.monitor.region_view import RegionView
from deploy.monitor.top import screen
from deploy.monitor.ui import serve
from tests.browser import Page, open_page
from tests.sim.world import WorldOptions, task, world
from tests.unit.deploy.monitor.test_region_view import DEVICE, EDGE, Topics, admitted, completed, placed, start

TASKS = 60
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


class Collector(Topics):
    """Keeps records in place of reading them."""

    def __init__(self, like: Topics, records: list[Record]) -> None:
        self.records = records
        self.view, self.offsets, self.seq, self.clock_ms = like.view, like.offsets, like.seq, like.clock_ms

    def send(self, topic: str, message: Message | bytes) -> None:
        self.records.append(self.record(topic, message))


READ_TIMELINE = """[...document.querySelectorAll('.task')].map((row) => ({
    task: row.dataset.task, state: row.dataset.state, text: row.querySelector('em').textContent,
    plan: row.querySelectorAll('.plan span').length, real: row.querySelectorAll('.real span').length}))"""
READ_NUMBERS = """Object.fromEntries([...document.querySelectorAll('#numbers div')].map(
    (pair) => [pair.dataset.name, pair.querySelector('dd').textContent]))"""
READ_EDGES = """[...document.querySelectorAll('[data-edge]')].map((row) => ({
    edge: row.dataset.edge, held: row.querySelectorAll('.slots i.held').length,
    links: [...row.querySelectorAll('.bar')].map((bar) => [...bar.children].map((part) => part.style.width))}))"""


async def at_rest(page: Page, view: RegionView) -> dict[str, Any]:
    """What the view tells, once the page has drawn exactly that."""
    while True:
        told = report(view)
        await page.until(f"Number(document.body.dataset.version) >= {told['version']}")
        if told["version"] == view.version:
            return told


async def test_the_page_shows_a_running_replay_as_its_topics_tell_it(tmp_path: Path) -> None:
    async with world(WorldOptions(slots=1, link1_bps=100_000_000, link2_bps=10_000_000)) as region:
        view = RegionView()
        following = asyncio.create_task(follow(region.bus, view))
        async with serve(view, host="127.0.0.1", port=0) as address, open_page(tmp_path) as page:
            await page.open(address)
            await page.until("document.querySelectorAll('[data-edge]').length === 2")
            tasks = [task(n, f"d{n % 3 + 1}", samples=6) for n in range(TASKS)]
            replaying = asyncio.create_task(region.replay(tasks, gap_s=0.05))
            # under way: what runs holds links, what waits is listed with what it waits for
            await page.until("document.querySelectorAll('.bar span').length > 0")
            await page.until("document.querySelectorAll('#waiting li').length > 0")
            waits = await page.evaluate("document.querySelector('#waiting li').textContent")
            assert " for " in waits
            await replaying
            hostile = TaskFailed(task_id="t0", attempt=9, node="d1", cause="other", detail=HOSTILE)
            await region.bus.send(topics.EVENTS, messages.encode(hostile), key="t0", partition=0)
            await page.until("document.getElementById('lines').textContent.includes('onerror')")
            await page.evaluate("document.getElementById('window').value = ''")
            told = await at_rest(page, view)
            await page.evaluate("draw()")

            drawn = {row["task"]: row for row in await page.evaluate(READ_TIMELINE)}
            assert drawn.keys() == {f"t{n}" for n in range(TASKS)} == {entry["task_id"] for entry in told["tasks"]}
            for entry in told["tasks"]:
                row = drawn[entry["task_id"]]
                assert row["state"] == entry["state"] == "COMPLETED"
                assert row["plan"] == sum(value > 0 for value in entry["predicted"].values())
                assert row["real"] == sum(value > 0 for value in entry["measured"].values())
                assert row["text"] == format_seconds(view.tasks[entry["task_id"]].delay_s or 0.0)
            numbers = await page.evaluate(READ_NUMBERS)
            assert numbers["completed"] == str(TASKS)
            assert numbers["decisions"] == f"{told['planner']['decisions']:,}"
            assert numbers["mean delay"] == format_seconds(told["delay_s"]["mean"])
            for row in await page.evaluate(READ_EDGES):
                assert (row["held"], row["links"]) == (0, [[], []])

            # the page shows the text of stages as text, not as HTML
            assert await page.evaluate("document.querySelectorAll('main img, main script').length") == 0
            assert page.complaints == []
            foreign = "document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:1/'}))"
            await page.evaluate(f"{foreign}; new Promise((done) => setTimeout(done, 300))")
            assert any("Content Security Policy" in complaint for complaint in page.complaints)
            assert (await page.picture())[:8] == b"\x89PNG\r\n\x1a\n"
        following.cancel()


def one_event(region: Topics, number: int, now_s: float) -> None:
    """The next of four: a task is placed and started, two heartbeats, it ends."""
    name = f"t{number // 4}"
    match number % 4:
        case 0:
            region.decide(now_s, admitted(name), placed(name, now_s, now_s), start(name, now_s))
        case 1 | 2:
            region.send(topics.EVENTS, NodeHeartbeat(node="e1", incarnation="i2"))
        case _:
            region.decide(now_s, completed(name))


async def test_the_page_keeps_up_with_two_thousand_events_a_second(tmp_path: Path) -> None:
    region = Topics()
    region.decide(0.0, NodeJoined(node=DEVICE), NodeJoined(node=EDGE))
    rate_per_s, for_s = 2000, 4.0

    async def storm() -> None:
        """Tasks that come, run and end, and heartbeats between them, on schedule."""
        began_s, sent = time.monotonic(), 0
        while sent < rate_per_s * for_s:
            due = min(rate_per_s * for_s, (time.monotonic() - began_s) * rate_per_s)
            while sent < due:
                one_event(region, sent, sent / rate_per_s)
                sent += 1
            await asyncio.sleep(0.01)

    async with serve(region.view, host="127.0.0.1", port=0) as address, open_page(tmp_path) as page:
        await page.open(address)
        await page.until("document.querySelectorAll('[data-edge]').length === 1")
        await page.evaluate(
            """window.longest = 0; window.before = performance.now();
            requestAnimationFrame(function step(at) {
                window.longest = Math.max(window.longest, at - window.before);
                window.before = at;
                requestAnimationFrame(step);
            }); window.drawnBefore = state.drawn; 0"""
        )
        await storm()
        ended_s = time.monotonic()
        told = await at_rest(page, region.view)
        behind_s = time.monotonic() - ended_s
        numbers = await page.evaluate(READ_NUMBERS)
        longest_ms, drawn = await page.evaluate("[window.longest, state.drawn - window.drawnBefore]")
    print(f"behind {behind_s:.2f} s, longest frame {longest_ms:.0f} ms, {drawn} drawings")
    assert numbers["completed"] == f"{told['counts']['COMPLETED']:,}" == f"{int(rate_per_s * for_s / 4):,}"
    # On an idle machine a few tenths of a second each; a page that draws every event is behind for minutes.
    assert behind_s < 4.0
    assert longest_ms < 3000, "the page hung"
    assert 2 <= drawn <= 5 * (for_s + 5), "updates are not coalesced"


def test_top_folds_and_draws_two_thousand_events_in_a_fraction_of_a_second() -> None:
    """By processor time, so that a busy machine does not show: one second's events, and what is drawn in that second."""
    region = Topics()
    region.decide(0.0, NodeJoined(node=DEVICE), NodeJoined(node=EDGE))
    records: list[Record] = []
    collecting = Collector(region, records)
    for number in range(4000):
        one_event(collecting, number, number / 2000)
    for record in records[:2000]:
        region.view.read(record)
    console = Console(width=150, height=50)
    began_s = time.process_time()
    for record in records[2000:]:
        region.view.read(record)
    for _ in range(4):
        with console.capture():
            console.print(screen(region.view, rows=50))
        json.dumps(report(region.view))
    took_s = time.process_time() - began_s
    print(f"{took_s:.3f} s of processor time for one second at 2,000 events/s")
    assert took_s < 0.7


async def test_a_request_under_another_name_is_refused_and_everything_is_labelled() -> None:
    region = Topics()
    async with serve(region.view, host="127.0.0.1", port=0) as address, aiohttp.ClientSession() as session:
        async with session.get(address, headers={"Host": "evil.example"}) as reply:
            assert reply.status == 421
        for path in ("", "page.js", "page.css", "state.json", "nowhere"):
            async with session.get(address + path) as reply:
                assert reply.status == (404 if path == "nowhere" else 200)
                assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
                assert reply.headers["X-Content-Type-Options"] == "nosniff"
        async with session.get(address + "events") as reply:
            line = await reply.content.readline()
            assert json.loads(line.removeprefix(b"data: "))["planner"]["name"] == "p1"
