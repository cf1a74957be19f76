"""Every number that `deepar ui` shows, read from the page in a real browser and compared with the topics; its time axis; and
what a phone shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bus import topics
from bus.messages import Ended, NodeAnnounced, NodeJoined, Placed, PlannerHeartbeat, TaskState
from bus.text.units import format_seconds, parse_duration, parse_rate
from bus.values import Kind, Parts, Placement, Role
from deploy.monitor.phrases import STATION_NAMES
from deploy.monitor.ui import serve
from planner.learning.lessons import name_of, text_of
from tests.browser import Page, open_page
from tests.unit.deploy.monitor.test_region_view import DEVICE, PLACE, Topics, admitted, learned, placed, start

AWKWARD_S = (
    1e-7,
    5e-4,
    0.01,
    0.1,
    0.48,
    0.5,
    0.9996,
    0.9999,
    0.99996,
    10.0,
    59.99,
    100.0,
    480.0,
    999.9,
    999.96,
    3600.0,
    1e5,
)
AWKWARD_BPS = (100, 480_000, 999_960, 100_000_000, 500_000_000, 999_960_000)
CHOOSE = "document.querySelector('.task[data-task=\"{}\"]').click()"
READ_DETAIL = """[...document.querySelectorAll('#detail tbody tr')].map(
    (row) => [...row.querySelectorAll('td')].map((cell) => cell.textContent))"""
READ_AXIS = "[...document.querySelectorAll('#axis span')].map((tick) => tick.textContent)"


def ended(name: str, delay_s: float, parts: Parts) -> Ended:
    return Ended(task_id=name, attempt=1, state=TaskState.COMPLETED, measured=parts, delay_s=delay_s)


def scaled(name: str, value_s: float) -> tuple[Placed, Parts, Parts]:
    """A placement whose busy times are all awkward, and what was measured: another awkward set."""
    plan, real = (Parts(**{f"{s}_s": value_s * f for s in STATION_NAMES}) for f in (1.0, 0.5))
    return placed(name, 1.0, 1.0).model_copy(update={"parts": plan, "delay_s": value_s}), plan, real


async def drawn(page: Page, region: Topics) -> None:
    await page.until(f"Number(document.body?.dataset.version) >= {region.view.version}")


def shows(text: str, value_s: float) -> bool:
    """Whether a text says a duration to three digits."""
    return text == "0 s" if value_s == 0 else parse_duration(text) == pytest.approx(value_s, rel=0.00501)


async def test_durations_on_the_page_are_those_of_the_topics(tmp_path: Path) -> None:
    region = Topics()
    region.decide(0.0, NodeJoined(node=DEVICE))
    for number, value_s in enumerate(AWKWARD_S):
        name = f"t{number}"
        place, _, real = scaled(name, value_s)
        region.decide(1.0, admitted(name), place, start(name, 1.0))
        region.decide(1.0 + value_s, ended(name, value_s, real))
        region.clock_ms = 1_000_000
    async with serve(region.view, host="127.0.0.1", port=0) as address, open_page(tmp_path) as page:
        await page.open(address)
        await drawn(page, region)
        await page.evaluate("document.getElementById('window').value = ''; draw()")
        for number, value_s in enumerate(AWKWARD_S):
            await page.evaluate(CHOOSE.format(f"t{number}"))
            predicted, measured = await page.evaluate(READ_DETAIL)
            *predicted, planned_rest, planned_s = predicted
            *measured, rest, took_s = measured
            for text in (*predicted, planned_s):
                assert shows(text, value_s), (text, value_s)
            for text in measured:
                assert shows(text, value_s / 2), (text, value_s / 2)
            task = region.view.tasks[f"t{number}"]
            assert planned_rest == "0 s"
            assert rest == format_seconds(task.measured_rest_s or 0.0)
            end = await page.evaluate(f"document.querySelector('.task[data-task=\"t{number}\"] em').textContent")
            assert shows(end, value_s), (end, value_s)
            assert took_s == end
        numbers = await page.evaluate(
            "Object.fromEntries([...document.querySelectorAll('#numbers div')].map("
            "(pair) => [pair.dataset.name, pair.querySelector('dd').textContent]))"
        )
    told = sorted(AWKWARD_S)
    nearest = {"p50": told[8], "p90": told[15], "p99": told[16], "mean": sum(told) / len(told)}
    for name, value_s in nearest.items():
        assert shows(numbers[f"{name} delay"], value_s), (name, numbers)


async def test_rates_and_plurals_on_the_page_are_those_of_the_topics(tmp_path: Path) -> None:
    region = Topics()
    region.decide(0.0, NodeJoined(node=DEVICE))
    for number, bps in enumerate(AWKWARD_BPS):
        edge = NodeAnnounced(
            node=f"e{number}", role=Role.EDGE, incarnation="i", slots=1 + number % 2, link1_capacity_bps=bps * 2,
            link2_capacity_bps=1_000_000_000,
        )  # fmt: skip
        place = Placement(
            kind=Kind.EDGE, edge=edge.node, cut1=0, cut2=3, cut1_name="input", cut2_name="fc_3", link1_bps=bps
        )
        name = f"t{number}"
        region.decide(0.0, NodeJoined(node=edge))
        region.decide(1.0, admitted(name), placed(name, 1.0, 1.0, place), start(name, 1.0))
    cloud = NodeAnnounced(node="c1", role=Role.CLOUD, incarnation="i")
    region.decide(1.0, NodeJoined(node=cloud), admitted("relayed"))
    relayed = PLACE.model_copy(update={"edge": "e0"})
    region.decide(1.0, placed("relayed", 1.0, 1.0, relayed), start("relayed", 1.0), admitted("waits", "d9"))
    async with serve(region.view, host="127.0.0.1", port=0) as address, open_page(tmp_path) as page:
        await page.open(address)
        await drawn(page, region)
        for number, bps in enumerate(AWKWARD_BPS):
            row = f"document.querySelector('[data-edge=\"e{number}\"]')"
            granted, capacity = (await page.evaluate(f"{row}.querySelector('.link1-cell .amount').textContent")).split(
                " of "
            )
            held_bps = bps + (relayed.link1_bps if number == 0 else 0)
            assert parse_rate(granted) == pytest.approx(held_bps, rel=0.00501)
            assert parse_rate(capacity) == pytest.approx(bps * 2, rel=0.00501)
            grants = await page.evaluate(
                f"[...{row}.querySelectorAll('.link1-cell .bar span')].map((part) => part.title)"
            )
            told = {name: parse_rate(text) for name, text in (grant.split(": ") for grant in grants)}
            assert told[f"t{number}"] == pytest.approx(bps, rel=0.00501)
            if number:
                await page.evaluate(CHOOSE.format(f"t{number}"))
                caption = await page.evaluate("document.querySelector('#detail caption').textContent")
                assert caption.startswith(f"t{number}: 5 samples of toy from d1: edge through e{number}, uncut, ")
                assert caption.endswith("bps on link 1"), "link 2, which the task does not use, is left out"
        text: str = await page.evaluate("document.body.innerText")
    assert "1 task, and what each waits for" in text
    assert "1 of 2 slots" in text
    assert "2 of 1 slot\n" in text, "e0 relays to the cloud with a slot of its own"
    assert "1 tasks" not in text
    assert "1 slots" not in text
    assert " 0 bps" not in text


async def test_the_time_axis_goes_on_while_a_task_waits(tmp_path: Path) -> None:
    region = Topics()
    region.decide(1665.2, NodeJoined(node=DEVICE), admitted("t1", "d9"))
    async with serve(region.view, host="127.0.0.1", port=0) as address, open_page(tmp_path) as page:
        await page.open(address)
        seen: list[list[str]] = []
        for passed_ms in (0, 700, 30_000, 3_600_000):
            region.clock_ms += passed_ms
            region.send(topics.DECISIONS, PlannerHeartbeat(region=0, epoch=1, nonce="n"))
            await drawn(page, region)
            axis = await page.evaluate(READ_AXIS)
            assert len(axis) == len(set(axis)) >= 2, axis
            at_s = [parse_duration(text) for text in axis]
            assert 1665.0 < min(at_s) < max(at_s) <= region.view.now_s + 0.01
            assert max(at_s) >= 1665.2 + 0.6 * (region.view.now_s - 1665.2)
            seen.append(axis)
    assert len({tuple(axis) for axis in seen}) == len(seen)


@pytest.mark.parametrize("width", [320, 390, 768, 1400])
async def test_nothing_is_wider_than_the_screen(tmp_path: Path, width: int) -> None:
    region = Topics()
    long = "replay-20261125T211743-0-17-of-a-device-with-a-long-name"
    edge = NodeAnnounced(
        node="edge-of-the-northern-hall-17", role=Role.EDGE, incarnation="i", slots=20,
        link1_capacity_bps=999_960_000, link2_capacity_bps=480_000_000,
    )  # fmt: skip
    cloud = NodeAnnounced(node="cloud-of-the-whole-company", role=Role.CLOUD, incarnation="i")
    region.decide(0.0, NodeJoined(node=DEVICE), NodeJoined(node=edge), NodeJoined(node=cloud))
    place = PLACE.model_copy(update={"edge": edge.node})
    region.decide(1.0, admitted(long), placed(long, 1.0, 1.0, place), start(long, 1.0))
    region.decide(2.0, admitted(f"{long}-2"), placed(f"{long}-2", 9.0, 2.0, place))
    async with serve(region.view, host="127.0.0.1", port=0) as address, open_page(tmp_path, width=width) as page:
        await page.open(address)
        await drawn(page, region)
        await page.evaluate(CHOOSE.format(long))
        sizes: dict[str, Any] = await page.evaluate(
            "({shown: document.documentElement.clientWidth, needed: document.documentElement.scrollWidth,"
            " beyond: [...document.querySelectorAll('main *:not(#detail *)')].filter("
            "(each) => each.getBoundingClientRect().right > innerWidth + 0.5).map((each) => each.className || each.id)})"
        )
    assert sizes["needed"] <= sizes["shown"] == width
    assert sizes["beyond"] == []


@pytest.mark.parametrize("width", [390, 1400])
async def test_errors_and_what_was_learned_and_a_silent_planner_are_on_the_page(tmp_path: Path, width: int) -> None:
    region = Topics()
    region.decide(0.0, NodeJoined(node=DEVICE))
    place = placed("t1", 1.0, 1.0)
    region.decide(1.0, admitted("t1"), place, start("t1", 1.0))
    region.decide(22.0, ended("t1", 1.4 * place.delay_s, place.parts), learned("t1"))
    async with serve(region.view, host="127.0.0.1", port=0) as address, open_page(tmp_path, width=width) as page:
        await page.open(address)
        await drawn(page, region)
        await page.evaluate("document.getElementById('window').value = ''; draw()")
        assert await page.evaluate("document.querySelector('.task .name small').textContent") == "+40 %"
        number = "document.querySelector('#numbers [data-name=\"prediction error\"] dd').textContent"
        assert await page.evaluate(number) == "40 %"
        lessons = await page.evaluate("[...document.querySelectorAll('#learned li')].map((one) => one.textContent)")
        assert lessons == [
            f"{name_of(lesson.value)} {text_of(lesson.value)} from 1 task, the last t1"
            for lesson in region.view.lessons.newest(9)
        ]
        planner = "document.getElementById('planner')"
        assert await page.evaluate(f"{planner}.className") == ""
        region.view.note_silence(14.2)
        await drawn(page, region)
        assert await page.evaluate(f"{planner}.textContent") == region.view.planner_text()
        assert "silent since 22.0 s, for 14 s" in region.view.planner_text()
        assert await page.evaluate(f"{planner}.className") == "lost"
        region.decide(23.0, admitted("t2"))
        await drawn(page, region)
        assert await page.evaluate("document.querySelectorAll('#learned li').length") == len(lessons), "still there"
        assert page.complaints == []
