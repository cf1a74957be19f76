"""What a snapshot says of the leader is looked at before it is used."""

from __future__ import annotations

from typing import Any

import pytest

from bus import snapshots
from bus.messages import Snapshot


def behind(leader: Any) -> tuple[str, float, str | None]:
    snapshot = Snapshot(
        region=0, epoch=3, nonce="n", seq=7, offset=9, now_s=1.0, inputs={}, ledger_hash="h", state={"leader": leader}
    )
    log = snapshots.log_behind(snapshot)
    assert (log.epoch, log.nonce, log.seq) == (3, "n", 7)
    return log.planner, log.lease_s, log.identity


def test_the_leader_is_known() -> None:
    assert behind({"planner": "p", "lease_s": 5, "identity": "f"}) == ("p", 5.0, "f")


@pytest.mark.parametrize("leader", [None, "x", [], {}, {"planner": 1, "lease_s": "long", "identity": {}}])
def test_nonsense_is_nobody(leader: Any) -> None:
    assert behind(leader) == ("", 0.0, None)
