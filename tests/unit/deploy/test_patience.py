"""A service started before its broker waits as long as it is told to, and no longer."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from bus.errors import BusUnavailableError
from bus.memory import MemoryBroker, MemoryBus
from deploy import nodes
from loadgen.virtual_loop import run_virtual


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


@pytest.mark.parametrize(("patience", "opens"), [("10s", True), ("1s", False), (None, False)])
def test_it_waits_for_the_broker(monkeypatch: pytest.MonkeyPatch, patience: str | None, opens: bool) -> None:
    monkeypatch.delenv("DEEPAR_BROKER_PATIENCE", raising=False)
    if patience:
        monkeypatch.setenv("DEEPAR_BROKER_PATIENCE", patience)

    async def main() -> int:
        bus = Late(MemoryBroker(), "late")
        if opens:
            async with nodes.patiently(bus) as opened:
                assert opened is bus
        else:
            with pytest.raises(BusUnavailableError, match="no broker"):
                async with nodes.patiently(bus):
                    pass
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
            async with nodes.patiently(MemoryBus(MemoryBroker(), "patient"), site):
                pass

    run_virtual(main())
    assert len(tries) == (4 if opens else 2)
