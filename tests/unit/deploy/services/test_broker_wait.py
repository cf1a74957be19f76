"""A service started before its broker waits for the configured time, and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import pytest

from bus import topics
from bus.errors import BusUnavailableError
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.memory.readers import MemoryReader
from bus.values import Role
from deploy.services.broker_wait import Patience
from deploy.services.wiring import Stage
from loadgen.sim.virtual_loop import run_virtual
from stages.membership.settings import NodeSettings
from stages.runner import ModelledRunner


class Late(MemoryBus):
    """A bus whose broker comes up after some tries."""

    failures = 3
    tries = 0

    async def __aenter__(self) -> Late:
        self.tries += 1
        if self.tries <= self.failures:
            raise BusUnavailableError("no broker")
        await super().__aenter__()
        return self


class Fickle(MemoryBus):
    """A bus whose broker goes away again, right after it was found, whenever something is to be read."""

    absences = 4

    async def reader(self, partitions: Iterable[tuple[str, int]], *, start: Any) -> MemoryReader:
        if self.absences:
            self.absences -= 1
            raise BusUnavailableError("gone again")
        return await super().reader(partitions, start=start)


@pytest.mark.parametrize(("patience", "opens"), [("10s", True), ("1s", False), (None, False)])
def test_it_waits_for_the_broker(monkeypatch: pytest.MonkeyPatch, patience: str | None, opens: bool) -> None:
    monkeypatch.delenv("DEEPAR_BROKER_PATIENCE", raising=False)
    if patience:
        monkeypatch.setenv("DEEPAR_BROKER_PATIENCE", patience)

    async def main() -> int:
        bus = Late(MemoryBroker(), "late")
        if opens:
            assert await Patience.from_env().through(bus.__aenter__) is bus
        else:
            with pytest.raises(BusUnavailableError, match="no broker"):
                await Patience.from_env().through(bus.__aenter__)
        return bus.tries

    assert run_virtual(main()) == (4 if opens else 1 if patience is None else 2)


@pytest.mark.parametrize(("patience_s", "opens"), [(10, True), (1, False)])
def test_it_waits_for_the_broker_of_another_site_as_long(
    monkeypatch: pytest.MonkeyPatch, patience_s: int, opens: bool
) -> None:
    monkeypatch.setenv("DEEPAR_BROKER_PATIENCE", f"{patience_s}s")
    tries = []

    async def site() -> None:
        tries.append(1)
        if len(tries) < 4:
            raise BusUnavailableError("no broker at the site")

    async def main() -> None:
        with nullcontext() if opens else pytest.raises(BusUnavailableError, match="at the site"):
            await Patience.from_env().through(site)

    run_virtual(main())
    assert len(tries) == (4 if opens else 2)


@pytest.mark.parametrize("role", [Role.DEVICE, Role.EDGE, Role.CLOUD])
@pytest.mark.parametrize("patience_s", [10.0, 2.0])
def test_a_stage_whose_broker_goes_away_again_before_it_serves_begins_anew(role: Role, patience_s: float) -> None:
    async def main() -> bool:
        bus = Fickle(MemoryBroker(), "fickle")
        await bus.__aenter__()
        await bus.create_topics(topics.specs(["n"]))
        stage = Stage(bus, NodeSettings(name="n", role=role, slots=1), ModelledRunner([]))
        serving = asyncio.create_task(Patience(patience_s).through(stage.serve))
        await asyncio.sleep(8.0)
        if serving.done():
            with pytest.raises(BusUnavailableError, match="gone again"):
                serving.result()
            return False
        assert stage.look().detail["caught_up"]
        serving.cancel()
        await asyncio.wait([serving])
        return stage.node.serving.is_set()

    assert run_virtual(main()) is (patience_s > 5.0)
