"""SIGKILL of the planner, the edge, the cloud and the broker in turn, while clients without retries send requests.

`DEEPAR_TEST_REQUESTS` sets how many requests are sent at least, such as 2000 for a long run.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.zoo.registry import load_model
from tests.client_environment import Clients
from tests.clients.cases import save
from tests.integration.serving_system import System, random_inputs, serving_system, uncut

REQUESTS = int(os.environ.get("DEEPAR_TEST_REQUESTS", "300"))
SECONDS_PER_REQUEST = 0.05  # at most, so that a run with many requests is long enough
LATE_S = 10.0
"""How much longer than its deadline a request may take on a machine that is busy with other tests."""
REPEATABLE = "the request may be repeated"
FINAL = ("[504]", "DEADLINE_EXCEEDED]")
"""Statuses, as the clients show them, of an error that must not be repeated: the time of the request is over."""


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with serving_system(tmp_path, ["lenet"]) as made:
        yield made


async def test_every_request_has_one_answer_or_one_error_and_sessions_go_on(
    clients: Clients, system: System, tmp_path: Path
) -> None:
    cases = tmp_path / "cases"
    cases.mkdir()
    model = load_model("lenet")
    save(cases, uncut(model, random_inputs(model, 16, seed=15)))
    load = asyncio.create_task(clients.run("triton_load", str(cases), system.http, system.grpc))
    try:
        await asyncio.sleep(2.0)
        for name in ("planner", "edge", "cloud"):
            system.running[name].end(signal.SIGKILL)
            await asyncio.sleep(1.0)
            restarted = system.start(name)
            await asyncio.to_thread(restarted.wait_ready)
            await asyncio.sleep(2.0)
            assert not load.done(), load.result()
        await asyncio.to_thread(system.broker.kill)
        await asyncio.sleep(1.0)
        await asyncio.to_thread(system.broker.start)
        await asyncio.sleep(max(4.0, (REQUESTS - 300) * SECONDS_PER_REQUEST))
    finally:
        (cases / "stop").touch()
    done = await load
    assert done["failed"] == []
    outcomes = done["outcomes"]
    told = Counter((one["worker"], (one["error"] or "")[:160]) for one in outcomes)
    assert len(outcomes) >= REQUESTS, told
    assert len({one["id"] for one in outcomes}) == len(outcomes)
    for one in outcomes:
        assert one["took_s"] < done["deadline_s"] + LATE_S, one
        if one["error"] is not None:
            assert any(words in one["error"] for words in (REPEATABLE, *FINAL)), one
    assert max(one["took_s"] for one in outcomes) > 1.0, "no fault reached a request"
    assert sum(one["error"] is None for one in outcomes) > len(outcomes) / 2, told
    assert all(done["calm"].values()), (done["calm"], told)
    assert len(done["calm"]) == 6
