"""Record split: a decision too large for one record becomes parts that hold its first changes, then the decision itself.

The decision remains one step: the last record holds its hash and input offsets, and all records share its sequence number.
Readers ignore the parts until the last record arrives (`bus.decisions`), so a planner may crash between any two records.
"""

from __future__ import annotations

from typing import Final

from bus.messages import Change, Decision, DecisionPart

RECORD_BYTES: Final = 800_000
"""Approximate size limit of a decision record; leaves room for headers below the broker's limit."""


def split_decision(decision: Decision, record_bytes: int = RECORD_BYTES) -> tuple[list[DecisionPart], Decision]:
    """Split a decision into parts, in order, and the decision with its last changes. No parts if it fits one record."""
    groups: list[list[Change]] = [[]]
    group_bytes = 0
    for change in decision.changes:
        size_bytes = len(change.__pydantic_serializer__.to_json(change, exclude_none=True)) + 1
        if group_bytes and group_bytes + size_bytes > record_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(change)
        group_bytes += size_bytes
    *earlier, last = groups
    parts = [
        DecisionPart(
            region=decision.region,
            epoch=decision.epoch,
            nonce=decision.nonce,
            seq=decision.seq,
            part=number,
            changes=tuple(changes),
        )
        for number, changes in enumerate(earlier, 1)
    ]
    return parts, decision.model_copy(update={"changes": tuple(last), "parts": len(parts) or None})


__all__ = ["RECORD_BYTES", "split_decision"]
