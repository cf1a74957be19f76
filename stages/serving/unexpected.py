"""Unexpected errors of the endpoint: logged without the data of a client, and told to the client as internal."""

from __future__ import annotations

import traceback

import structlog

from stages.serving.values import Fault, ServingError

log = structlog.get_logger("serving")


def internal_error(call: str, error: Exception) -> ServingError:
    """The refusal of a request that met an unexpected error. Logs where it was raised.

    The error's text and the values in its frames are not logged: they may hold what the client sent.
    """
    frames = traceback.extract_tb(error.__traceback__)[-5:]
    where = [f"{frame.filename}:{frame.lineno}" for frame in frames]
    log.error("request failed with an unexpected error", call=call, error=type(error).__name__, where=where)
    return ServingError(Fault.INTERNAL, "internal error; the log of the device has it")
