"""Every error that DeePar raises on purpose has one root, `DeeparError`.

The children tell *who* was wrong: the caller (`ConfigError`, `ModelError`), a peer (`ProtocolError`), the outside world
(`BusError`), or ourselves (`InvariantError`, which is a bug and is allowed to crash the process). A `remedy`, where there
is one, says what to do; the command line prints it under the message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NEAR = 0.6
"""How alike a name must be to be asked for, from 0 to 1, as `difflib` measures it."""


class DeeparError(Exception):
    """Root of all errors raised on purpose. `remedy` tells a person what to do next."""

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy


class ConfigError(DeeparError):
    """A setting, flag or configuration file is wrong; the message names the key."""


class UnknownNameError(ConfigError):
    """A model, node, policy, pattern or task is named that does not exist; the message lists near names."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, remedy: str | None = None) -> UnknownNameError:
    """The error for a `name` that is none of `known`: asks for the nearest; its remedy lists them, unless one is given."""
    names = [str(one) for one in known]
    folded = {one.casefold(): one for one in names}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=NEAR)
    question = f"; did you mean {folded[near[0]]}?" if near else ""
    all_of_them = f"there are: {', '.join(names)}" if names else "there are none"
    return UnknownNameError(f"there is no {kind} {name!r}{question}", remedy=remedy or all_of_them)


class ModelError(DeeparError):
    """A model file is refused: `path` names the file, `fault` what is wrong with it."""

    def __init__(self, path: str, fault: str, *, remedy: str | None = None) -> None:
        super().__init__(f"{path}: {fault}", remedy=remedy)
        self.path = path
        self.fault = fault


class PolicyError(DeeparError):
    """A user's policy raised an error, or chose what cannot be; the message names the policy and the line."""


class CutError(DeeparError):
    """A model cannot be cut at the position asked for; the message says why."""


class ProtocolError(DeeparError):
    """A message from a peer is broken: undecodable, of a wrong shape, too large, of an unknown version."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause  # a short, stable word for dead letters and metrics, e.g. "undecodable"


class BusError(DeeparError):
    """The bus could not do what was asked."""


class BusUnavailableError(BusError):
    """No broker answers at the address given, or it went away for longer than we wait."""


class UnknownTopicError(BusError):
    """The topic does not exist, or may not be seen."""


class MessageTooLargeError(BusError):
    """A record is larger than the limit of its topic, `limit_bytes` where that is known."""

    def __init__(self, topic: str, size_bytes: int, limit_bytes: int | None) -> None:
        limit = "the limit (max.message.bytes)" if limit_bytes is None else f"the limit of {limit_bytes:,}"
        what = f"a record of {size_bytes:,} bytes"
        if limit_bytes is not None and size_bytes <= limit_bytes:  # it went in a batch, and the batch is judged
            what = f"a batch of records, one of {size_bytes:,} bytes,"
        super().__init__(
            f"{what} is over {limit} of topic {topic}", remedy="`deepar doctor` compares the sizes that are allowed"
        )
        self.topic = topic
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class InvariantError(DeeparError):
    """Something that must always hold does not: a bug of ours. The message carries the history that led there."""
