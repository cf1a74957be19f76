"""Codecs and batches within the size limit of an announcement."""

from __future__ import annotations

from collections.abc import Sequence

from bus.messages import MAX_MESSAGE_BYTES
from bus.values import ModelProfile

ROOM_BYTES = MAX_MESSAGE_BYTES - 50_000
"""For the profiles; the rest is for the other fields, such as the names of reachable edges."""


def fitting(profiles: Sequence[ModelProfile], room_bytes: int = ROOM_BYTES) -> tuple[ModelProfile, ...]:
    """The profiles without the codecs, then also without the batches, of the largest ones, until all fit into a message."""
    kept = list(profiles)
    sizes = [_size(profile) for profile in kept]
    while sum(sizes) > room_bytes:
        coded = [at for at, profile in enumerate(kept) if profile.codecs or profile.agreements]
        batched = [at for at, profile in enumerate(kept) if profile.batch]
        if not coded and not batched:
            break  # the message is then refused, as without them
        largest = max(coded or batched, key=lambda at: sizes[at])
        kept[largest] = kept[largest].without_codecs() if coded else kept[largest].without_batches()
        sizes[largest] = _size(kept[largest])
    return tuple(kept)


def _size(profile: ModelProfile) -> int:
    return len(profile.model_dump_json(exclude_none=True))
