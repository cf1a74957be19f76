"""Codecs within the size limit of an announcement."""

from __future__ import annotations

from collections.abc import Sequence

from bus.messages import MAX_MESSAGE_BYTES
from bus.values import ModelProfile

ROOM_BYTES = MAX_MESSAGE_BYTES - 50_000
"""For the profiles; the rest is for the other fields, such as the names of reachable edges."""


def fitting(profiles: Sequence[ModelProfile], room_bytes: int = ROOM_BYTES) -> tuple[ModelProfile, ...]:
    """The profiles, with the codecs of the largest ones left out until all fit into a message."""
    kept = list(profiles)
    sizes = [len(profile.model_dump_json(exclude_none=True)) for profile in kept]
    while sum(sizes) > room_bytes:
        coded = [at for at, profile in enumerate(kept) if profile.codecs or profile.agreements]
        if not coded:
            break  # the message is then refused, as without codecs
        largest = max(coded, key=lambda at: sizes[at])
        kept[largest] = kept[largest].without_codecs()
        sizes[largest] = len(kept[largest].model_dump_json(exclude_none=True))
    return tuple(kept)
