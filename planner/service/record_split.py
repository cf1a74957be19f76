"""A decision that fits no single record, as several: its changes in parts, and the decision itself behind them.

Cutting it up is all: it is one step still, with one sequence number, one hash, and one set of inputs, which stand in the last
record. Until that one stands nothing of it counts (`bus.decisions`), so a planner may die between any two of them.
"""

from __future__ import annotations

from typing import Final

from bus.messages import Change, Decision, DecisionPart

RECORD_BYTES: Final = 800_000
"""A record of the decisions takes at most about so much; what surrounds it on its way fits beside it."""


def split_decision(decision: Decision, record_bytes: int = RECORD_BYTES) -> tuple[list[DecisionPart], Decision]:
    """The parts of a decision, in order, and the decision with the changes that are left for it."""
    groups: list[list[Change]] = [[]]
    held = 0
    for change in decision.changes:
        size_bytes = len(change.__pydantic_serializer__.to_json(change, exclude_none=True)) + 1
        if held and held + size_bytes > record_bytes:
            groups.append([])
            held = 0
        groups[-1].append(change)
        held += size_bytes
    *before, last = groups
    parts = [
        DecisionPart(
            region=decision.region,
            epoch=decision.epoch,
            nonce=decision.nonce,
            seq=decision.seq,
            part=number,
            changes=tuple(changes),
        )
        for number, changes in enumerate(before, 1)
    ]
    return parts, decision.model_copy(update={"changes": tuple(last), "parts": len(parts) or None})


__all__ = ["RECORD_BYTES", "split_decision"]
