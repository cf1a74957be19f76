"""The `parameters` of a request, from the values that a transport decoded to `RequestTerms`.

The names are Triton's where Triton has one. Parameters of other names are ignored, as the protocol asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bus.values import Role
from stages.serving.values import Fault, Mode, RequestTerms, ServingError

LONGEST_SESSION_NAME = 128
LARGEST = 2**62  # of a number without a limit of its own
LARGEST_PRIORITY = 1_000  # as in `TaskSubmitted`
LARGEST_BPS = 1 << 50
LARGEST_HZ = 1e6
NO_TERMS = RequestTerms()


def request_terms(parameters: Mapping[str, Any]) -> RequestTerms:
    """Read and check the parameters. Raises `ServingError` (`INVALID`) with the name of the wrong one."""
    if not parameters:
        return NO_TERMS
    timeout_us = _whole(parameters, "timeout")
    session = _session(parameters.get("sequence_id"))
    return RequestTerms(
        timeout_s=timeout_us / 1e6 if timeout_us else None,
        priority=_whole(parameters, "priority", LARGEST_PRIORITY) or None,
        max_link1_bps=_whole(parameters, "max_link1_bps", LARGEST_BPS),
        max_link2_bps=_whole(parameters, "max_link2_bps", LARGEST_BPS),
        min_agreement=_agreement(parameters),
        mode=_mode(parameters.get("deepar_mode")),
        tiers=_tiers(parameters.get("placement")),
        session=session,
        session_start=session is not None and _flag(parameters, "sequence_start"),
        session_end=session is not None and _flag(parameters, "sequence_end"),
        rate_hz=_positive(parameters, "rate_hz", LARGEST_HZ),
        latency_s=_positive(parameters, "latency_s"),
    )


def _wrong(name: str, expected: str, value: object) -> ServingError:
    return ServingError(Fault.INVALID, f"parameter {name!r}: expected {expected}, got {value!r:.60}")


def _number(parameters: Mapping[str, Any], name: str, expected: str) -> float | int | None:
    """A number of at most `LARGEST` in size; None if it is absent. It may be text, since some clients only send text."""
    value = parameters.get(name)
    if value is None:
        return None
    number = value
    if isinstance(value, str):
        try:
            number = int(value) if value.isdecimal() and len(value) < 20 else float(value)
        except ValueError:
            raise _wrong(name, expected, value) from None
    if isinstance(number, bool) or not isinstance(number, int | float) or not -LARGEST <= number <= LARGEST:
        raise _wrong(name, expected, value)
    return number


def _whole(parameters: Mapping[str, Any], name: str, largest: int = LARGEST) -> int | None:
    expected = f"a whole number from 0 to {largest:,}"
    number = _number(parameters, name, expected)
    if number is None:
        return None
    if not 0 <= number <= largest or number != int(number):
        raise _wrong(name, expected, parameters[name])
    return int(number)


def _positive(parameters: Mapping[str, Any], name: str, largest: float = LARGEST) -> float | None:
    expected = f"a positive number, at most {largest:,.0f}"
    number = _number(parameters, name, expected)
    if number is not None and not 0 < number <= largest:
        raise _wrong(name, expected, parameters[name])
    return None if number is None else float(number)


def _agreement(parameters: Mapping[str, Any]) -> float | None:
    expected = "a number from 0 to 1"
    number = _number(parameters, "min_agreement", expected)
    if number is not None and not 0 <= number <= 1:
        raise _wrong("min_agreement", expected, parameters["min_agreement"])
    return None if number is None else float(number)


def _mode(value: object) -> Mode:
    if value is None:
        return Mode.AUTO
    try:
        return Mode(str(value))
    except ValueError:
        raise _wrong("deepar_mode", "auto, request or session", value) from None


def _flag(parameters: Mapping[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return value


def _session(value: object) -> str | None:
    """The session of a `sequence_id`: a whole number or text; 0 and "" name none."""
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, int | str) or len(name := str(value)) > LONGEST_SESSION_NAME:
        raise _wrong("sequence_id", f"a whole number or at most {LONGEST_SESSION_NAME} characters of text", value)
    return None if value == 0 else name


def _tiers(value: object) -> tuple[Role, ...] | None:
    """The tiers of a `placement`: `device+edge` names those that may compute, `-cloud` those that may not.

    Several are joined by `+`, as in the kind of a placement, or by commas.
    """
    if value is None or value == "":
        return None
    expected = (
        "tiers that may compute (device+edge of device, edge, cloud), or each that may not after a minus (-cloud)"
    )
    if not isinstance(value, str):
        raise _wrong("placement", expected, value)
    names = [name.strip() for name in value.replace("+", ",").split(",")]
    forbidden = {name[1:] for name in names if name.startswith("-")}
    pinned = {name for name in names if not name.startswith("-")}
    known = {str(role) for role in Role}
    if (forbidden and pinned) or not (forbidden | pinned) <= known or forbidden == known:
        raise _wrong("placement", expected, value)
    return tuple(role for role in Role if (str(role) in pinned if pinned else str(role) not in forbidden))
