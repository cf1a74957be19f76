"""Errors that DeePar raises on purpose: `DeeparError` and its subclasses.

The subclass names the source of the error: the caller (`ConfigError`, `ModelError`), a peer (`ProtocolError`), the
environment (`BusError`), or DeePar itself (`InvariantError`: a bug, which may crash the process). An optional `remedy` says
what to do; the command line prints it below the message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NEAR = 0.6
"""Minimum similarity of a suggested name, from 0 to 1, as computed by `difflib`."""


class DeeparError(Exception):
    """Base class of all errors raised on purpose. `remedy` says what to do."""

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy


class ConfigError(DeeparError):
    """A setting, flag or configuration file is wrong; the message names the key."""


class UnknownNameError(ConfigError):
    """A model, node, policy, pattern or task does not exist; the message suggests a similar name."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, remedy: str | None = None) -> UnknownNameError:
    """The error for a `name` that is not in `known`: suggests the most similar one. The default remedy lists them all."""
    names = [str(one) for one in known]
    folded = {one.casefold(): one for one in names}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=NEAR)
    question = f"; did you mean {folded[near[0]]}?" if near else ""
    all_of_them = f"there are: {', '.join(names)}" if names else "there are none"
    return UnknownNameError(f"there is no {kind} {name!r}{question}", remedy=remedy or all_of_them)


class ModelError(DeeparError):
    """A model file is invalid: `path` is the file, `fault` says what is wrong."""

    def __init__(self, path: str, fault: str, *, remedy: str | None = None) -> None:
        super().__init__(f"{path}: {fault}", remedy=remedy)
        self.path = path
        self.fault = fault


class PolicyError(DeeparError):
    """A user's policy raised an error or chose an impossible placement; the message names the policy and the line."""


class CutError(DeeparError):
    """A model cannot be cut at the requested position; the message says why."""


class ProtocolError(DeeparError):
    """A message from a peer is invalid: undecodable, of a wrong shape, too large, or of an unknown version."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause  # a short, stable word for dead letters and metrics, e.g. "undecodable"


class BusError(DeeparError):
    """An operation on the bus failed."""


class BusUnavailableError(BusError):
    """No broker answers at the configured address, or the broker was unavailable for longer than the timeout."""


class UnknownTopicError(BusError):
    """The topic does not exist, or this user may not see it."""


class MessageTooLargeError(BusError):
    """A record exceeds the size limit of its topic; `limit_bytes` is None if the limit is unknown."""

    def __init__(self, topic: str, size_bytes: int, limit_bytes: int | None) -> None:
        limit = "the limit (max.message.bytes)" if limit_bytes is None else f"the limit of {limit_bytes:,}"
        what = f"a record of {size_bytes:,} bytes"
        if limit_bytes is not None and size_bytes <= limit_bytes:  # the limit applies to the batch that held the record
            what = f"a batch of records, one of {size_bytes:,} bytes,"
        super().__init__(
            f"{what} is over {limit} of topic {topic}",
            remedy="`deepar doctor` compares the size limits of brokers and topics",
        )
        self.topic = topic
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class InvariantError(DeeparError):
    """An invariant is violated: a bug in DeePar. The message includes the events that led to it."""
