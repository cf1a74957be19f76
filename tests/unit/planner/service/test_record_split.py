"""A decision that is too large is split into several records and read as one again."""

from __future__ import annotations

from random import Random

import pytest

from bus import messages
from bus.decisions import DecisionLog, Dropped
from bus.messages import Change, Decision, EpochOpened, NodeLost, Retried
from planner.service.record_split import split_decision


def decision(random: Random, count: int) -> Decision:
    changes: list[Change] = [
        Retried(task_id=f"t{number}", attempt=2, cause="node_lost", detail="x" * random.randrange(200))
        for number in range(count)
    ]
    changes.append(NodeLost(node="e1", incarnation="i1", cause="left"))
    return Decision(
        region=0, epoch=1, nonce="n", seq=1, now_s=5.0, inputs={"t": 1}, changes=tuple(changes), ledger_hash="h"
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_split_decision_is_read_as_it_was(seed: int) -> None:
    random = Random(seed)
    whole = decision(random, random.randrange(1, 60))
    limit = random.choice((1, 100, 500, 2_000))
    parts, last = split_decision(whole, limit)
    log = DecisionLog()
    log.accept(EpochOpened(region=0, epoch=1, nonce="n", planner="p", lease_s=1.0))
    for part in parts:
        sizes = [len(change.model_dump_json(exclude_none=True)) for change in part.changes]
        assert len(sizes) == 1 or sum(sizes) <= limit
        assert not isinstance(log.accept(messages.decode("deepar.decisions", messages.encode(part))), Dropped)
    read = log.accept(messages.decode("deepar.decisions", messages.encode(last)))
    assert isinstance(read, Decision)
    assert read.model_copy(update={"parts": None}) == whole


def test_what_fits_stays_one_record() -> None:
    whole = decision(Random(0), 10)
    assert split_decision(whole) == ([], whole)
